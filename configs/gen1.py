"""RVT-B on Gen1 (240x304, cars and pedestrians) as its paper trains it: mixed sampling, 400k steps.

    python train.py configs/gen1.py --data_dir=datasets/gen1
    python eval.py --ckpt rvt-b.ckpt configs/gen1.py --data_dir=datasets/gen1

RVT's paper reports an mAP of 47.2 on the test split (class mean, Prophesee filter). Here: not
measured.
"""

class_names = ("car", "pedestrian")
patch_size = 4
partition_split = 1      # groups of 8 x 10 tokens
fpn_stages = (2, 3, 4)
sampling = "mixed"
sequence_length = 21
batch_size = 8
eval_batch_size = 8
learning_rate = 2e-4
max_steps = 400_000
eval_interval = 10_000

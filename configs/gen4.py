"""RVT-B on 1 Mpx at half resolution (360x640, three classes) as its paper trains it: mixed
sampling, 400k steps.

    torchrun --nproc_per_node=2 train.py configs/gen4.py --data_dir=datasets/gen4 --batch_size=12
    python eval.py --ckpt rvt-b.ckpt configs/gen4.py --data_dir=datasets/gen4

RVT's paper reports an mAP of 47.4 on the test split (class mean, Prophesee filter). Here: not
measured.
"""

class_names = ("pedestrian", "two-wheeler", "car")
patch_size = 4
partition_split = 2      # groups of 6 x 10 tokens
fpn_stages = (2, 3, 4)
sampling = "mixed"
sequence_length = 5
batch_size = 24
eval_batch_size = 8
learning_rate = 3.46e-4  # 2e-4 * sqrt(24 / 8)
max_steps = 400_000
eval_interval = 10_000

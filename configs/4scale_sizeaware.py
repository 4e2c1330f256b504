"""Four scales (strides 4, 8, 16, 32) and a size-aware IoU loss that weighs a 16x16 box 1.95 times a
large one.

    python train.py configs/4scale_sizeaware.py --data_dir=datasets/etram

The notes report (theirs, unverified), by the eTraM fork's overall AP (class-agnostic, ids 0 to 2,
Prophesee filter): AP 32.2, small 12.8, one run after training; their target was 36 to 38. Here: not
measured; at the toy's size an AP of 10.0, the baseline's 7.6 (NOTES.md).
"""

class_names = ("pedestrian", "car", "bicycle", "bus", "motorbike", "truck", "tram", "wheelchair")
patch_size = 4
fpn_stages = (1, 2, 3, 4)
size_aware_loss = True
size_aware_weight = 2.5
weight_type = "exponential"
sequence_length = 5
batch_size = 6
eval_batch_size = 2
learning_rate = 1.7e-4   # 2e-4 * sqrt(6 / 8)
max_steps = 100_000
eval_interval = 3500

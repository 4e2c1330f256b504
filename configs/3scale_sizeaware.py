"""The baseline's three scales (strides 8, 16, 32) with the size-aware IoU loss: the foundation of
the attention run.

    python train.py configs/3scale_sizeaware.py --data_dir=datasets/etram

The notes report (theirs, unverified), by the eTraM fork's overall AP (class-agnostic, ids 0 to 2,
Prophesee filter): AP 34.1, small 13.5, one run after training. Here: not measured; at the toy's
size an AP of 6.9, the baseline's 7.6 (NOTES.md).
"""

class_names = ("pedestrian", "car", "bicycle", "bus", "motorbike", "truck", "tram", "wheelchair")
patch_size = 4
fpn_stages = (2, 3, 4)
size_aware_loss = True
size_aware_weight = 2.5
weight_type = "exponential"
sequence_length = 5
batch_size = 6
eval_batch_size = 2
learning_rate = 1.7e-4   # 2e-4 * sqrt(6 / 8)
max_steps = 100_000
eval_interval = 3500

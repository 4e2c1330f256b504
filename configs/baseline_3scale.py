"""The notes' baseline: RVT-B on eTraM's eight classes, patch 4, three scales (strides 8, 16, 32),
plain loss.

    python train.py configs/baseline_3scale.py --data_dir=datasets/etram

The notes report (theirs, unverified), by the eTraM fork's overall AP (class-agnostic, ids 0 to 2,
Prophesee filter): AP 34.0, small 17.3, AP50 67.0, one run after training; 26.0 in its in-training
validation at threshold 0.1. Here: not measured; at the toy's size an AP of 7.6 (NOTES.md).
"""

class_names = ("pedestrian", "car", "bicycle", "bus", "motorbike", "truck", "tram", "wheelchair")
patch_size = 4
fpn_stages = (2, 3, 4)
sequence_length = 5
batch_size = 6
eval_batch_size = 2
learning_rate = 1.7e-4   # 2e-4 * sqrt(6 / 8)
max_steps = 100_000
eval_interval = 3500

"""Patch 2 at four scales (strides 2, 4, 8, 16) with the size-aware IoU loss, trained twice as long.

    python train.py configs/patch2_4scale_sizeaware.py --data_dir=datasets/etram

The notes' alternative where memory is short: --batch_size=1 --gradient_accumulation_steps=2 (the
same data, batch norm sees one stream at a time); or --checkpointing=True. The notes report (theirs,
unverified), by the eTraM fork's overall AP (class-agnostic, ids 0 to 2, Prophesee filter): AP 31.2,
small 14.9, one run after training. Here: not measured; at the toy's size an AP of 11.9, the
baseline's 7.6 (NOTES.md).
"""

class_names = ("pedestrian", "car", "bicycle", "bus", "motorbike", "truck", "tram", "wheelchair")
patch_size = 2
fpn_stages = (1, 2, 3, 4)
size_aware_loss = True
size_aware_weight = 2.0
small_threshold = 1024   # 32 x 32 px
medium_threshold = 9216  # 96 x 96 px
weight_type = "exponential"
sequence_length = 5
batch_size = 2
eval_batch_size = 2
learning_rate = 1e-4     # 2e-4 * sqrt(2 / 8)
max_steps = 200_000
eval_interval = 5000

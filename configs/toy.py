"""RVT-T's network on the simulated traffic, in minutes on two CPU cores.

    python train.py configs/toy.py

"""

out_dir = "out_toy"
patch_size = 4
embed_dim = 32
fpn_depth = 0.33
fpn_stages = (2, 3, 4)
sequence_length = 5
batch_size = 4
eval_batch_size = 4
learning_rate = 1e-3
num_workers = 1
max_steps = 1000
eval_interval = 500
log_interval = 20
checkpoint_interval = 100

"""Peak memory and speed of an experiment's training step, by batch size, with and without recomputation.

In: a config of train.py. Out: a table, where the memory goes, the largest batch that fits a budget, and one JSON line.
It runs the real model, loss and optimiser on frames of the full size with made-up events and boxes: warm-up steps
first, then the median and the spread of the timed ones. Each row is measured in a process of its own. GPU: peak of the
allocator. CPU: peak of the process. Both: bytes that the forward pass keeps for the backward pass.

    python bench_memory.py configs/patch2_4scale_sizeaware.py --batch_sizes=1,2,4,6,8 --budget_gib=24
"""

import json
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import torch

import train
from configurator import command_line, configure
from model import keep_buffers

batch_sizes = (1, 2, 4, 6, 8)
budget_gib = 24.0   # memory of the card to fit
steps = 5           # timed steps, after two that warm up
boxes = 8           # a labelled frame, sides of 6 to 100 px; every second frame has labels
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}
GIB = 2 ** 30


def made_up(T, B, hw, num_classes, device):
    """Events like a street's (1 cell in 30 holds some), indices of labelled frames and their targets."""
    generator, (H, W) = torch.Generator().manual_seed(0), hw
    events = torch.poisson(torch.full((T, B, 20, H, W), 1 / 30), generator=generator).to(torch.uint8)
    index = torch.arange(T * B).view(T, B)[(T - 1) % 2::2].flatten()
    targets = torch.zeros(len(index), max(boxes, 16), 5)
    draw = torch.rand(len(index), boxes, 5, generator=generator)
    targets[:, :boxes] = draw * torch.tensor([num_classes, W, H, 94, 94]) + torch.tensor([0, 0, 0, 6, 6])
    targets[..., 0].floor_()
    return events.to(device), index.to(device), targets.to(device)


def kept_bytes(forward, inputs):
    """{part of the network: bytes of activations kept for the backward pass}, each storage counted once."""
    part, kept, total = ["loss"], {}, Counter()
    weights = {p.untyped_storage().data_ptr() for p in forward.parameters()}
    hooks = []
    for name, child in forward.model.named_children():
        for k, module in enumerate(child if isinstance(child, torch.nn.ModuleList) else [child], 1):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=f"{name} {k}": part.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: part.pop() and None))

    def pack(x):  # keeps x, so that no address is used twice
        kept.setdefault(x.untyped_storage().data_ptr(), (part[-1], x.untyped_storage().nbytes(), x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward(*inputs)
    for hook in hooks:
        hook.remove()
    for pointer, (name, size, _) in kept.items():
        total[name] += 0 if pointer in weights else size
    return total


def measure(config, B, device, dtype):
    """Row of the table for one batch size: bytes kept by part, then peak and time of whole training steps."""
    keep_buffers()
    model, T = train.build(config, config.input_hw, config.num_classes, None).to(device).train(), config.sequence_length
    forward = train.Forward(model, train.size_aware(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)  # as train.py's
    events, index, targets = made_up(T, B, config.input_hw, config.num_classes, device)
    inputs, seconds = (events, model.initial_state(B), index, targets), []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        kept = kept_bytes(forward, inputs)
    if device.type == "cuda":
        forward = torch.compile(forward) if config.compile else forward
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2 + config.steps):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses, _ = forward(*inputs)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(losses["loss"].detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    low, median, high = np.percentile(seconds[2:], (0, 50, 100)).round(4).tolist()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = {**kept, "weights": weights, "gradients_and_optimizer": 3 * weights}
    return dict(batch=B, checkpointing=config.checkpointing, peak_gib=round(train.peak_gib(device), 3), step_s=median,
                kept_gib=round(sum(kept.values()) / GIB, 4), spread_s=[low, high], frames_per_s=T * B / median,
                parts={name: round(size / GIB, 4) for name, size in parts.items()})


def main(argv):
    config, rows, fits = SimpleNamespace(**configure(train.defaults | defaults, argv)), [], {}
    train.check(config)
    device, dtype = train.resolve_device(config)
    config.init_from, config.num_classes = "scratch", config.num_classes or len(config.class_names) or 8
    config.input_hw = config.input_hw if config.input_hw != (0, 0) else (360, 640)
    config.small_threshold, config.medium_threshold = config.small_threshold or 1.0, config.medium_threshold or 2.0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    keys = ("input_hw", "sequence_length", "patch_size", "fpn_stages", "steps", "budget_gib")
    facts = {key: getattr(config, key) for key in keys} | dict(device=name, torch=torch.__version__, dtype=str(dtype))
    print(facts, "\nrecompute batch  peak GiB  kept GiB  step s (min-max)  frames/s")
    for config.checkpointing in (False, True):
        for B in config.batch_sizes:
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rows.append(row := pool.submit(measure, config, B, device, dtype).result())
            except (torch.OutOfMemoryError, BrokenProcessPool):
                print(f"{config.checkpointing!s:9} {B:5}  does not fit on this device")
                break
            print("{checkpointing!s:9} {batch:5}  {peak_gib:8.2f}  {kept_gib:8.3f}  {step_s:.3f} ({spread_s[0]:.3f}-"
                  "{spread_s[1]:.3f})  {frames_per_s:8.1f}".format(**row), flush=True)
        found = [row for row in rows if row["checkpointing"] == config.checkpointing]
        batch, peak = ([row[key] for row in found] for key in ("batch", "peak_gib"))
        if len(found) > 1 and peak[-1] > peak[0]:  # memory grows linearly with the batch
            more = (config.budget_gib - peak[0]) / (peak[-1] - peak[0])
            fits[f"checkpointing={config.checkpointing}"] = max(int(batch[0] + more * (batch[-1] - batch[0])), 0)
    if rows:
        print("kept by part, GiB, without recomputation, batch", rows[0]["batch"], rows[0]["parts"])
    print(f"largest batch in {config.budget_gib:g} GiB, on the line through the peaks above: {fits}")
    print(json.dumps(facts | dict(largest_batch=fits, rows=rows)))


if __name__ == "__main__":
    command_line(main)

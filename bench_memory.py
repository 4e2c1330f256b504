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
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import torch

import train
from configurator import command_line, configure

# Batch sizes; memory of the card to fit; timed steps, after two that warm up; boxes in every second frame.
batch_sizes, budget_gib, steps, boxes = (1, 2, 4, 6, 8), 24.0, 5, 8
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}


def made_up(config, B):
    """Events like a street's (1 cell in 30 holds some), indices of labelled frames, targets (sides 6 to 100 px)."""
    torch.manual_seed(0)
    T, (H, W) = config.sequence_length, config.input_hw
    index = torch.arange(T * B).view(T, B)[(T - 1) % 2::2].flatten()
    low, high = torch.tensor([[0, 0, 0, 6, 6], [config.num_classes, W, H, 100, 100]])
    targets = (low + (high - low) * torch.rand(len(index), max(config.boxes, 16), 5)).floor()
    targets[:, config.boxes:] = 0
    return torch.poisson(torch.full((T, B, 20, H, W), 1 / 30)).to(torch.uint8), index, targets


def kept_bytes(forward, inputs):
    """{part of the network: bytes that it keeps for the backward pass} and "weights", each storage counted once."""
    part = ["loss"]  # those that run, from the outermost inwards: the loss, the detector, its parts, theirs
    kept = {p.untyped_storage().data_ptr(): ("weights", p.untyped_storage().nbytes(), p) for p in forward.parameters()}

    def pack(x):  # keeps x, so that no address is used twice
        kept.setdefault(x.untyped_storage().data_ptr(), (part[:3][-1], x.untyped_storage().nbytes(), x))
        return x

    with ExitStack() as hooks, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for name, module in forward.model.named_modules():  # lists of modules never run
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: part.append(name or "decoding")))
            hooks.enter_context(module.register_forward_hook(lambda *_: part.pop() and None))
        forward(*inputs)
    names = dict.fromkeys(name for name, *_ in kept.values())
    return {name: sum(size for owner, size, _ in kept.values() if owner == name) for name in names}


def measure(config, B, device, dtype):
    """Row of the table for one batch size: bytes kept by part, then peak and time of whole training steps."""
    forward = train.Forward(train.build(config, config.input_hw, config.num_classes, None), train.size_aware(config))
    optimizer = torch.optim.AdamW(forward.to(device).parameters(), lr=1e-6, fused=True)  # as train.py's
    events, *labels = (x.to(device) for x in made_up(config, B))
    inputs, seconds = (events, forward.model.initial_state(B), *labels), []
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    parts = autocast(kept_bytes)(forward, inputs)
    if device.type == "cuda":
        forward = torch.compile(forward) if config.compile else forward
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2 + config.steps):
        start = time.perf_counter()
        loss = autocast(forward)(*inputs)[0]["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    low, median, high = np.percentile(seconds[2:], (0, 50, 100)).round(4).tolist()
    kept, parts["gradients_and_optimizer"] = sum(parts.values()) - parts["weights"], 3 * parts["weights"]
    return dict(batch=B, checkpointing=config.checkpointing, peak_gib=round(train.peak_gib(device), 3), step_s=median,
                spread_s=[low, high], frames_per_s=round(len(events) * B / median, 1),
                kept_gib=round(kept / 2**30, 4), parts={name: round(size / 2**30, 4) for name, size in parts.items()})


def main(argv):
    config, rows, fits = SimpleNamespace(**configure(train.defaults | defaults, argv)), [], {}
    train.check(config)
    device, dtype = train.resolve_device(config)
    config.init_from, config.num_classes = "scratch", config.num_classes or len(config.class_names) or 8
    config.input_hw = config.input_hw if any(config.input_hw) else (360, 640)
    config.small_threshold, config.medium_threshold = config.small_threshold or 1.0, config.medium_threshold or 1e9
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    keys = ("input_hw", "sequence_length", "patch_size", "fpn_stages", "steps", "boxes", "budget_gib")
    facts = {key: getattr(config, key) for key in keys} | dict(device=name, torch=torch.__version__, dtype=str(dtype))
    print(facts, "\nrecompute batch  peak GiB  kept GiB  step s (min-max)  frames/s")
    for config.checkpointing in (False, True):
        for B in config.batch_sizes:
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rows.append(row := pool.submit(measure, config, B, device, dtype).result())
            except (torch.OutOfMemoryError, BrokenExecutor):
                print(f"{config.checkpointing!s:9} {B:5}  does not fit on this device")
                break
            print("{checkpointing!s:9} {batch:5}  {peak_gib:8.2f}  {kept_gib:8.3f}  {step_s:.3f} ({spread_s[0]:.3f}-"
                  "{spread_s[1]:.3f})  {frames_per_s:8.1f}".format(**row), flush=True)
        peaks = [(row["batch"], row["peak_gib"]) for row in rows if row["checkpointing"] == config.checkpointing]
        slope, base = np.polyfit(*zip(*peaks), 1) if len(peaks) > 1 else (0, 0)
        if slope > 0:  # memory grows linearly with the batch
            fits[f"checkpointing={config.checkpointing}"] = max(int((config.budget_gib - base) / slope), 0)
    print("kept by part, GiB, without recomputation, at the first batch size:", *(row["parts"] for row in rows[:1]))
    print(f"largest batch in {config.budget_gib:g} GiB, on the line through the peaks above: {fits}")
    print(json.dumps(facts | dict(largest_batch=fits, rows=rows)))


if __name__ == "__main__":
    command_line(main)

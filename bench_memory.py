"""Peak memory and speed of an experiment's training step, with and without recomputation.

In:  a config of train.py.
Out: a row for each batch size, the largest batch that fits a budget, all that as a line of JSON.
The real model, loss and optimiser run on made-up events and boxes: two steps to warm up, then the
timed ones. Peak: of the allocator on a GPU, else of the process; each row has a process of its own.
Kept: what the forward pass keeps for the backward pass, weights left out.

    python bench_memory.py configs/patch2_4scale_sizeaware.py --batch_sizes=1,2,4,6 --budget_gib=24
"""

import json
import math
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch

import train
from configurator import command_line, configure
from loss import SizeAware

defaults = train.defaults | {
    "batch_sizes": (1, 2, 4, 6, 8),
    "budget_gib": 24.0,      # memory of the card to fit
    "steps": 5,              # timed ones
    "boxes": 8,              # in every second frame
    "input_hw": (360, 640),  # this and num_classes: as a data set would have them
    "num_classes": 8,
}


def kept_gib(forward, inputs):
    """{part of the network: GiB that it keeps for the backward pass}; each storage counts once."""
    names = {}
    for name, module in forward.model.named_modules():
        if name.count(".") < 2:  # the detector, its pyramid, each stage and head (with the loss)
            names[module] = name
    part = ""
    kept = {}  # by address; tensors stay alive, so that no address is used twice

    def enter(module, inputs):
        nonlocal part
        part = names[module]

    def keep(x):
        kept.setdefault(x.untyped_storage().data_ptr(), (part, x))
        return x

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward(*inputs)
    for hook in hooks:
        hook.remove()
    for weight in forward.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    parts = Counter()
    for name, x in kept.values():
        parts[name] += x.untyped_storage().nbytes() / 2**30
    return parts


def measure(config, B, device, dtype):
    """Row for batch size B: what the forward pass keeps, then peak and time of whole steps."""
    torch.set_default_device(device)  # this process does nothing else
    H, W = config.input_hw
    T = config.sequence_length
    model = train.build(config, (H, W), config.num_classes, None)
    forward = train.Forward(model, train.fields_of(SizeAware, config))
    events = torch.rand(T, B, 20, H, W) < 1 / 30  # as of a street
    frames = torch.arange(0, T * B, 2)
    span = torch.tensor((0, W, H, 100, 100))  # class, then centre and size in px
    targets = span * torch.rand(len(frames), config.boxes, 5)
    inputs = (events.byte(), model.initial_state(B), frames, targets)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        parts = kept_gib(forward, inputs)

    optimizer = torch.optim.AdamW(forward.parameters(), lr=1e-6, fused=True)  # as train.py's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        forward = torch.compile(forward, disable=not config.compile)
    seconds = []
    for _ in range(2 + config.steps):
        start = time.perf_counter()
        with autocast:
            loss = forward(*inputs)[0]["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    least, median, most = np.percentile(seconds[2:], (0, 50, 100)).round(4).tolist()
    peak = train.peak_gib(device)
    return {
        "batch": B,
        "checkpointing": config.checkpointing,
        "peak_gib": round(peak, 3) if not math.isnan(peak) else "n/a",
        "kept_gib": round(sum(parts.values()), 4),
        "step_s": median,
        "spread_s": [least, most],
        "frames_per_s": round(T * B / median, 1),
        "parts": {name: round(gib, 4) for name, gib in parts.items()},
    }


def largest_batch(rows, budget_gib):
    """Largest batch in the budget, on the line through the peaks; "n/a" where they make no line."""
    peaks = [row["peak_gib"] for row in rows]
    if len(rows) < 2 or "n/a" in peaks or peaks[-1] <= peaks[0]:
        return "n/a"
    slope, base = np.polyfit([row["batch"] for row in rows], peaks, 1)
    return max(int((budget_gib - base) / slope), 0)


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    train.check(config)
    device, dtype = train.resolve_device(config)
    result = {"argv": argv, "device": str(device), "dtype": str(dtype), "torch": torch.__version__}
    result["rows"] = []
    for config.checkpointing in (False, True):
        rows = []
        for B in config.batch_sizes:
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    rows.append(pool.submit(measure, config, B, device, dtype).result())
            except (torch.OutOfMemoryError, BrokenExecutor):
                print(f"batch {B} does not fit on this device")
                break
            print(rows[-1], flush=True)
        largest = largest_batch(rows, config.budget_gib)
        print(f"largest batch in {config.budget_gib:g} GiB: {largest}")
        result["rows"] += rows
        result[f"largest_batch, checkpointing={config.checkpointing}"] = largest
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(main)

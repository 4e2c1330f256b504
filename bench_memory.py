"""Peak memory and speed of an experiment's training step, by batch size.

In:  a config of train.py; with --checkpointing=True, what recomputation saves and costs.
Out: a row for each batch size, the largest batch that fits a budget, all that as a line of JSON.
The real model, loss and optimiser run on made-up events and boxes: two steps to warm up, then the
timed ones. Peak: of the allocator on a GPU, else of the process; each row has a process of its own.
Kept: what an eager forward pass keeps for the backward pass, weights left out, in all and by part
(the loss counts to the heads).

    python bench_memory.py configs/patch2_4scale_sizeaware.py --batch_sizes=1,2,4,6 --budget_gib=24
"""

import json
import math
import timeit
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import train
from configurator import command_line, configure
from formats import CHANNELS
from loss import SizeAware

# budget_gib: memory of the card to fit; frames and classes as a data set would have them
defaults = train.defaults | {"batch_sizes": (1, 2, 4, 6, 8), "budget_gib": 24.0,
                             "input_hw": (360, 640), "num_classes": 8}


def kept_gib(forward, inputs):
    """{part of the network: GiB that it keeps for the backward pass}; each storage counts once."""
    names = {module: name.split(".")[0] for name, module in forward.model.named_modules()}
    part = ""
    parts = Counter()
    # by address; tensors stay alive, so that no address is used twice
    seen = {x.untyped_storage().data_ptr(): x for x in forward.parameters()}

    def enter(module, inputs):
        nonlocal part
        part = names.get(module)

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            parts[part] += storage.nbytes() / 2**30
        seen[storage.data_ptr()] = x
        return x

    with (
        register_module_forward_pre_hook(enter),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        forward(*inputs)
    return parts


def measure(config, B, device, dtype):
    """Row for batch size B: peak and time of whole steps, what the forward pass keeps."""
    torch.set_float32_matmul_precision("high")  # as train.py
    T = config.sequence_length
    with device:
        model = train.build(config, config.input_hw, config.num_classes)
        events = torch.rand(T, B, CHANNELS, *config.input_hw) < 1 / 30  # as of a street
        frames = torch.arange(0, T * B, 2)
        targets = 100 * torch.rand(len(frames), 8, 5)  # class, then centre and size in px
    targets[..., 0] = 0
    inputs = (events, None, frames, targets)
    eager = train.Forward(model, train.fields_of(SizeAware, config))
    forward = eager
    if config.compile and device.type == "cuda":
        forward = torch.compile(eager)
    optimizer = torch.optim.AdamW(eager.parameters(), lr=1e-6, fused=True)  # as train.py's
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step():
        with autocast:
            loss = forward(*inputs)[0]["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    seconds = timeit.repeat(step, number=1, repeat=7)[2:]
    peak = train.peak_gib(device)
    if math.isnan(peak):
        peak = "n/a"
    with autocast:  # last, since its peak is another
        parts = kept_gib(eager, inputs)
    return {"batch": B, "step_s": float(np.median(seconds)), "peak_gib": peak,
            "kept_gib": sum(parts.values()), "parts": parts}


def largest_batch(rows, budget_gib):
    """Largest batch in the budget, on the line through the peaks; "n/a" where they make no line."""
    peaks = [row["peak_gib"] for row in rows]
    if not rows or "n/a" in peaks or peaks[-1] <= peaks[0]:
        return "n/a"
    slope, base = np.polyfit([row["batch"] for row in rows], peaks, 1)
    return max(int((budget_gib - base) / slope), 0)


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    train.check(config)
    if min(config.batch_sizes, default=1) < 1:
        raise ValueError(f"batch_sizes={config.batch_sizes}: expected 1 or more")
    device, dtype = train.resolve_device(config)
    rows = []
    for B in config.batch_sizes:
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rows.append(pool.submit(measure, config, B, device, dtype).result())
        except (torch.OutOfMemoryError, BrokenExecutor):
            print(f"batch {B} does not fit on this device")
            break
        print(rows[-1])
    result = {"argv": argv, "device": str(device), "dtype": str(dtype), "rows": rows,
              "largest_batch": largest_batch(rows, config.budget_gib)}
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(main)

"""Peak memory and speed of an experiment's training step, by batch size, with and without recomputation.

In: a config of train.py. Out: a table, where the memory goes, the largest batch that fits a budget, and one JSON line.
It runs the real model, loss and optimiser on frames of the full size with made-up events and boxes: warm-up steps first,
then the median and the spread of the timed ones. GPU: peak of the allocator. CPU: peak of the process. Both: bytes that
the forward pass keeps for the backward pass.

    python bench_memory.py configs/patch2_4scale_sizeaware.py --batch_sizes=1,2,4,6,8 --budget_gib=24
"""

import ctypes
import json
import statistics
import sys
import time
from collections import Counter
from types import SimpleNamespace

import torch

import train
from configurator import command_line, configure
from loss import SizeAware
from model import keep_buffers

batch_sizes = (1, 2, 4, 6, 8)
budget_gib = 24.0   # memory of the card to fit
steps = 5           # timed steps, after `warmup`
warmup = 2
boxes = 8           # a labelled frame, sides of 6 to 100 px; every second frame has labels
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}
GIB = 2 ** 30


def made_up(T, B, hw, num_classes, device):
    """Events like a street's (1 cell in 30 holds some), labelled frames and their targets."""
    generator, (H, W) = torch.Generator().manual_seed(0), hw
    events = torch.poisson(torch.full((T, B, 20, H, W), 1 / 30), generator=generator).to(torch.uint8)
    frames = torch.arange(T).remainder(2).eq((T - 1) % 2)[:, None].expand(T, B)
    targets = torch.zeros(int(frames.sum()), 16, 5)
    draw = torch.rand(len(targets), boxes, 5, generator=generator)
    scale, low = torch.tensor([num_classes, W, H, 94, 94]), torch.tensor([0, 0, 0, 6, 6])
    targets[:, :boxes] = draw * scale + low
    targets[..., 0].floor_()
    return [x.to(device) for x in (events, frames.flatten().nonzero().flatten(), targets)]


def kept_bytes(forward, inputs):
    """{part of the network: bytes of activations kept for the backward pass}, each storage counted once."""
    part, kept, weights = ["loss"], {}, {p.untyped_storage().data_ptr() for p in forward.parameters()}
    named = dict(forward.model.named_children(), stages=None, heads=None)
    named |= {f"stage {k + 1}": stage for k, stage in enumerate(forward.model.stages)}
    named |= {f"head {k + 1}": head for k, head in enumerate(forward.model.heads)}
    hooks = []
    for name, module in named.items():
        if module is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: part.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: part.pop() and None))

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.setdefault(storage.data_ptr(), (part[-1], storage.nbytes(), x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward(*inputs)
    for hook in hooks:
        hook.remove()
    del result
    total = Counter()
    for name, size, _ in kept.values():
        total[name] += size
    return total


def measure(config, B, device, dtype):
    """Row of the table for one batch size: bytes kept by part, then peak and time of whole training steps."""
    model = train.build(config, config.input_hw, config.num_classes, None).to(device).train()
    aware = SizeAware(config.weight_type, config.size_aware_weight, config.small_threshold or 1, config.medium_threshold or 2,
                      config.size_aware_terms) if config.size_aware_loss else None
    forward = train.Forward(model, aware)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    events, index, targets = made_up(config.sequence_length, B, config.input_hw, config.num_classes, device)
    inputs = events, model.initial_state(B), index, targets
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        kept = kept_bytes(forward, inputs)
    step = torch.compile(forward) if config.compile and device.type == "cuda" else forward
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the kernel's peak of this process starts again
    seconds = []
    for _ in range(warmup + config.steps):
        start = time.perf_counter()
        with autocast:
            losses, _ = step(*inputs)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(losses["loss"].detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = train.peak_gib(device)
    if device.type == "cpu" and sys.platform == "linux":
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) / 2 ** 20 for line in file if line.startswith("VmHWM"))
    seconds, weights = seconds[warmup:], sum(p.numel() * p.element_size() for p in model.parameters())
    parts = {name: round(size / GIB, 4) for name, size in kept.items()}
    return dict(batch=B, checkpointing=config.checkpointing, peak_gib=round(peak, 3), kept_gib=round(sum(kept.values()) / GIB, 3),
                step_s=round(statistics.median(seconds), 4), spread_s=[round(min(seconds), 4), round(max(seconds), 4)],
                frames_per_s=round(config.sequence_length * B / statistics.median(seconds), 2),
                parts=parts | dict(weights=round(weights / GIB, 4), gradients_and_optimizer=round(3 * weights / GIB, 4)))


def main(argv):
    config = SimpleNamespace(**configure({**train.defaults, **defaults}, argv))
    train.check(config)
    keep_buffers()
    device, dtype = train.resolve_device(config)
    config.init_from, config.num_classes = "scratch", config.num_classes or len(config.class_names) or 8
    config.input_hw = config.input_hw if config.input_hw != (0, 0) else (360, 640)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    what = "allocator peak" if device.type == "cuda" else "process peak"
    print(f"{name}, torch {torch.__version__}, {str(dtype)[6:]}, frames {config.input_hw}, T {config.sequence_length}, median of "
          f"{config.steps} steps after {warmup}\nrecompute batch  {what} GiB  kept GiB  step s (min-max)  frames/s")
    rows = []
    for config.checkpointing in (False, True):
        for B in config.batch_sizes:
            try:
                rows.append(measure(config, B, device, dtype))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"{config.checkpointing!s:9} {B:5}  does not fit on this device")
                break
            row = rows[-1]
            print(f"{row['checkpointing']!s:9} {B:5}  {row['peak_gib']:18.2f}  {row['kept_gib']:8.2f}  {row['step_s']:.3f} "
                  f"({row['spread_s'][0]:.3f}-{row['spread_s'][1]:.3f})  {row['frames_per_s']:8.1f}", flush=True)
    fits = {}  # memory grows linearly with the batch
    for again in (False, True):
        found = [row for row in rows if row["checkpointing"] == again]
        if len(found) > 1 and found[-1]["peak_gib"] > found[0]["peak_gib"]:
            a, b = found[0], found[-1]
            slope = (b["peak_gib"] - a["peak_gib"]) / (b["batch"] - a["batch"])
            fits[f"checkpointing={again}"] = max(int(a["batch"] + (config.budget_gib - a["peak_gib"]) / slope), 0)
    if rows:
        print("kept by part, GiB, without recomputation, batch", rows[0]["batch"], rows[0]["parts"])
    print(f"largest batch in {config.budget_gib:g} GiB, on the line through the peaks above: {fits}")
    print(json.dumps(dict(device=name, torch=torch.__version__, dtype=str(dtype)[6:], peak=what, input_hw=config.input_hw,
                          sequence_length=config.sequence_length, patch_size=config.patch_size, fpn_stages=config.fpn_stages,
                          budget_gib=config.budget_gib, largest_batch=fits, rows=rows)))


if __name__ == "__main__":
    command_line(main)

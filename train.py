"""Train a detector: one loop that reads from top to bottom.

In: a config (the globals below and ModelConfig's fields, overridden by a Python file and --key=value) and a prepared
data set. Out, in out_dir: ckpt.pt (last), best.pt (best validation AP), log.csv, curves.png, config.py (run it again).

    python train.py configs/toy.py                                   one process
    torchrun --nproc_per_node=2 train.py configs/baseline_3scale.py  data parallel, also over nodes
    python train.py --out_dir=out --init_from=resume                 go on as if never stopped
"""

import dataclasses
import inspect
import math
import os
import resource
import signal
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import detect
from checkpoint import load_rvt, load_weights, read_checkpoint
from configurator import command_line, configure, dump
from formats import reading, require, write
from loss import SizeAware, detection_loss
from model import Detector, ModelConfig, reset_state
from pictures import draw_curves
from simulate import ensure_toy

# ---- files
out_dir, init_from = "out", "scratch"  # the run's; scratch | resume (out_dir/ckpt.pt) | a path to weights, ours or RVT
data_dir = "datasets/toy"           # a prepared data set; the default is simulated at first use
resolution, class_names = "auto", ()  # auto (half where the set has it) | half | full; by id, if it has no dataset.json
# ---- what a batch is
sampling, mixed_stream, mixed_random = "stream", 1.0, 1.0  # stream | random | mixed; slots of a mixed batch, by kind
sequence_length = 5                 # T, frames of 50 ms per training step (truncated back-propagation)
batch_size, eval_batch_size = 6, 2  # B, streams in a micro-batch of one process; streams in a batch of the validation
gradient_accumulation_steps = 1     # micro-batches in a step, each a group of streams with states of its own
num_workers = 4                     # threads that load ahead; 0: load when a step needs it
# ---- size-aware loss
size_aware_loss, size_aware_weight = False, 2.0  # on or off; weight of the smallest boxes
small_threshold, medium_threshold = 1024.0, 9216.0  # areas in input pixels^2; 0: a tercile of the data set's
# exponential | linear | step; what is weighted: iou, cls (a focal class term), or both
weight_type, size_aware_terms = "exponential", ("iou",)
# ---- optimiser
max_steps, learning_rate, weight_decay = 100_000, 1.7e-4, 0.0  # the rate is its peak: RVT's 2e-4 * sqrt(batch / 8)
grad_clip, grad_clip_by = 1.0, "value"  # value (RVT) | norm; 0: off
# ---- intervals, in steps
eval_interval, log_interval, checkpoint_interval = 3500, 100, 1000
# ---- machine
seed = 0
# device: auto | cpu | cuda | cuda:1; dtype: auto | float32 | bfloat16 | float16, auto is bfloat16 on a GPU that is fast
# in it, else float16, and float32 on a CPU; compile: torch.compile, on CUDA only
device, dtype, compile = "auto", "auto", True
max_memory_gib = 0.0                # stop when the peak (GPU allocator; on a CPU the process) passes this; 0: never
# ---- when to give up: after so many steps in a row with a non-finite loss or gradient (each is skipped), or with a
# smoothed loss above max_loss_ratio times its minimum (0 steps: never)
max_bad_steps, max_loss_ratio, patience = 20, 10.0, 1000
# ---- Weights & Biases, optional: on or off, and what its run belongs to
wandb_log, wandb_project, wandb_group, wandb_run_name = False, "nanorvt", "", "run"

defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}
defaults |= {field.name: field.default for field in dataclasses.fields(ModelConfig)}
defaults |= {field.name: field.default for field in dataclasses.fields(data.Augmentation)}

MEANS = ("loss", "iou", "obj", "cls", "num_fg", "grad_norm")  # logged as means over an interval
MEMORY = "lower batch_size (raise gradient_accumulation_steps), eval_batch_size, sequence_length or set --checkpointing"


def check(config):
    """ModelConfig of `config`; ValueError for values that cannot work together, before any work is done."""
    known = {"weight_type": ("exponential", "linear", "step"), "sampling": ("stream", "random", "mixed"),
             "grad_clip_by": ("value", "norm"), "resolution": ("auto", "half", "full"), "score": ("cls", "obj*cls"),
             "size_aware_terms": (("iou",), ("cls",), ("iou", "cls"), ("cls", "iou"))}
    ones = ("max_steps max_bad_steps steps eval_interval log_interval checkpoint_interval batch_size eval_batch_size "
            "sequence_length gradient_accumulation_steps zoom_in_max zoom_out_max size_aware_weight").split()
    for key, value in vars(config).items():
        require(value in known.get(key, [value]), f"{key}={value!r}: expected one of {known.get(key)}")
        # no number is negative
        require(isinstance(value, (str, tuple)) or value >= (key in ones), f"{key}={value}: below {key in ones:d}")
    require(not 0 < config.medium_threshold <= config.small_threshold,
            f"small_threshold={config.small_threshold:g}: not below medium_threshold={config.medium_threshold:g}")
    require(config.sampling != "mixed" or config.batch_size > 1 and min(config.mixed_stream, config.mixed_random) > 0,
            "sampling='mixed' needs batch_size from 2 on, mixed_stream and mixed_random above 0")
    return ModelConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)})


def learning_rate_at(step, max_steps, peak):
    """One cycle, linear: from peak / 20 up over the first 0.5% of the steps, then down to peak / 10000.

    Source: RVT's settings of Smith & Topin 2017, arXiv 1708.07120; any number of steps.
    """
    top = max(0.005 * max_steps - 1, 0)
    rest = max(max_steps - 1 - top, 1)
    return peak * (1 + 19 * step / top) / 20 if step < top else peak + (peak / 10_000 - peak) * (step - top) / rest


def peak_gib(device):
    """Peak memory so far: what the allocator held on a GPU, the process on a CPU."""
    return (torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20))


def resolve_device(config):
    """(device, dtype) of config's "auto"; ValueError where the machine has no such device."""
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name, dtypes = config.device.replace("auto", devices[0]), ["float32", "bfloat16", "float16"]
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    require(name in devices and config.dtype in ("auto", *dtypes),
            f"device={config.device!r}, dtype={config.dtype!r}: here are auto, {', '.join(devices + dtypes)}")
    # bfloat16 from Ampere on, where it is fast
    auto = "float32" if name == "cpu" else dtypes[1 + (torch.cuda.get_device_capability(name)[0] < 8)]
    return torch.device(name), getattr(torch, config.dtype.replace("auto", auto))


def build(config, input_hw, num_classes, checkpoint):
    """Detector for the data at hand, with the weights that init_from names; `checkpoint`: what to resume, or None."""
    require(config.input_hw in ((0, 0), input_hw), f"input_hw={config.input_hw}: the data has {input_hw}; leave it out")
    shape = dataclasses.replace(check(config), input_hw=input_hw, num_classes=num_classes)
    found = checkpoint or (read_checkpoint(config.init_from) if config.init_from != "scratch" else {})
    if "state_dict" not in found:
        return load_weights(Detector(shape), found["model"], config.init_from) if found else Detector(shape)
    told = ("input_hw", "num_classes", "partition_split", "dim_head", "checkpointing")
    return load_rvt(config.init_from, **{key: getattr(shape, key) for key in told})


def size_aware(config):
    """What detection_loss wants to know of the size-aware loss; None where it is off."""
    return SizeAware(*(getattr(config, key) for key in SizeAware._fields)) if config.size_aware_loss else None


class Forward(torch.nn.Module):
    """Model and loss as one graph for torch.compile: only the number of labelled frames and of boxes varies."""

    def __init__(self, model, size_aware):
        super().__init__()
        self.model, self.size_aware = model, size_aware

    def forward(self, events, state, index, targets):
        prediction, state = self.model(events, state, index)
        return detection_loss(prediction, targets, self.size_aware), [s.detach() for s in state]


def train(config, checkpoint=None):
    """Run the training of `config` (a namespace with the keys of `defaults`), from `checkpoint` if one is resumed.

    Returns the exit status: 0 when done or stopped by SIGTERM, 130 by Ctrl-C. ValueError for what a user can mend.
    """
    check(config)
    device, dtype = resolve_device(config)
    # keys follow what config is set to
    out, cuda, keys = os.path.normpath(config.out_dir), device.type == "cuda", vars(config)
    rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    say = tqdm.write if rank == 0 else lambda text: None
    torch.manual_seed(config.seed)

    # data
    if rank == 0 and config.data_dir == defaults["data_dir"]:
        ensure_toy(config.data_dir)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        dist.barrier()
    names = data.load_classes(config.data_dir, config.class_names, config.num_classes)
    sequences, val = (data.open_split(config.data_dir, s, len(names), config.resolution, labelled=True)
                      for s in ("train", "val"))
    require(sequences[0].hw == val[0].hw, f"{val[0].path}: frames of {val[0].hw}, in train of {sequences[0].hw}")
    if not min(config.small_threshold, config.medium_threshold):
        for key, tercile in zip(("small_threshold", "medium_threshold"), data.size_thresholds(sequences)):
            setattr(config, key, getattr(config, key) or tercile)
    groups, B, T = config.gradient_accumulation_steps, config.batch_size, config.sequence_length
    augmentation = data.Augmentation(**{f.name: getattr(config, f.name) for f in dataclasses.fields(data.Augmentation)})
    train_data = data.TrainData(sequences, augmentation=augmentation, rank=rank, world_size=world, pin_memory=cuda, **{
        key: getattr(config, key) for key in inspect.signature(data.TrainData).parameters if hasattr(config, key)})

    # model, optimiser
    model = build(config, sequences[0].hw, len(names), checkpoint).to(device)
    keys.update(dataclasses.asdict(model.config), class_names=names)  # what was derived goes on record
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if world > 1 and cuda else model
    parameters = list(model.parameters())
    statistics = [buffer for name, buffer in model.named_buffers() if name != "grid"]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    forward = torch.compile(Forward(model, size_aware(config)), disable=not (config.compile and cuda))

    # where the run stands
    rows, states = [], [model.initial_state(B) for _ in range(groups)]
    at = dict(step=0, best=-2.0, bad=0, smoothed=0.0, lowest=math.inf, above=0, sums=[0.0] * len(MEANS), count=0)
    at = SimpleNamespace(**checkpoint["progress"] if checkpoint else at)
    loader = data.make_loader(train_data.__getitem__, at.step * groups, config.num_workers)
    if checkpoint:
        torch.set_rng_state(checkpoint["rng"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = config.weight_decay
        for p, s in optimizer.state.items():  # its kernel trusts shapes and strides
            s |= {key: torch.empty_like(p).copy_(s[key]) for key in ("exp_avg", "exp_avg_sq")}
        scaler.load_state_dict(checkpoint["scaler"])
        rows, streams = checkpoint["log"], checkpoint["states"]
        had, now = (len(streams), len(streams[0]), len(streams[0][0][0])), (world, groups, B)
        require(had == now, f"resume: processes, accumulation, batch_size: {had}, now {now}; or --init_from=scratch")
        # with another T, a slot is somewhere else
        states = [[s.to(device) * (T == checkpoint["config"]["sequence_length"]) for s in x] for x in streams[rank]]
    if logs := rank == 0 and config.wandb_log:
        with reading("wandb_log=True needs: pip install wandb"):
            import wandb
        wandb.init(project=config.wandb_project, group=config.wandb_group, name=config.wandb_run_name, config=keys)
    if rank == 0:
        if not checkpoint and os.path.exists(f"{out}/ckpt.pt"):
            os.rename(out, older := f"{out}-{time.strftime('%Y%m%d-%H%M%S')}")
            say(f"the run that was in {out} is in {older} now")
        write(f"{out}/config.py", f"# python train.py {out}/config.py\n{dump(keys)}")
    say(f"{dump(keys)}{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, attention groups of "
        f"{model.config.part} at {model.config.padded_hw}, strides {model.config.strides}; {len(sequences)} sequences, "
        f"{train_data.steps_per_epoch} steps an epoch; {device}, {dtype}, {world} process(es)")

    def due(interval):
        return at.step % interval == 0 or at.step == config.max_steps

    def save(name):
        """Everything that the run is, gathered from all processes, written and drawn by the first.

        While the loss diverges, ckpt.pt stays as it was before, but for a signal and the last step.
        """
        streams = [states] * world
        if world > 1:
            dist.all_gather_object(streams, [[s.cpu() for s in state] for state in states])
        if rank == 0 and (not at.above * config.patience or asked or name == "best.pt" or at.step == config.max_steps):
            whole = dict(step=at.step, progress=vars(at), config=keys, log=rows, states=streams,
                         model=model.state_dict(), model_config=dataclasses.asdict(model.config),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=torch.get_rng_state())
            write(f"{out}/{name}", lambda file: torch.save(whole, file))
            draw_curves(f"{out}/curves.png", rows) if rows else None

    stop = [0]  # the signal that asks for it

    def on_signal(number, frame):
        stop[0] = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # from now on a Ctrl-C stops at once; SIGTERMs may come in twos

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=config.max_steps, initial=at.step, disable=rank > 0, unit="step", mininterval=1)
    started, waited, since, asked = time.perf_counter(), 0.0, at.step, 0.0
    model.train()
    try:
        while True:
            if asked or due(config.checkpoint_interval) or due(config.eval_interval):
                save("ckpt.pt")  # at step 0, too, and before evaluating, which may take long or run out of memory
            if rows and (row := rows[-1])["step"] == at.step:  # which was just added, or at which the run resumes
                if due(config.eval_interval) and row["AP"] == "" and not asked:  # else the resumed run evaluates
                    for buffer in statistics if world > 1 else ():
                        dist.broadcast(buffer, 0)
                    found = detect.run(model, val, config.eval_batch_size, T, device, dtype, config.num_workers)
                    scores = detect.score_boxes(*found, *model.config.input_hw, names)
                    row |= {key: scores[key] for key in ("AP", "AP50")}
                    say(f"step {at.step}: AP {row['AP']:.4f}, AP50 {row['AP50']:.4f} (validation, class mean)")
                    if row["AP"] > at.best:
                        at.best = row["AP"]
                        save("best.pt")
                    save("ckpt.pt")
                if rank == 0:
                    table = (row, *map(dict.values, rows))  # a dict's keys are the header
                    write(f"{out}/log.csv", "".join(",".join(map(str, line)) + "\n" for line in table))
                if logs:
                    wandb.log({key: x for key, x in row.items() if x != ""}, step=at.step)
                started, waited, since = time.perf_counter(), 0.0, at.step
            if asked or at.step >= config.max_steps:
                break
            optimizer.param_groups[0]["lr"] = lr = learning_rate_at(at.step, config.max_steps, config.learning_rate)
            before, states_before = [buffer.clone() for buffer in statistics], list(states)
            sums = torch.zeros(len(MEANS) + 2, device=device)  # and: NaN where states are not finite, told to stop
            waiting = time.perf_counter()
            batches = [next(loader) for _ in range(groups)]  # before anything changes, as it may fail
            waited += time.perf_counter() - waiting
            for a, (batch, state) in enumerate(zip(batches, states)):
                batch = batch._replace(frames=batch.frames.flatten().nonzero().flatten())  # (N,)
                batch = batch._make(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch)
                for tensor in (batch.frames, batch.targets):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
                events, state = data.augment(batch.events, batch.rows, batch.cols), reset_state(state, batch.is_first)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    losses, states[a] = forward(events, state, batch.frames, batch.targets)
                # a batch without boxes still runs everything, and weighs nothing
                scaler.scale(losses["loss"] * (batch.has_boxes / groups)).backward()
                sums[:5] += torch.stack([losses[key].detach() for key in MEANS[:5]]) / groups
                sums[6] += sum((0 * s).sum() for s in states[a])
            sums[7] = float(stop[0] > 0)
            gradients = [p.grad for p in parameters]
            if world > 1:
                flat = torch.cat([x.flatten() for x in (*gradients, sums)])
                dist.all_reduce(flat)
                *means, sums = (flat / world).split([x.numel() for x in (*gradients, sums)])
                torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients)])
            scaler.unscale_(optimizer)  # what one process overflows, all skip
            sums[5] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            *values, asked = sums.tolist()  # the one synchronisation of a step
            wrong = [key for key, x in zip((*MEANS, "state"), values) if not math.isfinite(x)]
            # gradients that overflow float16 are the scaler's business; all else that is not finite skips the step
            if not wrong or wrong == ["grad_norm"] and scaler.is_enabled():
                getattr(torch.nn.utils, f"clip_grad_{config.grad_clip_by}_")(parameters, config.grad_clip or math.inf)
                scaler.step(optimizer)
                at.smoothed = 0.99 * at.smoothed + 0.01 * values[0] if at.smoothed else values[0]
                at.above = at.above + 1 if at.smoothed > config.max_loss_ratio * at.lowest else 0
                at.bad, at.lowest = 0, min(at.lowest, at.smoothed)
                at.sums, at.count = [x + y for x, y in zip(at.sums, values)], at.count + 1
            else:
                at.bad += 1
                say(f"step {at.step}: {', '.join(wrong)} not finite, skipped ({at.bad} in a row)")
                torch._foreach_copy_(statistics, before)
                states = states_before
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            at.step, peak = at.step + 1, peak_gib(device)
            for wrong, what in (
                    (at.bad >= config.max_bad_steps, f"{at.bad} steps in a row were not finite; lower learning_rate"),
                    (0 < config.patience <= at.above, f"the loss diverged to {at.smoothed:.3g}; lower learning_rate"),
                    (0 < config.max_memory_gib < peak, f"a peak of {peak:.2f} GiB passed max_memory_gib; {MEMORY}")):
                require(asked or not wrong, f"step {at.step}: {what}; {out}/ckpt.pt is the last good one")
            if due(config.log_interval) or due(config.eval_interval):
                seconds, frames = time.perf_counter() - started, T * B * groups * world * (at.step - since)
                means = {key: round(x / at.count, 6) if at.count else "" for key, x in zip(MEANS, at.sums)}
                rows.append(dict(step=at.step, **means, lr=lr, AP="", AP50="", frames_per_s=round(frames / seconds, 2),
                                 data_wait=round(waited / seconds, 3), peak_gib=round(peak, 3)))
                at.sums, at.count = [0.0] * len(MEANS), 0
                bar.set_postfix(loss=means["loss"], fps=rows[-1]["frames_per_s"])
    except torch.OutOfMemoryError:
        raise ValueError(f"out of memory at {B=}, {T=}, {config.patch_size=}, {config.checkpointing=}; {MEMORY}")
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    say(f"stopped at step {at.step}; go on: python train.py --out_dir={out} --init_from=resume" if asked else
        f"done, best AP {at.best:.4f}; see {out}/curves.png; next: python eval.py --ckpt {out}/best.pt")
    return 130 if asked and stop[0] == signal.SIGINT else 0


def main(argv):
    config = configure(defaults, argv)
    if config["init_from"] == "resume":
        path = os.path.join(config["out_dir"], "ckpt.pt")
        checkpoint = read_checkpoint(path)
        require("progress" in checkpoint, f"{path}: weights without a training state; start with --init_from={path}")
        with reading(f"{path}, resumed"):  # what a damaged state raises, here or at its first step
            saved = defaults | checkpoint["config"] | {"out_dir": config["out_dir"]}
            # init_from: config.py starts anew what this run goes on with
            sys.exit(train(SimpleNamespace(**configure(saved, argv) | {"init_from": saved["init_from"]}), checkpoint))
    sys.exit(train(SimpleNamespace(**config)))


if __name__ == "__main__":
    command_line(main)

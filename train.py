"""Train a detector: one loop that reads from top to bottom.

In: a prepared data set, and a config: the keys below and those of ModelConfig, Augmentation and
SizeAware, overridden by a Python file and --key=value. Out, in out_dir: ckpt.pt (last), best.pt
(best validation AP), log.csv, curves.png, config.py (the same run again, with another --out_dir).

    python train.py configs/toy.py                                   one process
    torchrun --nproc_per_node=2 train.py configs/baseline_3scale.py  data parallel, also over nodes
    python train.py --out_dir=out --init_from=resume                 go on as if never stopped
"""

import atexit
import csv
import ctypes
import dataclasses
import io
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import detect
from checkpoint import load_weights, read_checkpoint, weights_of
from configurator import command_line, configure, dump
from data import Augmentation, TrainData
from formats import reading, write
from loss import SizeAware, detection_loss
from model import Detector, ModelConfig, reset_state
from pictures import draw_curves
from simulate import ensure_toy

defaults = {
    # ---- files
    "out_dir": "out",                 # gets the checkpoints, log.csv, curves.png, config.py
    "init_from": "scratch",           # scratch | resume | path of a checkpoint, ours or RVT's
    "data_dir": "datasets/toy",       # a prepared set; this one is simulated at first use
    "class_names": (),                # by class id, where the data set has no dataset.json
    # ---- batches
    "sampling": "stream",             # stream | random | mixed
    "mixed_stream": 1.0,              # slots of a mixed batch that stream ...
    "mixed_random": 1.0,              # ... to those that play random windows
    "sequence_length": 5,             # T, frames of 50 ms in a step (truncated BPTT)
    "batch_size": 6,                  # B, streams in a micro-batch of one process
    "gradient_accumulation_steps": 1, # micro-batches in a step, each with its own streams
    "eval_batch_size": 2,             # streams in a batch of the validation
    "num_workers": 4,                 # threads that load ahead; 0: load between steps
    # ---- optimiser
    "optimizer": "adamw",             # adamw (RVT) | muon
    "max_steps": 100_000,
    "learning_rate": 1.7e-4,          # its peak: RVT's 2e-4 * sqrt(batch / 8)
    "weight_decay": 0.0,
    "grad_clip": 1.0,                 # 0: off
    "grad_clip_by": "value",          # value (RVT) | norm
    # ---- intervals, in steps
    "log_interval": 100,
    "eval_interval": 3500,
    "checkpoint_interval": 1000,
    # ---- when to give up
    "max_bad_steps": 20,              # steps in a row that are not finite; each is skipped
    "max_loss_ratio": 10.0,           # smoothed loss to its minimum; it may be passed ...
    "patience": 1000,                 # ... for so many steps in a row; 0: for ever
    "max_memory_gib": 0.0,            # peak of the GPU's allocator or the process; 0: any
    # ---- machine
    "seed": 0,
    "device": "auto",                 # auto | cpu | cuda | cuda:1
    "dtype": "auto",                  # auto (on a CPU float32) | float32 | bfloat16 | float16
    "compile": True,                  # torch.compile, on CUDA only
    # ---- Weights & Biases, optional
    "wandb_log": False,
    "wandb_project": "nanorvt",
    "wandb_group": "",
    "wandb_run_name": "run",
}
PARTS = (ModelConfig, Augmentation, SizeAware)  # their fields are config keys, too
for part in PARTS:
    defaults |= dataclasses.asdict(part())

CLIP = {"value": torch.nn.utils.clip_grad_value_, "norm": torch.nn.utils.clip_grad_norm_}
CHOICES = {
    "sampling": ("stream", "random", "mixed"),
    "optimizer": ("adamw", "muon"),
    "grad_clip_by": CLIP,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COUNTS = ("sequence_length", "batch_size", "gradient_accumulation_steps", "eval_batch_size",
          "max_steps", "log_interval", "eval_interval", "checkpoint_interval", "max_bad_steps")
# what a slot plays of data_dir depends on these
PLAN = ("sampling", "mixed_stream", "mixed_random", "sequence_length", "batch_size",
        "gradient_accumulation_steps", "seed")
LESS_MEMORY = ("lower batch_size (raise gradient_accumulation_steps), eval_batch_size or "
               "sequence_length, or set --checkpointing")


# ---- set up

def fields_of(kind, config):
    """The dataclass `kind`, one of PARTS, with its fields out of `config`."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})


def check(config):
    """ValueError for values that cannot work, alone or together, before any work is done."""
    if not config.out_dir:
        raise ValueError("out_dir is empty; name a folder")
    for key, value in vars(config).items():
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{key}={value!r}: expected {' or '.join(CHOICES[key])}")
        least = 1 if key in COUNTS else 0
        if isinstance(value, (int, float)) and not least <= value < 2**63:
            raise ValueError(f"{key}={value}: expected {least} to 2**63")
    smallest = min(config.batch_size - 1, config.mixed_stream, config.mixed_random)
    if config.sampling == "mixed" and smallest == 0:
        raise ValueError("sampling=mixed needs batch_size > 1, mixed_stream > 0, mixed_random > 0")
    for kind in PARTS:
        fields_of(kind, config)


def reuse_memory():
    """Let glibc keep large buffers instead of paging in each big tensor again.

    One arena, too: a loader's threads would have arenas of their own, too small for a batch.
    Without glibc nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(-3, 2**30):  # M_MMAP_THRESHOLD
            mallopt(-3, 2**25)      # the most that an older glibc takes
        mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD
        mallopt(-8, 1)              # M_ARENA_MAX


def resolve_device(config):
    """(device, dtype) that config's "auto" stands for; ValueError where there are no such."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = config.dtype
    with reading(f"cannot be used: device={config.device!r} or dtype={dtype!r} (auto, float32, "
                 "bfloat16, float16)"):
        torch.empty(1, device=name)
        if dtype == "auto" and name == "cpu":
            dtype = "float32"
        elif dtype == "auto":  # GPUs are fast in bfloat16 from Ampere on
            dtype = "bfloat16" if torch.cuda.get_device_capability(name)[0] >= 8 else "float16"
        return torch.device(name), DTYPES[dtype]


def start_processes(backend):
    """(rank, number of processes) as torchrun has it; (0, 1) without torchrun."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
        atexit.register(dist.destroy_process_group)  # gloo aborts where its threads are left
        return dist.get_rank(), dist.get_world_size()
    if "RANK" in os.environ:
        raise ValueError("RANK is set, WORLD_SIZE is not: start with torchrun, or unset RANK")
    return 0, 1


def build(config, input_hw, num_classes):
    """Detector for frames of input_hw; ValueError if config's are others."""
    if config.input_hw not in ((0, 0), input_hw):
        raise ValueError(
            f"input_hw={config.input_hw}: the data has {input_hw}; --input_hw=0,0 takes the data's")
    shape = fields_of(ModelConfig, config)
    return Detector(dataclasses.replace(shape, input_hw=input_hw, num_classes=num_classes))


def peak_gib(device):
    """Peak memory so far: of the allocator on a GPU, else of the process; NaN where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(ImportError):  # Windows has no such module
        import resource
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes in what the system counts
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return math.nan


# ---- a run

def learning_rate_at(step, max_steps, peak):
    """One cycle, linear: from peak / 20 up over the first 0.5% of the steps, then to peak / 10000.

    Source: RVT's settings of Smith & Topin 2017, arXiv 1708.07120; any number of steps.
    """
    top = max(0.005 * max_steps - 1, 0)
    last = max(max_steps - 1, 1)
    return float(np.interp(step, (0, top, last), (peak / 20, peak, peak / 10_000)))


def orthogonal(x):
    """Roughly the orthogonal matrix nearest to x (R, C): its singular values become about 1.

    Newton-Schulz iterations with the coefficients of Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon.
    """
    if len(x) > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but weights of two or more axes move along their orthogonalised momentum.

    Their rows are the first axis. Source: Jordan et al. 2024, as above.
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            if p.ndim == 1:
                continue
            state = self.state[p]
            if not state:  # AdamW wants a count of steps in each state that it loads
                state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
            momentum = state["momentum"].lerp_(p.grad, 0.1)
            ahead = p.grad.lerp(momentum, 0.9)  # Nesterov's
            direction = orthogonal(ahead.flatten(1))
            # its root mean square is the learning rate, the most that AdamW steps: one rate for all
            length = group["lr"] * max(direction.shape) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(direction.view_as(p), alpha=length)
            p.grad = None  # AdamW moves the others
        super().step()


class Forward(torch.nn.Module):
    """Model and loss as one graph for torch.compile: only the numbers of frames and boxes vary."""

    def __init__(self, model, size_aware):
        super().__init__()
        self.model = model
        self.size_aware = size_aware

    def forward(self, events, state, frames, targets):
        prediction, state = self.model(events, state, frames)
        losses = detection_loss(prediction, targets, self.size_aware)
        return losses, [s.detach() for s in state]


def wandb_module():
    """Weights & Biases; ValueError where it is not installed."""
    with reading("wandb_log=True needs: pip install wandb"):
        import wandb
    return wandb


def moved(states, device):
    """The states of all groups of streams, on `device`."""
    result = []
    for state in states:
        result.append([x.to(device) for x in state])
    return result


def beginning():
    """Where a run stands at its start, apart from its tensors: attributes of a Run, saved whole."""
    return {
        "step": 0,
        "evaluated": 0,        # step of the last validation
        "best_ap": -2.0,       # below -1, the AP where nothing can be scored
        "bad_steps": 0,        # in a row that were not finite
        "smoothed": 0.0,       # loss, as a moving average
        "lowest": math.inf,    # smoothed loss so far
        "high_steps": 0,       # in a row with a smoothed loss far above the lowest
        "totals": Counter(),   # of scalars since the last row of the log; its update adds up
        "good_steps": 0,       # steps in these totals
        "log": [],             # rows, as dicts
    }


class Run:
    """All that a training run consists of: data, network, optimiser, recurrent states, progress."""

    def __init__(self, config):
        self.config = config
        self.device, self.dtype = resolve_device(config)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions by default
        self.rank, self.world = start_processes("nccl" if cuda else "gloo")
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # one process speaks
        if self.rank == 0 and config.data_dir == defaults["data_dir"]:
            ensure_toy(config.data_dir)
        if self.world > 1:
            dist.barrier()  # the others wait for the data
        torch.manual_seed(config.seed)

        # data
        self.names = data.load_classes(config.data_dir, config.class_names, config.num_classes)
        train_set = data.open_split(config.data_dir, "train", len(self.names))
        self.val_set = data.open_split(config.data_dir, "val", len(self.names))
        self.hw = train_set[0].hw
        if self.val_set[0].hw != self.hw:
            raise ValueError(f"{config.data_dir}: {self.val_set[0].hw} in val, {self.hw} in train")
        self.batches = TrainData(
            train_set,
            **{key: getattr(config, key) for key in PLAN},
            rank=self.rank,
            world_size=self.world,
            augmentation=fields_of(Augmentation, config),
            pin_memory=cuda,
        )

        # network
        model = build(config, self.hw, len(self.names)).to(self.device).train()
        if self.world > 1 and cuda:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        cells = math.prod(model.config.padded_hw) // model.config.strides[-1] ** 2
        if config.batch_size * cells == 1:
            raise ValueError(f"batch norm sees one cell of {self.hw} frames: raise batch_size")
        self.parameters = list(model.parameters())
        # what a bad step takes back: statistics of batch norms (and the grid, which never changes)
        self.buffers = list(model.buffers())
        self.forward = Forward(model, fields_of(SizeAware, config))
        if config.compile and cuda:
            self.forward = torch.compile(self.forward)
        if self.world > 1:
            self.forward = DistributedDataParallel(self.forward)

        # optimiser
        kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
        self.optimizer = kind(
            self.parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

        # progress
        groups = range(config.gradient_accumulation_steps)
        self.states = [model.initial_state(config.batch_size) for _ in groups]
        vars(self).update(beginning())
        self.waited = 0.0  # seconds for data, since the last row of the log

    def due(self, interval):
        """Whether what happens every `interval` steps and at the end happens now."""
        return self.step % interval == 0 or self.step == self.config.max_steps

    # -- one step

    def train_step(self, batches, stop):
        """One step of the optimiser, with the next micro-batches of the iterator `batches`.

        stop.number: above 0 where this process is to stop  ->  whether any process is to stop.
        A step whose loss, gradients or states are not finite is skipped and leaves nothing behind;
        where only float16's gradients overflow, the states and the statistics of batch norms still
        move.
        """
        buffers = [x.clone() for x in self.buffers]
        states = list(self.states)
        groups = len(states)
        scalars = Counter()  # its update adds up

        # add each micro-batch's gradients, move its streams on
        for group in range(groups):
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started
            events = data.augment(batch.events, batch.rows, batch.cols)
            batch = batch._replace(events=events)  # those that came are freed
            # N and M vary: compiled code takes any N > 1, and any M of as many chunks
            for tensor, axis in ((batch.frames, 0), (batch.targets, 0), (batch.targets, 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
            state = reset_state(states[group], batch.is_first)

            # processes exchange gradients once a step, with the last micro-batch
            self.forward.require_backward_grad_sync = group == groups - 1
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses, state = self.forward(batch.events, state, batch.frames, batch.targets)
            # a batch without boxes runs everything, too, and weighs nothing
            weight = batch.has_boxes / groups
            self.scaler.scale(losses["loss"] * weight).backward()
            self.states[group] = state
            scalars.update({key: value.detach() / groups for key, value in losses.items()})
            scalars["state"] += sum((0 * x).sum() for x in state)  # 0, or NaN

        # one exchange, which also tells all processes to stop where one is
        scalars["stop"] = torch.full_like(scalars["state"], stop.number)
        self.scaler.unscale_(self.optimizer)
        scalars["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        values = torch.stack(list(scalars.values())) / self.world
        if self.world > 1:
            dist.all_reduce(values)
        scalars = dict(zip(scalars, values.tolist()))  # the one synchronisation of a step
        wrong = [key for key, value in scalars.items() if not math.isfinite(value)]
        stopped = scalars.pop("stop") > 0
        del scalars["state"]

        # move the weights, or go back
        overflow = wrong == ["grad_norm"] and self.scaler.is_enabled()  # its scale will be halved
        if not wrong:
            CLIP[self.config.grad_clip_by](self.parameters, self.config.grad_clip or math.inf)
            self.scaler.step(self.optimizer)
            self.record(scalars)
        elif not overflow:
            for now, before in zip(self.buffers, buffers):
                now.copy_(before)
            self.states = states
            self.bad_steps += 1
            print(f"step {self.step}: {', '.join(wrong)} not finite, skipped")
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.give_up()
        return stopped

    def record(self, scalars):
        """Take a good step's scalars into what is logged, and the loss that is watched."""
        self.bad_steps = 0
        self.good_steps += 1
        self.totals.update(scalars)
        self.smoothed = 0.99 * (self.smoothed or scalars["loss"]) + 0.01 * scalars["loss"]
        self.high_steps += 1
        if self.smoothed <= self.config.max_loss_ratio * self.lowest:
            self.high_steps = 0
        self.lowest = min(self.lowest, self.smoothed)

    def give_up(self):
        """ValueError, saying what to change, where it makes no sense to go on."""
        config = self.config
        if self.bad_steps >= config.max_bad_steps:
            raise ValueError(f"{self.bad_steps} steps in a row not finite; lower learning_rate")
        if 0 < config.patience <= self.high_steps:
            raise ValueError(f"the loss diverged to {self.smoothed:.3g}; lower learning_rate")
        if 0 < config.max_memory_gib < peak_gib(self.device):
            raise ValueError(f"peak memory passed max_memory_gib; {LESS_MEMORY}")

    # -- log, validation, files

    def add_row(self, **row):
        """Log a row: step, means of the scalars since the last row, and what is given."""
        means = {key: round(total / self.good_steps, 6) for key, total in self.totals.items()}
        self.totals = Counter()
        self.good_steps = 0
        row = {"step": self.step, **means, **row}
        self.log.append(row)
        if self.rank > 0:
            return
        columns = {}
        for entry in self.log:
            columns |= entry
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.log)
        write(f"{self.config.out_dir}/log.csv", text.getvalue())
        if self.config.wandb_log:
            wandb_module().log(row, step=self.step)

    def validate(self):
        """Score the validation set; best.pt keeps the weights with the best AP."""
        if self.world > 1:  # all evaluate with the statistics of the first
            for x in self.buffers:
                dist.broadcast(x, 0)
        labels, found = detect.run(
            self.model, self.val_set, self.config.eval_batch_size, self.config.sequence_length,
            self.device, self.dtype, self.config.num_workers)
        scores = detect.score_boxes(labels, found, *self.hw, self.names)
        row = {key: scores[key] for key in ("AP", "AP50")}
        print(f"step {self.step}: validation, class mean: {row}")
        self.add_row(**row)
        self.evaluated = self.step
        if scores["AP"] > self.best_ap:
            self.best_ap = scores["AP"]
            self.save("best.pt")
        self.save("ckpt.pt")

    def save(self, name):
        """Write everything that the run is, gathered from all processes; whole or not at all."""
        states = [self.states]
        if self.world > 1:
            states = [None] * self.world
            dist.all_gather_object(states, moved(self.states, "cpu"))
        if self.rank > 0:
            return
        whole = dict(
            step=self.step,
            model=self.model.state_dict(),
            model_config=dataclasses.asdict(self.model.config),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            config=vars(self.config),
            progress={key: getattr(self, key) for key in beginning()},
            states=states,
            rng=torch.get_rng_state(),
        )
        write(f"{self.config.out_dir}/{name}", lambda file: torch.save(whole, file))
        if self.log:
            draw_curves(f"{self.config.out_dir}/curves.png", self.log)

    def start_from(self, path):
        """Take the weights of a checkpoint, those of the class layers only for the same classes."""
        found = read_checkpoint(path)
        weights = weights_of(found)
        trained = found.get("config", {})
        if trained.get("class_names", self.names) != self.names:  # as many, perhaps, but others
            weights = {name: x for name, x in weights.items() if ".cls_pred." not in name}
        load_weights(self.model, weights, path, new_classes=True)

    def restore(self, checkpoint):
        """Go on from where `checkpoint` was saved."""
        load_weights(self.model, checkpoint["model"], self.config.out_dir)
        before = checkpoint["config"]
        if before["class_names"] != self.names:
            raise ValueError(f"the run has classes {before['class_names']}, the data {self.names}; "
                             "--init_from=PATH starts another run with its weights")
        states = checkpoint["states"]
        same = all(before[key] == getattr(self.config, key) for key in ("data_dir", *PLAN))
        if same and len(states) == self.world:
            self.states = moved(states[self.rank], self.device)
        else:
            print("resumed with other streams: their states start at 0")
        for key, value in beginning().items():  # an older checkpoint may lack one
            setattr(self, key, checkpoint["progress"].get(key, value))
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.optimizer.param_groups[0]["weight_decay"] = self.config.weight_decay
        for p, moments in self.optimizer.state.items():
            for key in moments.keys() - {"step"}:  # the fused kernel trusts shapes and strides
                moments[key] = torch.empty_like(p).copy_(moments[key])
        torch.set_rng_state(checkpoint["rng"])


# ---- the loop

@contextmanager
def stop_signal():
    """While open, keeps the number of a SIGTERM or Ctrl-C; a second Ctrl-C stops at once.

    Only a main thread can: elsewhere, in a notebook say, signals do what they did before.
    """
    stop = SimpleNamespace(number=0)

    def note(number, frame):
        stop.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {}
    with suppress(ValueError):  # no main thread
        for kind in (signal.SIGTERM, signal.SIGINT):
            before[kind] = signal.signal(kind, note)
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def memory_advice():
    """A GPU that is out of memory becomes a ValueError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory; {LESS_MEMORY}") from error


@memory_advice()
def train(config, checkpoint=None):
    """Train as `config` (a namespace with the keys of `defaults`) says, from `checkpoint` if given.

    Returns the exit status: 0 when done, 143 when stopped by SIGTERM, 130 by Ctrl-C. ValueError
    for a user's mistake.
    """
    check(config)
    reuse_memory()
    out = config.out_dir
    there = [name for name in ("ckpt.pt", "best.pt", "log.csv") if os.path.exists(f"{out}/{name}")]
    if there and not checkpoint:
        raise ValueError(f"{out} holds {', '.join(there)}: --init_from=resume goes on from its "
                         "ckpt.pt, another --out_dir starts from scratch")
    run = Run(config)
    vars(config).update(dataclasses.asdict(run.model.config), class_names=run.names)  # as derived
    if checkpoint:
        run.restore(checkpoint)
    elif config.init_from != "scratch":
        run.start_from(config.init_from)
    if run.rank == 0:
        again = f"# python train.py {out}/config.py --out_dir=ANOTHER\n"
        write(f"{out}/config.py", again + dump(vars(config)))
        if config.wandb_log:
            wandb_module().init(project=config.wandb_project, group=config.wandb_group,
                                name=config.wandb_run_name, config=vars(config))
    weights = sum(p.numel() for p in run.parameters)
    print(f"{run.model.config}\n{weights / 1e6:.2f} M parameters, {run.device}, {run.dtype}, "
          f"{run.world} process(es); {run.batches.steps_per_epoch} steps for all runs in each slot")

    groups = config.gradient_accumulation_steps
    frames_a_step = config.sequence_length * config.batch_size * groups * run.world
    indices = range(run.step * groups, config.max_steps * groups)
    loader = data.make_loader(run.batches.__getitem__, indices, config.num_workers)
    batches = data.to_device(loader, run.device)
    bar = tqdm(total=config.max_steps, initial=run.step, unit="step", disable=run.rank > 0)
    busy = 0.0        # seconds since the last row of the log
    since = run.step  # of that row, or where this process began
    stopped = False

    with bar, stop_signal() as stop:
        if not checkpoint:
            run.save("ckpt.pt")  # so that no run is without one
        elif run.due(config.eval_interval) and run.evaluated < run.step:
            run.validate()  # it was stopped before or in this validation

        while run.step < config.max_steps and not stopped:
            # one step
            started = time.perf_counter()
            lr = learning_rate_at(run.step, config.max_steps, config.learning_rate)
            run.optimizer.param_groups[0]["lr"] = lr
            stopped = run.train_step(batches, stop)
            busy += time.perf_counter() - started
            bar.update()
            evaluates = run.due(config.eval_interval)

            # log
            if run.due(config.log_interval) or evaluates:
                speed = {
                    "frames_per_s": round((run.step - since) * frames_a_step / busy, 2),
                    "data_wait": round(run.waited / busy, 3),
                    "peak_gib": round(peak_gib(run.device), 3),
                }
                bar.set_postfix(speed, loss=run.smoothed)
                run.add_row(lr=lr, **speed)
                run.waited = busy = 0.0
                since = run.step

            # save, also before a validation, which takes long and may run out of memory
            if run.due(config.checkpoint_interval) or evaluates or stopped:
                run.save("ckpt.pt")

            # evaluate
            if evaluates and not stopped:
                run.validate()

    if stopped:
        print(f"stopped at step {run.step}; go on: "
              f"python train.py --out_dir={out} --init_from=resume")
        return 128 + (stop.number or signal.SIGTERM)  # no number: another process was told
    print(f"done, best AP {run.best_ap:.4f}; see {out}/curves.png; "
          f"next: python eval.py --ckpt {out}/best.pt")
    return 0


def resume(out_dir, argv):
    """Exit status of the run in out_dir, which goes on with its config as `argv` changes it."""
    path = f"{out_dir}/ckpt.pt"
    checkpoint = read_checkpoint(path)
    if "progress" not in checkpoint:
        raise ValueError(f"{path}: weights without a training state; start with --init_from={path}")
    with reading(f"{path}, resumed"):  # what a damaged state raises, here or at its first step
        saved = defaults | checkpoint["config"] | {"out_dir": out_dir}
        config = configure(saved, argv)
        if config["optimizer"] != saved["optimizer"]:
            raise ValueError(f"the run has optimizer={saved['optimizer']}; --init_from={path} "
                             "starts another with its weights")
        config["init_from"] = saved["init_from"]  # with which config.py starts again
        return train(SimpleNamespace(**config), checkpoint)


def main(argv):
    config = configure(defaults, argv)
    if config["init_from"] == "resume":
        status = resume(config["out_dir"], argv)
    else:
        status = train(SimpleNamespace(**config))
    sys.exit(status)


if __name__ == "__main__":
    command_line(main)

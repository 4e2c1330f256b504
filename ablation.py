"""The notes' experiments at the toy's size -> which of them help, with intervals.

In:  configs/toy.py, and what BASE and the experiments' configs change in it. All arms take equal
     steps, batches in one order, one learning rate; each runs once for every seed. For an arm that
     costs far more than the baseline, the baseline runs again, so many steps that it costs as much.
Out: in out_dir a run of train.py for each arm and seed, with its scores; table.md and table.png.
     What is done is kept: a second call goes on.

    python ablation.py --steps=400 --seeds=2
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import active_children, get_context
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import detect
import train
from checkpoint import load_detector, read_checkpoint
from configurator import command_line, configure
from data import load_classes, open_split
from formats import CHANNELS, reading, write
from pictures import draw_differences
from simulate import ensure_toy

defaults = {
    "out_dir": "out_ablation",
    "data_dir": "datasets/toy",
    "steps": 400,
    "seeds": 2,         # of each arm, side by side
    "device": "auto",   # auto | cpu | cuda
    "resamples": 200,   # of the test sequences, for the intervals
}

# What all arms share. Windows of 3 frames take half the time of the toy's 5.
BASE = ["configs/toy.py", "--sequence_length=3", "--batch_size=4"]
# The experiments, and the keys that an arm takes from the config of its experiment.
ARMS = (
    "baseline_3scale",
    "4scale",
    "3scale_sizeaware",
    "4scale_sizeaware",
    "3scale_sizeaware_attention",
    "patch2_sizeaware",
    "patch2_4scale_sizeaware",
    "patch3_4scale_sizeaware",
)
TESTED = ("patch_size", "fpn_stages", "size_aware_loss", "size_aware_weight",
          "small_object_attention")
# Keys in which a run may differ from its arm: found in the data, or of its place.
DERIVED = ("input_hw", "num_classes", "partition_split", "class_names", "out_dir", "device")
BASELINE = "baseline_3scale"
COSTLY = 2  # times the baseline's GFLOP: such an arm meets a baseline of equal compute, too

# Octaves of box sizes, by the square root of the area in pixels: smallest and largest area.
SIZES = {
    "4_8": (0, 64),
    "8_16": (64, 256),
    "16_32": (256, 1024),
    "32_64": (1024, 4096),
}
METRICS = ("AP", "AP50", "AP_4_8", "AP_8_16", "AP_16_32", "AP_32_64", "AR100")


def run(config, resamples):
    """Train as config says, or go on with it; score -> (1 + resamples, METRICS), in percent.

    First the scores of the test split, then those of as many sequences drawn from it. The draws are
    the same for all runs, so that differences between arms can be taken draw by draw. ValueError,
    naming the run, if its training fails.
    """
    out = config.out_dir
    path = f"{out}/scores_{resamples}.npy"
    begun = os.path.exists(f"{out}/ckpt.pt")
    if begun:
        before = read_checkpoint(f"{out}/ckpt.pt")["config"]
        for key, value in vars(config).items():
            if before[key] != value and key not in DERIVED:
                raise ValueError(f"{out} has {key}={before[key]!r}, not {value!r}; choose another "
                                 "--out_dir")
    if os.path.exists(path):
        return np.load(path)
    # here, so that a missing or faulty split costs no training
    names = load_classes(config.data_dir, (), 0)
    sequences = open_split(config.data_dir, "test", len(names))
    with reading(out), redirect_stdout(None):  # several runs would speak at once
        if begun:
            status = train.resume(out, [f"--device={config.device}"])
        else:
            status = train.train(config)
    if status:  # stopped by a signal; a pool would wait for what sys.exit leaves
        os._exit(status)
    device, _ = train.resolve_device(config)
    model = load_detector(f"{out}/ckpt.pt").to(device)
    # each sequence alone, as a draw may hold it more than once
    played = [detect.run(model, [sequence], 1, 5, device) for sequence in sequences]

    n = len(sequences)
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    scores = []
    for draw in (range(n), *draws):
        labels = []
        found = []
        for k in draw:
            labels += played[k][0]
            found += played[k][1]
        row = detect.score_boxes(
            labels, found, *sequences[0].hw, range(model.config.num_classes), sizes=SIZES)
        scores.append([row[key] for key in METRICS])
    scores = 100 * np.array(scores)
    scores[scores < 0] = np.nan  # undefined
    write(path, lambda file: np.save(file, scores))
    return scores


def measure(config, name, steps):
    """Run an arm with all seeds -> its scores (seeds, 1 + resamples, METRICS), and its costs.

    costs: parameters in millions, GFLOP of a frame's forward pass, seconds a step.
    Each run has a process of its own, all of them side by side.
    """
    experiment = configure(train.defaults, [f"configs/{name}.py"])
    arm = configure(train.defaults, BASE)
    for key in TESTED:
        arm[key] = experiment[key]
    runs = []
    for seed in range(config.seeds):
        own = {
            "seed": seed,
            "data_dir": config.data_dir,
            "device": config.device,
            "max_steps": steps,
            "out_dir": f"{config.out_dir}/{name}_{steps}_{seed}",
        }
        runs.append(SimpleNamespace(**(arm | own)))
    threads = max(os.cpu_count() // config.seeds, 1)  # more threads than cores slow all of them
    with ProcessPoolExecutor(
        config.seeds, get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        with reading(f"{name}, {steps} steps"):  # a process that died for want of memory, say
            scores = list(pool.map(run, runs, [config.resamples] * config.seeds))

    out = runs[0].out_dir
    model = load_detector(f"{out}/ckpt.pt")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, CHANNELS, *model.config.input_hw))
    parameters = sum(p.numel() for p in model.parameters())
    log = np.genfromtxt(f"{out}/log.csv", delimiter=",", names=True)
    seconds = arm["sequence_length"] * arm["batch_size"] / np.nanmedian(log["frames_per_s"])
    return np.array(scores), (parameters / 1e6, counter.get_total_flops() / 1e9, seconds)


def intervals(scores):
    """Scores (seeds, 1 + resamples, METRICS) -> mean, low, high (METRICS,): 95% by the bootstrap.

    Each draw of sequences goes with a draw of seeds. NaN where a metric is undefined in any.
    """
    value, *draws = scores.swapaxes(0, 1)  # (seeds, METRICS) each
    rng = np.random.default_rng(1)
    means = [rng.choice(draw, len(draw)).mean(0) for draw in draws]
    return value.mean(0), *np.percentile(means, (2.5, 97.5), axis=0)


def stop_runs(number, frame):
    """Pass a signal on, leave once the runs have saved and left."""
    runs = active_children()
    for process in runs:
        process.terminate()
    for process in runs:
        process.join()
    os._exit(128 + number)


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    if min(config.steps, config.seeds, config.resamples) < 1:
        raise ValueError("steps, seeds and resamples are 1 or more")
    signal.signal(signal.SIGTERM, stop_runs)
    if config.data_dir == defaults["data_dir"]:  # here, since several runs would make it at once
        ensure_toy(config.data_dir)
    lines = [
        f"| arm | steps | parameters, M | GFLOP a frame | s a step | {' | '.join(METRICS)} |",
        "|---" * (5 + len(METRICS)) + "|",
    ]
    scores = {}
    differences = []

    # all arms with equal steps, then baselines of equal compute: (title, arm, steps)
    todo = [(name, name, config.steps) for name in ARMS]
    while todo:
        title, name, steps = todo.pop(0)
        print(f"{title}: {steps} steps")
        scores[title], (size, flops, seconds) = measure(config, name, steps)
        if title == BASELINE:
            baseline_flops = flops
        ratio = flops / baseline_flops
        if ratio > COSTLY:
            todo.append((f"{BASELINE}, cost of {name}", BASELINE, round(steps * ratio)))
        change = intervals(scores[title] - scores[BASELINE])
        differences.append(change)
        line = f"| {title} | {steps} | {size:.2f} | {flops:.2f} | {seconds:.2f} |"
        for value, mean, low, high in zip(scores[title].mean(0)[0], *change):
            line += f" {value:.1f} ({mean:+.1f}: {low:+.1f} to {high:+.1f}) |"
        lines.append(line)
    table = "\n".join(lines)
    print(table)
    write(f"{config.out_dir}/table.md", table)
    draw_differences(f"{config.out_dir}/table.png", list(scores), METRICS, differences)


if __name__ == "__main__":
    command_line(main)

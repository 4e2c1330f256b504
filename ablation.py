"""The notes' experiments at the toy's size -> which of them help, with intervals.

In:  configs/toy.py, and what BASE and the experiments' configs change in it. All arms take equal
     steps, batches in one order, one learning rate; each runs once for every seed. An arm that
     costs far more than the baseline runs again, with as many steps as cost what the baseline's do.
Out: in out_dir a run of train.py for each arm and seed, with its scores; table.md and table.png.
     What is done is kept: a second call goes on.

    python ablation.py --steps=400 --seeds=2 --processes=2
"""

import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import detect
import train
from checkpoint import load_detector
from configurator import command_line, configure
from data import load_classes, open_split
from formats import write
from pictures import draw_differences
from simulate import ensure_toy

defaults = {
    "out_dir": "out_ablation",
    "data_dir": "datasets/toy",
    "steps": 400,
    "seeds": 2,
    "processes": 2,     # runs at a time
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
BASELINE = "baseline_3scale"
COSTLY = 2  # times the baseline: such an arm also runs at equal compute

# Octaves of box sizes, by the square root of the area in pixels: smallest and largest area.
SIZES = {
    "4_8": (0, 64),
    "8_16": (64, 256),
    "16_32": (256, 1024),
    "32_64": (1024, 4096),
}
METRICS = ("AP", "AP50", "AP_4_8", "AP_8_16", "AP_16_32", "AP_32_64", "AR100")


def arm(name):
    """The words that train.py gets for an arm, without those of a run."""
    experiment = configure(train.defaults, [f"configs/{name}.py"])
    return BASE + [f"--{key}={experiment[key]}" for key in TESTED]


def frame_cost(name, hw, num_classes):
    """(parameters in millions, GFLOP of a frame's forward pass) of an arm."""
    config = SimpleNamespace(**configure(train.defaults, arm(name)))
    model = train.build(config, hw, num_classes)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 20, *hw))
    parameters = sum(p.numel() for p in model.parameters())
    return parameters / 1e6, counter.get_total_flops() / 1e9


def train_run(folder, name, steps, seed, config):
    """Train an arm, or go on with it. ValueError, with the last line of its errors, if it fails."""
    start = "resume" if Path(folder, "ckpt.pt").exists() else "scratch"
    words = [
        *arm(name), f"--seed={seed}", f"--data_dir={config.data_dir}",
        f"--max_steps={steps}", f"--eval_interval={steps}", f"--device={config.device}",
        f"--out_dir={folder}", f"--init_from={start}",
    ]
    # more threads than cores slow all of them
    threads = str(max(os.cpu_count() // config.processes, 1))
    done = subprocess.run([sys.executable, "train.py", *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": threads})
    if done.returncode:
        raise ValueError(f"{folder}: {done.stderr.splitlines()[-1]}")


def resampled_scores(folder, sequences, names, resamples):
    """Scores (1 + resamples, METRICS) of a run: of the test split, then of sequences drawn from it.

    The draws are the same for all runs, so that differences between arms can be taken draw by draw.
    """
    path = Path(folder, f"scores_{resamples}.npy")
    if path.exists():
        return np.load(path)
    model = load_detector(f"{folder}/ckpt.pt")
    # each sequence alone, as a draw may hold it more than once
    played = [detect.run(model, [sequence], 1, 5) for sequence in sequences]

    n = len(sequences)
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    scores = []
    for draw in (range(n), *draws):
        labels = []
        found = []
        for k in draw:
            labels += played[k][0]
            found += played[k][1]
        row = detect.score_boxes(labels, found, *sequences[0].hw, names, sizes=SIZES)
        scores.append([row[key] for key in METRICS])
    scores = 100 * np.array(scores)
    scores[scores < 0] = np.nan  # undefined
    write(path, lambda file: np.save(file, scores))
    return scores


def intervals(scores):
    """Scores (seeds, 1 + resamples, METRICS) -> mean, low, high (METRICS,): 95% by the bootstrap.

    Each draw of sequences goes with a draw of seeds. NaN where a metric is undefined in any.
    """
    value, *draws = scores.swapaxes(0, 1)  # (seeds, METRICS) each
    rng = np.random.default_rng(1)
    means = [rng.choice(draw, len(draw)).mean(0) for draw in draws]
    return value.mean(0), *np.percentile(means, (2.5, 97.5), axis=0)


def frames_per_second(folder):
    """Of a run, the median over the rows of its log."""
    log = np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True)
    return np.nanmedian(log["frames_per_s"])


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    if config.data_dir == defaults["data_dir"]:  # here, since several runs would make it at once
        ensure_toy(config.data_dir)
    names = load_classes(config.data_dir, (), 0)
    sequences = open_split(config.data_dir, "test", len(names))

    # what runs: all arms with equal steps, then the costly ones with equal compute
    cost = {}
    runs = {}
    for name in ARMS:
        cost[name] = frame_cost(name, sequences[0].hw, len(names))
        runs[name] = (name, config.steps)
    for name in ARMS:
        ratio = cost[name][1] / cost[BASELINE][1]
        if ratio > COSTLY:
            runs[f"{name}, equal compute"] = (name, max(round(config.steps / ratio), 1))

    jobs = []
    folders = defaultdict(list)
    for seed in range(config.seeds):
        for title, (name, steps) in runs.items():
            folder = f"{config.out_dir}/{name}_{steps}_{seed}"
            folders[title].append(folder)
            jobs.append((folder, name, steps, seed, config))
    with ThreadPoolExecutor(config.processes) as pool:
        done = pool.map(lambda job: train_run(*job), jobs)
        list(tqdm(done, "runs", len(jobs)))

    scores = defaultdict(list)
    for title, trained in folders.items():
        for folder in trained:
            scores[title].append(resampled_scores(folder, sequences, names, config.resamples))
    shared = configure(train.defaults, BASE)
    frames_a_step = shared["sequence_length"] * shared["batch_size"]
    head = ["arm", "steps", "parameters, M", "GFLOP a frame", "s a step", *METRICS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    differences = []
    for title, (name, steps) in runs.items():
        size, flops = cost[name]
        seconds = frames_a_step / frames_per_second(folders[title][0])
        cells = [title, f"{steps}", f"{size:.2f}", f"{flops:.2f}", f"{seconds:.2f}"]
        change = intervals(np.array(scores[title]) - scores[BASELINE])
        differences.append(change)
        for value, mean, low, high in zip(np.mean(scores[title], 0)[0], *change):
            cells.append(f"{value:.1f} ({mean:+.1f}: {low:+.1f} to {high:+.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    write(f"{config.out_dir}/table.md", table)
    draw_differences(f"{config.out_dir}/table.png", list(runs), METRICS, differences)


if __name__ == "__main__":
    command_line(main)

"""Simulated street traffic before a static event camera -> raw recordings as in eTraM's release; the toy data set.

In:  a seed and the options below. Out: DST/{train,val,test}/NAME_td.h5 (group `events`: x, y, p, t, height, width) and
     NAME_bbox.npy (eTraM's fields and class ids, 30 Hz). Finished recordings are kept: an interrupted run goes on.
Flat sprites move on a ground plane with perspective and hide each other by depth; events come from the
contrast-threshold model on log intensity (ESIM, Rebecq et al., CoRL 2018) with the noise of real pixels.

    python simulate.py --dst=datasets/traffic_raw --height=720 --width=1280 --seconds=20 --num_workers=4
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
from tqdm import tqdm

from configurator import command_line, configure
from formats import BOX_DTYPE
from prepare import prepare, run_jobs

dst, seed, num_workers = "datasets/traffic_raw", 0, 2  # processes, 0: all in this one; the data do not depend on them
train, val, test = 30, 8, 8  # recordings a split
# px of the sensor, up to 720 x 1280; px of the network's input, half of it: square root of the box area, smallest
# labelled and largest aimed at
height, width, sizes = 240, 320, (6.0, 48.0)
seconds, users, night = 7.0, 2.2, 0.3  # of a recording; road users that cross the view, a second; share of night scenes
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

# Rendered steps a second (intensity is linear between them); labels a second; sides of a sprite; share of an object in
# view and not hidden, below which it has no label.
FPS, LABEL_HZ, CELLS, MIN_VISIBLE = 180, 30, 40, 0.3
# ON and OFF contrast threshold in log intensity, its deviation over pixels; dead time of a pixel; ON events of leakage.
THRESHOLDS, MISMATCH, REFRACTORY_US, LEAK_HZ = (0.2, 0.24), 0.03, 500, 0.02

# What there is to see, by eTraM's class id, then what stands about and has no label (tree, flickering light, pole).
# Length, height, depth in m, m/s, m a turn of legs or wheels (if it stands: seconds); then parts, painted in turn:
# name in `sprites`, top, bottom, left and right of each one, in percent of the box; the front is to the right.
KINDS = """0.75 1.75 0.5 1.4 1.4, legs 50 100 40 60, oval 14 60 25 75, arm 20 55 42 58, head 0 17 36 66
4.2 1.5 1.8 10 2, box 42 85 0 100, oval 0 100 12 78, pane 12 42 24 44 48 66, tyre 62 100 10 28 72 90
1.75 1.75 0.6 4.5 3.5, ring 58 100 0 40 60 100, bar 62 66 25 80, legs 45 90 42 50, oval 14 52 34 64, head 0 15 50 66
8.5 3.1 2.5 7.5 2, box 0 90 0 100, pane 14 46 4 15 20 31 36 47 52 63 68 79, bar 14 85 84 96, tyre 74 100 14 25 68 79
2 1.5 0.7 9 2, tyre 55 100 0 32 68 100, bar 50 80 20 85, oval 12 62 30 60, tyre 0 24 44 64, box 34 42 55 80
6.5 3.1 2.5 8 2, box 0 78 0 68, bar 20 85 72 100, pane 26 50 84 98, dark 78 85 0 100, tyre 72 100 6 20 24 38 78 92
13 3.5 2.6 8 2, box 14 100 0 48 52 100, dark 20 95 48 52, pane 28 54 2 46 54 98, bar 70 78 0 100, dark 0 3 20 30,\
 dark 0 14 24 26
1.05 1.35 0.7 1.3 1.7, dark 15 70 12 20, oval 20 68 20 60, bar 55 68 40 92, bar 62 95 82 92, ring 45 100 5 60,\
 head 0 22 32 56
4.0 6.0 4.0 0 2, dark 60 100 46 54, leaves 0 75 0 100
0.5 3.5 0.5 0 0.3, dark 12 100 42 58, light 0 11 20 80
0.3 5.0 0.3 0 1, box 0 100 0 100""".splitlines()
SHARES, STANDING = (28, 32, 11, 6, 8, 6, 4, 5), (8, 8, 9, 9, 10)  # percent of the traffic by class; of each scene


def sprites(parts, a, b, contrast, turns, lead):
    """Log intensity times cover, and cover, (turns, CELLS, 2, CELLS), of parts in the words of KINDS.

    a, b: log intensity of the object's own paints, a road has about 0; turns: phases of its limbs, wheels, leaves or
    lights, evenly spaced; lead (CELLS, CELLS): what a leaf is ahead by, radians.
    """
    v, u = (np.mgrid[:CELLS, :CELLS] + 0.5) / CELLS * 100
    images, turn = np.zeros((turns, CELLS, 2, CELLS), np.float32), 2 * np.pi * (np.arange(turns) / turns)[:, None, None]
    for name, *numbers in map(str.split, parts):
        top, bottom, *ends = map(int, numbers)
        for left, right in zip(ends[::2], ends[1::2]):
            x, y = (2 * u - left - right) / (right - left), (2 * v - top - bottom) / (bottom - top)  # in [-1, 1]^2
            disc, box, swing = x * x + y * y < 1, np.maximum(np.abs(x), np.abs(y)) < 1, (1 + y) * np.sin(turn)
            inside, shade = {  # a ring is a wheel with four spokes
                "box": (box, a), "bar": (box, b), "pane": (box, -0.9), "dark": (box, -1.5), "oval": (disc, a),
                "legs": ((np.abs(np.abs(x) - np.abs(swing)) < 1) & (np.abs(y) < 1), b), "lamp": (disc, 2.0),
                "arm": ((np.abs(x + swing) < 1) & (np.abs(y) < 1), 0.4), "light": (disc & (np.sin(turn) > -0.3), 2.0),
                "ring": (disc & ((x * x + y * y > 0.6) | (np.sin(2 * np.arctan2(y, x) - turn) ** 2 < 0.0625)), -1.5),
                "leaves": (disc & (np.sin(turn + lead) > -0.3), a), "head": (disc, 0.4), "tyre": (disc, -1.5)}[name]
            images.swapaxes(2, 3)[np.broadcast_to(inside, (turns, CELLS, CELLS))] = shade * contrast, 1
    return images


def tent(start, size, pixels):
    """Weights (len(pixels), CELLS) that resample CELLS stretched over [start, start + size]; 0 beyond the ends."""
    zoom, support = np.float32(CELLS / size), np.float32(max(1, CELLS / size))
    cells = np.float32(pixels + 0.5 - start) * zoom - np.float32(0.5)
    return np.maximum(0, 1 - np.abs(cells[:, None] - np.arange(CELLS, dtype=np.float32)) / support) / support


def travel(rng, kind, scene, steps):
    """A thing of KINDS[kind] on a straight way through the scene, with a stop now and then.

    Returns box (steps, 5): left, top, width, height in px and phase; Z (steps,) m; pace (steps,) px/s; images (turns,
    CELLS, 2, CELLS). Size in px is drawn first, the same way for all classes, and depth follows from it, so that size
    does not tell the class.
    """
    numbers, *parts = KINDS[kind].split(",")
    length, tall, depth, speed, stride = np.array(numbers.split(), float) * (*rng.lognormal(0, 0.12, 2), 1, 1, 1)
    size = 2 * np.exp(rng.uniform(*np.log(scene.sizes))) * (1 if speed else 0.6)
    Z = scene.focal / min(size / np.sqrt(length * tall), 0.9 * (scene.height - scene.horizon) / scene.camera)
    angle = scene.road + rng.normal(0, 0.05) + np.pi * rng.integers(2)
    angle += rng.choice((-1, 1)) * rng.uniform(0.5, 1.1) if kind in (0, 2, 7) and rng.random() < 0.4 else 0  # across
    t, middle = np.arange(steps) / FPS, rng.uniform(-0.5, steps / FPS + 0.5)
    pace = np.full(steps, speed * rng.lognormal(0, 0.25))
    if rng.random() < 0.4:
        stop, hold = middle + rng.uniform(-1, 1), rng.uniform(0.7, 4)
        pace *= np.interp(t, (stop - 0.7, stop, stop + hold, stop + hold + 0.9), (1, 0, 0, 1))
    way = np.cumsum(pace) / FPS
    way -= np.interp(middle, t, way)
    X = rng.uniform(-0.45, 0.45) * Z * scene.width / scene.focal + np.cos(angle) * way
    Z = np.maximum(Z + np.sin(angle) * way, 0.5)
    scale = scene.focal / Z
    w, h = (length * np.abs(np.cos(angle)) + depth * np.abs(np.sin(angle))) * scale, tall * scale
    phase = way / stride if speed else t / (stride * rng.lognormal(0, 0.7))
    box = np.stack((scene.width / 2 + X * scale - w / 2, scene.horizon + (scene.camera - tall) * scale, w, h, phase), 1)
    parts += ["lamp 55 75 90 100"] if scene.night and kind in (1, 3, 4, 5, 6) else []
    paints = [rng.choice((-1, 1)) * rng.uniform(0.3, 1.2) for _ in "ab"]
    turns, lead = 12 if kind in (0, 2, 7, 8, 9) else 1, 2 * np.pi * rng.random((CELLS, CELLS))  # what has moving parts
    images = sprites(parts, *paints, scene.contrast, turns, lead)[..., ::1 if np.cos(angle) > 0 else -1]
    return SimpleNamespace(kind=kind, images=images, Z=Z, pace=pace * scale, box=box, moved=0.0)


def render(scene, things, step):
    """Log intensity (H, W) float32 at a step, far things first, and the index of what is seen (H, W), -1: nothing."""
    image, owner = scene.ground.copy(), np.full(scene.ground.shape, -1, np.int32)
    down, right = map(np.arange, image.shape)
    for i, thing in sorted(enumerate(things), key=lambda pair: -pair[1].Z[step]):
        x, y, w, h, phase = thing.box[step].tolist()
        area = np.s_[max(int(y), 0):max(int(y + h) + 1, 0), max(int(x), 0):max(int(x + w) + 1, 0)]
        if min(w, h) < 1.5 or not image[area].size:
            continue
        k, part = divmod(phase % 1 * len(thing.images), 1)
        cells = thing.images[int(k) - 1] * np.float32(1 - part) + thing.images[int(k)] * np.float32(part)
        cells = (tent(y, h, down[area[0]]) @ cells.reshape(CELLS, -1)).reshape(-1, CELLS) @ tent(x, w, right[area[1]]).T
        image[area] = image[area] * (1 - cells[1::2]) + cells[::2]
        owner[area][cells[1::2] > 0.5] = i
    return image, owner


def labels_at(things, step, owner, options):
    """Yield labels of the road users in view as tuples of BOX_DTYPE's fields: whole boxes cropped to the frame.

    Left out: what is hidden or out of view by more than 1 - MIN_VISIBLE, too small, or has not moved yet (it never
    caused an event, so that no detector can know of it).
    """
    seen = np.bincount(owner.ravel() + 1, minlength=len(things) + 1)[1:]
    for i, thing in enumerate(things):
        x, y, w, h, _ = thing.box[step]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, options.width - 1), min(y + h, options.height - 1)
        if seen[i] >= max(MIN_VISIBLE * thing.images[0][:, 1].mean() * w * h, 4):
            thing.moved += thing.pace[step] / LABEL_HZ
            if thing.moved > 2 and (x2 - x1) * (y2 - y1) >= (2 * options.sizes[0]) ** 2:
                yield step * 1_000_000 // FPS, x1, y1, x2 - x1, y2 - y1, thing.kind, i, 1


def make_events(rng, image, before, level, last_us, pixel, step):
    """Events of one step: (t us, flat pixel, polarity) in order of time. level and last_us are updated in place.

    image, before (H * W,) log intensity now and a step ago, linear in time between; level: what each pixel compares
    with; last_us: its last event; pixel: .on, .off thresholds and .leak a step (H * W,), .noise events a step, .hot
    pixels, .hot_rate a step. Source: Rebecq et al., ESIM, CoRL 2018; noise after Hu et al., v2e, CVPRW 2021.
    """
    level -= pixel.leak
    change = image - level
    fired = np.flatnonzero((change > pixel.on) | (change < -pixel.off))
    unit = np.where(change[fired] > 0, pixel.on[fired], -pixel.off[fired])
    count = (change[fired] / unit).astype(np.int64)
    where, unit_of = np.repeat(fired, count), np.repeat(unit, count)
    nth = np.arange(len(where)) - np.searchsorted(where, where) + 1
    slope, ahead = image[where] - before[where], level[where] + nth * unit_of - before[where]
    part = np.divide(ahead, slope, out=rng.random(len(where)).astype(np.float32), where=slope != 0)
    level[fired] += count * unit
    t = (step + np.clip(part, 0, 0.999)) * (1e6 / FPS)
    keep = t - np.where(nth == 1, last_us[where], np.roll(t, 1)) >= REFRACTORY_US
    hot = pixel.hot[rng.random(len(pixel.hot)) < pixel.hot_rate]
    noise = np.concatenate((rng.integers(0, image.size, rng.poisson(pixel.noise)), hot))
    t = np.concatenate((t[keep], (step + rng.random(len(noise))) * (1e6 / FPS))).astype(np.int64)
    where, p = np.concatenate((where[keep], noise)), np.concatenate((unit_of[keep] > 0, rng.random(len(noise)) < 0.5))
    order = np.argsort(t, kind="stable")
    last_us[where[order]] = t[order]
    return t[order], where[order].astype(np.int32), p[order]


def simulate_sequence(job):
    """Simulate one recording, job = (path, number of its split, index, options). A whole one only appears there."""
    path, split, index, given = job
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([given.seed, split, index])
    H, W, steps, number = given.height, given.width, round(given.seconds * FPS), round(given.users * given.seconds)
    scene = SimpleNamespace(height=H, width=W, focal=W, sizes=given.sizes, horizon=H * rng.uniform(0.1, 0.3),
                            camera=rng.uniform(3.5, 6), road=rng.uniform(-0.6, 0.6), night=rng.random() < given.night)
    scene.contrast = np.float32(0.55 if scene.night else 1)
    cells = [np.kron(rng.normal(0, strength, (CELLS // side,) * 2), np.ones((side, side))).astype(np.float32)
             for side, strength in ((8, 0.3), (4, 0.2), (1, 0.1))]
    scene.ground = sum(tent(0, H, np.arange(H)) @ c @ tent(0, W, np.arange(W)).T * scene.contrast for c in cells)
    scene.ground[:int(scene.horizon)] += 0.4 * scene.contrast  # the sky
    # Multiples of the golden ratio spread the rare classes over all splits.
    kinds = np.searchsorted(np.cumsum(SHARES), (index * number + np.arange(number)) * 61.80339887 % 100)
    things = [travel(rng, kind, scene, steps) for kind in (*kinds, *STANDING)]
    image, N = render(scene, things, 0)[0], H * W
    on, off = np.maximum(rng.normal(THRESHOLDS, MISMATCH, (N, 2)), 0.05).astype(np.float32).T.copy()
    pixel = SimpleNamespace(on=on, off=off, leak=on * np.float32(LEAK_HZ / FPS), hot=rng.integers(0, N, N // 15000),
                            hot_rate=rng.uniform(20, 150) / FPS, noise=(0.2 if scene.night else 0.03) * N / FPS)
    level, last_us, labels, events = image.flatten(), np.full(N, -1e9), [], []
    for step in range(1, steps):
        before, (image, owner) = image, render(scene, things, step)
        events.append(make_events(rng, image.ravel(), before.ravel(), level, last_us, pixel, step - 1))
        labels += labels_at(things, step, owner, given) if step % (FPS // LABEL_HZ) == 0 else []
    t, where, p = map(np.concatenate, zip(*events))
    with h5py.File(path.with_suffix(".part"), "w") as file:
        file["events/height"], file["events/width"] = H, W
        for key, x in dict(t=t, x=(where % W).astype("u2"), y=(where // W).astype("u2"), p=p.astype("u1")).items():
            file.create_dataset(f"events/{key}", data=x, shuffle=True, compression="lzf")
    np.save(str(path).replace("_td.h5", "_bbox.npy"), np.array(labels, BOX_DTYPE))
    path.with_suffix(".part").replace(path)


def simulate(dst, num_workers=0, **changes):
    """Simulate all recordings below dst; changes are this file's options. ValueError names a bad option."""
    options = SimpleNamespace(**defaults | changes | {"dst": dst})
    if min(options.height, options.width) < 16 or not 0 < options.sizes[0] < options.sizes[-1] or options.seconds < 0.2:
        raise ValueError(f"sizes={options.sizes}: expected two ascending ones; height, width from 16, seconds from 0.2")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of new processes: their matrices are small, threads only fight
    jobs = [(path, k, i, options) for k, split in enumerate(("train", "val", "test"))
            for i in range(getattr(options, split)) if not (path := Path(dst, split, f"{split}_{i:04}_td.h5")).exists()]
    list(tqdm(run_jobs(simulate_sequence, jobs, num_workers), "simulate", len(jobs), unit="recording"))


def ensure_toy(data_dir="datasets/toy", num_workers=num_workers):
    """Make the toy data set in data_dir, unless it is there: recordings in data_dir + "_raw", prepared as eTraM's."""
    if not Path(data_dir).exists() or Path(data_dir, ".partial").exists():
        print(f"{data_dir} does not exist: simulating {train + val + test} recordings of traffic (about two minutes)")
        simulate(f"{data_dir}_raw", num_workers)
        prepare(f"{data_dir}_raw", data_dir, "etram", num_workers, box_filter="none")


def main(argv):
    simulate(**configure(defaults, argv))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # h5py's callbacks swallow KeyboardInterrupts; the next run tidies up
    command_line(main)

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
import hdf5plugin
import numpy as np
from tqdm import tqdm

from configurator import command_line, configure
from prepare import LABEL, prepare, run_jobs

dst = "datasets/traffic_raw"
train = 30             # recordings a split
val = 8
test = 8
seconds = 7.0          # length of a recording
height = 240           # px of the sensor, up to 720 x 1280; the network's input is half of it
width = 320
users = 2.2            # road users that cross the view, a second
sizes = (6.0, 48.0)    # px of the network's input, square root of the box area: smallest labelled, largest aimed at
night = 0.3            # share of recordings at night
seed = 0
num_workers = 2        # processes; 0: all in this one. The data do not depend on it
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

FPS, LABEL_HZ = 180, 30              # rendered steps a second (intensity is linear between them); labels a second
CELLS = 40                           # sides of a sprite
MIN_VISIBLE = 0.3                    # share of an object in view and not hidden, below which it has no label
THRESHOLDS, MISMATCH = (0.2, 0.24), 0.03  # ON and OFF contrast threshold, log intensity; deviation over pixels
REFRACTORY_US, LEAK_HZ = 500, 0.02   # dead time of a pixel; rate of the ON events that leakage causes
SHADES = {"tyre": -1.5, "glass": -0.9, "skin": 0.4, "lamp": 2.0}  # log intensity; a road has about 0

# Road users by eTraM's class id: length, height, depth in m, m/s, share of the traffic, m a turn of legs or wheels.
# Then what stands about and has no label: speed 0, number in a scene, seconds a turn. Parts, painted in turn: shape,
# shade (a, b: the object's own), then left, right, top, bottom in percent of the box; the front is to the right.
KINDS = (
    (0.75, 1.75, 0.5, 1.4, 0.28, 1.4, "limb+ b 40 60 50 100, limb- b 40 60 50 100, disc a 25 75 14 60, "
     "limb- skin 42 58 20 55, disc skin 36 66 0 17"),
    (4.2, 1.5, 1.8, 10, 0.32, 2, "box a 0 100 42 85, disc a 12 78 0 100, box glass 24 44 12 42, box glass 48 66 12 42, "
     "disc tyre 10 28 62 100, disc tyre 72 90 62 100"),
    (1.75, 1.75, 0.6, 4.5, 0.11, 3.5, "ring tyre 0 40 58 100, ring tyre 60 100 58 100, box b 25 80 62 66, "
     "limb+ b 42 50 45 90, limb- b 42 50 45 90, disc a 34 64 14 52, disc skin 50 66 0 15"),
    (8.5, 3.1, 2.5, 7.5, 0.06, 2, "box a 0 100 0 90, box glass 4 15 14 46, box glass 20 31 14 46, "
     "box glass 36 47 14 46, box glass 52 63 14 46, box glass 68 79 14 46, box b 84 96 14 85, disc tyre 14 25 74 100, "
     "disc tyre 68 79 74 100"),
    (2.0, 1.5, 0.7, 9, 0.08, 2, "disc tyre 0 32 55 100, disc tyre 68 100 55 100, box b 20 85 50 80, "
     "disc a 30 60 12 62, disc tyre 44 64 0 24, box a 55 80 34 42"),
    (6.5, 3.1, 2.5, 8, 0.06, 2, "box a 0 68 0 78, box b 72 100 20 85, box glass 84 98 26 50, box tyre 0 100 78 85, "
     "disc tyre 6 20 72 100, disc tyre 24 38 72 100, disc tyre 78 92 72 100"),
    (13.0, 3.5, 2.6, 8, 0.04, 2, "box a 0 48 14 100, box a 52 100 14 100, box tyre 48 52 20 95, box glass 2 46 28 54, "
     "box glass 54 98 28 54, box b 0 100 70 78, box tyre 20 30 0 3, box tyre 24 26 0 14"),
    (1.05, 1.35, 0.7, 1.3, 0.05, 1.7, "box tyre 12 20 15 70, disc a 20 60 20 68, box b 40 92 55 68, box b 82 92 62 95, "
     "ring tyre 5 60 45 100, disc skin 32 56 0 22"),
    (4.0, 6.0, 4.0, 0, 2, 2, "box tyre 46 54 60 100, leaf a 0 100 0 75"),         # tree
    (0.5, 3.5, 0.5, 0, 2, 0.3, "box tyre 42 58 12 100, blink lamp 20 80 0 11"),   # flickering light
    (0.3, 5.0, 0.3, 0, 1, 1, "box a 0 100 0 100"),                                # pole
)


def sprite(parts, shades, phase, noise):
    """Log intensity times cover, and cover, (CELLS, 2, CELLS), of parts [(shape, shade, left, right, top, bottom)]
    whose limbs, wheels, leaves, lights stand at `phase`, in turns; noise (CELLS, CELLS) in [0, 1): phase of leaves."""
    v, u = (np.mgrid[:CELLS, :CELLS] + 0.5) / CELLS * 100
    image, turn = np.zeros((CELLS, 2, CELLS), np.float32), 2 * np.pi * phase
    for shape, shade, left, right, top, bottom in parts:
        x, y = (2 * u - left - right) / (right - left), (2 * v - top - bottom) / (bottom - top)  # the part: [-1, 1]^2
        x -= {"limb+": 1, "limb-": -1}.get(shape, 0) * (1 + y) * np.sin(turn)
        r2 = x * x + y * y
        inside = (np.abs(x) < 1) & (np.abs(y) < 1) if shape in ("box", "limb+", "limb-") else r2 < 1
        if shape == "ring":  # a wheel with four spokes
            inside &= (r2 > 0.6) | (np.abs(np.sin(2 * np.arctan2(y, x) - turn)) < 0.25)
        if shape in ("leaf", "blink"):
            inside &= np.sin(turn + (2 * np.pi * noise if shape == "leaf" else 0)) > -0.3
        image.swapaxes(1, 2)[inside] = shades[shade], 1
    return image


def tent(start, size, pixels):
    """Weights (len(pixels), CELLS) that resample CELLS stretched over [start, start + size]; 0 beyond the ends."""
    zoom = np.float32(CELLS / size)
    cells = np.float32(pixels + 0.5 - start) * zoom - np.float32(0.5)
    support = max(np.float32(1), zoom)
    return np.maximum(0, 1 - np.abs(cells[:, None] - np.arange(CELLS, dtype=np.float32)) / support) / support


def travel(rng, kind, scene, steps):
    """A thing of KINDS[kind] on a straight way through the scene, with a stop now and then.

    Returns box (steps, 5): left, top, width, height in px and phase; Z (steps,) m; pace (steps,) px/s; images (turns,
    CELLS, 2, CELLS). Size in px is drawn first, the same way for all classes, and depth follows from it, so that size
    does not tell the class.
    """
    length, tall, depth, speed, _, stride, parts = KINDS[kind]
    length, tall = np.array([length, tall]) * rng.lognormal(0, 0.12, 2)
    size = 2 * np.exp(rng.uniform(*np.log(scene.sizes))) * (1 if speed else 0.6)
    Z = scene.focal / min(size / np.sqrt(length * tall), 0.9 * (scene.height - scene.horizon) / scene.camera)
    angle = scene.road + rng.normal(0, 0.05) + np.pi * rng.integers(2)
    if kind in (0, 2, 7) and rng.random() < 0.4:
        angle += rng.choice((-1, 1)) * rng.uniform(0.5, 1.1)  # across the road
    t, middle = np.arange(steps) / FPS, rng.uniform(-0.5, steps / FPS + 0.5)
    pace = np.full(steps, speed * rng.lognormal(0, 0.25))
    if rng.random() < 0.4:
        stop, hold = middle + rng.uniform(-1, 1), rng.uniform(0.7, 4)
        pace *= np.interp(t, (stop - 0.7, stop, stop + hold, stop + hold + 0.9), (1, 0, 0, 1))
    way = np.cumsum(pace) / FPS
    way -= np.interp(middle, t, way)
    Z_at = np.maximum(Z + np.sin(angle) * way, 0.5)
    scale = scene.focal / Z_at
    X = rng.uniform(-0.45, 0.45) * Z * scene.width / scene.focal + np.cos(angle) * way
    across = (length * np.abs(np.cos(angle)) + depth * np.abs(np.sin(angle))) * scale
    phase = way / stride if speed else t / (stride * rng.lognormal(0, 0.7))
    top = scene.horizon + (scene.camera - tall) * scale
    parts = [(shape, shade, *map(int, sides)) for shape, shade, *sides in map(str.split, parts.split(","))]
    parts += [("disc", "lamp", 90, 100, 55, 75)] if scene.night and kind in (1, 3, 4, 5, 6) else []
    shades = SHADES | {paint: rng.choice((-1, 1)) * rng.uniform(0.3, 1.2) for paint in "ab"}
    shades = {shade: value * scene.contrast for shade, value in shades.items()}
    turns, noise = 1 if {part[0] for part in parts} <= {"box", "disc"} else 12, rng.random((CELLS, CELLS))
    images = np.stack([sprite(parts, shades, i / turns, noise) for i in range(turns)])
    box = np.stack((scene.width / 2 + X * scale - across / 2, top, across, tall * scale, phase), 1)
    return SimpleNamespace(kind=kind, images=images[..., ::1 if np.cos(angle) > 0 else -1], Z=Z_at, pace=pace * scale,
                           box=box, moved=0.0, place=None, patch=None)


def make_scene(rng, options, kinds, steps):
    """Scene with its static background, .ground (H, W) log intensity, and the list of what moves or stands in it."""
    H, W = options.height, options.width
    scene = SimpleNamespace(height=H, width=W, focal=W, sizes=options.sizes, horizon=H * rng.uniform(0.1, 0.3),
                            camera=rng.uniform(3.5, 6), road=rng.uniform(-0.6, 0.6), night=rng.random() < options.night)
    scene.contrast = np.float32(0.55 if scene.night else 1)
    scene.ground = np.zeros((H, W), np.float32)
    for coarse, strength in ((8, 0.3), (4, 0.2), (1, 0.1)):
        cells = rng.normal(0, strength, (CELLS // coarse,) * 2).repeat(coarse, 0).repeat(coarse, 1).astype(np.float32)
        scene.ground += tent(0, H, np.arange(H)) @ cells @ tent(0, W, np.arange(W)).T * scene.contrast
    scene.ground[:int(scene.horizon)] += 0.4 * scene.contrast
    about = [kind for kind, row in enumerate(KINDS) if not row[3] for _ in range(row[4])]
    return scene, [travel(rng, kind, scene, steps) for kind in (*kinds, *about)]


def render(scene, things, step, owner=None):
    """Log intensity (H, W) float32 at a step, far things first; owner (H, W) is set to the index of what is seen."""
    image = scene.ground.copy()
    for i in np.argsort([-thing.Z[step] for thing in things], kind="stable"):
        thing = things[i]
        x, y, w, h, phase = place = thing.box[step].tolist()
        area = np.s_[max(int(y), 0):max(int(y + h) + 1, 0), max(int(x), 0):max(int(x + w) + 1, 0)]
        here = image[area]
        if not here.size or min(w, h) < 1.5:
            continue
        if thing.place != place:  # what stands still is not drawn anew
            k, part = divmod(phase % 1 * len(thing.images), 1)
            cells = thing.images[int(k) - 1] * np.float32(1 - part) + thing.images[int(k)] * np.float32(part)
            rows = tent(y, h, area[0].start + np.arange(len(here)))
            cols = tent(x, w, area[1].start + np.arange(here.shape[1]))
            cells = (rows @ cells.reshape(CELLS, -1)).reshape(-1, CELLS) @ cols.T
            thing.place, thing.patch = place, cells.reshape(len(here), 2, -1).swapaxes(0, 1)
        here *= 1 - thing.patch[1]
        here += thing.patch[0]
        if owner is not None:
            owner[area][thing.patch[1] > 0.5] = i
    return image


def labels_at(things, step, owner, options):
    """Labels of the road users in view as tuples of LABEL's fields: whole boxes cropped to the frame.

    Left out: what is hidden or out of view by more than 1 - MIN_VISIBLE, too small, or has not moved yet (it never
    caused an event, so that no detector can know of it).
    """
    labels, seen = [], np.bincount(owner.ravel() + 1, minlength=len(things) + 1)[1:]
    for i, thing in enumerate(things):
        x, y, w, h, _ = thing.box[step]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, options.width - 1), min(y + h, options.height - 1)
        if seen[i] >= max(MIN_VISIBLE * thing.images[0][:, 1].mean() * w * h, 4):
            thing.moved += thing.pace[step] / LABEL_HZ
            if thing.moved > 2 and (x2 - x1) * (y2 - y1) >= (2 * options.sizes[0]) ** 2:
                labels.append((step * 1_000_000 // FPS, x1, y1, x2 - x1, y2 - y1, thing.kind, i, 1))
    return labels


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
    p = np.concatenate((unit_of[keep] > 0, rng.random(len(noise)) < 0.5))
    order = np.argsort(t, kind="stable")
    where = np.concatenate((where[keep], noise)).astype(np.int32)[order]
    last_us[where] = t[order]
    return t[order], where, p[order]


def simulate_sequence(job):
    """Simulate one recording, job = (split, index, options). It appears under its name once it is complete."""
    split, index, options = job
    folder, name = Path(options.dst, split), f"{split}_{index:04d}"
    if Path(folder, f"{name}_td.h5").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([options.seed, ("train", "val", "test").index(split), index])
    H, W, steps = options.height, options.width, round(options.seconds * FPS)
    number, shares = round(options.users * options.seconds), np.cumsum([kind[4] for kind in KINDS if kind[3]])
    draws = (index * number + np.arange(number)) * 0.6180339887 % 1  # golden ratio: rare classes spread over all splits
    scene, things = make_scene(rng, options, np.searchsorted(shares, draws * shares[-1]), steps)
    on, off = np.maximum(rng.normal(THRESHOLDS, MISMATCH, (H * W, 2)), 0.05).astype(np.float32).T.copy()
    pixel = SimpleNamespace(on=on, off=off, leak=on * np.float32(LEAK_HZ / FPS),
                            hot=rng.integers(0, H * W, H * W // 15000), hot_rate=rng.uniform(20, 150) / FPS,
                            noise=(0.2 if scene.night else 0.03) * H * W / FPS)
    before = render(scene, things, 0).ravel()
    level, last_us, labels, events = before.copy(), np.full(H * W, -1e9), [], []
    for step in range(1, steps):
        owner = np.full((H, W), -1, np.int64) if step % (FPS // LABEL_HZ) == 0 else None
        image = render(scene, things, step, owner).ravel()
        events.append(make_events(rng, image, before, level, last_us, pixel, step - 1))
        before = image
        labels += [] if owner is None else labels_at(things, step, owner, options)
    t, where, p = map(np.concatenate, zip(*events))
    columns = {"t": t, "x": (where % W).astype(np.uint16), "y": (where // W).astype(np.uint16), "p": p.astype(np.uint8)}
    with h5py.File(folder / f".{name}.part", "w") as file:
        file["events/height"], file["events/width"] = H, W
        for key, column in columns.items():
            file.create_dataset(f"events/{key}", data=column, chunks=True, **hdf5plugin.Blosc(cname="zstd"))
    np.save(folder / f"{name}_bbox.npy", np.array(labels, LABEL))
    os.replace(folder / f".{name}.part", folder / f"{name}_td.h5")


def simulate(dst, num_workers=0, **changes):
    """Simulate all recordings below dst; changes are this file's options. ValueError names a bad option."""
    options = SimpleNamespace(**defaults | changes | {"dst": dst})
    if min(options.height, options.width) < 16 or not 0 < options.sizes[0] < options.sizes[1] or options.seconds < 0.2:
        raise ValueError(f"height={options.height}, width={options.width}, sizes={options.sizes}, seconds="
                         f"{options.seconds}: expected at least 16 px, ascending sizes above 0, at least 0.2 s")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of new processes: their matrices are small, threads only fight
    jobs = [(split, i, options) for split in ("train", "val", "test") for i in range(getattr(options, split))]
    for _ in tqdm(run_jobs(simulate_sequence, jobs, num_workers), "simulate", len(jobs), unit="recording"):
        pass


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

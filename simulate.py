"""Simulated street traffic before a static event camera -> raw recordings; the toy data set.

In:  a seed and the options below.
Out: DST/{train,val,test}/NAME_td.h5 (group `events`: x, y, p, t, height, width) and NAME_bbox.npy,
     with the fields and class ids of eTraM. Recordings that exist are kept: a second run goes on.
Flat pictures of things move on a ground plane with perspective and hide each other. Events follow
the contrast-threshold model on log intensity (ESIM, Rebecq et al., CoRL 2018).

    python simulate.py --dst=datasets/traffic_raw --height=720 --width=1280 --seconds=20
"""

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from configurator import command_line, configure
from formats import BOX_DTYPE, new_h5
from prepare import prepare, run_jobs

defaults = {
    "dst": "datasets/traffic_raw",
    "seed": 0,
    "num_workers": 2,      # processes, 0: all in this one; the data do not depend on it
    "train": 30,           # recordings in each split
    "val": 8,
    "test": 8,
    "height": 240,         # px of the sensor, up to 720 x 1280
    "width": 320,
    "seconds": 7.0,        # length of a recording
    "users": 2.2,          # road users that cross the view, a second
    "sizes": (6.0, 48.0),  # smallest and largest thing: root of its box area, px of the network's
                           # input, which is half of the sensor
    "night": 0.3,          # share of night scenes
}

FPS = 120            # rendered steps a second; log intensity is linear in between
LABEL_STEPS = 4      # steps from label to label
CELLS = 40           # sides of the picture of a thing
MIN_VISIBLE = 0.2    # share of its box in which a thing must be seen, else it has no label
THRESHOLD = 0.22     # contrast, in log intensity, that causes an event
MISMATCH = 0.03      # standard deviation of the threshold over the pixels
REFRACTORY_US = 500  # dead time of a pixel after an event

# Log intensity of paints, against the body of a thing.
BODY = 0.0
GLASS = -0.9
DARK = -1.5
LIGHT = 0.7
LAMP = 2.0
# Parts of things: paint, then top, bottom, left and right in percent of the box. The front is on
# the right; later parts cover earlier ones.
PERSON = (
    (DARK, 50, 100, 34, 50),
    (GLASS, 50, 100, 48, 64),
    (BODY, 14, 60, 25, 75),
    (LIGHT, 0, 18, 36, 66),
)
WHEELS = (
    (DARK, 65, 100, 8, 28),
    (DARK, 65, 100, 72, 92),
)
HEADLIGHT = (
    (LAMP, 55, 75, 90, 100),
)
# What there is to see: eTraM's classes in order of their ids, then what stands about and has no
# label. Length and height in m, speed in m/s, parts.
KINDS = (
    # pedestrian
    (0.75, 1.75, 1.4, PERSON),
    # car
    (4.2, 1.5, 10, WHEELS + (
        (BODY, 0, 90, 14, 78),
        (BODY, 40, 88, 0, 100),
        (GLASS, 10, 42, 24, 70),
    )),
    # bicycle
    (1.75, 1.75, 4.5, WHEELS + PERSON),
    # bus
    (8.5, 3.1, 7.5, WHEELS + (
        (BODY, 0, 90, 0, 100),
        (GLASS, 14, 46, 4, 96),
    )),
    # motorbike
    (2.0, 1.5, 9, PERSON + WHEELS + (
        (GLASS, 48, 82, 15, 90),
    )),
    # truck
    (6.5, 3.1, 8, WHEELS + (
        (BODY, 0, 85, 0, 68),
        (LIGHT, 20, 88, 72, 100),
        (GLASS, 26, 50, 84, 98),
    )),
    # tram
    (13, 3.5, 8, (
        (DARK, 0, 20, 22, 28),
        (BODY, 14, 100, 0, 100),
        (GLASS, 28, 54, 2, 98),
    )),
    # wheelchair
    (1.05, 1.35, 1.3, PERSON + (
        (DARK, 45, 100, 5, 60),
    )),
    # tree
    (4.0, 6.0, 0, (
        (DARK, 50, 100, 46, 54),
        (BODY, 0, 40, 20, 70),
        (GLASS, 25, 70, 10, 90),
    )),
    # lantern
    (0.5, 3.5, 0, (
        (LAMP, 0, 12, 0, 100),
    )),
)
SHARES = (0.28, 0.32, 0.11, 0.06, 0.08, 0.06, 0.04, 0.05)  # of the traffic, by class
STANDING = (8, 8, 9, 9)  # kinds that stand in every scene, where the wind moves them


def make_scene(rng, options):
    """A street: ground (H, W) float32 log intensity, about 0; camera, road and light.

    The focal length is the width of the frame.
    """
    H = options.height
    W = options.width
    ground = np.zeros((H, W), np.float32)
    for x, y, w, h in rng.integers(0, (W, H, W // 2, H // 2), (100, 4)):
        ground[y:y + h, x:x + w] += rng.normal(0, 0.15)
    night = rng.random() < options.night
    return SimpleNamespace(
        ground=ground,
        sizes=options.sizes,
        horizon=H * rng.uniform(0.05, 0.3),  # px from the top
        camera=rng.uniform(3.5, 8),  # m above the road
        road=rng.uniform(-0.6, 0.6),  # its direction, radians; 0: straight across the view
        night=night,
        contrast=0.55 if night else 1,
        noise_hz=0.2 if night else 0.03,  # events without a cause, a second and pixel
    )


def draw(parts, body, rise):
    """Picture of a thing (2, CELLS, CELLS): log intensity times cover, and cover, 0 or 1.

    body: log intensity of its body. rise: by how much of its height its front is above its back.
    The corners of all parts are round.
    """
    y, x = (np.mgrid[:CELLS, :CELLS] + 0.5) * 100 / CELLS
    y = 50 + (y - 50) * (1 + abs(rise)) + (x - 50) * rise  # the middle stays
    picture = np.zeros((2, CELLS, CELLS), np.float32)
    for paint, top, bottom, left, right in parts:
        down = (2 * y - top - bottom) / (bottom - top)  # -1 to 1
        across = (2 * x - left - right) / (right - left)
        inside = down ** 4 + across ** 4 < 1
        picture[0, inside] = body + paint
        picture[1, inside] = 1
    return picture


def make_thing(rng, kind, scene, steps):
    """A thing of KINDS[kind] on a straight way through the scene, which may stop and start again.

    Fields: kind; at each step box_xyxy (steps, 4) px, depth (steps,) m, moved (steps,) px so far;
    picture (2, CELLS, CELLS) as from draw.
    """
    length, tall, speed, parts = KINDS[kind]
    W = scene.ground.shape[1]
    # The size in px is drawn first, the same way for all kinds, and the depth follows from it, so
    # that the size does not tell the class; but nothing is nearly below the camera.
    size = 2 * np.exp(rng.uniform(*np.log(scene.sizes)))
    depth = max(W * np.sqrt(length * tall) / size, 1.7 * scene.camera)

    # Metres along its way; 0, at the place that is drawn, is reached at a random time.
    time = np.arange(steps) / FPS
    stop = rng.uniform(0, 3 * time[-1])  # for some after the end
    start = stop + rng.uniform(0.7, 4)
    moving = np.interp(time, (stop - 0.7, stop, start, start + 0.9), (1, 0, 0, 1))
    pace = speed * rng.lognormal(0, 0.25) * moving
    way = np.cumsum(pace) / FPS
    way -= rng.choice(way)

    # On the ground plane, then in the image.
    angle = rng.normal(scene.road, 0.2) + np.pi * rng.integers(2)
    across = np.cos(angle)  # the share of its way that leads to the right
    # Seen from above, its line on the ground rises in the image where it goes away.
    slope = scene.camera / depth * np.tan(angle) * np.sign(across)
    rise = length / tall * np.clip(slope, -0.6, 0.6)
    right = rng.uniform(-0.45, 0.45) * depth + across * way
    depth = np.maximum(depth + np.sin(angle) * way, 0.5)
    scale = W / depth  # px a metre
    middle = W / 2 + right * scale
    if speed == 0:  # the wind moves it
        rise = 0
        middle += 0.05 * length * scale * np.sin(time * rng.uniform(2, 20))
    half = length / 2 * scale
    foot = scene.horizon + scene.camera * scale
    over = abs(rise) * tall * scale / 2
    box = np.stack((middle - half, foot - tall * scale - over, middle + half, foot + over), 1)
    moved = np.cumsum(pace * scale) / FPS

    if scene.night and speed > 5:
        parts += HEADLIGHT
    picture = draw(parts, rng.normal(0, 0.8), rise)
    if across < 0:  # it goes to the left
        picture = picture[..., ::-1]
    return SimpleNamespace(kind=kind, box_xyxy=box, depth=depth, moved=moved, picture=picture)


def overlap(size, start, stop):
    """Which pixels of a row or column of `size` lie between start and stop px, as a slice.

    Also the share of each of them in each of CELLS cells there (n, CELLS) float32.
    """
    reached = slice(max(int(start), 0), max(int(stop) + 1, 0))
    pixels = np.arange(size)[reached, None]
    edges = start + (stop - start) / CELLS * np.arange(CELLS + 1)
    return reached, np.diff(edges.clip(pixels, pixels + 1)).astype(np.float32)


def render(scene, things, step):
    """Log intensity (H, W) float32 at a step, and the index of what is seen (H, W), -1: nothing."""
    image = scene.ground.copy()
    H, W = image.shape
    owner = np.full((H, W), -1)
    for index in np.argsort([-thing.depth[step] for thing in things]):  # from far to near
        x1, y1, x2, y2 = things[index].box_xyxy[step].tolist()  # faster than as NumPy numbers
        rows, y = overlap(H, y1, y2)
        columns, x = overlap(W, x1, x2)
        view = image[rows, columns]
        if view.size:
            ink, cover = y @ things[index].picture @ x.T
            view += ink - cover * view
            owner[rows, columns][cover > 0.5] = index
    return image, owner


def labels_at(scene, things, step, owner):
    """Labels of the road users in view: tuples of BOX_DTYPE's fields, whole boxes cropped.

    Left out: what is mostly hidden, too small, or has not moved yet (it never caused an event, so
    that no detector can know of it).
    """
    bottom, right = np.subtract(owner.shape, 1)
    labels = []
    for index, thing in enumerate(things):
        x1, y1, x2, y2 = thing.box_xyxy[step].clip(0, (right, bottom, right, bottom))
        area = (x2 - x1) * (y2 - y1)
        seen = np.sum(owner == index) > MIN_VISIBLE * area
        if seen and area >= (2 * scene.sizes[0]) ** 2 and thing.moved[step] > 2:
            t_us = step * 1_000_000 // FPS
            labels.append((t_us, x1, y1, x2 - x1, y2 - y1, thing.kind, index, 1))
    return labels


class Sensor:
    """Pixels that each compare the log intensity with a level: its value at their last event.

    before, level, threshold (H * W,): log intensity; last_us (H * W,): time of the last event.
    Source: Rebecq et al., ESIM, CoRL 2018.
    """

    def __init__(self, rng, image, contrast):
        self.threshold = np.float32(rng.normal(THRESHOLD, MISMATCH, image.size) / contrast)
        self.before = image.ravel()
        self.level = image.flatten()
        self.last_us = np.full(image.size, -1e9)

    def events(self, image, step):
        """Events while the log intensity goes to image (H, W) in a step, linearly.

        Returns a list of (t us, flat pixel, polarity), the nth of all pixels in its nth place.
        """
        image = image.ravel()
        threshold = np.copysign(self.threshold, image - self.level)
        count = ((image - self.level) / threshold).astype(np.int32)
        pixels = np.flatnonzero(image != self.before)
        events = []
        for nth in range(count.max()):
            pixels = pixels[count[pixels] > nth]
            self.level[pixels] += threshold[pixels]
            before = self.before[pixels]
            part = (self.level[pixels] - before) / (image[pixels] - before)
            t = (step + part) * (1e6 / FPS)
            alive = t - self.last_us[pixels] >= REFRACTORY_US
            self.last_us[pixels[alive]] = t[alive]
            events.append((t[alive], pixels[alive], threshold[pixels[alive]] > 0))
        self.before = image
        return events


def write_recording(path, events, labels, height, width):
    """Write events, a list of (t us, flat pixel, polarity), and labels; path appears last."""
    events = np.hstack(events)
    t, pixel, p = events[:, events[0].argsort()]
    y, x = np.divmod(pixel, width)
    columns = (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "u1"))
    partial = path.with_suffix(".part")
    with new_h5(partial) as file:
        group = file.create_group("events")
        group["height"] = height
        group["width"] = width
        for name, column, dtype in columns:
            group.create_dataset(name, data=column, dtype=dtype, shuffle=True, compression="lzf")
    np.save(str(path).replace("_td.h5", "_bbox.npy"), np.array(labels, BOX_DTYPE))
    partial.replace(path)


def simulate_sequence(job):
    """Simulate one recording, job = (path, options), unless it exists. Its name seeds it, too."""
    path, options = job
    if path.exists():
        return
    rng = np.random.default_rng([options.seed, *path.name.encode()])
    steps = round(options.seconds * FPS)
    scene = make_scene(rng, options)
    kinds = rng.choice(len(SHARES), round(options.seconds * options.users), p=SHARES)
    things = [make_thing(rng, kind, scene, steps) for kind in (*kinds, *STANDING)]

    image, owner = render(scene, things, 0)
    sensor = Sensor(rng, image, scene.contrast)
    events = []
    labels = []
    for step in range(1, steps):
        image, owner = render(scene, things, step)
        events += sensor.events(image, step - 1)
        if step % LABEL_STEPS == 0:
            labels += labels_at(scene, things, step, owner)

    # Noise: t, pixel and polarity are truncated to whole numbers where they are written.
    count = rng.poisson(scene.noise_hz * options.seconds * image.size)
    noise = rng.uniform(0, (1e6 * options.seconds, image.size, 2), (count, 3)).T
    write_recording(path, [*events, noise], labels, *image.shape)


def simulate(dst, num_workers=0, **changes):
    """Simulate all recordings below dst; changes: options of this file. ValueError: a bad one."""
    options = SimpleNamespace(**defaults | changes)
    if not 0 < options.sizes[0] < options.sizes[-1]:
        raise ValueError(f"sizes={options.sizes}: expected the smallest and the largest, in px")
    if min(options.height, options.width) < 16 or options.seconds < 0.2:
        raise ValueError("height and width must be 16 px or more, seconds 0.2 or more")
    jobs = []
    for split in ("train", "val", "test"):
        Path(dst, split).mkdir(parents=True, exist_ok=True)
        for index in range(getattr(options, split)):
            jobs.append((Path(dst, split, f"{split}_{index:04}_td.h5"), options))
    done = run_jobs(simulate_sequence, jobs, num_workers)
    list(tqdm(done, "simulate", len(jobs), unit="recording"))


def ensure_toy(data_dir, num_workers=2):
    """Make the toy data set in data_dir unless it is complete, from recordings in data_dir_raw."""
    if Path(data_dir).exists() and not Path(data_dir, ".partial").exists():
        return
    print(f"{data_dir} does not exist: simulating recordings of traffic, about two minutes")
    simulate(f"{data_dir}_raw", num_workers)
    prepare(f"{data_dir}_raw", data_dir, "etram", num_workers, box_filter="none")


def main(argv):
    simulate(**configure(defaults, argv))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # h5py's callbacks swallow KeyboardInterrupts
    command_line(main)

"""Prepared sequences (RVT's layout on disk) -> micro-batches, a function of (seed, step).

In: DATA/{train,val,test}/SEQUENCE as prepare.py or RVT's preprocessing writes them.
Out: Sequence, Batch. As a script it inspects a data set with the code that training reads it with,
decodes every frame and prints what training would fail on as FINDING (exit status 1).

    python data.py datasets/toy --split=test
"""

import functools
import json
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin  # its import registers the Blosc filter with HDF5
import numpy as np
import torch
from numcodecs import blosc as blosc1  # numcodecs' blosc is Blosc 1, as is hdf5plugin.Blosc
from numpy.lib.recfunctions import structured_to_unstructured
from tqdm import tqdm

from configurator import command_line, configure
from formats import BOX_DTYPE, CHANNELS, FILES, REPRESENTATION, check_blosc, check_names, reading
from pictures import draw_box_sizes

# One micro-batch; T time steps, B slots, N frames with labels.
#   events (T, B, 20, H, W) uint8 as stored, zeros where a run has ended
#   rows (B, H), cols (B, W) int64: the flip and zoom of each slot, for augment
#   is_first (B,) bool: a run starts, its state is reset before this chunk
#   frames (N,) int64 ascending: t * B + b of the labelled frames, at least one
#   targets (N, M, 5) float32: their boxes, class, cx, cy, w, h in augmented pixels; zeros pad
#   has_boxes () bool; False: `frames` is one frame without boxes, a filler; the loss weighs 0
Batch = namedtuple("Batch", "events rows cols is_first frames targets has_boxes")

# Flip left to right, then zoom. zoom > 1 shows the window with its top-left corner at (x, y) and
# 1 / zoom of the frame's sides as the whole frame; zoom < 1 shows the whole frame in a window at
# (x, y) of `zoom` of its sides.
View = namedtuple("View", "flip zoom x y")


@dataclass
class Augmentation:
    """Flip and zoom of a run, RVT's. The fields are config keys, declared here and nowhere else."""

    flip: float = 0.5  # probability to flip left to right
    zoom_stream: float = 0.5  # probability to zoom a stream; streams only zoom out
    zoom_random: float = 0.8  # probability to zoom a random window
    zoom_in_share: float = 0.8  # share of the zoomed random windows that zoom in
    zoom_in_max: float = 1.5  # in by a factor of 1 to this
    zoom_out_max: float = 1.2  # out by a factor of 1 to this

    def __post_init__(self):
        for key, value in vars(self).items():
            low, high = (1, 10) if key.endswith("max") else (0, 1)
            if not low <= value <= high:
                raise ValueError(f"{key}={value}: expected {low} to {high}")


# ------------------------------------------------------------------------- prepared sequences


@functools.lru_cache(maxsize=64)  # Gen1 has more sequences than a process may hold files open
def open_events(path):
    """Dataset `data`, uint8 (N, 20, H, W), of an event file, kept open."""
    return h5py.File(path, "r", locking=False)["data"]  # network file systems lack locks


def move_boxes(boxes, hw, view):
    """Boxes as the View shows them, less those that keep no area.

    boxes (n,) BOX_DTYPE in frames of hw (H, W) pixels. They are clipped to their frame, then to
    what is shown of it. As in RVT, right and bottom edges end at the last pixel, W - 1 and H - 1;
    View(False, 0.5, 0, 0) is what it does for half-resolution sets, bit for bit.
    """
    boxes = boxes.copy()
    zoom = view.zoom
    if view.flip:
        boxes["x"] = hw[1] - 1 - boxes["x"] - boxes["w"]
    for start, extent, size, corner in zip("xy", "wh", hw[::-1], view[2:]):
        # clip to the frame, or to the window that is zoomed in on
        first = 0
        last = size - 1
        if zoom > 1:
            first = corner
            last = min(corner + size / zoom, last) - 1
        edges = (boxes[start], boxes[start] + boxes[extent])
        low, high = np.clip(edges, first, last) - first
        # zoom; out, into the window
        if zoom != 1:
            high = low + (high - low)  # as RVT adds it: the last bit differs
            high = np.minimum(high * zoom, size * zoom - 1)
            low = low * zoom
        boxes[start] = low + (corner - first)
        boxes[extent] = high - low
    return boxes[(boxes["w"] > 0) & (boxes["h"] > 0)]


class Sequence:
    """One prepared sequence: labels in memory, event frames read on demand.

    path, name: its folder. hw (H, W): size of a frame, the network's input. length N: frames.
    timestamps_us (N,) int64: ends of the windows.
    label_frames (L,) int64 ascending: the frames that carry boxes.
    boxes: L arrays of BOX_DTYPE in pixels of the input, none empty.
    read(start, stop, out): event frames.
    Whatever has these plays in TrainData and detect.run: for a format of your own, write such a
    class and name it in open_split. Ours also pickles, for it holds no open file.
    The half-resolution file is taken where there is one.
    ValueError: a file is missing or damaged, one does not fit the others, a class id is not below
    num_classes.
    """

    def __init__(self, path, num_classes=2**16):
        self.path = Path(path)
        self.name = self.path.name
        folder = self.path / REPRESENTATION

        half = (folder / FILES["half"]).is_file()
        self.file = folder / FILES["half" if half else "full"]
        open_events.cache_clear()  # the file may be another one by now
        with reading(path):
            # events
            data = open_events(self.file)
            self.length, channels, H, W = data.shape
            self.hw = (H, W)
            if data.dtype != np.uint8 or channels != CHANNELS:
                raise ValueError("expected events of uint8 (N, 20, H, W)")

            # labels as they are stored; np.load takes no pickles
            self.timestamps_us = np.load(folder / "timestamps_us.npy")
            frames = np.load(folder / "objframe_idx_2_repr_idx.npy").astype(np.int64)
            stored = np.load(self.path / "labels_v2/labels.npz")
            labels = stored["labels"]
            first = stored["objframe_idx_2_label_idx"]  # first label of each labelled frame
            if len(self.timestamps_us) != self.length or (np.diff(self.timestamps_us) <= 0).any():
                raise ValueError("expected ascending times, one for each frame")
            for array, end in ((frames, self.length), (first, len(labels))):
                if not (np.diff(array, prepend=-1, append=end) > 0).all():
                    raise ValueError("indices of frames or labels do not ascend, or go too far")
            boxes = np.ones(len(labels), BOX_DTYPE)
            for name in BOX_DTYPE.names[:6]:  # the others are not used, and some sets lack them
                boxes[name] = labels[name]
            if (boxes["class_id"] >= num_classes).any():
                raise ValueError(f"class ids from {num_classes} on: name all classes")

            # in pixels of the input; labels before the first labelled frame belong to none
            scale = 2 if half else 1
            boxes = [
                move_boxes(seen, (scale * H, scale * W), View(False, 1 / scale, 0, 0))
                for seen in np.split(boxes, first)[1:]
            ]
            # a frame that keeps no box is unlabelled
            self.boxes = list(filter(len, boxes))
            self.label_frames = frames[[len(seen) > 0 for seen in boxes]]

    def read(self, start, stop, out=None):
        """Event frames start to stop, uint8 (stop - start, 20, H, W), or into the first of `out`.

        ValueError names the file and the frame that does not decode.
        """
        data = open_events(self.file)
        if out is None:
            out = np.empty((stop - start, *data.shape[1:]), np.uint8)
        # HDF5 takes 60 times longer for all at once
        for frame, target in zip(range(start, stop), out):
            with reading(f"{self.file}: frame {frame} does not decode"):
                skipped = True  # HDF5 is to read it
                if data.chunks == (1, *target.shape) and data.filter_ids == (hdf5plugin.BLOSC_ID,):
                    skipped, chunk = data.id.read_direct_chunk((frame, 0, 0, 0))
                if skipped:  # a chunk without Blosc, or of another filter
                    target[:] = data[frame]
                else:
                    check_blosc(chunk, target.nbytes)
                    blosc1.decompress(chunk, target)
        return out


def open_split(data_dir, split, num_classes=2**16):
    """Sequences of DATA/split by name, each checked but for its event frames.

    ValueError: the split is missing or without a labelled frame; a sequence is damaged, frames
    differ in size, a class id is not below num_classes.
    """
    folder = Path(data_dir) / split
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}; prepare.py makes it")
    paths = sorted(filter(Path.is_dir, folder.glob("[!.]*")))
    sequences = [Sequence(path, num_classes) for path in tqdm(paths, split, leave=False)]
    if not any(sequence.boxes for sequence in sequences):
        raise ValueError(f"{folder}: no labelled frames; prepare its recordings with their labels")
    for sequence in sequences:
        if sequence.hw != sequences[0].hw:
            raise ValueError(f"{sequence.path}: frames of {sequence.hw}, not {sequences[0].hw}")
    return sequences


def load_classes(data_dir, class_names, num_classes):
    """Names of the classes: those in DATA/dataset.json, else class_names, else "0", "1", ...

    ValueError: none, a damaged file, or not num_classes (0: any number); no such folder.
    """
    path = Path(data_dir) / "dataset.json"
    if not path.parent.exists():
        raise ValueError(f"no such folder: {data_dir}")
    names = class_names or range(num_classes)
    with reading(f'{path}, expected {{"classes": [NAME, ...]}}'):
        if path.is_file():
            names = json.loads(path.read_bytes())["classes"]
            if not isinstance(names, list):
                raise ValueError(f"classes is {names!r}, no list")
        names = tuple(map(str, names))  # --class_names=30,50 gives numbers
        check_names(names)
        if not names or num_classes not in (0, len(names)):
            raise ValueError(f"{len(names)} class_names, {num_classes=}; wrong data_dir? Without a "
                             "dataset.json there give --class_names=car,bike, by id")
    return names


# ------------------------------------------------------------------------------- augmentation


def draw_view(rng, hw, boxes, augmentation, random):
    """A random View, distributed as RVT's; one of `boxes`, of the last labelled frame, stays seen.

    random: of a random window, which may zoom in; else of a stream, where all chunks of a run draw
    the same. Source: RVT's augmentation. Ours: any box may be the one; RVT never draws the last.
    """
    zoom = augmentation.zoom_random if random else augmentation.zoom_stream
    flip = rng.random() < augmentation.flip
    if rng.random() >= zoom:
        return View(flip, 1.0, 0, 0)
    inward = rng.random() < augmentation.zoom_in_share and random
    factor = rng.uniform(1, augmentation.zoom_in_max if inward else augmentation.zoom_out_max)
    # not rng.integers(n): it takes more or fewer bits as n is, and the chunks of a run differ in n
    _, x, y, w, h, *_ = boxes[int(rng.random() * len(boxes))].tolist()
    if flip:
        x = hw[1] - 1 - x - w

    # the corner of the window, along both axes: anywhere, or from where the window ends with the
    # box to where it starts with it; the other way round, the window lies in a larger box
    size = np.array(hw[::-1])
    window = (size / factor).astype(int)
    first = 0
    last = size - window
    if inward:
        start = np.array((x, y))
        ends = np.sort((start, start + (w, h) - window), axis=0)
        first, last = np.maximum(np.minimum(ends, last - 1), 0)
    corner = rng.uniform(first, last).astype(int)
    return View(flip, factor if inward else 1 / factor, *corner.tolist())


def index_map(size, corner, zoom, flip):
    """Positions (size,) int64 in the input that a View shows along one axis, -1 for zero.

    corner: where its window begins. Nearest-exact as torch resizes a picture, bit for bit.
    """
    position = torch.arange(size) + 0.5
    window = int(size * min(zoom, 1 / zoom))
    if zoom > 1:
        source = (position * (window / size)).floor() + corner
    else:
        source = ((position - corner) * (size / window)).floor()
    if flip:
        source = size - 1 - source
    source[(source < 0) | (source >= size)] = -1
    return source.long()


def augment(events, rows, cols):
    """out[t, b, c, y, x] = events[t, b, c, rows[b, y], cols[b, x]], and 0 where an index is -1.

    events (T, B, C, H, W), rows (B, H), cols (B, W) int64 -> as events; all on one device.
    One gather takes 6.5 ms a frame of 20x360x640; selecting rows and then columns takes 30, RVT's
    interpolation 7.5 (one core of an AVX-512 Xeon, 2026-11).
    """
    rows = rows[:, :, None]
    cols = cols[:, None]
    pixels = (rows * events.shape[4] + cols).clamp(min=0).flatten(1)  # (B, H * W)
    flat = events.flatten(3)
    moved = flat.gather(3, pixels[:, None].expand_as(flat)).view_as(events)
    shown = torch.minimum(rows, cols) >= 0  # (B, H, W)
    return moved * shown[:, None]


# --------------------------------------------------------------------------- training batches


class Runs:
    """Runs of all sequences in chunks of T frames, in an order that (seed, slot, pass) draws.

    A stream goes from T - 1 frames before a labelled frame to the last one before a label gap
    longer than T, so each chunk holds a labelled frame. random: the T frames up to each labelled
    frame, where there are T.
    runs: lists of chunks (index of the sequence, first frame of the run, start, end).
    length: chunks of all runs.
    """

    def __init__(self, sequences, T, seed, random):
        self.key = (seed, int(random))
        self.random = random
        self.runs = []
        gap = 0 if random else T
        for index, sequence in enumerate(sequences):
            frames = sequence.label_frames
            if random:
                frames = frames[frames >= T - 1]
            starts = np.flatnonzero(np.diff(frames, prepend=-T - 1) > gap)
            for labels in np.split(frames, starts)[1:]:
                first = max(labels[0] - T + 1, 0)
                end = labels[-1] + 1
                chunks = range(first, end, T)
                self.runs.append([(index, first, at, min(at + T, end)) for at in chunks])
        self.length = sum(map(len, self.runs))

    @functools.lru_cache(maxsize=256)  # more than a process has slots: each draws once a pass
    def order(self, slot, p):
        """The chunks as `slot` plays them in pass p: runs shuffled, each in order."""
        rng = np.random.default_rng((*self.key, 0, slot, p))
        chunks = []
        for run in np.argsort(rng.permutation(len(self.runs))):
            chunks += self.runs[run]
        return chunks

    def place(self, slot, slots, step):
        """(chunk, key): what `slot` of `slots` plays at `step`, and integers that name the run."""
        p, position = divmod(step + slot * self.length // slots, self.length)
        chunk = self.order(slot, p)[position]
        return chunk, (*self.key, 1, slot, p, *chunk[:2])


def pad_targets(frames):
    """The boxes of each of N frames -> targets (N, M, 5) float32 as in Batch; N > 0.

    M is a power of two from 16 on, so that compiled code meets a few sizes only.
    """
    M = 16
    while M < max(map(len, frames)):
        M *= 2
    targets = np.zeros((len(frames), M, 5), np.float32)
    for target, boxes in zip(targets, frames):
        target[:len(boxes)] = structured_to_unstructured(boxes[["class_id", "x", "y", "w", "h"]])
    targets[..., 1:3] += targets[..., 3:] / 2
    return torch.from_numpy(targets)


class TrainData:
    """Item step * gradient_accumulation_steps + a is micro-batch a of that step.

    It is a pure function of (seed, index): any worker may make it, at any time.
    sampling: "stream", "random" or "mixed" (of a micro-batch's slots mixed_stream : mixed_random,
    at least one each). Slots of a kind are numbered over processes, then micro-batches, then the
    batch: two processes of batch 2, or one that accumulates 2 micro-batches of 2, play what one of
    batch 4 plays. A pass of a slot plays every chunk once, in steps_per_epoch steps (of streams,
    where there are any).
    pin_memory: for copies to a GPU. ValueError: nothing to play. train.check says what else must
    hold.
    """

    def __init__(
        self,
        sequences,
        *,
        seed,
        sampling,
        sequence_length,
        batch_size,
        gradient_accumulation_steps=1,
        rank=0,
        world_size=1,
        mixed_stream=1.0,
        mixed_random=1.0,
        augmentation=Augmentation(),
        pin_memory=False,
    ):
        self.sequences = sequences
        self.T = sequence_length
        self.augmentation = augmentation
        self.pin_memory = pin_memory

        # the slots of a micro-batch: streams, then random windows, each numbered among its kind
        streams = batch_size if sampling == "stream" else 0
        if sampling == "mixed":
            share = mixed_stream / (mixed_stream + mixed_random)
            streams = min(max(round(batch_size * share), 1), batch_size - 1)
        self.slots = []
        for random, count in ((False, streams), (True, batch_size - streams)):
            runs = Runs(sequences, self.T, seed, random)
            if count and not runs.length:
                raise ValueError(f"{sampling=}: no labelled frame has sequence_length up to it")
            self.slots += [(runs, number, count) for number in range(count)]
        self.steps_per_epoch = self.slots[0][0].length

        # the micro-batches of a step, over all processes
        self.accumulation = gradient_accumulation_steps
        self.first_group = rank * gradient_accumulation_steps
        self.groups = world_size * gradient_accumulation_steps

    def change_events(self, events, seed, start):
        """Change the frames of a slot in place. Nothing by default: the place for event dropout,
        a polarity flip, noise, and what else is no flip or zoom; edit or override it.

        events (n, 20, H, W) uint8, from frame `start` of a sequence on, before flip and zoom.
        np.random.default_rng(seed) draws the same in all chunks of a run, default_rng((*seed,
        start)) something else in each.
        """

    def __getitem__(self, index):
        step, a = divmod(index, self.accumulation)
        hw = self.sequences[0].hw
        # numpy's memory is used again, torch's is paged in from scratch: half the frames/s
        events = np.empty((self.T, len(self.slots), CHANNELS, *hw), np.uint8)
        is_first = []
        rows = []
        cols = []
        labels = {}  # boxes of labelled frames, by (t, b)
        for b, (runs, number, count) in enumerate(self.slots):
            slot = (self.first_group + a) * count + number
            (which, run, start, end), key = runs.place(slot, self.groups * count, step)
            sequence = self.sequences[which]
            is_first.append(run == start)

            # events
            shown = events[:, b]
            sequence.read(start, end, shown)
            self.change_events(shown[:end - start], (*key, 1), start)  # not the view's seed
            shown[end - start:] = 0

            # flip and zoom, constant along a run
            first, last = np.searchsorted(sequence.label_frames, (start, end))
            boxes = sequence.boxes[first:last]
            view = draw_view(
                np.random.default_rng(key), hw, boxes[-1], self.augmentation, runs.random
            )
            rows.append(index_map(hw[0], view.y, view.zoom, False))
            cols.append(index_map(hw[1], view.x, view.zoom, view.flip))

            # boxes
            for frame, seen in zip(sequence.label_frames[first:last], boxes):
                seen = move_boxes(seen, hw, view)
                if len(seen):
                    labels[frame - start, b] = seen

        has_boxes = bool(labels)
        if not has_boxes:
            labels[0, 0] = seen  # a filler, empty as all are
        places = sorted(labels)
        frames = torch.tensor([t * len(self.slots) + b for t, b in places])
        targets = pad_targets([labels[place] for place in places])
        batch = Batch(torch.from_numpy(events), torch.stack(rows), torch.stack(cols),
                      torch.tensor(is_first), frames, targets, torch.tensor(has_boxes))
        if self.pin_memory:
            batch = batch._make(x.pin_memory() for x in batch)
        return batch


def make_loader(item, keys, num_workers):
    """Iterator over item(key) for each of `keys`, in order.

    `num_workers` threads work ahead, on 2 * num_workers items at most; 0: a thread works on an item
    when it is asked for.
    Threads, for what takes time (reading, decompressing, copying) lets go of Python's lock, and no
    batch is copied from one process to another: 4.6 MB a frame of 20x360x640 take longer than
    decoding it (2 cores, 2026-11).
    """
    ahead = []
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for key in keys:
            ahead.append(pool.submit(item, key))
            if len(ahead) > 2 * num_workers:
                yield ahead.pop(0).result()
        for last in ahead:
            yield last.result()


def to_device(loader, device):
    """The batches of `loader` on `device`, the current one; the next is always fetched already.

    A GPU copies it, from pinned memory, while it works on the one before.
    """
    backend = torch.get_device_module(device)  # a CPU's streams do nothing
    copies = backend.Stream()
    ahead = []
    for batch in loader:
        copies.wait_stream(backend.current_stream())  # it may overwrite a batch that was in use
        with backend.stream(copies):
            ahead.append(batch._make(x.to(device, non_blocking=True) for x in batch))
        if len(ahead) > 1:
            yield ahead.pop(0)
        backend.current_stream().wait_stream(copies)  # the next batch is whole
    yield from ahead


# --------------------------------------------------------------------------------- inspection


defaults = {
    "data_dir": "datasets/toy",  # also the first word of the command line
    "split": ("train", "val"),  # of train, val, test
    "class_names": (),  # by class id, for a set without dataset.json
    "picture": "out/box_sizes.png",  # histogram of box sizes; empty: none
}


def check_events(sequence):
    """Decode every frame. ValueError: one is damaged, or most are empty in spite of boxes."""
    filled = [sequence.read(k, k + 1).any() for k in range(sequence.length)]
    if sequence.boxes and np.mean(filled) < 0.1:
        raise ValueError(f"{sequence.path}: labelled, but hardly any window holds events; "
                         "do events and labels have the same clock?")


def main(argv):
    """Count what a data set holds, draw its box sizes; ValueError if training would fail."""
    if argv and not argv[0].startswith("--"):
        argv = ["--data_dir", *argv]
    config = configure(defaults, argv)
    any_id = range(2**16)  # where nothing names the classes
    names = load_classes(config["data_dir"], config["class_names"] or any_id, 0)
    if len(names) == len(any_id):
        print("WARNING: no dataset.json and no class_names; train.py needs --class_names, by id")
    findings = []
    sides = {}
    sizes = {}  # of frames (H, W), by split
    for split in config["split"]:
        try:
            sequences = open_split(config["data_dir"], split, len(names))
        except ValueError as error:
            findings.append(error)
            continue
        if split != "test":  # evaluated alone, it may have frames of its own size
            sizes[split] = sequences[0].hw
        boxes = []
        for sequence in tqdm(sequences, split, unit="sequence"):
            boxes += sequence.boxes
            try:
                check_events(sequence)
            except ValueError as error:
                findings.append(error)
        print(f"{split}: {len(sequences)} sequences, {len(boxes)} labelled frames")
        boxes = np.concatenate(boxes)
        sides[split] = np.sqrt(boxes["w"] * boxes["h"])
        for k in np.unique(boxes["class_id"]):
            chosen = sides[split][boxes["class_id"] == k]
            print(f"{len(chosen):8} boxes of {names[k]}, median side {np.median(chosen):.0f} px")

    if len(set(sizes.values())) > 1:
        findings.append(f"the splits' frames differ in size: {sizes}")
    for finding in findings:
        print(f"FINDING: {finding}")
    if findings:
        raise ValueError(f"training would fail, findings: {len(findings)}")
    if config["picture"]:
        try:
            draw_box_sizes(config["picture"], sides)
        except ValueError as error:
            print(f"WARNING: no picture of box sizes: {error}")


if __name__ == "__main__":
    command_line(main)

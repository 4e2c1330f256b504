"""Prepared sequences (RVT's layout on disk) -> micro-batches for training, planned as a function of (seed, step).

In: DATA/{train,val,test}/SEQUENCE as prepare.py or RVT's preprocessing writes them. Out: Sequence, Batch.
Run as a script it inspects and validates a data set with the code that training reads it with; exit status 1: training
would fail on it.

    python data.py datasets/toy --split=train
"""

import functools
import itertools
import json
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import hdf5plugin  # its import registers the Blosc filter with HDF5
import numpy as np
import torch
from numcodecs import blosc as blosc1
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

from configurator import command_line, configure
from formats import BOX_DTYPE, CHANNELS, FILES, REPRESENTATION, reading, require
from pictures import draw_box_sizes

data_dir = "datasets/toy"  # a prepared data set; the first word of the command line may name it instead
split = ""  # train, val or test; empty: all three
class_names = ()  # names by class id, for data sets without a dataset.json
picture = "out/box_sizes.png"  # histogram of box sizes; empty: none
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}


# One micro-batch; T time steps, B slots, N frames with labels.
#   events (T, B, 20, H, W) uint8 as stored, zeros where a run has ended; rows (B, H), cols (B, W) int64, for augment
#   is_first (B,) bool: a run starts, its state is reset before this chunk; frames (T, B) bool: the N, at least one
#   targets (N, M, 5) float32, in (t, b) order: class, cx, cy, w, h in augmented pixels; rows of zeros pad
#   has_boxes bool; False: the one frame of `frames` is a filler without boxes, the loss weighs 0
Batch = namedtuple("Batch", "events rows cols is_first frames targets has_boxes")

# Augmentation of a run: flip left to right, then zoom. zoom > 1 shows the window with its top-left corner at (x, y) and
# 1 / zoom of the frame's sides as the whole frame; zoom < 1 the whole frame in a window of `zoom` of its sides.
View = namedtuple("View", "flip zoom x y", defaults=(False, 1.0, 0, 0))


# ---------------------------------------------------------------------------------------- prepared sequences


def read_ascending(path, end, count=None, key=()):
    """Integers (n,) int64 of a .npy, or of `key` in a .npz; ValueError unless they ascend in range(end), n = count."""
    with reading(path):
        array = np.load(path, allow_pickle=False)[key].astype(np.int64, casting="same_kind")
        require(array.ndim == 1 and count in (None, len(array)), f"{key or ''} {array.shape}, not ({count or 'n'},)")
        require((array >= 0).all() and (np.diff(array, append=end) > 0).all(), f"{key or ''} unsorted or above {end}")
        return array


@functools.lru_cache(maxsize=64)  # bounded: Gen1 has more sequences than a process may hold files open
def open_events(path, version):
    """(dataset 'data', whether it is Blosc frame by frame) for each version of a file; ValueError."""
    with reading(path):
        data = h5py.File(path, "r")["data"]
        require(data.dtype == np.uint8 and data.ndim == 4 and data.shape[1] == CHANNELS and 0 not in data.shape,
              f"data is {data.dtype} {data.shape}, expected uint8 (N, {CHANNELS}, H, W) with N > 0")
        return data, data.chunks == (1, *data.shape[1:]) and data.filter_ids == (hdf5plugin.BLOSC_ID,)


def move_boxes(boxes, hw, view):
    """Boxes clipped to their frame and seen through the View, clipped again, and a mask: which keep an area.

    boxes (n,) BOX_DTYPE in frames of hw (H, W) pixels -> boxes (n,), mask (n,). As in RVT, right and bottom edges end
    at the last pixel, W - 1 and H - 1; View(zoom=0.5) is what it does for half-resolution sets, bit for bit.
    """
    boxes, zoom = boxes.copy(), view.zoom
    boxes["x"] = hw[1] - 1 - boxes["x"] - boxes["w"] if view.flip else boxes["x"]
    for start, extent, size, corner in (("x", "w", hw[1], view.x), ("y", "h", hw[0], view.y)):
        first, last = (corner, min(corner + size / zoom, size - 1) - 1) if zoom > 1 else (0, size - 1)
        low, high = (np.clip(edge, first, last) - first for edge in (boxes[start], boxes[start] + boxes[extent]))
        if zoom != 1:
            low, high = low * zoom, np.minimum((low + (high - low)) * zoom, size * min(zoom, 1) - 1)
        boxes[start], boxes[extent] = low + (corner - first), high - low
    return boxes, (boxes["w"] > 0) & (boxes["h"] > 0)


class Sequence:
    """One prepared sequence: labels in memory, event frames read on demand; it pickles, for it holds no open file.

    path, name: its folder. hw (H, W): the network's input. length N: frames. timestamps_us (N,) int64: ends of windows.
    label_frames (L,) int64 ascending: frames that carry boxes; boxes: L arrays of BOX_DTYPE in pixels of the input.
    dropped: boxes that keep no area. resolution as in open_split; num_classes 0: ids are not checked; decode: every
    frame, not the last alone. ValueError names the file that is missing, damaged or does not fit the others.
    """

    def __init__(self, path, resolution="auto", num_classes=0, decode=False):
        self.path, self.name, folder = Path(path), Path(path).name, Path(path) / REPRESENTATION
        kind = next((k for k in FILES if resolution in ("auto", k) and (folder / FILES[k]).is_file()), None)
        require(kind, f"{path}: no events for {resolution=}; prepare.py prepares them")
        self.file, self.version = str(folder / FILES[kind]), (folder / FILES[kind]).stat().st_mtime_ns
        shape = open_events(self.file, self.version)[0].shape
        self.length, self.hw, scale = shape[0], shape[2:], 1 + (kind == "half")
        one = itertools.repeat(np.empty((CHANNELS, *self.hw), np.uint8))  # frame after frame decodes into it
        self.read(0 if decode else self.length - 1, self.length, one)
        self.timestamps_us = read_ascending(folder / "timestamps_us.npy", 2**62, self.length)
        frames = read_ascending(folder / "objframe_idx_2_repr_idx.npy", self.length)
        with reading(path := self.path / "labels_v2/labels.npz"), np.errstate(all="ignore"):  # overflows: not finite
            labels = np.load(path, allow_pickle=False)["labels"]
            raw = np.ones(len(labels), BOX_DTYPE)
            for name in set(BOX_DTYPE.names) - {"track_id", "class_confidence"}.difference(labels.dtype.names):
                raw[name] = labels[name]  # older sets lack these two
            require(np.isfinite([raw[n] for n in "xywh"]).all() and (np.diff(raw["t"]) >= 0).all(), "inf or unsorted")
            require(raw["class_id"].max(initial=0) < (num_classes or 2**16), f"class ids from {num_classes}: name all")
        first = read_ascending(path, len(raw), len(frames), "objframe_idx_2_label_idx")
        frame_of = np.repeat(frames, np.diff(first, append=len(raw)))
        # boxes before the first labelled frame belong to none
        boxes, left = move_boxes(raw[len(raw) - len(frame_of):], [scale * n for n in self.hw], View(zoom=1 / scale))
        self.label_frames, starts = np.unique(frame_of[left], return_index=True)
        self.boxes, self.dropped = np.split(boxes[left], starts)[1:], int((~left).sum())

    def read(self, start, stop, out=None):
        """Event frames start to stop, uint8 (stop - start, 20, H, W), into `out` if given; ValueError: file, frame."""
        data, blosc = open_events(self.file, self.version)
        out = np.empty((stop - start, CHANNELS, *self.hw), np.uint8) if out is None else out
        for frame, target in zip(range(start, stop), out):  # HDF5 takes 60 times longer for all at once
            with reading(f"{self.file}: frame {frame} does not decode"):
                mask, chunk = data.id.read_direct_chunk((frame, 0, 0, 0)) if blosc else (1, None)
                if mask:  # stored as it is, or not frame by frame
                    data.read_direct(target, np.s_[frame])
                    continue
                # Blosc trusts the sizes in a chunk's header (README_CHUNK_FORMAT.rst of c-blosc 1)
                require([*np.frombuffer(chunk, "<u4", 4)[1::2]] == [target.nbytes, len(chunk)], "sizes are damaged")
                blosc1.decompress(chunk, target)
        return out


def open_split(data_dir, split, num_classes=0, resolution="auto", findings=None, decode=False):
    """Sequences of DATA/split by name, each checked and its last frame decoded, or all of them with `decode`.

    resolution: "auto" takes the half-resolution file where there is one, "half" and "full" insist. ValueError: split
    missing or empty, a sequence damaged, sizes that differ, a class id >= num_classes (0: unchecked); given a list of
    `findings`, these lines go there, and the sequences that are fine come back.
    """
    folder, sequences = Path(data_dir) / split, []
    for path in tqdm(sorted(filter(Path.is_dir, folder.glob("[!.]*"))) or [folder], split, leave=False, disable=None):
        try:
            sequences.append(Sequence(path, resolution, num_classes, decode))
            require(sequences[-1].hw == sequences[0].hw, f"{path}: frames of {sequences[-1].hw}, not {sequences[0].hw}")
        except ValueError as error:
            if findings is None:
                raise ValueError(f"{error}; python data.py {data_dir} lists what to prepare anew") from error
            findings.append(str(error))
    return sequences


def load_classes(data_dir, class_names=(), num_classes=0):
    """Names of the classes: those in DATA/dataset.json, else class_names, else "0", "1", ... up to num_classes."""
    path, names = Path(data_dir) / "dataset.json", class_names or map(str, range(num_classes))
    with reading(path):
        names = tuple(name + "" for name in (json.loads(path.read_bytes())["classes"] if path.is_file() else names))
        require(names and num_classes in (0, len(names)), f"{len(names)} class_names, {num_classes=}; wrong data_dir?")
    return names


# -------------------------------------------------------------------------------------------------- augmentation


def draw_view(rng, hw, boxes, flip, zoom, zoom_in_share, zoom_in_max, zoom_out_max):
    """A random View, distributed as RVT's; one of `boxes`, those of the last labelled frame, stays in sight.

    Source: RVT's augmentation. Ours: any of the boxes may be the one; RVT never draws the last.
    """
    flipped, zoomed, inward = (rng.random(3) < (flip, zoom, zoom_in_share)).tolist()
    factor = rng.uniform(1, zoom_in_max if inward else zoom_out_max) if zoomed else 1.0
    # not rng.integers(n): it takes more or fewer bits as n is, and the chunks of a run have different numbers of boxes
    _, left, top, width, height, *_ = boxes[int(rng.random() * len(boxes))].tolist()
    left, corner = hw[1] - 1 - left - width if flipped else left, []
    for size, low, length in ((hw[1], left, width), (hw[0], top, height)):
        part, reach = int(size / factor), max(int(size / factor), length)  # the window; also, what holds the box
        first, last = (max(low + length - reach, 0), min(low + reach, size - 1) - part) if inward else (0, size - part)
        corner.append(int(rng.uniform(first, max(first, last))))
    return View(flipped, factor if inward else 1 / factor, *corner)


def index_map(size, corner, zoom, flip):
    """Positions (size,) int64 in the input that the output shows along one axis, -1 for zero; corner: the window's.

    Nearest-exact as torch has it: torch itself resizes the positions, so its rounding is matched bit for bit.
    """
    shown = torch.arange(size - 1, -1, -1) if flip else torch.arange(size)
    window = int(size * min(zoom, 1 / zoom))
    part = shown[corner:corner + window] if zoom > 1 else shown
    part = interpolate(part[None, None].float(), size if zoom > 1 else window, mode="nearest-exact")[0, 0].long()
    return pad(part, (corner, size - corner - window), value=-1) if zoom < 1 else part


def augment(events, rows, cols):
    """out[t, b, c, y, x] = events[t, b, c, rows[b, y], cols[b, x]], and 0 where an index is -1.

    events (T, B, C, H, W), rows (B, H), cols (B, W) int64 -> as events; all on one device. One gather takes 6.5 ms a
    frame of 20x360x640 on one core (AVX-512 Xeon, 2026-11), selecting rows, then columns 30, RVT's interpolation 7.5.
    """
    pixels = (rows.clamp(min=0)[:, :, None] * events.shape[4] + cols.clamp(min=0)[:, None]).flatten(1)  # (B, H * W)
    moved = events.flatten(3).gather(3, pixels[:, None].expand(*events.shape[:3], -1)).view_as(events)
    return moved * ((rows >= 0)[:, :, None] & (cols >= 0)[:, None])[:, None]


# ----------------------------------------------------------------------------------------------- training batches


class Runs:
    """Stretches of sequences, played in chunks of T frames, in an order that (seed, slot, pass) draws.

    random=False: from T - 1 frames before a labelled frame to the last labelled one before a label gap longer than T,
    so that each chunk holds a labelled frame. random=True: the T frames up to each labelled frame, where there are T.
    chunks: list of (index of the sequence, first frame of the run, first frame, end); run_of: each chunk's run.
    """

    def __init__(self, sequences, T, seed, random):
        self.key, self.chunks, gap = (seed, int(random)), [], 0 if random else T
        for index, frames in enumerate(sequence.label_frames for sequence in sequences):
            frames = frames[frames >= (T - 1 if random else 0)]
            first, last = frames[np.diff(frames, prepend=-T - 1) > gap], frames[np.diff(frames, append=2**40) > gap]
            for run, end in zip((first - T + 1).clip(min=0).tolist(), (last + 1).tolist()):
                self.chunks += [(index, run, start, min(start + T, end)) for start in range(run, end, T)]
        self.run_of = np.cumsum([run == start for _, run, start, _ in self.chunks], dtype=np.int32) - 1

    @functools.lru_cache(maxsize=256)  # more than a process has slots, for each is drawn once a pass
    def order(self, slot, p):
        """Indices of the chunks as `slot` plays them in pass p: the runs shuffled, each from its start to its end."""
        rank = np.random.default_rng((*self.key, 0, slot, p)).permutation(self.run_of[-1] + 1)
        return np.argsort(rank[self.run_of], kind="stable").astype(np.int32)

    def place(self, slot, slots, step):
        """(chunk, key): what `slot` of `slots` plays at `step`; the integers `key` name this play of the run."""
        p, q = divmod(step + slot * len(self.chunks) // slots, len(self.chunks))
        chunk = self.chunks[self.order(slot, p)[q]]
        return chunk, (*self.key, 1, slot, p, *chunk[:2])


class TrainData:
    """Item step * gradient_accumulation_steps + a is micro-batch a of that step, a pure function of (seed, index).

    sampling: "stream", "random" or "mixed" (of a micro-batch's slots mixed_stream : mixed_random, at least one each).
    Slots of a kind are numbered over processes, then micro-batches, then the batch: two processes of batch 2, or one
    that accumulates 2 micro-batches of 2, play what one of batch 4 plays. In steps_per_epoch steps a slot plays every
    chunk once. flip, zoom_stream, zoom_random, zoom_in_share: probabilities; streams only zoom out, as in RVT.
    pin_memory: for copies to a GPU.
    ValueError: nothing to play. train.check says what else must hold.
    """

    def __init__(self, sequences, *, seed, sampling, sequence_length, batch_size, gradient_accumulation_steps=1, rank=0,
                 world_size=1, mixed_stream=1, mixed_random=1, flip=0.5, zoom_stream=0.5, zoom_random=0.8,
                 zoom_in_share=0.8, zoom_in_max=1.5, zoom_out_max=1.2, pin_memory=False):
        mixed, most = sampling == "mixed", (zoom_in_max, zoom_out_max)
        share = mixed_stream / (mixed_stream + mixed_random) if mixed else sampling == "stream"
        streams = min(max(round(batch_size * share), int(mixed)), batch_size - mixed)  # mixed: one of each at least
        # of a micro-batch: slots that stream, slots that play random windows
        self.slots, self.pin_memory = (streams, batch_size - streams), pin_memory
        self.sequences, self.T, self.accumulation = sequences, sequence_length, gradient_accumulation_steps
        self.group, self.groups = rank * self.accumulation, world_size * self.accumulation
        self.augmentations = (flip, zoom_stream, 0.0, *most), (flip, zoom_random, zoom_in_share, *most)
        self.runs = [Runs(sequences, self.T, seed, random) for random in (False, True)]
        require(self.runs[self.slots[1] > 0].chunks, f"{sequences[0].path.parent}: no labelled frame for {sampling=}")
        self.steps_per_epoch = len(self.runs[not streams].chunks)

    def __getitem__(self, index):
        (H, W), (step, a), B = self.sequences[0].hw, divmod(index, self.accumulation), sum(self.slots)
        # numpy's memory is used again, torch's is paged in anew: half the frames/s
        events = torch.from_numpy(np.empty((self.T, B, CHANNELS, H, W), np.uint8))
        is_first, maps, found = torch.empty(B, dtype=torch.bool), [], {}
        for b in range(B):
            kind, i, n = (0, b, self.slots[0]) if b < self.slots[0] else (1, b - self.slots[0], self.slots[1])
            (which, run, start, end), key = self.runs[kind].place((self.group + a) * n + i, self.groups * n, step)
            sequence, is_first[b] = self.sequences[which], start == run
            sequence.read(start, end, events[:, b].numpy())
            events[end - start:, b] = 0
            first, last = np.searchsorted(sequence.label_frames, (start, end))
            view = draw_view(np.random.default_rng(key), (H, W), sequence.boxes[last - 1], *self.augmentations[kind])
            maps.append((index_map(H, view.y, view.zoom, False), index_map(W, view.x, view.zoom, view.flip)))
            for frame, boxes in zip(sequence.label_frames[first:last].tolist(), sequence.boxes[first:last]):
                boxes, left = move_boxes(boxes, (H, W), view)
                if left.any():
                    found[frame - start, b] = boxes[left]
        frames = torch.tensor([[(t, b) in (found or [(0, 0)]) for b in range(B)] for t in range(self.T)])
        targets = pad_targets([boxes for _, boxes in sorted(found.items())])
        events = events.pin_memory() if self.pin_memory else events
        return Batch(events, *map(torch.stack, zip(*maps)), is_first, frames, targets, bool(found))


def pad_targets(frames):
    """The boxes of each of N frames -> targets (N, M, 5) float32, as in Batch; no frames: one of zeros.

    M is a power of two from 16 on, so that compiled code meets a few sizes only.
    """
    targets = torch.zeros(max(len(frames), 1), 1 << (max([16, *map(len, frames)]) - 1).bit_length(), 5)
    for target, box in zip(targets.numpy(), frames):
        target[:len(box)].T[:] = box["class_id"], box["x"] + box["w"] / 2, box["y"] + box["h"] / 2, box["w"], box["h"]
    return targets


def make_loader(item, start=0, num_workers=0):
    """Endless iterator over item(start), item(start + 1), ..., in order; `num_workers` threads work ahead of it.

    0: a thread works on an item when it is asked for.

    Threads, for what takes time (reading, decompressing, copying) lets go of Python's lock, and no batch is copied from
    one process to another: 4.6 MB a frame of 20x360x640 take longer than decoding it (2 cores, 2026-11).
    """
    pool, ahead = ThreadPoolExecutor(max(num_workers, 1)), deque()
    try:
        for k in itertools.count(start):
            ahead.append(pool.submit(item, k))
            if len(ahead) > 2 * num_workers:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------- inspection


def size_thresholds(sequences):
    """(small, medium): terciles of the box areas of `sequences`, input pixels^2; ValueError if there are no boxes."""
    areas = [boxes["w"] * boxes["h"] for sequence in sequences for boxes in sequence.boxes]
    require(areas, "no boxes to take size thresholds from; set small_threshold and medium_threshold")
    return tuple(np.quantile(np.concatenate(areas), (1 / 3, 2 / 3)).tolist())


def main(argv):
    """Print what a data set holds and draw its box sizes; ValueError at the end if training would fail on it."""
    argv = [f"--data_dir={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("--") else argv
    config = configure(defaults, argv)
    root, findings, sides = Path(config["data_dir"]), [], {}
    names = load_classes(root, config["class_names"] or [""] * 2**16)  # of data sets that name none, each id is fine
    for part in [config["split"]] if config["split"] else ["train", "val", *["test"] * any(root.glob("test/[!.]*"))]:
        sequences = open_split(root, part, len(names), findings=findings, decode=True)
        labelled, frames = [boxes for s in sequences for boxes in s.boxes], sum(s.length for s in sequences)
        boxes, dropped = np.concatenate([np.zeros(0, BOX_DTYPE), *labelled]), sum(s.dropped for s in sequences)
        ids, sides[part] = boxes["class_id"], np.sqrt(boxes["w"] * boxes["h"])
        print(f"{root / part}: {len(sequences)} sequences of {sequences[0].hw if sequences else '-'}, {frames} frames, "
              f"{len(labelled)} ({len(labelled) / max(frames, 1):.1%}) with boxes, {len(boxes)} boxes, terciles "
              f"{size_thresholds(sequences) if labelled else ()}, {dropped} flat\n{'side, px':25}\t<16\t<32\t<96\tmore")
        for k in np.unique(ids):
            print(f"{k:4} {names[k]:20}", *np.histogram(sides[part][ids == k], (0, 16, 32, 96, np.inf))[0], sep="\t")
        findings += [f"{root / part}: no boxes, nothing to train on"] if part == "train" and not labelled else []
    if config["picture"] and any(map(len, sides.values())):
        draw_box_sizes(config["picture"], sides)
    print("".join(f"FINDING: {finding}\n" for finding in findings), end="")
    require(not findings, f"{root}: training would fail, findings: {len(findings)}")


if __name__ == "__main__":
    command_line(main)

"""Prepared sequences (RVT's layout on disk) -> micro-batches for training, by a plan that is a function of (seed, step).

In: DATA/{train,val,test}/SEQUENCE as prepare.py or RVT's preprocessing writes them. Out: Sequence objects and Batch tuples.
Run as a script it inspects and validates a data set with the code that training reads it with; exit status 1: training would fail.

    python data.py datasets/toy --split=train
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import hdf5plugin  # noqa: F401  its import registers the Blosc filter with HDF5
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from configurator import command_line, configure

data_dir = "datasets/toy"  # prepared data set; the first word of the command line may name it instead
split = ""  # train, val or test; empty: all three
resolution = "auto"  # auto: half where a half-resolution file is there; full; half
class_names = ()  # where the set has no dataset.json
num_classes = 0  # the same, without names; 0: whatever ids the labels hold
sequence_length = 5  # T, for the number of chunks that training would see
decode_all = False  # decode every frame, not the last of each sequence alone
picture = "out/box_sizes.png"  # histogram of box sizes; empty: none
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

REPRESENTATION = "stacked_histogram_dt=50_nbins=10"
CHANNELS = 20  # polarity * 10 + time bin
FILES = {"full": "event_representations.h5", "half": "event_representations_ds2_nearest.h5"}
BOX_DTYPE = np.dtype([("t", "<i8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"),
                      ("class_id", "<u4"), ("track_id", "<u4"), ("class_confidence", "<f4")])


# ---------------------------------------------------------------------------------------------------- prepared sequences


def read_arrays(path):
    """Arrays of a .npy file (under the key "") or of a .npz file, never unpickled; ValueError names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; prepare this sequence again")
    try:
        loaded = np.load(path, allow_pickle=False)
        return {"": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        raise ValueError(f"{path}: unreadable ({type(error).__name__}: {error}); prepare this sequence again") from error


def read_integers(path, key=""):
    """The array `key` of a file as int64 (n,); ValueError names the file if it is absent, of another type or shape."""
    array = read_arrays(path).get(key)
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        found = "absent" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(f"{path}: {key or 'array'} is {found}, expected integers (n,); prepare this sequence again")
    return array.astype(np.int64)


@functools.lru_cache(maxsize=64)  # bounded: Gen1 has more sequences than a process may have files open
def open_events(path, pid, mtime_ns):
    """(file, dataset 'data') of a prepared h5 file, one handle for each process and version of the file."""
    file = h5py.File(path, "r")
    return file, file["data"]


def fit_boxes(boxes, hw, half):
    """Boxes clipped to the frame, and halved if `half`, bit for bit as RVT does; those left without an area dropped.

    boxes (n,) BOX_DTYPE in pixels of the sensor, hw (H, W) of the network's input -> boxes (<= n,) in pixels of the
    input, indices (<= n,) of those that are left. The right and bottom edges end at W - 1 and H - 1.
    """
    boxes = boxes.copy()
    for start, extent, size in (("x", "w", hw[1]), ("y", "h", hw[0])):
        last = 2 * size - 1 if half else size - 1
        low = np.clip(boxes[start], 0, last)
        length = np.clip(boxes[start] + boxes[extent], 0, last) - low
        if half:
            high = np.minimum((low + length) * 0.5, size - 1)
            low = low * 0.5
            length = high - low
        boxes[start], boxes[extent] = low, length
    left = np.flatnonzero((boxes["w"] > 0) & (boxes["h"] > 0))
    return boxes[left], left


class Sequence:
    """One prepared sequence: labels in memory, event frames read on demand; it pickles, as it holds no open file.

    path, name: its folder. hw (H, W): the network's input. length N: frames. timestamps_us (N,) int64: ends of the windows.
    label_frames (L,) int64 ascending: frames that carry boxes; boxes: L arrays of BOX_DTYPE in pixels of the input.
    notes: lines on what loading repaired. resolution as in open_split; num_classes 0: ids are not checked.
    ValueError names the file for anything missing, damaged or inconsistent.
    """

    def __init__(self, path, resolution="auto", num_classes=0):
        self.path, self.notes = Path(path), []
        self.name = self.path.name
        folder = self.path / "event_representations_v2" / REPRESENTATION
        there = [kind for kind in ("half", "full") if (folder / FILES[kind]).is_file()]
        kind = there[0] if resolution == "auto" and there else resolution
        if not there:
            raise ValueError(f"{folder}: no {FILES['full']} nor {FILES['half']}; expected RVT's layout, see prepare.py")
        if kind not in there:
            raise ValueError(f"{folder}: no {FILES[kind]}, this is a {there[0]}-resolution set; use resolution={there[0]} "
                             f"or prepare it at {kind} resolution")
        self.file, self.half = str(folder / FILES[kind]), kind == "half"
        self.length, self.hw = self._check_events()
        times_path, index_path = folder / "timestamps_us.npy", folder / "objframe_idx_2_repr_idx.npy"
        self.timestamps_us = read_integers(times_path)
        if len(self.timestamps_us) != self.length:
            raise ValueError(f"{times_path}: {len(self.timestamps_us)} times for the {self.length} frames of {self.file}")
        if (np.diff(self.timestamps_us) <= 0).any():
            raise ValueError(f"{times_path}: times out of order; prepare this sequence again")
        frames = read_integers(index_path)
        if len(frames) and (frames[0] < 0 or frames[-1] >= self.length or (np.diff(frames) <= 0).any()):
            raise ValueError(f"{index_path}: indices must ascend within the {self.length} frames of {self.file}")
        self._load_boxes(frames, num_classes)

    def _check_events(self):
        """(N, (H, W)) of the h5 file: shape, type, every frame written, the last one decodes."""
        try:
            _, data = open_events(*self._version())
            shape, dtype, chunks = data.shape, data.dtype, data.chunks
            written = data.id.get_num_chunks() if chunks else 0
        except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, AttributeError, ...
            raise ValueError(f"{self.file}: not a readable HDF5 file with 'data' ({error}); prepare it again") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != CHANNELS or 0 in shape:
            raise ValueError(f"{self.file}: data is {dtype} {shape}, expected uint8 (N, {CHANNELS}, H, W), N > 0")
        expected = int(np.prod([-(-n // c) for n, c in zip(shape, chunks)], dtype=object)) if chunks else 0
        if written != expected:
            raise ValueError(f"{self.file}: {written} of {expected} chunks are written; prepare this sequence again")
        self.length, self.hw = shape[0], shape[2:]
        self.read(self.length - 1, self.length)
        return shape[0], shape[2:]

    def _version(self):
        return self.file, os.getpid(), os.stat(self.file).st_mtime_ns

    def _load_boxes(self, frames, num_classes):
        """Set label_frames and boxes from labels.npz; frames (F,): the frame of each entry of its index."""
        path = self.path / "labels_v2" / "labels.npz"
        labels, first = read_arrays(path).get("labels"), read_integers(path, "objframe_idx_2_label_idx")
        names = () if labels is None or labels.ndim != 1 else labels.dtype.names or ()
        kinds = {"t": "iu", "x": "iuf", "y": "iuf", "w": "iuf", "h": "iuf", "class_id": "iu"}
        bad = [name for name in kinds if name not in names or labels.dtype[name].kind not in kinds[name]]
        if bad:
            raise ValueError(f"{path}: labels lacks numeric fields {', '.join(bad)}; prepare this sequence again")
        if len(first) != len(frames) or (len(first) and (first[0] < 0 or first[-1] >= len(labels) or (np.diff(first) <= 0).any())):
            raise ValueError(f"{path}: objframe_idx_2_label_idx must ascend within {len(labels)} labels, one entry for each "
                             f"of {len(frames)} labelled frames")
        ids = labels["class_id"]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < (num_classes or 2**16):
            raise ValueError(f"{path}: class ids {ids.min()} to {ids.max()}, but there are {num_classes or 2**16} classes; "
                             f"give the right class_names or num_classes")
        boxes = np.zeros(len(labels), BOX_DTYPE)
        boxes["class_confidence"] = 1
        with np.errstate(over="ignore"):
            for name in set(names) & set(BOX_DTYPE.names):
                boxes[name] = labels[name]
        if not all(np.isfinite(boxes[name]).all() for name in "xywh"):
            raise ValueError(f"{path}: boxes hold NaN or infinite values; prepare this sequence again")
        boxes = boxes[first[0]:] if len(first) else boxes[:0]
        frame_of = np.repeat(frames, np.diff(np.append(first, len(labels))))
        fitted, left = fit_boxes(boxes, self.hw, self.half)
        if len(left) < len(boxes):
            self.notes.append(f"{path}: {len(boxes) - len(left)} of {len(boxes)} boxes are flat or out of the frame: dropped")
        self.label_frames, starts = np.unique(frame_of[left], return_index=True)
        self.boxes = np.split(fitted, starts[1:]) if len(fitted) else []

    def read(self, start, stop, out=None):
        """Event frames start to stop, uint8 (stop - start, 20, H, W), into `out` if given; ValueError names file and frame."""
        out = np.empty((stop - start, CHANNELS, *self.hw), np.uint8) if out is None else out
        frame = start
        try:
            _, data = open_events(*self._version())
            for frame in range(start, stop):  # a selection over several frames of a larger array is 60 times slower
                data.read_direct(out[frame - start], np.s_[frame])
        except Exception as error:
            raise ValueError(f"{self.file}: frame {frame} does not decode ({error}); prepare this sequence again") from error
        return out


def open_split(data_dir, split, num_classes=0, resolution="auto"):
    """Sequences of DATA/split, sorted by name, each checked and its last frame decoded.

    resolution: "auto" takes the half-resolution file where there is one, as RVT does for ds2 sets, "full" and "half" insist.
    ValueError: split missing or empty, a sequence damaged, sizes that differ, a class id >= num_classes (0: unchecked).
    """
    if resolution not in ("auto", *FILES):
        raise ValueError(f"resolution={resolution!r}: expected auto, full or half")
    paths = sequence_paths(data_dir, split)
    sequences = [Sequence(path, resolution, num_classes) for path in paths]
    for sequence in sequences:
        if sequence.hw != sequences[0].hw:
            raise ValueError(f"{sequence.file}: frames of {sequence.hw}, but {sequences[0].hw} in {sequences[0].file}; "
                             f"a set has one size, use resolution=full or half if it holds both")
    return sequences


def sequence_paths(data_dir, split):
    """Folders of DATA/split by name; hidden entries are skipped; ValueError if there is none."""
    folder = Path(data_dir) / split
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        raise ValueError(f"{folder}: no such folder; prepare the data first: python prepare.py SRC {data_dir}") from None
    if not paths:
        raise ValueError(f"{folder}: holds no sequence; prepare the data first: python prepare.py SRC {data_dir}")
    return paths


def load_classes(data_dir, class_names=(), num_classes=0):
    """Names of the classes: those of DATA/dataset.json, else class_names, else "0", "1", ... up to num_classes."""
    path = Path(data_dir) / "dataset.json"
    names = tuple(class_names) or tuple(str(i) for i in range(num_classes))
    if path.is_file():
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["classes"]
        except Exception as error:
            raise ValueError(f"{path}: not JSON with 'classes' ({error}); prepare the data set again") from error
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: 'classes' must be a list of names, not {names!r}")
    if not names:
        raise ValueError(f"{data_dir}: no dataset.json names the classes; give class_names=... or num_classes=...")
    if num_classes and len(names) != num_classes:
        raise ValueError(f"{data_dir}: num_classes={num_classes}, but {len(names)} names: {', '.join(names)}")
    return tuple(names)


# ---------------------------------------------------------------------------------------------------------- augmentation


class View(NamedTuple):
    """Augmentation of a run: flip left to right, then zoom in or out; (x, y) is the top-left corner of the zoom window.

    Zooming in enlarges a window of the frame to the whole frame, zooming out shrinks the frame into a window of zeros.
    """

    flip: bool = False
    zoom_in: float = 1.0
    zoom_out: float = 1.0
    x: int = 0
    y: int = 0


def draw_view(rng, hw, boxes, flip, zoom, zoom_in_share, zoom_in_max, zoom_out_max):
    """A random View, distributed as RVT's; boxes: those of the last labelled frame, zooming in holds one of them.

    Source: RVT's augmentation. Ours: any of the boxes may be the one that is held; RVT never draws the last.
    """
    flipped, zoomed, inward = rng.random() < flip, rng.random() < zoom, rng.random() < zoom_in_share
    factor = rng.uniform(1, zoom_in_max if inward else zoom_out_max)
    if not zoomed or factor == 1:
        return View(flipped)
    (H, W), (h, w) = hw, (int(n / factor) for n in hw)
    if not inward:
        return View(flipped, 1.0, factor, int(rng.uniform(0, W - w)), int(rng.uniform(0, H - h)))
    box, corner = boxes[rng.integers(len(boxes))], []
    left = W - 1 - box["x"] - box["w"] if flipped else box["x"]
    for low, length, window, size in ((float(left), float(box["w"]), w, W), (float(box["y"]), float(box["h"]), h, H)):
        reach = max(window, length)
        first = max(low + length - reach, 0.0)
        corner.append(int(rng.uniform(first, max(min(low + reach, size - 1) - window, first))))
    return View(flipped, factor, 1.0, *corner)


def index_map(size, start, view, flip):
    """Positions (size,) int64 of the input that the output shows along one axis, -1 for zero; start: the window's corner.

    "nearest-exact" is torch's: asking torch itself to resize the positions keeps its rounding, bit for bit.
    """
    def resize(ramp, length):
        return F.interpolate(ramp[None, None], size=length, mode="nearest-exact")[0, 0]

    positions = torch.arange(size, dtype=torch.float32)
    if view.zoom_in > 1:
        positions = resize(positions[start:start + int(size / view.zoom_in)], size)
    elif view.zoom_out > 1:
        window = resize(positions, int(size / view.zoom_out))
        positions = F.pad(window, (start, size - start - len(window)), value=-1.0)
    if flip:
        positions = torch.where(positions < 0, positions, size - 1 - positions)
    return positions.long()


def move_boxes(boxes, hw, view):
    """Boxes (n,) of BOX_DTYPE as the View shows them, in float32 and clipped as RVT does; those without an area dropped."""
    boxes = boxes.copy()
    if view.flip:
        boxes["x"] = hw[1] - 1 - boxes["x"] - boxes["w"]
    for start, extent, size, corner in (("x", "w", hw[1], view.x), ("y", "h", hw[0], view.y)):
        low, high = boxes[start], boxes[start] + boxes[extent]
        if view.zoom_in > 1:
            last = min(corner + size / view.zoom_in, size - 1) - 1  # RVT's window is not rounded here, unlike the frame's
            low, high = np.clip(low, corner, last), np.clip(high, corner, last)
            low, length = low - corner, high - low
            flat = length <= 0
            high = np.minimum((low + length) * view.zoom_in, size - 1)
            low = low * view.zoom_in
            boxes[start], boxes[extent] = low, np.where(flat, 0, high - low)
        elif view.zoom_out > 1:
            shrink = 1 / view.zoom_out
            high = np.minimum(high * shrink, shrink * size - 1)
            low = low * shrink
            boxes[start], boxes[extent] = low + corner, high - low
    return boxes[(boxes["w"] > 0) & (boxes["h"] > 0)]


def augment(events, rows, cols):
    """out[t, b, c, y, x] = events[t, b, c, rows[b, y], cols[b, x]], and 0 where an index is -1; on the device of events.

    events (T, B, C, H, W), rows (B, H) and cols (B, W) int64 -> as events; `events` itself if the maps change nothing.
    On a CPU whole rows are copied, then columns by numpy's take: 2.9 ms a frame of 20x360x640 on one core, torch's
    gather takes 7.6, its index_select 36, F.interpolate 5.1 without the copy into place (AVX-512 Xeon, 2026-11).
    """
    T, B, C, H, W = events.shape
    if rows.device.type == "cpu":  # on a GPU the question would wait for it
        plain = (rows == torch.arange(H)).all(1) & (cols == torch.arange(W)).all(1)
        if plain.all():
            return events
    if events.device.type != "cpu":
        rows, cols = rows.to(events.device), cols.to(events.device)
        pixels = (rows.clamp(min=0)[:, :, None] * W + cols.clamp(min=0)[:, None]).flatten(1)  # (B, H * W)
        shown = ((rows >= 0)[:, :, None] & (cols >= 0)[:, None])[:, None]  # (B, 1, H, W)
        return events.flatten(3).gather(3, pixels[None, :, None].expand(T, B, C, -1)).view_as(events) * shown
    out = torch.empty_like(events, memory_format=torch.contiguous_format)
    for b, (row, col) in enumerate(zip(rows.numpy(), cols.numpy())):
        for frame, target in zip(events[:, b].numpy(), out[:, b].numpy()):
            frame.take(row, axis=1, mode="clip").take(col, axis=2, mode="clip", out=target)
            target[:, row < 0] = 0
            target[:, :, col < 0] = 0
    return out


# ------------------------------------------------------------------------------------------------------- training batches


class Batch(NamedTuple):
    """One micro-batch; T time steps, B slots, N frames with labels, in (t, b) order."""

    events: torch.Tensor  # uint8 (T, B, 20, H, W) as stored; zeros where a run has ended
    rows: torch.Tensor  # int64 (B, H), augment's maps
    cols: torch.Tensor  # int64 (B, W)
    is_first: torch.Tensor  # bool (B,): a run starts, its state is reset before this chunk
    frames: torch.Tensor  # bool (T, B): the N frames with labels, at least one
    targets: torch.Tensor  # float32 (N, M, 5): class, cx, cy, w, h in augmented pixels; rows of zeros pad
    has_boxes: bool  # False: the one frame of `frames` is a filler without boxes, the loss weighs 0


class Runs:
    """Stretches of sequences, played in chunks of T frames, in an order that (seed, slot, pass) draws.

    random=False: from T - 1 frames before a labelled frame to the last labelled one before a label gap longer than T,
    so that each chunk holds a labelled frame. random=True: the T frames up to each labelled frame, where there are as many.
    items (n, 3) int64: index of the sequence, first frame, end; chunks (n,): how many; total: their sum.
    """

    def __init__(self, sequences, T, seed, random):
        self.key, self.orders, items = (seed, int(random)), {}, [np.zeros((0, 3), np.int64)]
        for index, frames in enumerate(sequence.label_frames for sequence in sequences):
            cut = np.arange(len(frames) - 1) if random else np.flatnonzero(np.diff(frames) > T)
            if len(frames):
                starts, stops = frames[np.append(0, cut + 1)] - T + 1, frames[np.append(cut, -1)] + 1
                items.append(np.stack([np.full_like(starts, index), starts, stops], 1)[(starts >= 0) | (not random)])
        self.items = np.concatenate(items)
        self.items[:, 1] = self.items[:, 1].clip(min=0)
        self.chunks = -((self.items[:, 1] - self.items[:, 2]) // T)
        self.total = int(self.chunks.sum())

    def place(self, slot, slots, step):
        """(run, chunk, key) that `slot` of `slots` plays at `step`; the integers `key` name this play of the run."""
        p, q = divmod(step + slot * self.total // slots, self.total)
        if self.orders.get(slot, (None,))[0] != p:
            order = np.random.default_rng((*self.key, 0, slot, p)).permutation(len(self.items)).astype(np.int32)
            self.orders[slot] = p, order, np.cumsum(self.chunks[order], dtype=np.int32)
        _, order, ends = self.orders[slot]
        position = int(np.searchsorted(ends, q, side="right"))
        run = int(order[position])
        return run, q - int(ends[position] - self.chunks[run]), (*self.key, 1, slot, p, run)


class TrainData(Dataset):
    """Item step * gradient_accumulation_steps + a is micro-batch a of that step, a pure function of (seed, index).

    sampling: "stream", "random" or "mixed" (mixed_stream : mixed_random slots of each micro-batch, one of each at least).
    Slots of a kind are numbered over processes, then micro-batches, then the batch: two processes of batch 2, or one that
    accumulates 2 micro-batches of 2, play what one of batch 4 plays. steps_per_epoch: steps in which a slot plays each chunk.
    flip, zoom_stream, zoom_random, zoom_in_share: probabilities; zooming in is for random windows alone. ValueError: an
    impossible combination, or nothing to play.
    """

    def __init__(self, sequences, *, seed, sampling, sequence_length, batch_size, gradient_accumulation_steps=1,
                 rank=0, world_size=1, mixed_stream=1, mixed_random=1, flip=0.5, zoom_stream=0.5, zoom_random=0.8,
                 zoom_in_share=0.8, zoom_in_max=1.5, zoom_out_max=1.2):
        share = {"stream": 1.0, "random": 0.0, "mixed": mixed_stream / max(mixed_stream + mixed_random, 1e-9)}.get(sampling)
        if share is None:
            raise ValueError(f"sampling={sampling!r}: expected stream, random or mixed")
        if min(sequence_length, batch_size, gradient_accumulation_steps, world_size) < 1 or seed < 0:
            raise ValueError("sequence_length, batch_size and gradient_accumulation_steps must be 1 or more, seed 0 or more")
        if sampling == "mixed" and (batch_size < 2 or min(mixed_stream, mixed_random) <= 0):
            raise ValueError(f"sampling='mixed' needs batch_size >= 2 and both shares above 0, not batch_size={batch_size}, "
                             f"{mixed_stream} : {mixed_random}; use sampling='stream' or 'random'")
        if not all(0 <= p <= 1 for p in (flip, zoom_stream, zoom_random, zoom_in_share)):
            raise ValueError("flip, zoom_stream, zoom_random and zoom_in_share are probabilities from 0 to 1")
        if not all(1 <= most <= 10 for most in (zoom_in_max, zoom_out_max)):
            raise ValueError("zoom_in_max and zoom_out_max are factors from 1 to 10")
        self.sequences, self.T, self.B, self.accumulation = sequences, sequence_length, batch_size, gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        mixed = min(max(round(batch_size * share), 1), batch_size - 1)
        streams = mixed if sampling == "mixed" else round(batch_size * share)
        self.slots = streams, batch_size - streams  # of a micro-batch: that stream, that play random windows
        self.flip, self.zooms = flip, ((zoom_stream, 0.0, zoom_in_max, zoom_out_max),
                                       (zoom_random, zoom_in_share, zoom_in_max, zoom_out_max))
        self.runs = tuple(Runs(sequences, self.T, seed, random) for random in (False, True))
        for runs, slots, what in zip(self.runs, self.slots, ("labelled frame", f"labelled frame with {self.T - 1} before it")):
            if slots and not runs.total:
                where = sequences[0].path.parent if sequences else "the split"
                raise ValueError(f"{where}: no {what} in {len(sequences)} sequences, nothing to train on; check the labels")
        self.steps_per_epoch = self.runs[0 if streams else 1].total

    def __getitem__(self, index):
        (H, W), (step, a) = self.sequences[0].hw, divmod(index, self.accumulation)
        events = empty_events(self.T, self.B, H, W)
        rows, cols = torch.empty(self.B, H, dtype=torch.long), torch.empty(self.B, W, dtype=torch.long)
        is_first, found = torch.zeros(self.B, dtype=torch.bool), {}
        for b in range(self.B):
            random = int(b >= self.slots[0])
            group, groups = self.rank * self.accumulation + a, self.world_size * self.accumulation
            number = group * self.slots[random] + b - random * self.slots[0]
            run, chunk, key = self.runs[random].place(number, groups * self.slots[random], step)
            which, start, stop = self.runs[random].items[run].tolist()
            start, sequence = start + chunk * self.T, self.sequences[which]
            stop, is_first[b] = min(start + self.T, stop), chunk == 0
            sequence.read(start, stop, events[:, b].numpy())
            events[stop - start:, b] = 0
            first, last = np.searchsorted(sequence.label_frames, (start, stop))
            view = draw_view(np.random.default_rng(key), (H, W), sequence.boxes[last - 1], self.flip, *self.zooms[random])
            rows[b], cols[b] = index_map(H, view.y, view, False), index_map(W, view.x, view, view.flip)
            for frame, boxes in zip(sequence.label_frames[first:last], sequence.boxes[first:last]):
                boxes = move_boxes(boxes, (H, W), view)
                if len(boxes):
                    found[int(frame) - start, b] = boxes
        frames = torch.zeros(self.T, self.B, dtype=torch.bool)
        for place in found or [(0, 0)]:
            frames[place] = True
        return Batch(events, rows, cols, is_first, frames, pad_targets(found), bool(found))


def pad_targets(found):
    """{(t, b): boxes (n,)} -> (N, M, 5) float32 class, cx, cy, w, h in (t, b) order, padded with rows of zeros.

    M is a power of two from 16 on, so that compiled code meets a few sizes only; no boxes at all: one frame of zeros.
    """
    most = max((len(boxes) for boxes in found.values()), default=0)
    targets = np.zeros((max(len(found), 1), max(16, 1 << (most - 1).bit_length()), 5), np.float32)
    for target, (_, boxes) in zip(targets, sorted(found.items(), key=lambda item: item[0])):
        columns = (boxes["class_id"], boxes["x"] + 0.5 * boxes["w"], boxes["y"] + 0.5 * boxes["h"], boxes["w"], boxes["h"])
        target[:len(boxes)] = np.stack(columns, 1)
    return torch.from_numpy(targets)


def empty_events(T, B, H, W):
    """Uninitialised uint8 (T, B, 20, H, W); in a loader's worker in shared memory, which spares a copy on its way out."""
    if get_worker_info() is None:
        return torch.empty(T, B, CHANNELS, H, W, dtype=torch.uint8)
    return torch.empty(T, B, CHANNELS, H, W, dtype=torch.uint8).share_memory_()


class Guarded(Dataset):
    """`data`, but a ValueError is returned, not raised: torch would wrap a worker's in a page of traceback."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        try:
            return self.data[index]
        except ValueError as error:
            return error


def ignore_interrupt(_worker):
    """Ctrl-C reaches the whole process group: the trainer saves and leaves, its workers must live until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(data, start=0, num_workers=0, pin_memory=False):
    """Endless iterator over data[start], data[start + 1], ..., in order whatever the number of workers.

    The workers start at once and end with the iterator. ValueError, one line: what data raised, or a worker that died.
    """
    loader = iter(DataLoader(Guarded(data), batch_size=None, sampler=range(start, sys.maxsize), num_workers=num_workers,
                             pin_memory=pin_memory, worker_init_fn=ignore_interrupt))

    def batches():
        while True:
            try:
                batch = next(loader)
            except RuntimeError as error:
                raise ValueError(f"a loader worker died ({str(error).splitlines()[0]}); often memory or /dev/shm is too "
                                 f"small: use fewer num_workers, 0 for none") from error
            if isinstance(batch, ValueError):
                raise batch
            yield batch

    return batches()


# -------------------------------------------------------------------------------------------------------------- inspection


def size_thresholds(sequences):
    """(small, medium): terciles of the box areas of `sequences`, in input pixels^2; ValueError if there are no boxes."""
    areas = [boxes["w"] * boxes["h"] for sequence in sequences for boxes in sequence.boxes]
    if not areas:
        raise ValueError("no boxes to take size thresholds from; set small_threshold and medium_threshold")
    return tuple(float(area) for area in np.quantile(np.concatenate(areas), (1 / 3, 2 / 3)))

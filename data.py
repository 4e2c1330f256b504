"""Prepared sequences (RVT's layout on disk) -> micro-batches for training, planned as a function of (seed, step).

In: DATA/{train,val,test}/SEQUENCE as prepare.py or RVT's preprocessing writes them. Out: Sequence, Batch.
Run as a script it inspects and validates a data set with the code that training reads it with; exit status 1: training
would fail on it.

    python data.py datasets/toy --split=train
"""

import ctypes
import functools
import json
import os
import signal
import struct
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import h5py
import hdf5plugin  # its import registers the Blosc filter with HDF5
import numpy as np
import torch
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from configurator import command_line, configure

data_dir = "datasets/toy"  # a prepared data set; the first word of the command line may name it instead
split = ""  # train, val or test; empty: all three
resolution = "auto"  # auto: the half-resolution file where there is one; half; full
class_names = ()  # names by class id, for data sets without a dataset.json
decode = True  # decode every frame; False: only the last one of each sequence, as training does at its start
picture = "out/box_sizes.png"  # histogram of box sizes; empty: none
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

REPRESENTATION = "event_representations_v2/stacked_histogram_dt=50_nbins=10"
FILES = {"half": "event_representations_ds2_nearest.h5", "full": "event_representations.h5"}
INDEX = "objframe_idx_2_repr_idx.npy"
CHANNELS = 20  # polarity * 10 + time bin
BOX_DTYPE = np.dtype([("t", "<i8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"),
                      ("class_id", "<u4"), ("track_id", "<u4"), ("class_confidence", "<f4")])

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


@contextmanager
def reading(path):
    """Whatever is raised inside becomes a ValueError of one line that names `path`."""
    try:
        yield
    except Exception as error:  # numpy, zipfile, zlib, json and h5py raise a dozen kinds for damaged files
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {what} (if it is damaged, prepare it again)") from error


def check(fine, what):
    """ValueError(what) unless `fine`; an assertion about a file, inside `reading`."""
    if not fine:
        raise ValueError(what)


def read_array(path, key=None):
    """The array (n,) of a .npy file, or `key` of a .npz file: structured, or integers as int64; never unpickled."""
    with reading(path):
        loaded = np.load(path, allow_pickle=False)
        array = loaded if key is None else loaded[key]
        return (array if array.dtype.names else array.astype(np.int64, casting="same_kind")).reshape(len(array))


def ascending(indices, end):
    """Whether indices (n,) ascend strictly within range(end)."""
    return len(indices) == 0 or bool(indices[0] >= 0 and indices[-1] < end and (np.diff(indices) > 0).all())


try:  # zstd's functions, which hdf5plugin's Blosc filter exports
    ZSTD = ctypes.CDLL(str(next(Path(hdf5plugin.PLUGIN_PATH).glob("libh5blosc.*"))))
    ZSTD.ZSTD_createDCtx.restype, ZSTD.ZSTD_freeDCtx.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    ZSTD.ZSTD_decompressDCtx.argtypes = 2 * [ctypes.c_void_p] + [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t]
except (StopIteration, OSError, AttributeError):  # built otherwise: h5py decodes everything
    ZSTD = None


def decode_chunk(mask, chunk, out):
    """Decode a chunk of Blosc 1 with zstd into `out`; False for one of another kind, which is then left to h5py.

    mask: not 0 if the chunk is not compressed. ValueError: a chunk of another size, on which HDF5's filter would crash.
    HDF5's filter has zstd clear a context of 160 KB for each block of 32 KB: 4.6 ms a frame of 20x360x640, against 2.1
    here (Xeon with AVX-512, hdf5plugin 7.1, 2026-11). Format: README_CHUNK_FORMAT.rst of c-blosc 1.
    """
    version, _, flags, typesize, size, block, length = struct.unpack_from("<4B3I", chunk)
    check(len(chunk) == out.nbytes if mask else (size, length) == (out.nbytes, len(chunk)), "its sizes are damaged")
    plain = (mask, version, flags >> 5, flags & 14, typesize) == (0, 2, 4, 0, 1)  # zstd, neither shuffled nor stored
    if not (ZSTD and plain and out.flags.c_contiguous):
        return False
    starts = struct.unpack_from(f"<{-(-size // block)}I", chunk, 16)
    parts = [(start + 4, struct.unpack_from("<I", chunk, start)[0], done, min(block, size - done))
             for start, done in zip(starts, range(0, size, block))]
    source, target, context = np.frombuffer(chunk, np.uint8).ctypes.data, out.ctypes.data, ZSTD.ZSTD_createDCtx()
    fine = all(count < room and start + count <= length and room == ZSTD.ZSTD_decompressDCtx(
        context, target + done, room, source + start, count) for start, count, done, room in parts)
    ZSTD.ZSTD_freeDCtx(context)
    return fine  # False, too, for a block that is stored, as long as its room


@functools.lru_cache(maxsize=64)  # bounded: Gen1 has more sequences than a process may hold files open
def open_events(path, version, pid):
    """(file, its dataset 'data', whether decode_chunk may try) for each version of a file and process; ValueError."""
    with reading(path):
        file = h5py.File(path, "r")
        data, creation = file["data"], file["data"].id.get_create_plist()
        filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
        by_frame = data.chunks == (1, *data.shape[1:])
        check(data.dtype == np.uint8 and data.ndim == 4 and data.shape[1] == CHANNELS and 0 not in data.shape,
              f"data is {data.dtype} {data.shape}, expected uint8 (N, {CHANNELS}, H, W) with N > 0")
        check(not by_frame or data.id.get_num_chunks() == len(data), f"not all of {len(data)} frames are there")
        return file, data, by_frame and filters == [hdf5plugin.BLOSC_ID]


def move_boxes(boxes, hw, view):
    """Boxes clipped to their frame and seen through the View, clipped again, and a mask: which keep an area.

    boxes (n,) BOX_DTYPE in frames of hw (H, W) pixels -> boxes (n,), mask (n,). As in RVT, right and bottom edges end
    at the last pixel, W - 1 and H - 1; View(zoom=0.5) is what it does for half-resolution sets, bit for bit.
    """
    boxes = boxes.copy()
    if view.flip:
        boxes["x"] = hw[1] - 1 - boxes["x"] - boxes["w"]
    for start, extent, size, corner in (("x", "w", hw[1], view.x), ("y", "h", hw[0], view.y)):
        low, high = (np.clip(edge, 0, size - 1) for edge in (boxes[start], boxes[start] + boxes[extent]))
        if view.zoom > 1:
            last = min(corner + size / view.zoom, size - 1) - 1
            low, high, corner = np.clip(low, corner, last) - corner, np.clip(high, corner, last) - corner, 0
        if view.zoom != 1:
            high = np.minimum((low + (high - low)) * view.zoom, size * min(view.zoom, 1) - 1) + corner
            low = low * view.zoom + corner
        boxes[start], boxes[extent] = low, high - low
    return boxes, (boxes["w"] > 0) & (boxes["h"] > 0)


class Sequence:
    """One prepared sequence: labels in memory, event frames read on demand; it pickles, for it holds no open file.

    path, name: its folder. hw (H, W): the network's input. length N: frames. timestamps_us (N,) int64: ends of windows.
    label_frames (L,) int64 ascending: frames that carry boxes; boxes: L arrays of BOX_DTYPE in pixels of the input.
    note: what loading repaired. resolution as in open_split; num_classes 0: ids are not checked; decode: every frame,
    not the last alone. ValueError names the file that is missing, damaged or does not fit the others.
    """

    def __init__(self, path, resolution="auto", num_classes=0, decode=False):
        self.path, self.name, folder = Path(path), Path(path).name, Path(path) / REPRESENTATION
        there = [kind for kind in FILES if (folder / FILES[kind]).is_file()]
        kind = there[0] if there and resolution == "auto" else resolution
        if kind not in there:
            raise ValueError(f"{path}: no events at resolution={resolution!r}, there is {there or 'nothing'}; ask for "
                             f"that, or prepare the data first: python prepare.py --src=RAW --dst=DATA")
        self.file = str(folder / FILES[kind])
        self.version = os.stat(self.file).st_mtime_ns
        shape = open_events(self.file, self.version, os.getpid())[1].shape
        self.length, self.hw = shape[0], shape[2:]
        for frame in range(0 if decode else self.length - 1, self.length):
            self.read(frame, frame + 1)
        self.timestamps_us, frames = read_array(folder / "timestamps_us.npy"), read_array(folder / INDEX)
        with reading(folder):
            check(len(self.timestamps_us) == self.length, f"timestamps_us.npy: not {self.length}, as there are frames")
            check((np.diff(self.timestamps_us) > 0).all(), "timestamps_us.npy: out of order")
            check(ascending(frames, self.length), f"{INDEX}: indices do not ascend within {self.length} frames")
        self._load_boxes(self.path / "labels_v2" / "labels.npz", frames, num_classes or 2**16, 1 + (kind == "half"))

    def _load_boxes(self, path, frames, num_classes, scale):
        """Set label_frames, boxes and note; frames (F,): those in INDEX; scale: sensor pixels in one of the input."""
        labels, first = read_array(path, "labels"), read_array(path, "objframe_idx_2_label_idx")
        with reading(path), np.errstate(all="ignore"):  # what overflows is not finite
            raw, optional = np.ones(len(labels), BOX_DTYPE), {"track_id", "class_confidence"}  # older sets lack these
            for name in BOX_DTYPE.names:
                if name not in optional - set(labels.dtype.names):
                    raw[name] = labels[name]
            check(np.isfinite([raw[name] for name in "xywh"]).all(), "boxes are not finite")
            check((np.diff(raw["t"]) >= 0).all(), "times out of order")
            check(len(first) == len(frames) and ascending(first, len(raw)), "label indices do not fit the frames")
            check(raw["class_id"].max(initial=0) < num_classes, f"class ids beyond the {num_classes} classes: name all")
            frame_of = np.repeat(frames, np.diff(np.append(first, len(raw))))
            raw = raw[len(raw) - len(frame_of):]
            boxes, left = move_boxes(raw, [scale * size for size in self.hw], View(zoom=1 / scale))
            clipped = np.any([abs(boxes[name] * scale - raw[name]) > scale for name in "xywh"], 0).sum()
        self.note = "" if left.all() and not clipped else (
            f"{path}: {clipped} of {len(raw)} boxes reach out of the frame and are clipped, {(~left).sum()} keep no "
            "area and are dropped")
        self.label_frames, starts = np.unique(frame_of[left], return_index=True)
        self.boxes = np.split(boxes[left], starts)[1:]

    def read(self, start, stop, out=None):
        """Event frames start to stop, uint8 (stop - start, 20, H, W), into `out` if given; ValueError: file, frame."""
        _, data, direct = open_events(self.file, self.version, os.getpid())
        out = np.empty((stop - start, CHANNELS, *self.hw), np.uint8) if out is None else out
        for frame, target in zip(range(start, stop), out):  # HDF5 takes 60 times longer for all at once
            with reading(f"{self.file}: frame {frame} does not decode"):
                if not direct or not decode_chunk(*data.id.read_direct_chunk((frame, 0, 0, 0)), target):
                    data.read_direct(target, np.s_[frame])
        return out


def open_split(data_dir, split, num_classes=0, resolution="auto", findings=None, decode=False):
    """Sequences of DATA/split by name, each checked and its last frame decoded, or all of them with `decode`.

    resolution: "auto" takes the half-resolution file where there is one, "half" and "full" insist. ValueError: split
    missing or empty, a sequence damaged, sizes that differ, a class id >= num_classes (0: unchecked); given a list of
    `findings`, these lines go there, and the sequences that are fine come back.
    """
    folder, sequences = Path(data_dir) / split, []
    paths = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    for path in tqdm(paths or [folder], f"opening {folder}", leave=False, disable=None):
        try:
            sequence = Sequence(path, resolution, num_classes, decode)
            sequences.append(sequence)
            with reading(sequence.file):
                check(sequence.hw == sequences[0].hw, f"frames of {sequence.hw}, others of {sequences[0].hw}")
        except ValueError as error:
            if findings is None:
                raise
            findings.append(str(error))
    return sequences


def load_classes(data_dir, class_names=(), num_classes=0):
    """Names of the classes: those in DATA/dataset.json, else class_names, else "0", "1", ... up to num_classes."""
    path, names = Path(data_dir) / "dataset.json", tuple(class_names) or tuple(map(str, range(num_classes)))
    with reading(path):
        if path.is_file():
            names = tuple(name + "" for name in json.loads(path.read_bytes())["classes"])
        check(names, "names no classes; give class_names=... or num_classes=...")
        check(num_classes in (0, len(names)), f"num_classes={num_classes}, but there are {len(names)} class names")
    return names


# -------------------------------------------------------------------------------------------------- augmentation


def draw_view(rng, hw, boxes, flip, zoom, zoom_in_share, zoom_in_max, zoom_out_max):
    """A random View, distributed as RVT's; one of `boxes`, those of the last labelled frame, stays in sight.

    Source: RVT's augmentation. Ours: any of the boxes may be the one; RVT never draws the last.
    """
    flipped, zoomed, inward = (rng.random(3) < (flip, zoom, zoom_in_share)).tolist()
    factor = rng.uniform(1, zoom_in_max if inward else zoom_out_max)
    if not zoomed or factor == 1:
        return View(flipped)
    _, left, top, width, height, *_ = boxes[rng.integers(len(boxes))].tolist()
    left, corner = hw[1] - 1 - left - width if flipped else left, []
    for size, low, length in ((hw[1], left, width), (hw[0], top, height)):
        window = int(size / factor)
        reach = max(window, length)
        first = max(low + length - reach, 0) if inward else 0
        last = max(min(low + reach, size - 1) - window, first) if inward else size - window
        corner.append(int(rng.uniform(first, last)))
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

    events (T, B, C, H, W), rows (B, H), cols (B, W) int64 -> as events, on their device; `events` itself if the maps
    are on the CPU and move nothing. One gather takes 6.5 ms a frame of 20x360x640 on one core (AVX-512 Xeon, 2026-11),
    selecting rows, then columns 30, RVT's interpolation and copy into place 7.5.
    """
    H, W = events.shape[3:]
    if rows.device.type == "cpu" and (rows == torch.arange(H)).all() and (cols == torch.arange(W)).all():
        return events
    rows, cols = rows.to(events.device), cols.to(events.device)
    pixels = (rows.clamp(min=0)[:, :, None] * W + cols.clamp(min=0)[:, None]).flatten(1)[:, None]  # (B, 1, H * W)
    moved = events.flatten(3).gather(3, pixels.expand(*events.shape[:3], H * W)).view_as(events)
    return moved * ((rows >= 0)[:, :, None] & (cols >= 0)[:, None])[:, None]


# ----------------------------------------------------------------------------------------------- training batches


class Runs:
    """Stretches of sequences, played in chunks of T frames, in an order that (seed, slot, pass) draws.

    random=False: from T - 1 frames before a labelled frame to the last labelled one before a label gap longer than T,
    so that each chunk holds a labelled frame. random=True: the T frames up to each labelled frame, where there are T.
    items (n, 3) int64: index of the sequence, first frame, end; chunks (n,): how many; total: their sum.
    """

    def __init__(self, sequences, T, seed, random):
        self.key, self.orders, items = (seed, int(random)), {}, [np.zeros((0, 3), np.int64)]
        gap, far = 0 if random else T, 2**40
        for index, frames in enumerate(sequence.label_frames for sequence in sequences):
            first, last = frames[np.diff(frames, prepend=-far) > gap], frames[np.diff(frames, append=far) > gap]
            run = np.stack([np.full_like(first, index), first - T + 1, last + 1], 1)
            items.append(run[run[:, 1] >= 0] if random else run.clip(min=0))
        self.items = np.concatenate(items)
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

    sampling: "stream", "random" or "mixed" (of a micro-batch's slots mixed_stream : mixed_random, at least one each).
    Slots of a kind are numbered over processes, then micro-batches, then the batch: two processes of batch 2, or one
    that accumulates 2 micro-batches of 2, play what one of batch 4 plays. In steps_per_epoch steps a slot plays every
    chunk once. flip, zoom_stream, zoom_random, zoom_in_share: probabilities; streams only zoom out, as in RVT.
    ValueError: an impossible combination, or nothing to play.
    """

    def __init__(self, sequences, *, seed, sampling, sequence_length, batch_size, gradient_accumulation_steps=1, rank=0,
                 world_size=1, mixed_stream=1, mixed_random=1, flip=0.5, zoom_stream=0.5, zoom_random=0.8,
                 zoom_in_share=0.8, zoom_in_max=1.5, zoom_out_max=1.2):
        if sampling not in ("stream", "random", "mixed"):
            raise ValueError(f"sampling={sampling!r}: expected stream, random or mixed")
        if min(sequence_length, batch_size, gradient_accumulation_steps, zoom_in_max, zoom_out_max) < 1 or seed < 0:
            raise ValueError("sequence_length, batch_size, gradient_accumulation_steps, zoom_*_max from 1; seed from 0")
        if sampling == "mixed" and (batch_size < 2 or min(mixed_stream, mixed_random) <= 0):
            raise ValueError("sampling='mixed' needs batch_size >= 2 and mixed_stream, mixed_random > 0; or use stream")
        streams = batch_size if sampling == "stream" else 0
        if sampling == "mixed":
            streams = min(max(round(batch_size * mixed_stream / (mixed_stream + mixed_random)), 1), batch_size - 1)
        self.slots = streams, batch_size - streams  # of a micro-batch: that stream, that play random windows
        self.sequences, self.T, self.accumulation = sequences, sequence_length, gradient_accumulation_steps
        self.rank, self.world_size, most = rank, world_size, (zoom_in_max, zoom_out_max)
        self.augmentations = (flip, zoom_stream, 0.0, *most), (flip, zoom_random, zoom_in_share, *most)
        self.runs = [Runs(sequences, self.T, seed, random) for random in (False, True)]
        if any(slots and not runs.total for slots, runs in zip(self.slots, self.runs)):
            raise ValueError(f"{sequences[0].path.parent if sequences else 'no sequences'}: no labelled frame for "
                             f"sampling={sampling!r}, sequence_length={self.T}; see the labels: python data.py DATA")
        self.steps_per_epoch = self.runs[not streams].total

    def __getitem__(self, index):
        (H, W), (step, a), B = self.sequences[0].hw, divmod(index, self.accumulation), sum(self.slots)
        events, is_first = empty_events((self.T, B, CHANNELS, H, W)), torch.empty(B, dtype=torch.bool)
        rows, cols, found = [], [], {}
        for b in range(B):
            kind = int(b >= self.slots[0])
            runs, n = self.runs[kind], self.slots[kind]
            slot = (self.rank * self.accumulation + a) * n + b - kind * self.slots[0]
            run, chunk, key = runs.place(slot, self.world_size * self.accumulation * n, step)
            which, start, end = runs.items[run].tolist()
            sequence, start = self.sequences[which], start + chunk * self.T
            end, is_first[b] = min(start + self.T, end), chunk == 0
            sequence.read(start, end, events[:, b].numpy())
            events[end - start:, b] = 0
            first, last = np.searchsorted(sequence.label_frames, (start, end))
            view = draw_view(np.random.default_rng(key), (H, W), sequence.boxes[last - 1], *self.augmentations[kind])
            rows.append(index_map(H, view.y, view.zoom, False))
            cols.append(index_map(W, view.x, view.zoom, view.flip))
            for frame, boxes in zip(sequence.label_frames[first:last].tolist(), sequence.boxes[first:last]):
                boxes, left = move_boxes(boxes, (H, W), view)
                if left.any():
                    found[frame - start, b] = boxes[left]
        places = found or {(0, 0)}
        frames = torch.tensor([[(t, b) in places for b in range(B)] for t in range(self.T)])
        targets = pad_targets([found[place] for place in sorted(found)])
        return Batch(events, torch.stack(rows), torch.stack(cols), is_first, frames, targets, bool(found))


def pad_targets(frames):
    """The boxes of each of N frames -> targets (N, M, 5) float32, as in Batch; no frames: one of zeros.

    M is a power of two from 16 on, so that compiled code meets a few sizes only.
    """
    most = max(map(len, frames), default=0)
    targets = torch.zeros(max(len(frames), 1), max(16, 1 << (most - 1).bit_length()), 5)
    for target, box in zip(targets, frames):
        columns = box["class_id"], box["x"] + 0.5 * box["w"], box["y"] + 0.5 * box["h"], box["w"], box["h"]
        target[:len(box)] = torch.from_numpy(np.stack(columns, 1, dtype=np.float32, casting="unsafe"))
    return targets


def empty_events(shape):
    """Uninitialised uint8 tensor; in a worker in shared memory, which spares the copy when it leaves."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, np.uint8))  # numpy asks for huge pages: 10 times fewer page faults
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(int(np.prod(shape)))).view(shape)


def ignore_interrupt(_):
    """Ctrl-C reaches the whole process group: workers must outlive it until the trainer has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(loader):
    """What the iterator `loader` yields; what it raises as ValueErrors of one line."""
    try:
        yield from loader
    except (ValueError, RuntimeError) as error:
        error.__traceback__ = loader = None  # workers that a traceback holds on to take 5 s to end
        lines = str(error).strip().splitlines()  # what our code raised comes last, behind torch's page of traceback
        raise ValueError(lines[-1].removeprefix("ValueError: ") if isinstance(error, ValueError) else
                         f"loading: {lines[0]}; if memory or /dev/shm is short, use fewer num_workers") from None


def make_loader(data, start=0, num_workers=0, pin_memory=False):
    """Endless iterator over data[start], data[start + 1], ..., in order whatever the number of workers.

    The workers start at once and end with the iterator. ValueError, one line: what `data` raised, or a dead worker.
    """
    return batches(iter(DataLoader(data, batch_size=None, sampler=range(start, 2**62), num_workers=num_workers,
                                   pin_memory=pin_memory, worker_init_fn=ignore_interrupt)))


# ----------------------------------------------------------------------------------------------------- inspection


def size_thresholds(sequences):
    """(small, medium): terciles of the box areas of `sequences`, input pixels^2; ValueError if there are no boxes."""
    areas = [boxes["w"] * boxes["h"] for sequence in sequences for boxes in sequence.boxes]
    if not areas:
        raise ValueError("no boxes to take size thresholds from; set small_threshold and medium_threshold")
    return tuple(np.quantile(np.concatenate(areas), (1 / 3, 2 / 3)).tolist())


def main(argv):
    """Print what a data set holds and draw its box sizes; ValueError at the end if training would fail on it."""
    if argv and not argv[0].startswith("--"):
        argv = [f"--data_dir={argv[0]}", *argv[1:]]
    config = SimpleNamespace(**configure(defaults, argv))
    root, findings, sides = Path(config.data_dir), [], {}
    names = load_classes(root, config.class_names) if config.class_names or (root / "dataset.json").is_file() else ()
    for part in [config.split] if config.split else ["train", "val"] + ["test"] * any((root / "test").glob("[!.]*")):
        sequences = open_split(root, part, len(names), config.resolution, findings, config.decode)
        boxes = np.concatenate([np.zeros(0, BOX_DTYPE)] + [box for sequence in sequences for box in sequence.boxes])
        area, ids = boxes["w"] * boxes["h"], boxes["class_id"]
        frames, labelled = sum(s.length for s in sequences), sum(len(s.label_frames) for s in sequences)
        print(f"{root / part}: {len(sequences)} sequences of {sequences[0].hw if sequences else '-'} pixels, {frames} "
              f"frames, {labelled} with boxes ({labelled / max(frames, 1):.1%}), {len(boxes)} boxes")
        print("".join(f"  note: {sequence.note}\n" for sequence in sequences if sequence.note), end="")
        print("  boxes of class           tiny <16x16  small <32x32  medium <96x96       large")
        for k in np.unique(ids):
            counts = np.histogram(area[ids == k], (0, 16**2, 32**2, 96**2, np.inf))[0]
            print("  {:22}{:14}{:14}{:15}{:12}".format(f"{k} {names[k] if names else ''}", *counts))
        if len(boxes):
            sides[part] = area**0.5
            print("  terciles: small_threshold={:.0f} medium_threshold={:.0f}".format(*size_thresholds(sequences)))
        elif part == "train":
            findings.append(f"{root / part}: no boxes, nothing to train on")
    if config.picture and sides:
        from matplotlib.figure import Figure  # here, for training does without

        axes = Figure(layout="constrained").subplots()
        axes.hist(list(sides.values()), bins=60, histtype="step", label=list(sides))
        axes.set(xlabel="sqrt(box area), pixels", ylabel="boxes", xticks=(16, 32, 96, 192), yscale="log")
        axes.legend()
        Path(config.picture).parent.mkdir(parents=True, exist_ok=True)
        axes.figure.savefig(config.picture)
    print("".join(f"FINDING: {finding}\n" for finding in findings), end="")
    if findings:
        raise ValueError(f"{root}: training would fail, findings: {len(findings)}")


if __name__ == "__main__":
    command_line(main)

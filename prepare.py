"""Raw event recordings and labels -> prepared sequences in RVT's layout; also the reader of recordings (demo.py streams with it).

In:  SRC/{train,val,test}/NAME_td.h5 | NAME_td.dat.h5 | NAME_td.dat | NAME.raw | ... with NAME_bbox.npy; a recording without labels
     is prepared for inference: empty labels, a window every 50 ms from its first event on.
Out: DST/{train,val,test}/NAME/{event_representations_v2,labels_v2}/... and DST/dataset.json. An interrupted run resumes.

    python prepare.py --src=RAW --dst=OUT --dataset=etram --num_workers=8
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import h5py
import hdf5plugin
import numpy as np
from tqdm import tqdm

from configurator import command_line, configure

src = ""           # folder with train, val and test (at least one of them) of raw recordings
dst = ""           # folder that the prepared sequences go to
dataset = "etram"  # etram | gen4 | gen1 | own: sets what follows where it is left empty
box_filter = ""    # none | prophesee (no small objects!) | sides5; own data: none
downsample = ""    # none | nearest (odd rows and columns, RVT's half resolution) | sum (2x2 pixels); own data: none
class_names = ()   # own data: names of class ids 0, 1, ...; none given: "0", "1", ... up to the largest id in the labels
height = 0         # px, of recordings that do not tell their size; 0: the data set's
width = 0          # px
num_workers = 0    # processes; 0: all in this one
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

DATASETS = {
    "etram": dict(height=720, width=1280, box_filter="sides5", downsample="nearest", class_names=(
        "pedestrian", "car", "bicycle", "bus", "motorbike", "truck", "tram", "wheelchair")),
    "gen4": dict(height=720, width=1280, box_filter="sides5", downsample="nearest",
                 class_names=("pedestrian", "two-wheeler", "car")),
    "gen1": dict(height=240, width=304, box_filter="prophesee", downsample="none", class_names=("car", "pedestrian")),
    "own": dict(height=0, width=0, box_filter="none", downsample="none", class_names=()),
}
BOX_FILTERS, DOWNSAMPLINGS = ("none", "prophesee", "sides5"), ("none", "nearest", "sum")
BINS, MAX_COUNT = 10, 10             # time bins a polarity; largest count that is stored
WINDOW_US = 50_000                   # length of a window
FIRST_LABEL_US, JITTER_US = 100_000, 2_000  # earliest labelled frame; how far off the label grid a label may be
MAX_LEAD_US = 10_000_000             # a clock that starts later than this is not filled with empty windows from 0 on
MAX_WINDOWS = 10_000_000             # 139 hours; beyond it the label times are taken for wrong
BLOCK = 1 << 19                      # events read at a time
UNKNOWN_SIZE = 2048                  # both sides, where a .raw file does not tell: EVT2 and EVT3 coordinates have 11 bits
NO_EVENTS = (np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.uint8))
NO_LABELS = np.zeros(0, [("t", "<i8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"), ("class_id", "<u4"),
                         ("track_id", "<u4"), ("class_confidence", "<f4")])


# ---- recordings: a reader is a generator that sets recording.height and .width (where the file tells), yields once,
# ---- then yields blocks of arrays (t, x, y, p) as stored

def read_h5(recording):
    """HDF5 with t, x, y, p in a group or compound data set `events` or `CD/events`; size as scalars or attributes."""
    with h5py.File(recording.path, "r") as file:
        node = file["events"] if "events" in file else file.get("CD/events")
        if node is None:
            raise ValueError("no group 'events' or 'CD/events' in it")
        group, size = isinstance(node, h5py.Group), {}
        for place in (file.attrs, node.attrs, node if group else {}):
            if "geometry" in place:
                size["width"], size["height"] = str(place["geometry"]).split("x")
            size.update({key: place[key] for key in ("height", "width") if key in place})
        recording.height, recording.width = (int(np.asarray(size.get(key, 0)).item()) for key in ("height", "width"))
        yield
        columns = [node[key] if group else node.fields(key) for key in "txyp"]
        length = {len(column) for column in columns}
        if len(length) > 1:
            raise ValueError(f"t, x, y and p differ in length: {sorted(length)}")
        chunk = max((getattr(column, "chunks", None) or (1,))[0] for column in columns)
        step = -(-BLOCK // chunk) * chunk  # whole chunks, so that none is decompressed twice
        offset = int(file["t_offset"][()]) if "t_offset" in file else 0  # DSEC's
        for start in range(0, length.pop(), step):
            t, x, y, p = (column[start:start + step] for column in columns)
            yield t.astype(np.int64) + offset, x, y, p


def read_dat(recording):
    """Prophesee's DAT, versions 1 and 2: text header, event type and size, records of 8 bytes."""
    with open(recording.path, "rb") as file:
        header = {}
        while file.peek(1)[:1] == b"%":
            words = file.readline(4096).decode("latin1").lower().split()
            header.update({words[1]: words[2]} if len(words) > 2 else {"": ""})
        if not header or file.read(2)[1:] != b"\x08":
            raise ValueError("not a DAT file of 8-byte events")
        recording.height, recording.width = (int(header.get(key, 0)) for key in ("height", "width"))
        yield
        x_bits, y_bits = (14, 14) if int(header.get("version", 2)) >= 2 else (9, 8)
        if cut := (recording.path.stat().st_size - file.tell()) % 8:
            recording.note = f"the file ends {cut} bytes into an event"
        while len(block := np.fromfile(file, [("t", "<u4"), ("xyp", "<u4")], BLOCK)):
            xyp = block["xyp"]
            yield (block["t"].astype(np.int64), (xyp & ((1 << x_bits) - 1)).astype(np.uint16),
                   (xyp >> x_bits & ((1 << y_bits) - 1)).astype(np.uint16), xyp >> (x_bits + y_bits) & 1)


def read_faery(recording):
    """EVT2, EVT3 (.raw with a header; .evt2, .evt3 without), AEDAT4 and Event Stream files through the package faery."""
    try:
        import faery
    except ImportError:
        raise ValueError("this format needs an optional package: pip install faery") from None
    suffix, options = recording.path.suffix.lower(), {}
    with open(recording.path, "rb") as file:
        head = file.read(4096)
    if suffix in (".evt2", ".evt3"):
        options = dict(file_type="evt", version_fallback=suffix[1:])
    elif suffix == ".raw" and not head.startswith(b"%"):
        raise ValueError("no header; if it holds bare EVT3 words, name it .evt3 and give --height and --width")
    stream = faery.events_stream_from_file(recording.path, dimensions_fallback=(UNKNOWN_SIZE,) * 2, **options)
    recording.width, recording.height = stream.dimensions()
    if recording.width == recording.height == UNKNOWN_SIZE:
        sensor = re.search(rb"plugin_name hal_plugin_gen(3|4)", head) if suffix == ".raw" else None
        recording.width, recording.height = {b"3": (640, 480), b"4": (1280, 720)}[sensor[1]] if sensor else (0, 0)
    yield
    packets = []
    for packet in itertools.chain(stream, (None,)):
        packets += [] if packet is None else [packet]
        if packets and (packet is None or sum(map(len, packets)) >= BLOCK):
            block = np.concatenate(packets)
            packets = []
            yield block["t"].astype(np.int64), block["x"], block["y"], block["on"]


READERS = {".h5": read_h5, ".hdf5": read_h5, ".dat": read_dat, ".raw": read_faery, ".evt2": read_faery, ".evt3": read_faery,
           ".aedat4": read_faery, ".es": read_faery}


class Recording:
    """A recording on disk: path, height, width. The rest is known once chunks() has been read to its end.

    events kept; outside: events dropped for not being on the sensor; backwards: events whose time was raised to the
    running maximum; first_us, last_us: times of the first and last event or None; note: what is wrong with the file, or "".
    """

    def __init__(self, path, height=0, width=0):
        self.path, self.events, self.outside, self.backwards = Path(path), 0, 0, 0
        self.first_us, self.last_us, self.note = None, None, ""
        reader = READERS.get(self.path.suffix.lower())
        if reader is None or not self.path.is_file():
            raise ValueError(f"{path}: " + ("no such file" if reader else f"unknown format; known: {' '.join(READERS)}"))
        try:
            next(reader(self))
        except Exception as error:  # whatever a damaged file makes a library raise
            raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
        if not (self.height and self.width):
            self.height, self.width = height, width
        if not (0 < self.height <= 1 << 13 and 0 < self.width <= 1 << 13):
            raise ValueError(f"{path}: sensor of {self.height} x {self.width} px; give --height and --width")

    def chunks(self):
        """Yield tuples (t int64 us, never decreasing; x, y int px; p, above 0 is on), none empty, about BLOCK events each.

        ValueError names the file and tells how much could be read. A recording without events yields nothing.
        """
        self.events, self.outside, self.backwards, self.first_us, self.last_us = 0, 0, 0, None, None
        height, width, blocks = self.height, self.width, READERS[self.path.suffix.lower()](self)
        try:
            next(blocks)
            self.height, self.width = height, width
            for t, x, y, p in blocks:
                if not len(t):
                    continue
                running = np.maximum.accumulate(t)
                if self.last_us is not None and t[0] < self.last_us:
                    running = np.maximum(running, self.last_us)
                self.backwards += int(np.count_nonzero(running != t))
                self.last_us = int(running[-1])
                t = running
                if min(x.min(), y.min()) < 0 or x.max() >= width or y.max() >= height:
                    inside = np.flatnonzero((x >= 0) & (x < width) & (y >= 0) & (y < height))
                    lost = len(t) - len(inside)
                    if lost > 100 + len(inside):
                        raise ValueError(f"most events lie outside of {height} x {width} px: another sensor size or damaged")
                    self.outside += lost
                    t, x, y, p = t[inside], x[inside], y[inside], p[inside]
                if len(t):
                    self.first_us = int(t[0]) if self.first_us is None else self.first_us
                    self.events += len(t)
                    yield t, x, y, p
        except Exception as error:  # whatever a damaged file makes a library raise
            good = f"{self.events} events" + (f" up to {self.last_us} us" if self.events else "")
            raise ValueError(f"{self.path}: fails after {good}: {' '.join(str(error).split())}") from error


def open_recording(path, height=0, width=0):
    """Recording of any known format; height and width (px) serve where the file does not tell.

    ValueError in one line: unknown format, no such file, unreadable header, unknown sensor size, missing package.
    """
    return Recording(path, height, width)


def windows(recording, ends_us=None):
    """Yield the events (t, x, y, p) of each window [end - WINDOW_US, end], both ends included, in bounded memory.

    ends_us: ascending window ends, which may overlap, leave gaps or lie beyond the recording; None: every WINDOW_US from the
    first event on until the last event is out. Empty windows are four empty arrays.
    """
    chunks = recording.chunks()
    events = next(chunks, NO_EVENTS)
    more, until_last = len(events[0]) > 0, ends_us is None
    if until_last:
        ends_us = itertools.count(int(events[0][0]) + WINDOW_US, WINDOW_US) if more else ()
    for end in ends_us:
        while more and events[0][-1] <= end:
            new = next(chunks, None)
            more = new is not None
            if more:
                cut = np.searchsorted(events[0], end - WINDOW_US, side="left")
                events = tuple(np.concatenate((old[cut:], new)) for old, new in zip(events, new))
        first = np.searchsorted(events[0], end - WINDOW_US, side="left")
        last = np.searchsorted(events[0], end, side="right")
        yield tuple(column[first:last] for column in events)
        if until_last and not more and last == len(events[0]):
            return


def histogram(t, x, y, p, height, width, downsample="none"):
    """Stacked histogram of one window: uint8 (2 * BINS, H, W), channel = polarity * BINS + time bin, counts up to MAX_COUNT.

    t (n,) us ascending, x, y (n,) px, p (n,) on where above 0. Time bins span first to last event of the window, before any
    downsampling; "nearest" keeps odd rows and columns (nearest-exact), "sum" adds 2x2 pixels; both halve H and W, rounded down.
    Bins as RVT computes them, in float32; it counts in uint8 and wraps at 256, this saturates. No events: zeros.
    """
    scale = 0 if downsample == "none" else 1
    H, W = height >> scale, width >> scale
    if not len(t):
        return np.zeros((2 * BINS, H, W), np.uint8)
    t0, t1 = int(t[0]), int(t[-1])
    if downsample == "nearest":
        keep = np.flatnonzero(x & y & 1)
        t, x, y, p = t[keep], x[keep], y[keep], p[keep]
    elif downsample == "sum" and (height | width) & 1:
        keep = np.flatnonzero((x < 2 * W) & (y < 2 * H))
        t, x, y, p = t[keep], x[keep], y[keep], p[keep]
    time_bin = (t - t0).astype(np.float32) / np.float32(max(t1 - t0, 1)) * np.float32(BINS)
    index = np.minimum(time_bin.astype(np.int32), BINS - 1) + (p > 0) * np.int32(BINS)
    index = np.sort((index * H + (y >> scale)) * W + (x >> scale))  # sorting beats np.bincount over 20 mostly empty frames
    start = np.flatnonzero(np.diff(index, prepend=-1))
    counts = np.zeros((2 * BINS, H, W), np.uint8)
    counts.reshape(-1)[index[start]] = np.minimum(np.diff(start, append=len(index)), MAX_COUNT)
    return counts


# ---- labels

def read_labels(path):
    """Labels (L,) in order of time: fields as stored, packed, with `ts` and `confidence` renamed; confidence 1 where absent.

    ValueError: unreadable, not a structured array, fields missing.
    """
    try:
        raw = np.load(path, allow_pickle=False)
        names = [{"ts": "t", "confidence": "class_confidence"}.get(name, name) for name in raw.dtype.names or ()]
    except Exception as error:  # whatever a damaged file makes numpy raise
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if missing := {"t", "x", "y", "w", "h", "class_id"} - set(names):
        raise ValueError(f"{path}: labels lack {', '.join(sorted(missing))}; fields are {', '.join(names) or 'none'}")
    fields = [(new, raw.dtype[old]) for new, old in zip(names, raw.dtype.names)]
    fields += [("class_confidence", "<f4")] if "class_confidence" not in names else []
    boxes = np.ones(raw.size, fields)
    for new, old in zip(names, raw.dtype.names):
        boxes[new] = raw[old].ravel()
    return boxes[np.argsort(boxes["t"], kind="stable")]


def filter_boxes(boxes, height, width, num_classes, box_filter, gen1, train):
    """Boxes (L,) cropped to [0, width-1] x [0, height-1] -> those kept, {reason: number dropped}, by RVT's rules.

    num_classes 0 keeps all ids. prophesee: Prophesee's evaluation limits, 60 px diagonal and 20 px sides at a width of 1280
    (30 and 10 on Gen1), in proportion on other sensors. Boxes wider than 9/10 of the frame are label faults: not trained on.
    """
    for corner, side, limit in (("x", "w", width - 1), ("y", "h", height - 1)):
        low = np.clip(boxes[corner], 0, limit)
        boxes[side] = np.clip(boxes[corner] + boxes[side], 0, limit) - low
        boxes[corner] = low
    ids = boxes["class_id"].astype(np.int64)
    w, h = boxes["w"], boxes["h"]
    known = (ids >= 0) & (ids < (num_classes or 1 << 32))
    area = (w > 0) & (h > 0)  # also drops what is not a number
    unit = 10 if gen1 else 20 * width / 1280
    sides = {"none": 0, "sides5": 5, "prophesee": unit}[box_filter]
    large = (w >= sides) & (h >= sides)
    if box_filter == "prophesee":
        large &= w ** 2 + h ** 2 >= (3 * unit) ** 2
    narrow = w <= 9 * width // 10 if train else np.ones(len(boxes), bool)
    kept, dropped = np.ones(len(boxes), bool), {}
    for reason, good in (("unknown class", known), ("outside the frame", area), ("small", large), ("too wide", narrow)):
        dropped[reason] = int((kept & ~good).sum())
        kept &= good
    return boxes[kept], dropped


def label_frames(times, gen1):
    """Ascending label times (L,) us -> times of the labelled frames, base step in us.

    RVT's rule: the first at or after 100 ms, then each within JITTER_US of a whole number of base steps after the last one.
    Ours: any label rate; and where no later label is in phase any more, the next one that is off the grid of labels altogether
    starts a new phase (labels on that grid that RVT leaves out are the short tail of a recording).
    """
    median = np.median(np.diff(times)) if len(times) > 1 else 100_000
    base = 250_000 if gen1 else int(max(1, np.rint(100_000 / median)) * median)
    frames, i = [], int(np.searchsorted(times, FIRST_LABEL_US))
    while i < len(times):
        frames.append(int(times[i]))
        for later in (times[i + 1:i + 65], times[i + 1:]):  # the next one is near, as a rule
            ahead = later - times[i]
            steps = np.rint(ahead / base)
            found = np.flatnonzero((np.abs(ahead - steps * base) <= JITTER_US) & (steps > 0))
            if len(found):
                break
        else:
            off_grid = np.abs(ahead - np.rint(ahead / median) * median) > JITTER_US
            found = np.flatnonzero((ahead > base - JITTER_US) & off_grid)
        i += 1 + int(found[0]) if len(found) else len(times)
    return np.array(frames, np.int64), base


def window_ends(frames, base_us, gen1, first_us):
    """Times (N,) us at which windows end: every 50 ms up to the first frame (the earliest of them left out, as RVT does), then
    equally spaced between frames, two a base step (RVT's number; base steps of more than 100 ms hold more, but for Gen1)."""
    a_base = 2 if gen1 else max(1, round(base_us / WINDOW_US))
    start = first_us if first_us > MAX_LEAD_US else 0
    counts = np.maximum(1, np.rint(np.diff(frames) / base_us * a_base)).astype(np.int64)
    if counts.sum() + (frames[0] - start) // WINDOW_US > MAX_WINDOWS:
        raise ValueError(f"labels from {frames[0]} to {frames[-1]} us: not microseconds in the recording's clock, it seems")
    ends = list(range(frames[0], start, -WINDOW_US))[::-1][1:-1]
    for before, after, count in zip(frames, frames[1:], counts):
        ends.extend(np.linspace(before, after, count + 1).astype(np.int64)[:-1])
    return np.array([*ends, frames[-1]], np.int64)


# ---- sequences

def write_windows(file, recording, ends_us, downsample):
    """Write the histogram of every window to data set 'data' of an open HDF5 file; returns how many, how many empty."""
    H, W = (side if downsample == "none" else side // 2 for side in (recording.height, recording.width))
    data = file.create_dataset("data", (0, 2 * BINS, H, W), np.uint8, maxshape=(None, 2 * BINS, H, W), chunks=(1, 2 * BINS, H, W),
                               **hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE))
    empty = 0
    for events in windows(recording, ends_us):
        data.resize(len(data) + 1, axis=0)
        data[-1] = histogram(*events, recording.height, recording.width, downsample)
        empty += len(events[0]) == 0
    return len(data), empty


def prepare_sequence(job):
    """Prepare one sequence, job = (split, name, recording or None, labels or None, options): (outcome, line of report).

    outcome: "prepared", "there already", "skipped" (nothing to learn or see in it) or "failed" (a file is damaged). The
    sequence appears under its name once it is complete.
    """
    split, name, events_file, labels_file, options = job
    final = Path(options.dst, split, name)
    work = Path(options.dst, ".partial", f"{split}-{name}")
    if final.exists():
        return "there already", f"{split}/{name}: there already"
    try:
        outcome, line = write_sequence(split, events_file, labels_file, work, options)
        if outcome == "prepared":
            final.parent.mkdir(exist_ok=True)
            work.rename(final)
    except ValueError as error:
        outcome, line = "failed", str(error)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return outcome, f"{split}/{name}: {outcome}, {line}"


def write_sequence(split, events_file, labels_file, folder, options):
    """Write one sequence into a new folder; (outcome, what was found) as prepare_sequence has them."""
    shutil.rmtree(folder, ignore_errors=True)
    if events_file is None:
        raise ValueError(f"{labels_file}: no recording beside it (..._td.h5, _td.dat.h5, _td.dat, .raw, .h5)")
    recording = open_recording(events_file, options.height, options.width)
    if (recording.height, recording.width) != (options.sensor_height, options.sensor_width):
        raise ValueError(f"{events_file}: sensor of {recording.height} x {recording.width} px, others of this data set have "
                         f"{options.sensor_height} x {options.sensor_width}; prepare it into its own --dst")
    boxes, frames, ends, dropped, gen1 = NO_LABELS, np.zeros(0, np.int64), None, {}, options.dataset == "gen1"
    if labels_file is not None:
        boxes, dropped = filter_boxes(read_labels(labels_file), recording.height, recording.width, len(options.classes),
                                      options.box_filter, gen1, split == "train")
        times = boxes["t"].astype(np.int64)
        frames, base_us = label_frames(np.unique(times), gen1)
        if not len(frames):
            return "skipped", "no labels left" + "".join(f", {n} {why}" for why, n in dropped.items() if n)
        first_us = next(recording.chunks(), ([0],))[0][0]
        ends = window_ends(frames, base_us, gen1, int(first_us))
        boxes = boxes[np.isin(times, frames)]
    target = folder / "event_representations_v2" / f"stacked_histogram_dt=50_nbins={BINS}"
    target.mkdir(parents=True)
    (folder / "labels_v2").mkdir()
    half = "" if options.downsample == "none" else "_ds2_nearest"  # also of "sum": the name by which readers know it
    with h5py.File(target / f"event_representations{half}.h5", "w") as file:
        count, empty = write_windows(file, recording, ends, options.downsample)
    if not count:
        return "skipped", "no events and no labels"
    if ends is None:
        ends = recording.first_us + WINDOW_US * np.arange(1, count + 1)
    np.save(target / "timestamps_us.npy", ends)
    np.save(target / "objframe_idx_2_repr_idx.npy", np.searchsorted(ends, frames))
    np.save(folder / "labels_v2" / "timestamps_us.npy", frames)
    np.savez(folder / "labels_v2" / "labels.npz", labels=boxes,
             objframe_idx_2_label_idx=np.searchsorted(boxes["t"].astype(np.int64), frames))
    found = {"boxes " + why: n for why, n in dropped.items()} | {
        "empty windows": empty, "events off the sensor": recording.outside, "times backwards": recording.backwards}
    return "prepared", (f"{count} windows, {len(frames)} labelled frames, {len(boxes)} boxes" + (recording.note and f"; {recording.note}")
                        + "".join(f"; {n} {why}" for why, n in found.items() if n))


# ---- data sets

def find_sequences(folder):
    """[(split, name, recording or None, labels or None)] below a folder, in order; ValueError where there is none."""
    found = []
    for split in ("train", "val", "test"):
        names = {}
        for path in sorted(Path(folder, split).glob("*")):
            if path.name.endswith("_bbox.npy"):
                names.setdefault(path.name.removesuffix("_bbox.npy"), {})["labels"] = path
            elif path.suffix.lower() in READERS:
                name = re.sub(r"(_td)?(\.dat)?\.\w+$", "", path.name)
                names.setdefault(name, {}).setdefault("events", path)
        found += [(split, name, files.get("events"), files.get("labels")) for name, files in sorted(names.items())]
    if not found:
        raise ValueError(f"{folder}: no recordings in its folders train, val and test")
    return found


def describe(sequences, options):
    """Set options.classes and the sensor's size and write dataset.json; or check that DST was begun with the same options.

    ValueError: not one recording can be opened; DST holds sequences prepared in another way.
    """
    for _, _, events_file, _ in sequences:
        try:
            first = open_recording(events_file, options.height, options.width) if events_file else None
        except ValueError as error:
            first = error
        if isinstance(first, Recording):
            break
    else:
        raise first or ValueError(f"{options.src}: labels, but no recordings")
    options.sensor_height, options.sensor_width, options.classes = first.height, first.width, tuple(options.class_names)
    if not options.classes:
        ids = [read_labels(labels)["class_id"].max(initial=0) for *_, labels in sequences if labels]
        options.classes = tuple(map(str, range(int(max(ids, default=0)) + 1)))
    about = dict(classes=list(options.classes), height=first.height, width=first.width, dataset=options.dataset,
                 box_filter=options.box_filter, downsample=options.downsample)
    path = Path(options.dst, "dataset.json")
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in about if before.get(key) != about[key]]
        except (ValueError, AttributeError):
            raise ValueError(f"{path}: not what prepare.py writes; remove it or choose another --dst") from None
        if differing:
            raise ValueError(f"{path}: prepared with other {', '.join(differing)}; remove {options.dst} or choose another --dst")
    Path(options.dst, ".partial").mkdir(parents=True, exist_ok=True)
    partial = Path(options.dst, ".partial", "dataset.json")
    partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def prepare(src, dst, dataset="own", num_workers=0, quiet=False, **changes):
    """Prepare the data set below src into dst; returns {outcome: number of sequences}.

    changes: box_filter, downsample, class_names, height, width, where they are not the data set's. quiet: no line for each
    sequence that was prepared. Sequences already in dst stay as they are. ValueError: src or an option is wrong at once; damaged
    files once all others are prepared.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset!r}: expected one of {', '.join(DATASETS)}")
    options = SimpleNamespace(**DATASETS[dataset] | {key: value for key, value in changes.items() if value})
    options.src, options.dst, options.dataset = src, dst, dataset
    if options.box_filter not in BOX_FILTERS or options.downsample not in DOWNSAMPLINGS:
        raise ValueError(f"box_filter={options.box_filter!r}, downsample={options.downsample!r}: expected one of "
                         f"{', '.join(BOX_FILTERS)} and one of {', '.join(DOWNSAMPLINGS)}")
    sequences = find_sequences(src)
    describe(sequences, options)
    jobs, failed, outcomes = [(*sequence, options) for sequence in sequences], [], {}
    with tqdm(total=len(jobs), desc="prepare", unit="seq", dynamic_ncols=True) as bar:
        for outcome, line in run_jobs(prepare_sequence, jobs, num_workers):
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            failed += [line] if outcome == "failed" else []
            if outcome in ("failed", "skipped") or not quiet and outcome == "prepared":
                bar.write(line)
            bar.update()
    shutil.rmtree(Path(dst, ".partial"), ignore_errors=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} sequences failed, the others are in {dst}; first: {failed[0]}")
    return outcomes


def run_jobs(function, jobs, num_workers):
    """Yield function(job) for each job as it is done: here, or with num_workers > 0 in that many processes."""
    if num_workers < 1:
        yield from map(function, jobs)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the new processes: more would fight for the cores
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise OSError("a process died, perhaps for lack of memory; run again with fewer --num_workers to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv):
    config = configure(defaults, argv)
    if not (config["src"] and config["dst"]):
        raise ValueError("say where from and where to: python prepare.py --src=RAW --dst=OUT --dataset=etram")
    outcomes = prepare(**config)
    print("; ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) + f": {config['dst']}")


if __name__ == "__main__":
    command_line(main)

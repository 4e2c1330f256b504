"""Raw event recordings and labels -> prepared sequences in RVT's layout; also the reader of recordings, for demo.py.

In:  SRC/{train,val,test}/NAME_td.h5, NAME_td.dat.h5, NAME_td.dat, NAME.raw, ... with NAME_bbox.npy; a recording
     without labels is prepared for inference: no labels, a window every 50 ms from its first event to its last.
Out: DST/{train,val,test}/NAME/{event_representations_v2,labels_v2}/..., DST/dataset.json. An interrupted run resumes.

    python prepare.py --src=RAW --dst=OUT --dataset=etram --num_workers=8
"""

import itertools
import json
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import h5py
import hdf5plugin
import numpy as np
from tqdm import tqdm

from configurator import command_line, configure
from formats import BINS, BOX_DTYPE, WINDOW_US, histogram, reading, require, write

src, dst = "datasets/raw", "datasets/prepared"  # raw recordings in folders train, val, test; what they are made into
# etram | gen4 | gen1 | own: what follows is the data set's where it is left empty; names of class ids 0, 1, ..., own
# data: "0", "1", ... up to the largest id in the labels
dataset, class_names = "own", ()
# none | sides5 | prophesee (drops small objects, see filter_boxes), own data: none; none | nearest (odd rows and
# columns, RVT's half resolution) | sum (of 2x2 pixels), own data: none
box_filter, downsample = "", ""
height, width, num_workers = 0, 0, 0  # px, of recordings that do not tell; processes, 0: all in this one
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

OPTIONS = "height", "width", "box_filter", "downsample", "grid_us", "class_names"
DATASETS = {  # grid_us: step between labelled frames; 0: the whole number of label intervals nearest to 100 ms
    "etram": (720, 1280, "sides5", "nearest", 0, "pedestrian car bicycle bus motorbike truck tram wheelchair".split()),
    "gen4": (720, 1280, "sides5", "nearest", 0, ["pedestrian", "two-wheeler", "car"]),
    "gen1": (240, 304, "prophesee", "none", 250_000, ["car", "pedestrian"]),
    "own": (0, 0, "none", "none", 0, []),
}
CHOICES = dict(dataset=DATASETS, box_filter=("none", "sides5", "prophesee"), downsample=("none", "nearest", "sum"))
# Earliest labelled frame; how far off the grid of labels a label may be.
FIRST_LABEL_US, JITTER_US = 100_000, 2_000
# A clock that starts later is not filled with windows from 0 on; without events for longer a time is damaged, for
# sensors are noisy; 14 hours.
MAX_LEAD_US, MAX_GAP_US, MAX_WINDOWS = 10_000_000, 600_000_000, 10**6
BLOCK, UNKNOWN = 1 << 19, 2048  # events read at a time; side that a file leaves open: 11-bit coordinates
# What closes a recording: an event later than any.
END = tuple(np.full(1, value, kind) for value, kind in ((2**63 - 1, "i8"), (0, "i4"), (0, "i4"), (0, "u1")))


# ---- recordings. A reader is a generator: first (height, width), 0 where unknown, then blocks (t, x, y, p) as stored

def read_column(column, start, stop):
    """Values of an HDF5 column, (n,). ValueError where Blosc chunks lie about their sizes: HDF5 would crash.

    Source: README_CHUNK_FORMAT.rst of c-blosc 1.
    """
    blosc = hdf5plugin.BLOSC_ID in column.filter_ids[-1:]
    for at in range(start - start % column.chunks[0], min(stop, len(column)), column.chunks[0]) if blosc else ():
        mask, chunk = column.id.read_direct_chunk((at,) + (0,) * (column.ndim - 1))
        told = np.frombuffer(chunk, "<u4", 4)[1::2].tolist() if not mask else [len(chunk)] * 2  # in memory, in the file
        size = np.prod(column.chunks) * column.dtype.itemsize
        require(told == [size, len(chunk)], f"sizes of a chunk are damaged, events from {at}")
    return column[start:stop].ravel()


def read_h5(recording):
    """HDF5 with t, x, y, p in a group `events` or `CD/events`, height and width as scalars or attributes."""
    with h5py.File(recording.path, "r") as file:
        group = file.get("events", file.get("CD/events"))
        require(isinstance(group, h5py.Group), "no group 'events' or 'CD/events' in this HDF5 file")
        sides = {"height": 0, "width": 0, **file.attrs, **group.attrs, **group}
        yield [int(np.asarray(sides[side]).item()) for side in ("height", "width")]
        columns = [group[key] for key in "txyp"]
        step = max(BLOCK, *((column.chunks or (1,))[0] for column in columns))  # a whole chunk, to decompress it once
        offset = int(file["t_offset"][()]) if "t_offset" in file else 0  # DSEC's
        for i in range(0, min(map(len, columns)), step):
            t, x, y, p = np.broadcast_arrays(*(read_column(column, i, i + step) for column in columns))
            yield t.astype(np.int64) + offset, x, y, p > 0


def read_dat(recording):
    """Prophesee's DAT, versions 1 and 2: text header, event type and size, records of 8 bytes."""
    with open(recording.path, "rb") as file:
        header = {}
        while file.peek(1)[:1] == b"%":
            header |= [(*file.readline(4096).decode("latin1").lower().split(), "", "")[1:3]]
        require(header and file.read(2)[1:] == b"\x08", "not a DAT file of 8-byte events")
        yield [int(header.get(side, 0)) for side in ("height", "width")]
        x_bits, y_bits = (14, 14) if int(header.get("version", 2)) >= 2 else (9, 8)
        while len(block := np.fromfile(file, [("t", "<u4"), ("xyp", "<u4")], BLOCK)):
            t, xyp = block["t"].astype(np.int64), block["xyp"]
            yield t, xyp & (1 << x_bits) - 1, xyp >> x_bits & (1 << y_bits) - 1, xyp >> x_bits + y_bits & 1


def read_faery(recording):
    """EVT2, EVT3 (.raw with a header; .evt2, .evt3 without), AEDAT4, Event Stream, by the optional package faery."""
    with reading("this format needs: pip install faery"):
        import faery
    version = {".evt2": "evt2", ".evt3": "evt3"}.get(recording.path.suffix.lower())  # these have no header
    stream = faery.events_stream_from_file(recording.path, None, (UNKNOWN,) * 2, version, file_type=version and "evt")
    yield [side if side != UNKNOWN else 0 for side in reversed(stream.dimensions())]
    packets = iter(stream)
    while block := list(itertools.islice(packets, 64)):  # of some 10,000 events each
        block = np.concatenate(block)
        yield block["t"].astype(np.int64), block["x"], block["y"], block["on"]


READERS = {".h5": read_h5, ".hdf5": read_h5, ".dat": read_dat, ".raw": read_faery, ".evt2": read_faery,
           ".evt3": read_faery, ".aedat4": read_faery, ".es": read_faery}


class Recording:
    """A recording on disk: path, height, width; height and width as given serve where the file does not tell.

    Once chunks() was read: events; outside: events dropped for not being on the sensor; backwards: events whose time
    was raised to the running maximum; first_us, last_us: times of the first and last event.
    ValueError in one line: unknown format, no such file, unreadable, unknown sensor size, missing package.
    """

    def __init__(self, path, height=0, width=0):
        self.path, self.reader = Path(path), READERS.get(Path(path).suffix.lower())
        self.events = self.outside = self.backwards = self.first_us = self.last_us = 0
        require(self.reader, f"{path}: unknown format; known are {' '.join(READERS)}")
        with reading(path):
            size = next(self.reader(self))
        self.height, self.width = size if all(size) else (height, width)
        require(0 < self.height <= 1 << 13 and 0 < self.width <= 1 << 13,
              f"{path}: a sensor of {self.height} x {self.width} px? Give --height and --width")

    def __str__(self):
        return f"{self.path}, after {self.events} events up to {self.last_us} us"

    def chunks(self):
        """Yield tuples (t int64 us, never decreasing; x, y int32 px; p, above 0: on), none empty, some BLOCK events.

        ValueError names the file and how much of it could be read. A recording without events yields nothing.
        """
        self.__init__(self.path, self.height, self.width)
        with reading(self):
            for t, x, y, p in itertools.islice(self.reader(self), 1, None):
                inside = (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
                t, x, y, p = (column if inside.all() else column[inside] for column in (t, x, y, p))
                self.outside += len(inside) - len(t)
                require(len(inside) <= 100 + 2 * len(t), f"most lie off {self.height} x {self.width} px: damaged?")
                if len(t):
                    raised = np.maximum(np.maximum.accumulate(t), self.last_us if self.events else t[0])
                    gap = np.diff(raised, prepend=self.last_us if self.events else raised[0]).view(np.uint64).max()
                    require(gap <= MAX_GAP_US and raised[-1] < 2**62, f"a gap of {gap} us, or 2^62 us: a damaged time?")
                    self.backwards += int(np.count_nonzero(raised > t))
                    self.first_us = self.first_us if self.events else int(t[0])
                    self.events, self.last_us = self.events + len(t), int(raised[-1])
                    yield raised, x.astype(np.int32, copy=False), y.astype(np.int32, copy=False), p


def windows(recording, ends_us=None):
    """Yield the events (t, x, y, p) of each window [end - WINDOW_US, end], both ends included, in bounded memory.

    ends_us: ascending window ends, which may overlap, leave gaps or lie beyond the recording; None: every WINDOW_US
    from the first event on until the last event is out. Empty windows are four empty arrays.
    """
    chunks = itertools.chain(recording.chunks(), [END])
    events = next(chunks)
    for end in itertools.count(recording.first_us + WINDOW_US, WINDOW_US) if ends_us is None else ends_us:
        while events[0][-1] <= end:
            first = np.searchsorted(events[0], end - WINDOW_US, side="left")
            events = tuple(np.concatenate((old[first:], new)) for old, new in zip(events, next(chunks)))
        if ends_us is None and recording.last_us <= end - WINDOW_US:
            return
        require(ends_us is None or end <= recording.last_us or ends_us[-1] - recording.last_us <= MAX_GAP_US,
              f"{recording.path} ends at {recording.last_us} us, its labels later than {end}")
        first, last = (np.searchsorted(events[0], *edge) for edge in ((end - WINDOW_US, "left"), (end, "right")))
        yield tuple(column[first:last] for column in events)


# ---- labels

def read_labels(path):
    """Labels (L,) of BOX_DTYPE in order of time; older files call `t` and `class_confidence` `ts` and `confidence`.

    track_id and confidence are 1 where absent. ValueError names the file: unreadable, other fields missing.
    """
    with reading(path), np.errstate(invalid="ignore"):
        stored = np.load(path, allow_pickle=False).ravel()
        stored.dtype.names = [{"ts": "t", "confidence": "class_confidence"}.get(n, n) for n in stored.dtype.names]
        boxes = np.ones(len(stored), BOX_DTYPE)
        for name in set(BOX_DTYPE.names) - {"track_id", "class_confidence"}.difference(stored.dtype.names):
            boxes[name] = stored[name]
        return boxes[np.argsort(boxes["t"], kind="stable")]


def filter_boxes(boxes, height, width, num_classes, box_filter, train):
    """Boxes (L,) cropped to [0, width-1] x [0, height-1] -> those kept, {reason to drop: number}, by RVT's rules.

    prophesee: the limits of Prophesee's evaluation, 60 px diagonal and 20 px sides at a width of 1280 (30 and 10 on
    Gen1's 304), in proportion on other sensors. sides5: 5 px sides. Boxes wider than 9/10 of the frame are faults and
    not trained on.
    """
    for corner, side, limit in (("x", "w", width - 1), ("y", "h", height - 1)):
        edges = np.clip((boxes[corner], boxes[corner] + boxes[side]), 0, limit)
        boxes[corner], boxes[side] = edges[0], edges[1] - edges[0]
    w, h = boxes["w"], boxes["h"]
    unit = 10 if width == 304 else 20 * width / 1280
    side, diagonal = {"none": (0, 0), "sides5": (5, 0), "prophesee": (unit, 3 * unit)}[box_filter]
    good = {"of unknown class": boxes["class_id"] < num_classes, "off the frame": (w > 0) & (h > 0),  # False for NaN
            "too small": (w >= side) & (h >= side) & (w ** 2 + h ** 2 >= diagonal ** 2),
            "too wide": w <= (9 * width // 10 if train else width)}
    return boxes[np.all([*good.values()], 0)], {f"boxes {why}": int((~fine).sum()) for why, fine in good.items()}


def label_frames(times, grid_us):
    """Ascending label times (L,) us -> times (M,) of the labelled frames, us between window ends.

    RVT's rule: the first at or after 100 ms, then each within JITTER_US of a whole number of base steps after the last.
    Ours: any label rate; and where no later label is in phase any more, the next one that is off the grid of labels
    altogether starts a new phase (labels on that grid that RVT leaves out are the short tail of a recording).
    """
    interval = np.median(np.diff(times)) if len(times) > 1 else 100_000
    base = grid_us or int(max(1, np.rint(100_000 / interval)) * interval)
    frames, later = [], times[times >= FIRST_LABEL_US]
    while len(later):
        frames.append(int(later[0]))
        later = later[later - frames[-1] >= base - JITTER_US]
        off_base, off_labels = ((later - frames[-1] + JITTER_US) % us > 2 * JITTER_US for us in (base, interval))
        later = later[np.maximum.accumulate(off_labels if off_base.all() else ~off_base)]  # from the first such on
    return np.array(frames, np.int64), base / (2 if grid_us else max(1, round(base / WINDOW_US)))


def window_ends(frames, spacing_us, first_us):
    """Times (N,) us at which windows end: every 50 ms up to the first frame (the earliest left out, as RVT does), then
    equally spaced between frames, some spacing_us apart, one at each frame. first_us: of the recording."""
    start = first_us if first_us > MAX_LEAD_US else 0
    counts = np.maximum(1, np.rint(np.diff(frames) / spacing_us)).astype(np.int64)
    require(counts.sum() + (frames[0] - start) // WINDOW_US <= MAX_WINDOWS, f"times to {frames[-1]}: not microseconds?")
    lead = range(frames[0], start, -WINDOW_US)[:0:-1][1:]  # ascending, without the frame and the earliest
    between = [np.linspace(*ends, count + 1)[:-1] for *ends, count in zip(frames, frames[1:], counts)]
    return np.concatenate((lead, *between, frames[-1:])).astype(np.int64)


# ---- sequences

def write_sequence(folder, recording, ends, frames, boxes, downsample):
    """Write a prepared sequence into a new folder; returns {what: number} about it.

    ends (N,) us of windows, None: as many as the recording has; frames (M,) us of labelled frames; boxes (L,) of BOX_DTYPE.
    """
    target, labels = folder / "event_representations_v2" / f"stacked_histogram_dt=50_nbins={BINS}", folder / "labels_v2"
    target.mkdir(parents=True)
    labels.mkdir()
    half, empty, H, W = int(downsample != "none"), 0, recording.height, recording.width
    shape = 2 * BINS, H >> half, W >> half  # "_ds2_nearest" for sums too: it is the name that readers know
    with h5py.File(target / f"event_representations{'_ds2_nearest' * half}.h5", "w") as file:
        data = file.create_dataset("data", (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape),
                                   **hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE))
        for count, events in enumerate(windows(recording, ends), 1):
            data.resize(count, axis=0)
            data[-1] = histogram(*events, H, W, downsample)
            empty += not len(events[0])
        ends = recording.first_us + WINDOW_US * np.arange(1, len(data) + 1) if ends is None else ends
    np.save(target / "timestamps_us.npy", ends)
    np.save(target / "objframe_idx_2_repr_idx.npy", np.searchsorted(ends, frames))
    np.save(labels / "timestamps_us.npy", frames)
    np.savez(labels / "labels.npz", labels=boxes, objframe_idx_2_label_idx=np.searchsorted(boxes["t"], frames))
    return {"windows": len(ends), "labelled frames": len(frames), "boxes": len(boxes), "windows empty": empty,
            "events off the sensor": recording.outside, "times raised": recording.backwards}


def prepare_sequence(job):
    """Prepare one sequence, job = (split, name, files, options), under its name once it is complete.

    Returns (outcome, line of report, (height, width) or ()); outcome: "prepared", "skipped" (no labels left) or
    "failed" (a damaged file).
    """
    split, name, files, options = job
    final = Path(options.dst, split, name)
    try:
        recording = Recording(files["events"], options.height, options.width)
        size = recording.height, recording.width
        boxes = read_labels(files["labels"]) if "labels" in files else np.zeros(0, BOX_DTYPE)
        boxes, found = filter_boxes(boxes, *size, len(options.class_names), options.box_filter, split == "train")
        frames, spacing_us = label_frames(np.unique(boxes["t"]), options.grid_us)
        next(recording.chunks(), None)  # tells when it starts
        if len(frames) or "labels" not in files and recording.events:
            with reading(files.get("labels")):
                ends = window_ends(frames, spacing_us, recording.first_us) if len(frames) else None
            boxes = boxes[np.isin(boxes["t"], frames)]
            with TemporaryDirectory(dir=Path(options.dst, ".partial")) as partial:
                found |= write_sequence(Path(partial, name), recording, ends, frames, boxes, options.downsample)
                final.parent.mkdir(exist_ok=True)
                Path(partial, name).rename(final)
    except ValueError as error:
        return "failed", str(error), ()
    report = ", ".join(f"{number} {what}" for what, number in found.items() if number)
    return "prepared" if "windows" in found else "skipped", f"{split}/{name}: {report or 'no labels'}", size


def run_jobs(function, jobs, num_workers):
    """Yield function(job) for each job in order: done here, or with num_workers > 0 in that many processes.

    ValueError, with num_workers, if a job raises or a process dies.
    """
    if num_workers < 1:
        yield from map(function, jobs)
        return
    # Ctrl-C ends each process at once and in silence.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        with reading(f"num_workers={num_workers}, fewer take less memory"):
            yield from pool.map(function, jobs)


# ---- data sets

def find_sequences(folder):
    """[(split, name, {"events": path, "labels": path})] below a folder, in order; ValueError where there is none."""
    found = {}
    for path in sorted(Path(folder).glob("*/[!.]*")):
        split, kind = path.parent.name, "labels" if path.name.endswith("_bbox.npy") else "events"
        if split in ("train", "val", "test") and (kind == "labels" or path.suffix.lower() in READERS):
            name = path.stem.removesuffix("_bbox").removesuffix(".dat").removesuffix("_td")
            found.setdefault((split, name), {"events": f"no recording beside {path}"})[kind] = path
    require(found, f"{folder}: no recordings in its folders train, val and test")
    return [(*key, files) for key, files in found.items()]


def prepare(src, dst, dataset="own", num_workers=0, **changes):
    """Prepare the data set below src into dst; returns {outcome: number of sequences}. Reports what is odd about each.

    changes: box_filter, downsample, class_names, height, width, where they are not the data set's. ValueError: src or
    an option is wrong, dst was prepared otherwise; or, once all others are prepared, files are damaged.
    """
    settings = dict(zip(OPTIONS, DATASETS.get(dataset, DATASETS["own"]))) | {k: v for k, v in changes.items() if v}
    options = SimpleNamespace(**settings, dataset=dataset, dst=dst)
    for key, choices in CHOICES.items():
        require(getattr(options, key) in choices, f"{key}={getattr(options, key)!r}: expected {', '.join(choices)}")
    sequences, path = find_sequences(src), Path(dst, "dataset.json")
    if not options.class_names:
        ids = np.concatenate([[0], *(read_labels(f["labels"])["class_id"] for *_, f in sequences if "labels" in f)])
        options.class_names = [str(k) for k in range(int(ids[ids < 1 << 16].max()) + 1)]  # larger: damaged
    about = dict(classes=list(options.class_names), box_filter=options.box_filter, downsample=options.downsample)
    with reading(path):
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else about
        require(before | about == before, f"prepared with other classes or options; remove {dst} or take another --dst")
    Path(dst, ".partial").mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(before))
    jobs = [(*sequence, options) for sequence in sequences if not Path(dst, *sequence[:2]).exists()]
    lines = {"there already": [""] * (len(sequences) - len(jobs)), "failed": []}
    for outcome, line, size in tqdm(run_jobs(prepare_sequence, jobs, num_workers), "prepare", len(jobs), unit="seq"):
        lines.setdefault(outcome, []).append(line)
        before |= zip(("height", "width"), size)
        write(path, json.dumps(before))
        tqdm.write(f"{outcome}: {line}")
    shutil.rmtree(Path(dst, ".partial"))
    failed = lines.pop("failed")
    require(not failed, f"{len(failed)} of {len(jobs)} failed, the others are in {dst}: {''.join(failed[:1])}")
    return {outcome: len(reported) for outcome, reported in lines.items() if reported}


def main(argv):
    print(*(f"{count} {outcome}" for outcome, count in prepare(**configure(defaults, argv)).items()), sep=", ")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # h5py's callbacks swallow KeyboardInterrupts; the next run tidies up
    command_line(main)

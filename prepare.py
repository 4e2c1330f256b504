"""Raw event recordings and labels -> prepared sequences in RVT's layout; also demo.py's reader.

In:  SRC/{train,val,test}/NAME_td.h5, NAME_td.dat.h5, NAME_td.dat, NAME.raw, ... with NAME_bbox.npy;
     a recording without labels is prepared for inference: windows from its first event to its last.
Out: DST/{train,val,test}/NAME/{event_representations_v2,labels_v2}/... and DST/dataset.json.
     An interrupted run resumes.

    python prepare.py --src=RAW --dst=OUT --dataset=etram --num_workers=8
"""

import itertools
import json
import math
import shutil
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import h5py
import hdf5plugin
import numpy as np
from tqdm import tqdm

from configurator import command_line, configure
from formats import (
    BOX_DTYPE,
    CHANNELS,
    FILES,
    REPRESENTATION,
    SCALES,
    WINDOW_US,
    check_blosc,
    check_names,
    histogram,
    new_h5,
    reading,
    write,
)

defaults = {
    "src": "datasets/raw",  # raw recordings in folders train, val and test
    "dst": "datasets/prepared",  # what they are made into
    "dataset": "own",  # etram | gen4 | gen1 | own; it decides what is empty or 0 below
    "class_names": (),  # by class id; own data: "0", "1", ... up to the largest in labels
    "box_filter": "",  # none | sides5 | prophesee, which drops small objects: see filter_boxes
    "downsample": "",  # none | nearest (RVT's: odd rows and columns) | sum (2x2 pixels)
    "height": 0,  # px, of recordings that do not tell
    "width": 0,
    "num_workers": 0,  # processes; 0: all in this one
}

# grid_us: between labelled frames; 0: the whole number of label intervals nearest to FRAME_US.
DATASETS = {
    "etram": {
        "height": 720,
        "width": 1280,
        "class_names": (
            "pedestrian", "car", "bicycle", "bus", "motorbike", "truck", "tram", "wheelchair",
        ),
        "box_filter": "sides5",
        "downsample": "nearest",
        "grid_us": 0,
    },
    "gen4": {
        "height": 720,
        "width": 1280,
        "class_names": ("pedestrian", "two-wheeler", "car"),
        "box_filter": "sides5",
        "downsample": "nearest",
        "grid_us": 0,
    },
    "gen1": {
        "height": 240,
        "width": 304,
        "class_names": ("car", "pedestrian"),
        "box_filter": "prophesee",
        "downsample": "none",
        "grid_us": 250_000,
    },
    "own": {
        "box_filter": "none",
        "downsample": "none",
        "grid_us": 0,
    },
}
BOX_FILTERS = ("none", "sides5", "prophesee")
SPLITS = ("train", "val", "test")

BLOCK = 1 << 19  # events read at a time
UNKNOWN = 0xFFFF  # side of a sensor, where a file does not tell it
MAX_PIXELS = 1 << 26  # of a sensor
FEW = 100  # events around a damaged time that tell what it should be
LATE_US = 10_000  # time that an event may be late by, if it is not one of few
MAX_GAP_US = 600_000_000  # without events for longer a time is damaged: sensors are noisy
MAX_EVENTS_PER_US = 1_000  # no sensor is faster
MAX_LEAD_US = 10_000_000  # a clock that starts later is not filled with windows from 0 on
FRAME_US = 100_000  # between labelled frames, about; the earliest labelled frame
JITTER_US = 2_000  # how far off the grid of labels a label may be, or off the others of a frame
MAX_CLASSES = 1_000  # without names
FAST_US = 1_000  # labels that all follow one another faster are of another unit
SLOW_US = 4_000_000  # where all are further apart, times may be nanoseconds
# What is likely where the recording lasts 10**key times as long as its labels.
CAUSES = {
    3: "labels in milliseconds or events in nanoseconds",
    6: "labels in seconds",
    -3: "events in milliseconds or labels in nanoseconds",
    -6: "events in seconds",
}


# ---- recordings
#
# A reader is a generator: first (height, width) in px, 0 where the file does not tell, then blocks
# of events (t us, x, y, p: on where above 0) in the order of the file. Another format takes one
# such function and one line in READERS.


def read_rows(column, start):
    """BLOCK values of an HDF5 column. ValueError: a filter is missing, a Blosc chunk is damaged."""
    for number in column.filter_ids:
        if not h5py.h5z.filter_avail(number):
            raise ValueError(
                f"HDF5 filter {number} is missing (36559 is Prophesee's ECF): set HDF5_PLUGIN_PATH "
                "to the folder that holds it, or convert the recording to RAW")
    if column.filter_ids[-1:] == (hdf5plugin.BLOSC_ID,):
        rows = column.chunks[0]
        for row in range(start - start % rows, min(start + BLOCK, len(column)), rows):
            skipped, chunk = column.id.read_direct_chunk((row,))
            if not skipped:
                check_blosc(chunk, rows * column.dtype.itemsize)
    return column[start:start + BLOCK]


def whole(pixels):
    """Coordinates (n,) as integers, of 4 bytes where they fit. ValueError: fractions."""
    if pixels.dtype.kind == "f" and (pixels % 1 > 0).any():
        raise ValueError("x or y has fractions; give whole pixels")
    return pixels.astype(np.int32 if pixels.dtype.itemsize < 4 else np.int64)


def read_h5(path):
    """HDF5: columns t, x, y, p in a group `events` or `CD/events`, or a table there (Metavision).

    height, width and DSEC's t_offset are scalars or attributes, in the group or at the root.
    """
    # No lock: network file systems have none. Large chunks fit, so that each is decompressed once.
    with h5py.File(path, "r", locking=False, rdcc_nbytes=1 << 25) as file:
        events = file.get("events", file.get("CD/events", file))
        table = isinstance(events, h5py.Dataset)
        names = (events.dtype.names or ["a plain array"]) if table else list(events)
        if not set("txyp") <= set(names):
            raise ValueError(f"{events.name} holds {', '.join(names)}; expected t, x, y, p")
        columns = [events] if table else [events[key] for key in "txyp"]
        if {column.shape for column in columns} != {(len(columns[0]),)}:
            raise ValueError("t, x, y and p are not columns of one length")
        told = {"height": 0, "width": 0, "t_offset": 0, **file, **file.attrs, **events.attrs}
        told |= events.parent if table else events
        height, width, t_offset = [
            int(np.asarray(told[key]).item()) for key in ("height", "width", "t_offset")]
        yield height, width
        for start in range(0, len(columns[0]), BLOCK):
            rows = [read_rows(column, start) for column in columns]
            if table:
                rows = [rows[0][key] for key in "txyp"]
            t, x, y, p = rows
            yield t.astype(np.int64) + t_offset, whole(x), whole(y), p


def read_dat(path):
    """Prophesee's DAT: a header of text, event type and size, then 8 bytes an event."""
    with open(path, "rb") as file:
        words = []
        while file.peek(1)[:1] == b"%":
            words += file.readline(4096).lower().split()
        if not words or file.read(2)[1:] != b"\x08":
            raise ValueError("not a DAT file of 8-byte events")
        told = dict(zip(words, words[1:]))
        yield int(told.get(b"height", 0)), int(told.get(b"width", 0))
        events, rest = divmod(path.stat().st_size - file.tell(), 8)
        if rest:
            raise ValueError("ends within an event: truncated? Copy or download it again")
        for _ in range(0, events, BLOCK):
            t, xyp = np.fromfile(file, "<u4", 2 * BLOCK).reshape(-1, 2).T
            xyp = xyp.astype(np.int32)
            yield t, xyp & 0x3FFF, xyp >> 14 & 0x3FFF, xyp >> 28 & 1


def read_faery(path):
    """EVT2, EVT3 (.raw with a header; .evt2, .evt3 without), AEDAT4, Event Stream, by faery."""
    with reading("this format needs: pip install faery"):
        import faery
    given = {}
    if path.suffix in (".evt2", ".evt3"):  # no header tells
        given = {"version_fallback": path.suffix[1:], "file_type": "evt"}
    stream = faery.events_stream_from_file(path, dimensions_fallback=(UNKNOWN, UNKNOWN), **given)
    yield [side % UNKNOWN for side in reversed(stream.dimensions())]  # 0 where unknown
    for events in stream:
        yield events["t"], events["x"], events["y"], events["on"]


READERS = {
    ".h5": read_h5,
    ".hdf5": read_h5,
    ".dat": read_dat,
    ".raw": read_faery,
    ".evt2": read_faery,
    ".evt3": read_faery,
    ".aedat4": read_faery,
    ".es": read_faery,
}


def unwrapped(t, before):
    """Times (n,) us of a clock of 32 bits, which starts again at 0, as ever growing ones.

    before: the time before the first. Late events may lie on both sides of a new start.
    """
    jumps = np.diff(t, prepend=before)
    turns = np.sign(jumps) * (np.abs(np.abs(jumps) - 2**32) < MAX_GAP_US)
    return t - 2**32 * np.cumsum(turns)


def far_off(t):
    """Which of the times (n,) us are damaged, being far from those around them: bool (n,).

    Where the time falls by more than LATE_US: those that are ahead of the FEW events after the fall
    by as much, if they are fewer than half of those. And those that lie more than MAX_GAP_US before
    the first or after the last events.
    """
    far = (t < np.median(t[:FEW]) - MAX_GAP_US) | (t > np.median(t[-FEW:]) + MAX_GAP_US)
    for fall in np.flatnonzero(np.diff(t) < -LATE_US)[:1000] + 1:
        after = t[fall:fall + FEW]
        before = slice(max(fall - FEW, 0), fall)
        ahead = t[before] > np.median(after) + LATE_US
        if 2 * np.count_nonzero(ahead) < len(after):
            far[before] |= ahead
    return far


class Recording:
    """A recording on disk: path, height, width in px (as given, where the file does not tell).

    While chunks() is read, as by read(): events, how many; first_us, last_us, their times; outside,
    dropped for not being on the sensor; far, dropped for a damaged time; backwards, whose time was
    raised to the running maximum; polarities, the extremes of p.
    ValueError in one line: unknown format, no such file, unreadable, unknown size, no package.
    """

    def __init__(self, path, height=0, width=0):
        self.path = Path(path)
        self.reader = READERS.get(self.path.suffix.lower())
        if self.reader is None:
            raise ValueError(f"{path}: unknown format; known are {' '.join(READERS)}")
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file")
        with reading(path):
            told = list(next(self.reader(self.path)))
        self.height, self.width = told if all(told) else (height, width)
        if not 0 < self.height * self.width < MAX_PIXELS:
            raise ValueError(f"{path}: the sensor's size? Give --height and --width in pixels")

    def in_order(self, t, x, y, p, before):
        """The events with times that never decrease; counts those that it drops and raises.

        before: the time before the first.
        ValueError: a long gap, or more than a few are late by more than LATE_US.
        """
        given = t[-1]
        t = unwrapped(t, before)
        self.turns_us += t[-1] - given  # for the blocks that follow
        near = ~far_off(t)
        t, x, y, p = t[near], x[near], y[near], p[near]
        self.far += len(near) - len(t)
        if len(t) == 0:
            raise ValueError(f"times jump by over {MAX_GAP_US} us and back; several recordings?")
        # RVT's rule for events that come a little late.
        start = self.last_us if self.events else t[0]
        raised = np.maximum(np.maximum.accumulate(t), start)
        self.backwards += np.count_nonzero(raised > t)
        few = min(FEW, len(t) // 2 + 1) + len(t) // 100  # some cameras' blocks are small
        if np.count_nonzero(raised > t + LATE_US) > few:
            raise ValueError(f"events are out of order by over {LATE_US} us; sort them by time")
        if np.diff(raised, prepend=start).max() > MAX_GAP_US:
            raise ValueError(f"no events for over {MAX_GAP_US} us after {start}: a damaged time?")
        return raised, x, y, p

    def chunks(self):
        """Yield tuples (t int64 us, never decreasing; x, y px; p, above 0: on), none empty.

        ValueError names the file.
        """
        self.events = self.outside = self.far = self.backwards = 0
        self.first_us = self.last_us = self.turns_us = 0
        self.polarities = set()
        with reading(self.path):
            for t, x, y, p in itertools.islice(self.reader(self.path), 1, None):
                inside = (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
                if not inside.all():
                    t, x, y, p = t[inside], x[inside], y[inside], p[inside]
                self.outside += len(inside) - len(t)
                if self.outside > FEW + (self.events + len(t)) // 10:
                    raise ValueError("many events lie off the sensor: --height, --width?")
                if len(t) == 0:
                    continue
                t = t.astype(np.int64) + self.turns_us
                before = self.last_us if self.events else t[0]
                jumps = np.diff(t, prepend=before)
                # Most blocks are in order as they are.
                if jumps.min() < 0 or jumps.max() > MAX_GAP_US:
                    t, x, y, p = self.in_order(t, x, y, p, before)
                if self.events == 0:
                    self.first_us = int(t[0])
                self.last_us = int(t[-1])
                self.events += len(t)
                self.polarities |= {p.min().item(), p.max().item()}
                yield t, x, y, p

    def read(self):
        """Read all of it, which checks and counts it."""
        for _ in self.chunks():
            pass


def regular_ends(recording):
    """Ends (N,) us of windows side by side that hold all events of a recording that was read."""
    return np.arange(recording.first_us + WINDOW_US, recording.last_us + WINDOW_US, WINDOW_US)


def windows(recording, ends_us=None):
    """Yield the events (t, x, y, p) of each window [end - WINDOW_US, end], both ends included.

    ends_us: ascending window ends, which may overlap, leave gaps or lie beyond the recording; None:
    regular_ends, for which the recording is read twice. Empty windows are four empty arrays. In
    memory: the events of a window and of a block.
    """
    if ends_us is None:
        recording.read()
        ends_us = regular_ends(recording)
    never = [np.array([np.iinfo(np.int64).max])] * 4  # an event after all windows
    chunks = itertools.chain(recording.chunks(), [never])
    events = next(chunks)
    for end in ends_us:
        # Read on until an event lies after the window.
        while events[0][-1] <= end:
            events = [np.concatenate(columns) for columns in zip(events, next(chunks))]
        # What lies before this window lies before all later ones.
        first = np.searchsorted(events[0], end - WINDOW_US)
        events = [column[first:] for column in events]
        last = np.searchsorted(events[0], end, side="right")
        yield [column[:last] for column in events]


# ---- labels


def read_labels(path):
    """Labels (L,) of BOX_DTYPE in order of time.

    Older files call `t` and `class_confidence` `ts` and `confidence`. track_id and confidence are 1
    where absent. ValueError names the file: unreadable, other fields missing.
    """
    renamed = {"ts": "t", "confidence": "class_confidence"}
    what = f"{path} (expected: an array with fields {' '.join(BOX_DTYPE.names)})"
    with reading(what), np.errstate(invalid="ignore"), open(path, "rb") as file:
        stored = np.lib.format.read_array(file).ravel()
        stored.dtype.names = [renamed.get(name, name) for name in stored.dtype.names]
        boxes = np.ones(len(stored), BOX_DTYPE)
        for name in BOX_DTYPE.names:
            if name in stored.dtype.names or name not in ("track_id", "class_confidence"):
                boxes[name] = stored[name]
        if (boxes["class_id"] != stored["class_id"]).any():
            raise ValueError("a class_id is below 0, or no whole number")
        if not np.isfinite(stored["t"]).all():
            raise ValueError("a time is not finite")
        some = boxes[boxes["w"] > 0]
        if len(some) and max(np.median(some[name]) for name in "xywh") <= 1:
            raise ValueError("boxes in fractions of the frame; pixels are needed")
        turned = unwrapped(boxes["t"], boxes["t"][:1])
        if (np.diff(turned) > -LATE_US).all():  # else they are in another order, by track say
            boxes["t"] = turned
        return boxes[np.argsort(boxes["t"], kind="stable")]


def filter_boxes(boxes, height, width, num_classes, box_filter, train):
    """Boxes (L,) cropped to [0, width-1] x [0, height-1] -> those kept, {what: number} about it.

    prophesee: the limits of Prophesee's evaluation, 60 px diagonal and 20 px sides at a width of
    1280 (30 and 10 on Gen1's 304), in proportion on other sensors. sides5: 5 px sides. Boxes wider
    than 9/10 of the frame are faults and not trained on. Source: RVT, preprocess_dataset.py.
    ValueError: w and h seem to be x2 and y2.
    """
    finite = np.isfinite(boxes["x"] + boxes["y"] + boxes["w"] + boxes["h"])
    about = {"boxes not finite": np.count_nonzero(~finite)}
    boxes = boxes[finite]
    x, y, w, h = [boxes[name] for name in "xywh"]  # views: what is written there is in boxes
    reach = np.maximum((x + w) / width, (y + h) / height)
    about["boxes cropped at right or lower edge"] = np.count_nonzero(reach > 1)
    could_be_corners = (w > x) & (h > y)
    if len(boxes) > 10 and np.mean(reach > 1.1) > 0.5 and could_be_corners.all():
        raise ValueError("most boxes leave the frame: are w and h the other corner, x2 and y2?")
    for corner, side, limit in ((x, w, width - 1), (y, h, height - 1)):
        end = np.clip(corner + side, 0, limit)
        corner[:] = np.clip(corner, 0, limit)
        side[:] = end - corner
    unit = 10 if width == 304 else 20 * width / 1280
    limits = {"none": (0, 0), "sides5": (5, 0), "prophesee": (unit, 3 * unit)}
    least, diagonal = limits[box_filter]
    widest = 9 * width // 10 if train else width
    fine = {  # reason to drop: which boxes it spares
        "boxes of unknown class": boxes["class_id"] < num_classes,
        "boxes off the frame": (w > 0) & (h > 0),
        "boxes too small": (np.minimum(w, h) >= least) & (w ** 2 + h ** 2 >= diagonal ** 2),
        "boxes too wide": w <= widest,
    }
    about |= {reason: np.count_nonzero(~good) for reason, good in fine.items()}
    return boxes[np.all([*fine.values()], axis=0)], about


def joined(times):
    """Ascending label times (L,) us; bursts shorter than JITTER_US get the first time of theirs."""
    times = times.copy()
    for burst in np.split(times, np.flatnonzero(np.diff(times) >= JITTER_US) + 1):
        if (burst - burst[:1] < JITTER_US).all():
            burst[:] = burst[:1]
    return times


def label_frames(times, grid_us):
    """Ascending label times (L,) us -> times (M,) of the labelled frames, us between window ends.

    RVT's rule: the first at or after FRAME_US, then each that is in phase: a whole number of base
    steps after the last one, to JITTER_US. Base step: the whole number of label intervals nearest
    to FRAME_US, or grid_us. Ours: one out of phase is kept too and starts a new phase, if it comes
    FRAME_US after the last one or up to half an interval earlier; but not those that RVT leaves out
    of labels at its rates, 30 and 60 Hz: whole intervals after the last one.
    """
    gaps = np.diff(times)
    interval = np.median(gaps) if len(gaps) else FRAME_US
    base = grid_us or int(max(1, round(FRAME_US / interval)) * interval)
    spacing_us = base / 2 if grid_us else base / round(base / WINDOW_US)
    hertz = round(1_000_000 / interval)
    grid = interval
    # Where many labels of 60 Hz are missing, the median is two of their intervals.
    if hertz == 30 and np.mean(gaps < 0.6 * interval) > 0.1:
        grid = interval / 2
    times = times[times >= FRAME_US].tolist()
    frames = times[:1]
    for time in times[1:]:
        since = time - frames[-1]
        in_phase = since > JITTER_US and abs(math.remainder(since, base)) <= JITTER_US
        on_grid = hertz in (30, 60) and abs(math.remainder(since, grid)) <= JITTER_US
        late_enough = since > FRAME_US - min(interval, FRAME_US) / 2
        if in_phase or (late_enough and not on_grid):
            frames.append(time)
    return np.array(frames, np.int64), spacing_us


def check_clocks(recording, times, frames):
    """ValueError if events, all read, and labels at times (L,) us seem to be of different clocks.

    They are if most labelled frames (M,) us, or else labels, lie outside the recording, one ends
    300 times as late as the other, or many labels follow one another faster than FAST_US, except
    for the boxes of a single frame. Or if there are more events than microseconds can hold.
    """
    first = recording.first_us
    last = recording.last_us
    if len(times):
        seen = frames if len(frames) else times
        inside = np.mean((seen >= first) & (seen <= last + WINDOW_US))
        magnitude = np.log10(max(last, 1) / max(times[-1], 1))
        fast = len(times) > 10 and np.diff(times).max() < FAST_US
        one_frame = np.ptp(times) < JITTER_US and min(times[0], last - first) >= FRAME_US
        if inside < 0.5 or abs(magnitude) > 2.5 or (fast and not one_frame):
            cause = CAUSES.get(3 * round(magnitude / 3), "another zero, or another unit")
            raise ValueError(
                f"{recording.path}: events from {first} to {last} us, labels from {times[0]} to "
                f"{times[-1]} us: {cause}? Both need microseconds of one clock")
    if recording.events > MAX_EVENTS_PER_US * (1 + last - first):
        raise ValueError(f"{recording.path}: too many events a us: another unit of time?")


def window_ends(frames, spacing_us, first_us):
    """Times (N,) us at which windows end, for labelled frames (M,); first_us: of the recording.

    Every 50 ms up to the first frame (the earliest left out, as RVT does), then equally spaced
    between frames, some spacing_us apart, one at each frame.
    """
    start = first_us if first_us > MAX_LEAD_US else 0
    earlier = np.arange(frames[0] - WINDOW_US, start, -WINDOW_US)[::-1]
    ends = [earlier[1:]]
    for before, after in itertools.pairwise(frames):
        count = max(1, round((after - before) / spacing_us))
        ends.append(np.linspace(before, after, count, endpoint=False, dtype=np.int64))
    return np.concatenate([*ends, frames[-1:]])


# ---- sequences


def write_sequence(folder, recording, ends, frames, boxes, downsample):
    """Write a prepared sequence into a new folder.

    ends (N,) us of windows, frames (M,) us of labelled frames, boxes (L,).
    """
    events = folder / REPRESENTATION
    labels = folder / "labels_v2"
    events.mkdir(parents=True)
    labels.mkdir()
    H, W = recording.height, recording.width
    scale = SCALES[downsample]
    frame = (CHANNELS, H // scale, W // scale)
    blosc = hdf5plugin.Blosc(cname="zstd", clevel=1)
    with new_h5(events / FILES["full" if scale == 1 else "half"]) as file:
        data = file.create_dataset(
            "data", (len(ends), *frame), "u1", maxshape=(None, *frame), chunks=(1, *frame), **blosc)
        for index, window in enumerate(windows(recording, ends)):
            data[index] = histogram(*window, H, W, downsample)
    np.save(events / "timestamps_us.npy", ends)
    np.save(events / "objframe_idx_2_repr_idx.npy", np.searchsorted(ends, frames))
    np.save(labels / "timestamps_us.npy", frames)
    first = np.searchsorted(boxes["t"], frames)
    np.savez(labels / "labels.npz", labels=boxes, objframe_idx_2_label_idx=first)


def about_times(recording, frames):
    """{what: number} about the times of a recording, all read, and of labelled frames (M,) us."""
    about = {
        "labelled frames before the first event": np.count_nonzero(frames < recording.first_us),
        "labelled frames after the last event": np.count_nonzero(frames > recording.last_us),
        "events off the sensor": recording.outside,
        "events with a damaged time": recording.far,
        "times raised": recording.backwards,
    }
    if len(frames) > 1 and np.diff(frames).min() > SLOW_US:
        about["us between labels (are all times in nanoseconds?)"] = frames[1] - frames[0]
    duration = recording.last_us - recording.first_us
    if duration < FRAME_US:
        about["us long in all (are times in microseconds?)"] = duration
    if {value > 0 for value in recording.polarities} != {False, True}:
        about[f"events of one polarity only, p is {recording.polarities}"] = recording.events
    return about


def prepare_sequence(job):
    """Prepare one sequence, job = (split, name, files, options); it appears once it is complete.

    Returns (outcome, line of report, (height, width) or ()).
    outcome: "prepared", "skipped" (no events, no labels left) or "failed".
    """
    split, name, files, options = job
    partial = Path(options.dst, ".partial", split, name)
    final = Path(options.dst, split, name)
    outcome = "skipped"
    try:
        if "events" not in files:
            raise ValueError(f"no recording beside {files['labels']}")
        recording = Recording(files["events"], options.height, options.width)
        size = recording.height, recording.width
        boxes = np.zeros(0, BOX_DTYPE)
        if "labels" in files:
            boxes = read_labels(files["labels"])
        with reading(files.get("labels")):
            boxes, report = filter_boxes(
                boxes, *size, len(options.class_names), options.box_filter, split == "train")
        # Which of the times of labels are labelled frames.
        times = np.unique(boxes["t"])
        boxes["t"] = joined(boxes["t"])
        instants = np.unique(boxes["t"])
        frames, spacing_us = label_frames(instants, options.grid_us)
        report["label times left out"] = len(instants) - len(frames)
        kept = boxes[np.isin(boxes["t"], frames)]
        report["classes gone with them"] = len(np.setdiff1d(boxes["class_id"], kept["class_id"]))
        boxes = kept
        recording.read()
        if recording.events:
            check_clocks(recording, times, frames)
        if recording.first_us < recording.last_us and (len(frames) or "labels" not in files):
            if len(frames):
                ends = window_ends(frames, spacing_us, recording.first_us)
            else:
                ends = regular_ends(recording)
            report |= {"windows": len(ends), "labelled frames": len(frames), "boxes": len(boxes)}
            report |= about_times(recording, frames)
            write_sequence(partial, recording, ends, frames, boxes, options.downsample)
            final.parent.mkdir(exist_ok=True)
            partial.rename(final)
            outcome = "prepared"
    except ValueError as error:
        return "failed", str(error), ()
    told = ", ".join(f"{number} {what}" for what, number in report.items() if number)
    return outcome, f"{split}/{name}: {told or 'no labels, or no events over time'}", size


def run_jobs(function, jobs, num_workers):
    """Yield function(job) for each job in order, done in num_workers processes; 0: in this one.

    ValueError, with num_workers, if a job raises or a process dies.
    """
    if num_workers < 1:
        yield from map(function, jobs)
        return
    # Ctrl-C ends each process at once and in silence.
    quiet = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(num_workers, get_context("spawn"), signal.signal, quiet) as pool:
        with reading(f"num_workers={num_workers}, fewer take less memory"):
            yield from pool.map(function, jobs)


# ---- data sets


def tell_ignored(paths, labelled):
    """Print what is ignored; ValueError if it may be labels, where not all recordings have any."""
    for path in paths:
        if (path.suffix == ".npy" or "_bbox" in path.name) and not labelled:
            raise ValueError(f"{path}: labels? Call them NAME_bbox.npy, where NAME_td.h5 is")
    if paths:
        print(f"{len(paths)} ignored, as {paths[0]}")


def find_sequences(folder):
    """{(split, name): {"events": path, "labels": path}} of a folder; prints what it ignores.

    ValueError: none, two recordings or label files of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = {}
    twins = {}  # recordings by name and size
    ignored = [path for path in folder.glob("[!.]*") if path.name not in SPLITS]
    for split in SPLITS:
        for path in sorted(folder.glob(f"{split}/[!.]*")):
            kind = "events"
            if path.name.endswith("_bbox.npy"):
                kind = "labels"
            elif path.suffix.lower() not in READERS:
                ignored.append(path)
                continue
            name = path.stem.removesuffix("_bbox").removesuffix(".dat").removesuffix("_td")
            files = found.setdefault((split, name), {})
            earlier = files.setdefault(kind, path)
            if path.stem.removesuffix(".dat") != earlier.stem.removesuffix(".dat"):
                raise ValueError(f"{earlier}, {path}: two of one name; move one away")
            if path != earlier:
                print(f"{earlier} is not used, {path} is")  # one was converted to the other
            files[kind] = path
            size = path.exists() and path.stat().st_size
            if kind == "events" and twins.setdefault((name, size), path).parent != path.parent:
                print(f"WARNING: {path} seems to be in two splits")
    if not found:
        raise ValueError(
            f"{folder}: no recordings in it; expected train/NAME_td.h5 (or .raw, .dat, ...) with "
            "train/NAME_bbox.npy, also in val and test. DSEC: link SEQUENCE/events/left/events.h5 "
            "as train/SEQUENCE.h5, its tracks.npy as train/SEQUENCE_bbox.npy, and give "
            "--height=480 --width=640")
    tell_ignored(ignored, all("labels" in files for files in found.values()))
    return found


def name_classes(names, sequences):
    """Names of the class ids in all labels; without any: "0", "1", ... up to the largest.

    ValueError if ids are counted from 1, so that each would get the name of the one after it.
    """
    ids = set()
    for files in sequences.values():
        with suppress(ValueError, KeyError):  # no labels; those that are damaged are reported later
            ids.update(read_labels(files["labels"])["class_id"].tolist())
    largest = max(ids, default=0)
    if not names:
        if largest >= MAX_CLASSES:
            raise ValueError(f"class ids up to {largest}: count them from 0, or name them all")
        return [str(class_id) for class_id in range(largest + 1)]
    if 0 not in ids and largest >= len(names):
        raise ValueError(
            f"class ids {sorted(ids)}, but names of 0 to {len(names) - 1}: {', '.join(names)}; "
            "count ids from 0, or name 0 too")
    absent = [name for class_id, name in enumerate(names) if class_id not in ids]
    if ids and absent:
        print(f"no boxes of {', '.join(absent)}")
    return names


def describe(path, options, numbered):
    """What dataset.json says, or is to say where `path` is not there yet.

    numbered: the classes are numbers; labels fixed since the last run may add some. ValueError:
    the set was prepared otherwise.
    """
    about = {
        "classes": options.class_names,
        "box_filter": options.box_filter,
        "downsample": options.downsample,
    }
    with reading(path):
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else about
        known = before["classes"]
        numbers = [str(k) for k in range(max(len(known), len(options.class_names)))]
        if numbered and known == numbers[:len(known)]:
            before["classes"] = numbers
            about["classes"] = numbers
        if before | about != before:
            raise ValueError("prepared with other classes or options; take another --dst")
    return before


def prepare(src, dst, dataset="own", num_workers=0, **changes):
    """Prepare the data set below src into dst, print what is odd about each sequence.

    Returns {outcome: number of sequences}. changes: box_filter, downsample, class_names, height,
    width, where they are not the data set's. ValueError: src or an option is wrong, dst was
    prepared otherwise; or, once all others are prepared, files are damaged.
    """
    chosen = {key: value for key, value in changes.items() if value}
    options = SimpleNamespace(**defaults | DATASETS.get(dataset, {}) | chosen | {"dst": dst})
    if (
        dataset not in DATASETS
        or options.box_filter not in BOX_FILTERS
        or options.downsample not in SCALES
    ):
        raise ValueError(
            f"{dataset=}, {chosen}: expected a dataset of {list(DATASETS)}, a box_filter of "
            f"{BOX_FILTERS}, a downsample of {list(SCALES)}")
    sequences = find_sequences(src)
    options.class_names = [str(name) for name in options.class_names]
    check_names(options.class_names)
    numbered = not options.class_names
    if dataset != "gen4":  # its labels know more classes than are used
        with reading(src):
            options.class_names = name_classes(options.class_names, sequences)
    path = Path(dst, "dataset.json")
    about = describe(path, options, numbered)
    # What an interrupted run has left is made from scratch.
    partial = Path(dst, ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(path, json.dumps(about))
    jobs = [
        (*name, files, options) for name, files in sequences.items()
        if not any(Path(dst, *name).glob("*"))
    ]
    counts = Counter({"there already": len(sequences) - len(jobs)})
    failed = []
    results = run_jobs(prepare_sequence, jobs, num_workers)
    for outcome, line, size in tqdm(results, "prepare", len(jobs), unit="seq"):
        tqdm.write(f"{outcome}: {line}")
        counts[outcome] += 1
        about |= zip(("height", "width"), size)
        if outcome == "failed":
            failed.append(line)
    write(path, json.dumps(about))
    shutil.rmtree(partial)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} failed, the others are done: {failed[0]}")
    return dict(+counts)  # those above 0


def main(argv):
    counts = prepare(**configure(defaults, argv))
    print(counts)
    if "there already" in counts:
        print("What is to be made again, with new labels say: delete its DST/SPLIT/NAME first.")
    if set(counts) == {"skipped"}:
        raise ValueError("nothing was prepared: no labels or no events were left")


if __name__ == "__main__":
    # h5py's callbacks swallow KeyboardInterrupts; the next run tidies up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    command_line(main)

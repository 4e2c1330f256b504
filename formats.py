"""What preparation, reading, simulation and inference agree on about files, once.

The box record, the event histogram, the names in a prepared sequence, how files are read, written.

    from formats import BOX_DTYPE, histogram
"""

import os
import struct
from contextlib import contextmanager

import h5py
import numpy as np

# A box: time in us, top-left corner and sides in pixels of the sensor.
BOX_DTYPE = np.dtype([
    ("t", "i8"),
    ("x", "f4"),
    ("y", "f4"),
    ("w", "f4"),
    ("h", "f4"),
    ("class_id", "u4"),
    ("track_id", "u4"),
    ("class_confidence", "f4"),
])
WINDOW_US = 50_000  # of time, whose events a histogram counts
BINS = 10  # time bins of a window and polarity
CHANNELS = 2 * BINS  # channel = polarity * BINS + time bin
MAX_COUNT = 10  # counts saturate there
# How many pixels of the sensor, along a side, make one of the histogram.
SCALES = {"none": 1, "nearest": 2, "sum": 2}
# Where a prepared sequence holds its histograms, at half or at full resolution.
REPRESENTATION = "event_representations_v2/stacked_histogram_dt=50_nbins=10"
FILES = {"half": "event_representations_ds2_nearest.h5", "full": "event_representations.h5"}


@contextmanager
def reading(what):
    """Whatever is raised inside, by libraries for damaged files say, becomes a ValueError.

    Its message is one line: `what`, then what was raised.
    """
    try:
        yield
    except Exception as error:  # numpy, zipfile, zlib, json and h5py raise a dozen kinds
        raise ValueError(f"{what}: {' '.join(str(error).split()) or repr(error)}") from error


def write(path, contents):
    """Write text, or what contents(file) writes, so that `path` is whole at any time, old or new.

    Missing folders are made. ValueError if it cannot be written.
    """
    part = f"{path}.tmp"
    with reading(f"{path}: not written (is the disk full?), the one before is intact"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(part, "wb") as file:
            if isinstance(contents, str):
                file.write(contents.encode())
            else:
                contents(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def new_h5(path):
    """A new HDF5 file, open for writing. ValueError if it cannot be written, on a full disk say."""
    # with a cache HDF5 would crash on a full disk
    with (
        reading(f"{path}: not written (is the disk full?)"),
        h5py.File(path, "w", rdcc_nbytes=0) as file,
    ):
        yield file


def check_names(names):
    """ValueError if a name of a class is empty or there twice."""
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"classes {', '.join(names)}: one is empty or there twice")


def check_blosc(chunk, nbytes):
    """ValueError unless the header of a Blosc 1 chunk tells its sizes.

    nbytes: of the values in memory; len(chunk) as in the file. HDF5 and Blosc believe the header,
    and crash on a damaged one. Source: README_CHUNK_FORMAT.rst of c-blosc 1.
    """
    if chunk[4:8] + chunk[12:16] != struct.pack("<2I", nbytes, len(chunk)):
        raise ValueError("sizes in a Blosc chunk's header are damaged")


def histogram(t, x, y, p, height, width, downsample="none"):
    """Stacked histogram of a window: uint8 (CHANNELS, H, W), counts up to MAX_COUNT.

    t (n,) us ascending, x, y (n,) px, p (n,) on where above 0; no events: zeros. Time bins span
    first to last event of the window, before any downsampling. downsample: "nearest" keeps odd rows
    and columns (nearest-exact), "sum" adds 2x2 pixels; both halve height and width, rounded down.
    Bins are RVT's to the bit, hence float32; RVT counts in uint8 and wraps at 256, this saturates.
    """
    H = height // SCALES[downsample]
    W = width // SCALES[downsample]
    counts = np.zeros((CHANNELS, H, W), np.uint8)
    t = t - t[:1]
    duration = float(t.max(initial=1))
    if downsample == "nearest":
        keep = np.flatnonzero(x & y & 1)
    elif downsample == "sum":
        keep = np.flatnonzero((x < 2 * W) & (y < 2 * H))
    if downsample != "none":
        t, x, y, p = t[keep], x[keep] >> 1, y[keep] >> 1, p[keep]
    channel = np.minimum(t.astype(np.float32) / duration * BINS, BINS - 1).astype(np.int32)
    channel += (p > 0) * np.int32(BINS)
    # Most pixels are empty, so that sorting is faster than np.bincount.
    index, number = np.unique((channel * H + y) * W + x, return_counts=True)
    counts.reshape(-1)[index] = np.minimum(number, MAX_COUNT)
    return counts

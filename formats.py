"""What all scripts agree on about files: the box record, event histograms, and how files are read and written.

    from formats import BOX_DTYPE, histogram
"""

import os
from contextlib import contextmanager

import numpy as np

BOX_DTYPE = np.dtype([*zip("t x y w h class_id track_id class_confidence".split(), "i8 f4 f4 f4 f4 u4 u4 f4".split())])
# Time bins a polarity; channel = polarity * BINS + time bin; largest count stored; length of a window.
BINS, CHANNELS, MAX_COUNT, WINDOW_US = 10, 20, 10, 50_000
REPRESENTATION = "event_representations_v2/stacked_histogram_dt=50_nbins=10"
FILES = {"half": "event_representations_ds2_nearest.h5", "full": "event_representations.h5"}


def require(fine, what):
    """ValueError(what) unless `fine`."""
    if not fine:
        raise ValueError(what)


@contextmanager
def reading(what):
    """Whatever is raised inside, by libraries for damaged files say, becomes a ValueError of one line about `what`."""
    try:
        yield
    except Exception as error:  # numpy, zipfile, zlib, json and h5py raise a dozen kinds
        raise ValueError(f"{what}: {' '.join(str(error).split()) or repr(error)}") from error


def check_blosc(chunk, nbytes):
    """ValueError unless the header of a Blosc 1 chunk (bytes) tells its sizes as they are.

    nbytes: bytes once decoded. Decoders trust the header, and crash where it lies.
    Source: README_CHUNK_FORMAT.rst of c-blosc 1.
    """
    header = np.frombuffer(chunk, "<u4", 4)  # flags, bytes decoded, block size, bytes of the chunk
    if header[1] != nbytes or header[3] != len(chunk):
        raise ValueError("sizes in a Blosc chunk's header are damaged")


def write(path, contents):
    """Text, or what contents(file) writes, to a temporary file, flushed and renamed: `path` is whole, old or new.

    Its folder is made if need be. ValueError if it cannot be written.
    """
    with reading(f"{path}: not written (is the disk full?), the one before is intact"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(contents.encode()) if isinstance(contents, str) else contents(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)


def histogram(t, x, y, p, height, width, downsample="none"):
    """Stacked histogram of a window: uint8 (2 * BINS, H, W), channel = polarity * BINS + time bin, counts to MAX_COUNT.

    t (n,) us ascending, x, y (n,) px, p (n,) on where above 0. Time bins span first to last event of the window, before
    any downsampling; "nearest" keeps odd rows and columns (nearest-exact), "sum" adds 2x2 pixels; both halve H and W,
    rounded down. Bins are RVT's to the bit, hence float32; it counts in uint8 and wraps at 256, this saturates.
    No events: zeros.
    """
    half = int(downsample != "none")
    H, W = height >> half, width >> half
    counts = np.zeros((2 * BINS, H, W), np.uint8)
    start, end = t[:1].sum(), t[-1:].sum()  # 0 where there are no events
    if half:
        keep = np.flatnonzero(x & y & 1 if downsample == "nearest" else (x < 2 * W) & (y < 2 * H))
        t, x, y, p = t[keep], x[keep] >> 1, y[keep] >> 1, p[keep]
    time_bin = np.minimum((t - start).astype(np.float32) / float(max(end - start, 1)) * BINS, BINS - 1).astype("i4")
    # Most pixels are empty, so that sorting is faster than np.bincount.
    index, number = np.unique(((time_bin + (p > 0) * np.int32(BINS)) * H + y) * W + x, return_counts=True)
    counts.reshape(-1)[index] = np.minimum(number, MAX_COUNT)
    return counts

"""Tests of formats.py and prepare.py, to be merged."""

import fcntl
import itertools
import json
import sys
import time

import h5py
import numpy as np
import pytest
import torch

import formats
import prepare
from conftest import (
    HISTOGRAMS,
    load,
    raw_set,
    same_tree,
    shared,
    some_events,
    some_labels,
    write_h5,
)
from formats import BOX_DTYPE, histogram
from prepare import Recording, filter_boxes, label_frames, read_labels, window_ends, windows

# ==== formats.py


def slow_histogram(t, x, y, p, height, width, downsample):
    """The definition, event by event."""
    full = np.zeros((20, height, width), np.int64)
    for when, col, row, on in zip(t, x, y, p):
        where = np.float32(when - t[0]) / np.float32(max(t[-1] - t[0], 1)) * np.float32(10)
        full[(10 if on > 0 else 0) + min(int(np.floor(where)), 9), row, col] += 1
    H, W = height // 2, width // 2
    if downsample == "nearest":
        full = full[:, 1:2 * H:2, 1:2 * W:2]
    if downsample == "sum":
        full = full[:, :2 * H, :2 * W].reshape(20, H, 2, W, 2).sum((2, 4))
    return np.minimum(full, 10).astype(np.uint8)


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
@pytest.mark.parametrize("height, width", [(8, 12), (7, 11)])
def test_histogram_equals_its_slow_definition(downsample, height, width):
    rng = np.random.default_rng(0)
    for count, span in ((0, 1), (1, 1), (5, 1), (400, 50_000), (400, 7), (400, 49_999)):
        t = np.sort(rng.integers(0, span, count)) + 10**12
        x = rng.integers(0, width, count)
        y = rng.integers(0, height, count)
        p = rng.integers(-1, 2, count)
        slow = slow_histogram(t, x, y, p, height, width, downsample)
        for kind in (np.uint16, np.int64, np.uint32):
            got = histogram(t, x.astype(kind), y.astype(kind), p, height, width, downsample)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, slow)


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
def test_histogram_saturates_where_rvt_wraps(downsample):
    t = np.zeros(20 * 256 + 3, np.int64)
    ones = np.ones(len(t), np.uint16)
    got = histogram(t, ones, ones, ones, 4, 4, downsample)
    assert got.max() == got.sum() == 10


@pytest.mark.parametrize("span", [1, 3, 10, 4096, 33_333, 49_999, 50_000])
def test_histogram_bins_are_those_of_torch(span):
    t = torch.arange(0, span + 1)
    expected = torch.clamp(((t - t[0]) / max(t[-1] - t[0], 1) * 10).floor(), max=9).long().numpy()
    y, x = np.divmod(np.arange(len(t)), 64)
    got = histogram(t.numpy(), x, y, np.zeros(len(t)), len(t) // 64 + 1, 64)
    np.testing.assert_array_equal(got.argmax(0).ravel()[:len(t)], expected)


def test_check_blosc_refuses_sizes_that_a_header_does_not_tell():
    chunk = np.array([0x02010102, 4000, 4000, 20], "<u4").tobytes() + b"data"
    formats.check_blosc(chunk, 4000)
    for damaged_chunk, nbytes in ((chunk, 4001), (chunk[:-1], 4000), (chunk[:9], 4000), (b"", 0)):
        with pytest.raises(ValueError, match="sizes in a Blosc chunk's header are damaged"):
            formats.check_blosc(damaged_chunk, nbytes)


# ==== prepare.py: recordings


@pytest.mark.parametrize("name, size, count, span, first, limits, polarity", [
    ("driving_gen41_1280x720_8.8ms_evt3.raw", (720, 1280), 219_596, 8_811, 11_718_656,
     (0, 1279, 0, 719), (104_064, 115_532)),
    ("pedestrians_gen41_1280x720_45ms_evt3.raw", (720, 1280), 5_000, 45_210, None,
     (11, 1279, 22, 698), (2_106, 2_894)),
    ("indoor_640x480_2.08s_evt3_payload_noheader.evt3", (480, 640), 343_474, 2_078_178, None, None,
     (218_291, 125_183)),
    ("rotating_dot_gen3_640x480_50ms_evt2.raw", (480, 640), 539_481, 50_000, None,
     (60, 599, 18, 475), None),
    ("ncars_obj_004397_100ms_td.dat", (61, 54), 4_407, 100_000, None, (0, 53, 1, 60),
     (1_671, 2_736))])
def test_real_recordings_hold_what_their_description_says(
        name, size, count, span, first, limits, polarity):
    path = shared(f"data/{name}")
    if path.suffix != ".dat":
        pytest.importorskip("faery")
    recording = Recording(path, *size)
    assert (recording.height, recording.width) == size
    t, x, y, p = map(np.concatenate, zip(*recording.chunks()))
    assert len(t) == count == recording.events and recording.outside == recording.far == 0
    assert (np.diff(t) >= 0).all() and abs(t[-1] - t[0] - span) < 1000 and first in (None, t[0])
    assert limits in (None, (x.min(), x.max(), y.min(), y.max()))
    assert polarity is None or sorted(np.bincount((p > 0).astype(int))) == sorted(polarity)


def test_read_h5_takes_sizes_from_scalars_and_attributes_and_adds_dsecs_offset(tmp_path):
    path = write_h5(tmp_path / "b.hdf5", *some_events(100, 50_000), size=None, group="CD/events")
    with pytest.raises(ValueError, match="b.hdf5: the sensor's size.*--height"):
        Recording(path)
    with h5py.File(path, "a") as file:
        file["CD/events"].attrs["height"] = 260
        file.attrs["width"] = 346
        file["t_offset"] = 10**12
    recording = Recording(path, 100, 100)
    assert (recording.height, recording.width) == (260, 346)
    assert next(recording.chunks())[0][0] >= 10**12


def write_table(path, *columns, **options):
    """A recording as Metavision has it: one table."""
    table = np.zeros(len(columns[0]), [("x", "u2"), ("y", "u2"), ("p", "i2"), ("t", "i8")])
    for key, column in zip("txyp", columns):
        table[key] = column
    with h5py.File(path, "w") as file:
        file.create_dataset("CD/events", data=table, **options)


def test_read_h5_reads_metavisions_table_while_another_process_locks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    columns = some_events(2500, 10**6)
    write_table(tmp_path / "a.hdf5", *columns, chunks=(400,))
    with open(tmp_path / "a.hdf5", "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        got = list(map(np.concatenate, zip(*Recording(tmp_path / "a.hdf5", 48, 64).chunks())))
    for column, expected in zip(got, columns, strict=True):
        np.testing.assert_array_equal(column, expected)


def test_read_h5_names_a_missing_filter_and_other_columns(tmp_path, monkeypatch):
    write_table(tmp_path / "a.hdf5", *some_events(10, 100), compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with pytest.raises(ValueError, match="a.hdf5.*32000.*ECF.*HDF5_PLUGIN_PATH.*RAW"):
        list(Recording(tmp_path / "a.hdf5", 48, 64).chunks())
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["events/ts"] = file["events/pol"] = [1, 2]
    with pytest.raises(ValueError, match="b.h5: /events holds pol, ts; expected t, x, y, p"):
        Recording(tmp_path / "b.h5")


def test_read_dat_gives_the_events_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 100)
    columns = t, x, y, p = some_events(350, 10**6, (240, 304))
    records = np.stack((t, x | y << 14 | p << 28), 1).astype("<u4")
    path = tmp_path / "a_td.dat"
    header = b"% Data file containing CD events.\n% Version 2\n% Height 240\n% Width 304\n\x00\x08"
    path.write_bytes(header + records.tobytes())
    recording = Recording(path)
    assert (recording.height, recording.width) == (240, 304)
    got = map(np.concatenate, zip(*recording.chunks()))
    for column, expected in zip(got, columns, strict=True):
        np.testing.assert_array_equal(column, expected)
    path.write_bytes(path.read_bytes()[:-3])  # cut off within an event: the others are read
    assert sum(len(chunk[0]) for chunk in recording.chunks()) == 349


def test_read_faery_names_the_package_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faery", None)
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n")
    with pytest.raises(ValueError, match="a.raw.*pip install faery"):
        Recording(tmp_path / "a.raw", 720, 1280)


def read_csv(path):
    yield 48, 64
    yield np.loadtxt(path, np.int64, delimiter=",").T


def test_readers_take_another_format_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.READERS, ".csv", read_csv)
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000]), names=("h5", "csv"))
    np.savetxt(raw / "train/csv.csv", np.stack(some_events(3000, 700_000), 1), "%d", ",")
    (raw / "train/csv_td.h5").unlink()
    assert prepare.prepare(raw, tmp_path / "out") == {"prepared": 2}
    assert same_tree(load(tmp_path / "out/train/csv"), load(tmp_path / "out/train/h5"))


def test_unreadable_recordings_are_named_in_one_line(tmp_path):
    whole = write_h5(tmp_path / "whole.h5", *some_events(20_000, 10**6)).read_bytes()
    noise = np.random.default_rng(0).bytes(20_000)
    contents = {"cut.h5": whole[:-5000], "header.dat": b"% Version 2\n"}
    contents |= {f"noise.{kind}": noise for kind in ("h5", "dat", "aedat4", "es", "raw", "evt3")}
    contents |= {f"empty.{kind}": b"" for kind in ("h5", "dat")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "absent.h5", "events.txt"):
        with pytest.raises(ValueError, match=f"^.*{name}.*$"):
            list(Recording(tmp_path / name, 48, 64).chunks())


def read_times(path, t):
    """(Recording that was read, times) of a recording with events at t us."""
    recording = Recording(write_h5(path, t, t % 64, t % 48, t % 2))
    return recording, np.concatenate([chunk[0] for chunk in recording.chunks()])


def test_chunks_raise_times_that_go_backwards_across_blocks_and_count_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 4)
    t = np.array([5, 9, 8, 10, 3, 12, 12, 40, 13, 14, 15, 50])
    recording, got = read_times(tmp_path / "a_td.h5", t)
    np.testing.assert_array_equal(got, np.maximum.accumulate(t))
    assert recording.backwards == 5 and recording.events == 12
    assert (recording.first_us, recording.last_us) == (5, 50)


@pytest.mark.parametrize("at, time_us", [
    ([0], 2**60), ([0, 1], 3_000_000), ([400], 5_000_000), ([400], -2**63), ([400], 2**63 - 1),
    ([7, 400, 401, 402, 1500], 2**41), ([1999], 2**50), ([400, 401, 1500], 0)])
def test_chunks_drop_or_raise_a_few_times_that_are_far_off_and_count_them(at, time_us, tmp_path):
    whole = some_events(2000, 1_900_000)[0]
    t = whole.copy()
    t[at] = time_us
    recording, got = read_times(tmp_path / "a_td.h5", t)
    if time_us == 0:  # early: RVT's rule
        np.testing.assert_array_equal(got, np.maximum.accumulate(t))
        assert recording.backwards == len(at) and recording.far == 0
    else:
        np.testing.assert_array_equal(got, np.delete(whole, at))
        assert recording.backwards == 0 and recording.far == len(at)


@pytest.mark.parametrize("block", [500, 1 << 19])
def test_chunks_count_a_clock_of_32_bits_on(block, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", block)
    rng = np.random.default_rng(0)
    t = np.cumsum(rng.integers(0, 10_000_000, 2000)) + 2**32 - 10**9  # wraps twice
    late = t - rng.integers(0, 100, len(t))
    recording, got = read_times(tmp_path / "a_td.h5", late % 2**32)
    np.testing.assert_array_equal(got, np.maximum.accumulate(late))


@pytest.mark.parametrize("order", [
    lambda t: -t, lambda t: t % 64, lambda t: t % 2, lambda t: t // 50_000 * 2 + t % 2,
    lambda t: t < 900_000])
def test_chunks_refuse_events_that_are_out_of_order(order, tmp_path):
    t = some_events(2000, 1_900_000)[0]
    with pytest.raises(ValueError, match="a_td.h5: events are out of order.*sort them"):
        read_times(tmp_path / "a_td.h5", t[np.argsort(order(t), kind="stable")])


def test_chunks_drop_and_count_events_off_the_sensor(tmp_path):
    t, x, y, p = some_events(300, 60_000)
    x[[3, 7]] = 64
    y[9] = 1000
    recording = Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))
    assert sum(len(chunk[0]) for chunk in recording.chunks()) == 297 and recording.outside == 3
    wrong = Recording(write_h5(tmp_path / "b_td.h5", t, x + 100, y, p))
    with pytest.raises(ValueError, match="b_td.h5.*most events lie off the sensor"):
        list(wrong.chunks())


# ==== prepare.py: windows


@pytest.mark.parametrize("block", [7, 100, 1 << 19])
def test_windows_hold_both_their_ends_whatever_the_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", block)
    t, x, y, p = some_events(2000, 400_000)
    t[500:503] = 100_000
    t.sort()
    recording = Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))
    ends = [50_000, 60_000, 100_000, 150_000, 150_000, 380_000, 900_000]
    for end, window in zip(ends, windows(recording, ends), strict=True):
        inside = (t >= end - 50_000) & (t <= end)
        for column, expected in zip(window, (t, x, y, p)):
            np.testing.assert_array_equal(column, expected[inside])


def test_windows_without_ends_cover_the_recording_from_its_first_event_on(tmp_path):
    t, x, y, p = some_events(500, 430_000)
    t += 11_718_656
    got = list(windows(Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))))
    assert len(got) == -(-(t[-1] - t[0]) // 50_000)
    assert set(np.concatenate([window[0] for window in got])) == set(t)
    empty = Recording(write_h5(tmp_path / "b_td.h5", [], [], [], []))
    assert list(windows(empty)) == []
    assert [len(window[0]) for window in windows(empty, [50_000, 100_000])] == [0, 0]


# ==== prepare.py: labels


def test_read_labels_renames_and_sorts_those_of_older_files(tmp_path):
    names = ("ts", "x", "y", "w", "h", "class_id", "confidence", "track_id")
    old = np.zeros(3, list(zip(names, ("<u8", "<f4", "<f4", "<f4", "<f4", "u1", "<f4", "<u4"))))
    old["ts"] = [30, 10, 20]
    old["track_id"] = [3, 1, 2]
    np.save(tmp_path / "a_bbox.npy", old)
    boxes = read_labels(tmp_path / "a_bbox.npy")
    assert boxes.dtype == BOX_DTYPE
    assert boxes["t"].tolist() == [10, 20, 30] and boxes["track_id"].tolist() == [1, 2, 3]
    np.save(tmp_path / "b_bbox.npy", old[[*names[:6]]])
    assert read_labels(tmp_path / "b_bbox.npy")["class_confidence"].tolist() == [1, 1, 1]
    for other in (old[["ts", "x", "y"]], np.zeros((20, 8))):
        np.save(tmp_path / "c_bbox.npy", other)
        with pytest.raises(ValueError, match="c_bbox.npy .expected: an array with fields t x y"):
            read_labels(tmp_path / "c_bbox.npy")


def test_filter_boxes_crops_filters_and_counts():
    boxes = some_labels(np.arange(8))  # 0 and 1 are cut by the frame, 2 to 7 each have one fault
    boxes["x"][:5] = [-5, 50, 70, -30, np.nan]
    boxes["w"][:5] = [20, 40, 10, 20, 20]
    boxes["class_id"][5] = 99
    boxes["x"][6] = 1
    boxes["w"][6] = 60
    boxes["h"][7] = 4
    kept, dropped = filter_boxes(boxes.copy(), 48, 64, 8, "sides5", train=True)
    assert kept["t"].tolist() == [0, 1]
    assert kept["x"].tolist() == [0, 50] and kept["w"].tolist() == [15, 13]
    assert dropped["boxes of unknown class"] == 1 and dropped["boxes off the frame"] == 3
    assert dropped["boxes too wide"] == 2  # not a number is not narrow either
    kept, _ = filter_boxes(boxes.copy(), 48, 64, 100, "none", train=False)
    assert kept["t"].tolist() == [0, 1, 5, 6, 7]
    large = some_labels([0, 1, 2], w=[55, 57, 30], h=[20, 20, 19])
    assert filter_boxes(large, 720, 1280, 8, "prophesee", train=False)[0]["t"].tolist() == [1]


def rvts_rule(times, base):
    """Labelled frames and numbers of base steps between them as RVT's script chooses them."""
    frames, steps = [times[times >= 100_000][0]], []
    for time_us in times[times > frames[0]]:
        count = round((time_us - frames[-1]) / base)
        if abs(time_us - frames[-1] - count * base) <= 2000:
            frames.append(time_us)
            steps.append(count)
    return frames, steps


@pytest.mark.parametrize("hertz, grid_us", [(30, 0), (60, 0), (4, 250_000), (1, 250_000)])
def test_label_frames_and_window_ends_are_rvts_on_labels_like_its_own(hertz, grid_us):
    rng = np.random.default_rng(hertz)
    for share in np.repeat((1, 0.9, 0.6, 0.45), 20):  # 45% of 60 Hz: the median is 30 Hz's
        grid = np.round(np.arange(1, 60 * hertz) * 1e6 / hertz)
        grid += rng.integers(-4, 4, len(grid))
        kept = rng.random(len(grid)) < share
        kept[20:80] &= rng.random() < 0.5
        times = grid[kept].astype(np.int64)
        interval = np.median(np.diff(times))
        if not grid_us and round(1e6 / interval) not in (30, 60):
            continue  # RVT's script asserts it
        base = grid_us or int(interval * {30: 3, 60: 6}[round(1e6 / interval)])
        frames, spacing_us = label_frames(times, grid_us)
        expected, steps = rvts_rule(times, base)
        assert frames.tolist() == expected
        between = np.searchsorted(window_ends(frames, spacing_us, 0), frames)
        assert np.diff(between).tolist() == [2 * count for count in steps]


@pytest.mark.parametrize("hertz, base, spacing", [
    (10, 100_000, 50_000), (20, 100_000, 50_000), (25, 80_000, 40_000), (30, 99_999, 49_999.5),
    (60, 100_002, 50_001), (4, 250_000, 50_000), (1, 1_000_000, 50_000)])
def test_label_frames_at_any_label_rate(hertz, base, spacing):
    times = np.round(np.arange(1, 4 * hertz) * 1e6 / hertz).astype(np.int64)
    frames, step = label_frames(times, 0)
    assert step == spacing
    assert frames[0] == times[times >= 100_000][0] and set(frames) <= set(times)
    assert np.abs(np.diff(frames) - base).max() <= 2000 and frames[-1] > times[-1] - base
    ends = window_ends(frames, step, 0)
    assert set(frames) <= set(ends)
    assert np.abs(np.diff(ends[ends >= frames[0]]) - spacing).max() <= 1500
    assert label_frames(times[:1] * 0 + 7, 0)[0].size == 0
    assert label_frames(times[-1:], 0)[0].tolist() == [times[-1]]


def test_label_frames_start_a_new_phase_after_a_gap():
    before = np.arange(1, 31) * 33_333
    after = 1_716_000 + np.arange(30) * 33_333
    frames, _ = label_frames(np.concatenate((before, after)), 0)
    assert frames[frames < 1_100_000].tolist() == (133_332 + np.arange(9) * 99_999).tolist()
    assert frames[frames > 1_100_000].tolist() == (1_716_000 + np.arange(10) * 99_999).tolist()
    ends = window_ends(frames, 49_999.5, 0)
    assert np.isin(frames, ends).all()
    assert 45_000 < np.diff(ends).min() and np.diff(ends).max() < 55_000
    tail = before[-1] + [5 * 33_333, 6 * 33_333]  # on the grid, not in phase: RVT drops it
    assert label_frames(np.concatenate((before, tail)), 0)[0].max() == 933_324


@pytest.mark.parametrize("hertz, jitter_us, share", [
    (10, 1_000, 0.97), (10, 3_000, 0.95), (10, 10_000, 0.9), (30, 3_000, 0.9), (20, 8_000, 0.85)])
def test_label_frames_keep_one_about_every_100_ms_where_labels_jitter(hertz, jitter_us, share):
    rng = np.random.default_rng(0)
    times = np.arange(1, 100 * hertz) * (1_000_000 // hertz)
    times = np.unique(times + rng.normal(0, jitter_us, len(times)).astype(int))
    assert len(label_frames(times, 0)[0]) > share * 1000


@pytest.mark.parametrize("hertz", [15, 30, 170, 1000])
def test_label_frames_keep_one_about_every_100_ms_at_random_times_and_of_two_sources(hertz):
    rng = np.random.default_rng(0)
    times = np.unique(rng.integers(100_000, 100_000_000, 100 * hertz))
    assert len(label_frames(times, 0)[0]) > 100_000_000 / (100_000 + 1_100_000 / hertz)
    two = np.unique(np.concatenate([np.arange(1, 1000), np.arange(1, 1000) + 0.37]) * 100_000)
    assert len(label_frames(two.astype(int), 0)[0]) == 999


def test_label_frames_take_an_hour_of_labels_in_linear_time():
    began = time.perf_counter()
    assert len(label_frames(np.arange(100_000, 3_600_000_000, 33_333), 0)[0]) == 36_000
    assert time.perf_counter() - began < 2


def test_window_ends_of_gen1_are_as_far_apart_as_rvts():
    frames, step = label_frames(np.array([250_000, 500_000, 1_000_000]), 250_000)
    ends = window_ends(frames, step, 0) // 1000
    assert ends.tolist() == [100, 150, 200, 250, 375, 500, 625, 750, 875, 1000]
    late = np.array([10**15 + 10**6])
    assert len(window_ends(late, 50_000, 10**15)) == 19  # a clock that does not begin at 0


# ==== prepare.py: sequences and data sets


@pytest.mark.parametrize("dataset", ["gen1", "gen4", "etram"])
def test_prepared_data_equal_rvts_to_the_bit(dataset, tmp_path):
    reference = shared(f"reference/prepared/{dataset}")
    assert prepare.prepare(reference / "raw", tmp_path, dataset) == {"prepared": 2}
    for sequence in ("train/a", "val/b"):
        assert same_tree(load(reference / "out" / sequence), load(tmp_path / sequence))
        path = next((reference / "out" / sequence).rglob("*.h5"))
        ours_path = tmp_path / sequence / HISTOGRAMS / path.name
        with h5py.File(path) as theirs, h5py.File(ours_path) as ours:
            a, b = theirs["data"], ours["data"]
            assert a.chunks == b.chunks and a.maxshape == b.maxshape
            filters = [data.id.get_create_plist().get_filter(0) for data in (a, b)]
            assert filters[0] == filters[1]


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
def test_write_sequence_gives_every_window_its_histogram(downsample, tmp_path):
    events = some_events(4000, 400_000)
    raw_set(tmp_path / "raw", some_labels([100_000, 200_000, 300_000]), events)
    prepare.prepare(tmp_path / "raw", tmp_path / "out", downsample=downsample)
    got = load(tmp_path / "out/train/a")
    data = got[formats.FILES["full" if downsample == "none" else "half"]]
    for frame, end in zip(data, got["stacke/timestamps_us.npy"], strict=True):
        inside = (events[0] >= end - 50_000) & (events[0] <= end)
        window = [column[inside] for column in events]
        np.testing.assert_array_equal(frame, slow_histogram(*window, 48, 64, downsample))


GRID_US = np.arange(100_000, 1_900_000, 100_000)


@pytest.mark.parametrize("scale, zero_us, label_scale, label_zero_us, word", [
    (1e-6, 0, 1, 0, "events in seconds"), (1e-3, 0, 1, 0, "events in milliseconds"),
    (1000, 0, 1, 0, "nanoseconds"), (1, 1_600_000_000_000_000, 1, 0, "another zero"),
    (1, 5_000_000, 1, 0, "another zero"), (1, 0, 1, 1_600_000_000_000_000, "another zero"),
    (1, 0, 1e-3, 0, "labels in milliseconds"), (1, 0, 1e-6, 0, "labels in seconds"),
    (1, 0, 1000, 0, "labels in nanoseconds")])
def test_check_clocks_refuses_events_and_labels_of_different_clocks(
        scale, zero_us, label_scale, label_zero_us, word, tmp_path):
    t, *others = some_events(20_000, 2_000_000)
    boxes = some_labels(GRID_US * label_scale + label_zero_us)
    raw = raw_set(tmp_path / "raw", boxes, (t * scale + zero_us, *others))
    with pytest.raises(ValueError, match=f"a_td.h5: events from .* labels from .*{word}"):
        prepare.prepare(raw, tmp_path / "out")


def test_prepare_refuses_seconds_without_labels(tmp_path):
    t, *others = some_events(20_000, 2_000_000)
    raw = raw_set(tmp_path / "raw", events=(t / 1e6, *others))
    with pytest.raises(ValueError, match="a_td.h5: too many events a us"):
        prepare.prepare(raw, tmp_path / "out")


@pytest.mark.parametrize("change, words", [
    (lambda t, x, y, p: (t, x, y, p + 1), "one polarity only, p is {1, 2}"),
    (lambda t, x, y, p: (t, x, y, p * 0), "one polarity only, p is {0}"),
    (lambda t, x, y, p: (t, x, y, p * 2 - 1), "17 windows, 9 labelled frames, 9 boxes\n"),
    (lambda t, x, y, p: (t * (t != t[77]) + 0, x, y, p), "1 times raised"),
    (lambda t, x, y, p: (t + 10**7 * (t == t[77]), x, y, p), "1 events with a damaged time"),
    (lambda t, x, y, p: (t, x + 60 * (t == t[77]), y, p), "1 events off the sensor")])
def test_prepare_reports_what_is_odd_about_events(change, words, tmp_path, capsys):
    events = change(*some_events(3000, 1_000_000))
    raw_set(tmp_path / "raw", some_labels(GRID_US[:9]), events)
    prepare.main([f"--src={tmp_path}/raw", f"--dst={tmp_path}/out"])
    assert words in capsys.readouterr().out


def test_prepare_keeps_small_boxes_of_own_data_and_numbers_their_classes(tmp_path):
    boxes = some_labels(np.repeat(GRID_US[:6], 2), w=3, h=2, class_id=[0, 4] * 6)
    raw_set(tmp_path / "raw", boxes, names=("b", "a"), splits=("train", "test"))
    assert prepare.prepare(tmp_path / "raw", tmp_path / "out", "own") == {"prepared": 4}
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["classes"] == ["0", "1", "2", "3", "4"]
    assert (about["height"], about["width"]) == (48, 64)
    got = load(tmp_path / "out/test/b")
    assert got["event_representations.h5"].shape == (11, 20, 48, 64)
    assert len(got["labels"]) == 12
    assert got["objframe_idx_2_label_idx"].tolist() == [0, 2, 4, 6, 8, 10]
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["dataset.json", "test", "train"]


def test_name_classes_makes_numbers_names_and_refuses_ids_from_one(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:6], class_id=[1, 2, 3] * 2))
    with pytest.raises(ValueError, match="class ids .1, 2, 3.*0 to 2: a, b, c"):
        prepare.prepare(raw, tmp_path / "out", class_names=("a", "b", "c"))
    prepare.prepare(raw, tmp_path / "out", class_names=(10, 20, 30, 40))
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["classes"] == ["10", "20", "30", "40"]


def test_prepare_skips_a_sequence_without_labels_or_events_left(tmp_path, capsys):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000], class_id=9), names=("skipped",))
    raw_set(raw, some_labels([10_000, 20_000]), names=("early",))
    raw_set(raw, some_labels([]), names=("none",))
    raw_set(raw, some_labels([200_000, 300_000]), np.zeros((4, 0)), names=("empty",))
    write_h5(raw / "train" / "unlabelled and empty.h5", [], [], [], [])
    with pytest.raises(ValueError, match="nothing was prepared"):
        prepare.main([f"--src={raw}", f"--dst={tmp_path}/out", "--dataset=etram"])
    said = capsys.readouterr().out
    assert "2 boxes of unknown class" in said and "2 label times left out" in said
    raw_set(raw, names=("unlabelled",))
    assert prepare.prepare(raw, tmp_path / "out", "etram") == {"skipped": 5, "prepared": 1}


def test_prepare_gives_a_recording_without_labels_windows_from_its_first_event_on(tmp_path):
    raw_set(tmp_path / "raw")
    prepare.prepare(tmp_path / "raw", tmp_path / "out", "etram")
    got = load(tmp_path / "out/train/a")
    assert len(got["labels"]) == len(got["objframe_idx_2_label_idx"]) == 0
    assert got["labels"].dtype == BOX_DTYPE and len(got["labels/timestamps_us.npy"]) == 0
    assert got["event_representations_ds2_nearest.h5"].shape == (14, 20, 24, 32)


def test_prepare_resumes_and_an_interrupted_run_leaves_no_half_sequence(tmp_path, monkeypatch):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:3]), names=("a", "b"))
    prepare.prepare(raw, tmp_path / "whole")
    calls = itertools.count(1)

    def interrupted(*window):
        if next(calls) == 8:  # in the second sequence
            raise KeyboardInterrupt
        return histogram(*window)

    monkeypatch.setattr(prepare, "histogram", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(raw, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/train").iterdir()] == ["a"]
    monkeypatch.setattr(prepare, "histogram", histogram)
    assert prepare.prepare(raw, tmp_path / "out") == {"there already": 1, "prepared": 1}
    assert same_tree(load(tmp_path / "out/train/b"), load(tmp_path / "whole/train/b"))
    assert not (tmp_path / "out" / ".partial").exists()
    with pytest.raises(ValueError, match="prepared with other classes or options"):
        prepare.prepare(raw, tmp_path / "out", downsample="sum")


def test_prepare_names_wrong_options_and_folders(tmp_path):
    with pytest.raises(ValueError, match="typo: no such folder"):
        prepare.prepare(tmp_path / "typo", tmp_path / "out")
    with pytest.raises(ValueError, match="no recordings in it.*train/NAME_td.h5.*DSEC"):
        prepare.prepare(tmp_path, tmp_path / "out")
    raw_set(tmp_path)
    for change in (dict(dataset="dsec"), dict(box_filter="big"), dict(downsample="half")):
        with pytest.raises(ValueError, match="a dataset of.*gen4.*sides5.*nearest"):
            prepare.prepare(tmp_path, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_run_jobs_writes_with_two_processes_what_one_writes(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:2]), names="ab", splits=("train", "val"))
    for number in (0, 2):
        prepare.prepare(raw, tmp_path / str(number), num_workers=number)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        assert same_tree(load(tmp_path / "0" / name), load(tmp_path / "2" / name))
    one, two = ((tmp_path / number / "dataset.json").read_text() for number in "02")
    assert one == two

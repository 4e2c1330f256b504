"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ==== prepare.py and simulate.py

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


# ---- prepare: the published data

@pytest.mark.parametrize("dataset", ["gen1", "gen4", "etram"])
def test_prepared_data_equal_rvts_to_the_bit(dataset, tmp_path):
    reference = SHARED / "reference" / "prepared" / dataset
    if not reference.exists():
        pytest.skip("../shared/reference is absent")
    assert prepare.prepare(reference / "raw", tmp_path, dataset) == {"prepared": 2}
    for sequence in ("train/a", "val/b"):
        assert same_tree(load(reference / "out" / sequence), load(tmp_path / sequence))
        h5 = next((reference / "out" / sequence).rglob("*.h5"))
        with h5py.File(h5) as ours, h5py.File(tmp_path / sequence / HISTOGRAMS / h5.name) as theirs:
            for a, b in ((ours["data"], theirs["data"]),):
                assert a.chunks == b.chunks and a.maxshape == b.maxshape
                assert a.id.get_create_plist().get_filter(0) == b.id.get_create_plist().get_filter(0)


# ---- prepare: histograms and windows

@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
@pytest.mark.parametrize("height, width", [(8, 12), (7, 11)])
def test_histogram_equals_its_slow_definition(downsample, height, width):
    rng = np.random.default_rng(0)
    for count, span in ((0, 1), (1, 1), (5, 1), (400, 50_000), (400, 7), (400, 49_999)):
        t = np.sort(rng.integers(0, span, count)) + 10**12
        x, y, p = rng.integers(0, width, count), rng.integers(0, height, count), rng.integers(-1, 2, count)
        for kind in (np.uint16, np.int64, np.uint32):
            got = prepare.histogram(t, x.astype(kind), y.astype(kind), p, height, width, downsample)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, slow_histogram(t, x, y, p, height, width, downsample))


def test_histogram_saturates_where_rvt_wraps():
    count = 20 * 256 + 3
    t = np.zeros(count, np.int64)
    ones = np.ones(count, np.uint16)
    for downsample in ("none", "nearest", "sum"):
        got = prepare.histogram(t, ones, ones, ones, 4, 4, downsample)
        assert got.max() == got.sum() == 10


def test_histogram_bins_are_those_of_torch():
    for span in (1, 3, 10, 4096, 33_333, 49_999, 50_000):
        t = torch.arange(0, span + 1)
        expected = torch.clamp(((t - t[0]) / max(t[-1] - t[0], 1) * 10).floor(), max=9).long().numpy()
        x = np.arange(len(t)) % 64
        y = np.arange(len(t)) // 64
        got = prepare.histogram(t.numpy(), x, y, np.zeros(len(t)), len(t) // 64 + 1, 64)
        np.testing.assert_array_equal(got.argmax(0).ravel()[:len(t)], expected)


def test_windows_hold_both_their_ends_whatever_the_blocks(tmp_path, monkeypatch):
    t, x, y, p = some_events(2000, 400_000)
    t[[500, 501, 502]] = 100_000
    path = write_h5(tmp_path / "a_td.h5", np.sort(t), x, y, p)
    t = np.sort(t)
    ends = [50_000, 60_000, 100_000, 150_000, 150_000, 380_000, 900_000]
    for block in (7, 100, 1 << 19):
        monkeypatch.setattr(prepare, "BLOCK", block)
        for end, window in zip(ends, prepare.windows(prepare.Recording(path), ends), strict=True):
            inside = (t >= end - 50_000) & (t <= end)
            for column, expected in zip(window, (t, x, y, p)):
                np.testing.assert_array_equal(column, expected[inside])


def test_windows_without_ends_cover_the_recording_from_its_first_event_on(tmp_path):
    t, x, y, p = some_events(500, 430_000)
    t += 11_718_656
    recording = prepare.Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))
    got = list(prepare.windows(recording))
    assert len(got) == -(-(t[-1] - t[0]) // 50_000)
    assert set(np.concatenate([window[0] for window in got])) == set(t)
    empty = prepare.Recording(write_h5(tmp_path / "b_td.h5", [], [], [], []))
    assert list(prepare.windows(empty)) == []
    assert [len(window[0]) for window in prepare.windows(empty, [50_000, 100_000])] == [0, 0]


def test_times_that_go_backwards_are_raised_across_blocks_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 4)
    t = np.array([5, 9, 8, 10, 3, 12, 12, 40, 13, 14, 15, 50])
    recording = prepare.Recording(write_h5(tmp_path / "a_td.h5", t, t * 0, t * 0, t * 0))
    got = np.concatenate([chunk[0] for chunk in recording.chunks()])
    np.testing.assert_array_equal(got, np.maximum.accumulate(t))
    assert recording.backwards == 5 and recording.events == 12
    assert (recording.first_us, recording.last_us) == (5, 50)


def test_events_off_the_sensor_are_dropped_and_counted(tmp_path):
    t, x, y, p = some_events(300, 60_000)
    x[[3, 7]], y[9] = 64, 1000
    recording = prepare.Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))
    assert sum(len(chunk[0]) for chunk in recording.chunks()) == 297 and recording.outside == 3
    wrong = prepare.Recording(write_h5(tmp_path / "b_td.h5", t, x + 100, y, p))
    with pytest.raises(ValueError, match="b_td.h5.*most lie off 48 x 64 px"):
        list(wrong.chunks())


# ---- prepare: labels

@pytest.mark.parametrize("hertz, base, spacing", [(10, 100_000, 50_000), (25, 80_000, 40_000), (30, 99_999, 49_999.5),
                                                  (60, 100_002, 50_001), (4, 250_000, 50_000), (1, 1_000_000, 50_000)])
def test_labelled_frames_at_any_label_rate(hertz, base, spacing):
    times = np.round(np.arange(1, 4 * hertz) * 1e6 / hertz).astype(np.int64)
    frames, step = prepare.label_frames(times, 0)
    assert step == spacing
    assert frames[0] == times[times >= 100_000][0] and set(frames) <= set(times)
    assert np.abs(np.diff(frames) - base).max() <= 2000 and frames[-1] > times[-1] - base
    ends = prepare.window_ends(frames, step, 0)
    assert set(frames) <= set(ends) and np.abs(np.diff(ends[ends >= frames[0]]) - spacing).max() <= 1500
    assert prepare.label_frames(times[:1] * 0 + 7, 0)[0].size == 0
    assert prepare.label_frames(times[-1:], 0)[0].tolist() == [times[-1]]


def test_labels_out_of_phase_after_a_gap_start_a_new_phase():
    before, after = np.arange(1, 31) * 33_333, 1_716_000 + np.arange(30) * 33_333
    frames, _ = prepare.label_frames(np.concatenate((before, after)), 0)
    assert frames[frames < 1_100_000].tolist() == (133_332 + np.arange(9) * 99_999).tolist()
    assert frames[frames > 1_100_000].tolist() == (1_716_000 + np.arange(10) * 99_999).tolist()
    ends = prepare.window_ends(frames, 49_999.5, 0)
    assert np.isin(frames, ends).all() and 45_000 < np.diff(ends).min() and np.diff(ends).max() < 55_000
    tail = np.concatenate((before, before[-1] + [5 * 33_333, 6 * 33_333]))  # on the grid, not in phase: RVT drops it
    assert prepare.label_frames(tail, 0)[0].max() == 933_324


def test_gen1_windows_are_as_far_apart_as_rvts():
    frames, step = prepare.label_frames(np.array([250_000, 500_000, 1_000_000]), 250_000)
    ends = prepare.window_ends(frames, step, 0)
    assert ends.tolist() == [100_000, 150_000, 200_000, 250_000, 375_000, 500_000, 625_000, 750_000, 875_000, 1_000_000]


def test_label_times_of_another_clock_are_refused():
    with pytest.raises(ValueError, match="not microseconds"):
        prepare.window_ends(np.array([10**15]), 50_000, 0)
    frames = np.array([10**15 + 10**6])
    assert len(prepare.window_ends(frames, 50_000, 10**15)) == 19  # a clock that does not begin at 0 is fine


def test_boxes_are_cropped_filtered_and_counted():
    boxes = some_labels(np.arange(8))  # 0 and 1 are cut by the frame, 2 to 7 each have one fault
    boxes["x"][:5], boxes["w"][:5] = [-5, 50, 70, -30, np.nan], [20, 40, 10, 20, 20]
    boxes["class_id"][5] = 99
    boxes["x"][6], boxes["w"][6] = 1, 60
    boxes["h"][7] = 4
    kept, dropped = prepare.filter_boxes(boxes.copy(), 48, 64, 8, "sides5", train=True)
    assert kept["t"].tolist() == [0, 1]
    assert kept["x"].tolist() == [0, 50] and kept["w"].tolist() == [15, 13]
    assert {reason: dropped[reason] for reason in dropped if "small" not in reason} == {
        "boxes of unknown class": 1, "boxes off the frame": 3, "boxes too wide": 2}  # not a number is not narrow either
    assert prepare.filter_boxes(boxes.copy(), 48, 64, 100, "none", train=False)[0]["t"].tolist() == [0, 1, 5, 6, 7]
    large = some_labels([0, 1, 2], w=[55, 57, 30], h=[20, 20, 19])
    assert prepare.filter_boxes(large, 720, 1280, 8, "prophesee", train=False)[0]["t"].tolist() == [1]


def test_labels_of_older_files_are_renamed_and_sorted(tmp_path):
    old = np.zeros(3, [("ts", "<u8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"), ("class_id", "u1"),
                       ("confidence", "<f4"), ("track_id", "<u4")])
    old["ts"], old["track_id"] = [30, 10, 20], [3, 1, 2]
    np.save(tmp_path / "a_bbox.npy", old)
    boxes = prepare.read_labels(tmp_path / "a_bbox.npy")
    assert boxes.dtype == BOX_DTYPE
    assert boxes["t"].tolist() == [10, 20, 30] and boxes["track_id"].tolist() == [1, 2, 3]
    np.save(tmp_path / "b_bbox.npy", old[["ts", "x", "y", "w", "h", "class_id"]])
    assert prepare.read_labels(tmp_path / "b_bbox.npy")["class_confidence"].tolist() == [1, 1, 1]
    np.save(tmp_path / "c_bbox.npy", old[["ts", "x", "y"]])
    with pytest.raises(ValueError, match="c_bbox.npy: no field of name"):
        prepare.read_labels(tmp_path / "c_bbox.npy")


# ---- prepare: sequences and data sets

def test_own_data_keep_small_boxes_and_number_their_classes(tmp_path):
    boxes = some_labels(np.repeat(np.arange(1, 7) * 100_000, 2), w=3, h=2, class_id=[0, 4] * 6)
    raw_set(tmp_path / "raw", boxes, names=("b", "a"), splits=("train", "test"))
    assert prepare.prepare(tmp_path / "raw", tmp_path / "out", "own") == {"prepared": 4}
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["classes"] == ["0", "1", "2", "3", "4"] and (about["height"], about["width"]) == (48, 64)
    got = load(tmp_path / "out" / "test" / "b")
    assert got["event_representations.h5"].shape == (11, 20, 48, 64)
    assert len(got["labels"]) == 12 and got["objframe_idx_2_label_idx"].tolist() == [0, 2, 4, 6, 8, 10]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset.json", "test", "train"]


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
def test_every_window_holds_its_histogram(downsample, tmp_path):
    events = some_events(4000, 400_000)
    raw_set(tmp_path / "raw", some_labels([100_000, 200_000, 300_000]), events)
    prepare.prepare(tmp_path / "raw", tmp_path / "out", "own", downsample=downsample)
    got = load(tmp_path / "out" / "train" / "a")
    data = got["event_representations.h5" if downsample == "none" else "event_representations_ds2_nearest.h5"]
    for frame, end in zip(data, got["stacke/timestamps_us.npy"], strict=True):
        inside = (events[0] >= end - 50_000) & (events[0] <= end)
        window = [column[inside] for column in events]
        np.testing.assert_array_equal(frame, slow_histogram(*window, 48, 64, downsample))


def test_a_sequence_without_labels_left_is_skipped_and_one_without_labels_prepared(tmp_path, capsys):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000], class_id=9), names=("skipped",))
    raw_set(raw, names=("unlabelled",))
    raw_set(raw, some_labels([10_000, 20_000]), names=("early",))
    write_h5(raw / "train" / "unlabelled and empty.h5", [], [], [], [])
    np.save(raw / "train" / "none_bbox.npy", some_labels([]))
    write_h5(raw / "train" / "none_td.h5", *some_events(100, 100_000))
    assert prepare.prepare(raw, tmp_path / "out", "etram") == {"skipped": 4, "prepared": 1}
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["unlabelled"]
    got = load(tmp_path / "out" / "train" / "unlabelled")
    assert len(got["labels"]) == len(got["objframe_idx_2_label_idx"]) == len(got["labels/timestamps_us.npy"]) == 0
    assert got["labels"].dtype == prepare.LABEL
    assert got["event_representations_ds2_nearest.h5"].shape == (14, 20, 24, 32)
    assert "2 boxes of unknown class" in "".join(capsys.readouterr())


def test_an_empty_recording_gives_empty_windows_and_is_reported(tmp_path, capsys):
    raw_set(tmp_path / "raw", some_labels([200_000, 300_000]), ([], [], [], []))
    assert prepare.prepare(tmp_path / "raw", tmp_path / "out", "own") == {"prepared": 1}
    assert load(tmp_path / "out" / "train" / "a")["event_representations.h5"].sum() == 0
    assert "windows empty" in "".join(capsys.readouterr())


def test_height_and_width_come_from_the_file_else_from_the_data_set_else_they_are_asked_for(tmp_path):
    events = some_events(100, 50_000, (240, 304))
    path = write_h5(tmp_path / "raw" / "train" / "a_td.dat.h5", *events, size=None)
    with pytest.raises(ValueError, match="a_td.dat.h5: a sensor of 0 x 0 px.*--height"):
        prepare.Recording(path)
    np.save(tmp_path / "raw" / "train" / "a_bbox.npy", some_labels([250_000]))
    prepare.prepare(tmp_path / "raw", tmp_path / "out", "gen1", box_filter="none")
    assert load(tmp_path / "out" / "train" / "a")["event_representations.h5"].shape[2:] == (240, 304)
    path = write_h5(tmp_path / "b.hdf5", *events, size=None, group="CD/events")
    with h5py.File(path, "a") as file:
        file["CD/events"].attrs["height"], file.attrs["width"] = 260, 346
    recording = prepare.Recording(path, 100, 100)
    assert (recording.height, recording.width) == (260, 346)


def test_an_interrupted_run_leaves_no_half_sequence_and_resumes(tmp_path, monkeypatch):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000, 300_000]), names=("a", "b"))
    prepare.prepare(raw, tmp_path / "whole", "own")
    calls, histogram = [], prepare.histogram

    def interrupted(*window):
        calls.append(window)
        if len(calls) == 8:  # in the second sequence
            raise KeyboardInterrupt
        return histogram(*window)

    monkeypatch.setattr(prepare, "histogram", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(raw, tmp_path / "out", "own")
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["a"]
    (tmp_path / "out" / ".partial" / "train-b").mkdir()  # as a killed process leaves it
    monkeypatch.setattr(prepare, "histogram", histogram)
    assert prepare.prepare(raw, tmp_path / "out", "own") == {"there already": 1, "prepared": 1}
    assert same_tree(load(tmp_path / "out" / "train" / "b"), load(tmp_path / "whole" / "train" / "b"))
    assert not (tmp_path / "out" / ".partial").exists()
    with pytest.raises(ValueError, match="prepared with other classes or options"):
        prepare.prepare(raw, tmp_path / "out", "own", downsample="sum")


def test_two_processes_write_what_one_writes(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000]), names=("a", "b"), splits=("train", "val"))
    for number in (0, 2):
        prepare.prepare(raw, tmp_path / str(number), "own", num_workers=number)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        assert same_tree(load(tmp_path / "0" / name), load(tmp_path / "2" / name))
    assert (tmp_path / "0" / "dataset.json").read_text() == (tmp_path / "2" / "dataset.json").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_preparation_and_simulation_at_once_and_in_silence(workers, tmp_path):
    raw = raw_set(tmp_path / "raw", events=some_events(100_000, 100_000_000), names=[f"s{k}" for k in range(30)])
    for argv, begun in ((["prepare.py", f"--src={raw}", f"--dst={tmp_path}/out"], "out/.partial/*"),
                        (["simulate.py", f"--dst={tmp_path}/simulated", "--seconds=200"], "simulated/*")):
        process = subprocess.Popen([sys.executable, ROOT / argv[0], *argv[1:], f"--num_workers={workers}"], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None and not list(tmp_path.glob(begun)):
            time.sleep(0.05)
        time.sleep(2 if workers else 0.2)  # until every worker is at work
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == -signal.SIGINT and "Traceback" not in output, output  # 130 to a shell


def test_a_process_that_dies_ends_preparation_in_one_line():
    with pytest.raises(ValueError, match="num_workers=1.*terminated abruptly"):
        list(prepare.run_jobs(os._exit, [1, 2], 1))


def test_a_damaged_file_is_named_and_does_not_stop_the_others(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000]), names=("a", "b", "c", "d"))
    (raw / "train" / "a_td.h5").write_bytes((raw / "train" / "a_td.h5").read_bytes()[:3000])
    (raw / "train" / "b_bbox.npy").write_bytes(b"\x93NUMPY garbage")
    (raw / "train" / "d_td.h5").unlink()
    with pytest.raises(ValueError) as error:
        prepare.main([f"--src={raw}", f"--dst={tmp_path / 'out'}", "--class_names=thing"])
    message = str(error.value)
    assert "3 of 4 failed" in message and "a_td.h5" in message and "\n" not in message
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["c"]
    assert not (tmp_path / "out" / ".partial").exists()


def test_wrong_options_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no recordings in its folders"):
        prepare.prepare(tmp_path, tmp_path / "out", "own")
    raw_set(tmp_path)
    for change in (dict(dataset="dsec"), dict(box_filter="big"), dict(downsample="half")):
        with pytest.raises(ValueError, match="dsec|big|half"):
            prepare.prepare(tmp_path, tmp_path / "out", **{"dataset": "own"} | change)
    assert not (tmp_path / "out").exists()


# ---- prepare: recordings

@pytest.mark.parametrize("version, bits", [(1, (9, 8)), (2, (14, 14))])
def test_dat_files_are_read_as_they_were_written(version, bits, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 100)
    t, x, y, p = some_events(350, 10**6, (240, 304))
    records = np.empty(350, [("t", "<u4"), ("xyp", "<u4")])
    records["t"], records["xyp"] = t, x | y << bits[0] | p << sum(bits)
    header = f"% Data file containing CD events.\n% Version {version}\n% Height 240\n% Width 304\n".encode()
    path = tmp_path / "a_td.dat"
    path.write_bytes(header + b"\x00\x08" + records.tobytes())
    recording = prepare.Recording(path)
    assert (recording.height, recording.width) == (240, 304)
    for got, expected in zip(map(np.concatenate, zip(*recording.chunks())), (t, x, y, p), strict=True):
        np.testing.assert_array_equal(got, expected)
    path.write_bytes(path.read_bytes()[:-3])  # cut off within an event: the others are read
    assert sum(len(chunk[0]) for chunk in recording.chunks()) == 349


@pytest.mark.parametrize("name, size, count, span, first, limits, polarity", [
    ("driving_gen41_1280x720_8.8ms_evt3.raw", (720, 1280), 219_596, 8_811, 11_718_656, (0, 1279, 0, 719),
     (104_064, 115_532)),
    ("pedestrians_gen41_1280x720_45ms_evt3.raw", (720, 1280), 5_000, 45_210, None, (11, 1279, 22, 698), (2_106, 2_894)),
    ("indoor_640x480_2.08s_evt3_payload_noheader.evt3", (480, 640), 343_474, 2_078_178, None, None, (218_291, 125_183)),
    ("rotating_dot_gen3_640x480_50ms_evt2.raw", (480, 640), 539_481, 50_000, None, (60, 599, 18, 475), None),
    ("ncars_obj_004397_100ms_td.dat", (61, 54), 4_407, 100_000, None, (0, 53, 1, 60), (1_671, 2_736))])
def test_real_recordings_hold_what_their_description_says(name, size, count, span, first, limits, polarity):
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip("../shared/data is absent")
    if path.suffix != ".dat":
        pytest.importorskip("faery")
    recording = prepare.Recording(path, *size)
    assert (recording.height, recording.width) == size
    t, x, y, p = map(np.concatenate, zip(*recording.chunks()))
    assert len(t) == count == recording.events and recording.outside == 0 and (np.diff(t) >= 0).all()
    assert abs(t[-1] - t[0] - span) < 1000 and first in (None, t[0])
    assert limits in (None, (x.min(), x.max(), y.min(), y.max()))
    assert polarity is None or sorted(np.bincount((p > 0).astype(int))) == sorted(polarity)


def test_unreadable_recordings_are_named_in_one_line(tmp_path):
    whole = write_h5(tmp_path / "whole.h5", *some_events(20_000, 10**6))
    (tmp_path / "cut.h5").write_bytes(whole.read_bytes()[:-5000])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = [1, 2]
    noise = np.random.default_rng(0).bytes(20_000)
    for name, content in (("noise.h5", noise), ("empty.h5", b""), ("noise.dat", noise), ("empty.dat", b""),
                          ("header.dat", b"% Version 2\n"), ("noise.aedat4", noise), ("noise.es", noise),
                          ("noise.raw", noise), ("noise.evt3", noise)):
        (tmp_path / name).write_bytes(content)
    for name in ("cut.h5", "other.h5", "noise.h5", "empty.h5", "noise.dat", "empty.dat", "header.dat", "absent.h5",
                 "events.txt", "noise.aedat4", "noise.es", "noise.raw", "noise.evt3"):
        with pytest.raises(ValueError) as error:
            list(prepare.Recording(tmp_path / name, 48, 64).chunks())
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_recording_damaged_within_tells_how_much_could_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    path, (t, x, y, p) = tmp_path / "a_td.h5", some_events(5000, 10**6)
    with h5py.File(path, "w") as file:
        for key, column in (("t", t), ("x", x), ("y", y), ("p", p)):
            file.create_dataset(f"events/{key}", data=column, chunks=(1000,), **hdf5plugin.Blosc(cname="zstd"))
        offset, size = file["events/t"].id.get_chunk_info(3).byte_offset, file["events/t"].id.get_chunk_info(3).size
    content = bytearray(path.read_bytes())
    content[offset:offset + size] = b"\xff" * size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a_td.h5, after 3000 events up to {t[2999]} us: "):
        list(prepare.Recording(path, 48, 64).chunks())


def test_a_chunk_of_a_recording_whose_header_lies_about_its_sizes_is_refused(tmp_path):
    whole = raw_recordings(tmp_path / "whole")["a_td.h5"]
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        at = file["events/y"].id.get_chunk_info(1).byte_offset
    for place in (4, 12):  # bytes of the events, bytes of the chunk
        (tmp_path / "a.h5").write_bytes(whole[:at + place] + b"xxxx" + whole[at + place + 4:])
        with pytest.raises(ValueError, match="a.h5.*sizes of a chunk are damaged, events from 1000"):
            list(prepare.Recording(tmp_path / "a.h5").chunks())


def test_a_format_that_needs_faery_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faery", None)
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n")
    with pytest.raises(ValueError, match="a.raw.*pip install faery"):
        prepare.Recording(tmp_path / "a.raw", 720, 1280)



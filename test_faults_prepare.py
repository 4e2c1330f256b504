"""Damaged recordings and label files, kills: each ends in success or in one line that names it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from io import BytesIO

import h5py
import hdf5plugin
import numpy as np
import pytest

import prepare
from conftest import ROOT, raw_set, some_events, some_labels
from test_faults import EXTREMES, FUZZ, damaged, survive


def raw_recordings(folder):
    """{name: content} of a small recording: HDF5 (Blosc), DAT and, by faery, EVT2 and EVT3."""
    folder.mkdir()
    t, x, y, p = some_events(3000, 700_000)
    blosc = hdf5plugin.Blosc(cname="zstd")
    with h5py.File(folder / "a_td.h5", "w") as file:
        for key, column, kind in (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "u1")):
            file.create_dataset(f"events/{key}", data=column.astype(kind), chunks=(1000,), **blosc)
        file["events/height"] = 48
        file["events/width"] = 64
    records = np.stack((t, x | y << 14 | p << 28), 1).astype("<u4").tobytes()
    header = b"% Version 2\n% Height 48\n% Width 64\n\x00\x08"
    (folder / "a_td.dat").write_bytes(header + records)
    with contextlib.suppress(ImportError):
        import faery
        events = np.empty(len(t), faery.EVENTS_DTYPE)
        for key, column in (("t", t), ("x", x), ("y", y), ("on", p)):
            events[key] = column
        for version in ("evt2", "evt3"):
            stream = faery.events_stream_from_array(events, (64, 48))
            stream.to_file(folder / f"{version}.raw", version=version)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def other_columns(rng, content):
    """The HDF5 recording `content` with a column or a scalar that is odd or gone."""
    io = BytesIO(content)
    with h5py.File(io, "a") as file:
        events = file["events"]
        key = rng.choice(["t", "x", "y", "p", "height"])
        column = events["t"][()]
        odd = [
            column.astype("S8"), column * np.nan, -column, column.astype("?"), column[:100],
            np.stack([column] * 2, 1), np.full(3000, rng.choice(EXTREMES)), column[0],
            "48", 2**40, -5, np.nan,
        ]
        del events[key]
        if rng.random() < 0.9:
            events[key] = odd[rng.integers(len(odd))]
    return io.getvalue()


def prepare_again(src, **options):
    prepare.prepare(src, src.with_name("out"), **options)


def test_damaged_recordings_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    rng = np.random.default_rng(1)
    contents = raw_recordings(tmp_path / "whole")
    np.save(tmp_path / "bbox.npy", some_labels([100_000, 200_000, 600_000]))
    labels = (tmp_path / "bbox.npy").read_bytes()
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        chunks = [file["events"][key].id.get_chunk_info(1).byte_offset for key in "txyp"]

    def read(path):
        for _ in prepare.windows(prepare.Recording(path, 48, 64)):
            pass

    def cases():
        for case in range(160 * FUZZ):
            name = [*contents, "a_td.h5"][case % (len(contents) + 1)]
            path = tmp_path / str(case) / "raw" / "train" / name
            content = damaged(rng, contents[name], list(contents.values()))
            if name.endswith("h5") and case % 4 == 1:  # in the header of a chunk, or behind it
                at = chunks[rng.integers(4)] + int(rng.integers(40))
                content = contents[name][:at] + rng.bytes(4) + contents[name][at + 4:]
            elif name.endswith("h5") and case % 4 == 0:
                content = other_columns(rng, contents[name])
            named = dict(height=48, width=64, class_names=("a",))
            how = [
                lambda: read(path),
                lambda: prepare_again(path.parent.parent),
                lambda: prepare_again(path.parent.parent, **named),
            ]
            labels_path = path.with_name(f"{path.stem.removesuffix('_td')}_bbox.npy")
            files = {path: content, labels_path: labels}
            yield f"case {case}, {name}", path.parent, files, how[rng.integers(3)]

    survive(cases())


def other_labels(rng, boxes):
    """Labels like `boxes` with a field of odd values or another type, or another kind of array."""
    name = rng.choice(boxes.dtype.names)
    kind = rng.integers(3)
    if kind == 0:
        odd = boxes.copy()
        values = np.array([*EXTREMES, *10.0 ** rng.uniform(0, 12, 3), -5, np.nan, np.inf, -np.inf])
        with np.errstate(all="ignore"):
            value = rng.choice(values).astype(boxes.dtype[name])
        odd[name][rng.random(len(boxes)) < rng.choice([0.3, 1])] = value
        return odd
    if kind == 1:
        others = ["f8", "f2", "i1", "u1", "i8", "?", "U3", "S8", "O", "c8", "M8[us]", "(2,)f4"]
        fields = {field: boxes.dtype[field] for field in boxes.dtype.names}
        fields[name] = rng.choice(others)
        odd = np.zeros(len(boxes), list(fields.items()))
        for field in set(fields) - {name, rng.choice(boxes.dtype.names)}:
            odd[field] = boxes[field]
        return odd
    others = [
        np.zeros(7), np.array([{}, None]), boxes[:0], boxes[0], boxes[None], boxes[::-1],
        np.repeat(boxes, 500), np.array("labels"), np.zeros((0, 3)), boxes[["t", "x", "y"]],
    ]
    return others[rng.integers(len(others))]


def test_damaged_label_files_are_named(tmp_path):
    rng = np.random.default_rng(2)
    boxes = some_labels([100_000, 200_000, 300_000, 600_000])
    recording = raw_recordings(tmp_path / "whole")["a_td.dat"]
    np.save(tmp_path / "whole.npy", boxes)
    whole = (tmp_path / "whole.npy").read_bytes()

    def cases():
        for case in range(120 * FUZZ):
            src = tmp_path / str(case) / "raw"
            content = damaged(rng, whole, [recording])
            if case % 2:
                np.save(tmp_path / "a.npy", other_labels(rng, boxes))
                content = (tmp_path / "a.npy").read_bytes()
            options = dict(dataset=rng.choice(list(prepare.DATASETS)))
            if rng.random() < 0.5:
                options["class_names"] = ("a", "b")
            files = {src / "train" / "a_td.dat": recording, src / "train" / "a_bbox.npy": content}
            yield f"case {case}", src, files, lambda: prepare_again(src, **options)

    survive(cases())


def test_a_chunk_of_a_recording_whose_header_lies_about_its_sizes_is_refused(tmp_path):
    whole = raw_recordings(tmp_path / "whole")["a_td.h5"]
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        at = file["events/y"].id.get_chunk_info(1).byte_offset
    for place in (4, 12):  # bytes of the events, bytes of the chunk
        (tmp_path / "a.h5").write_bytes(whole[:at + place] + b"xxxx" + whole[at + place + 4:])
        with pytest.raises(ValueError, match="a.h5.*sizes in a Blosc chunk's header are damaged"):
            list(prepare.Recording(tmp_path / "a.h5").chunks())


def test_a_damaged_file_is_named_and_does_not_stop_the_others(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000]), names="abcd")
    (raw / "train" / "a_td.h5").write_bytes((raw / "train" / "a_td.h5").read_bytes()[:3000])
    (raw / "train" / "b_bbox.npy").write_bytes(b"\x93NUMPY garbage")
    (raw / "train" / "d_td.h5").unlink()
    with pytest.raises(ValueError, match="^3 of 4 failed.*a_td.h5.*$"):
        prepare.main([f"--src={raw}", f"--dst={tmp_path / 'out'}"])
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["c"]
    assert not (tmp_path / "out" / ".partial").exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script, begun", [
    ("prepare.py", "out/.partial/*"), ("simulate.py", "out/*")])
def test_ctrl_c_ends_preparation_and_simulation_in_silence(script, begun, workers, tmp_path):
    long = some_events(100_000, 100_000_000)
    raw = raw_set(tmp_path / "raw", events=long, names=[f"s{k}" for k in range(30)])
    own = {"prepare.py": f"--src={raw}", "simulate.py": "--seconds=200"}[script]
    argv = [sys.executable, ROOT / script, f"--dst={tmp_path}/out", own, f"--num_workers={workers}"]
    process = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob(begun)):
        time.sleep(0.05)
    time.sleep(2 if workers else 0.2)  # until every worker is at work
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT  # 130 to a shell
    assert "Traceback" not in output


def test_a_process_that_dies_ends_preparation_in_one_line():
    with pytest.raises(ValueError, match="num_workers=1.*terminated abruptly"):
        list(prepare.run_jobs(os._exit, [1, 2], 1))

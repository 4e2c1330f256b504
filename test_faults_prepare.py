"""Damaged recordings and label files, kills: each ends in success or in one line that names it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest

import prepare
from conftest import ROOT, raw_set, some_events, some_labels, write_h5
from test_faults import EXTREMES, FUZZ, damaged, survive


def raw_recordings(folder):
    """{name: content} of the same small recording in several formats: HDF5 (Blosc), DAT and, by faery, EVT2 and EVT3."""
    folder.mkdir()
    t, x, y, p = some_events(3000, 700_000)
    with h5py.File(folder / "a_td.h5", "w") as file:
        for key, column, kind in (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "u1")):
            file.create_dataset(f"events/{key}", data=column.astype(kind), chunks=(1000,), **hdf5plugin.Blosc(cname="zstd"))
        file["events/height"], file["events/width"] = 48, 64
    records = np.stack((t, x | y << 14 | p << 28), 1).astype("<u4")
    Path(folder, "a_td.dat").write_bytes(b"% Version 2\n% Height 48\n% Width 64\n\x00\x08" + records.tobytes())
    with contextlib.suppress(ImportError):
        import faery
        events = np.empty(len(t), faery.EVENTS_DTYPE)
        events["t"], events["x"], events["y"], events["on"] = t, x, y, p
        for version in ("evt2", "evt3"):
            faery.events_stream_from_array(events, (64, 48)).to_file(folder / f"{version}.raw", version=version)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def other_columns(rng, file):
    """Change a field of the open HDF5 recording `file`."""
    key = rng.choice(list("txyp"))
    events = file["events"]
    column = events[key][()]
    odd = [column.astype(str).astype("S8"), column.astype("f8") * np.nan, -column.astype("i8"), column.astype("?"),
           column[:100], np.stack([column] * 2, 1), column[0], column[:, None], np.full(3000, rng.choice(EXTREMES))]
    if rng.random() < 0.2:
        file.attrs["height"] = events.attrs["width"] = rng.choice([0, -5, 2**40, 1 << 13])
    elif rng.random() < 0.2:
        del events["height"]
        events["height"] = (np.float32(np.nan), "48", [48, 48], [48])[rng.integers(4)]
    else:
        del events[key]
        if rng.random() < 0.9:
            events[key] = odd[rng.integers(len(odd))]


def prepare_anew(src, **options):
    prepare.prepare(src, src.with_name("out"), **options)


def test_damaged_recordings_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    rng = np.random.default_rng(1)
    contents = raw_recordings(tmp_path / "whole")
    labels = tmp_path / "a_bbox.npy"
    np.save(labels, some_labels([100_000, 200_000, 600_000]))
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        chunks = [file["events"][key].id.get_chunk_info(1).byte_offset for key in "txyp"]

    def read(path):
        for _ in prepare.windows(prepare.Recording(path, 48, 64)):
            pass

    def cases():
        for case in range(160 * FUZZ):
            name = [*contents, "a_td.h5"][case % (len(contents) + 1)]
            path = tmp_path / str(case) / "raw" / "train" / name
            content = contents[name]
            if name.endswith("h5") and case % 4 == 1:  # in the header of a chunk, or behind it
                at = chunks[rng.integers(4)] + int(rng.integers(40))
                content = content[:at] + rng.bytes(4) + content[at + 4:]
            elif name.endswith("h5") and case % 4 == 0:
                io = BytesIO(content)
                with h5py.File(io, "a") as file:
                    other_columns(rng, file)
                content = io.getvalue()
            else:
                content = damaged(rng, content, list(contents.values()))
            files = {path: content, path.with_name(f"{name[:4].removesuffix('_td.')}_bbox.npy"): labels.read_bytes()}
            how = [lambda: read(path), lambda: prepare_anew(path.parent.parent, height=48, width=64, class_names=("a",)),
                   lambda: prepare_anew(path.parent.parent)][rng.integers(3)]
            yield f"case {case}, {name}", path.parent, files, how

    survive(cases())


def other_labels(rng, boxes):
    """Labels like `boxes` of which a field has odd values, another type, or is gone; or another kind of array."""
    boxes = boxes.copy()
    name = rng.choice(boxes.dtype.names)
    kind = rng.integers(4)
    if kind == 0:  # values
        values = np.array([*EXTREMES, *10.0 ** rng.uniform(0, 12, 3), -5, np.nan, np.inf, -np.inf])
        with np.errstate(all="ignore"):
            boxes[name][rng.random(len(boxes)) < rng.choice([0.3, 1])] = rng.choice(values).astype(boxes.dtype[name])
        return boxes
    if kind < 3:  # types
        other = rng.choice(["f8", "f2", "i1", "u1", "i8", "?", "U3", "S8", "O", "c8", "M8[us]", "(2,)f4", "gone", "ts"])
        fields = [(field, other if field == name else boxes.dtype[field]) for field in boxes.dtype.names
                  if (field, other) != (name, "gone")]
        changed = np.zeros(len(boxes), [("ts", "f8") if pair == (name, "ts") else pair for pair in fields])
        for field in set(changed.dtype.names) & set(boxes.dtype.names):
            with contextlib.suppress(ValueError):
                changed[field] = boxes[field] if changed.dtype[field].shape == () else boxes[field][:, None]
        return changed
    return (np.zeros(7), np.array([{}, None]), boxes[:0], boxes[0], boxes[None], boxes[::-1], np.repeat(boxes, 500),
            np.array("labels"), np.zeros((0, 3)))[rng.integers(9)]


def test_damaged_label_files_are_named(tmp_path):
    rng = np.random.default_rng(2)
    boxes = some_labels([100_000, 200_000, 300_000, 600_000])
    recording = raw_recordings(tmp_path / "whole")["a_td.dat"]
    np.save(tmp_path / "a.npy", boxes)
    whole = (tmp_path / "a.npy").read_bytes()

    def cases():
        for case in range(120 * FUZZ):
            src = tmp_path / str(case) / "raw"
            content = damaged(rng, whole, [recording])
            if case % 2:
                np.save(tmp_path / "a.npy", other_labels(rng, boxes))
                content = (tmp_path / "a.npy").read_bytes()
            options = dict(dataset=rng.choice(list(prepare.DATASETS)), class_names=[(), ("a", "b")][rng.integers(2)])
            files = {src / "train" / "a_td.dat": recording, src / "train" / "a_bbox.npy": content}
            yield f"case {case}", src / "train" / "a_", files, lambda: prepare_anew(src, **options)

    survive(cases())


def test_unreadable_recordings_are_named_in_one_line(tmp_path):
    whole = write_h5(tmp_path / "whole.h5", *some_events(20_000, 10**6)).read_bytes()
    noise = np.random.default_rng(0).bytes(20_000)
    contents = {"cut.h5": whole[:-5000], "header.dat": b"% Version 2\n"}
    contents |= {f"noise.{kind}": noise for kind in ("h5", "dat", "aedat4", "es", "raw", "evt3")}
    contents |= {f"empty.{kind}": b"" for kind in ("h5", "dat")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "absent.h5", "events.txt"):
        with pytest.raises(ValueError) as error:
            list(prepare.Recording(tmp_path / name, 48, 64).chunks())
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_recording_damaged_within_tells_how_much_could_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    path = tmp_path / "a_td.h5"
    t, x, y, p = some_events(5000, 10**6)
    with h5py.File(path, "w") as file:
        for key, column in (("t", t), ("x", x), ("y", y), ("p", p)):
            file.create_dataset(f"events/{key}", data=column, chunks=(1000,), **hdf5plugin.Blosc(cname="zstd"))
        chunk = file["events/t"].id.get_chunk_info(3)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset:chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a_td.h5, after 3000 events up to {t[2999]} us: "):
        list(prepare.Recording(path, 48, 64).chunks())


def test_a_chunk_of_a_recording_whose_header_lies_about_its_sizes_is_refused(tmp_path):
    whole = raw_recordings(tmp_path / "whole")["a_td.h5"]
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        at = file["events/y"].id.get_chunk_info(1).byte_offset
    for place in (4, 12):  # bytes of the events, bytes of the chunk
        (tmp_path / "a.h5").write_bytes(whole[:at + place] + b"xxxx" + whole[at + place + 4:])
        with pytest.raises(ValueError, match="a.h5.*sizes in a Blosc chunk's header are damaged"):
            list(prepare.Recording(tmp_path / "a.h5").chunks())


def test_a_damaged_file_is_named_and_does_not_stop_the_others(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000]), names=("a", "b", "c", "d"))
    (raw / "train" / "a_td.h5").write_bytes((raw / "train" / "a_td.h5").read_bytes()[:3000])
    (raw / "train" / "b_bbox.npy").write_bytes(b"\x93NUMPY garbage")
    (raw / "train" / "d_td.h5").unlink()
    with pytest.raises(ValueError, match="3 of 4 failed.*a_td.h5") as error:
        prepare.main([f"--src={raw}", f"--dst={tmp_path / 'out'}", "--class_names=thing"])
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["c"]
    assert not (tmp_path / "out" / ".partial").exists()


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

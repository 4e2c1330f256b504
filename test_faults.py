"""Mistakes, fuzz, kills, full disks, hostile files, long runs: each ends well or in one line.

    make test        (make soak runs the long ones)
"""

import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch

import ablation
import configurator
import data
import detect
import eval as evaluation
import formats
import prepare
import simulate
import train
from checkpoint import load_detector, load_rvt, load_weights, read_checkpoint
from conftest import (
    BLOSC,
    BOX,
    GRID_US,
    KEYS,
    NAMES,
    ROOT,
    SMALL_NAMES,
    SMALL_SCENE,
    TINY,
    Hostile,
    MemorySequence,
    assert_same,
    assert_same_run,
    checkpoint_of,
    load,
    make_boxes,
    make_set,
    plan,
    random_events,
    raw_recording,
    raw_set,
    read_events,
    read_times,
    run_demo,
    run_train,
    same_tree,
    shared,
    small_detector,
    soak,
    some_boxes,
    some_events,
    some_labels,
    some_report,
    tiny_detector,
    torchrun,
    trained,
    write_checkpoint,
    write_dat,
    write_h5,
    write_prepared,
    write_recording,
    write_sequence,
    write_table,
)
from data import FILES, REPRESENTATION, Augmentation, augment, make_loader, open_split
from detect import StreamDetector, detections, nms, run, score_boxes
from eval import compare
from formats import BOX_DTYPE, histogram
from loss import SizeAware
from model import ModelConfig
from pictures import draw
from prepare import Recording, label_frames, read_labels

# ==== faults.py


FUZZ = int(os.environ.get("FUZZ", 1))  # so many times the cases
EXTREMES = 0, 1, -1, 255, 2**31 - 1, 2**63 - 1, -2**63


def damaged(rng, content, others):
    """`content` with bits flipped, cut, parts swapped, extremes, emptied, or one of `others`."""
    damage = bytearray(content)
    kind = rng.integers(6)
    if kind == 0:
        for at in rng.integers(0, len(damage), rng.integers(1, 20)):
            damage[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        damage = damage[:rng.integers(len(damage))]
    elif kind == 2:
        a, b = sorted(rng.integers(0, len(damage), 2))
        n = min(rng.integers(1, 64), b - a, len(damage) - b)
        damage[a:a + n], damage[b:b + n] = damage[b:b + n], damage[a:a + n]
    elif kind < 5:  # often in the header
        at = int(rng.integers(0, min(len(damage) - 8, 10 ** rng.integers(1, 6))))
        damage[at:at + 8] = struct.pack("<q", int(rng.choice(EXTREMES)))
    else:
        damage = others[rng.integers(len(others))] * int(rng.integers(0, 2))
    return bytes(damage)


def attempt(name, files, action):
    """Write the files, run action() -> "fine", "refused" (a line with `name`) or what is wrong."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    signal.alarm(30)  # a hang ends the process
    said = "fine"
    try:
        action()
    except Exception as error:
        mistake = isinstance(error, (ValueError, OSError))
        named = str(name) in str(error) and "\n" not in str(error)
        said = "refused" if mistake and named else traceback.format_exc()
    signal.alarm(0)
    changed = [str(path) for path, content in files.items() if path.read_bytes() != content]
    return f"changed: {changed}" if changed else said


def survive(cases, least=10):
    """Every case, (what, name, files, action) for `attempt`, is fine or refused, `least` of each.

    One child process runs them all, so that a crash of the interpreter shows the case it was in.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        for what, *case in cases:
            theirs.send(what)
            theirs.send(attempt(*case))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()
    found = {"fine": 0, "refused": 0}
    what = ""
    with contextlib.suppress(EOFError):
        while True:
            what = ours.recv()
            said = ours.recv()
            found.setdefault(said, what)
            if said in ("fine", "refused"):
                found[said] += 1
    process.join()
    assert process.exitcode == 0, f"{what}: the process ended with status {process.exitcode}"
    assert len(found) == 2, "\n".join(f"{what}: {said}" for said, what in list(found.items())[2:])
    assert min(found.values()) >= least, found


# ==== model.py


@pytest.mark.parametrize("key, value", [
    ("fpn_stages", (2, 4)), ("fpn_stages", (3, 2)), ("fpn_stages", (4,)), ("patch_size", 5),
    ("embed_dim", 20), ("embed_dim", 0), ("dim_head", 24), ("dim_head", 0),
    ("partition_split", -1), ("partition_split", 100)])
def test_model_config_names_what_cannot_work(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        ModelConfig(**{key: value})


def test_detector_refuses_frames_of_another_size():
    with pytest.raises(ValueError, match="40x64.*built for .48, 64"):
        tiny_detector()(random_events(1, 1, 20, 40, 64))


# ==== checkpoint.py


def random_place(rng, whole):
    """(container, key) of something inside nested dicts and lists, at any depth."""
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.2:
            return place, key
        place = inner


def with_odd_contents(rng, whole):
    """A copy of nested dicts in which one thing is gone, swapped or of another kind; which."""
    found = copy.deepcopy(whole)
    place, key = random_place(rng, found)
    value = place[key]
    kind = rng.choice(["gone", "swapped", "odd", "odd"])
    if kind == "gone":
        del place[key]
    elif kind == "swapped":
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        other = keys[rng.integers(len(keys))]
        place[key] = place[other]
        place[other] = value
    else:
        odd = [None, "word", -1, 0, 2**62, math.nan, [], {}, torch.zeros(3), (1, 2), Hostile()]
        if torch.is_tensor(value):
            odd += [value[None], value * math.nan, value.to(torch.complex64), value.to_sparse()]
            odd += [value.flatten()[:1], value.bool(), value.to("meta")]
        place[key] = odd[rng.integers(len(odd))]
    return found, f"{key!r}, {str(value)[:40]!r}, is {kind}"


def damaged_checkpoints(rng, number, folder, whole, actions):
    """Cases for `survive` of damaged bytes and contents, each for one of the actions(path)."""
    torch.save(whole, folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    for case in range(number * FUZZ):
        if case % 3 == 0:
            what = "bytes"
            damage = damaged(rng, content, [b"", content[:999]])
        else:
            found, what = with_odd_contents(rng, whole)
            torch.save(found, folder / "changed.pt")
            damage = (folder / "changed.pt").read_bytes()
        path = folder / str(case) / "ckpt.pt"
        action = actions[case % len(actions)]
        yield f"case {case}, {what}", path, {path: damage}, lambda: action(path)


def test_damaged_checkpoints_are_named(tmp_path, traffic, monkeypatch):
    data_dir = f"--data_dir={traffic}"
    argv = [*TINY, data_dir, f"--out_dir={tmp_path}/whole", "--embed_dim=8", "--fpn_stages=1,2"]
    assert run_train(*argv, "--max_steps=1") == 0
    whole = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    # what takes long is left out, and a run that goes on leaves its checkpoint as it was
    for name in ("score_boxes", "report", "draw_report", "compare"):
        monkeypatch.setattr(evaluation, name, lambda *a, **k: {"confusion": 0})
    monkeypatch.setattr(evaluation, "run", lambda *a, **k: ([], []))
    # its threads do not survive a fork, and each case runs in one
    monkeypatch.setattr(detect, "score_boxes", lambda *a: {"AP": 0.5, "AP50": 0.5})
    monkeypatch.setattr(train, "write", lambda *a: ...)

    def evaluate(path):
        out_dir = f"--out_dir={path.parent}/a"
        evaluation.main(["--ckpt", str(path), data_dir, "--num_workers=0", out_dir])

    def resume(path):
        out_dir = f"--out_dir={path.parent}"
        run_train(out_dir, data_dir, "--init_from=resume", "--max_steps=2", *TINY[-3:])

    rng = np.random.default_rng(3)
    actions = (resume, load_detector, evaluate)
    survive(damaged_checkpoints(rng, 120, tmp_path, whole, actions))


def test_damaged_rvt_checkpoints_are_named(tmp_path):
    checkpoint = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    whole = {"state_dict": checkpoint["state_dict"], "epoch": 3}

    def load(path):
        load_detector(path, (128, 160), 1)

    rng = np.random.default_rng(4)
    survive(damaged_checkpoints(rng, 40, tmp_path, whole, [load]))


def test_read_checkpoint_names_what_is_none_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("good.pt", tiny_detector())
    assert read_checkpoint("good.pt")["model_config"]["embed_dim"] == 16
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("no checkpoint")
    Path("raw.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"a": 1}, "other.pt")
    torch.save({"state_dict": {}, "callbacks": Hostile()}, "hostile.pt")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    Path("flipped.pt").write_bytes(flipped)
    for name, word in (
            ("cut.pt", "truncated"), ("flipped.pt", "damaged"), ("raw.pt", "raw.pt"),
            ("empty.pt", "not a checkpoint"),
            ("text.pt", "not a checkpoint"), ("other.pt", "no checkpoint of"),
            ("hostile.pt", "convert it"), ("missing.pt", "no such")):
        with pytest.raises(ValueError, match=word) as error:
            read_checkpoint(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not Path("hostile_code_ran").exists()


def test_load_weights_names_what_does_not_fit():
    detector = tiny_detector()
    weights = detector.state_dict()
    sparse = weights["stages.0.norm.bias"].to_sparse()
    for name, x, words in (
            ("stages.0.norm.bias", None, "is missing in the file"),
            ("stages.0.norm.bias", torch.zeros(3), "is .3,. in the file, .16,. in the model"),
            ("stages.0.norm.bias", sparse, "is Tensor in the file"),
            ("stages.9.norm.bias", torch.zeros(3), "is .3,. in the file, missing in the model")):
        changed = weights | {name: x}
        with pytest.raises(ValueError, match=f"^a.pt: 1 weights do not fit .*{name} {words}"):
            load_weights(detector, changed, "a.pt", new_classes=True)
    with pytest.raises(ValueError, match="6 weights do not fit"):
        load_weights(tiny_detector(num_classes=5), weights, "a.pt")
    with pytest.raises(ValueError, match="do not fit"):  # another architecture as well
        load_weights(tiny_detector(num_classes=5, embed_dim=24), weights, "a.pt", new_classes=True)


def test_load_rvt_names_what_is_unmatched(tmp_path):
    path = tmp_path / "changed.ckpt"
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    for change, words in (
        ({"mdl.backbone.extra": torch.zeros(3)}, "extra is .3,. in the file"),
        ({"mdl.fpn.bu_conv1.conv.weight": None}, "fpn.down.1.conv.weight is missing"),
        ({"mdl.yolox_head.cls_preds.1.bias": torch.zeros(5)}, "heads.1.cls_pred.bias is .5,."),
    ):
        changed = reference["state_dict"] | change
        weights = {name: x for name, x in changed.items() if x is not None}
        torch.save({"state_dict": weights}, path)
        with pytest.raises(ValueError, match=words):
            load_rvt(path, input_hw=(128, 160), partition_split=1)
    torch.save({"state_dict": {"mdl.other": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="changed.ckpt: no checkpoint of RVT"):
        load_rvt(path, input_hw=(128, 160))


# ==== loss.py


@pytest.mark.parametrize("wrong", [
    {"weight_type": "cubic"}, {"size_aware_terms": ("iou", "box")}, {"size_aware_terms": ()},
    {"size_aware_weight": 0.5}, {"small_threshold": -1}, {"small_threshold": 9216},
    {"medium_threshold": -1}, {"medium_threshold": 1024}])
def test_size_aware_names_what_cannot_work(wrong):
    [(key, value)] = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
        SizeAware(**wrong)


# ==== data.py


FRAMES = f"{REPRESENTATION}/objframe_idx_2_repr_idx.npy"
TIMES = f"{REPRESENTATION}/timestamps_us.npy"
EVENTS = f"{REPRESENTATION}/{FILES['half']}"
LABELS = "labels_v2/labels.npz"
THREE = make_boxes([(n, 10, 8, 20, 16, 1) for n in (1, 2, 2)])
UNKNOWN = make_boxes([(n, 10, 8, 20, 16, 2**32 - 1) for n in (1, 2, 2)])


def refused_sequence(tmp_path, change):
    """open_split refuses the sequence after change(its folder), in one line that names it."""
    path = tmp_path / "train" / "s"
    write_sequence(path, {2: [BOX], 5: [BOX, BOX]}, 8)
    change(path)
    with pytest.raises(ValueError) as error:
        open_split(tmp_path, "train")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file", [FRAMES, TIMES, LABELS, EVENTS])
def test_open_split_names_a_file_that_is_missing_or_a_pickle(tmp_path, file):
    refused_sequence(tmp_path / "a", lambda path: (path / file).unlink())
    content = pickle.dumps(np.array([{}, None]))
    refused_sequence(tmp_path / "b", lambda path: (path / file).write_bytes(content))


@pytest.mark.parametrize("file, value", [
    *((FRAMES, value) for value in ([2, 2], [5, 2], [-1, 5], [2, 8], [2], [2, 5, 6], 3)),
    *((TIMES, value) for value in (range(7), range(9), [0] * 8))])
def test_open_split_names_indices_and_times_that_do_not_fit(tmp_path, file, value):
    refused_sequence(tmp_path, lambda path: np.save(path / file, np.array(value)))


@pytest.mark.parametrize("boxes, first", [
    *((THREE, first) for first in ([1, 1], [0, 3], [-1, 1], [1, 0], [0], [0.0, 1.0])),
    *((boxes, [0, 1]) for boxes in (THREE["x"], THREE[["x", "y"]], THREE[None], UNKNOWN)),
    (np.full(3, "a", "U3").astype([(name, "U3") for name in BOX_DTYPE.names]), [0, 1])])
def test_open_split_names_labels_that_do_not_fit(tmp_path, boxes, first):
    arrays = dict(labels=boxes, objframe_idx_2_label_idx=np.array(first))
    refused_sequence(tmp_path, lambda path: np.savez(path / LABELS, **arrays))


@pytest.mark.parametrize("shape, dtype", [
    ((8, 20, 24), "u1"), ((8, 10, 24, 32), "u1"), ((0, 20, 24, 32), "u1"),
    ((9, 20, 24, 32), "u1"), ((8, 20, 24, 32), "i2"), ((8, 20, 24, 32), "f4"), ((), "u1")])
def test_open_split_names_events_of_another_shape_or_type(tmp_path, shape, dtype):
    def change(path):
        with h5py.File(path / EVENTS, "w") as file:
            file.create_dataset("data", shape, dtype)

    refused_sequence(tmp_path, change)


def test_open_split_and_training_survive_damaged_prepared_sequences(tmp_path):
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole"
    write_sequence(whole, {2: [BOX], 5: [BOX, BOX], 6: [BOX]}, 8, seed=1)
    contents = {path.relative_to(whole): path.read_bytes() for path in sorted(whole.rglob("*.*"))}

    def train(root):
        batches = plan(open_split(root, "train", num_classes=8), batch_size=1)
        for step in range(batches.steps_per_epoch):
            augment(*batches[step][:3])

    def cases():
        for case in range(120 * FUZZ):
            root = tmp_path / str(case)
            name = list(contents)[case % len(contents)]
            broken = damaged(rng, contents[name], list(contents.values()))
            files = {root / "train" / "s" / file: content for file, content in contents.items()}
            files[root / "train" / "s" / name] = broken
            yield f"case {case}, {name}", root / "train", files, lambda: train(root)

    survive(cases())


def test_open_events_takes_no_lock_on_the_file(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    write_sequence(tmp_path / "a", {}, 3)
    with open(data.Sequence(tmp_path / "a").file) as other:
        data.open_events.cache_clear()
        fcntl.flock(other, fcntl.LOCK_EX)  # HDF5 asks for a shared one by itself
        assert data.Sequence(tmp_path / "a").length == 3


@pytest.mark.parametrize("key, value", [("flip", 1.5), ("zoom_random", -0.1), ("zoom_in_max", 0.9)])
def test_augmentation_out_of_its_range_names_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}: expected"):
        Augmentation(**{key: value})


def test_sequence_takes_labels_of_other_fields_types_and_orders(tmp_path):
    write_sequence(tmp_path / "a", {1: [BOX]}, 3)
    dtype = [("class_id", ">u2"), ("t", "<u8"), *((name, "<f8") for name in "hwyx"), ("new", "?")]
    labels = np.array([(3, 7, 16, 20, 8, 10, True)], dtype)
    arrays = dict(labels=labels, objframe_idx_2_label_idx=np.array([0], np.uint32))
    np.savez(tmp_path / "a/labels_v2/labels.npz", **arrays)
    assert data.Sequence(tmp_path / "a").boxes[0].tolist() == [(7, 5, 4, 10, 8, 3, 1, 1)]


@pytest.mark.parametrize("filters", [
    BLOSC, hdf5plugin.Blosc(cname="zstd", clevel=9, shuffle=0), hdf5plugin.Blosc(cname="lz4"),
    hdf5plugin.Blosc(cname="zstd", clevel=0), hdf5plugin.Blosc(cname="zstd", shuffle=2),
    hdf5plugin.Blosc2(cname="zstd"), dict(shuffle=True, **BLOSC), dict(compression="gzip")])
def test_sequence_read_decodes_whatever_the_compression(tmp_path, filters):
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 48, 64))
    for name, fill in (("sparse", None), ("zero", 0), ("noise", noise)):
        frames = write_sequence(tmp_path / name, {}, 3, hw=(48, 64), fill=fill, **filters)
        assert np.array_equal(data.Sequence(tmp_path / name).read(0, 3), frames)


def overwrite_frame(sequence, frame, place, content):
    """Overwrite the stored bytes of an event frame from `place` on."""
    at = data.open_events(sequence.file).id.get_chunk_info(frame).byte_offset + place
    whole = sequence.file.read_bytes()
    sequence.file.write_bytes(whole[:at] + content + whole[at + len(content):])


@pytest.mark.parametrize("place", [4, 12])  # bytes of the frame, bytes of the chunk
def test_sequence_read_refuses_a_chunk_whose_header_lies_about_its_sizes(tmp_path, place):
    write_sequence(tmp_path / "a", {}, 3, hw=(48, 64))
    overwrite_frame(data.Sequence(tmp_path / "a"), 1, place, b"xxxx")
    with pytest.raises(ValueError, match="frame 1 does not decode.*sizes .* are damaged"):
        data.Sequence(tmp_path / "a").read(0, 3)


def test_open_split_names_a_split_that_is_missing_unlabelled_or_of_two_sizes(tmp_path):
    make_set(tmp_path, [[], []], "val", length=3)
    make_set(tmp_path, [[1]], length=3)
    write_sequence(tmp_path / "train" / "t", {1: [BOX]}, 3, hw=(16, 32))
    for split, word in (("train", "not .24, 32."), ("val", "no labelled"), ("typo", "no such")):
        with pytest.raises(ValueError, match=word) as error:
            open_split(tmp_path, split)
        assert split in str(error.value)
    make_set(tmp_path / "b", [[], [1]], "val", length=3)
    assert len(open_split(tmp_path / "b", "val")) == 2


def test_open_split_refuses_class_ids_beyond_the_classes(tmp_path):
    make_set(tmp_path, [[1]], length=3)
    assert len(open_split(tmp_path, "train", num_classes=2)) == 1
    with pytest.raises(ValueError, match="train/s0: class ids from 1"):
        open_split(tmp_path, "train", num_classes=1)


def test_load_classes_refuses_other_numbers_damage_and_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="1 class_names"):
        data.load_classes(tmp_path, ("car",), 2)
    for text in ("", "{", "[]", '{"classes": 3}', '{"classes": []}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match="dataset.json"):
            data.load_classes(tmp_path, (), 2)
    with pytest.raises(ValueError, match="no such folder: .*typo"):
        data.load_classes(tmp_path / "typo", ("car", "tram"), 2)


def test_train_data_refuses_windows_longer_than_what_comes_before_each_label(toy_set):
    with pytest.raises(ValueError, match="random.*no labelled frame"):
        plan(toy_set, sampling="random", sequence_length=31)


@pytest.mark.parametrize("workers", [0, 1])
def test_make_loader_raises_a_workers_error_in_a_line_that_names_the_file(tmp_path, workers):
    sequences = open_split(make_set(tmp_path, [[5, 9, 13]], length=15), "train")
    overwrite_frame(sequences[0], 9, 0, bytes(200))
    loader = make_loader(plan(sequences).__getitem__, range(9), workers)
    with pytest.raises(ValueError, match=r"s0/event.*frame 9 does not decode") as error:
        for _ in range(9):
            next(loader)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_data_main_finds_what_training_would_fail_on(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5], [4], [6]], length=10)
    make_set(tmp_path, [[]], "val", length=10)
    make_set(tmp_path, [[1], [1]], "test", length=10)
    sequences = open_split(tmp_path, "train")
    overwrite_frame(sequences[1], 4, 0, bytes(100))
    data.open_events.cache_clear()
    for sequence, start in ((sequences[2], 1), (sequences[3], 0)):
        with h5py.File(sequence.file, "a", locking=False) as opened:
            opened["data"][start:] = 0  # most events lie beyond the labelled time
    os.truncate(tmp_path / "test" / "s1" / EVENTS, 9000)
    with pytest.raises(ValueError, match="training would fail"):
        data.main([str(tmp_path), "--split=train,val,test"])
    warning, _, _, decode, empty, unlabelled, cut = capsys.readouterr().out.splitlines()
    assert warning.startswith("WARNING: no dataset.json") and "--class_names" in warning
    assert decode.startswith(f"FINDING: {tmp_path}/train/s1") and "frame 4 does not" in decode
    assert empty.startswith(f"FINDING: {tmp_path}/train/s3: labelled, but hardly any window holds")
    assert unlabelled.startswith(f"FINDING: {tmp_path}/val: no") and "labelled" in unlabelled
    assert cut.startswith(f"FINDING: {tmp_path}/test/s1: ")


def test_data_main_finds_splits_whose_frames_differ_in_size(tmp_path, capsys):
    make_set(tmp_path, [[1]])
    make_set(tmp_path, [[1]], "test", hw=(48, 32))
    make_set(tmp_path, [[1]], "val")
    data.main([str(tmp_path), "--split=train,val,test", "--picture="])  # eval.py takes it
    shutil.rmtree(tmp_path / "val")
    make_set(tmp_path, [[1]], "val", hw=(48, 32))
    with pytest.raises(ValueError, match="training would fail, findings: 1"):
        data.main([str(tmp_path)])
    assert "FINDING: the splits' frames differ in size: {'train': " in capsys.readouterr().out


def test_data_main_warns_where_its_picture_cannot_be_written(tmp_path, capsys):
    make_set(tmp_path, [[1]], length=3)
    (tmp_path / "file").touch()
    data.main([str(tmp_path), "--split=train", f"--picture={tmp_path}/file/sizes.png"])
    assert "WARNING: no picture" in capsys.readouterr().out


# ==== configurator.py


@pytest.mark.parametrize("text, word", [
    ("batchsize = 3", "did you mean batch_size"),
    ("batch_size = 2.5", "no int"),
    ("batch_size = True", "no int"),
    ("fpn_stages = 3", "fpn_stages"),
    ("out_dir = 3", "out_dir"),
    ("learning_rate = float('nan')", "finite"),
    ("x = (", "never closed"),
    ("1 / 0", "division by zero"),
    ("import math", "helpers have names like _this"),
])
def test_configure_names_a_mistake_in_a_file(tmp_path, text, word):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=f"c.py.*{word}"):
        configurator.configure(KEYS, [str(tmp_path / "c.py")])


def test_configure_keeps_every_name_as_it_is_written_and_in_its_place():
    names = configurator.configure(KEYS, ["--names=car,,0x10,tram (old)"])["names"]
    assert names == ("car", "", "0x10", "tram (old)")
    assert configurator.configure(KEYS, ["--out_dir=~/runs"])["out_dir"] == f"{Path.home()}/runs"


@pytest.mark.parametrize("argv, word", [
    (["--learning_rat=1"], "learning_rate"),
    (["--batch_size=x"], "batch_size"),
    (["--batch_size"], "no value"),
    (["nothing.py"], "nothing.py"),
    (["settings.yaml"], "settings.yaml: no config NAME.py"),
    (["--compile=7"], "compile"),
    (["--zzz", "3"], "known are batch_size"),
    (["--fpn_stages=1,2.0"], "fpn_stages=2.0 is no int"),
    (["--fpn_stages=a,2"], "fpn_stages='a' is no int"),
])
def test_configure_names_a_mistake_on_the_command_line(argv, word):
    with pytest.raises(ValueError, match=word):
        configurator.configure(KEYS, argv)


def test_command_line_ends_in_one_line_for_a_mistake_and_in_130_for_ctrl_c():
    def mistaken(argv):
        raise ValueError("two\n  lines")

    def full(argv):
        np.empty(2**60, np.uint8)

    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^error: two lines$"):
        configurator.command_line(mistaken)
    with pytest.raises(SystemExit, match="^error: Unable to allocate"):
        configurator.command_line(full)
    with pytest.raises(SystemExit, match="^130$"):
        configurator.command_line(interrupted)


def test_command_line_shows_where_a_bug_is():
    def buggy(argv):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        configurator.command_line(buggy)


# ==== train.py


def spawn(*argv, **options):
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env, **options)


def kill_and_resume(traffic, tmp_path, options, kills, rng):
    """What a run was at each time it was killed: "writing" a checkpoint, or else "working"."""
    steps = 6 + 2 * kills
    argv = [*TINY, *options, f"--data_dir={traffic}", f"--max_steps={steps}", "--log_interval=2",
            f"--eval_interval={steps // 2}", "--checkpoint_interval=1"]
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    broken = tmp_path / "broken"
    ready, writing = broken / "ckpt.pt", broken / "ckpt.pt.tmp"
    resume = []
    happened = []
    for _ in range(kills):
        process = spawn(*argv, f"--out_dir={broken}", *resume)
        before = ready.stat().st_mtime if ready.exists() else 0
        writing.unlink(missing_ok=True)
        while process.poll() is None and not (ready.exists() and ready.stat().st_mtime > before):
            time.sleep(0.01)  # until the first checkpoint of this life
        time.sleep(rng.random())
        if rng.random() < 0.5:
            while process.poll() is None and not writing.exists():
                pass
        process.kill()
        process.communicate()
        if process.returncode < 0:
            happened.append("writing" if writing.exists() else "working")
        resume = ["--init_from=resume"]
    assert run_train(*argv, f"--out_dir={broken}", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", broken)
    return happened


@pytest.mark.parametrize("options", [
    ("--sampling=stream",),
    ("--sampling=random", "--gradient_accumulation_steps=2"),
    ("--sampling=mixed", "--num_workers=2"),
])
def test_train_killed_resumes_as_if_never_stopped(options, traffic, tmp_path):
    kill_and_resume(traffic, tmp_path, options, 1, np.random.default_rng(len(options[0])))


@soak
def test_train_fifty_kills_at_random_moments_change_nothing(traffic, tmp_path):
    rng = np.random.default_rng(0)
    happened = []
    plans = itertools.product(("stream", "random", "mixed"), (1, 2), (0, 2))
    for i, (kind, micro, workers) in enumerate(plans):
        options = (f"--sampling={kind}", f"--gradient_accumulation_steps={micro}",
                   f"--num_workers={workers}")
        happened += kill_and_resume(traffic, tmp_path / str(i), options, 4, rng)
    happened += kill_and_resume(traffic, tmp_path / "half", ("--dtype=float16",), 4, rng)
    print(f"{len(happened)} kills, {happened.count('writing')} as a checkpoint was written")
    assert len(happened) > 50
    assert happened.count("writing") > 5


@pytest.mark.parametrize("number, times, status", [
    (signal.SIGTERM, 2, 143),
    (signal.SIGINT, 1, 130),
])
def test_train_saves_at_a_signal_and_says_how_to_go_on(number, times, status, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--log_interval=1"]
    process = spawn(*argv, start_new_session=True)
    while process.poll() is None and not (tmp_path / "log.csv").exists():
        time.sleep(0.05)
    for _ in range(times):  # a job's end may reach a process twice, from torchrun as well
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    step = checkpoint_of(tmp_path)["step"]
    go_on = f"python train.py --out_dir={tmp_path} --init_from=resume"
    assert step >= 1 and f"stopped at step {step}; go on: {go_on}" in output
    assert "Traceback" not in output


def test_train_stops_at_once_at_a_second_ctrl_c_and_leaves_the_checkpoint(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    before = checkpoint_of(tmp_path)["model"]
    script = (
        "import sys, time, train\n"
        "def endless(*inputs):\n"
        "    print('step', flush=True)\n"
        "    time.sleep(60)\n"
        "train.Forward.forward = endless\n"
        "train.main(sys.argv[1:])\n")
    argv = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=9"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "step\n" in process.stdout
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes its step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert_same(before, checkpoint_of(tmp_path)["model"])


def test_train_in_a_thread_as_a_notebook_does(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1"]
    thread = threading.Thread(target=run_train, args=argv)
    thread.start()
    thread.join()
    assert checkpoint_of(tmp_path)["step"] == 1


def test_two_processes_stop_at_one_step_by_sigterm_resume_and_evaluate(traffic, tmp_path):
    argv = ["train.py", *TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    process = torchrun(*argv, "--eval_interval=2", start=subprocess.Popen,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (tmp_path / "best.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    checkpoint = checkpoint_of(tmp_path)
    step = checkpoint["step"]
    assert f"stopped at step {step}" in output
    assert len(checkpoint["states"]) == 2 and step >= 2
    again = ["--init_from=resume", f"--max_steps={step + 1}"]
    more = torchrun("train.py", f"--out_dir={tmp_path}", *again, capture_output=True)
    assert more.returncode == 0, more.stderr
    assert checkpoint_of(tmp_path)["step"] == step + 1
    done = torchrun("eval.py", f"--ckpt={tmp_path}/ckpt.pt", capture_output=True)
    assert done.returncode == 0, done.stderr


def test_train_on_a_full_disk_leaves_the_checkpoint_before(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="ckpt.pt: not written .is the disk full.*intact"):
            train.main([*argv, "--init_from=resume", "--max_steps=2", "--eval_interval=9"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert run_train(*argv, "--init_from=resume", "--max_steps=2") == 0


def test_train_out_of_memory_says_what_to_change_and_leaves_the_checkpoint(
        traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(train, "build", full)
        with pytest.raises(ValueError, match="out of memory; lower batch_size"):
            train.main(argv)
    with monkeypatch.context() as patch:
        patch.setattr(train.Forward, "forward", full)
        for more in ("--max_steps=2", "--init_from=resume"):
            with pytest.raises(ValueError, match="out of memory; lower batch_size"):
                train.main([*argv, more])
    assert checkpoint_of(tmp_path)["step"] == 0
    assert run_train(*argv, "--init_from=resume", "--max_steps=1") == 0


def test_train_from_poisoned_weights_ends_the_run(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path / "a")
    more = [f"--init_from={tmp_path}/poisoned.pt", "--max_steps=9", "--max_bad_steps=2"]
    for value, words in ((3e38, "2 steps in a row"), (math.nan, "0.norm.bias is not finite")):
        checkpoint["model"]["stages.0.norm.bias"][:] = value
        torch.save(checkpoint, tmp_path / "poisoned.pt")
        with pytest.raises(ValueError, match=words):
            train.main([*argv, f"--out_dir={tmp_path}/{value}", *more])


def test_train_refuses_weights_of_another_architecture(traffic, tmp_path):
    write_checkpoint(tmp_path / "a.pt", tiny_detector())
    with pytest.raises(ValueError, match="a.pt: .* weights do not fit"):
        trained(traffic, tmp_path / "out", f"--init_from={tmp_path}/a.pt", "--embed_dim=32")


def test_train_starts_class_layers_anew_where_as_many_classes_have_other_names(tmp_path, capsys):
    for split in ("train", "val"):
        make_set(tmp_path, [[2, 3]], split, length=5)
    options = ["--num_classes=2", "--max_steps=1", "--learning_rate=1e-12"]
    start = trained(tmp_path, tmp_path / "a", *options, "--class_names=car,bike")["model"]
    options += ["--seed=1", f"--init_from={tmp_path}/a/ckpt.pt"]
    for names, kept in (("car,bike", True), ("bike,car", False)):
        capsys.readouterr()
        own = trained(tmp_path, tmp_path / names, *options, f"--class_names={names}")["model"]
        assert ("class layers start from scratch" in capsys.readouterr().out) != kept
        class_weight, box_weight = (f"heads.0.{part}_pred.weight" for part in ("cls", "reg"))
        assert torch.allclose(own[class_weight], start[class_weight], atol=1e-6) == kept
        torch.testing.assert_close(own[box_weight], start[box_weight])
    with pytest.raises(ValueError, match="the run has classes .'car', 'bike'., the data .'bike'"):
        train.main([f"--out_dir={tmp_path}/a", "--init_from=resume", "--class_names=bike,car"])


@pytest.mark.parametrize("kind", ["longer", "shorter", "of stride 0"])
def test_moments_of_another_shape_in_a_checkpoint_cannot_crash_the_optimizer(
        kind, traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path)
    for state in checkpoint["optimizer"]["state"].values():
        if kind == "longer":
            state["exp_avg"] = torch.zeros(7)
        elif kind == "shorter":
            state["exp_avg"] = torch.zeros(1)
        else:
            state["exp_avg"] = torch.zeros(1).expand(state["exp_avg"].shape)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with contextlib.suppress(ValueError):  # in one line, or as if they had been of this shape
        assert run_train(f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=2") == 0


@pytest.mark.parametrize("option, word", [
    ("--class_names=a,b --num_classes=3", "class"),
    ("--num_classes=3", "num_classes"),
    ("--data_dir=nowhere", "nowhere"),
    ("--init_from=missing.pt", "missing.pt"),
    ("--input_hw=10,10", "input_hw"),
    ("--device=cuda:99", "device"),
])
def test_train_names_what_does_not_fit_the_data_before_any_work(option, word, traffic, tmp_path):
    out = tmp_path / "out"
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={out}", *option.split()]
    with pytest.raises(ValueError, match=word) as error:
        train.main(argv)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("option", [
    "--sampling=strem", "--batch_size=0", "--sequence_length=0", "--max_steps=0", "--seed=-1",
    "--zoom_in_max=0.5", "--zoom_out_max=0.9", "--gradient_accumulation_steps=0",
    "--sampling=mixed --mixed_random=0", "--sampling=mixed --batch_size=1", "--eval_interval=0",
    "--patch_size=5", "--device=tpu", "--num_workers=-1", "--grad_clip_by=x", "--device=cpu:x",
    "--dtype=int8", "--grad_clip=-1", "--learning_rate=1e999", "--weight_type=cubic",
    "--seed=99999999999999999999",
])
def test_check_names_values_that_cannot_work_before_a_set_is_simulated(option, monkeypatch):
    monkeypatch.setattr(train, "ensure_toy", lambda *a: pytest.fail("simulated"))
    key = option.split()[-1][2:].split("=")[0]
    with pytest.raises(ValueError, match=key):
        train.main(option.split())


@pytest.mark.parametrize("script, option, word", [
    ("train.py", "--data_dir=nowhere", "nowhere"),
    ("train.py", "configs/toi.py", "configs/toi.py"),
    ("eval.py", "--ckpt=nothing.pt", "nothing.pt"),
])
def test_scripts_end_in_one_line_for_a_mistake(script, option, word):
    done = subprocess.run(
        [sys.executable, script, option], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_train_names_a_validation_set_of_another_size(traffic, tmp_path):
    shutil.copytree(Path(traffic) / "train", tmp_path / "train")
    shutil.copy(Path(traffic) / "dataset.json", tmp_path)
    make_set(tmp_path, [[3]], "val", length=5)
    with pytest.raises(ValueError, match=r"\(24, 32\) in val"):
        train.main([*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out"])


def test_train_refuses_an_out_dir_that_holds_a_checkpoint(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1"]
    assert run_train(*argv) == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="--init_from=resume.*--out_dir"):
        train.main(argv)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    (tmp_path / "ckpt.pt").unlink()
    with pytest.raises(ValueError, match="holds best.pt, log.csv: "):
        train.main(argv)
    with pytest.raises(ValueError, match="out_dir is empty"):
        train.main([*argv, "--out_dir="])


def test_resume_takes_changed_options_and_a_moved_folder(traffic, tmp_path):
    trained(traffic, f"{tmp_path}/a/", "--max_steps=1")
    (tmp_path / "a").rename(tmp_path / "b")
    options = ["--init_from=resume", "--max_steps=2", "--weight_decay=0.5"]
    assert run_train(f"--out_dir={tmp_path}/b", *options) == 0
    checkpoint = checkpoint_of(tmp_path / "b")
    assert checkpoint["step"] == 2
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert "init_from = 'scratch'" in (tmp_path / "b/config.py").read_text()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("option", ["--sequence_length=2", "--batch_size=1", "--seed=3"])
def test_resume_with_other_streams_starts_their_states_at_zero(
        option, traffic, tmp_path, monkeypatch, capsys):
    checkpoint = trained(traffic, tmp_path, "--max_steps=1")
    assert any(x.any() for x in checkpoint["states"][0][0])
    assert run_train(f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=1", option) == 0
    assert "their states start at 0" in capsys.readouterr().out


def test_resume_with_another_optimizer_is_refused(traffic, tmp_path):
    trained(traffic, tmp_path, "--max_steps=1")
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="optimizer=adamw; --init_from="):
        train.main([f"--out_dir={tmp_path}", "--init_from=resume", "--optimizer=muon"])
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_resume_equals_an_unbroken_run_also_where_the_validation_broke(
        traffic, tmp_path, monkeypatch):
    options = ("--max_steps=4", "--log_interval=3", "--eval_interval=2", "--optimizer=muon")
    trained(traffic, tmp_path / "whole", *options)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(detect, "run", full)
        with pytest.raises(ValueError, match="out of memory.*eval_batch_size"):
            trained(traffic, tmp_path / "broken", *options)
    assert checkpoint_of(tmp_path / "broken")["step"] == 2
    assert run_train(f"--out_dir={tmp_path}/broken", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_resume_of_weights_without_a_training_state_is_refused(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path)
    del checkpoint["progress"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="--init_from="):
        train.main([f"--out_dir={tmp_path}", "--init_from=resume"])


def poisoned(monkeypatch, what, steps):
    """Let the micro-batches of `steps` carry a NaN in their boxes, or infinite events."""
    make_loader = data.make_loader

    def loader(item, keys, num_workers):
        for i, batch in zip(keys, make_loader(item, keys, num_workers)):
            if i in steps and what == "boxes":
                batch.targets[0, 0] = torch.tensor([0, math.nan, 20, 10, 10])
            if i in steps and what == "events":
                batch = batch._replace(events=torch.full(batch.events.shape, math.inf))
            yield batch

    monkeypatch.setattr(data, "make_loader", loader)


@pytest.mark.parametrize("what", ["boxes", "events"])
def test_step_that_is_not_finite_is_skipped_and_leaves_nothing_behind(
        what, traffic, tmp_path, monkeypatch, capsys):
    argv = [*TINY, f"--data_dir={traffic}", "--log_interval=1"]
    assert run_train(*argv, "--max_steps=1", f"--out_dir={tmp_path}/one") == 0
    poisoned(monkeypatch, what, {1})
    assert run_train(*argv, "--max_steps=2", f"--out_dir={tmp_path}/two") == 0
    one, two = checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "two")
    assert_same(one["states"], two["states"])
    for key in one["model"]:  # the rate of step 0 differs with max_steps, the statistics do not
        if "running" in key or "num_batches" in key:
            assert torch.equal(one["model"][key], two["model"][key]), key
    assert all(value.isfinite().all() for value in two["model"].values())
    assert two["progress"]["bad_steps"] == 1
    assert "step 1:" in capsys.readouterr().out
    assert "loss" not in two["progress"]["log"][1]  # no mean of no steps


def test_max_bad_steps_in_a_row_end_the_run_and_keep_the_checkpoint(
        traffic, tmp_path, monkeypatch):
    poisoned(monkeypatch, "boxes", {2, 3, 4})
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=9"]
    with pytest.raises(ValueError, match="3 steps in a row"):
        train.main([*argv, "--max_bad_steps=3", "--checkpoint_interval=1"])
    assert all(x.isfinite().all() for x in checkpoint_of(tmp_path)["model"].values())


@pytest.mark.parametrize("options, word", [
    ("--max_memory_gib=0.01", "passed max_memory_gib.*checkpointing"),
    ("--max_loss_ratio=0.5 --patience=3", "diverged"),
])
def test_max_memory_gib_and_max_loss_ratio_end_the_run(options, word, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=30"]
    with pytest.raises(ValueError, match=word):
        train.main([*argv, *options.split()])
    assert checkpoint_of(tmp_path)["step"] == 0


def test_train_on_frames_of_one_cell_says_to_raise_batch_size(tmp_path):
    for split in ("train", "val"):
        make_set(tmp_path, [[2, 3]], split, length=5, hw=(32, 32))
    argv = [*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out", "--num_classes=2"]
    with pytest.raises(ValueError, match="raise batch_size"):
        train.main([*argv, "--batch_size=1"])


# ==== eval.py


def test_stream_detector_refuses_a_frame_of_another_size_and_goes_on():
    frame = MemorySequence("a", 2, (1,)).data[0]
    detector = StreamDetector(small_detector())
    for wrong in (frame[0], frame[0, :32], frame[:, :32], frame.reshape(20, 32, 128)):
        with pytest.raises(ValueError, match=r"a frame of \(.*, expected \(20, 64, 64\)"):
            detector(wrong)
    assert detector(frame)["t"][0] == 50_000  # the clock did not move meanwhile


def test_detections_and_score_boxes_refuse_an_unknown_score_or_filter(four_anchors):
    with pytest.raises(ValueError, match="expected cls or obj"):
        detections(four_anchors, [7, 8], score="obj")
    with pytest.raises(ValueError, match="box_filter='psee': expected none or prophesee"):
        score_boxes([], [], 64, 64, NAMES, "psee")


def test_compare_refuses_other_protocols_and_what_is_no_report(tmp_path):
    result = some_report()[2]
    base, other = tmp_path / "base.json", tmp_path / "other.json"
    base.write_text(json.dumps(result))
    for key, value in {"split": "val", "confidence": 0.1, "boxes": 7, "data_dir": "b"}.items():
        changed = copy.deepcopy(result)
        changed["settings"][key] = value
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"other.json: not comparable .*{key}.: {value!r}"):
            compare([base, other])
    for text in ('{"settings": {}}', "[]", "3", ""):
        other.write_text(text)
        with pytest.raises(ValueError, match="other.json"):
            compare([base, other])
    for paths in ([base, tmp_path / "nowhere.json"], [__file__]):
        with pytest.raises(ValueError):
            compare(paths)


def test_compare_without_reports_says_how():
    with pytest.raises(ValueError, match="needs reports"):
        evaluation.main(["--compare"])


def test_main_finds_a_folder_that_cannot_be_written_before_it_evaluates(ckpt, monkeypatch):
    monkeypatch.setattr(evaluation, "run", None)
    with pytest.raises(ValueError, match="no report can be written to .*ckpt.pt.eval; choose"):
        evaluation.main([f"--ckpt={ckpt}", f"--out_dir={ckpt}"])


def test_main_refuses_other_classes(ckpt, tmp_path):
    other = write_prepared(tmp_path / "three", classes=NAMES[:3])
    with pytest.raises(ValueError, match="3 class_names, num_classes=4"):
        evaluation.main([f"--ckpt={ckpt}", f"--data_dir={other}"])
    turned = write_prepared(tmp_path / "turned", classes=NAMES[::-1])
    with pytest.raises(ValueError, match="ckpt.pt is for 4 classes"):
        evaluation.main([f"--ckpt={ckpt}", f"--data_dir={turned}"])


def test_main_names_what_is_wrong(ckpt):
    words = {"--score=objectness": "score", "--dtype=int8": "dtype", "--split=val": "val"}
    words |= {"--spilt=val": "did you mean split", "--confidence=-1": "confidence"}
    for word, message in words.items():
        with pytest.raises(ValueError, match=message):
            evaluation.main([f"--ckpt={ckpt}", word])


# ==== pictures.py


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -1e30])
def test_draw_of_boxes_that_are_no_numbers_or_lie_far_outside(value):
    places = [(value, 3, 10, 10), (3, value, 10, 10), (3, 3, abs(value), 10)]
    boxes = some_boxes(0, places, 1, 0.5)
    assert draw(np.zeros((20, 32, 100), np.uint8), boxes, NAMES, boxes).size == (500, 160)


# ---- long runs


def test_nms_of_many_boxes_in_bounded_blocks():
    torch.manual_seed(0)
    corner = 8 * torch.randint(0, 40, (20_000, 2)).float()
    box = torch.cat((corner, corner + 10), 1)  # neighbours overlap by less than the threshold
    kept = nms(box, torch.rand(20_000), torch.zeros(20_000), 0.45)
    assert len(kept) == len(corner.unique(dim=0)) == len(corner[kept].unique(dim=0))


def resident_mb():
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak_detector():
    torch.set_num_threads(1)
    model = small_detector(hw=(32, 64), small_object_attention=True)
    for head in model.heads:
        head.cls_pred.bias.data.fill_(0.5)  # boxes with p_obj * p_cls of some 0.4
    return model


@soak
def test_stream_detector_takes_twenty_thousand_frames_in_constant_memory():
    detector = StreamDetector(soak_detector(), confidence=0.3)
    events = random_events(50, 20, 32, 64)
    for k in range(20_000):
        detector(events[k % 50])
        if k == 2000:
            before = resident_mb()
    assert resident_mb() - before < 20


class EndlessSequence(MemorySequence):
    """20,000 frames, a hundred of them labelled; notes what memory is in use as it is read."""

    def __init__(self):
        super().__init__("a", 50, range(0, 50, 5), (32, 64))
        self.length = 20_000
        self.label_frames = np.arange(199, 20_000, 200)
        self.boxes = 10 * self.boxes
        self.memory = []

    def read(self, start, stop):
        self.memory.append(resident_mb())
        return self.data[start % 50 : start % 50 + 1].repeat(stop - start, 0)


@soak
def test_run_takes_twenty_thousand_frames_in_constant_memory():
    sequence = EndlessSequence()
    labels, found = run(soak_detector(), [sequence], 1, 5, confidence=0.3)
    kept = sum(boxes.nbytes for boxes in found) / 1e6
    memory = sequence.memory
    assert len(found) == len(labels) == 100
    assert memory[-1] - memory[len(memory) // 10] < 20 + kept


# ==== prepare.py


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
    write_dat(folder / "a_td.dat", t, x, y, p)
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


def test_check_blosc_refuses_sizes_that_a_header_does_not_tell():
    chunk = np.array([0x02010102, 4000, 4000, 20], "<u4").tobytes() + b"data"
    formats.check_blosc(chunk, 4000)
    for damaged_chunk, nbytes in ((chunk, 4001), (chunk[:-1], 4000), (chunk[:9], 4000), (b"", 0)):
        with pytest.raises(ValueError, match="sizes in a Blosc chunk's header are damaged"):
            formats.check_blosc(damaged_chunk, nbytes)


def test_read_h5_names_a_missing_filter_and_other_columns(tmp_path, monkeypatch):
    write_table(tmp_path / "a.hdf5", *some_events(10, 100), compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with pytest.raises(ValueError, match="a.hdf5.*32000.*ECF.*HDF5_PLUGIN_PATH.*RAW"):
        list(Recording(tmp_path / "a.hdf5", 48, 64).chunks())
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["events/ts"] = file["events/pol"] = [1, 2]
    with pytest.raises(ValueError, match="b.h5: /events holds pol, ts; expected t, x, y, p"):
        Recording(tmp_path / "b.h5")


def test_read_h5_names_how_to_tell_a_size_that_is_missing(tmp_path):
    path = write_h5(tmp_path / "b.hdf5", *some_events(100, 50_000), size=None, group="CD/events")
    with pytest.raises(ValueError, match="b.hdf5: the sensor's size.*--height"):
        Recording(path)


def test_read_h5_takes_no_lock_on_the_file(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    columns = some_events(2500, 10**6)
    write_table(tmp_path / "a.hdf5", *columns)
    with open(tmp_path / "a.hdf5", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        got = read_events(Recording(tmp_path / "a.hdf5", 48, 64))
    np.testing.assert_array_equal(got, columns)


def test_read_faery_names_the_package_or_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faery", None)
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n")
    with pytest.raises(ValueError, match="a.raw.*pip install faery"):
        Recording(tmp_path / "a.raw", 720, 1280)
    with pytest.raises(ValueError, match="b.raw: no such file"):
        Recording(tmp_path / "b.raw", 720, 1280)


def test_a_dat_file_that_ends_within_an_event_is_refused(tmp_path):
    path = write_dat(tmp_path / "a_td.dat", *some_events(350, 10**6))
    assert len(read_events(Recording(path))[0]) == 350
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="a_td.dat: ends within an event: truncated"):
        read_events(Recording(path))


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


@pytest.mark.parametrize("block", [5, 80])
def test_chunks_refuse_large_disorder_also_in_small_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", block)
    t = some_events(2000, 1_900_000)[0]
    swapped = np.concatenate([t[:500], t[1000:1500], t[500:1000], t[1500:]])
    with pytest.raises(ValueError, match="a_td.h5: events are out of order.*sort them"):
        read_times(tmp_path / "a_td.h5", swapped)


def test_chunks_drop_and_count_events_off_the_sensor(tmp_path):
    t, x, y, p = some_events(300, 60_000)
    x[[3, 7]] = 64
    y[9] = 1000
    recording = Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))
    assert sum(len(chunk[0]) for chunk in recording.chunks()) == 297 and recording.outside == 3
    wrong = Recording(write_h5(tmp_path / "b_td.h5", t, x + 100, y, p))
    with pytest.raises(ValueError, match="b_td.h5.*many events lie off the sensor"):
        list(wrong.chunks())


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


def test_prepare_refuses_seconds_without_labels_and_questions_milliseconds(tmp_path, capsys):
    t, *others = some_events(20_000, 2_000_000)
    raw = raw_set(tmp_path / "raw", events=(t / 1e6, *others))
    with pytest.raises(ValueError, match="a_td.h5: too many events a us"):
        prepare.prepare(raw, tmp_path / "out")
    raw_set(raw, events=(t // 1000, *others))
    prepare.prepare(raw, tmp_path / "out")
    assert "1999 us long in all (are times in microseconds?)" in capsys.readouterr().out


def test_prepare_tells_of_labelled_frames_before_and_after_all_events(tmp_path, capsys):
    t, *others = some_events(2_000, 1_000_000)
    raw_set(tmp_path / "raw", some_labels(GRID_US[:17]), (t + 550_000, *others))
    prepare.prepare(tmp_path / "raw", tmp_path / "out")
    said = capsys.readouterr().out
    assert "5 labelled frames before the first event, " in said
    assert "2 labelled frames after the last event" in said


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


def test_read_labels_names_the_fields_that_it_expects(tmp_path):
    old = np.zeros(3, [("ts", "<u8"), ("x", "<f4"), ("y", "<f4")])
    for other in (old, np.zeros((20, 8))):
        np.save(tmp_path / "c_bbox.npy", other)
        with pytest.raises(ValueError, match="c_bbox.npy .expected: an array with fields t x y"):
            read_labels(tmp_path / "c_bbox.npy")


def test_name_classes_makes_numbers_names_and_refuses_ids_from_one(tmp_path, capsys):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:6], class_id=[1, 2, 3] * 2))
    with pytest.raises(ValueError, match="class ids .1, 2, 3.*0 to 2: a, b, c"):
        prepare.prepare(raw, tmp_path / "out", class_names=("a", "b", "c"))
    prepare.prepare(raw, tmp_path / "out", class_names=(10, 20, 30, 40))
    assert "no boxes of 10\n" in capsys.readouterr().out
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


@pytest.mark.parametrize("change, words", [
    (dict(class_id=-1), "a_bbox.npy.*a class_id is below 0, or no whole number"),
    (dict(class_id=0.7), "a_bbox.npy.*a class_id is below 0, or no whole number"),
    (dict(class_id=4e9), "class ids up to 4000000000: count them from 0"),
    (dict(t=math.nan), "a_bbox.npy.*a time is not finite"),
    (dict(x=0.1, y=0.2, w=0.3, h=0.2), "a_bbox.npy.*boxes in fractions of the frame"),
    (dict(x=0.1, y=0.2, w=[0.3, 1.2, 0], h=0.2), "a_bbox.npy.*boxes in fractions of the frame")])
def test_prepare_refuses_class_ids_and_boxes_that_are_none(change, words, tmp_path):
    labels = some_labels(GRID_US[:3])
    labels = labels.astype([(name, "f8") for name in labels.dtype.names])
    for name, value in change.items():
        labels[name] = value
    with pytest.raises(ValueError, match=words):
        prepare.prepare(raw_set(tmp_path / "raw", labels), tmp_path / "out")
    assert not (tmp_path / "out/train").exists()


def test_prepare_tells_corners_from_sides_and_counts_boxes_that_are_not_finite(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, (40, 30), (17, 2)).T
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:17], x=x, y=y, w=x + 30, h=y + 20))
    with pytest.raises(ValueError, match="a_bbox.npy: most boxes leave the frame.*x2 and y2"):
        prepare.prepare(raw, tmp_path / "out")
    boxes = some_labels(GRID_US[:5])
    boxes["w"][:2] = [np.inf, np.nan]
    raw_set(raw, boxes)
    prepare.prepare(raw, tmp_path / "out")
    assert "train/a: 2 boxes not finite, " in capsys.readouterr().out


@pytest.mark.parametrize("dataset, ids, refused", [
    ("etram", (1, 8), True), ("etram", (0, 7), False), ("gen1", (1, 2), True),
    ("gen4", (1, 5), False)])
def test_prepare_refuses_ids_from_1_of_every_data_set_that_has_no_others(
        dataset, ids, refused, tmp_path):
    boxes = some_labels(GRID_US[:2], class_id=ids)
    raw = raw_set(tmp_path / "raw", boxes)
    if refused:
        with pytest.raises(ValueError, match="class ids .*count ids from 0"):
            prepare.prepare(raw, tmp_path / "out", dataset)
    else:
        assert prepare.prepare(raw, tmp_path / "out", dataset) == {"prepared": 1}


@pytest.mark.parametrize("scale, zero, refused", [
    (1e-3, 0, True), (1e-6, 0, True), (1, 0, False), (1e-6, 1_700_000_000, True)])
def test_prepare_refuses_events_and_labels_that_share_another_unit(scale, zero, refused, tmp_path):
    t, *others = some_events(20_000, 20_000_000)
    labels = some_labels(np.arange(1, 200) * 100_000).astype(
        [(name, "f8" if name == "t" else BOX_DTYPE[name]) for name in BOX_DTYPE.names])
    labels["t"] = labels["t"] * scale + zero
    raw = raw_set(tmp_path / "raw", labels, (t * scale + zero, *others))
    if refused:
        with pytest.raises(ValueError, match="a_td.h5: events from .*labels from .*another unit"):
            prepare.prepare(raw, tmp_path / "out")
    else:
        assert prepare.prepare(raw, tmp_path / "out") == {"prepared": 1}


def test_prepare_tells_of_labels_so_far_apart_as_nanoseconds_are(tmp_path, capsys):
    t, *others = some_events(2_000, 700_000)
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:6] * 1000), (t * 1000, *others))
    prepare.prepare(raw, tmp_path / "out")
    assert "100000000 us between labels (are all times in nanosec" in capsys.readouterr().out


def test_a_clock_of_32_bits_is_unwrapped_in_labels_as_in_events(tmp_path):
    t, *others = some_events(3000, 1_900_000)
    start = 2**32 - 1_000_000
    boxes = np.repeat(GRID_US[:17], 3) + np.tile([0, 900, 300], 17) + start
    for name, wrap in (("whole", 2**62), ("wrapped", 2**32)):
        labels = some_labels(boxes % wrap)
        raw = raw_set(tmp_path / name, labels, ((t + start) % wrap, *others))
        assert prepare.prepare(raw, tmp_path / name) == {"prepared": 1}
    assert same_tree(load(tmp_path / "whole/train/a"), load(tmp_path / "wrapped/train/a"))


def test_boxes_of_one_frame_whose_times_lie_a_little_apart_stay_together(tmp_path, capsys):
    times = np.repeat(GRID_US[:5], 3) + np.tile([0, 7, 1500], 5)
    raw = raw_set(tmp_path / "raw", some_labels(times))
    prepare.prepare(raw, tmp_path / "out")
    sequence = data.Sequence(tmp_path / "out/train/a")
    assert [len(boxes) for boxes in sequence.boxes] == [3] * 5
    times = np.arange(0, 6000, 1000)
    np.testing.assert_array_equal(prepare.joined(times), times)  # no bursts, but 1 kHz
    times = np.concatenate([GRID_US[:5], GRID_US[:5] + 5000])
    raw_set(raw, some_labels(times, class_id=np.repeat([0, 1], 5)), names=("two",))
    assert "left out" not in capsys.readouterr().out
    prepare.prepare(raw, tmp_path / "out")
    assert "two: 5 label times left out, 1 classes gone with them, " in capsys.readouterr().out


def test_find_sequences_refuses_two_files_of_one_name_and_tells_what_it_ignores(tmp_path, capsys):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:3]), splits=("train", "val"))
    (raw / "train/a_td.dat").write_bytes(b"converted to a_td.h5")
    (raw / "validation").mkdir()
    (raw / "train/notes.txt").touch()
    assert prepare.prepare(raw, tmp_path / "out") == {"prepared": 2}
    said = capsys.readouterr().out
    assert "a_td.dat is not used, " in said and "2 ignored, as " in said and "validation" in said
    assert "WARNING: " in said and "val/a_td.h5 seems to be in two splits" in said
    for name in ("a.h5", "a_td_bbox.npy"):
        (raw / "train" / name).touch()
        with pytest.raises(ValueError, match="a.*a.*two of one name"):
            prepare.prepare(raw, tmp_path / "out")
        (raw / "train" / name).unlink()
    (raw / "train/a_labels.npy").touch()
    assert prepare.prepare(raw, tmp_path / "out") == {"there already": 2}
    (raw / "train/a_bbox.npy").unlink()
    for name in ("a_labels.npy", "a_bbox.csv"):
        (raw / "train" / name).touch()
        with pytest.raises(ValueError, match=f"{name}: labels. Call them NAME_bbox.npy"):
            prepare.prepare(raw, tmp_path / "out")
        (raw / "train" / name).unlink()


def test_labels_sorted_by_track_keep_their_times_in_recordings_of_over_an_hour(tmp_path):
    tracks = (range(4200, 4290), range(1, 60), range(30, 90))
    times = np.concatenate([np.array(track) * 10**6 for track in tracks])
    np.save(tmp_path / "a_bbox.npy", some_labels(times))
    np.testing.assert_array_equal(prepare.read_labels(tmp_path / "a_bbox.npy")["t"], np.sort(times))


def test_many_boxes_of_one_frame_are_no_fast_clock_and_one_low_car_is_no_corner(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels(500_000 + np.arange(0, 1100, 100)))
    parked = some_labels(GRID_US[:17], x=2, y=16, w=30, h=34)  # its foot is below the frame
    raw_set(raw, parked, names=("b",), events=some_events(3000, 1_900_000))
    assert prepare.prepare(raw, tmp_path / "out") == {"prepared": 2}
    assert len(data.Sequence(tmp_path / "out/train/a").boxes[0]) == 11


def test_prepare_does_not_take_an_empty_folder_for_a_sequence(tmp_path, capsys):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:3]))
    (tmp_path / "out/train/a").mkdir(parents=True)
    argv = [f"--src={raw}", f"--dst={tmp_path}/out"]
    prepare.main(argv)
    assert "{'prepared': 1}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out/train/a/labels_v2")  # a sequence is made whole or not at all
    prepare.main(argv)
    assert "delete its DST/SPLIT/NAME first" in capsys.readouterr().out


def test_without_names_a_damaged_label_file_does_not_settle_the_classes(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:3], class_id=1))
    raw_set(raw, some_labels(GRID_US[:3], class_id=4), names=("b",))
    damaged = raw / "train/b_bbox.npy"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="1 of 2 failed.*b_bbox.npy"):
        prepare.prepare(raw, tmp_path / "out")
    assert data.load_classes(tmp_path / "out", (), 0) == ("0", "1")
    damaged.write_bytes(whole)
    assert prepare.prepare(raw, tmp_path / "out") == {"there already": 1, "prepared": 1}
    assert data.load_classes(tmp_path / "out", (), 0) == ("0", "1", "2", "3", "4")
    fewer = raw_set(tmp_path / "fewer", some_labels(GRID_US[:3]), splits=("test",))
    assert prepare.prepare(fewer, tmp_path / "out") == {"prepared": 1}
    assert data.load_classes(tmp_path / "out", (), 0) == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("names", [("car", "car"), ("car", "", "bike")])
def test_class_names_that_are_empty_or_there_twice_are_refused(names, tmp_path):
    raw = raw_set(tmp_path / "raw")
    with pytest.raises(ValueError, match="classes car, .*: one is empty or there twice"):
        prepare.prepare(raw, tmp_path / "out", class_names=names)
    with pytest.raises(ValueError, match="classes car, .*: one is empty or there twice"):
        data.load_classes(tmp_path, names, 0)
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": "car"}))
    with pytest.raises(ValueError, match="dataset.json, expected.*no list"):
        data.load_classes(tmp_path, (), 0)


@pytest.mark.parametrize("key, change, words", [
    ("x", lambda x: x / 64, "x or y has fractions"),
    ("x", lambda x: x + 2**32, "many events lie off the sensor"),
    ("x", lambda x: x + 16, "many events lie off the sensor"),
    ("t", lambda t: np.append(t[:60] + 10**9, t[60:]), "several recordings")])
def test_events_off_the_sensor_or_far_in_time_are_refused(key, change, words, tmp_path):
    raw = raw_set(tmp_path / "raw")
    with h5py.File(raw / "train/a_td.h5", "r+") as file:
        column = file["events"].pop(key)[:]
        file["events"][key] = change(column.astype(np.int64))
    with pytest.raises(ValueError, match=f"a_td.h5: .*{words}"):
        prepare.prepare(raw, tmp_path / "out")


def test_a_recording_of_one_instant_is_not_prepared(tmp_path):
    raw = raw_set(tmp_path / "raw", None, some_events(1, 700_000))
    assert prepare.prepare(raw, tmp_path / "out") == {"skipped": 1}


def test_a_disk_that_fills_up_ends_in_one_line(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:17]), some_events(3000, 1_900_000))
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, whole[1]))  # of a file
    try:
        with pytest.raises(ValueError, match="1 of 1 failed.*histogram.*is the disk full"):
            prepare.prepare(raw, tmp_path / "out")
        with pytest.raises(ValueError, match="val_0000_td.part: not written .is the disk full"):
            simulate.simulate(tmp_path, 0, **SMALL_SCENE | {"train": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)


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


# ==== simulate.py


def test_simulate_interrupted_leaves_no_half_recording(small_traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *a: 1 / 0)  # once the events are written
    with pytest.raises(ZeroDivisionError):
        simulate.simulate(tmp_path, 0, **SMALL_SCENE)
    assert not list(tmp_path.glob("*/*_td.h5"))
    monkeypatch.undo()
    simulate.simulate(tmp_path, 0, **SMALL_SCENE)
    both = [raw_recording(folder, SMALL_NAMES[0]) for folder in (small_traffic, tmp_path)]
    assert all(map(np.array_equal, *both))
    monkeypatch.setattr(simulate, "make_scene", lambda *a: pytest.fail("simulated again"))
    simulate.simulate(tmp_path, 0, **SMALL_SCENE)


def test_ensure_toy_makes_the_set_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "defaults", simulate.defaults | SMALL_SCENE)
    (tmp_path / "toy/.partial").mkdir(parents=True)  # as an interrupted prepare.py leaves it
    simulate.ensure_toy(tmp_path / "toy", 0)
    assert len(list((tmp_path / "toy/val").iterdir())) == 2
    prepared = load(tmp_path / "toy/val/val_0000")
    assert prepared["event_representations_ds2_nearest.h5"].shape[1:] == (20, 24, 32)
    assert prepared["labels"]["w"].min() < 10
    monkeypatch.setattr(simulate, "simulate", lambda *a: pytest.fail("made again"))
    simulate.ensure_toy(tmp_path / "toy", 0)


def test_simulate_names_wrong_options(tmp_path):
    with pytest.raises(ValueError, match="sizes=.9, 6."):
        simulate.simulate(tmp_path, sizes=(9, 6))
    with pytest.raises(ValueError, match="0.2 or more"):
        simulate.simulate(tmp_path, seconds=0.0)
    with pytest.raises(ValueError, match="unknown key"):
        simulate.main(["--second=3"])


# ==== demo.py


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "absent"])
def test_demo_leaves_nothing_behind_a_bad_recording(tmp_path, checkpoint, kind):
    recording = tmp_path / "bad.h5"
    if kind in ("cut", "empty"):
        whole = write_recording(recording, events=200_000 * (kind == "cut")).read_bytes()
        recording.write_bytes(whole[:100_000])
    if kind == "text":
        recording.write_text("hello")
    before = set(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match="bad.h5"):
        run_demo(checkpoint, recording, tmp_path / "out.gif", f"--boxes={tmp_path / 'b.npy'}")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option, word", [
    ("--class_names=a,b", "class_names"), ("--dtype=int8", "dtype"),
    ("--recording=notes.txt", "notes.txt"), ("--recording=nowhere", "nowhere"),
    ("--recording=", "expected --recording"),
    ("--out=x.avi", "expected --recording"), ("--boxes=x.txt", "expected --recording")])
def test_demo_names_what_does_not_fit(tmp_path, checkpoint, option, word):
    recording = write_recording(tmp_path / "drive_td.h5")
    with pytest.raises((ValueError, OSError), match=word):
        run_demo(checkpoint, recording, tmp_path / "e.gif", option)


def test_demo_does_not_write_its_detections_over_labels(tmp_path, checkpoint):
    recording = write_recording(tmp_path / "drive_td.h5")
    labels = tmp_path / "drive_bbox.npy"
    labels.touch()
    with pytest.raises(ValueError, match="drive_bbox.npy is there already"):
        run_demo(checkpoint, recording, tmp_path / "e.gif", f"--boxes={labels}")
    assert labels.stat().st_size == 0


# ==== ablation.py


def test_run_names_the_run_that_fails(traffic, tmp_path):
    own = {"patch_size": 7, "data_dir": traffic, "out_dir": f"{tmp_path}/wrong"}
    config = SimpleNamespace(**(train.defaults | own))
    with pytest.raises(ValueError, match="wrong: patch_size=7"):
        ablation.run(config, 2)

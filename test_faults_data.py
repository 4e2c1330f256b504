"""Damaged prepared sequences: each opens and trains, or is refused in one line that names it."""

import os
import pickle

import h5py
import numpy as np
import pytest

import data
from conftest import BOX, make_boxes, make_set, plan, write_sequence
from data import FILES, REPRESENTATION, Augmentation, augment, make_loader, open_split
from formats import BOX_DTYPE
from test_faults import FUZZ, damaged, survive

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
    *((TIMES, value) for value in (range(7), range(9)))])
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
    loader = make_loader(plan(sequences).__getitem__, 0, workers)
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
    _, _, decode, empty, unlabelled, cut = capsys.readouterr().out.splitlines()
    assert decode.startswith(f"FINDING: {tmp_path}/train/s1") and "frame 4 does not" in decode
    assert empty.startswith(f"FINDING: {tmp_path}/train/s3: labelled, but hardly any window holds")
    assert unlabelled.startswith(f"FINDING: {tmp_path}/val: no") and "labelled" in unlabelled
    assert cut.startswith(f"FINDING: {tmp_path}/test/s1: ")

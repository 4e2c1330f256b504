"""Damaged prepared sequences: each opens and trains, or is refused in one line that names it."""

import pickle

import h5py
import numpy as np
import pytest

from conftest import BOX, make_boxes, plan, write_sequence
from data import FILES, REPRESENTATION, augment, open_split
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
    *((TIMES, value) for value in (range(7), range(9), range(8, 0, -1), [0] * 8))])
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
    ((8, 20, 24), "u1"), ((8, 10, 24, 32), "u1"), ((0, 20, 24, 32), "u1"), ((8, 20, 0, 32), "u1"),
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

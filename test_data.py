"""data.py: prepared sequences, augmentation, the plan of training batches, inspection."""

import json
import os
import pickle
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from conftest import (
    BLOSC,
    BOX,
    make_boxes,
    make_set,
    plan,
    same_batch,
    shared,
    shown,
    tiny_detector,
    write_sequence,
)
from data import Augmentation, TrainData, View, augment, index_map, move_boxes, open_split
from formats import BOX_DTYPE
from loss import detection_loss

UNMOVED = Augmentation(flip=0.0, zoom_stream=0.0, zoom_random=0.0)
SAME_VIEW = View(False, 1.0, 0, 0)


# ---- prepared sequences


def moved_boxes(boxes, hw, view):
    """(x, y, w, h, class) of the boxes that move_boxes keeps."""
    return [tuple(np.round(box[1:6], 4)) for box in move_boxes(boxes, hw, view).tolist()]


def test_move_boxes_clips_halves_and_drops_by_hand():
    boxes = make_boxes([(0, -10, 4, 30, 20, 0),  # left edge out: x 0..20
                        (0, 50, 30, 40, 40, 1),  # right and bottom out: to 63, 47, halved to 31, 23
                        (0, 62.5, 10, 5, 10, 2),  # only in the last column: halved it is flat
                        (0, 70, 10, 5, 10, 3),  # out of the frame
                        (0, 3, 5, 7, 9, 4),
                        (0, np.nan, 5, 7, 9, 5)])
    assert moved_boxes(boxes, (48, 64), View(False, 0.5, 0, 0)) == [
        (0, 2, 10, 10, 0), (25, 15, 6, 8, 1), (1.5, 2.5, 3.5, 4.5, 4)]
    assert moved_boxes(boxes, (48, 64), SAME_VIEW) == [
        (0, 4, 20, 20, 0), (50, 30, 13, 17, 1), (62.5, 10, 0.5, 10, 2), (3, 5, 7, 9, 4)]


@pytest.mark.parametrize("view, expected", [
    (SAME_VIEW, [(4, 6, 10, 8, 0), (20, 10, 8, 8, 1), (30, 20, 1, 3, 2)]),
    (View(True, 1.0, 0, 0), [(17, 6, 10, 8, 0), (3, 10, 8, 8, 1), (0, 20, 1, 3, 2)]),
    # window (8, 4) to (24, 16), edges end one short of it: the first box is cut left, the second
    # right and below
    (View(False, 2.0, 8, 4), [(0, 4, 12, 16, 0), (24, 12, 6, 10, 1)]),
    # half size at (5, 3); the third box is beyond the small frame's last pixel, 15: flat
    (View(False, 0.5, 5, 3), [(7, 6, 5, 4, 0), (15, 8, 4, 4, 1)]),
    (View(True, 0.5, 5, 3), [(13.5, 6, 5, 4, 0), (6.5, 8, 4, 4, 1), (5, 13, 0.5, 1, 2)])])
def test_move_boxes_flips_and_zooms_by_hand(view, expected):
    boxes = make_boxes([(0, 4, 6, 10, 8, 0), (0, 20, 10, 8, 8, 1), (0, 30, 20, 1, 3, 2)])
    assert moved_boxes(boxes, (24, 32), view) == expected
    assert moved_boxes(boxes[:0], (24, 32), view) == []


def test_sequence_attributes_and_frames_are_what_was_written(tmp_path):
    flat = (62.5, 0, 5, 5, 0)  # at half resolution; a frame with no other box is unlabelled
    frames = write_sequence(tmp_path / "val" / "b", {1: [BOX], 2: [flat], 4: [flat, BOX, BOX]}, 6)
    write_sequence(tmp_path / "val" / "a", {}, 3)
    (tmp_path / "val" / ".partial").mkdir()
    (tmp_path / "val" / "notes.txt").write_text("")
    a, b = open_split(tmp_path, "val", num_classes=2)
    assert (a.name, a.length, len(a.label_frames), a.boxes) == ("a", 3, 0, [])
    assert (b.name, b.path, b.length, b.hw) == ("b", tmp_path / "val" / "b", 6, (24, 32))
    assert b.timestamps_us.tolist() == [50_000 * n for n in range(1, 7)]
    assert b.label_frames.tolist() == [1, 4]
    assert b.boxes[0].tolist() == [(100_000, 5, 4, 10, 8, 1, 1, 1)]
    assert b.boxes[1].tolist() == [(250_000, 5, 4, 10, 8, 1, 1, 1)] * 2
    assert np.array_equal(b.read(2, 6), frames[2:]) and b.read(3, 3).shape == (0, 20, 24, 32)
    # into every other frame of a larger array, by a copy that went to another process
    out = np.full((7, 2, 20, 24, 32), 9, np.uint8)
    pickle.loads(pickle.dumps(b)).read(0, 6, out[:, 1])
    assert np.array_equal(out[:6, 1], frames)
    assert (out[:, 0] == 9).all() and (out[6] == 9).all()


def test_sequence_takes_labels_of_other_fields_types_and_orders(tmp_path):
    write_sequence(tmp_path / "a", {1: [BOX]}, 3)
    dtype = [("class_id", ">u2"), ("t", "<u8"), *((name, "<f8") for name in "hwyx"), ("new", "?")]
    labels = np.array([(3, 7, 16, 20, 8, 10, True)], dtype)
    arrays = dict(labels=labels, objframe_idx_2_label_idx=np.array([0], np.uint32))
    np.savez(tmp_path / "a/labels_v2/labels.npz", **arrays)
    assert data.Sequence(tmp_path / "a").boxes[0].tolist() == [(7, 5, 4, 10, 8, 3, 1, 1)]


def test_sequence_takes_the_half_resolution_file_where_both_are_there(tmp_path):
    write_sequence(tmp_path / "a", {1: [BOX]}, 3, hw=(48, 64), half=False)
    write_sequence(tmp_path / "b", {1: [BOX]}, 3)
    assert data.Sequence(tmp_path / "a").hw == (48, 64)
    half = Path(data.REPRESENTATION, data.FILES["half"])
    os.rename(tmp_path / "b" / half, tmp_path / "a" / half)
    assert data.Sequence(tmp_path / "a").hw == (24, 32)


@pytest.mark.parametrize("filters", [
    BLOSC, hdf5plugin.Blosc(cname="zstd", clevel=9, shuffle=0), hdf5plugin.Blosc(cname="lz4"),
    hdf5plugin.Blosc(cname="zstd", clevel=0), hdf5plugin.Blosc(cname="zstd", shuffle=2),
    hdf5plugin.Blosc2(cname="zstd"), dict(shuffle=True, **BLOSC), dict(compression="gzip")])
def test_sequence_read_decodes_whatever_the_compression(tmp_path, filters):
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 48, 64))
    for name, fill in (("sparse", None), ("zero", 0), ("noise", noise)):
        frames = write_sequence(tmp_path / name, {}, 3, hw=(48, 64), fill=fill, **filters)
        assert np.array_equal(data.Sequence(tmp_path / name).read(0, 3), frames)


def box_as_rvt(label, hw, half):
    """(x, y, w, h) of one label in float32, step by step as RVT clips and halves it."""
    one = np.float32
    lows = []
    lengths = []
    for start, extent, side in (("x", "w", hw[1]), ("y", "h", hw[0])):
        low = min(max(label[start], one(0)), one(side - 1))
        length = min(max(label[start] + label[extent], one(0)), one(side - 1)) - low
        if half:
            high = min((low + length) * one(0.5), one(side / 2 - 1))
            low = low * one(0.5)
            length = high - low
        lows.append(low)
        lengths.append(length)
    return (*lows, *lengths)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["gen1", "gen4", "etram"])
def test_sequence_of_a_reference_set_reads_as_rvt_reads_it(kind, split):
    (sequence,) = open_split(shared("reference/prepared") / kind / "out", split, num_classes=8)
    half = kind != "gen1"
    hw = (720, 1280) if half else (240, 304)
    assert sequence.hw == ((360, 640) if half else hw)
    with h5py.File(sequence.file, locking=False) as file:
        assert sequence.length == len(file["data"])
        assert np.array_equal(sequence.read(3, 6), file["data"][3:6])
    stored = np.load(sequence.path / "labels_v2" / "labels.npz")
    index = np.load(sequence.path / data.REPRESENTATION / "objframe_idx_2_repr_idx.npy")
    parts = np.split(stored["labels"], stored["objframe_idx_2_label_idx"].astype(int))[1:]
    expected = {}
    for frame, labels in zip(index.tolist(), parts):
        for label in labels:
            box = box_as_rvt(label, hw, half)
            if box[2] > 0 and box[3] > 0:
                row = (label["t"], *box, label["class_id"], 1, 1)
                expected.setdefault(frame, []).append(row)
    assert sequence.label_frames.tolist() == list(expected)
    for boxes, rows in zip(sequence.boxes, expected.values()):
        assert boxes.tolist() == np.array(rows, BOX_DTYPE).tolist()


def test_load_classes_takes_dataset_json_then_the_caller_then_numbers(tmp_path):
    assert data.load_classes(tmp_path, (30, 50), 0) == ("30", "50")
    assert data.load_classes(tmp_path, (), 3) == ("0", "1", "2")
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["a", "b"], "height": 1}))
    assert data.load_classes(tmp_path, ("car", "tram"), 2) == ("a", "b")


# ---- augmentation


def window_of(view, hw):
    """(height, width) of a View's window."""
    return tuple(int(side * min(view.zoom, 1 / view.zoom)) for side in hw)


def test_draw_view_stays_in_rvts_ranges_and_zooming_in_holds_a_box():
    rng = np.random.default_rng(0)
    H, W = 240, 304
    boxes = make_boxes([(0, 200, 100, 40, 30, 0), (0, 10, 200, 12, 20, 1), (0, 0, 0, 303, 239, 2)])
    views = [data.draw_view(rng, (H, W), boxes, Augmentation(), True) for _ in range(2000)]
    held = np.zeros(3)
    for view in views:
        h, w = window_of(view, (H, W))
        assert 1 / 1.2 <= view.zoom <= 1.5 and 0 <= view.y <= H - h and 0 <= view.x <= W - w
        if view.zoom > 1:
            left = np.where(view.flip, W - 1 - boxes["x"] - boxes["w"], boxes["x"])
            in_x = (view.x <= left) & (left + boxes["w"] < view.x + w + 1)
            held += in_x & (view.y <= boxes["y"]) & (boxes["y"] + boxes["h"] < view.y + h + 1)
    assert held[0] > 450 and held[1] > 450
    assert held[2] < 20  # it is larger than nearly all windows
    assert abs(sum(view.flip for view in views) - 1000) < 100
    assert abs(sum(view.zoom > 1 for view in views) - 1280) < 100
    assert abs(sum(view.zoom < 1 for view in views) - 320) < 80
    zooms = [data.draw_view(rng, (H, W), boxes, Augmentation(), False).zoom for _ in range(1000)]
    assert max(zooms) == 1.0 and abs(sum(zoom < 1 for zoom in zooms) - 500) < 80


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_augment_and_index_map_equal_torch_nearest_exact_of_crop_and_canvas(share):
    rng = np.random.default_rng(1)
    zooms = Augmentation(zoom_random=0.9, zoom_in_share=share)
    boxes = make_boxes([(0, 1, 2, 9, 7, 0)])
    for _ in range(30):
        hw = H, W = int(rng.integers(20, 400)), int(rng.integers(20, 700))
        events = torch.from_numpy(rng.integers(0, 11, (2, 3, 2, H, W), dtype=np.uint8))
        views = [data.draw_view(rng, hw, boxes, zooms, True) for _ in range(3)]
        rows = torch.stack([index_map(H, view.y, view.zoom, False) for view in views])
        cols = torch.stack([index_map(W, view.x, view.zoom, view.flip) for view in views])
        out = augment(events, rows, cols)
        assert torch.equal(augment(events.float(), rows, cols), out.float())
        for b, view in enumerate(views):
            frame = events[:, b].flip(-1) if view.flip else events[:, b]
            h, w = window_of(view, hw)
            window = np.s_[..., view.y:view.y + h, view.x:view.x + w]
            expected = torch.zeros_like(frame)
            if view.zoom >= 1:
                expected = F.interpolate(frame[window], size=hw, mode="nearest-exact")
            else:
                expected[window] = F.interpolate(frame, size=(h, w), mode="nearest-exact")
            assert torch.equal(out[:, b], expected)


def test_index_map_by_hand():
    assert index_map(6, 0, 1.0, True).tolist() == [5, 4, 3, 2, 1, 0]
    assert index_map(6, 2, 2.0, False).tolist() == [2, 2, 3, 3, 4, 4]  # 3 pixels from the 2nd on
    assert index_map(6, 2, 0.5, False).tolist() == [-1, -1, 1, 3, 5, -1]  # all 6 in 3, from the 2nd


# ---- the plan


def test_runs_by_hand(toy_set):
    runs = data.Runs(toy_set, 4, seed=0, random=False)
    # gaps longer than T = 4 cut: 6 -> 20, 22 -> 29, 13 -> 26
    assert runs.runs == [
        [(0, 0, 0, 4), (0, 0, 4, 7)], [(0, 17, 17, 21), (0, 17, 21, 23)], [(0, 26, 26, 30)],
        [(1, 6, 6, 10), (1, 6, 10, 14)], [(1, 23, 23, 27)], [(2, 12, 12, 16)]]
    assert runs.length == 9
    windows = data.Runs(toy_set, 4, seed=0, random=True)  # frame 1 has no three frames before it
    assert windows.runs[:3] == [[(0, 0, 0, 4)], [(0, 2, 2, 6)], [(0, 3, 3, 7)]]
    assert windows.length == 6 + 6 + 1
    assert data.Runs([], 4, 0, False).runs == []


@pytest.mark.parametrize("batch_size", [1, 3, 13])  # fewer runs than slots is fine
def test_runs_play_every_chunk_once_a_pass_in_order_within_a_run(toy_set, batch_size):
    train = plan(toy_set, batch_size=batch_size)
    L = train.steps_per_epoch
    chunks = sum(data.Runs(toy_set, 4, 0, False).runs, [])
    batches = [train[step] for step in range(2 * L)]
    for b in range(batch_size):
        begin = -(b * L // batch_size) % L  # the first step at which this slot begins a pass
        seen = []
        for batch in batches[begin:begin + L]:
            sequence, frames = shown(batch, b)
            is_first = (sequence - 1, frames[0]) in [chunk[:2] for chunk in chunks]
            assert bool(batch.is_first[b]) == is_first
            assert is_first or seen[-1] == (sequence - 1, frames[0] - 1)
            seen += [(sequence - 1, frame) for frame in frames if frame >= 0]
        expected = []
        for index, _, start, end in chunks:
            expected += [(index, frame) for frame in range(start, end)]
        assert sorted(seen) == expected


def test_pad_targets_pads_to_a_few_sizes():
    for n, size in ((1, 16), (16, 16), (17, 32), (100, 128)):
        boxes = make_boxes([(0, 2 * i, i, 4, 6, 3) for i in range(n)])
        targets = data.pad_targets([boxes[:1], boxes, boxes[:0]])
        assert targets.shape == (3, size, 5) and targets.dtype == torch.float32
        assert targets[1, n - 1].tolist() == [3, 2 * (n - 1) + 2, n - 1 + 3, 4, 6]
        assert not targets[1, n:].any() and not targets[2].any()


def test_train_data_labelled_frames_carry_their_boxes_and_what_ends_is_zeros(toy_set):
    train = plan(toy_set, augmentation=UNMOVED, batch_size=3)
    padded = 0
    for step in range(12):
        batch = train[step]
        assert batch.has_boxes and batch.frames.any(0).all()
        for b in range(3):
            sequence, frames = shown(batch, b)
            labelled = toy_set[sequence - 1].label_frames
            assert batch.frames[:, b].tolist() == [frame in labelled for frame in frames]
            played = torch.tensor(frames) >= 0
            assert torch.equal(batch.events[:, b].flatten(1).any(1), played)
            padded += int(not played.all())
        expected = torch.zeros(int(batch.frames.sum()), 16, 5)
        expected[:, 0] = torch.tensor([1, 10.0, 8.0, 10.0, 8.0])
        assert torch.equal(batch.targets, expected)
    assert padded == 8  # runs of 7 and 6 frames, in chunks of 4


def test_train_data_random_windows_end_at_a_labelled_frame_and_start_from_a_reset_state(toy_set):
    train = plan(toy_set, sampling="random", batch_size=1)
    assert train.steps_per_epoch == 13
    ends = []
    for step in range(13):
        batch = train[step]
        sequence, frames = shown(batch, 0)
        assert batch.is_first and frames == list(range(frames[0], frames[0] + 4))
        assert frames[-1] in toy_set[sequence - 1].label_frames
        ends.append((sequence, frames[-1]))
    assert len(set(ends)) == 13 and ends != sorted(ends)


@pytest.mark.parametrize("B, weights, streams", [
    (2, (1, 1), 1), (4, (1, 1), 2), (4, (9, 1), 3), (5, (1, 20), 1), (6, (1, 2), 2)])
def test_train_data_mixed_holds_streams_and_windows_in_proportion(toy_set, B, weights, streams):
    options = dict(mixed_stream=weights[0], mixed_random=weights[1])
    train = plan(toy_set, sampling="mixed", batch_size=B, **options)
    firsts = torch.stack([train[step].is_first for step in range(9)])
    assert firsts[:, streams:].all() and not firsts[:, :streams].all(0).any()


@pytest.mark.parametrize("sampling", ["stream", "random", "mixed"])
def test_train_data_of_processes_and_accumulation_is_that_of_one_larger_batch(toy_set, sampling):
    whole = plan(toy_set, sampling=sampling, batch_size=4)
    ranks = [plan(toy_set, sampling=sampling, rank=rank, world_size=2) for rank in range(2)]
    folded = plan(toy_set, sampling=sampling, gradient_accumulation_steps=2)

    def slots(*batches):
        found = []
        for batch in batches:
            for b in range(len(batch.is_first)):
                found.append((shown(batch, b), batch.rows[b].tolist(), batch.cols[b].tolist()))
        return sorted(found) if sampling == "mixed" else found  # there, streams come first

    assert not same_batch(whole[0], plan(toy_set, sampling=sampling, batch_size=4, seed=1)[0])
    for step in range(6):
        assert slots(whole[step]) == slots(ranks[0][step], ranks[1][step])
        assert same_batch(ranks[0][step], folded[2 * step])
        assert same_batch(ranks[1][step], folded[2 * step + 1])


def test_train_data_view_is_constant_along_a_run_whatever_its_boxes_and_differs_in_others(tmp_path):
    labels = {}
    for i, n in enumerate((1, 2, 5, 1, 5)):  # boxes in chunks of two runs
        others = [(3.0 * j, 4, 12, 10, 1) for j in range(n - 1)]
        labels[4 * i + 3] = labels[4 * i + 33] = [(2, 2, 20, 16, 0), *others]
    write_sequence(tmp_path / "train" / "a", labels, 60, hw=(48, 64))
    sequences = open_split(tmp_path, "train")
    zooms = Augmentation(zoom_stream=1.0, zoom_out_max=2.0)
    seen = []
    for seed in range(25):
        train = plan(sequences, batch_size=1, seed=seed, augmentation=zooms)
        for step in range(10):
            batch = train[step]
            assert int(batch.is_first) == (step % 5 == 0)
            view = batch.rows.tolist() + batch.cols.tolist()
            if batch.is_first:
                assert view not in seen
                seen.append(view)
            assert view == seen[-1]


def test_train_data_makes_a_filler_where_a_zoom_empties_all_frames(tmp_path):
    # at half resolution to (30.95, 22.95), zoomed out beyond the small frame's last pixel
    boxes = {frame: [(61.2, 45.2, 0.7, 0.7, 0)] for frame in range(3, 12)}
    write_sequence(tmp_path / "train" / "a", boxes, 12, seed=1)
    sequences = open_split(tmp_path, "train")
    train = plan(sequences, augmentation=Augmentation(0.0, zoom_stream=1.0, zoom_out_max=1.5))
    batch = next(batch for batch in map(train.__getitem__, range(200)) if not batch.has_boxes)
    assert batch.frames.sum() == 1 and torch.equal(batch.targets, torch.zeros(1, 16, 5))
    assert plan(sequences, augmentation=UNMOVED)[0].has_boxes


def train_on(batch):
    """The loss of a tiny detector on a batch, and whether a step then changed its weights."""
    model = tiny_detector(input_hw=tuple(batch.events.shape[-2:])).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.heads[0].obj_pred.bias.clone()
    events = data.augment(batch.events, batch.rows, batch.cols)
    loss = detection_loss(model(events, None, batch.frames)[0], batch.targets)["loss"]
    loss.backward()
    optimizer.step()
    return loss.item(), not torch.equal(before, model.heads[0].obj_pred.bias)


def test_train_data_change_events_draws_once_a_run_or_in_each_chunk(toy_set):
    class Noisy(TrainData):
        def change_events(self, events, seed, start):
            if np.random.default_rng(seed).random() < 0.5:  # for a whole run
                events[:] = np.roll(events, 10, axis=1)
            events *= np.random.default_rng((*seed, start)).random(events.shape) < 0.9

    options = dict(seed=0, sampling="stream", sequence_length=4, batch_size=2)
    noisy, plain = Noisy(toy_set, **options), TrainData(toy_set, **options)
    flips = []
    for step in range(9):
        got, events = noisy[step].events[:, 0], plain[step].events[:, 0]
        flips.append(not (got <= events).all())
        assert plain[step].is_first[0] or flips[-1] == flips[-2]
        assert 0.8 < (got > 0).sum() / (events > 0).sum() < 1.0
        assert same_batch(noisy[step], noisy[step])
    assert 0 < sum(flips) < 9
    loss, changed = train_on(noisy[0])
    assert changed and loss != train_on(plain[0])[0]


def test_train_data_plays_a_format_of_ones_own(toy_set):
    class InMemory:
        path, name, hw, length = Path("set/train/a"), "a", (24, 32), 12
        label_frames = np.array([3, 7, 8])
        boxes = [make_boxes([(0, 5, 4, 10, 8, 1)])] * 3
        frames = np.random.default_rng(0).poisson(0.1, (12, 20, 24, 32)).astype(np.uint8)

        def read(self, start, stop, out):
            out[:stop - start] = self.frames[start:stop]

    batch = plan([InMemory()], augmentation=UNMOVED)[0]
    assert np.array_equal(batch.events[:, 0], InMemory.frames[:4])
    assert batch.frames[:, 0].tolist() == [False, False, False, True]
    assert train_on(batch)[1]


@pytest.mark.parametrize("workers, start", [(0, 5), (3, 5), (0, 7), (2, 8)])
def test_make_loader_is_the_same_for_any_number_of_workers_and_any_start(toy_set, workers, start):
    train = plan(toy_set, sampling="mixed", batch_size=3)
    loader = data.make_loader(train.__getitem__, start, workers)
    for step in range(start, 11):
        got = next(loader)
        assert type(got) is data.Batch
        assert same_batch(got, plan(toy_set, sampling="mixed", batch_size=3)[step])
    loader.close()


# ---- inspection


def test_data_main_counts_and_draws_what_a_set_holds(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5]], length=10)
    make_set(tmp_path, [[2]], "val", length=10)
    data.main([str(tmp_path), "--class_names=car,bike", f"--picture={tmp_path}/sizes.png"])
    train, boxes, val, _ = capsys.readouterr().out.splitlines()
    assert train == "train: 2 sequences, 3 labelled frames"
    assert boxes.split() == ["3", "boxes", "of", "bike,", "median", "side", "9", "px"]
    assert val == "val: 1 sequences, 1 labelled frames"
    assert (tmp_path / "sizes.png").stat().st_size > 1000


def test_data_main_warns_where_its_picture_cannot_be_written(tmp_path, capsys):
    make_set(tmp_path, [[1]], length=3)
    (tmp_path / "file").touch()
    data.main([str(tmp_path), "--split=train", f"--picture={tmp_path}/file/sizes.png"])
    assert "WARNING: no picture" in capsys.readouterr().out

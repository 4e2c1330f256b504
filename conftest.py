"""Fixtures and helpers that the tests share."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import demo
import prepare
import simulate
import train
from checkpoint import load_rvt
from data import TrainData, open_split
from detect import SIZES
from eval import report
from formats import BOX_DTYPE
from loss import detection_loss
from model import Detector, ModelConfig, Prediction
from prepare import Recording

ROOT = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("NANORVT_SHARED", ROOT.parent / "shared"))
soak = pytest.mark.skipif("SOAK" not in os.environ, reason="long; make soak runs it")
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def tiny_detector(**changes):
    torch.manual_seed(0)
    keys = (
        dict(input_hw=(48, 64), num_classes=3, embed_dim=16, dim_head=8, fpn_depth=0.33) | changes
    )
    detector = Detector(ModelConfig(**keys))
    for (
        name,
        p,
    ) in detector.named_parameters():  # scales of 1e-5 would hide mistakes in the attention
        if "scale" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return detector.eval()


def random_events(*shape, seed=0):
    return torch.poisson(torch.full(shape, 0.2), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


@pytest.fixture(scope="session")
def traffic(tmp_path_factory):
    """A tiny simulated data set that took the path of real recordings: 48x64, eight classes."""
    folder = tmp_path_factory.mktemp("traffic")
    simulate.main(
        [
            f"--dst={folder}/raw",
            "--train=3",
            "--val=2",
            "--test=1",
            "--seconds=1.6",
            "--height=96",
            "--width=128",
            "--num_workers=0",
        ]
    )
    prepare.main(
        [
            f"--src={folder}/raw",
            f"--dst={folder}/set",
            "--dataset=etram",
            "--box_filter=none",
            "--num_workers=0",
        ]
    )
    return str(folder / "set")


@pytest.fixture(autouse=True)
def curves_are_drawn_where_a_test_looks_at_them(request, monkeypatch):
    if "configs_train" not in request.node.name:  # drawing takes longer than a step
        monkeypatch.setattr(train, "draw_curves", lambda *a: None)


def run_train(*argv):
    """Exit status of train.py in this process."""
    with pytest.raises(SystemExit) as status:
        train.main(list(argv))
    return status.value.code


TINY = (
    "--embed_dim=16",
    "--dim_head=8",
    "--fpn_depth=0.33",
    "--batch_size=2",
    "--sequence_length=3",
    "--num_workers=0",
    "--device=cpu",
    "--eval_batch_size=2",
)


def checkpoint_of(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def trained(data_dir, out_dir, *options):
    """Checkpoint that train.py writes in a tiny run."""
    assert run_train(*TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *options) == 0
    return checkpoint_of(out_dir)


BLOSC = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)


def make_boxes(rows):
    """BOX_DTYPE array of (t, x, y, w, h, class_id) rows."""
    boxes = np.zeros(len(rows), BOX_DTYPE)
    for name, column in zip(BOX_DTYPE.names, zip(*rows)):
        boxes[name] = column
    boxes["class_confidence"] = 1
    return boxes


def write_sequence(
    path, labels, length, hw=(24, 32), half=True, seed=0, fill=None, times=None, **blosc
):
    """A prepared sequence; labels: {frame: [(x, y, w, h, class_id), ...]} in sensor pixels.

    Pixel (0, 0) of channel 0 is the frame's number + 1, of channel 1 the seed: so a batch tells
    what it shows.
    """
    events, where = path / data.REPRESENTATION, path / "labels_v2"
    events.mkdir(parents=True)
    where.mkdir()
    rng = np.random.default_rng(seed)
    shape = (length, data.CHANNELS, *hw)
    frames = (
        rng.poisson(0.1, shape).astype(np.uint8) if fill is None else np.full(shape, fill, np.uint8)
    )
    frames[:, 0, 0, 0], frames[:, 1, 0, 0] = np.arange(length) + 1, seed
    with h5py.File(events / data.FILES["half" if half else "full"], "w") as file:
        file.create_dataset(
            "data",
            data=frames,
            chunks=(1, *shape[1:]),
            maxshape=(None, *shape[1:]),
            **(blosc or BLOSC),
        )
    times = np.arange(1, length + 1) * 50_000 if times is None else times
    rows = [(times[frame], *box) for frame in sorted(labels) for box in labels[frame]]
    first = np.cumsum([0, *(len(labels[frame]) for frame in sorted(labels))], dtype=np.int64)[:-1]
    np.save(events / "timestamps_us.npy", times)
    np.save(events / "objframe_idx_2_repr_idx.npy", np.array(sorted(labels), np.int64))
    np.savez(
        where / "labels.npz",
        labels=make_boxes(rows) if rows else np.zeros(0, BOX_DTYPE),
        objframe_idx_2_label_idx=first,
    )
    np.save(where / "timestamps_us.npy", times[sorted(labels)] if labels else np.zeros(0, np.int64))
    return frames


BOX = (10.0, 8.0, 20.0, 16.0, 1)


def make_set(root, labelled, split="train", length=30, **options):
    """DATA/split with a sequence for each list of labelled frames; returns DATA."""
    for i, frames in enumerate(labelled):
        write_sequence(
            root / split / f"s{i}", {f: [BOX] for f in frames}, length, seed=i + 1, **options
        )
    return root


def plan(sequences, **options):
    chosen = dict(seed=0, sampling="stream", sequence_length=4, batch_size=2) | options
    return TrainData(sequences, **chosen)


def shown(batch, b):
    """(sequence, frames) that slot b shows; -1 for padding."""
    events = batch.events[:, b]
    return int(events[0, 1, 0, 0]), [int(n) - 1 for n in events[:, 0, 0, 0]]


def same_batch(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory):
    """Three sequences with label gaps; T = 4 makes runs of several chunks, one from frame 0 on."""
    root = make_set(
        tmp_path_factory.mktemp("toy_set"),
        [[1, 3, 5, 6, 20, 22, 29], [9, 10, 11, 12, 13, 26], [15]],
    )
    return open_split(root, "train")


def write_h5(path, t, x, y, p, size=(48, 64), group="events"):
    """A recording as eTraM has them; size None leaves out height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, column, kind in (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "i1")):
            file[f"{group}/{key}"] = np.asarray(column).astype(kind)
        if size is not None:
            file[f"{group}/height"], file[f"{group}/width"] = size
    return path


def some_events(count, end_us, size=(48, 64), seed=0):
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(0, end_us, count)), *(
        rng.integers(0, side, count) for side in (size[1], size[0], 2)
    )


def some_labels(times, w=20, h=12, class_id=0, x=5, y=6):
    boxes = np.zeros(len(times), BOX_DTYPE)
    for key, value in dict(
        t=times, x=x, y=y, w=w, h=h, class_id=class_id, class_confidence=1
    ).items():
        boxes[key] = value
    return boxes


def raw_set(folder, boxes=None, events=None, names=("a",), splits=("train",), **kinds):
    """A folder of raw recordings, one set of events and boxes under every name."""
    events = some_events(3000, 700_000) if events is None else events
    for split in splits:
        for name in names:
            write_h5(folder / split / f"{name}_td.h5", *events, **kinds)
            if boxes is not None:
                np.save(folder / split / f"{name}_bbox.npy", boxes)
    return folder


def load(sequence):
    """Everything that was prepared of one sequence, by file name."""
    found = {}
    for path in sorted(Path(sequence).rglob("*.*")):
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                found[path.name] = file["data"][:]
        elif path.suffix == ".npz":
            found |= dict(np.load(path))
        elif path.suffix == ".npy":
            found[f"{path.parent.name[:6]}/{path.name}"] = np.load(path)
    return found


def same_tree(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]) for key in one
    )


NAMES = ("pedestrian", "car", "bicycle", "bus")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- helpers


def some_boxes(t_us, xywh, class_id=0, score=1.0):
    """Structured boxes at t_us from rows (x, y, w, h)."""
    boxes = np.zeros(len(xywh), BOX_DTYPE)
    boxes["t"], boxes["class_id"], boxes["class_confidence"] = t_us, class_id, score
    for name, column in zip("xywh", np.reshape(np.array(xywh, np.float32), (-1, 4)).T):
        boxes[name] = column
    return boxes


class MemorySequence:
    """A prepared sequence that lives in memory."""

    def __init__(self, name, length, labelled, hw=(64, 64), classes=4):
        rng = np.random.default_rng(sum(name.encode()))
        self.name, self.hw, self.length = name, hw, length
        self.timestamps_us = 50_000 * np.arange(1, length + 1)
        self.data = (rng.random((length, 20, *hw)) < 0.1).astype(np.uint8) * rng.integers(
            1, 9, (length, 1, 1, 1), np.uint8
        )
        self.label_frames = np.array(labelled)
        self.boxes = [
            some_boxes(
                self.timestamps_us[t], rng.uniform(5, 25, (2, 4)), rng.integers(0, classes, 2)
            )
            for t in labelled
        ]

    def read(self, start, stop, out=None):
        if out is None:
            return self.data[start:stop].copy()
        out[: stop - start] = self.data[start:stop]
        return out


def small_detector(classes=4, hw=(64, 64), **changes):
    """A detector that finds boxes everywhere and whose predictions depend on its state."""
    torch.manual_seed(0)
    model = Detector(
        ModelConfig(
            input_hw=hw, num_classes=classes, embed_dim=16, dim_head=8, fpn_depth=0.33, **changes
        )
    )
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    for head in model.heads:
        head.obj_pred.bias.data.fill_(0.5)
    return model.eval()


def same_boxes(got, want, tolerance=1e-3):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert (
            len(a) == len(b) and (a["t"] == b["t"]).all() and (a["class_id"] == b["class_id"]).all()
        )
        for name in ("x", "y", "w", "h", "class_confidence"):
            np.testing.assert_allclose(a[name], b[name], atol=tolerance, rtol=tolerance)


def write_prepared(
    folder, names=("a", "b"), split="test", hw=(64, 64), length=8, labelled=(2, 5, 7), classes=NAMES
):
    """A prepared data set on disk, full resolution, with a dataset.json."""
    for name in names:
        sequence = MemorySequence(name, length, labelled, hw, len(classes))
        events = folder / split / name / data.REPRESENTATION
        labels = folder / split / name / "labels_v2"
        events.mkdir(parents=True)
        labels.mkdir()
        with h5py.File(events / "event_representations.h5", "w") as file:
            file.create_dataset("data", data=sequence.data, chunks=(1, 20, *hw))
        np.save(events / "timestamps_us.npy", sequence.timestamps_us)
        np.save(events / "objframe_idx_2_repr_idx.npy", sequence.label_frames)
        np.save(labels / "timestamps_us.npy", sequence.timestamps_us[sequence.label_frames])
        np.savez(
            labels / "labels.npz",
            labels=np.concatenate(sequence.boxes),
            objframe_idx_2_label_idx=2 * np.arange(len(labelled)),
        )
    (folder / "dataset.json").write_text(
        json.dumps({"classes": list(classes), "height": hw[0], "width": hw[1]})
    )
    return folder


def write_checkpoint(path, model, **config):
    torch.save(
        {
            "model": model.state_dict(),
            "model_config": dataclasses.asdict(model.config),
            "config": config,
            "step": 1,
        },
        path,
    )
    return path


def write_recording(path, hw=(64, 64), seconds=0.5, events=20_000):
    """A raw recording of so many events in so many seconds, in HDF5."""
    return write_h5(path, *some_events(events, int(1e6 * seconds), hw), size=hw)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_code_ran",)


def assert_same(a, b, where="checkpoint"):
    """Equal to the bit, NaN included."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i in range(len(a)):
            assert_same(a[i], b[i], f"{where}.{i}")
    else:
        assert a == b or a != a and b != b, where


def assert_same_run(a, b):
    """Two folders hold the same run, but for what it is called and how fast it went."""
    a, b = checkpoint_of(a), checkpoint_of(b)
    for run in (a, b):
        for key in ("out_dir", "init_from", "num_workers"):
            del run["config"][key]
        for row in run["progress"]["log"]:
            for key in ("frames_per_s", "data_wait", "peak_gib"):
                row.pop(key, None)
    assert_same(a, b)


@pytest.fixture
def four_anchors():
    """Two frames: anchor 2 overlaps anchors 0 and 1, anchor 3 is weak; all are in the second."""
    box = torch.tensor([[20, 30, 10, 20.0], [21, 30, 10, 20], [21, 30, 10, 20], [50, 50, 4, 4]])
    obj = torch.tensor([[0.5, 0.9, 0.9, 0.01], [1e-5, 1e-5, 1e-5, 1e-5]])
    cls = torch.tensor([[0.9, 0.2], [0.4, 0.6], [0.8, 0.1], [0.05, 0.09]])
    grid = torch.tensor([[0, 0, 8.0], [1, 0, 8], [0, 0, 16], [0, 0, 32]])
    twice = [x.repeat(2, 1, 1) for x in (box, cls.logit())]
    return Prediction(twice[0], obj.logit(), twice[1], grid)


def some_report():
    """Labels, detections and their report, of 10 frames."""
    labels, dets = random_frames(0, frames=10)
    labels[0] = some_boxes(0, [(9, 9, 9, 9)])
    settings = {"split": "test", "data_dir": "data", "confidence": 0.001, "nms_iou": 0.45}
    return labels, dets, report(labels, dets, 360, 640, NAMES, score="cls", **settings)


@pytest.fixture
def ckpt(tmp_path):
    """A checkpoint for the four classes of the prepared set in tmp_path/data."""
    data = write_prepared(tmp_path / "data", hw=(48, 96))  # not what it was trained on
    config = {"data_dir": str(data), "class_names": NAMES, "num_classes": 4, "sequence_length": 3}
    config |= {"eval_batch_size": 2, "num_workers": 0}
    (tmp_path / "run").mkdir()
    return write_checkpoint(tmp_path / "run" / "ckpt.pt", small_detector(), **config)


KEYS = dict(out_dir="out", learning_rate=1e-4, batch_size=6, fpn_stages=(2, 3, 4), compile=True,
            names=("a",))


def random_frames(seed, frames=12, found=30, ties=False):
    """Labels and detections, many near a label; with ties scores and coordinates repeat."""
    rng = np.random.default_rng(seed)
    labels, dets = [], []
    for k in range(frames):
        n = int(rng.integers(0, 10))
        xywh = rng.uniform((0, 0, 4, 4), (550, 270, 120, 120), (n, 4))
        truth = some_boxes(k * 100_000, xywh, rng.integers(0, 4, n))
        near = truth[rng.integers(0, n, rng.integers(0, found + 1))] if n else truth
        near["class_confidence"] = rng.random(len(near)).round(1 if ties else 9)
        other = rng.random(len(near)) < 0.2
        near["class_id"][other] = rng.integers(0, 4, other.sum())
        for name in "xywh":
            near[name] *= rng.uniform(0.85, 1.15, len(near)).astype("f4")
            truth[name] = truth[name].round(-1 if ties else 9)
            near[name] = near[name].round(-1 if ties else 9)
        labels.append(truth)
        dets.append(near)
    return labels, dets


def write_table(path, *columns, **options):
    """A recording as Metavision has it: one table."""
    table = np.zeros(len(columns[0]), [("x", "u2"), ("y", "u2"), ("p", "i2"), ("t", "i8")])
    for key, column in zip("txyp", columns):
        table[key] = column
    with h5py.File(path, "w") as file:
        file.create_dataset("CD/events", data=table, **options)


def write_dat(path, t, x, y, p, size=(48, 64)):
    """A recording in Prophesee's DAT."""
    header = f"% Data file containing CD events.\n% Version 2\n% Height {size[0]}\n"
    header += f"% Width {size[1]}\n"
    records = np.stack((t, x | y << 14 | p << 28), 1).astype("<u4")
    path.write_bytes(header.encode() + b"\x00\x08" + records.tobytes())
    return path


def read_events(recording):
    """All events of a Recording: t, x, y, p."""
    return [np.concatenate(column) for column in zip(*recording.chunks())]


def read_times(path, t):
    """(Recording that was read, times) of a recording with events at t us."""
    recording = Recording(write_h5(path, t, t % 64, t % 48, t % 2))
    return recording, read_events(recording)[0]


GRID_US = np.arange(100_000, 1_900_000, 100_000)


def rvt_checkpoint(folder):
    """What RVT computed on a few frames, and the path of a checkpoint with the weights it had."""
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], folder / "rvt.ckpt")
    return reference, folder / "rvt.ckpt"


def rvt_detector(folder, **overrides):
    """What RVT computed on a few frames, and a detector with RVT's weights."""
    reference, path = rvt_checkpoint(folder)
    return reference, load_rvt(path, input_hw=(128, 160), partition_split=1, **overrides)


def iou_by_definition(a, b):
    width = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    height = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    overlap = max(width, 0) * max(height, 0)
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def simota_by_definition(prediction, targets, n):
    """One box and anchor after the other: {anchor: (box, IoU)} of frame n."""
    boxes = [row for row in targets[n].tolist() if row[3] > 0]
    near, iou, cost, claims, matched = {}, {}, {}, {}, {}
    for a, (x, y, stride) in enumerate(prediction.grid.tolist()):
        for m, (_, cx, cy, _, _) in enumerate(boxes):
            if max(abs((x + 0.5) * stride - cx), abs((y + 0.5) * stride - cy)) < 1.5 * stride:
                near.setdefault(a, set()).add(m)
    for a in near:
        p = (prediction.obj[n, a].sigmoid() * prediction.cls[n, a].sigmoid()).sqrt().tolist()
        predicted = prediction.box_cxcywh[n, a].tolist()
        for m, (label, *box) in enumerate(boxes):
            iou[m, a] = iou_by_definition(box, predicted)
            entropy = -sum(math.log(q if k == label else 1 - q) for k, q in enumerate(p))
            cost[m, a] = entropy - 3 * math.log(iou[m, a] + 1e-8) + 1e6 * (m not in near[a])
    for m in range(len(boxes)):
        best = sorted((iou[m, a] for a in near), reverse=True)[:10]
        for a in sorted(near, key=lambda a: cost[m, a])[: max(1, int(sum(best)))]:
            claims.setdefault(a, []).append(m)
    for a, claimants in claims.items():
        m = claimants[0]
        if len(claimants) > 1:
            m = min(range(len(boxes)), key=lambda m: cost[m, a])
        matched[a] = (m, iou[m, a])
    return matched


def terms_by_definition(prediction, targets, weight, class_loss):
    """iou, obj and cls, with the matched anchors taken one by one; weight(area)."""
    iou, cls, is_object = 0.0, 0.0, torch.zeros_like(prediction.obj)
    for n in range(len(targets)):
        for a, (m, overlap) in simota_by_definition(prediction, targets, n).items():
            label, _, _, w, h = targets[n, m].tolist()
            onehot = F.one_hot(torch.tensor(int(label)), 3).float()
            iou += 5 * weight(w * h) * (1 - overlap**2)
            terms = class_loss(prediction.cls[n, a], onehot, overlap)
            cls += weight(w * h) * terms.sum().item()
            is_object[n, a] = 1
    obj = F.binary_cross_entropy_with_logits(prediction.obj, is_object, reduction="sum").item()
    matched = is_object.sum().item()
    terms = {"iou": iou, "obj": obj, "cls": cls, "loss": iou + obj + cls, "num_fg": matched**2 / 3}
    return {key: pytest.approx(x / matched, rel=1e-5) for key, x in terms.items()}


def random_scene(targets, strides, seed):
    """Prediction on frames of 64x96 px, and the targets (N, M, 5) with random boxes for NaN."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.as_tensor(targets, dtype=torch.float)
    random = torch.rand(targets.shape, generator=g) * torch.tensor([2.99, 96, 64, 40, 40])
    random = torch.cat((random[..., :1].floor(), random[..., 1:3], random[..., 3:] + 4), -1)
    cells = [(x, y, s) for s in strides for y in range(64 // s) for x in range(96 // s)]
    grid = torch.tensor(cells, dtype=torch.float)
    N, A = len(targets), len(grid)
    centre = (grid[:, :2] + 0.5) * grid[:, 2:] + 4 * torch.randn(N, A, 2, generator=g)
    size = grid[:, 2:] * (0.75 + 1.5 * torch.rand(N, A, 2, generator=g))
    obj, *cls = torch.randn(4, N, A, generator=g)
    prediction = Prediction(torch.cat((centre, size), -1), obj, torch.stack(cls, -1), grid)
    return prediction, torch.where(targets.isnan(), random, targets)


def greedy(box, score, label, iou):
    """Non-maximum suppression by its definition, box by box."""

    def clash(i, j):
        low = np.maximum(box[i][:2], box[j][:2])
        high = np.minimum(box[i][2:], box[j][2:])
        both = np.prod(np.clip(high - low, 0, None))
        areas = np.prod(box[j][2:] - box[j][:2]) + np.prod(box[i][2:] - box[i][:2])
        return label[i] == label[j] and both > 0 and both / (areas - both) > iou

    kept = []
    for i in sorted(range(len(score)), key=lambda i: -float(score[i])):
        if not any(clash(i, j) for j in kept):
            kept.append(i)
    return kept


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


def torchrun(*argv, start=subprocess.run, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--standalone", *argv]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return start(command, text=True, cwd=ROOT, env=env, **options)


def some_sequences(count=5):
    streams = [("c", 12, (1, 4, 9)), ("a", 20, (0, 3, 8, 19)), ("b", 7, (1, 6)), ("d", 9, (0,))]
    streams.append(("e", 5, ()))  # name, length, labelled frames
    return [MemorySequence(*stream) for stream in streams[:count]]


def as_coco(frames, kept, ids):
    """COCO object of the boxes of the classes `ids` in the frames `kept`."""
    coco = COCO()
    entries = []
    for k in kept:
        for box in frames[k][np.isin(frames[k]["class_id"], ids)]:
            entry = {"id": len(entries) + 1, "image_id": k, "iscrowd": 0}
            entry |= {"category_id": int(box["class_id"]), "area": float(box["w"] * box["h"])}
            entry["bbox"] = [float(box[name]) for name in "xywh"]
            entry["score"] = float(box["class_confidence"])
            entries.append(entry)
    images = [{"id": k} for k in kept]
    categories = [{"id": i} for i in ids]
    coco.dataset = {"images": images, "categories": categories, "annotations": entries}
    coco.createIndex()
    return coco


def pycocotools_scores(labels, dets, ids, agnostic):
    """The scores by pycocotools' own classes, as RVT calls them: the independent oracle."""
    kept = [k for k, boxes in enumerate(labels) if len(boxes)]
    with redirect_stdout(None):
        coco = COCOeval(as_coco(labels, kept, ids), as_coco(dets, kept, ids), "bbox")
        coco.params.useCats = int(not agnostic)
        coco.params.areaRng = [(0, 1e10), *SIZES.values()]
        coco.params.areaRngLbl = ["all", *SIZES]
        coco.evaluate()
        coco.accumulate()

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1

    p, r = coco.eval["precision"], coco.eval["recall"]
    scores = {"AP50": mean(p[0, ..., 0, 2]), "AP75": mean(p[5, ..., 0, 2])}
    scores |= {"AR1": mean(r[..., 0, 0]), "AR10": mean(r[..., 0, 1])}
    for k, size in enumerate(("", "_T", "_S", "_M", "_L")):
        scores["AP" + size] = mean(p[..., k, 2])
        scores["AR" + (size or "100")] = mean(r[..., k, 2])
    return scores


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


def rvts_rule(times, base):
    """Labelled frames and numbers of base steps between them as RVT's script chooses them."""
    frames, steps = [times[times >= 100_000][0]], []
    for time_us in times[times > frames[0]]:
        count = round((time_us - frames[-1]) / base)
        if abs(time_us - frames[-1] - count * base) <= 2000:
            frames.append(time_us)
            steps.append(count)
    return frames, steps


SMALL_SCENE = dict(train=1, val=2, test=0, seconds=1.0, height=48, width=64, sizes=(2.0, 8.0),
                   users=8.0)


SMALL_NAMES = ("train/train_0000", "val/val_0000", "val/val_0001")


@pytest.fixture(scope="module")
def small_traffic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_traffic")
    simulate.simulate(folder, 0, **SMALL_SCENE)
    return folder


def raw_recording(folder, name):
    """Events (t, x, y, p) and boxes of a raw recording."""
    events = read_events(Recording(folder / f"{name}_td.h5"))
    return *events, np.load(folder / f"{name}_bbox.npy")


@pytest.fixture
def two_cars():
    """A plain scene of 48 x 64 px and two cars in one place, the first before the second."""
    ground = np.zeros((48, 64), np.float32)
    scene = SimpleNamespace(ground=ground, sizes=(3, 8), horizon=8, camera=4, road=0, night=False)
    cars = [simulate.make_thing(np.random.default_rng(1), 1, scene, 120) for _ in range(2)]
    for distance, car in enumerate(cars, 1):
        car.depth[:] = distance
        car.box_xyxy[:] = (10, 20, 26, 28)
        car.moved[:] = 100
    return scene, *cars


def sensor_before(image):
    sensor = simulate.Sensor(np.random.default_rng(0), np.float32(image), 1)
    sensor.threshold[:] = 0.2
    return sensor


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt.pt", small_detector(), class_names=NAMES)


def run_demo(checkpoint, recording, out, *options):
    paths = (f"--ckpt={checkpoint}", f"--recording={recording}", f"--out={out}")
    demo.main([*paths, "--confidence=0.01", "--device=cpu", *options])


def train_one_step(detector):
    """Train a step on random frames; the next state. All of backbone and pyramid must learn."""
    parts = torch.nn.ModuleList([detector.stages, detector.fpn])
    before = copy.deepcopy(parts.state_dict())
    optimizer = torch.optim.SGD(detector.train().parameters(), lr=0.1)
    prediction, state = detector(random_events(3, 2, 20, 48, 64))
    detection_loss(prediction, TWO_BOXES.repeat(6, 1, 1))["loss"].backward()
    optimizer.step()
    for name, p in parts.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
    return state


TWO_BOXES = torch.tensor([[[1.0, 30, 20, 16, 16], [2.0, 10, 30, 6, 8]]])

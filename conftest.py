"""Fixtures and helpers that the tests share."""

import dataclasses
import json
import os
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch
import torch._dynamo.testing

import data
import prepare
import simulate
import train
from data import TrainData, open_split
from eval import report
from formats import BOX_DTYPE
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


HISTOGRAMS = "event_representations_v2/stacked_histogram_dt=50_nbins=10"


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
        events, labels = (
            folder / split / name / part
            for part in ("event_representations_v2/stacked_histogram_dt=50_nbins=10", "labels_v2")
        )
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
    """A raw recording in HDF5."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        group = file.create_group("events")
        group["t"] = np.sort(rng.integers(0, int(1e6 * seconds), events))
        group["x"], group["y"], group["p"] = (
            rng.integers(0, hw[1], events),
            rng.integers(0, hw[0], events),
            rng.integers(0, 2, events),
        )
        group["height"], group["width"] = hw
    return path


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_code_ran",)


def checkpoint_of(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


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


def write_trained(folder):
    """A checkpoint for the four classes of the prepared set in folder/data."""
    data = write_prepared(folder / "data", hw=(48, 96))  # not what it was trained on
    config = {"data_dir": str(data), "class_names": NAMES, "num_classes": 4, "sequence_length": 3}
    config |= {"eval_batch_size": 2, "num_workers": 0}
    (folder / "run").mkdir()
    return write_checkpoint(folder / "run" / "ckpt.pt", small_detector(), **config)


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


def read_times(path, t):
    """(Recording that was read, times) of a recording with events at t us."""
    recording = Recording(write_h5(path, t, t % 64, t % 48, t % 2))
    return recording, np.concatenate([chunk[0] for chunk in recording.chunks()])


GRID_US = np.arange(100_000, 1_900_000, 100_000)

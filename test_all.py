"""All tests: plain seeded functions whose names state the fact.

    make test        (or python -m pytest -q test_all.py; with SOAK=1 the long ones too)

Tests that compare with RVT's own outputs or read real recordings need ../shared and skip, saying so, where it is absent.
"""

import contextlib
import copy
import dataclasses
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
import torch._dynamo.testing
import torch.nn.functional as F

import bench_memory
import configurator
import data
import demo
import eval as evaluation
import loss
import model
import prepare
import simulate
import train
from data import BOX_DTYPE, TrainData, View, augment, index_map, make_loader, move_boxes, open_split
from eval import (METRICS, SIZES, StreamDetector, compare, confusion, detections, load_detector, nms, report, run,
                  score_boxes)
from loss import SizeAware, assign, detection_loss, size_weights
from model import Detector, ModelConfig, Prediction, load_rvt, read_checkpoint, reset_state

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
    keys = dict(input_hw=(48, 64), num_classes=3, embed_dim=16, dim_head=8, fpn_depth=0.33) | changes
    detector = Detector(ModelConfig(**keys))
    for name, p in detector.named_parameters():  # scales of 1e-5 would hide mistakes in the attention
        if "scale" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return detector.eval()


def random_events(*shape, seed=0):
    return torch.poisson(torch.full(shape, 0.2), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="session")
def traffic(tmp_path_factory):
    """A tiny simulated data set that took the path of real recordings: 48x64, eight classes."""
    folder = tmp_path_factory.mktemp("traffic")
    simulate.main([f"--dst={folder}/raw", "--train=3", "--val=2", "--test=1", "--seconds=1.6", "--height=96",
                   "--width=128", "--num_workers=0"])
    prepare.main([f"--src={folder}/raw", f"--dst={folder}/set", "--dataset=etram", "--box_filter=none", "--num_workers=0"])
    return str(folder / "set")


@pytest.fixture(autouse=True)
def curves_are_drawn_where_a_test_looks_at_them(request, monkeypatch):
    if "config_trains" not in request.node.name:  # drawing takes longer than a step
        monkeypatch.setattr(train, "draw_curves", lambda *a: None)


def run_train(*argv):
    """Exit status of train.py in this process."""
    with pytest.raises(SystemExit) as status:
        train.main(list(argv))
    return status.value.code


TINY = ("--embed_dim=16", "--dim_head=8", "--fpn_depth=0.33", "--batch_size=2", "--sequence_length=3", "--num_workers=0",
        "--device=cpu", "--eval_batch_size=2")


# ---- model

def test_rvt_weights_give_rvts_predictions(tmp_path):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    detector = load_rvt(tmp_path / "rvt.ckpt", input_hw=(128, 160), partition_split=1).eval()
    assert detector.config.fpn_depth == 0.33 and detector.config.embed_dim == 32 and detector.config.patch_size == 4
    assert sum(p.numel() for p in detector.parameters()) == reference["params"]
    state, out = None, []
    with torch.no_grad():
        for t, events in enumerate(reference["events"]):
            prediction, state = detector(events[None], state)
            means = [float(h.abs().mean()) for h in state[::2]]
            np.testing.assert_allclose(means, reference["hidden_mean_abs"][t], rtol=1e-4)
            out.append(torch.cat((prediction.box_cxcywh, prediction.obj.sigmoid()[..., None], prediction.cls.sigmoid()), -1))
    got = torch.stack([out[t][b] for t, b in reference["labelled_tb"]])
    torch.testing.assert_close(got, reference["prediction"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rvt_weights_give_rvts_losses_and_gradients(tmp_path, checkpointing):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    detector = load_rvt(tmp_path / "rvt.ckpt", input_hw=(128, 160), partition_split=1, checkpointing=checkpointing).train()
    frames = torch.zeros(4, 2, dtype=torch.bool)
    for t, b in reference["labelled_tb"]:
        frames[t, b] = True
    losses = detection_loss(detector(reference["events"], None, frames)[0], reference["labels"])
    for ours, rvt in dict(loss="loss", iou="iou_loss", obj="conf_loss", cls="cls_loss", num_fg="num_fg").items():
        assert losses[ours].item() == pytest.approx(reference["train"][rvt], rel=1e-3)
    losses["loss"].backward()
    gradients = {name: float(p.grad.norm()) for name, p in detector.named_parameters()}
    for name, norm in reference["grad_norm"].items():
        name = name.removeprefix("mdl.")
        for pattern, ours in model.RVT_NAMES:
            name = re.sub(pattern, ours, name)
        assert gradients.pop(name) == pytest.approx(norm, rel=1e-3), name
    assert not gradients


def test_rvt_b_has_its_published_size():
    detector = Detector(ModelConfig(input_hw=(360, 640), num_classes=8))
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(18.54, abs=0.005)


@pytest.mark.parametrize("hw, patch, padded, part, strides", [
    ((360, 640), 4, (384, 640), (6, 10), (4, 8, 16, 32)), ((360, 640), 2, (384, 640), (6, 10), (2, 4, 8, 16)),
    ((360, 640), 3, (360, 648), (5, 9), (3, 6, 12, 24)), ((240, 304), 4, (256, 320), (8, 10), (4, 8, 16, 32))])
def test_padding_partition_and_strides_follow_rvts_rule(hw, patch, padded, part, strides):
    config = ModelConfig(input_hw=hw, patch_size=patch, num_classes=2, fpn_stages=(1, 2, 3, 4)).resolved()
    assert (config.padded_hw, config.part, config.strides) == (padded, part, strides)


@pytest.mark.parametrize("mode, want", [("window", {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}),
                                        ("grid", {(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)})])
def test_attention_joins_neighbours_or_a_grid(mode, want):
    torch.manual_seed(0)
    block, x = model.PartitionAttention(8, 4, (2, 3), mode, True).double(), torch.randn(1, 4, 6, 8, dtype=torch.double)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    moved = (block(x) != block(changed)).any(-1)[0].nonzero().tolist()
    assert {tuple(place) for place in moved} == want


def test_lstm_cell_by_hand():
    cell = model.LSTMCell(1)
    weight = torch.tensor([[0.1, 0.2], [0.3, -0.4], [0.5, 0.6], [-0.7, 0.8]])  # forget, input, output, cell; x then h
    cell.load_state_dict({"gates.weight": weight, "gates.bias": torch.tensor([0.01, 0.02, 0.03, 0.04])})
    h, c = cell(*[torch.full((1, 1, 1, 1), value) for value in (2.0, -1.0, 0.5)])
    f, i, o = (1 / (1 + math.exp(-z)) for z in (0.2 - 0.2 + 0.01, 0.6 + 0.4 + 0.02, 1.0 - 0.6 + 0.03))
    want = f * 0.5 + i * math.tanh(-1.4 - 0.8 + 0.04)
    assert float(c.detach()) == pytest.approx(want, rel=1e-5)
    assert float(h.detach()) == pytest.approx(o * math.tanh(want), rel=1e-5)


def test_decoding_by_hand():
    detector = tiny_detector()
    for head in detector.heads:
        for pred in (head.reg_pred, head.obj_pred, head.cls_pred):
            torch.nn.init.zeros_(pred.weight)
        head.reg_pred.bias.data = torch.tensor([0.25, -0.5, math.log(2), math.log(3)])
    prediction, _ = detector(random_events(1, 1, 20, 48, 64))
    A = 8 * 8 + 4 * 4 + 2 * 2  # 48x64 is padded to 64x64; strides 8, 16, 32
    assert prediction.box_cxcywh.shape == (1, A, 4) and prediction.grid[8 * 8 + 5].tolist() == [1, 1, 16]
    torch.testing.assert_close(prediction.box_cxcywh[0, 8 * 8 + 5], torch.tensor([20.0, 8.0, 32.0, 48.0]))
    assert float(prediction.obj[0, 0].detach().sigmoid()) == pytest.approx(0.01, rel=1e-4)


VARIANTS = [dict(), dict(patch_size=3, fpn_stages=(1, 2, 3, 4)), dict(patch_size=2, fpn_stages=(1, 2)),
            dict(small_object_attention=True), dict(small_object_attention=True, attention_spatial=False),
            dict(small_object_attention=True, attention_temporal=False)]


@pytest.mark.parametrize("changes", VARIANTS)
def test_frame_by_frame_equals_chunks(changes):
    detector, events = tiny_detector(**changes), random_events(5, 2, 20, 48, 64)
    with torch.no_grad():
        whole, last = detector(events)
        state, parts = None, []
        for chunk in (events[:1], events[1:4], events[4:]):
            prediction, state = detector(chunk, state)
            parts.append(prediction)
    for i in range(3):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i], rtol=1e-4, atol=1e-4)
    for a, b in zip(state, last):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_streams_do_not_see_each_other(changes):
    detector, events = tiny_detector(**changes), random_events(3, 3, 20, 48, 64)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        prediction, state = detector(events)
        permuted, permuted_state = detector(events[:, order])
        alone, alone_state = detector(events[:, 1:2])
        other = events.clone()
        other[:, [0, 2]] = random_events(3, 2, 20, 48, 64, seed=1)
        beside, beside_state = detector(other)
    for i in range(3):
        rows = prediction[i].unflatten(0, (3, 3))
        torch.testing.assert_close(permuted[i].unflatten(0, (3, 3)), rows[:, order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone[i], rows[:, 1], rtol=1e-4, atol=1e-4)
        assert torch.equal(beside[i].unflatten(0, (3, 3))[:, 1], rows[:, 1])  # same shapes, so bit for bit
    for a, b, c, d in zip(state, permuted_state, alone_state, beside_state):
        torch.testing.assert_close(b, a[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c[0], a[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(d[1], a[1])


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_reset_row_starts_afresh_even_from_nan(changes):
    detector, events = tiny_detector(**changes), random_events(4, 2, 20, 48, 64)
    with torch.no_grad():
        _, state = detector(events[:2])
        for s in state:
            s[1] = math.nan
        state = reset_state(state, torch.tensor([False, True]))
        prediction, after = detector(events[2:], state)
        start = [s.clone() for s in state]
        for s in start:
            s[1] = 0
        fresh, fresh_after = detector(events[2:], start)
    for a, b in zip((*prediction, *after), (*fresh, *fresh_after)):
        assert torch.equal(a, b)
    assert all(float(s[1].abs().sum()) == 0 for s in state) and any(float(s[0].abs().sum()) for s in state)


def test_chosen_frames_equal_those_of_all_frames():
    detector, events = tiny_detector(), random_events(4, 2, 20, 48, 64)
    frames = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]], dtype=torch.bool)
    with torch.no_grad():
        every, state = detector(events)
        some, same = detector(events, None, frames)
    torch.testing.assert_close(some.box_cxcywh, every.box_cxcywh[[1, 4, 5]], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(state, same))


@pytest.mark.parametrize("patch, stages, hw", [
    (patch, stages, hw) for patch in (2, 3, 4) for stages, hw in
    (((1, 2), (37, 50)), ((2, 3), (61, 33)), ((2, 3, 4), (90, 70)), ((1, 2, 3, 4), (45, 80)))])
def test_every_patch_size_works_with_every_pyramid_at_odd_sizes(patch, stages, hw):
    detector = tiny_detector(input_hw=hw, patch_size=patch, fpn_stages=stages)
    prediction, state = detector(random_events(1, 2, 20, *hw))
    H, W = detector.config.padded_hw
    A = sum(H // s * (W // s) for s in detector.config.strides)
    assert detector.config.strides == tuple(patch * 2 ** (k - 1) for k in stages)
    assert prediction.box_cxcywh.shape == (2, A, 4) and prediction.cls.shape == (2, A, 3)
    assert len(detector.stages) == stages[-1] and all(s.shape[0] == 2 for s in state)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes):
    detector = tiny_detector(embed_dim=64, **changes).train()
    prediction, _ = detector(random_events(3, 2, 20, 48, 64))
    sum(field.square().sum() for field in prediction[:3]).backward()
    dead = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_attention_off_is_bit_identical_to_no_attention():
    plain, off = tiny_detector(), tiny_detector(attention_spatial=False, attention_temporal=False)
    assert plain.state_dict().keys() == off.state_dict().keys() and not any("attention." in k[:10] for k in off.state_dict())
    events = random_events(2, 1, 20, 48, 64)
    for a, b in zip(plain(events)[0], off(events)[0]):
        assert torch.equal(a, b)


def test_spatial_attention_adds_at_most_the_input_and_channels_start_higher_at_small_strides():
    x = torch.rand(2, 12, 8, 8)
    y = model.MultiScaleSpatialAttention(12)(x)
    assert bool(((y >= x) & (y <= 2 * x)).all()) and not torch.equal(x, y)
    fine, coarse = model.ScaleAwareChannelAttention(64, 8), model.ScaleAwareChannelAttention(64, 16)
    assert fine.fc[0].out_features == 4 and coarse.fc[0].out_features == 8
    assert float((fine(x.new_ones(1, 64, 4, 4))).mean()) > float((coarse(x.new_ones(1, 64, 4, 4))).mean())


def test_temporal_attention_is_causal():
    module, x = model.EventTemporalAttention(8).eval(), torch.rand(4, 2, 8, 6, 6)
    past = torch.zeros(2, 2, 8, 6, 6)
    y, following = module(x, past)
    changed = x.clone()
    changed[2:] += 1
    assert torch.equal(module(changed, past)[0][:2], y[:2]) and not torch.equal(module(changed, past)[0][2], y[2])
    assert torch.equal(following, x[2:].transpose(0, 1))


@pytest.mark.parametrize("changes", [dict(), dict(fpn_stages=(1, 2, 3, 4), small_object_attention=True)])
def test_recomputation_changes_memory_only(changes):
    events, kept = random_events(3, 2, 20, 48, 64), []
    targets = torch.tensor([[[1.0, 30, 20, 16, 16], [2.0, 10, 30, 6, 8]]]).repeat(6, 1, 1)
    runs = []
    for checkpointing in (False, True):
        detector, size = tiny_detector(checkpointing=checkpointing, **changes).train(), {}

        def pack(x):
            if not isinstance(x, torch.nn.Parameter):
                size[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = detection_loss(detector(events)[0], targets)["loss"]
        kept.append(sum(size.values()))
        result.backward()
        runs.append((result.detach(), [p.grad for p in detector.parameters()], list(detector.buffers())))
    (a, gradients, statistics), (b, again, statistics_again) = runs
    torch.testing.assert_close(a, b)
    for x, y in zip(gradients, again):
        assert float((x - y).norm()) <= 1e-3 * float(x.norm()) + 1e-6
    for x, y in zip(statistics, statistics_again):  # moved once, not twice
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("changes", [dict(), dict(checkpointing=True), dict(small_object_attention=True)])
def test_forward_and_loss_are_one_graph_that_does_not_recompile(changes):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    module = train.Forward(tiny_detector(**changes).train(), SizeAware("exponential", 2.0, 256, 1024, ("iou", "cls")))
    plain, compiled = copy.deepcopy(module), torch.compile(module, backend=counter, fullgraph=True)
    events, state = random_events(3, 2, 20, 48, 64), module.model.initial_state(2)
    for N, M in ((2, 16), (4, 16), (6, 32), (3, 16)):
        index, targets = torch.randperm(6)[:N].sort().values, torch.zeros(N, M, 5)
        targets[:, 0] = torch.tensor([1.0, 30, 20, 16, 16])
        torch._dynamo.maybe_mark_dynamic(index, 0)
        torch._dynamo.maybe_mark_dynamic(targets, 0)
        torch._dynamo.maybe_mark_dynamic(targets, 1)
        got, _ = compiled(events, state, index, targets)
        want, _ = plain(events, state, index, targets)
        torch.testing.assert_close(got["loss"], want["loss"])
    assert counter.frame_count == 1


def test_model_config_names_what_cannot_work():
    for changes, word in ((dict(fpn_stages=(2, 4)), "fpn_stages"), (dict(fpn_stages=(3, 2)), "fpn_stages"),
                          (dict(fpn_stages=(4,)), "fpn_stages"), (dict(patch_size=5), "patch_size"),
                          (dict(embed_dim=20), "embed_dim"), (dict(dim_head=24), "dim_head"),
                          (dict(partition_split=-1), "partition_split"), (dict(partition_split=100), "partition_split")):
        with pytest.raises(ValueError, match=word):
            ModelConfig(**changes)
    with pytest.raises(ValueError, match="48x64.*|built for"):
        tiny_detector()(random_events(1, 1, 20, 40, 64))


# ---- checkpoints

class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_code_ran",)


def test_a_checkpoint_that_is_none_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detector = tiny_detector()
    good = dict(model=detector.state_dict(), model_config=dataclasses.asdict(detector.config))
    torch.save(good, "good.pt")
    assert read_checkpoint("good.pt")["model_config"]["embed_dim"] == 16
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("no checkpoint")
    torch.save({"a": 1}, "other.pt")
    torch.save({"state_dict": {}, "callbacks": Hostile()}, "hostile.pt")
    Path("raw.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    for name, word in (("cut.pt", "truncated"), ("empty.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                       ("other.pt", "no checkpoint of"), ("hostile.pt", "convert it"), ("missing.pt", "no such"),
                       ("raw.pt", "raw.pt")):
        with pytest.raises(ValueError, match=word) as error:
            read_checkpoint(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not Path("hostile_code_ran").exists()


def test_load_rvt_names_what_is_unmatched(tmp_path):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    for change, word in (({"mdl.backbone.extra": torch.zeros(3)}, "backbone.extra|extra"),
                         ({"mdl.fpn.bu_conv1.conv.weight": None}, "fpn.down.1.conv.weight is missing"),
                         ({"mdl.yolox_head.cls_preds.1.bias": torch.zeros(5)}, r"heads.1.cls_pred.bias is \(5,\)")):
        weights = {key: value for key, value in (reference["state_dict"] | change).items() if value is not None}
        torch.save({"state_dict": weights}, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=word):
            load_rvt(tmp_path / "changed.ckpt", input_hw=(128, 160), partition_split=1)
    torch.save({"state_dict": {"mdl.other": torch.zeros(1)}}, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of RVT"):
        load_rvt(tmp_path / "changed.ckpt", input_hw=(128, 160))


# ---- loss

def test_size_weights_by_hand():
    def weights(kind, *areas):
        return size_weights(torch.tensor(areas), kind, 2.5, 1024, 9216).tolist()

    assert weights("exponential", 256.0, 1024.0, 4096.0) == pytest.approx([2.5 * math.exp(-0.25), 1, 1], rel=1e-6)
    assert weights("exponential", 256.0)[0] == pytest.approx(1.947, abs=5e-4)
    assert weights("linear", 512.0, 1024.0, 5120.0, 9216.0, 20000.0) == pytest.approx([2.5, 2.5, 1.75, 1, 1])
    assert weights("step", 512.0, 1024.0, 1025.0, 9216.0, 9217.0) == pytest.approx([2.5, 2.5, 1.75, 1.75, 1])
    assert size_weights(torch.zeros(0), "exponential", 2.5, 1024, 9216).shape == (0,)
    below = size_weights(torch.tensor([26.0 ** 2, 27.0 ** 2]), "exponential", 2.0, 1024, 9216)  # 2.0 acts below 27x27
    assert below[0] > 1 and below[1] == 1
    with pytest.raises(ValueError, match="exponential, linear or step"):
        size_weights(torch.zeros(1), "cubic", 2, 1, 2)


def test_focal_loss_by_hand():
    p = torch.tensor([0.9, 0.2])
    got = loss.focal_loss(p.logit(), torch.tensor([1.0, 0.0]))
    assert got.tolist() == pytest.approx([0.25 * 0.01 * -math.log(0.9), 0.75 * 0.04 * -math.log(0.8)], rel=1e-4)


def slow_simota(box, obj, cls, grid, targets):
    """The definition, one image, box and anchor after the other: {anchor: (box, IoU)} of one frame."""
    def overlap(a, b):
        width = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
        height = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
        inter = max(width, 0) * max(height, 0)
        return inter / (a[2] * a[3] + b[2] * b[3] - inter)

    boxes = [(int(c), tuple(b)) for c, *b in targets.tolist() if b[2] > 0]
    near = {a: {m for m, (_, b) in enumerate(boxes) if abs((gx + 0.5) * s - b[0]) < 1.5 * s and abs((gy + 0.5) * s - b[1]) < 1.5 * s}
            for a, (gx, gy, s) in enumerate(grid.tolist())}
    candidates = [a for a in near if near[a]]
    cost, iou = {}, {}
    for m, (c, b) in enumerate(boxes):
        for a in candidates:
            p = [math.sqrt(1 / (1 + math.exp(-float(obj[a]))) / (1 + math.exp(-float(z)))) for z in cls[a]]
            entropy = -sum(math.log(q if k == c else 1 - q) for k, q in enumerate(p))
            iou[m, a] = overlap(b, box[a].tolist())
            cost[m, a] = entropy - 3 * math.log(iou[m, a] + 1e-8) + (0 if m in near[a] else 1e6)
    claims = {a: [] for a in candidates}
    for m in range(len(boxes)):
        k = max(1, int(sum(sorted((iou[m, a] for a in candidates), reverse=True)[:10])))
        for a in sorted(candidates, key=lambda a: cost[m, a])[:k]:
            claims[a].append(m)
    matched = {}
    for a, who in claims.items():
        if who:
            m = who[0] if len(who) == 1 else min(range(len(boxes)), key=lambda m: cost[m, a])
            matched[a] = (m, iou[m, a])
    return matched


@pytest.mark.parametrize("seed", range(8))
def test_simota_equals_its_slow_definition(seed):
    g = torch.Generator().manual_seed(seed)
    grid = torch.cat([torch.cartesian_prod(torch.arange(64 // s), torch.arange(96 // s)).flip(1).float() for s in (8, 16, 32)])
    grid = torch.cat((grid, torch.cat([torch.full((64 // s * (96 // s), 1), float(s)) for s in (8, 16, 32)])), 1)
    A, K = len(grid), 3
    rows = [[[0, 16.0, 24, 20, 12], [1, 16.0, 24, 10, 30], [2, 40, 32, 8, 8], [1, 90, 60, 30, 30]],  # borders, one centre
            [[2, -3.0, 10, 20, 20], [0, 95, 63, 12, 12], [1, 20, 64, 10, 10], [0, 0, 0, 0, 0]],  # outside, padding
            [[1, 33.3, 41.7, 25, 9]] + [[0.0] * 5] * 3, [[0.0] * 5] * 4]  # one box, none
    rand = torch.rand(4, 4, 5, generator=g) * torch.tensor([2.99, 96, 64, 40, 40]) + torch.tensor([0, 0, 0, 4, 4])
    rand[..., 0] = rand[..., 0].floor()
    targets = torch.cat((torch.tensor(rows, dtype=torch.float), rand))
    N = len(targets)
    centre = (grid[:, :2] + 0.5) * grid[:, 2:] + torch.randn(N, A, 2, generator=g) * 4
    size = grid[:, 2:] * torch.rand(N, A, 2, generator=g).add(0.5) * 1.5
    prediction = Prediction(torch.cat((centre, size), -1), torch.randn(N, A, generator=g), torch.randn(N, A, K, generator=g), grid)
    found = assign(prediction, targets)
    for n in range(N):
        want = slow_simota(*[field[n] for field in prediction[:3]], grid, targets[n])
        got = {int(a): (int(m), float(i)) for a, m, i, yes in
               zip(found.anchor[n], found.box[n], found.iou[n], found.matched[n]) if yes}
        assert got.keys() == want.keys()
        for a, (m, iou) in want.items():
            assert got[a][0] == m and got[a][1] == pytest.approx(iou, rel=1e-4, abs=1e-6)


def toy_prediction(N=2, K=3, seed=0):
    g, detector = torch.Generator().manual_seed(seed), tiny_detector()
    A = len(detector.grid)
    box = torch.cat(((detector.grid[:, :2] + 0.5) * detector.grid[:, 2:], detector.grid[:, 2:].repeat(1, 2)), 1)
    box = box.repeat(N, 1, 1) + torch.rand(N, A, 4, generator=g)
    return Prediction(box.requires_grad_(), torch.randn(N, A, generator=g).requires_grad_(),
                      torch.randn(N, A, K, generator=g).requires_grad_(), detector.grid)


def test_loss_terms_equal_their_formulas_written_out():
    prediction = toy_prediction()
    targets = torch.tensor([[[0, 20.0, 20, 12, 14], [2, 44, 30, 20, 9]], [[1, 12, 40, 8, 8], [0, 0, 0, 0, 0]]])
    aware = SizeAware("exponential", 2.5, 256, 1024, ("iou", "cls"))
    got, weighted = detection_loss(prediction, targets), detection_loss(prediction, targets, aware)
    want = dict.fromkeys(("iou", "cls", "iou_w", "cls_w"), 0.0)
    F_, positive = 0, torch.zeros_like(prediction.obj)
    for n in range(2):
        matched = slow_simota(*[field[n].detach() for field in prediction[:3]], prediction.grid, targets[n])
        for a, (m, iou) in matched.items():
            weight = float(size_weights(targets[n, m, 3] * targets[n, m, 4], *aware[:4]))
            onehot = F.one_hot(targets[n, m, 0].long(), 3).float()
            want["iou"] += 5 * (1 - iou ** 2)
            want["iou_w"] += 5 * weight * (1 - iou ** 2)
            want["cls"] += float(F.binary_cross_entropy_with_logits(prediction.cls[n, a], onehot * iou, reduction="sum"))
            want["cls_w"] += weight * float(loss.focal_loss(prediction.cls[n, a], onehot).sum())
            positive[n, a] = 1
        F_ += len(matched)
    obj = float(F.binary_cross_entropy_with_logits(prediction.obj, positive, reduction="sum")) / F_
    assert float(got["iou"]) == pytest.approx(want["iou"] / F_, rel=1e-5)
    assert float(got["cls"]) == pytest.approx(want["cls"] / F_, rel=1e-5)
    assert float(got["obj"]) == pytest.approx(obj, rel=1e-5) and float(got["num_fg"]) == pytest.approx(F_ / 3)
    assert float(got["loss"]) == pytest.approx((want["iou"] + want["cls"]) / F_ + obj, rel=1e-5)
    assert float(weighted["iou"]) == pytest.approx(want["iou_w"] / F_, rel=1e-5)
    assert float(weighted["cls"]) == pytest.approx(want["cls_w"] / F_, rel=1e-5)
    only = detection_loss(prediction, targets, aware._replace(size_aware_terms=("iou",)))
    assert torch.equal(only["cls"], got["cls"]) and torch.equal(only["iou"], weighted["iou"])


def test_a_weight_of_one_is_the_plain_loss():
    prediction, targets = toy_prediction(), torch.tensor([[[0, 20.0, 20, 12, 14]], [[1, 12, 40, 8, 8]]])
    for kind in ("exponential", "linear", "step"):
        one = detection_loss(prediction, targets, SizeAware(kind, 1.0, 1024, 9216, ("iou",)))
        for key, value in detection_loss(prediction, targets).items():
            assert torch.equal(one[key], value)


@pytest.mark.parametrize("M", [0, 4])
def test_targets_without_boxes_train_the_objectness_only(M):
    prediction = toy_prediction()
    losses = detection_loss(prediction, torch.zeros(2, M, 5), SizeAware("linear", 2.0, 256, 1024, ("iou", "cls")))
    losses["loss"].backward()
    assert losses["iou"] == losses["cls"] == 0 and losses["obj"].isfinite() and losses["num_fg"] == 1
    assert prediction.obj.grad.abs().sum() > 0 and prediction.box_cxcywh.grad.abs().sum() == 0


def test_padding_and_frame_order_do_not_change_the_loss():
    prediction, targets = toy_prediction(), torch.tensor([[[0, 20.0, 20, 12, 14]], [[1, 12, 40, 8, 8]]])
    padded = detection_loss(prediction, F.pad(targets, (0, 0, 0, 15)))["loss"]
    swapped = detection_loss(Prediction(*[field.flip(0) for field in prediction[:3]], prediction.grid), targets.flip(0))["loss"]
    torch.testing.assert_close(padded, detection_loss(prediction, targets)["loss"])
    torch.testing.assert_close(swapped, detection_loss(prediction, targets)["loss"])


# ---- configuration

KEYS = dict(out_dir="out", learning_rate=1e-4, batch_size=6, fpn_stages=(2, 3, 4), compile=True, names=("a",))


def test_options_are_read_by_the_type_of_their_default():
    config = configurator.configure(KEYS, ["--learning_rate=1", "--fpn_stages", "1,2", "--compile=false", "--names=car,bus",
                                           "--batch_size", "4"])
    assert config == dict(KEYS, learning_rate=1.0, fpn_stages=(1, 2), compile=False, names=("car", "bus"), batch_size=4)
    assert isinstance(config["learning_rate"], float) and KEYS["batch_size"] == 6
    assert configurator.configure(KEYS, ["--names=tram"])["names"] == ("tram",)
    assert configurator.configure(KEYS, ["--names="])["names"] == ()
    assert configurator.configure(KEYS, ["--compile", "--batch_size=1"])["compile"] is True


def test_config_files_and_options_apply_in_order_and_the_result_runs_again(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 3\n_half = batch_size * 0.5\nlearning_rate = _half / 100\n")
    config = configurator.configure(KEYS, [str(tmp_path / "a.py"), "--batch_size=5"])
    assert config["batch_size"] == 5 and config["learning_rate"] == 0.015
    (tmp_path / "b.py").write_text(configurator.dump(config))
    assert configurator.configure(KEYS, [str(tmp_path / "b.py")]) == config


@pytest.mark.parametrize("text, word", [
    ("batchsize = 3", "batch_size"), ("batch_size = 2.5", "no int"), ("batch_size = True", "no int"),
    ("fpn_stages = 3", "fpn_stages"), ("out_dir = 3", "out_dir"), ("x = (", "never closed"), ("1 / 0", "division by zero")])
def test_a_mistake_in_a_config_file_is_named(tmp_path, text, word):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=word) as error:
        configurator.configure(KEYS, [str(tmp_path / "c.py")])
    assert "c.py" in str(error.value)


@pytest.mark.parametrize("argv, word", [
    (["--learning_rat=1"], "learning_rate"), (["--batch_size=x"], "batch_size"), (["--batch_size"], "no value"),
    (["nothing.py"], "nothing.py"), (["--compile=7"], "compile"), (["--zzz", "3"], "known keys")])
def test_a_mistake_on_the_command_line_is_named(argv, word):
    with pytest.raises(ValueError, match=word):
        configurator.configure(KEYS, argv)


# ---- training

@pytest.mark.parametrize("steps", [400, 1000, 100_000])
def test_learning_rate_equals_torchs_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-4, total_steps=steps, pct_start=0.005, div_factor=20, final_div_factor=10_000 / 20,
        anneal_strategy="linear", cycle_momentum=False)
    want = {}
    for step in range(min(steps, 2000)):
        want[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if step < steps - 1:
            cycle.step()
    for step in (0, 1, 2, 10, 399, min(steps, 2000) - 1):
        assert train.learning_rate_at(step, steps, 2e-4) == pytest.approx(want[step], rel=1e-6)
    assert train.learning_rate_at(steps - 1, steps, 2e-4) == pytest.approx(2e-8)


def test_learning_rate_works_for_any_number_of_steps():
    for steps in (1, 2, 3, 199, 201):
        rates = [train.learning_rate_at(step, steps, 1.0) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates) and rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_trains_two_steps_and_evaluates_from_its_checkpoint(name, traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pictures", lambda *a: None)  # slow; tested below
    small = ("--embed_dim=16", "--dim_head=8", "--fpn_depth=0.33", "--sequence_length=2", "--batch_size=2", "--max_steps=2",
             "--num_workers=0", "--device=cpu", f"--data_dir={traffic}", f"--out_dir={tmp_path}")
    assert run_train(str(ROOT / "configs" / name), *small) == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    written = configurator.configure(train.defaults, [str(ROOT / "configs" / name)])
    for key in ("patch_size", "fpn_stages", "size_aware_loss", "size_aware_weight", "learning_rate", "sampling"):
        assert checkpoint["config"][key] == written[key]
    assert checkpoint["step"] == 2 and checkpoint["config"]["num_classes"] == 8
    evaluation.main(["--ckpt", str(tmp_path / "ckpt.pt")])
    assert json.loads((tmp_path / "eval" / "report.json").read_text())
    assert (tmp_path / "curves.png").stat().st_size > 1000
    again = configurator.configure(train.defaults, [str(tmp_path / "config.py")])
    assert again == checkpoint["config"]


TABLE = {  # design of the experiments: patch, stages, weight or None, steps, batch, eval batch, interval, lr
    "baseline_3scale": (4, (2, 3, 4), None, 100_000, 6, 2, 3500, 1.7e-4),
    "4scale": (4, (1, 2, 3, 4), None, 100_000, 6, 2, 3500, 1.7e-4),
    "4scale_sizeaware": (4, (1, 2, 3, 4), 2.5, 100_000, 6, 2, 3500, 1.7e-4),
    "3scale_sizeaware": (4, (2, 3, 4), 2.5, 100_000, 6, 2, 3500, 1.7e-4),
    "3scale_sizeaware_attention": (4, (2, 3, 4), 2.0, 100_000, 6, 2, 3500, 1e-3),
    "patch2_sizeaware": (2, (2, 3, 4), 2.0, 100_000, 2, 2, 3500, 1e-4),
    "patch2_4scale_sizeaware": (2, (1, 2, 3, 4), 2.0, 200_000, 2, 2, 5000, 1e-4),
    "patch3_4scale_sizeaware": (3, (1, 2, 3, 4), 2.0, 200_000, 4, 4, 5000, 1.4e-4)}


@pytest.mark.parametrize("name", TABLE)
def test_configs_say_what_the_notes_say(name):
    config = SimpleNamespace(**configurator.configure(train.defaults, [str(ROOT / "configs" / f"{name}.py")]))
    weight = config.size_aware_weight if config.size_aware_loss else None
    assert (config.patch_size, config.fpn_stages, weight, config.max_steps, config.batch_size, config.eval_batch_size,
            config.eval_interval, config.learning_rate) == TABLE[name]
    assert config.sequence_length == 5 and config.sampling == "stream" and config.weight_type == "exponential"


def measured(rows):
    return [{k: v for k, v in row.items() if k not in ("frames_per_s", "data_wait", "peak_gib")} for row in rows]


def assert_same(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b or a != a and b != b, where


def assert_same_run(a, b):
    a, b = (torch.load(path / "ckpt.pt", weights_only=True) for path in (a, b))
    a["log"], b["log"] = measured(a["log"]), measured(b["log"])
    for key in ("out_dir", "init_from", "num_workers"):
        del a["config"][key], b["config"][key]
    assert_same(a, b)


def spawn(*argv, **options):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)


def kill_and_resume(traffic, tmp_path, options, kills, rng):
    """What a run was at when it was killed, each time: "writing" a checkpoint, or else "working"."""
    steps = 6 + 2 * kills
    argv = [*TINY, *options, f"--data_dir={traffic}", f"--max_steps={steps}", f"--eval_interval={steps // 2}",
            "--log_interval=2", "--checkpoint_interval=1"]
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    resume, happened = [], []
    ready, writing = tmp_path / "broken" / "ckpt.pt", tmp_path / "broken" / "ckpt.pt.tmp"
    for _ in range(kills):
        process = spawn(*argv, f"--out_dir={tmp_path}/broken", *resume)
        before = ready.stat().st_mtime if ready.exists() else 0
        writing.unlink(missing_ok=True)
        while process.poll() is None and not (ready.exists() and ready.stat().st_mtime > before):
            time.sleep(0.01)  # the first checkpoint of this life
        time.sleep(rng.random())
        wanted = rng.random() < 0.5
        while wanted and process.poll() is None and not writing.exists():
            pass
        process.kill()
        process.communicate()
        happened += [["working", "writing"][writing.exists()]] * (process.returncode < 0)
        resume = ["--init_from=resume"]
    assert run_train(*argv, f"--out_dir={tmp_path}/broken", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    return happened


@pytest.mark.parametrize("options", [("--sampling=stream",), ("--sampling=random", "--gradient_accumulation_steps=2"),
                                     ("--sampling=mixed", "--num_workers=2")])
def test_a_killed_run_resumes_as_if_never_stopped(options, traffic, tmp_path):
    kill_and_resume(traffic, tmp_path, options, 1, np.random.default_rng(len(options[0])))


def test_a_run_that_ends_during_its_validation_loses_no_step(traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=4", "--eval_interval=2", "--checkpoint_interval=100", "--log_interval=3"]
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    for step, resume in ((2, ()), (4, ("--init_from=resume",))):

        def dies(*args, run=evaluation.run):
            if torch.load(tmp_path / "broken" / "ckpt.pt", weights_only=True)["step"] == step:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(*args)

        with monkeypatch.context() as patch, pytest.raises(ValueError, match="out of memory.*eval_batch_size"):
            patch.setattr(evaluation, "run", dies)
            train.main([*argv, f"--out_dir={tmp_path}/broken", *resume])
        assert torch.load(tmp_path / "broken" / "ckpt.pt", weights_only=True)["step"] == step
    assert run_train(*argv, f"--out_dir={tmp_path}/broken", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@soak
def test_fifty_kills_at_random_moments_change_nothing(traffic, tmp_path):
    rng, happened = np.random.default_rng(0), []
    for i, (kind, micro, workers) in enumerate(itertools.product(("stream", "random", "mixed"), (1, 2), (0, 2))):
        options = (f"--sampling={kind}", f"--gradient_accumulation_steps={micro}", f"--num_workers={workers}")
        happened += kill_and_resume(traffic, tmp_path / str(i), options, 4, rng)
    happened += kill_and_resume(traffic, tmp_path / "half", ("--dtype=float16",), 4, rng)  # with a scaler
    print(f"{len(happened)} kills, {happened.count('writing')} as a checkpoint was written")
    assert len(happened) > 50 and happened.count("writing") > 5


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=100000", f"--out_dir={tmp_path}", "--log_interval=1",
            "--num_workers=1"]
    process = spawn(*argv, start_new_session=True)
    while process.poll() is None and not ((tmp_path / "log.csv").exists()):
        time.sleep(0.05)
    for _ in range(1 + (number == signal.SIGTERM)):  # a job's end may reach a process twice, from torchrun as well
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert step >= 1 and f"stopped at step {step}; go on: python train.py --out_dir={tmp_path} --init_from=resume" in output
    assert "Traceback" not in output


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    script = "import sys, time, train; train.Forward.forward = lambda *x: (print('step', flush=True), time.sleep(60)); train.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=9"],
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "step\n" in process.stdout
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes its step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert_same(before, torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"])


def test_a_full_disk_leaves_the_checkpoint_before(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    before, limits = (tmp_path / "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="ckpt.pt: not written .is the disk full.*intact"):
            train.main([*argv, "--init_from=resume", "--max_steps=2", "--eval_interval=9"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert run_train(*argv, "--init_from=resume", "--max_steps=2") == 0


def test_too_little_gpu_memory_ends_in_one_line_that_says_what_to_change(traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(train.Forward, "forward", full)
    with pytest.raises(ValueError, match="B=2, T=3, config.patch_size=4, config.checkpointing=False; lower"):
        train.main([*argv, "--init_from=resume", "--max_steps=2"])
    assert_same(before, torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"])
    with pytest.raises(SystemExit, match="^error: CUDA out of memory. Tried to allocate 2 GiB$"):
        configurator.command_line(full)


def poisoned(traffic, monkeypatch, what, steps):
    """data.make_loader whose micro-batches of `steps` carry a NaN or Inf in their boxes, or in their events."""
    make_loader = data.make_loader

    def loader(train_data, start=0, *args, **kwargs):
        for i, batch in enumerate(make_loader(train_data, start, *args, **kwargs), start):
            if i in steps and what == "boxes":
                batch.targets[0, 0] = torch.tensor([0, math.nan, 20, 10, 10])
            yield batch._replace(events=torch.full_like(batch.events, math.inf, dtype=torch.float32)) \
                if i in steps and what == "events" else batch

    monkeypatch.setattr(data, "make_loader", loader)


@pytest.mark.parametrize("what", ["boxes", "events"])
def test_a_poisoned_step_is_skipped_and_leaves_nothing_behind(what, traffic, tmp_path, monkeypatch, capsys):
    argv = [*TINY, f"--data_dir={traffic}", "--patience=0", "--log_interval=1"]
    assert run_train(*argv, "--max_steps=1", f"--out_dir={tmp_path}/one") == 0
    poisoned(traffic, monkeypatch, what, {1})
    assert run_train(*argv, "--max_steps=2", f"--out_dir={tmp_path}/two") == 0
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    assert_same(one["states"], two["states"])
    for key in one["model"]:  # the learning rate of step 0 differs with max_steps, batch-norm statistics do not
        if "running" in key or "num_batches" in key:
            assert torch.equal(one["model"][key], two["model"][key]), key
    assert two["progress"]["bad"] == 1 and all(value.isfinite().all() for value in two["model"].values())
    assert "step 1:" in capsys.readouterr().out and two["log"][-1]["loss"] == ""  # no mean of no steps


def test_too_many_poisoned_steps_end_the_run_and_keep_the_checkpoint(traffic, tmp_path, monkeypatch):
    poisoned(traffic, monkeypatch, "boxes", {2, 3, 4})
    with pytest.raises(ValueError, match="3 steps in a row"):
        train.main([*TINY, f"--data_dir={traffic}", "--max_steps=9", "--max_bad_steps=3", "--checkpoint_interval=1",
                    f"--out_dir={tmp_path}"])
    assert all(value.isfinite().all() for value in torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"].values())


def test_poisoned_weights_end_the_run(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["stages.0.norm.bias"][0] = math.nan
    torch.save(checkpoint, tmp_path / "poisoned.pt")
    with pytest.raises(ValueError, match="2 steps in a row"):
        train.main([*argv[:-1], f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/poisoned.pt", "--max_steps=9",
                    "--max_bad_steps=2"])


def test_a_diverging_loss_or_too_much_memory_ends_the_run(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=30"]
    with pytest.raises(ValueError, match="passed max_memory_gib.*checkpointing"):
        train.main([*argv, "--max_memory_gib=0.01"])
    with pytest.raises(ValueError, match="diverged"):
        train.main([*argv, "--max_loss_ratio=0.5", "--patience=3", "--checkpoint_interval=1"])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["progress"]["above"] == 0  # from before it did


def test_a_run_has_a_checkpoint_from_its_start_and_goes_on_where_its_folder_was_moved_to(traffic, tmp_path, monkeypatch):
    argv, out = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/a/"], tmp_path / "b"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="out of memory"):
        patch.setattr(train.Forward, "forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        train.main(argv)
    assert run_train(f"--out_dir={tmp_path}/a", "--init_from=resume", "--max_steps=1") == 0
    assert run_train(*argv, "--max_steps=1") == 0  # moves the older one aside, whatever slash there is
    assert len(list(tmp_path.glob("a-*/ckpt.pt"))) == 1
    (tmp_path / "a").rename(out)
    assert run_train(f"--out_dir={out}", "--init_from=resume", "--max_steps=2") == 0
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 2 and not (tmp_path / "a").exists()
    assert "init_from = 'scratch'" in (out / "config.py").read_text()


def test_a_run_resumes_with_what_was_changed(traffic, tmp_path):
    argv = [f"--out_dir={tmp_path}", "--init_from=resume"]
    assert run_train(*TINY, f"--data_dir={traffic}", *argv[:1], "--max_steps=3", "--max_loss_ratio=0.5", "--patience=0") == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert before["progress"]["above"] > 0 and any(s.any() for s in before["states"][0][0])
    assert run_train(*argv, "--max_steps=4", "--weight_decay=0.5") == 0
    assert run_train(*argv, "--sequence_length=2") == 0  # the slots are somewhere else now
    after = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert after["optimizer"]["param_groups"][0]["weight_decay"] == 0.5 and not any(s.any() for s in after["states"][0][0])
    with pytest.raises(ValueError, match="batch_size.*scratch"):
        train.main([*argv, "--batch_size=1"])


@pytest.mark.parametrize("moment", [torch.zeros(7), torch.zeros(1), torch.zeros(1).expand(64)])
def test_moments_of_another_shape_in_a_checkpoint_cannot_crash_the_optimizer(moment, traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for state in checkpoint["optimizer"]["state"].values():
        state["exp_avg"] = moment if moment.numel() < 64 else moment[:1].expand(state["exp_avg"].shape)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with contextlib.suppress(ValueError):  # in one line, or as if they had been of this shape
        run_train(f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=2")


def test_a_validation_set_of_another_size_is_named_before_training(traffic, tmp_path):
    shutil.copytree(Path(traffic) / "train", tmp_path / "train")
    shutil.copy(Path(traffic) / "dataset.json", tmp_path)
    make_set(tmp_path, [[3]], "val", 5)
    with pytest.raises(ValueError, match="val.*frames of"):
        train.main([*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out"])


@pytest.mark.parametrize("option, word", [
    ("--fpn_stages=2,4", "fpn_stages"), ("--sequence_length=0", "sequence_length"), ("--max_steps=0", "max_steps"),
    ("--class_names=a,b --num_classes=3", "class"), ("--num_classes=3", "num_classes"), ("--data_dir=nowhere", "nowhere"),
    ("--weight_type=cubic", "weight_type"), ("--small_threshold=9999", "small_threshold"), ("--dtype=int8", "dtype"),
    ("--device=cuda:0", "device|CUDA"), ("--init_from=missing.pt", "missing.pt"), ("--learning_rat=1", "learning_rate"),
    ("--size_aware_terms=iou,box", "size_aware_terms"), ("--input_hw=10,10", "input_hw"), ("--sampling=some", "sampling"),
    ("--resolution=full", "full"), ("--sampling=mixed --batch_size=1", "mixed"), ("--fpn_stages=3,2", "fpn_stages")])
def test_what_cannot_work_fails_before_any_work(option, word, traffic, tmp_path):
    if option.startswith("--device") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match=word) as error:
        train.main([*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/out", "--max_steps=1", *option.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [
    "--sampling=strem", "--batch_size=0", "--sequence_length=0", "--seed=-1", "--zoom_in_max=0.5", "--zoom_out_max=0.9",
    "--gradient_accumulation_steps=0", "--sampling=mixed --mixed_random=0", "--sampling=mixed --batch_size=1",
    "--eval_interval=0", "--patch_size=5", "--fpn_stages=1,3", "--device=tpu", "--num_workers=-1", "--grad_clip_by=x",
    "--device=", "--device=cpu:x", "--dtype=int8", "--grad_clip=-1", "--learning_rate=1e999", "--fpn_depth=nan"])
def test_what_no_data_set_could_mend_fails_before_one_is_simulated(option, monkeypatch):
    monkeypatch.setattr(train, "ensure_toy", lambda *a: pytest.fail("simulated"))
    with pytest.raises(ValueError, match=option.split()[-1][2:].split("=")[0]):
        train.main(option.split())


def test_mistakes_reach_the_user_as_one_line(tmp_path):
    for argv, word in ((["train.py", "--data_dir=nowhere"], "nowhere"), (["train.py", "configs/toi.py"], "configs/toi.py"),
                       (["eval.py", "--ckpt", "nothing.pt"], "nothing.pt")):
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and word in done.stderr and done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_a_script_with_status_130():
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as status:
        configurator.command_line(interrupted)
    assert status.value.code == 130


def test_training_starts_from_weights_ours_or_rvts(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=1"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a") == 0
    assert run_train(*argv, f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/a/ckpt.pt", "--learning_rate=1e-12") == 0
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in "ab")
    torch.testing.assert_close(a["stages.0.conv.weight"], b["stages.0.conv.weight"])
    with pytest.raises(ValueError, match="do not fit"):
        train.main([*argv, f"--out_dir={tmp_path}/c", f"--init_from={tmp_path}/a/ckpt.pt", "--embed_dim=32"])
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    assert run_train(*argv, f"--out_dir={tmp_path}/d", f"--init_from={tmp_path}/rvt.ckpt", "--learning_rate=1e-12",
                     "--embed_dim=32", "--dim_head=32") == 0
    weight = torch.load(tmp_path / "d" / "ckpt.pt", weights_only=True)["model"]["stages.0.conv.weight"]
    want = reference["checkpoint"]["state_dict"]["mdl.backbone.stages.0.downsample_cf2cl.conv.weight"].float()
    torch.testing.assert_close(weight, want)


def test_half_precision_trains_on_the_cpu(traffic, tmp_path):
    for dtype in ("bfloat16", "float16"):
        assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/{dtype}", "--max_steps=2", f"--dtype={dtype}") == 0
        rows = torch.load(tmp_path / dtype / "ckpt.pt", weights_only=True)["log"]
        assert all(math.isfinite(row["loss"]) for row in rows)


def test_an_older_run_in_the_same_folder_is_kept(traffic, tmp_path):
    for _ in range(2):
        assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/out", "--max_steps=1") == 0
    assert len(list(tmp_path.glob("out*"))) == 2 and len(list(tmp_path.glob("out*/ckpt.pt"))) == 2


def torchrun(*argv, start=subprocess.run, **options):
    options = options or dict(capture_output=True, timeout=300)
    return start([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29567", *argv],
                 text=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), **options)


def test_two_processes_train_evaluate_stop_at_one_step_by_sigterm_and_resume(traffic, tmp_path):
    argv = ["train.py", *TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--log_interval=1", "--eval_interval=2"]
    process = torchrun(*argv, start=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (tmp_path / "best.pt").exists():
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    step = checkpoint["step"]
    assert f"stopped at step {step}" in output and len(checkpoint["states"]) == 2 and step > 2
    # torchrun itself ends with status 1 and a traceback that names the signal; its processes ended with 0
    assert output.count("Traceback") == 1 and "SignalException" in output and process.returncode == 1, output
    more = torchrun("train.py", f"--out_dir={tmp_path}", "--init_from=resume", f"--max_steps={step + 1}")
    assert more.returncode == 0, more.stderr
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step + 1
    done = torchrun("eval.py", "--ckpt", f"{tmp_path}/ckpt.pt", f"--json={tmp_path}/two.json")
    assert done.returncode == 0, done.stderr


# ==== data.py

BLOSC = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)


def make_boxes(rows):
    """BOX_DTYPE array of (t, x, y, w, h, class_id) rows."""
    boxes = np.zeros(len(rows), BOX_DTYPE)
    for name, column in zip(BOX_DTYPE.names, zip(*rows)):
        boxes[name] = column
    boxes["class_confidence"] = 1
    return boxes


def write_sequence(path, labels, length, hw=(24, 32), half=True, seed=0, fill=None, times=None, **blosc):
    """A prepared sequence; labels: {frame: [(x, y, w, h, class_id), ...]} in sensor pixels. Pixel (0, 0) of channel 0
    is the frame's number + 1, of channel 1 the seed: so a batch tells what it shows."""
    events, where = path / data.REPRESENTATION, path / "labels_v2"
    events.mkdir(parents=True)
    where.mkdir()
    rng = np.random.default_rng(seed)
    shape = (length, data.CHANNELS, *hw)
    frames = rng.poisson(0.1, shape).astype(np.uint8) if fill is None else np.full(shape, fill, np.uint8)
    frames[:, 0, 0, 0], frames[:, 1, 0, 0] = np.arange(length) + 1, seed
    with h5py.File(events / data.FILES["half" if half else "full"], "w") as file:
        file.create_dataset("data", data=frames, chunks=(1, *shape[1:]), maxshape=(None, *shape[1:]),
                            **(blosc or BLOSC))
    times = np.arange(1, length + 1) * 50_000 if times is None else times
    rows = [(times[frame], *box) for frame in sorted(labels) for box in labels[frame]]
    first = np.cumsum([0, *(len(labels[frame]) for frame in sorted(labels))], dtype=np.int64)[:-1]
    np.save(events / "timestamps_us.npy", times)
    np.save(events / "objframe_idx_2_repr_idx.npy", np.array(sorted(labels), np.int64))
    np.savez(where / "labels.npz", labels=make_boxes(rows) if rows else np.zeros(0, BOX_DTYPE),
             objframe_idx_2_label_idx=first)
    np.save(where / "timestamps_us.npy", times[sorted(labels)] if labels else np.zeros(0, np.int64))
    return frames


BOX = (10.0, 8.0, 20.0, 16.0, 1)


def make_set(root, labelled, split="train", length=30, **options):
    """DATA/split with one sequence for each list of labelled frames, seeds 1, 2, ...; returns DATA."""
    for i, frames in enumerate(labelled):
        write_sequence(root / split / f"s{i}", {f: [BOX] for f in frames}, length, seed=i + 1, **options)
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
    """Three sequences with label gaps; T = 4 makes runs of several chunks, one that starts at frame 0."""
    root = make_set(tmp_path_factory.mktemp("toy_set"), [[1, 3, 5, 6, 20, 22, 29], [9, 10, 11, 12, 13, 26], [15]])
    return open_split(root, "train")


# ---- prepared sequences


def test_boxes_are_clipped_halved_and_dropped_by_hand():
    boxes = make_boxes([(0, -10, 4, 30, 20, 0),  # left edge out: x 0..20
                        (0, 50, 30, 40, 40, 1),  # right and bottom out: clamped to 63, 47, then to 31, 23
                        (0, 62.5, 10, 5, 10, 2),  # only in the last column: halved it is flat
                        (0, 70, 10, 5, 10, 3),  # out of the frame
                        (0, 3, 5, 7, 9, 4)])
    fitted, left = move_boxes(boxes, (48, 64), View(zoom=0.5))
    assert left.tolist() == [True, True, False, False, True]
    assert [tuple(box)[1:5] for box in fitted[left]] == [(0, 2, 10, 10), (25, 15, 6, 8), (1.5, 2.5, 3.5, 4.5)]
    fitted, left = move_boxes(boxes, (48, 64), View())
    assert left.tolist() == [True, True, True, False, True]
    assert [tuple(box)[1:5] for box in fitted[left]] == [(0, 4, 20, 20), (50, 30, 13, 17), (62.5, 10, 0.5, 10),
                                                         (3, 5, 7, 9)]


def test_a_labelled_frame_left_without_boxes_counts_as_unlabelled(tmp_path):
    write_sequence(tmp_path / "train" / "a", {2: [BOX], 5: [(62.5, 0, 5, 5, 0)], 7: [(62.5, 0, 5, 5, 0), BOX]}, 9)
    (sequence,) = open_split(tmp_path, "train")
    assert sequence.label_frames.tolist() == [2, 7]
    assert [box.tolist() for box in sequence.boxes] == [[(t, 5, 4, 10, 8, 1, 0, 1)] for t in (150_000, 400_000)]
    assert sequence.dropped == 2


def test_sequence_attributes_and_frames_are_what_was_written(tmp_path):
    frames = write_sequence(tmp_path / "val" / "b", {1: [BOX], 4: [BOX, BOX]}, 6, half=False)
    write_sequence(tmp_path / "val" / "a", {}, 3, half=False)
    (tmp_path / "val" / ".partial").mkdir()
    (tmp_path / "val" / "notes.txt").write_text("")
    a, b = open_split(tmp_path, "val", num_classes=2)
    assert (a.name, a.length, len(a.label_frames), a.boxes) == ("a", 3, 0, [])
    assert (b.name, b.path, b.length, b.hw) == ("b", tmp_path / "val" / "b", 6, (24, 32))
    assert b.timestamps_us.tolist() == [50_000 * n for n in range(1, 7)] and b.timestamps_us.dtype == np.int64
    assert [len(boxes) for boxes in b.boxes] == [1, 2] and b.boxes[0].dtype == BOX_DTYPE and b.dropped == 0
    assert np.array_equal(b.read(2, 6), frames[2:]) and b.read(3, 3).shape == (0, 20, 24, 32)
    again = pickle.loads(pickle.dumps(b))
    out = np.full((7, 2, 20, 24, 32), 9, np.uint8)
    again.read(0, 6, out[:, 1])
    assert np.array_equal(out[:6, 1], frames) and (out[:, 0] == 9).all() and (out[6] == 9).all()


def test_older_labels_without_track_id_and_labels_with_more_fields_load(tmp_path):
    write_sequence(tmp_path / "train" / "a", {1: [BOX]}, 3)
    path = tmp_path / "train" / "a" / "labels_v2" / "labels.npz"
    fields = [("class_id", ">u2"), ("t", "<u8"), *((name, "<f8") for name in "hwyx"), ("invalid", "?")]
    for chosen, extra in ((fields, (0, 1.0)), (fields + [("track_id", "<i8"), ("class_confidence", "<f8")], (5, 0.25))):
        labels = np.zeros(1, chosen)
        for name, value in dict(class_id=3, t=7, x=10, y=8, w=20, h=16, track_id=5, class_confidence=0.25).items():
            if name in labels.dtype.names:
                labels[name] = value
        np.savez(path, labels=labels, objframe_idx_2_label_idx=np.array([0], np.uint32))
        (sequence,) = open_split(tmp_path, "train")
        assert sequence.boxes[0].tolist()[0][:6] == (7, 5, 4, 10, 8, 3) and sequence.boxes[0].tolist()[0][7] == extra[1]


def test_the_half_resolution_file_is_taken_where_both_are_there_and_what_is_asked_for_must_be_there(tmp_path):
    write_sequence(tmp_path / "train" / "a", {1: [BOX]}, 3, hw=(48, 64), half=False)
    with pytest.raises(ValueError, match="resolution='half'"):
        open_split(tmp_path, "train", resolution="half")
    assert open_split(tmp_path, "train")[0].hw == (48, 64)
    write_sequence(tmp_path / "other", {1: [BOX]}, 3)
    os.rename(tmp_path / "other" / data.REPRESENTATION / data.FILES["half"],
              tmp_path / "train" / "a" / data.REPRESENTATION / data.FILES["half"])
    assert open_split(tmp_path, "train")[0].hw == (24, 32)
    assert open_split(tmp_path, "train", resolution="full")[0].boxes[0]["x"] == 10
    with pytest.raises(ValueError, match="resolution='quarter'"):
        open_split(tmp_path, "train", resolution="quarter")


def test_a_missing_or_empty_split_says_what_to_do(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / ".keep").write_text("")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"{split}.*prepare.py") as error:
            open_split(tmp_path, split)
        assert "\n" not in str(error.value)


def test_class_names_come_from_dataset_json_then_from_the_caller_then_are_numbers(tmp_path):
    assert data.load_classes(tmp_path, ("car", "tram")) == ("car", "tram")
    assert data.load_classes(tmp_path, num_classes=3) == ("0", "1", "2")
    for call in (lambda: data.load_classes(tmp_path), lambda: data.load_classes(tmp_path, ("car",), 2)):
        with pytest.raises(ValueError, match="class"):
            call()
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["a", "b", "c"], "height": 1}))
    assert data.load_classes(tmp_path, ("car", "tram")) == ("a", "b", "c")
    for text in ("", "{", "[]", '{"classes": 3}', '{"classes": [1]}', '{"classes": []}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match="dataset.json"):
            data.load_classes(tmp_path)


def test_a_class_id_beyond_the_classes_names_the_file(tmp_path):
    make_set(tmp_path, [[1]], length=3)
    open_split(tmp_path, "train", num_classes=2)
    with pytest.raises(ValueError, match="labels.npz.*class ids from"):
        open_split(tmp_path, "train", num_classes=1)


def test_sequences_of_other_sizes_are_refused(tmp_path):
    make_set(tmp_path, [[1]], length=3)
    write_sequence(tmp_path / "train" / "t", {1: [BOX]}, 3, hw=(16, 32))
    with pytest.raises(ValueError, match="t: frames of"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("filters", [
    BLOSC, hdf5plugin.Blosc(cname="zstd", clevel=9, shuffle=0), hdf5plugin.Blosc(cname="lz4", shuffle=1),
    hdf5plugin.Blosc(cname="zstd", clevel=0), hdf5plugin.Blosc(cname="zstd", shuffle=2), dict(shuffle=True, **BLOSC),
    hdf5plugin.Blosc2(cname="zstd"), dict(compression="gzip")], ids=str)
def test_frames_decode_whatever_the_compression(tmp_path, filters):
    rng = np.random.default_rng(0)
    for name, fill in (("sparse", None), ("zero", 0), ("noise", rng.integers(0, 256, (3, 20, 48, 64)))):
        frames = write_sequence(tmp_path / "train" / name, {}, 3, hw=(48, 64), fill=fill, **filters)
        sequence = data.Sequence(tmp_path / "train" / name)
        assert np.array_equal(sequence.read(0, 3), frames)


def test_a_chunk_whose_header_lies_about_its_sizes_is_refused(tmp_path):
    write_sequence(tmp_path / "train" / "a", {}, 3, hw=(48, 64))
    file = Path(data.Sequence(tmp_path / "train" / "a").file)
    with h5py.File(file) as opened:
        at = opened["data"].id.get_chunk_info(1).byte_offset
    whole = file.read_bytes()
    for place in (4, 12):  # bytes of the frame, bytes of the chunk
        file.write_bytes(whole[:at + place] + b"xxxx" + whole[at + place + 4:])
        with pytest.raises(ValueError, match="frame 1 does not decode.*sizes are damaged"):
            data.Sequence(tmp_path / "train" / "a").read(0, 3)


def reference_sets():
    if not (SHARED / "reference" / "prepared").is_dir():
        pytest.skip("../shared/reference is absent")
    return [(kind, split) for kind in ("gen1", "gen4", "etram") for split in ("train", "val")]


def test_reference_sets_read_as_rvt_reads_them():
    for kind, split in reference_sets():
        (sequence,) = open_split(SHARED / "reference" / "prepared" / kind / "out", split, num_classes=8)
        half, (H, W) = kind != "gen1", {"gen1": (240, 304)}.get(kind, (720, 1280))
        with h5py.File(sequence.file) as file:
            assert np.array_equal(sequence.read(3, 6), file["data"][3:6]) and sequence.length == len(file["data"])
        assert sequence.hw == ((H // 2, W // 2) if half else (H, W))
        stored = np.load(sequence.path / "labels_v2" / "labels.npz")
        index = np.load(sequence.path / data.REPRESENTATION / "objframe_idx_2_repr_idx.npy")
        first = [*stored["objframe_idx_2_label_idx"], len(stored["labels"])]
        expected, f = {}, np.float32
        for i, frame in enumerate(index.tolist()):
            for label in stored["labels"][first[i]:first[i + 1]]:
                x0, y0 = (min(max(label[n], f(0)), f(size - 1)) for n, size in (("x", W), ("y", H)))
                w = min(max(label["x"] + label["w"], f(0)), f(W - 1)) - x0
                h = min(max(label["y"] + label["h"], f(0)), f(H - 1)) - y0
                if half:
                    x1, y1 = min((x0 + w) * f(0.5), f(W / 2 - 1)), min((y0 + h) * f(0.5), f(H / 2 - 1))
                    x0, y0 = x0 * f(0.5), y0 * f(0.5)
                    w, h = x1 - x0, y1 - y0
                if w > 0 and h > 0:
                    row = (label["t"], x0, y0, w, h, label["class_id"], label["track_id"], 1)
                    expected.setdefault(frame, []).append(row)
        assert sequence.label_frames.tolist() == list(expected)
        for boxes, rows in zip(sequence.boxes, expected.values()):
            assert boxes.tolist() == np.array(rows, BOX_DTYPE).tolist()


# ---- the plan


def test_runs_by_hand(toy_set):
    runs = data.Runs(toy_set, 4, seed=0, random=False)  # gaps longer than T = 4 cut: 6 -> 20, 22 -> 29, 13 -> 26
    assert runs.chunks == [(0, 0, 0, 4), (0, 0, 4, 7), (0, 17, 17, 21), (0, 17, 21, 23), (0, 26, 26, 30), (1, 6, 6, 10),
                           (1, 6, 10, 14), (1, 23, 23, 27), (2, 12, 12, 16)]
    assert runs.run_of.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5]
    windows = data.Runs(toy_set, 4, seed=0, random=True)  # frame 1 has no three frames before it
    assert windows.chunks[:3] == [(0, 0, 0, 4), (0, 2, 2, 6), (0, 3, 3, 7)] and len(windows.chunks) == 6 + 6 + 1
    assert data.Runs([], 4, 0, False).chunks == []


def test_each_slot_plays_every_chunk_once_a_pass_in_order_within_a_run(toy_set):
    for batch_size in (1, 3, 13):  # fewer runs than slots is fine
        train = plan(toy_set, batch_size=batch_size)
        L = train.steps_per_epoch
        assert L == 9
        batches = [train[k] for k in range(2 * L)]
        for b in range(batch_size):
            plays = [(shown(batch, b), bool(batch.is_first[b])) for batch in batches]
            begin = -(b * L // batch_size) % L  # the first step at which this slot begins a pass
            one_pass = plays[begin:begin + L]
            frames = sorted((s, f) for (s, seen), _ in one_pass for f in seen if f >= 0)
            chunks = train.runs[0].chunks
            assert frames == sorted((i + 1, f) for i, _, start, stop in chunks for f in range(start, stop))
            for i, ((sequence, seen), first) in enumerate(one_pass):
                starts_run = (sequence - 1, seen[0]) in [chunk[:2] for chunk in chunks]
                assert first == starts_run
                if not first:
                    (before, previous), _ = one_pass[i - 1]
                    assert before == sequence and previous[-1] + 1 == seen[0]


def test_every_labelled_frame_carries_its_boxes_and_every_chunk_one_at_least(toy_set):
    train = plan(toy_set, flip=0.0, zoom_stream=0.0, batch_size=3)
    for k in range(12):
        batch = train[k]
        assert batch.has_boxes and batch.frames.any(0).all()
        for b in range(3):
            sequence, frames = shown(batch, b)
            assert batch.frames[:, b].tolist() == [frame in toy_set[sequence - 1].label_frames for frame in frames]
        assert batch.targets.shape == (batch.frames.sum(), 16, 5)
        assert (batch.targets[:, 0] == torch.tensor([1, 10.0, 8.0, 10.0, 8.0])).all() and not batch.targets[:, 1:].any()


def test_a_chunk_beyond_the_end_of_its_run_is_zeros_without_boxes(toy_set):
    train = plan(toy_set, batch_size=1)
    short = [batch for batch in map(train.__getitem__, range(9)) if shown(batch, 0)[1][-1] == -1]
    assert len(short) == 2  # runs of 7 and 6 frames
    for batch in short:
        end = shown(batch, 0)[1].index(-1)
        assert not batch.events[end:].any() and batch.events[:end].any() and not batch.frames[end:].any()


def test_random_windows_end_at_a_labelled_frame_and_start_from_a_reset_state(toy_set):
    train = plan(toy_set, sampling="random", batch_size=2)
    assert train.steps_per_epoch == 13
    seen = []
    for k in range(13):
        batch = train[k]
        assert batch.is_first.all()
        for b in range(2):
            sequence, frames = shown(batch, b)
            assert frames == list(range(frames[0], frames[0] + 4)) and frames[-1] in toy_set[sequence - 1].label_frames
            seen += [(b, sequence, frames[-1])]
    first = [window[1:] for window in seen if window[0] == 0]
    assert len(set(first)) == 13 and first != sorted(first)


def test_mixed_batches_hold_streams_and_windows_in_their_proportion(toy_set):
    for B, weights, streams in ((2, (1, 1), 1), (4, (1, 1), 2), (4, (9, 1), 3), (5, (1, 20), 1), (6, (1, 2), 2)):
        train = plan(toy_set, sampling="mixed", batch_size=B, mixed_stream=weights[0], mixed_random=weights[1])
        assert train.slots == (streams, B - streams)
        firsts = torch.stack([train[k].is_first for k in range(9)])
        assert firsts[:, streams:].all() and not firsts[:, :streams].all()


def test_the_plan_is_the_same_for_any_number_of_workers_and_any_start(toy_set):
    train = plan(toy_set, sampling="mixed", batch_size=3)
    expected = [train[k] for k in range(5, 11)]
    for workers, start in ((0, 5), (1, 5), (3, 5), (0, 7), (2, 8)):
        loader = make_loader(plan(toy_set, sampling="mixed", batch_size=3).__getitem__, start, workers)
        for batch in expected[start - 5:]:
            got = next(loader)
            assert type(got) is data.Batch and same_batch(got, batch)
        loader.close()


@pytest.mark.parametrize("sampling", ["stream", "random", "mixed"])
def test_processes_and_accumulation_show_the_data_of_one_larger_batch(toy_set, sampling):
    whole = plan(toy_set, sampling=sampling, batch_size=4)
    parts = [plan(toy_set, sampling=sampling, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    folded = plan(toy_set, sampling=sampling, batch_size=2, gradient_accumulation_steps=2)
    for k in range(6):
        def views(batches):
            return sorted((shown(batch, b), batch.rows[b].tolist(), batch.cols[b].tolist()) for batch in batches
                          for b in range(len(batch.is_first)))
        assert views([whole[k]]) == views([part[k] for part in parts]) == views([folded[2 * k], folded[2 * k + 1]])
        assert same_batch(parts[1][k], folded[2 * k + 1])
    if sampling != "mixed":  # in order, too; a mixed batch has its streams first
        assert torch.equal(whole[3].events[:, 2:], parts[1][3].events)


def test_one_by_two_is_two_by_one_and_other_seeds_differ(toy_set):
    two, one = plan(toy_set), plan(toy_set, batch_size=1, gradient_accumulation_steps=2)
    for k in range(5):
        for b in range(2):
            assert torch.equal(two[k].events[:, b], one[2 * k + b].events[:, 0])
    assert not all(same_batch(two[k], plan(toy_set, seed=1)[k]) for k in range(5))


def test_nothing_to_play_is_named(toy_set, tmp_path):
    unlabelled = open_split(make_set(tmp_path, [[], []], length=3), "train")
    for sequences, options in ((unlabelled, {}), (toy_set, dict(sampling="random", sequence_length=31))):
        with pytest.raises(ValueError, match="train.*no labelled frame"):
            plan(sequences, **options)


def test_targets_are_padded_to_a_few_sizes():
    for n, size in ((1, 16), (16, 16), (17, 32), (100, 128)):
        boxes = make_boxes([(0, 2 * i, i, 4, 6, 3) for i in range(n)])
        targets = data.pad_targets([boxes[:1], boxes])
        assert targets.shape == (2, size, 5) and targets.dtype == torch.float32
        assert targets[1, n - 1].tolist() == [3, 2 * (n - 1) + 2, n - 1 + 3, 4, 6] and not targets[1, n:].any()
    assert data.pad_targets([]).shape == (1, 16, 5) and not data.pad_targets([]).any()


# ---- augmentation


def per_pixel(frames, view):
    """Slow reference: flip, then zoom by looking up each pixel, exactly in fractions."""
    from fractions import Fraction
    frames = frames[..., ::-1] if view.flip else frames
    H, W = frames.shape[-2:]
    out = np.zeros_like(frames)
    h, w = (int(n * min(view.zoom, 1 / view.zoom)) for n in (H, W))
    for y in range(H):
        for x in range(W):
            if view.zoom > 1:
                source = int((y + Fraction(1, 2)) * h / H) + view.y, int((x + Fraction(1, 2)) * w / W) + view.x
            elif view.zoom < 1:
                if not (view.y <= y < view.y + h and view.x <= x < view.x + w):
                    continue
                source = int((y - view.y + Fraction(1, 2)) * H / h), int((x - view.x + Fraction(1, 2)) * W / w)
            else:
                source = y, x
            out[..., y, x] = frames[..., source[0], source[1]]
    return out


def maps(views, hw):
    return (torch.stack([index_map(hw[0], v.y, v.zoom, False) for v in views]),
            torch.stack([index_map(hw[1], v.x, v.zoom, v.flip) for v in views]))


VIEWS = [View(), View(True, 1.0, 0, 0), View(False, 1.31, 5, 3), View(True, 1.5, 0, 8), View(False, 1 / 1.2, 3, 2),
         View(True, 1 / 1.07, 1, 0)]


def test_flips_and_zooms_equal_a_slow_per_pixel_reference():
    rng, hw = np.random.default_rng(0), (25, 34)
    events = torch.from_numpy(rng.integers(0, 255, (2, len(VIEWS), 3, *hw), dtype=np.uint8))
    out = augment(events, *maps(VIEWS, hw))
    for b, view in enumerate(VIEWS):
        assert np.array_equal(out[:, b].numpy(), per_pixel(events[:, b].numpy(), view)), view
    assert torch.equal(augment(events, *maps(VIEWS[:1] * len(VIEWS), hw)), events)
    assert torch.equal(augment(events.float(), *maps(VIEWS, hw)), out.float())


def test_zooms_equal_torch_nearest_exact_of_crop_and_canvas_bit_for_bit():
    rng = np.random.default_rng(1)
    from torch.nn.functional import interpolate
    for _ in range(60):
        hw = H, W = int(rng.integers(20, 400)), int(rng.integers(20, 700))
        events = torch.from_numpy(rng.integers(0, 11, (1, 1, 1, H, W), dtype=np.uint8))
        for inward in (0, 1):
            view = data.draw_view(rng, hw, make_boxes([(0, 1, 2, 9, 7, 0)]), 0.5, 1.0, inward, 1.5, 1.2)
            frame = events[0].flip(-1) if view.flip else events[0]
            h, w = int(H * min(view.zoom, 1 / view.zoom)), int(W * min(view.zoom, 1 / view.zoom))
            if view.zoom > 1:
                expected = interpolate(frame[..., view.y:view.y + h, view.x:view.x + w], size=hw, mode="nearest-exact")
            else:
                expected = torch.zeros_like(frame)
                small = interpolate(frame, size=(h, w), mode="nearest-exact")
                expected[..., view.y:view.y + h, view.x:view.x + w] = small
            assert torch.equal(augment(events, *maps([view], hw))[0], expected)


def test_boxes_of_flips_and_zooms_by_hand():
    boxes, hw = make_boxes([(0, 4, 6, 10, 8, 0), (0, 20, 10, 8, 8, 1), (0, 30, 20, 1, 3, 2)]), (24, 32)

    def xywh(view):
        moved, left = move_boxes(boxes, hw, view)
        return [(*np.round(box.tolist()[1:5], 4), box["class_id"]) for box in moved[left]]

    assert xywh(View()) == [(4, 6, 10, 8, 0), (20, 10, 8, 8, 1), (30, 20, 1, 3, 2)]
    assert xywh(View(True, 1.0, 0, 0)) == [(17, 6, 10, 8, 0), (3, 10, 8, 8, 1), (0, 20, 1, 3, 2)]
    # window (8, 4) to (24, 16), edges end one short of it: the first box is cut left, the second right and below
    assert xywh(View(False, 2.0, 8, 4)) == [(0, 4, 12, 16, 0), (24, 12, 6, 10, 1)]
    # half size at (5, 3); the third box starts at 15 and ends at 15.5, beyond the small frame's last pixel, 15: flat
    assert xywh(View(False, 0.5, 5, 3)) == [(7, 6, 5, 4, 0), (15, 8, 4, 4, 1)]
    assert xywh(View(True, 0.5, 5, 3)) == [(13.5, 6, 5, 4, 0), (6.5, 8, 4, 4, 1), (5, 13, 0.5, 1, 2)]
    assert len(move_boxes(boxes[:0], hw, View(True, 2.0))[0]) == 0


def test_views_are_drawn_in_rvts_ranges_and_zooming_in_holds_a_box():
    rng, hw = np.random.default_rng(0), (240, 304)
    boxes = make_boxes([(0, 200, 100, 40, 30, 0), (0, 10, 200, 12, 20, 1), (0, 0, 0, 303, 239, 2)])
    kinds = {"flip": 0, "in": 0, "out": 0, "none": 0}
    held = [0, 0, 0]
    for _ in range(2000):
        view = data.draw_view(rng, hw, boxes, 0.5, 0.8, 0.8, 1.5, 1.2)
        kinds["flip"] += view.flip
        kinds["in" if view.zoom > 1 else "out" if view.zoom < 1 else "none"] += 1
        h, w = (int(n * min(view.zoom, 1 / view.zoom)) for n in hw)
        assert 1 / 1.2 <= view.zoom <= 1.5 and 0 <= view.y <= hw[0] - h and 0 <= view.x <= hw[1] - w
        if view.zoom > 1:
            for i, (_, x, y, width, height, *_) in enumerate(boxes.tolist()):
                x = hw[1] - 1 - x - width if view.flip else x
                if view.x <= x and view.y <= y and x + width < view.x + w + 1 and y + height < view.y + h + 1:
                    held[i] += 1
    assert held[0] > 450 and held[1] > 450 and held[2] < 20  # the third is larger than nearly all windows
    assert abs(kinds["flip"] - 1000) < 100 and abs(kinds["in"] - 1280) < 100 and abs(kinds["out"] - 320) < 80
    stream = [data.draw_view(rng, hw, boxes, 0.5, 0.5, 0.0, 1.5, 1.2).zoom for _ in range(1000)]
    assert max(stream) == 1.0 and abs(sum(zoom < 1 for zoom in stream) - 500) < 80


def test_the_view_of_a_stream_does_not_depend_on_how_many_boxes_there_are():
    box = make_boxes([(0, 3, 4, 5, 6, 0)])
    for seed in range(200):
        views = [data.draw_view(np.random.default_rng(seed), (48, 64), np.repeat(box, n), 0.5, 0.5, 0.0, 1.5, 1.2)
                 for n in (1, 2, 5)]
        assert views[0] == views[1] == views[2]


def test_augmentation_is_constant_along_a_run_and_differs_between_runs(toy_set):
    train = plan(toy_set, batch_size=1, zoom_stream=1.0)
    batches = [train[k] for k in range(18)]
    changed = 0
    drawn = {batches[0].rows.numpy().tobytes() + batches[0].cols.numpy().tobytes()}
    for before, batch in zip(batches, batches[1:]):
        key = batch.rows.numpy().tobytes() + batch.cols.numpy().tobytes()
        if batch.is_first:
            changed += key not in drawn
        else:
            assert torch.equal(batch.rows, before.rows) and torch.equal(batch.cols, before.cols)
        drawn.add(key)
    assert changed > 7  # of 11; in a small frame two zooms may coincide


def test_a_streams_view_is_constant_along_a_run_whose_chunks_have_1_2_and_5_boxes(tmp_path):
    labels = {4 * i + 3: [(2, 2, 20, 16, 0), *[(3.0 * j, 4, 12, 10, 1) for j in range(n - 1)]]
              for i, n in enumerate((1, 2, 5, 1, 5))}
    write_sequence(tmp_path / "train" / "a", labels, 20, hw=(48, 64))
    sequences = open_split(tmp_path, "train")
    for seed in range(25):
        train = plan(sequences, batch_size=1, seed=seed, zoom_stream=1.0, zoom_out_max=2.0)
        batches = [train[k] for k in range(5)]
        assert [int(b.is_first[0]) for b in batches] == [1, 0, 0, 0, 0]
        for batch in batches[1:]:
            assert torch.equal(batch.rows, batches[0].rows) and torch.equal(batch.cols, batches[0].cols), seed


def test_frames_emptied_by_a_zoom_make_a_filler(tmp_path):
    # at half resolution to (30.95, 22.95); zoomed out that is beyond the last pixel of the small frame
    boxes = {f: [(61.2, 45.2, 0.7, 0.7, 0)] for f in range(3, 12)}
    write_sequence(tmp_path / "train" / "a", boxes, 12, seed=1)
    train = plan(open_split(tmp_path, "train"), zoom_stream=1.0, flip=0.0, zoom_out_max=1.5, batch_size=2)
    batch = next(batch for batch in map(train.__getitem__, range(200)) if not batch.has_boxes)
    assert batch.frames.sum() == 1 and batch.targets.shape == (1, 16, 5) and not batch.targets.any()
    assert plan(open_split(tmp_path, "train"), zoom_stream=0.0)[0].has_boxes


# ---- damage


def test_an_error_in_a_worker_is_one_line_that_names_the_file(tmp_path):
    root = make_set(tmp_path, [[5, 9, 13]], length=15)
    sequences = open_split(root, "train")
    with h5py.File(sequences[0].file) as file:
        at = file["data"].id.get_chunk_info(9).byte_offset
    content = bytearray(Path(sequences[0].file).read_bytes())
    content[at:at + 200] = bytes(200)
    Path(sequences[0].file).write_bytes(content)
    for workers in (0, 1):
        loader = make_loader(plan(sequences).__getitem__, 0, workers)
        with pytest.raises(ValueError, match=r"s0/event.*frame 9 does not decode") as error:
            for _ in range(9):
                next(loader)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_missing_files_and_inconsistent_arrays_name_the_file(tmp_path):
    def attempt(name, change):
        path = tmp_path / name / "train" / "s"
        write_sequence(path, {2: [BOX], 5: [BOX, BOX]}, 8)
        change(path)
        with pytest.raises(ValueError) as error:
            open_split(tmp_path / name, "train")
        assert str(path) in str(error.value) and "\n" not in str(error.value), error.value
        return str(error.value)

    folder, labels = data.REPRESENTATION, "labels_v2/labels.npz"
    index, times, events = f"{folder}/objframe_idx_2_repr_idx.npy", f"{folder}/timestamps_us.npy", f"{folder}/{data.FILES['half']}"
    for i, file in enumerate((index, times, labels)):
        assert "No such file" in attempt(f"gone{i}", lambda path: (path / file).unlink())
        attempt(f"empty{i}", lambda path: (path / file).write_bytes(b""))
        attempt(f"pickle{i}", lambda path: (path / file).write_bytes(pickle.dumps(np.array([{}, None]))))
        attempt(f"object{i}", lambda path: np.save(open(path / file, "wb"), np.array([{}, None, 1, 2] * 2)))
    for i, value in enumerate(([2, 2], [5, 2], [-1, 5], [2, 8], [2], [2, 5, 6], [2.0, 5.0], [[2, 5]], 3)):
        attempt(f"index{i}", lambda path: np.save(path / index, np.array(value)))
    for i, value in enumerate((np.arange(7), np.arange(9), np.arange(8)[::-1], np.zeros(8, int), np.arange(8.0))):
        attempt(f"times{i}", lambda path: np.save(path / times, value))
    good = make_boxes([(n, 10, 8, 20, 16, 1) for n in (1, 2, 2)])

    def write(path, boxes, first):
        np.savez(path / labels, labels=boxes, objframe_idx_2_label_idx=np.array(first))

    for i, first in enumerate(([1, 1], [0, 3], [-1, 1], [1, 0], [0], [0.0, 1.0])):
        attempt(f"first{i}", lambda path: write(path, good, first))
    values = ("x", np.nan), ("w", np.inf), ("h", -np.inf), ("class_id", 2**32 - 1), ("t", 9)
    for i, (name, value) in enumerate(values):
        changed = good.copy()
        changed[name][1] = value
        attempt(f"value{i}", lambda path: write(path, changed, [0, 1]))
    for i, boxes in enumerate((good["x"], good[["x", "y", "w"]], np.zeros(3), np.array(["a"] * 3), good[None],
                               np.full(3, "a", "U3").astype([(n, "U3") for n in BOX_DTYPE.names]))):
        attempt(f"dtype{i}", lambda path: write(path, boxes, [0, 1]))
    for i, content in enumerate((b"", b"\x89HDF\r\n\x1a\n", bytes(5000))):
        attempt(f"h5{i}", lambda path: (path / events).write_bytes(content))
    attempt("cut", lambda path: os.truncate(path / events, (path / events).stat().st_size - 1000))
    kinds = [((8, 20, 24), "u1"), ((8, 10, 24, 32), "u1"), ((0, 20, 24, 32), "u1"), ((8, 20, 0, 32), "u1"),
             ((10**9, 20, 24, 32), "u1"), ((8, 20, 24, 32), "i2"), ((8, 20, 24, 32), "f4")]
    for i, (shape, dtype) in enumerate(kinds):
        def other(path):
            with h5py.File(path / events, "w") as file:
                file.create_dataset("data", shape, dtype, chunks=(1, *shape[1:]) if 0 not in shape else None)
        attempt(f"shape{i}", other)
    creators = (lambda file: file.create_group("data"), lambda file: file.create_dataset("frames", data=1),
                lambda file: file.create_dataset("data", data=3))
    for i, create in enumerate(creators):
        attempt(f"layout{i}", lambda path: create(h5py.File(path / events, "w")))


# ---- inspection


def test_inspection_counts_and_draws_what_a_set_holds(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5]], length=10)
    make_set(tmp_path, [[2]], "val", length=10)
    write_sequence(tmp_path / "train" / "z", {0: [(0, 0, 62, 46, 0), (-9, 0, 20, 20, 1)]}, 10)
    (tmp_path / "dataset.json").write_text('{"classes": ["car", "tram"]}')
    data.main([str(tmp_path), f"--picture={tmp_path}/sizes.png"])
    out = capsys.readouterr().out
    assert "train: 3 sequences" in out and "4 (13.3%) with boxes, 5 boxes" in out and "val: 1 sequences" in out
    assert "/test:" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["0", "car", "0", "1", "0", "0"] in rows and ["1", "tram", "4", "0", "0", "0"] in rows
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_inspection_ends_with_an_error_where_training_would_fail(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5], [4]], length=10)
    make_set(tmp_path, [[2]], "val", length=10)
    os.truncate(tmp_path / "train" / "s1" / data.REPRESENTATION / data.FILES["half"], 9000)
    np.save(tmp_path / "train" / "s2" / data.REPRESENTATION / "timestamps_us.npy", np.arange(10)[::-1])
    with pytest.raises(ValueError, match="findings: 2"):
        data.main([str(tmp_path), "--picture="])
    out = capsys.readouterr().out
    assert "train: 1 sequences" in out and "train/s1" in out and "unsorted" in out
    data.main([str(tmp_path), "--split=val", "--picture="])
    with pytest.raises(ValueError):
        data.main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError):
        data.main([str(tmp_path), "--split=val", "--class_names=car", "--picture="])


def test_inspection_finds_a_frame_that_does_not_decode(tmp_path, capsys):
    root = make_set(tmp_path, [[1, 3]], length=10)
    file = Path(open_split(root, "train")[0].file)
    with h5py.File(file) as opened:
        at = opened["data"].id.get_chunk_info(4).byte_offset
    file.write_bytes(file.read_bytes()[:at] + bytes(100) + file.read_bytes()[at + 100:])
    assert len(open_split(root, "train")) == 1  # opening decodes the last frame only
    with pytest.raises(ValueError):
        data.main([str(root), "--split=train", "--picture="])
    assert "frame 4 does not decode" in capsys.readouterr().out


def test_size_thresholds_are_the_terciles_of_the_areas(tmp_path):
    write_sequence(tmp_path / "train" / "a", {f: [(0, 0, 2 * f, 2, 0)] for f in range(1, 8)}, 9)
    small, medium = data.size_thresholds(open_split(tmp_path, "train"))
    assert (small, medium) == (pytest.approx(3), pytest.approx(5))
    with pytest.raises(ValueError, match="thresholds"):
        data.size_thresholds([])


# ==== prepare.py and simulate.py

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
    return np.sort(rng.integers(0, end_us, count)), *(rng.integers(0, side, count) for side in (size[1], size[0], 2))


def some_labels(times, w=20, h=12, class_id=0, x=5, y=6):
    boxes = np.zeros(len(times), prepare.LABEL)
    for key, value in dict(t=times, x=x, y=y, w=w, h=h, class_id=class_id, class_confidence=1).items():
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
        one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]) for key in one)


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


# ---- simulate

SMALL_SCENE = dict(train=2, val=1, test=0, seconds=1.0, height=48, width=64, sizes=(2.0, 8.0), users=8.0)


@pytest.fixture(scope="module")
def small_traffic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_traffic")
    simulate.simulate(folder / "raw", 0, **SMALL_SCENE)
    return folder / "raw"


def recording_of(path):
    return list(map(np.concatenate, zip(*prepare.Recording(path).chunks())))


def test_simulation_depends_on_the_seed_alone(small_traffic, tmp_path):
    simulate.simulate(tmp_path / "two", 2, **SMALL_SCENE)
    simulate.simulate(tmp_path / "other", 0, **SMALL_SCENE | dict(train=1, val=0, seed=1))
    names = [f"{split}/{split}_{i:04d}" for split, i in (("train", 0), ("train", 1), ("val", 0))]
    for name in names:
        first, second = (small_traffic / name, tmp_path / "two" / name)
        for one, other in zip(recording_of(f"{first}_td.h5"), recording_of(f"{second}_td.h5"), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(np.load(f"{first}_bbox.npy"), np.load(f"{second}_bbox.npy"))
    lengths = {len(recording_of(folder / f"{name}_td.h5")[0]) for folder, name in
               ((small_traffic, names[0]), (small_traffic, names[1]), (small_traffic, names[2]), (tmp_path / "other", names[0]))}
    assert len(lengths) == 4


def test_simulated_recordings_and_labels_keep_to_the_frame(small_traffic):
    boxes = np.concatenate([np.load(path) for path in sorted(small_traffic.glob("*/*_bbox.npy"))])
    assert len(boxes) > 20 and boxes.dtype == prepare.LABEL and boxes["class_id"].max() < 8
    assert boxes["x"].min() >= 0 and boxes["y"].min() >= 0
    assert (boxes["x"] + boxes["w"]).max() <= 63.001 and (boxes["y"] + boxes["h"]).max() <= 47.001
    assert (boxes["w"] * boxes["h"]).min() >= 15.99  # 2 px at the network's input
    assert set(np.unique(boxes["t"]) % 33_333) <= {0, 1, *range(30)}
    for path in small_traffic.glob("*/*_td.h5"):
        t, x, y, p = recording_of(path)
        assert x.max() < 64 and y.max() < 48 and set(p) == {0, 1} and 0 <= t[0] and t[-1] < 10**6
        assert 0.3 < p.mean() < 0.7 and not list(path.parent.glob(".*"))


def still_scene():
    scene = SimpleNamespace(height=48, width=64, focal=64, sizes=(6.0, 8.0), horizon=8, camera=4, road=0.0, night=False,
                            contrast=np.float32(1), ground=np.zeros((48, 64), np.float32))
    return scene, simulate.travel(np.random.default_rng(1), 1, scene, 120)


def test_what_stands_still_causes_no_events():
    scene, car = still_scene()
    car.box[:] = (10, 20, 16, 8, 0)
    car.box[:60, 0] += np.arange(60) * 0.5
    car.box[60:, 0] = car.box[59, 0]
    threshold = np.full(48 * 64, 0.2, "f4")
    pixel = SimpleNamespace(on=threshold, off=threshold, leak=0 * threshold, noise=0, hot=np.zeros(0, int), hot_rate=0)
    rng, before = np.random.default_rng(0), simulate.render(scene, [car], 0)[0].ravel()
    level, last_us, counts = before.copy(), np.full(48 * 64, -1e9), []
    for step in range(1, 120):
        image = simulate.render(scene, [car], step)[0].ravel()
        t, where, p = simulate.make_events(rng, image, before, level, last_us, pixel, step - 1)
        assert (np.diff(t) >= 0).all()
        assert (t >= (step - 1) * 1e6 / simulate.FPS - 1).all() and (t < step * 1e6 / simulate.FPS).all()
        counts.append(len(t))
        before = image
    assert sum(counts[:59]) > 500 and sum(counts[60:]) == 0
    assert np.abs(level - before).max() < 0.21  # every pixel has told all but less than a threshold (or its dead time)


def test_events_follow_the_contrast_threshold_model():
    pixel = SimpleNamespace(on=np.array([0.2], "f4"), off=np.array([0.25], "f4"), leak=np.zeros(1, "f4"), noise=0,
                            hot=np.zeros(0, int), hot_rate=0)
    rng, span = np.random.default_rng(0), 1e6 / simulate.FPS
    level = np.zeros(1, "f4")
    t, _, p = simulate.make_events(rng, np.array([0.9], "f4"), np.zeros(1, "f4"), level, np.full(1, -1e9), pixel, 10)
    np.testing.assert_allclose(t, (10 + np.arange(1, 5) * 0.2 / 0.9) * span, atol=2)  # crossings at 0.2, 0.4, 0.6, 0.8
    assert p.all() and abs(level[0] - 0.8) < 1e-6
    t, _, p = simulate.make_events(rng, np.zeros(1, "f4"), np.array([0.9], "f4"), level, np.full(1, -1e9), pixel, 11)
    np.testing.assert_allclose(t, (11 + (0.9 - np.array([0.55, 0.3, 0.05])) / 0.9) * span, atol=2)
    assert not p.any()
    zero = np.zeros(1, "f4")
    t, _, _ = simulate.make_events(rng, zero + 30, zero, zero.copy(), np.full(1, -1e9), pixel, 0)
    assert len(t) < 2  # 150 crossings within one step: faster than the dead time


def test_hidden_unmoved_and_tiny_things_have_no_label():
    scene, car = still_scene()
    options = SimpleNamespace(width=64, height=48, sizes=(3.0, 8.0))
    car.box[:] = (10, 20, 16, 8, 0)

    def labels(things, step):
        return list(simulate.labels_at(things, step, simulate.render(scene, things, step)[1], options))

    car.pace[:] = 0
    assert labels([car], 0) == []  # it stands and always did
    car.pace[:] = 200
    assert [label[1:6] for label in labels([car], 0)] == [(10, 20, 16, 8, 1)]
    _, wall = still_scene()
    wall.kind, wall.images, wall.Z = 10, np.ones((1, 40, 2, 40), "f4"), car.Z - 1
    wall.box[:] = (8, 10, 15, 20, 0)
    wall.pace[:] = 0
    assert labels([car, wall], 0) == []
    car.box[:] = (10, 20, 6, 5, 0)
    assert labels([car], 0) == []


def test_an_interrupted_simulation_leaves_no_half_recording_and_resumes(small_traffic, tmp_path, monkeypatch):
    calls, make_events = [], simulate.make_events

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 250:  # in the second recording
            raise KeyboardInterrupt
        return make_events(*arguments)

    monkeypatch.setattr(simulate, "make_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate.simulate(tmp_path, 0, **SMALL_SCENE)
    assert [path.name for path in tmp_path.glob("*/*_td.h5")] == ["train_0000_td.h5"]
    monkeypatch.setattr(simulate, "make_events", make_events)
    simulate.simulate(tmp_path, 0, **SMALL_SCENE | dict(val=0))
    for one, other in zip(*(recording_of(folder / "train" / "train_0001_td.h5") for folder in (small_traffic, tmp_path))):
        np.testing.assert_array_equal(one, other)
    assert len(calls) == 250


def test_the_toy_set_is_made_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "defaults", simulate.defaults | SMALL_SCENE)
    prepare_set = simulate.prepare

    def interrupted(*arguments, **changes):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate.ensure_toy(tmp_path / "toy", 0)
    monkeypatch.setattr(simulate, "prepare", prepare_set)
    simulate.ensure_toy(tmp_path / "toy", 0)
    assert len(list((tmp_path / "toy" / "train").iterdir())) == 2
    got = load(tmp_path / "toy" / "val" / "val_0000")
    assert got["event_representations_ds2_nearest.h5"].shape[1:] == (20, 24, 32) and got["labels"]["w"].min() < 10
    capsys.readouterr()
    shutil.rmtree(tmp_path / "toy_raw")
    simulate.ensure_toy(tmp_path / "toy", 0)
    assert not (tmp_path / "toy_raw").exists() and capsys.readouterr().out == ""


def test_wrong_simulation_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="sizes=.9, 6."):
        simulate.simulate(tmp_path, sizes=(9, 6))
    with pytest.raises(ValueError, match="unknown key"):
        simulate.main(["--second=3"])


# ==== eval.py and demo.py

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


def random_frames(seed, frames=12, classes=4, most=9, found=30, ties=False, hw=(360, 640)):
    """Labels and detections of `frames` frames: some near a label, some nowhere; with ties scores and boxes repeat."""
    rng, labels, dets = np.random.default_rng(seed), [], []
    for k in range(frames):
        n = int(rng.integers(0, most + 1))
        truth = some_boxes(k * 100_000, rng.uniform((0, 0, 4, 4), (hw[1] - 90, hw[0] - 90, 120, 120), (n, 4)),
                           rng.integers(0, classes, n))
        near = truth[rng.integers(0, n, found)] if n else truth
        near = near[: int(rng.integers(0, found + 1))]
        for name in "xywh":
            near[name] *= rng.uniform(0.85, 1.15, len(near)).astype(np.float32)
        near["class_id"] = np.where(rng.random(len(near)) < 0.8, near["class_id"], rng.integers(0, classes, len(near)))
        near["class_confidence"] = rng.integers(1, 5, len(near)) / 4 if ties else rng.random(len(near))
        if ties:
            for boxes in (truth, near):
                for name in "xywh":
                    boxes[name] = np.round(boxes[name] / 16) * 16 + 8
        labels.append(truth)
        dets.append(near)
    return labels, dets


def plain_coco(labels, dets, ids, agnostic):
    """The same scores by pycocotools' own classes, as RVT calls them: the independent oracle."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    kept = [k for k, boxes in enumerate(labels) if len(boxes)]

    def entries(side, extra):
        return [{"image_id": i, "category_id": int(b["class_id"]) + 1, "bbox": [float(b[n]) for n in "xywh"],
                 **extra(b)} for i, k in enumerate(kept, 1) for b in side[k]]

    with contextlib.redirect_stdout(None):
        coco = COCO()
        truth = entries(labels, lambda b: {"area": float(b["w"] * b["h"]), "iscrowd": 0})
        coco.dataset = {"images": [{"id": i} for i in range(1, len(kept) + 1)], "categories": [{"id": i + 1} for i in ids],
                        "annotations": [{**entry, "id": i} for i, entry in enumerate(truth, 1)]}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(entries(dets, lambda b: {"score": float(b["class_confidence"])})), "bbox")
        evaluator.params.useCats = int(not agnostic)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [(0, 1e10), *SIZES.values()], ["all", *SIZES]
        evaluator.evaluate()
        evaluator.accumulate()
    p, r = evaluator.eval["precision"], evaluator.eval["recall"]

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1

    return {"AP": mean(p[..., 0, 2]), "AP50": mean(p[0, ..., 0, 2]), "AP75": mean(p[5, ..., 0, 2]),
            "AR1": mean(r[..., 0, 0]), "AR10": mean(r[..., 0, 1]), "AR100": mean(r[..., 0, 2]),
            **{f"AP_{s}": mean(p[..., i, 2]) for i, s in enumerate("TSML", 1)},
            **{f"AR_{s}": mean(r[..., i, 2]) for i, s in enumerate("TSML", 1)}}


class MemorySequence:
    """A prepared sequence that lives in memory."""

    def __init__(self, name, length, labelled, hw=(64, 64), classes=4):
        rng = np.random.default_rng(sum(name.encode()))
        self.name, self.hw, self.length = name, hw, length
        self.timestamps_us = 50_000 * np.arange(1, length + 1)
        self.data = (rng.random((length, 20, *hw)) < 0.1).astype(np.uint8) * rng.integers(1, 9, (length, 1, 1, 1), np.uint8)
        self.label_frames = np.array(labelled)
        self.boxes = [some_boxes(self.timestamps_us[t], rng.uniform(5, 25, (2, 4)), rng.integers(0, classes, 2)) for t in labelled]

    def read(self, start, stop, out=None):
        if out is None:
            return self.data[start:stop].copy()
        out[: stop - start] = self.data[start:stop]
        return out


def small_detector(classes=4, hw=(64, 64), **changes):
    """A detector that finds boxes everywhere and whose predictions depend on its state."""
    torch.manual_seed(0)
    model = Detector(ModelConfig(input_hw=hw, num_classes=classes, embed_dim=16, dim_head=8, fpn_depth=0.33, **changes))
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
        assert len(a) == len(b) and (a["t"] == b["t"]).all() and (a["class_id"] == b["class_id"]).all()
        for name in ("x", "y", "w", "h", "class_confidence"):
            np.testing.assert_allclose(a[name], b[name], atol=tolerance, rtol=tolerance)


def write_prepared(folder, names=("a", "b"), split="test", hw=(64, 64), length=8, labelled=(2, 5, 7), classes=NAMES):
    """A prepared data set on disk, full resolution, with a dataset.json."""
    for name in names:
        sequence = MemorySequence(name, length, labelled, hw, len(classes))
        events, labels = (folder / split / name / part for part in (
            "event_representations_v2/stacked_histogram_dt=50_nbins=10", "labels_v2"))
        events.mkdir(parents=True)
        labels.mkdir()
        with h5py.File(events / "event_representations.h5", "w") as file:
            file.create_dataset("data", data=sequence.data, chunks=(1, 20, *hw))
        np.save(events / "timestamps_us.npy", sequence.timestamps_us)
        np.save(events / "objframe_idx_2_repr_idx.npy", sequence.label_frames)
        np.save(labels / "timestamps_us.npy", sequence.timestamps_us[sequence.label_frames])
        np.savez(labels / "labels.npz", labels=np.concatenate(sequence.boxes),
                 objframe_idx_2_label_idx=2 * np.arange(len(labelled)))
    (folder / "dataset.json").write_text(json.dumps({"classes": list(classes), "height": hw[0], "width": hw[1]}))
    return folder


def write_checkpoint(path, model, **config):
    torch.save({"model": model.state_dict(), "model_config": dataclasses.asdict(model.config), "config": config, "step": 1}, path)
    return path


def write_recording(path, hw=(64, 64), seconds=0.5, events=20_000):
    """A raw recording in HDF5."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        group = file.create_group("events")
        group["t"] = np.sort(rng.integers(0, int(1e6 * seconds), events))
        group["x"], group["y"], group["p"] = rng.integers(0, hw[1], events), rng.integers(0, hw[0], events), rng.integers(0, 2, events)
        group["height"], group["width"] = hw
    return path


# ---- scores

def test_scores_equal_rvt_and_its_fork_on_the_reference():
    if not (SHARED / "reference/scores.npz").exists():
        pytest.skip("../shared/reference is absent")
    arrays = np.load(SHARED / "reference/scores.npz")
    for case in json.loads((SHARED / "reference/scores.json").read_text()):
        labels, dets = (arrays[f"{case['case']}_{side}"] for side in ("labels", "detections"))
        times = np.unique(np.concatenate((labels["t"], dets["t"])))
        frames = [[side[side["t"] == t] for t in times] for side in (labels, dets)]
        scene = (case["height"], case["width"], [str(i) for i in range(case["classes"])], "prophesee")
        for protocol, options in (("prophesee_class_mean", {}), ("fork_overall", {"class_agnostic": True, "class_ids": range(
                min(3, case["classes"]))})):
            scores = score_boxes(*frames, *scene, **options)
            for key, value in case.get(protocol, {}).items():
                assert abs(scores[key.replace("AR_max_det=", "AR").replace("AP_5", "AP5").replace("AP_7", "AP7")] - value) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_pycocotools_on_random_boxes(seed):
    labels, dets = random_frames(seed, found=130 if seed == 3 else 30, ties=seed % 2 == 1)
    for agnostic in (False, True):
        got, want = score_boxes(labels, dets, 360, 640, NAMES, class_agnostic=agnostic), plain_coco(labels, dets, range(4), agnostic)
        assert {m: got[m] for m in METRICS} == pytest.approx(want, abs=1e-12)
    for i, name in enumerate(NAMES):
        alone = [[boxes[boxes["class_id"] == i] for boxes in side] for side in (labels, dets)]
        kept = [k for k, boxes in enumerate(labels) if len(boxes)]
        got = score_boxes(labels, dets, 360, 640, NAMES)["classes"][name]
        assert got["boxes"] == sum(map(len, alone[0])) and got["frames"] == len(kept)
        assert got["AP"] == pytest.approx(score_boxes(labels, dets, 360, 640, NAMES, class_ids=[i])["AP"], abs=1e-12)


def test_scores_without_detections_are_zero_and_without_labels_undefined():
    truth, none = some_boxes(0, [(10, 10, 20, 20)]), some_boxes(0, [])
    missed = score_boxes([truth], [none], 64, 64, NAMES)
    assert missed["AP"] == missed["AR100"] == missed["AP_S"] == 0 and missed["AP_M"] == missed["AP_T"] == -1
    assert missed["classes"]["car"]["AP"] == -1 and missed["boxes"] == 1  # a class without labels stays out of the mean
    for labels, dets in (([], []), ([none], [none]), ([none], [truth])):
        scores = score_boxes(labels, dets, 64, 64, NAMES)
        assert scores["frames"] == 0 and all(scores[m] == -1 for m in METRICS)
    assert score_boxes([truth], [truth], 64, 64, NAMES)["AP"] > 0.999999
    assert score_boxes([truth, none], [truth, truth], 64, 64, NAMES)["AP"] > 0.999999  # frames without labels do not count


def test_a_16_px_box_is_small_but_not_tiny():
    boxes = some_boxes(0, [(0, 0, 16, 16)]), some_boxes(0, [(0, 0, 15, 17)])
    assert [score_boxes([b], [b], 64, 64, NAMES)["AP_T"] for b in boxes] == pytest.approx([-1, 1])
    assert [score_boxes([b], [b], 64, 64, NAMES)["AP_S"] for b in boxes] == pytest.approx([1, 1])


@pytest.mark.parametrize("hw, diagonal, side", [((720, 1280), 60, 20), ((360, 640), 30, 10), ((240, 304), 30, 10), ((480, 640), 30, 10)])
def test_prophesee_filter_in_proportion_to_the_sensor(hw, diagonal, side):
    long = (diagonal ** 2 - side ** 2) ** 0.5 + 0.01
    rows = [(0, 0, side, long), (0, 0, side - 0.1, 2 * long), (0, 0, side, long - 0.1), (0, 0, long, side)]
    late, early = some_boxes(500_001, rows), some_boxes(500_000, rows)
    assert (evaluation.prophesee_filter(late, hw[1])["h"] == late["h"][[0, 3]]).all()
    assert len(evaluation.prophesee_filter(early, hw[1])) == 0
    assert score_boxes([late, early], [late, early], *hw, NAMES, "prophesee")["boxes"] == 2


def test_class_ids_keep_frames_that_hold_only_other_classes():
    car, bus = some_boxes(0, [(0, 0, 40, 40)], 1), some_boxes(0, [(0, 0, 40, 40)], 3)
    false_car = some_boxes(0, [(0, 0, 40, 40)], 1, 1.0)
    found = some_boxes(0, [(0, 0, 40, 40)], 1, 0.5)
    scores = score_boxes([car, bus], [found, false_car], 360, 640, NAMES, class_agnostic=True, class_ids=range(3))
    assert scores["frames"] == 2 and scores["boxes"] == 1 and scores["AP"] == pytest.approx(0.5)
    both = score_boxes([car, bus], [found, false_car], 360, 640, NAMES, class_agnostic=True)
    assert both["boxes"] == 2 and both["AP"] > 0.999999


def test_scoring_rejects_an_unknown_filter():
    with pytest.raises(ValueError, match="box_filter='psee': expected none or prophesee"):
        score_boxes([], [], 64, 64, NAMES, "psee")


# ---- predictions to detections

def greedy(box, score, label, iou):
    """Non-maximum suppression by its definition, box by box."""
    kept = []
    for i in sorted(range(len(score)), key=lambda i: -float(score[i])):
        def clashes(j):
            w, h = (np.clip(min(box[i][k + 2], box[j][k + 2]) - max(box[i][k], box[j][k]), 0, None) for k in (0, 1))
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box[j], box[i])]
            with np.errstate(invalid="ignore"):
                return label[i] == label[j] and np.float32(w * h) / (areas[0] + areas[1] - w * h) > iou
        if not any(clashes(j) for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_nms_is_the_greedy_definition(seed):
    rng, n = np.random.default_rng(seed), (0, 1, 8, 60, 150, 250)[seed]
    corner, size = rng.uniform(0, 60, (n, 2)), rng.uniform(0, 30, (n, 2))
    if seed % 2:  # whole numbers: equal boxes, overlaps of exactly the threshold, boxes without area
        corner, size = corner.round(), size.round()
    box = torch.tensor(np.concatenate((corner, corner + size), 1), dtype=torch.float32)
    score = torch.tensor(rng.integers(0, 6, n) / 6 if seed % 2 else rng.random(n), dtype=torch.float32)
    label = torch.tensor(rng.integers(0, 3, n))
    for iou in (0.45, 0.5):
        for block in (256, 1, 16):
            assert nms(box, score, label, iou, block).tolist() == greedy(box.numpy(), score, label, iou)


def test_nms_of_many_boxes_in_bounded_blocks():
    torch.manual_seed(0)
    corner = 8 * torch.randint(0, 40, (20_000, 2)).float()
    box = torch.cat((corner, corner + 10), 1)  # neighbours overlap by less than the threshold: one box is left per cell
    kept = nms(box, torch.rand(20_000), torch.zeros(20_000), 0.45)
    assert len(kept) == len(corner.unique(dim=0)) == len(corner[kept].unique(dim=0))


def test_detections_by_hand():
    def logit(*p):
        return torch.tensor(p).logit()

    grid = torch.tensor([[0, 0, 8.0], [1, 0, 8], [0, 0, 16], [0, 0, 32]])
    box = torch.tensor([[20, 30, 10, 20.0], [21, 30, 10, 20], [21, 30, 10, 20], [50, 50, 4, 4]]).repeat(2, 1, 1)
    obj = torch.stack((logit(0.5, 0.9, 0.9, 0.01), logit(1e-5, 1e-5, 1e-5, 1e-5)))
    cls = torch.stack([logit(0.9, 0.2), logit(0.4, 0.6), logit(0.8, 0.1), logit(0.05, 0.09)]).repeat(2, 1, 1)
    first, second = detections(Prediction(box, obj, cls, grid), [7, 8])
    # anchor 2 (0.72, class 0) drops anchor 0 (0.45, class 0); anchor 1 is of class 1 (0.54); anchor 3 (0.0009) is too weak
    assert len(second) == 0 and first["class_id"].tolist() == [0, 1] and first["stride"].tolist() == [16, 8]
    np.testing.assert_allclose(first["class_confidence"], [0.8, 0.6], rtol=1e-5)  # p_cls ranks
    np.testing.assert_allclose(first["confidence"], [0.72, 0.54], rtol=1e-5)
    assert [first[0][name] for name in ("t", "x", "y", "w", "h")] == [7, 16, 20, 10, 20]
    product = detections(Prediction(box, obj, cls, grid), [7, 8], score="obj*cls", confidence=0.6)[0]
    assert product["class_confidence"].tolist() == product["confidence"].tolist() and len(product) == 1
    with pytest.raises(ValueError, match="expected cls or obj"):
        detections(Prediction(box, obj, cls, grid), [7, 8], score="obj")


# ---- streams

SEQUENCES = [("c", 12, (1, 4, 9)), ("a", 20, (0, 3, 8, 19)), ("b", 7, (1, 6)), ("d", 9, (0,)), ("e", 5, ())]


@pytest.mark.parametrize("attention", (False, True))
def test_run_does_not_depend_on_batches_chunks_order_or_workers(attention):
    model, sequences = small_detector(small_object_attention=attention), [MemorySequence(*s) for s in SEQUENCES]
    labels, want = run(model, sequences, 1, 2)
    assert [boxes["t"][0] for boxes in labels] == [s.timestamps_us[t] for s in sorted(sequences, key=lambda s: s.name)
                                                  for t in s.label_frames]
    assert min(map(len, want)) > 5
    for batch, T, workers in ((3, 3, 0), (8, 30, 0), (2, 2, 2)):
        again, got = run(model, sequences[::-1], batch, T, num_workers=workers)
        same_boxes(got, want)
        assert all((a == b).all() for a, b in zip(again, labels))
    assert run(model, [], 2, 5) == ([], []) and run(model, sequences[-1:], 2, 5) == ([], [])


def test_run_carries_the_state_and_starts_each_sequence_afresh():
    model, sequence = small_detector(), MemorySequence("a", 20, (3, 19))
    twin = MemorySequence("b", 3, (2,))  # after it, sequence a must start from nothing again
    both = run(model, [sequence, twin], 1, 4)[1]
    same_boxes(both[:2], run(model, [sequence], 1, 4)[1])
    with torch.inference_mode():  # the whole sequence at once
        prediction, _ = model(torch.from_numpy(sequence.data[:, None]), None, torch.isin(torch.arange(20), torch.tensor([3, 19]))[:, None])
    same_boxes(both[:2], detections(prediction, sequence.timestamps_us[[3, 19]]))
    sequence.data[10] = 9 - sequence.data[10]  # 9 frames before the last label, in another chunk
    changed = run(model, [sequence], 1, 4)[1]
    same_boxes(changed[:1], both[:1])
    assert len(changed[1]) != len(both[1]) or np.abs(changed[1]["x"] - both[1]["x"]).max() > 1e-4


def test_run_starts_T_minus_1_frames_before_the_first_label():
    model, sequence = small_detector(), MemorySequence("a", 12, (8,))
    want = run(model, [sequence], 1, 3)[1]
    sequence.data[:6] = 0
    same_boxes(run(model, [sequence], 1, 3)[1], want, 0)
    sequence.data[6] = 0
    assert not np.array_equal(run(model, [sequence], 1, 3)[1][0]["x"], want[0]["x"])


def test_run_leaves_the_model_in_its_mode():
    model = small_detector().train()
    statistics = [b.clone() for b in model.buffers()]
    run(model, [MemorySequence("a", 4, (2,))], 1, 2)
    assert model.training and all(torch.equal(a, b) for a, b in zip(statistics, model.buffers()))


def shard(rank, store, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for k, count in enumerate((5, 1)):  # one sequence only: rank 1 has none
        found = run(small_detector(), [MemorySequence(*s) for s in SEQUENCES[:count]], 2, 3)[1]
        np.savez(f"{path}/{rank}{k}.npz", *found)
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(shard, (tmp_path / "store", tmp_path), nprocs=2)
    for k, count in enumerate((5, 1)):
        want = run(small_detector(), [MemorySequence(*s) for s in SEQUENCES[:count]], 2, 3)[1]
        for rank in range(2):
            same_boxes(list(np.load(tmp_path / f"{rank}{k}.npz").values()), want)


@pytest.mark.parametrize("attention", (False, True))
def test_stream_detector_equals_the_chunked_forward_pass(attention):
    model, sequence = small_detector(small_object_attention=attention), MemorySequence("a", 6, range(6))
    want, detector = run(model, [sequence], 1, 6)[1], StreamDetector(model)
    for _ in range(2):
        got = [detector(frame, t) for frame, t in zip(sequence.data, sequence.timestamps_us)]
        same_boxes(got, want)
        assert got[0].dtype == BOX_DTYPE
        detector.reset()
    assert detector(sequence.data[0])["t"][0] == 50_000 and detector(torch.from_numpy(sequence.data[1]))["t"][0] == 100_000
    assert model.heads[0].stem.bn.training is False and not isinstance(model.heads[0].stem.bn, torch.nn.Identity)
    with pytest.raises(ValueError, match=r"a frame of \(20, 32, 64\), expected \(20, 64, 64\)"):
        detector(sequence.data[0, :, :32])
    with pytest.raises(ValueError, match=r"a frame of \(20, 32, 128\)"):  # the same number of values
        detector(sequence.data[0].reshape(20, 32, 128))
    assert detector(sequence.data[1])["t"][0] == 150_000  # the clock did not move meanwhile


def test_stream_detector_in_bfloat16_finds_about_the_same():
    model, sequence = small_detector(hw=(64, 320)), MemorySequence("a", 2, (1,), (64, 320))
    exact, coarse = (StreamDetector(model, dtype)(sequence.data[0]) for dtype in (torch.float32, torch.bfloat16))
    assert abs(len(exact) - len(coarse)) <= 0.1 * len(exact)
    right = [boxes[boxes["x"] > 250] for boxes in (exact, coarse)]  # cells beyond 256 keep their place
    assert len(right[0]) and abs(len(right[0]) - len(right[1])) <= 0.2 * len(right[0])


# ---- report

def some_report(seed=0, **settings):
    labels, dets = random_frames(seed, frames=10)
    labels = [boxes if len(boxes) else some_boxes(0, [(9, 9, 9, 9)]) for boxes in labels]
    dets = [with_level(boxes) for boxes in dets]
    return labels, dets, report(labels, dets, 360, 640, NAMES, strides=(8, 16), split="test", confidence=0.001, nms_iou=0.45,
                                score="cls", **settings)


def with_level(boxes):
    out = np.zeros(len(boxes), evaluation.DETECTION_DTYPE)
    for name in BOX_DTYPE.names:
        out[name] = boxes[name]
    out["confidence"], out["stride"] = boxes["class_confidence"], 8 + 8 * (boxes["class_id"] % 2)
    return out


def test_report_names_every_protocol_and_has_no_zero_for_undefined():
    labels, dets, result = some_report()
    rows = result["rows"]
    for kind in ("all boxes", "Prophesee filter"):
        for protocol in ("class mean", "class-agnostic", *NAMES, "small_classes (pedestrian, bicycle), class mean"):
            assert set(rows[f"{protocol}, {kind}"]) == {"frames", "boxes", *METRICS}
        assert sum(rows[f"{name}, {kind}"]["boxes"] for name in NAMES) == rows[f"class mean, {kind}"]["boxes"]
        pair = [rows[f"{name}, {kind}"]["AP"] for name in ("pedestrian", "bicycle")]
        assert rows[f"small_classes (pedestrian, bicycle), class mean, {kind}"]["AP"] == pytest.approx(np.mean(pair), abs=1e-6)
    fork = rows["eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"]
    assert fork["AP"] == pytest.approx(score_boxes(labels, dets, 360, 640, NAMES, "prophesee", True, range(3))["AP"], abs=1e-6)
    assert {f"detections of stride {s} alone, class mean, all boxes" for s in (8, 16)} <= set(rows)
    assert rows["class mean, Prophesee filter"]["AP_T"] is None  # no tiny box survives the filter
    tiny = result["sizes"]["tiny, < 16x16 px"]
    assert tiny["boxes"] and tiny["Prophesee filter removes"] == 1
    assert result["settings"]["boxes"] == sum(map(len, labels))
    json.dumps(result, allow_nan=False)


def test_report_without_any_label_or_detection():
    result = report([], [], 64, 64, NAMES, strides=(8,))
    assert result["rows"]["class mean, all boxes"]["AP"] is None and result["sizes"]["large, above"]["boxes"] == 0


def test_compare_shows_differences_and_refuses_other_protocols(tmp_path):
    result = some_report()[2]
    better = json.loads(json.dumps(result))
    better["rows"]["class mean, all boxes"]["AP"] += 0.015
    better["settings"]["ckpt"] = "better.pt"
    del better["rows"]["detections of stride 16 alone, class mean, all boxes"]
    val, loose, data = (json.loads(json.dumps(result)) for _ in range(3))
    val["settings"]["split"], loose["settings"]["confidence"] = "val", 0.1
    data["settings"]["labels"] = "another"
    paths = [str(tmp_path / f"{name}.json") for name in ("base", "better", "val", "loose", "data", "broken")]
    for path, content in zip(paths, (result, better, val, loose, data)):
        Path(path).write_text(json.dumps(content))
    text = compare(paths[:2])
    head = text[:text.index(evaluation.HEAD)].splitlines()
    assert head[0] == f"report: {paths[0]}" and head.count("split: test") == 2 and "labels: " + result["settings"]["labels"] in head
    assert head.index("ckpt: better.pt") > head.index(f"report: {paths[1]}")
    start = text.index("class mean, all boxes | " + paths[1])
    assert "+1.5" in text[start:].splitlines()[1] and "difference" in text[start:].splitlines()[1]
    assert f"stride 16 alone, class mean, all boxes | {paths[1]}" not in text
    for path, word in zip(paths[2:5], ("split val, not test", "confidence 0.1, not 0.001", "labels another, not [0-9a-f]+")):
        with pytest.raises(ValueError, match=f"not comparable.*: {word}"):
            compare([paths[0], path])
    Path(paths[5]).write_text('{"settings": {}}')
    for bad in ([paths[0], paths[5]], [paths[0], str(tmp_path / "nowhere.json")], [__file__]):
        with pytest.raises((ValueError, OSError)):
            compare(bad)


def test_confusion_by_hand():
    truth = some_boxes(0, [(0, 0, 20, 20), (50, 0, 20, 20), (100, 0, 20, 20)], [0, 1, 1])
    found = with_level(some_boxes(0, [(0, 0, 20, 20), (51, 0, 20, 20), (50, 1, 20, 20), (0, 50, 9, 9), (100, 0, 20, 20)],
                                  [0, 0, 1, 1, 1], [0.9, 0.8, 0.7, 0.6, 0.1]))
    counts = confusion([truth], [found], 2, 0.3)
    #            as 0, as 1, missed: the second box on a label is one on the background
    assert counts.tolist() == [[[1, 0, 0], [1, 0, 1], [0, 2, 0]]]
    assert (confusion([truth], [found[::-1]], 2, 0.3) == counts).all()  # best first, whatever the order
    none = found[:0], truth[:0]
    assert confusion([truth, none[1]], [none[0], found], 2, 0.3).tolist() == [
        [[0, 0, 1], [0, 0, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [2, 2, 0]]]
    pair = some_boxes(0, [(0, 0, 20, 20), (0, 6, 20, 20)], [0, 1])  # a label that is taken leaves the next best one
    both = with_level(some_boxes(0, [(0, 2, 20, 20), (0, 2, 20, 20)], [0, 0], [0.9, 0.8]))
    assert confusion([pair], [both], 2, 0.3).tolist() == [[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]


def test_pictures_of_frames_with_detections(tmp_path):
    sequence = MemorySequence("a", 4, (0, 2, 3))  # fewer frames than places
    found = [with_level(boxes) for boxes in sequence.boxes]  # confidence 1: all of them are drawn
    result = report(sequence.boxes, found, 64, 64, NAMES)
    evaluation.pictures(tmp_path / "report.png", result, [sequence], sequence.boxes, found, NAMES)
    assert (tmp_path / "report.png").stat().st_size > 10_000


# ---- scripts

def test_eval_from_a_checkpoint_alone(tmp_path, capsys):
    data = write_prepared(tmp_path / "data")
    (tmp_path / "run").mkdir()
    ckpt = write_checkpoint(tmp_path / "run" / "ckpt.pt", small_detector(), data_dir=str(data), class_names=NAMES,
                            num_classes=4, sequence_length=3, eval_batch_size=2, num_workers=0)
    evaluation.main([f"--ckpt={ckpt}", "--device=cpu"])
    text, written = capsys.readouterr().out, sorted(p.name for p in (tmp_path / "run" / "eval").iterdir())
    assert written == ["report.json", "report.png"]
    result = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())
    assert result["rows"]["class mean, all boxes"]["frames"] == 6 and result["settings"]["boxes"] == 12 and result["settings"]["split"] == "test"
    speed = result["settings"]["speed"]
    assert speed["ms_median"] > 0 and "CPU" in speed["device"]
    assert speed["frames_per_s"] == pytest.approx(1000 / speed["ms_median"], abs=0.06)
    assert all(protocol in text for protocol in result["rows"])
    evaluation.main([f"--ckpt={ckpt}", "--device=cpu", f"--json={tmp_path / 'lr0.1'}", "--score=obj*cls", "--num_classes", "4"])
    assert (tmp_path / "lr0.1.png").exists() and json.loads((tmp_path / "lr0.1.json").read_text())["settings"]["score"] == "obj*cls"
    with pytest.raises(ValueError, match=r"score obj\*cls, not cls"):
        evaluation.main(["--compare", str(tmp_path / "run/eval/report.json"), str(tmp_path / "lr0.1.json")])
    other = write_prepared(tmp_path / "three", classes=NAMES[:3])
    with pytest.raises(ValueError, match="3 class_names, num_classes=4"):
        evaluation.main([f"--ckpt={ckpt}", f"--data_dir={other}"])
    with pytest.raises(ValueError, match="ckpt.pt is for 4 classes"):
        evaluation.main([f"--ckpt={ckpt}", f"--data_dir={write_prepared(tmp_path / 'turned', classes=NAMES[::-1])}"])
    for option in ("--score=objectness", "--dtype=int8", "--confidence=-1"):
        with pytest.raises(ValueError, match=option[2:].split("=")[0]):
            evaluation.main([f"--ckpt={ckpt}", option])
    for words, message in ((["--ckpt=nowhere.pt"], "nowhere.pt: no such"), ([f"--ckpt={data / 'dataset.json'}"], "not a checkpoint"),
                           ([f"--ckpt={ckpt}", "--spilt=val"], "did you mean split"), ([f"--ckpt={ckpt}", "--split=val"], "val")):
        with pytest.raises(ValueError, match=message):
            evaluation.main(words)


def test_eval_on_frames_of_another_size_than_trained_on(tmp_path):
    data = write_prepared(tmp_path / "data", hw=(48, 96))
    write_checkpoint(tmp_path / "ckpt.pt", small_detector(), data_dir=str(data), eval_batch_size=2, num_workers=0)
    evaluation.main([f"--ckpt={tmp_path / 'ckpt.pt'}", "--device=cpu", f"--out_dir={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out/eval/report.json").read_text())["settings"]["resolution"] == [48, 96]


def test_eval_of_rvts_own_checkpoint(tmp_path):
    if not (SHARED / "reference/rvt_tiny.pt").exists():
        pytest.skip("../shared/reference is absent")
    reference = torch.load(SHARED / "reference/rvt_tiny.pt", weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    write_prepared(tmp_path / "data", ("a",), hw=(128, 160), length=3, labelled=(1, 2), classes=[str(i) for i in range(8)])
    config = tmp_path / "config.py"
    config.write_text("partition_split = 1\ndim_head = 32\nsequence_length = 2\nmax_steps = 7\n")
    evaluation.main([f"--ckpt={tmp_path / 'rvt.ckpt'}", str(config), f"--data_dir={tmp_path / 'data'}", "--device=cpu", "--num_workers=0"])
    assert (tmp_path / "eval" / "report.json").exists()
    model = load_detector(tmp_path / "rvt.ckpt", (128, 160), partition_split=1)
    prediction, _ = model.eval()(reference["events"], None, torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]]).bool())
    want = reference["prediction"]
    torch.testing.assert_close(prediction.box_cxcywh, want[..., :4], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(prediction.cls.sigmoid(), want[..., 5:], rtol=1e-4, atol=1e-4)


# ---- demo

@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt.pt", small_detector(), class_names=NAMES)


def test_demo_writes_video_and_boxes(tmp_path, checkpoint, capsys):
    from PIL import Image
    recording = write_recording(tmp_path / "drive_td.h5")
    demo.main([f"--ckpt={checkpoint}", f"--recording={recording}", f"--out={tmp_path / 'new' / 'd.gif'}", f"--boxes={tmp_path / 'd.npy'}",
               "--confidence=0.01", "--device=cpu"])
    boxes = np.load(tmp_path / "d.npy")
    with Image.open(tmp_path / "new" / "d.gif") as gif:
        assert gif.n_frames == 10 and gif.size == (512, 512) and gif.info["duration"] == 50
    assert boxes.dtype == BOX_DTYPE and len(boxes) and (np.diff(boxes["t"]) >= 0).all()
    assert len(np.unique(boxes["t"])) == 10 and np.ptp(boxes["t"]) == 450_000 and boxes["class_confidence"].min() >= 0.01
    assert "ms a frame" in capsys.readouterr().out
    assert not list(tmp_path.rglob(".partial*"))
    for option in ("--class_names=a,b", "--dtype=int8"):
        with pytest.raises(ValueError, match=option[2:].split("=")[0]):
            demo.main([f"--ckpt={checkpoint}", f"--recording={recording}", f"--out={tmp_path / 'e.gif'}", "--device=cpu", option])


def test_demo_of_a_prepared_sequence_and_of_mp4(tmp_path, checkpoint):
    pytest.importorskip("imageio_ffmpeg")
    data = write_prepared(tmp_path / "data", ("a",))
    demo.main([f"--ckpt={checkpoint}", f"--recording={data / 'test' / 'a'}", f"--out={tmp_path / 'a.mp4'}", f"--boxes={tmp_path / 'a.npy'}",
               "--confidence=0.01", "--device=cpu"])
    want = StreamDetector(load_detector(checkpoint), confidence=0.01, score="obj*cls")
    sequence = MemorySequence("a", 8, (2, 5, 7))
    same_boxes([np.load(tmp_path / "a.npy")], [np.concatenate([want(*pair) for pair in zip(sequence.data, sequence.timestamps_us)])])
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_demo_reads_a_sensor_of_twice_the_size_at_half_resolution_and_others_as_they_are(tmp_path):
    for hw, want in (((128, 128), (64, 64)), ((64, 64), (64, 64)), ((48, 80), (48, 80))):
        size, scale, _, frames = demo.open_frames(write_recording(tmp_path / f"{hw[0]}.h5", hw, 0.1), (64, 64))
        frames = list(frames)
        assert size == want and scale * want[0] == hw[0] and frames[0][1].shape == (20, *want) and frames[1][0] - frames[0][0] == 50_000


def test_demo_leaves_nothing_behind_a_bad_recording(tmp_path, checkpoint):
    whole = write_recording(tmp_path / "whole.h5", events=200_000)
    cut, empty, text = tmp_path / "cut.h5", write_recording(tmp_path / "empty.h5", events=0), tmp_path / "notes.txt"
    cut.write_bytes(whole.read_bytes()[:100_000])
    text.write_text("hello")
    for path in (cut, empty, text, tmp_path / "nowhere.h5", tmp_path / "nowhere"):
        with pytest.raises((ValueError, OSError), match=path.name):
            demo.main([f"--ckpt={checkpoint}", f"--recording={path}", f"--out={tmp_path / 'out.gif'}", f"--boxes={tmp_path / 'b.npy'}"])
    assert {p.name for p in tmp_path.iterdir()} == {"whole.h5", "cut.h5", "empty.h5", "notes.txt", "ckpt.pt"}
    for words in ([], ["--recording=x.h5", "--out=x.avi"]):
        with pytest.raises(ValueError, match="expected --recording"):
            demo.main([f"--ckpt={checkpoint}", *words])


def test_frames_are_drawn_with_their_polarities_boxes_and_labels():
    events = np.zeros((20, 48, 480), np.uint8)
    events[0, 40, 5], events[15, 40, 6] = 9, 9
    image = np.asarray(demo.draw(events, some_boxes(0, [(200, 20, 30, 15)], 1, 0.5), NAMES, some_boxes(0, [(300, 20, 30, 15)])))
    assert image.shape == (48, 480, 3)
    assert image[40, 5, 2] > image[40, 5, 0] and image[40, 6, 0] > image[40, 6, 2]  # blue is negative, orange positive
    assert (image[20, 310] == 255).all() and (image[35, 210] != demo.BACKGROUND).any()


# ==== damaged files: each ends in success or in one line that names it

FUZZ = int(os.environ.get("FUZZ", 1))  # so many times the cases
EXTREMES = 0, 1, -1, 255, 2**31 - 1, 2**63 - 1, -2**63


def damaged(rng, content, others):
    """`content` with bits flipped, cut, with two stretches swapped, 8 bytes of extremes, emptied, or one of `others`."""
    damage, kind = bytearray(content), rng.integers(6)
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
    """Write the files, run action() -> "fine", "refused" (ValueError or OSError, one line with `name`) or what is wrong."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    signal.alarm(30)  # a hang ends the process
    said = "fine"
    try:
        action()
    except Exception as error:
        named = isinstance(error, (ValueError, OSError)) and str(name) in str(error) and "\n" not in str(error)
        said = "refused" if named else traceback.format_exc()
    signal.alarm(0)
    changed = [str(path) for path, content in files.items() if path.read_bytes() != content]
    return f"changed: {changed}" if changed else said


def survive(cases, least=10):
    """Every case, (what, name, files, action) for `attempt`, is fine or refused, and `least` of the cases are of either.

    One child process runs them all, so that a crash of the interpreter shows as the case that it happened in.
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
    found, what = {"fine": 0, "refused": 0}, ""
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


def test_damaged_prepared_sequences_are_named(tmp_path):
    rng, whole = np.random.default_rng(0), tmp_path / "whole"
    write_sequence(whole, {2: [BOX], 5: [BOX, BOX], 6: [BOX]}, 8, seed=1)
    contents = {path.relative_to(whole): path.read_bytes() for path in sorted(whole.rglob("*.*"))}

    def read(root):
        train = plan(open_split(root, "train", num_classes=8), batch_size=1)
        for k in range(train.steps_per_epoch):
            augment(*train[k][:3])

    def cases():
        for case in range(120 * FUZZ):
            root, name = tmp_path / str(case), list(contents)[case % len(contents)]
            changed = contents | {name: damaged(rng, contents[name], list(contents.values()))}
            yield (f"case {case}, {name}", root / "train", {root / "train" / "s" / file: content for file, content in
                   changed.items()}, lambda: read(root))

    survive(cases())


def raw_recordings(folder):
    """{name: content} of the same small recording in several formats: HDF5 (Blosc), DAT and, by faery, EVT2 and EVT3."""
    folder.mkdir()
    t, x, y, p = some_events(3000, 700_000)
    with h5py.File(folder / "a_td.h5", "w") as file:
        for key, column, kind in (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "u1")):
            file.create_dataset(f"events/{key}", data=column.astype(kind), chunks=(1000,), **hdf5plugin.Blosc(cname="zstd"))
        file["events/height"], file["events/width"] = 48, 64
    records = np.empty(len(t), [("t", "<u4"), ("xyp", "<u4")])
    records["t"], records["xyp"] = t, x | y << 14 | p << 28
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
    key, events = rng.choice(list("txyp")), file["events"]
    column, kind = events[key][()], rng.integers(9)
    odd = (column.astype(str).astype("S8"), column.astype("f8") * np.nan, -column.astype("i8"), column.astype("?"),
           column[:100], np.stack([column] * 2, 1), column[0], column[:, None], np.full(3000, rng.choice(EXTREMES)))[kind]
    if rng.random() < 0.2:
        file.attrs["height"] = events.attrs["width"] = rng.choice([0, -5, 2**40, 1 << 13])
    elif rng.random() < 0.2:
        del events["height"]
        events["height"] = (np.float32(np.nan), "48", [48, 48], [48])[rng.integers(4)]
    else:
        del events[key]
        if rng.random() < 0.9:
            events[key] = odd


def prepare_anew(src, **options):
    prepare.prepare(src, src.with_name("out"), **options)


def test_damaged_recordings_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    rng, contents, labels = np.random.default_rng(1), raw_recordings(tmp_path / "whole"), tmp_path / "a_bbox.npy"
    np.save(labels, some_labels([100_000, 200_000, 600_000]))
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        chunks = [file["events"][key].id.get_chunk_info(k).byte_offset for key in "txyp" for k in range(3)]

    def read(path):
        for _ in prepare.windows(prepare.Recording(path, 48, 64)):
            pass

    def cases():
        for case in range(160 * FUZZ):
            name = [*contents, "a_td.h5"][case % (len(contents) + 1)]
            path, content = tmp_path / str(case) / "raw" / "train" / name, contents[name]
            if name.endswith("h5") and case % 4 == 1:  # in the header of a chunk, or behind it
                at = chunks[rng.integers(len(chunks))] + int(rng.integers(40))
                content = content[:at] + rng.bytes(4) + content[at + 4:]
            elif name.endswith("h5") and case % 4 == 0:
                with h5py.File(io := BytesIO(content), "a") as file:
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
    boxes, name, kind = boxes.copy(), rng.choice(boxes.dtype.names), rng.integers(4)
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
    rng, boxes = np.random.default_rng(2), some_labels([100_000, 200_000, 300_000, 600_000])
    recording = raw_recordings(tmp_path / "whole")["a_td.dat"]
    np.save(tmp_path / "a.npy", boxes)
    whole = (tmp_path / "a.npy").read_bytes()

    def cases():
        for case in range(120 * FUZZ):
            src = tmp_path / str(case) / "raw"
            if case % 2:
                np.save(tmp_path / "a.npy", other_labels(rng, boxes))
            content = (tmp_path / "a.npy").read_bytes() if case % 2 else damaged(rng, whole, [recording])
            options = dict(dataset=rng.choice(list(prepare.DATASETS)), class_names=[(), ("a", "b")][rng.integers(2)])
            files = {src / "train" / "a_td.dat": recording, src / "train" / "a_bbox.npy": content}
            yield f"case {case}", src / "train" / "a_", files, lambda: prepare_anew(src, **options)

    survive(cases())


def changed(rng, whole, path):
    """What was done to the nested dict `whole`, saved at `path`: one thing in it is gone, swapped, or of another kind."""
    found = place = copy.deepcopy(whole)
    while True:
        key = list(place if isinstance(place, dict) else range(len(place)))[rng.integers(len(place))]
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    value, kind = place.pop(key), rng.integers(4)
    if kind == 1 and place:
        other = list(place)[rng.integers(len(place))] if isinstance(place, dict) else 0
        value, place[other] = place[other], value
    odd = [None, "word", -1, 0, 2**62, math.nan, [], {}, torch.zeros(3), (1, 2), Hostile()]
    if torch.is_tensor(value):
        odd += [value[None], value * math.nan, value.to(torch.complex64), value.to_sparse(), value.flatten()[:1], value.bool()]
    if kind:
        new = value if kind == 1 else odd[rng.integers(len(odd))]
        place.insert(key, new) if isinstance(place, list) else place.update({key: new})
    torch.save(found, path)
    return f"{key!r}: {str(value)[:40]!r}, {kind}"


def damaged_checkpoints(rng, number, folder, whole, *actions):
    """Cases of damaged bytes and of damaged contents in turn, each for one of the actions(path)."""
    torch.save(whole, folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    for case in range(number * FUZZ):
        what = changed(rng, whole, folder / "changed.pt") if case % 3 else "bytes"
        damage = (folder / "changed.pt").read_bytes() if case % 3 else damaged(rng, content, [b"", content[:999]])
        path, action = folder / str(case) / "ckpt.pt", actions[case % len(actions)]
        yield f"case {case}, {what}", path, {path: damage}, lambda: action(path)


def test_damaged_checkpoints_are_named(tmp_path, traffic, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/whole", "--embed_dim=8", "--fpn_stages=1,2"]
    for name in ("run", "score_boxes", "report", "pictures", "compare"):  # slow
        monkeypatch.setattr(evaluation, name, lambda *a, **k: dict.fromkeys(("AP", "AP50"), 0.5))
    assert run_train(*argv, "--max_steps=1") == 0
    whole = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    monkeypatch.setattr(train, "write", lambda *a: ...)  # so that a run that goes on leaves its checkpoint as it was

    def evaluate(path):
        evaluation.main(["--ckpt", str(path), f"--data_dir={traffic}", "--num_workers=0", f"--out_dir={path.parent}/a"])

    def resume(path):
        run_train(f"--out_dir={path.parent}", f"--data_dir={traffic}", "--init_from=resume", "--max_steps=2", *TINY[-3:])

    survive(damaged_checkpoints(np.random.default_rng(3), 120, tmp_path, whole, resume, load_detector, evaluate))


def test_damaged_rvt_checkpoints_are_named(tmp_path):
    weights = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]["state_dict"]
    survive(damaged_checkpoints(np.random.default_rng(4), 40, tmp_path, {"state_dict": weights, "epoch": 3},
                                lambda path: load_detector(path, (128, 160), 1)))


# ==== twenty thousand frames in constant memory

def resident_mb():
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soaked(frames, step):
    """Call step(k) `frames` times; the memory must not grow by 20 MB after a tenth of them."""
    for k in range(frames):
        step(k)
        if k == frames // 10:
            before = resident_mb()
    print(f"{frames} frames, {before:.1f} MB after a tenth, {resident_mb():.1f} MB at the end")
    assert resident_mb() - before < 20


def soak_detector():
    torch.set_num_threads(1)
    model = small_detector(hw=(32, 64), small_object_attention=True)
    for head in model.heads:
        head.cls_pred.bias.data.fill_(0.5)  # boxes with p_obj * p_cls of some 0.4
    return model


@soak
def test_twenty_thousand_frames_of_a_live_stream_take_constant_memory():
    detector, events = StreamDetector(soak_detector(), confidence=0.3), random_events(50, 20, 32, 64)
    soaked(20_000, lambda k: detector(events[k % 50]))


@soak
def test_twenty_thousand_frames_of_evaluation_take_constant_memory():
    class Endless(MemorySequence):
        """20,000 frames, a hundred of them labelled, that notes what memory is in use as it is read."""

        def read(self, start, stop, out):
            memory.append(resident_mb())
            out[:] = self.data[start % 50:start % 50 + 1]

    memory, labelled = [], range(199, 20_000, 200)
    sequence = Endless("a", 50, range(0, 50, 5), (32, 64))
    sequence.length, sequence.label_frames = 20_000, np.array(labelled)
    sequence.boxes = [sequence.boxes[k % 10] for k in range(100)]
    labels, found = run(soak_detector(), [sequence], 1, 5, confidence=0.3)
    kept = sum(boxes.nbytes for boxes in found) / 1e6
    print(f"{5 * len(memory)} frames, {memory[len(memory) // 10]:.1f} MB after a tenth, {memory[-1]:.1f} MB at the end, "
          f"{kept:.1f} MB of detections")
    assert len(found) == len(labels) == 100 and memory[-1] - memory[len(memory) // 10] < 20 + kept


# ==== bench_memory.py

BENCH = ["--input_hw=48,64", "--embed_dim=16", "--dim_head=8", "--batch_sizes=1,2", "--steps=1", "--device=cpu"]


@pytest.fixture(scope="module")
def bench_lines():
    import contextlib
    import io
    with contextlib.redirect_stdout(io.StringIO()) as text:
        bench_memory.main(BENCH)
    return text.getvalue().splitlines()


def test_the_last_line_is_json_with_a_row_for_each_batch_size_with_and_without_recomputation(bench_lines):
    rows = json.loads(bench_lines[-1])["rows"]
    assert [(row["checkpointing"], row["batch"]) for row in rows] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert all(row["peak_gib"] > 0 and row["spread_s"][0] <= row["step_s"] <= row["spread_s"][1] for row in rows)


def test_recomputation_keeps_fewer_bytes(bench_lines):
    rows = json.loads(bench_lines[-1])["rows"]
    assert rows[2]["kept_gib"] < 0.8 * rows[0]["kept_gib"] and rows[3]["kept_gib"] < 0.8 * rows[1]["kept_gib"]
    assert any(name.startswith("stages") for name in rows[0]["parts"])

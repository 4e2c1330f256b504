"""All tests: plain seeded functions whose names state the fact.

    make test        (or python -m pytest -q test_all.py; with SOAK=1 the long ones too)

Tests that compare with RVT's own outputs or read real recordings need ../shared and skip, saying so, where it is absent.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import configurator
import data
import eval as evaluation
import loss
import model
import prepare
import simulate
import train
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
                          (dict(partition_split=-1), "partition_split")):
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
    only = detection_loss(prediction, targets, aware._replace(terms=("iou",)))
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
    ("fpn_stages = 3", "fpn_stages"), ("out_dir = 3", "out_dir"), ("x = (", "SyntaxError"), ("1 / 0", "ZeroDivision")])
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
def test_each_config_trains_two_steps_and_evaluates_from_its_checkpoint(name, traffic, tmp_path, capsys):
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


RESUMES = {"stream": ("--sampling=stream", "--num_workers=0"),
           "random": ("--sampling=random", "--num_workers=0", "--gradient_accumulation_steps=2"),
           "mixed": ("--sampling=mixed", "--num_workers=2")}


def kill_and_resume(traffic, tmp_path, options, kills, rng):
    argv = [*TINY, *options, f"--data_dir={traffic}", "--max_steps=14", "--eval_interval=7", "--log_interval=2",
            "--checkpoint_interval=1"]
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    resume = []
    for _ in range(kills):
        process = spawn(*argv, f"--out_dir={tmp_path}/broken", *resume)
        ready = (tmp_path / "broken" / "ckpt.pt")
        before = ready.stat().st_mtime if ready.exists() else 0
        while process.poll() is None and not (ready.exists() and ready.stat().st_mtime > before):
            time.sleep(0.01)  # the first step of this life
        time.sleep(rng.random() * 0.8)
        process.kill()
        process.communicate()
        resume = ["--init_from=resume"]
    assert run_train(*argv, f"--out_dir={tmp_path}/broken", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("sampling", RESUMES)
def test_a_killed_run_resumes_as_if_never_stopped(sampling, traffic, tmp_path):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    kill_and_resume(traffic, tmp_path, RESUMES[sampling], 1, np.random.default_rng(len(sampling)))


@soak
def test_fifty_kills_at_random_moments_change_nothing(traffic, tmp_path):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = np.random.default_rng(0)
    for i in range(10):
        options = list(RESUMES.values())[i % 3]
        kill_and_resume(traffic, tmp_path / str(i), options, 5, rng)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=100000", f"--out_dir={tmp_path}", "--log_interval=1",
            "--num_workers=1"]
    process = spawn(*argv, start_new_session=True)
    while process.poll() is None and not ((tmp_path / "log.csv").exists()):
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # Ctrl-C reaches the group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert step >= 1 and f"stopped at step {step}; go on: python train.py --out_dir={tmp_path} --init_from=resume" in output
    assert "Traceback" not in output


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
    argv = [*TINY, f"--data_dir={traffic}", "--patience=0"]
    assert run_train(*argv, "--max_steps=1", f"--out_dir={tmp_path}/one") == 0
    poisoned(traffic, monkeypatch, what, {1})
    assert run_train(*argv, "--max_steps=2", f"--out_dir={tmp_path}/two") == 0
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    assert_same(one["states"], two["states"])
    for key in one["model"]:  # the learning rate of step 0 differs with max_steps, batch-norm statistics do not
        if "running" in key or "num_batches" in key:
            assert torch.equal(one["model"][key], two["model"][key]), key
    assert two["progress"]["bad"] == 1 and all(value.isfinite().all() for value in two["model"].values())
    assert "step 1:" in capsys.readouterr().out


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
        train.main([*argv, "--max_loss_ratio=0.5", "--patience=3"])


@pytest.mark.parametrize("option, word", [
    ("--fpn_stages=2,4", "fpn_stages"), ("--sequence_length=0", "sequence_length"), ("--max_steps=0", "max_steps"),
    ("--class_names=a,b --num_classes=3", "class"), ("--num_classes=3", "num_classes"), ("--data_dir=nowhere", "nowhere"),
    ("--weight_type=cubic", "weight_type"), ("--small_threshold=9999", "small_threshold"), ("--dtype=int8", "dtype"),
    ("--device=cuda:0", "device|CUDA"), ("--init_from=missing.pt", "missing.pt"), ("--learning_rat=1", "learning_rate"),
    ("--size_aware_terms=iou,box", "size_aware_terms"), ("--input_hw=10,10", "input_hw"), ("--sampling=some", "sampling")])
def test_what_cannot_work_fails_before_any_work(option, word, traffic, tmp_path):
    if option.startswith("--device") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match=word) as error:
        train.main([*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/out", "--max_steps=1", *option.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_mistakes_reach_the_user_as_one_line(tmp_path):
    for argv, word in ((["train.py", "--data_dir=nowhere"], "nowhere"), (["train.py", "configs/toi.py"], "configs/toi.py"),
                       (["eval.py", "--ckpt", "nothing.pt"], "nothing.pt")):
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and word in done.stderr and done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1


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
                     "--dim_head=32") == 0
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


def torchrun(*argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29567", *argv],
                          capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)


def test_two_processes_train_evaluate_and_resume(traffic, tmp_path):
    argv = ["train.py", *TINY, f"--data_dir={traffic}", "--max_steps=4", "--checkpoint_interval=2", "--log_interval=1"]
    whole = torchrun(*argv, f"--out_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    first = torchrun(*argv, f"--out_dir={tmp_path}/parts", "--eval_interval=2")
    assert first.returncode == 0, first.stderr
    checkpoint = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    assert len(checkpoint["states"]) == 2 and checkpoint["step"] == 4
    more = torchrun("train.py", f"--out_dir={tmp_path}/whole", "--init_from=resume", "--max_steps=6")
    assert more.returncode == 0, more.stderr
    assert torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)["step"] == 6
    done = torchrun("eval.py", "--ckpt", f"{tmp_path}/whole/ckpt.pt", f"--json={tmp_path}/two.json")
    assert done.returncode == 0, done.stderr

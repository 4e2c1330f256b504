"""The specification as tests, in the order of the files: functions whose names state the fact.

    make test        (or python -m pytest -q test_all.py)

Tests that compare with RVT's outputs or read real recordings need ../shared and skip, saying so,
where it is absent.
"""

import copy
import json
import math
import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from PIL import Image

import ablation
import bench_memory
import configurator
import data
import demo
import detect
import eval as evaluation
import loss
import model
import pictures
import prepare
import simulate
import train
from checkpoint import load_detector, load_weights, our_name
from conftest import (
    BOX,
    CONFIGS,
    GRID_US,
    KEYS,
    NAMES,
    ROOT,
    SMALL_NAMES,
    SMALL_SCENE,
    TINY,
    TWO_BOXES,
    MemorySequence,
    assert_same,
    box_as_rvt,
    checkpoint_of,
    greedy,
    load,
    make_boxes,
    make_set,
    plan,
    pycocotools_scores,
    random_events,
    random_frames,
    random_scene,
    raw_recording,
    raw_set,
    read_events,
    run_demo,
    run_train,
    rvt_checkpoint,
    rvt_detector,
    rvts_rule,
    same_batch,
    same_boxes,
    same_tree,
    sensor_before,
    shared,
    shown,
    simota_by_definition,
    slow_histogram,
    small_detector,
    some_boxes,
    some_events,
    some_labels,
    some_report,
    some_sequences,
    terms_by_definition,
    tiny_detector,
    torchrun,
    train_on,
    train_one_step,
    trained,
    write_checkpoint,
    write_dat,
    write_h5,
    write_prepared,
    write_recording,
    write_sequence,
    write_table,
)
from data import Augmentation, TrainData, View, augment, index_map, move_boxes, open_split
from detect import StreamDetector, detections, nms, prophesee_filter, run, score_boxes
from formats import BOX_DTYPE, histogram
from loss import Assignment, SizeAware, box_iou, detection_loss, focal_loss, size_weights
from model import Detector, ModelConfig, Prediction, reset_state
from prepare import Recording, filter_boxes, label_frames, read_labels, window_ends, windows

# ==== model.py


MODEL_VARIANTS = [
    dict(), dict(patch_size=3, fpn_stages=(1, 2, 3, 4)), dict(patch_size=2, fpn_stages=(1, 2)),
    dict(small_object_attention=True), dict(small_object_attention=True, attention_spatial=False),
    dict(small_object_attention=True, attention_temporal=False)]


@pytest.mark.parametrize("hw, patch, padded, part, strides", [
    ((360, 640), 4, (384, 640), (6, 10), (4, 8, 16, 32)),
    ((360, 640), 2, (384, 640), (6, 10), (2, 4, 8, 16)),
    ((360, 640), 3, (360, 648), (5, 9), (3, 6, 12, 24)),
    ((240, 304), 4, (256, 320), (8, 10), (4, 8, 16, 32))])
def test_model_config_pads_and_partitions_by_rvts_rule(hw, patch, padded, part, strides):
    stages = (1, 2, 3, 4)
    config = ModelConfig(input_hw=hw, patch_size=patch, num_classes=2, fpn_stages=stages).resolved()
    assert (config.padded_hw, config.part, config.strides) == (padded, part, strides)


@pytest.mark.parametrize("changes", [
    dict(), dict(fpn_stages=(1, 2, 3, 4), small_object_attention=True)])
def test_recompute_changes_memory_only(changes):
    inputs = random_events(3, 2, 20, 48, 64), None, None, TWO_BOXES.repeat(6, 1, 1)
    runs = []
    for checkpointing in (False, True):
        detector = tiny_detector(checkpointing=checkpointing, **changes).train()
        forward = train.Forward(detector, SizeAware())
        kept = sum(bench_memory.kept_gib(forward, inputs).values())
        total = forward(*inputs)[0]["loss"]
        total.backward()
        runs.append((kept, total, detector))
    (kept, total, detector), (kept_again, total_again, again) = runs
    assert kept_again < 0.5 * kept
    torch.testing.assert_close(total, total_again)
    for p, q in zip(detector.parameters(), again.parameters()):
        assert float((p.grad - q.grad).norm()) <= 1e-3 * float(p.grad.norm()) + 1e-6
    statistics = list(detector.buffers())  # recomputed, they do not move again
    torch.testing.assert_close(list(again.buffers()), statistics, rtol=1e-4, atol=1e-6)
    assert detector.state_dict().keys() == again.state_dict().keys()


def test_recompute_leaves_a_deep_copy_its_own_weights():
    events = random_events(2, 2, 20, 48, 64)
    detector = tiny_detector(checkpointing=True)
    twin = copy.deepcopy(detector)
    for p in twin.parameters():
        p.data += 0.1
    plain = tiny_detector()
    plain.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(events)[0].cls, plain(events)[0].cls, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(twin(events)[0].cls, detector(events)[0].cls, atol=1e-2)


@pytest.mark.parametrize("mode, want", [
    ("window", {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}),
    ("grid", {(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)})])
def test_partition_attention_joins_neighbours_or_a_grid(mode, want):
    torch.manual_seed(0)
    block = model.PartitionAttention(8, 4, (2, 3), mode).double()
    x = torch.randn(1, 4, 6, 8, dtype=torch.double)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    moved = (block(x) != block(changed)).any(-1)[0].nonzero().tolist()
    assert {tuple(place) for place in moved} == want


def test_lstm_cell_by_hand():
    cell = model.LSTMCell(1)
    # rows: forget, input, output, cell input; columns: x, h
    weight = torch.tensor([[0.1, 0.2], [0.3, -0.4], [0.5, 0.6], [-0.7, 0.8]])
    bias = torch.tensor([0.01, 0.02, 0.03, 0.04])
    cell.load_state_dict({"gates.weight": weight, "gates.bias": bias})
    x, h, c = torch.tensor([2.0, -1.0, 0.5]).view(3, 1, 1, 1, 1)
    h, c = cell(x, h, c)
    forget = 1 / (1 + math.exp(-(0.2 - 0.2 + 0.01)))
    update = 1 / (1 + math.exp(-(0.6 + 0.4 + 0.02)))
    output = 1 / (1 + math.exp(-(1.0 - 0.6 + 0.03)))
    want = forget * 0.5 + update * math.tanh(-1.4 - 0.8 + 0.04)
    assert c.item() == pytest.approx(want, rel=1e-5)
    assert h.item() == pytest.approx(output * math.tanh(want), rel=1e-5)


def test_multi_scale_spatial_attention_adds_at_most_its_input():
    x = torch.rand(2, 12, 8, 8)
    y = model.MultiScaleSpatialAttention(12)(x)
    assert bool(((y > x) & (y <= 2 * x)).all())


def test_event_temporal_attention_is_causal():
    module = model.EventTemporalAttention(8).eval()
    x = torch.rand(8, 8, 6, 6)  # T = 4, B = 2
    past = torch.zeros(2, 2, 8, 6, 6)
    y, following = module(x, past)
    changed = x.clone()
    changed[4:] += 1
    y_changed, _ = module(changed, past)
    assert torch.equal(y_changed[:4], y[:4])
    assert not torch.equal(y_changed[4:6], y[4:6])
    assert torch.equal(following, x[4:].unflatten(0, (2, 2)).transpose(0, 1))


def test_scale_aware_channel_attention_starts_higher_at_small_strides():
    x = torch.ones(1, 64, 4, 4)
    fine = model.ScaleAwareChannelAttention(64, 8)
    coarse = model.ScaleAwareChannelAttention(64, 16)
    assert (fine.fc[0].out_features, coarse.fc[0].out_features) == (4, 8)
    assert fine(x).mean().item() > coarse(x).mean().item()


def test_attention_off_is_bit_identical_to_no_attention():
    events = random_events(2, 1, 20, 48, 64)
    plain = tiny_detector()
    off = tiny_detector(attention_spatial=False, attention_temporal=False)
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert_same(plain(events)[0], off(events)[0])


@pytest.mark.parametrize("changes", MODEL_VARIANTS)
def test_reset_state_starts_a_row_from_scratch_even_from_nan(changes):
    detector = tiny_detector(**changes)
    events = random_events(4, 2, 20, 48, 64)
    with torch.no_grad():
        _, state = detector(events[:2])
        for s in state:
            s[1] = math.nan
        state = reset_state(state, torch.tensor([False, True]))
        start = [s.clone() for s in state]
        for s in start:
            s[1] = 0
        prediction, after = detector(events[2:], state)
        fresh, fresh_after = detector(events[2:], start)
    assert_same((*prediction, *after), (*fresh, *fresh_after))
    assert all(float(s[1].abs().sum()) == 0 for s in state)
    assert any(float(s[0].abs().sum()) > 0 for s in state)


def test_detector_gives_rvts_predictions(tmp_path):
    reference, detector = rvt_detector(tmp_path)
    config = detector.eval().config
    assert (config.fpn_depth, config.embed_dim, config.patch_size) == (0.33, 32, 4)
    assert sum(p.numel() for p in detector.parameters()) == reference["params"]
    state = None
    out = []
    for t, events in enumerate(reference["events"]):
        with torch.no_grad():
            prediction, state = detector(events[None], state)
        means = [float(h.abs().mean()) for h in state[::2]]
        assert means == pytest.approx(list(reference["hidden_mean_abs"][t]), rel=1e-4)
        obj = prediction.obj.sigmoid()[..., None]
        out.append(torch.cat((prediction.box_cxcywh, obj, prediction.cls.sigmoid()), dim=-1))
    got = torch.stack([out[t][b] for t, b in reference["labelled_tb"]])
    torch.testing.assert_close(got, reference["prediction"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_detector_gives_rvts_losses_and_gradients(tmp_path, checkpointing):
    reference, detector = rvt_detector(tmp_path, checkpointing=checkpointing)
    frames = torch.zeros(4, 2, dtype=torch.bool)
    for t, b in reference["labelled_tb"]:
        frames[t, b] = True
    prediction, _ = detector.train()(reference["events"], None, frames)
    losses = detection_loss(prediction, reference["labels"])
    names = dict(loss="loss", iou="iou_loss", obj="conf_loss", cls="cls_loss", num_fg="num_fg")
    for ours, rvts in names.items():
        assert losses[ours].item() == pytest.approx(reference["train"][rvts], rel=1e-3)
    losses["loss"].backward()
    gradients = {name: float(p.grad.norm()) for name, p in detector.named_parameters()}
    for name, norm in reference["grad_norm"].items():
        name = our_name(name.removeprefix("mdl."))
        assert gradients.pop(name) == pytest.approx(norm, rel=1e-3), name
    assert not gradients


def test_detector_of_rvt_b_has_its_published_size():
    detector = Detector(ModelConfig(input_hw=(360, 640), num_classes=8))
    millions = sum(p.numel() for p in detector.parameters()) / 1e6
    assert millions == pytest.approx(18.54, abs=0.005)


@pytest.mark.parametrize("patch", [2, 3, 4])
@pytest.mark.parametrize("stages, hw", [
    ((1, 2), (37, 50)), ((2, 3), (61, 33)), ((2, 3, 4), (90, 70)), ((1, 2, 3, 4), (45, 80))])
def test_detector_takes_every_patch_size_and_pyramid_at_odd_sizes(patch, stages, hw):
    detector = tiny_detector(input_hw=hw, patch_size=patch, fpn_stages=stages)
    prediction, state = detector(random_events(1, 2, 20, *hw))
    H, W = detector.config.padded_hw
    strides = tuple(patch * 2 ** (k - 1) for k in stages)
    A = sum((H // stride) * (W // stride) for stride in strides)
    assert detector.config.strides == strides
    assert prediction.box_cxcywh.shape == (2, A, 4) and prediction.cls.shape == (2, A, 3)
    assert len(state) == 2 * stages[-1] and all(len(s) == 2 for s in state)


@pytest.mark.parametrize("changes", MODEL_VARIANTS)
def test_detector_frame_by_frame_equals_chunks(changes):
    detector = tiny_detector(**changes)
    events = random_events(5, 2, 20, 48, 64)
    with torch.no_grad():
        whole, last = detector(events)
        state = None
        parts = []
        for chunk in (events[:1], events[1:4], events[4:]):
            prediction, state = detector(chunk, state)
            parts.append(prediction)
    joined = [torch.cat(fields) for fields in zip(*parts)]
    torch.testing.assert_close(joined[:3], whole[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", MODEL_VARIANTS)
def test_detector_streams_do_not_see_each_other(changes):
    detector = tiny_detector(**changes)
    events = random_events(3, 3, 20, 48, 64)
    order = torch.tensor([2, 0, 1])
    other = events.clone()
    other[:, [0, 2]] = random_events(3, 2, 20, 48, 64, seed=1)

    @torch.no_grad()
    def by_stream(events):  # (B, ...) each
        prediction, state = detector(events)
        return [x.unflatten(0, (3, -1)).transpose(0, 1) for x in prediction[:3]] + [*state]

    whole = by_stream(events)
    permuted = [x[order] for x in whole]
    torch.testing.assert_close(by_stream(events[:, order]), permuted, rtol=1e-4, atol=1e-5)
    alone = [x[1:2] for x in whole]
    torch.testing.assert_close(by_stream(events[:, 1:2]), alone, rtol=1e-4, atol=1e-5)
    beside = [x[1:2] for x in by_stream(other)]
    assert_same(beside, alone)  # to the bit, as the shapes are the same


def test_detector_on_chosen_frames_equals_that_on_all():
    detector = tiny_detector()
    events = random_events(4, 2, 20, 48, 64)
    frames = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]], dtype=torch.bool)
    with torch.no_grad():
        every, state = detector(events)
        some, same = detector(events, None, frames)
    chosen = every.box_cxcywh[[1, 4, 5]]
    torch.testing.assert_close(some.box_cxcywh, chosen, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(state, same))


@pytest.mark.parametrize("changes", MODEL_VARIANTS)
def test_detector_gives_every_parameter_a_gradient(changes):
    detector = tiny_detector(embed_dim=64, **changes).train()
    prediction, _ = detector(random_events(3, 2, 20, 48, 64))
    sum(field.square().sum() for field in prediction[:3]).backward()
    for name, p in detector.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_detector_decodes_boxes_by_hand():
    detector = tiny_detector()
    for head in detector.heads:
        for pred in (head.reg_pred, head.obj_pred, head.cls_pred):
            torch.nn.init.zeros_(pred.weight)
        head.reg_pred.bias.data = torch.tensor([0.25, -0.5, math.log(2), math.log(3)])
    prediction, _ = detector(random_events(1, 1, 20, 48, 64))
    fine = 8 * 8  # 48x64 is padded to 64x64; strides 8, 16, 32
    assert prediction.box_cxcywh.shape == (1, fine + 4 * 4 + 2 * 2, 4)
    assert prediction.grid[fine + 5].tolist() == [1, 1, 16]
    want = torch.tensor([20.0, 8.0, 32.0, 48.0])
    torch.testing.assert_close(prediction.box_cxcywh[0, fine + 5], want)
    assert prediction.obj[0, 0].sigmoid().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("changes", [
    dict(), dict(small_object_attention=True, checkpointing=True)])
def test_detector_and_loss_compile_to_one_graph_for_any_number_of_frames(changes):
    torch._dynamo.reset()
    detector = tiny_detector(fpn_stages=(1, 2), **changes).train()
    twin = copy.deepcopy(detector)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    events = random_events(2, 2, 20, 48, 64)
    state = detector.initial_state(2)
    size_aware = SizeAware(True, 2.0, 256, 1024, "exponential", ("iou", "cls"))

    def step(detector, index, targets):
        prediction, _ = detector(events, state, index)
        return detection_loss(prediction, targets, size_aware)["loss"]

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for N, M in ((2, 16), (4, 16), (3, 32)):
        index = torch.randperm(4)[:N].sort().values
        targets = torch.cat((TWO_BOXES.repeat(N, 1, 1), torch.zeros(N, M - 2, 5)), dim=1)
        for tensor, axis in ((index, 0), (targets, 0), (targets, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        want = step(detector, index, targets)
        got = compiled(twin, index, targets)
        torch.testing.assert_close(got, want)
        (got + want).backward()
    assert counter.frame_count == 1
    gradients = [p.grad for p in detector.parameters()]
    again = [p.grad for p in twin.parameters()]
    torch.testing.assert_close(again, gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(list(twin.buffers()), list(detector.buffers()))


def test_detector_with_its_state_runs_in_onnxruntime_over_a_stream(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"export to ONNX needs pip install {package}")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install onnxruntime")
    detector = tiny_detector(fpn_stages=(1, 2), small_object_attention=True)

    # the lines of the README
    frame = torch.zeros(1, 1, 20, *detector.config.input_hw, dtype=torch.uint8)  # T = B = 1
    state = detector.initial_state(1)
    names = [f"state{k}" for k in range(len(state))]
    inputs = ["frame", *names]
    outputs = ["box_cxcywh", "obj", "cls", "grid"] + [f"next_{name}" for name in names]
    path = tmp_path / "detector.onnx"
    torch.onnx.export(detector, (frame, state), path, input_names=inputs, output_names=outputs,
                      dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    state = [s.numpy() for s in state]

    torch_state = None
    for seed in range(4):
        frame = random_events(1, 1, 20, 48, 64, seed=seed)
        box, obj, cls, grid, *state = session.run(None, dict(zip(inputs, [frame.numpy(), *state])))
        with torch.no_grad():
            prediction, torch_state = detector(frame, torch_state)
        got = [torch.from_numpy(x) for x in (box, obj, cls, grid, *state)]
        torch.testing.assert_close(got, [*prediction, *torch_state], rtol=1e-4, atol=1e-4)


# ---- changes in one place


@pytest.mark.parametrize("checkpointing", [False, True])
def test_change_of_the_cell_to_a_gru_with_one_state(monkeypatch, checkpointing):
    class GRUCell(torch.nn.Module):
        states = 1

        def __init__(self, dim):
            super().__init__()
            self.gates = torch.nn.Linear(2 * dim, 2 * dim)
            self.new = torch.nn.Linear(2 * dim, dim)

        def forward(self, x, h):
            keep, reset = self.gates(torch.cat((x, h), dim=-1)).sigmoid().chunk(2, dim=-1)
            new = self.new(torch.cat((x, reset * h), dim=-1)).tanh()
            return (keep * h + (1 - keep) * new,)

    monkeypatch.setattr(model, "LSTMCell", GRUCell)
    detector = tiny_detector(small_object_attention=True, checkpointing=checkpointing)
    state = train_one_step(detector)
    assert len(state) == len(detector.stages) + 2  # and the attention's pasts on two levels
    assert [s.shape for s in state] == [s.shape for s in detector.initial_state(2)]


def test_change_of_the_pyramid_to_a_plain_fpn(monkeypatch):
    class FPN(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            pairs = zip(config.dims, config.dims[1:])
            self.lateral = torch.nn.ModuleList(model.Conv(coarse, fine) for fine, coarse in pairs)

        def forward(self, features):
            for i in reversed(range(len(self.lateral))):
                coarse = F.interpolate(self.lateral[i](features[i + 1]), scale_factor=2)
                features[i] = features[i] + coarse
            return features

    monkeypatch.setattr(model, "PAFPN", FPN)
    detector = tiny_detector(fpn_stages=(1, 2, 3))
    train_one_step(detector)
    assert isinstance(detector.fpn, FPN)


# ==== checkpoint.py


def test_load_weights_starts_class_layers_from_scratch_where_asked(capsys):
    weights = tiny_detector(num_classes=3).state_dict()
    fresh = tiny_detector(num_classes=5).state_dict()
    detector = load_weights(tiny_detector(num_classes=5), weights, "a.pt", new_classes=True)
    said = capsys.readouterr().out
    assert said.startswith("a.pt: the class layers start from scratch: heads.0.cls_pred.")
    assert said.count("\n") == 1
    for name, x in detector.state_dict().items():
        source = fresh if ".cls_pred." in name else weights
        assert torch.equal(x, source[name]), name
    load_weights(tiny_detector(num_classes=3), weights, "a.pt", new_classes=True)
    assert capsys.readouterr().out == ""


def test_load_detector_takes_frames_of_another_size(tmp_path):
    detector = tiny_detector()
    path = write_checkpoint(tmp_path / "a.pt", detector)
    assert load_detector(path).config == detector.config
    other = load_detector(path, input_hw=(384, 640))
    assert other.config.input_hw == (384, 640)
    assert other.config.partition_split == 2  # chosen for the new size
    assert torch.equal(other.stages[0].conv.weight, detector.stages[0].conv.weight)


# ==== loss.py


def test_size_weights_by_hand():
    area = torch.tensor([256.0, 1024.0, 4096.0])
    got = size_weights(area, "exponential", 2.5, 1024, 9216).tolist()
    assert got == pytest.approx([2.5 * math.exp(-0.25), 1, 1], rel=1e-6)
    assert got[0] == pytest.approx(1.947, abs=5e-4)
    area = torch.tensor([512.0, 1024.0, 5120.0, 9216.0, 20000.0])
    assert size_weights(area, "linear", 2.5, 1024, 9216).tolist() == [2.5, 2.5, 1.75, 1, 1]
    area = torch.tensor([512.0, 1024.0, 1025.0, 9216.0, 9217.0])
    assert size_weights(area, "step", 2.5, 1024, 9216).tolist() == [2.5, 2.5, 1.75, 1.75, 1]
    assert size_weights(area[:0], "exponential", 2.5, 1024, 9216).shape == (0,)
    below, at = size_weights(torch.tensor([26.0**2, 27.0**2]), "exponential", 2.0, 1024, 9216)
    assert below > 1  # a weight of 2 acts below 27x27
    assert at == 1


def test_size_weights_of_ones_own_train(traffic, tmp_path, monkeypatch):
    def inverse(area, kind, weight, small, medium):
        return 1 + (weight - 1) * small / (small + area)

    monkeypatch.setattr(loss, "size_weights", inverse)
    trained(traffic, tmp_path, "--max_steps=1", "--size_aware_loss=True", "--weight_type=inverse")


def test_box_iou_by_hand():
    one = torch.tensor([10.0, 10, 4, 4])
    others = torch.tensor([[10.0, 10, 4, 4], [12, 10, 4, 4], [12, 12, 4, 4], [30, 10, 4, 4]])
    assert box_iou(one, others).tolist() == pytest.approx([1, 8 / 24, 4 / 28, 0])
    assert box_iou(torch.zeros(4), torch.zeros(4)) == 0


PAD, ANY = [0.0] * 5, [math.nan] * 5
FRAMES = [
    [[0, 16, 24, 20, 12], [1, 16, 24, 10, 30], [2, 40, 32, 8, 8], [1, 90, 60, 30, 30]],  # borders
    [[2, -3, 10, 20, 20], [0, 95, 63, 12, 12], [1, 20, 64, 10, 10], PAD],  # outside, padding
    [[1, 33.3, 41.7, 25, 9], PAD, PAD, PAD], [PAD] * 4, [ANY] * 4, [ANY] * 4, [ANY] * 3 + [PAD]]


@pytest.mark.parametrize("strides", [
    (8, 16, 32), (4, 8, 16), (1, 2), (32, 64)])  # few anchors and many; fewer than a box may claim
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("targets", [FRAMES, [[ANY] * (2 * loss.CHUNK + 6)]])
def test_assign_simota_equals_its_slow_definition(targets, seed, strides):
    prediction, targets = random_scene(targets, strides, seed)
    found = loss.assign(prediction, targets)
    for n in range(len(targets)):
        want = simota_by_definition(prediction, targets, n)
        at = found.matched[n].nonzero()[:, 0]
        anchor = found.anchor[n, at].tolist()
        assert sorted(anchor) == sorted(want)
        assert found.box[n, at].tolist() == [want[a][0] for a in anchor]
        iou = [want[a][1] for a in anchor]
        assert found.iou[n, at].tolist() == pytest.approx(iou, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("strides, most", [((8, 16, 32), 126), ((1, 2, 4), 2700 + 1612 + 384 + 94)])
def test_claim_compares_a_chunk_of_boxes_with_9_anchors_a_level_or_all(strides, most, monkeypatch):
    pairs = []

    def counting(target, own, predicted, cost_cls, claim=loss.claim):
        pairs.append((target.shape[1], predicted.shape[1]))
        return claim(target, own, predicted, cost_cls)

    monkeypatch.setattr(loss, "claim", counting)
    loss.assign(*random_scene([[ANY] * 300], strides, 0))
    assert max(pairs) == (loss.CHUNK, most + 1)


def test_assign_over_all_anchors_is_a_change_in_one_place(traffic, tmp_path, monkeypatch):
    @torch.no_grad()
    def best_overlap(prediction, targets):  # each box takes the anchor that overlaps it most
        iou = box_iou(prediction.box_cxcywh[:, :, None], targets[:, None, :, 1:])  # (N, A, M)
        taken = (iou == iou.amax(1, keepdim=True)) & (iou > 0)
        anchor = torch.arange(iou.shape[1]).expand(len(iou), -1)
        return Assignment(anchor, taken.any(2), taken.int().argmax(2), iou.amax(2))

    monkeypatch.setattr(loss, "assign", best_overlap)
    trained(traffic, tmp_path, "--max_steps=1")


def test_focal_loss_by_hand():
    p = torch.tensor([0.9, 0.2])
    got = focal_loss(p.logit(), torch.tensor([1.0, 0.0])).tolist()
    want = [0.25 * 0.01 * -math.log(0.9), 0.75 * 0.04 * -math.log(0.8)]
    assert got == pytest.approx(want, rel=1e-4)


BOTH = SizeAware(True, 2.5, 256, 1024, "exponential", ("iou", "cls"))


@pytest.fixture
def scene():
    boxes = [[[0, 20.0, 20, 12, 14], [2, 44, 30, 20, 9]], [[1, 12, 40, 8, 8], PAD]]
    return random_scene(boxes, (8, 16, 32), 0)


def test_detection_loss_equals_its_formulas_written_out(scene):
    def quality(logits, onehot, overlap):
        return F.binary_cross_entropy_with_logits(logits, onehot * overlap, reduction="none")

    def focal(logits, onehot, overlap):
        return focal_loss(logits, onehot)

    def weight(area):
        return min(max(2.5 * math.exp(-area / 256), 1), 2.5)

    plain = terms_by_definition(*scene, lambda area: 1, quality)
    weighted = terms_by_definition(*scene, weight, focal)
    assert detection_loss(*scene) == plain
    assert detection_loss(*scene, BOTH) == weighted != plain
    got = detection_loss(*scene, SizeAware(True, 2.5, 256, 1024, "exponential", ("iou",)))
    assert got["iou"] == weighted["iou"]
    assert got["cls"] == plain["cls"]


@pytest.mark.parametrize("kind", ["exponential", "linear", "step"])
def test_detection_loss_with_a_weight_of_one_or_switched_off_is_the_plain_one(scene, kind):
    plain = detection_loss(*scene)
    assert detection_loss(*scene, SizeAware(True, 1.0, weight_type=kind)) == plain
    assert detection_loss(*scene, SizeAware(False, 2.0, weight_type=kind)) == plain


@pytest.mark.parametrize("M", [0, 4])
def test_detection_loss_without_boxes_trains_the_objectness_only(scene, M):
    *fields, grid = scene[0]
    prediction = Prediction(*[field.requires_grad_() for field in fields], grid)
    losses = detection_loss(prediction, torch.zeros(2, M, 5), BOTH)
    losses["loss"].backward()
    assert losses["iou"] == losses["cls"] == 0
    assert losses["obj"].isfinite()
    assert losses["num_fg"] == 1
    assert prediction.obj.grad.abs().sum() > 0
    assert prediction.box_cxcywh.grad.abs().sum() == 0


def test_detection_loss_does_not_depend_on_padding_or_the_order_of_frames(scene):
    (*fields, grid), targets = scene
    want = detection_loss(*scene)["loss"]
    padded = F.pad(targets, (0, 0, 0, 15))
    torch.testing.assert_close(detection_loss(scene[0], padded)["loss"], want)
    swapped = Prediction(*[field.flip(0) for field in fields], grid)
    torch.testing.assert_close(detection_loss(swapped, targets.flip(0))["loss"], want)


# ==== data.py


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


def test_sequence_takes_the_half_resolution_file_where_both_are_there(tmp_path):
    write_sequence(tmp_path / "a", {1: [BOX]}, 3, hw=(48, 64), half=False)
    write_sequence(tmp_path / "b", {1: [BOX]}, 3)
    assert data.Sequence(tmp_path / "a").hw == (48, 64)
    half = Path(data.REPRESENTATION, data.FILES["half"])
    (tmp_path / "b" / half).rename(tmp_path / "a" / half)
    assert data.Sequence(tmp_path / "a").hw == (24, 32)


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
        mask = torch.zeros(4, 3, dtype=torch.bool)
        mask.view(-1)[batch.frames] = True
        assert batch.has_boxes and mask.any(0).all()
        for b in range(3):
            sequence, frames = shown(batch, b)
            labelled = toy_set[sequence - 1].label_frames
            assert mask[:, b].tolist() == [frame in labelled for frame in frames]
            played = torch.tensor(frames) >= 0
            assert torch.equal(batch.events[:, b].flatten(1).any(1), played)
            padded += int(not played.all())
        expected = torch.zeros(len(batch.frames), 16, 5)
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


@pytest.mark.parametrize("B, stream, random, want", [
    (2, 1, 1, 1), (4, 1, 1, 2), (4, 9, 1, 3), (5, 1, 20, 1), (6, 1, 2, 2)])
def test_train_data_mixed_holds_streams_and_windows_in_proportion(toy_set, B, stream, random, want):
    train = plan(toy_set, sampling="mixed", batch_size=B, mixed_stream=stream, mixed_random=random)
    firsts = torch.stack([train[step].is_first for step in range(9)])
    assert firsts[:, want:].all() and not firsts[:, :want].all(0).any()


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
    assert batch.frames.tolist() == [0] and torch.equal(batch.targets, torch.zeros(1, 16, 5))
    assert plan(sequences, augmentation=UNMOVED)[0].has_boxes


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
    assert batch.frames[0] == 3 * 2  # of slot 0, the last of 4 frames
    assert train_on(batch)[1]


@pytest.mark.parametrize("workers, start", [(0, 5), (3, 5), (0, 7), (2, 8)])
def test_make_loader_is_the_same_for_any_number_of_workers_and_any_start(toy_set, workers, start):
    train = plan(toy_set, sampling="mixed", batch_size=3)
    loader = data.make_loader(train.__getitem__, range(start, 11), workers)
    for step in range(start, 11):
        got = next(loader)
        assert type(got) is data.Batch
        assert same_batch(got, plan(toy_set, sampling="mixed", batch_size=3)[step])
    assert next(loader, None) is None


def test_to_device_copies_each_batch_beside_the_step_before(monkeypatch):
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append(("copies", "steps")[self is steps] + " wait")

    class Numbered(data.Batch):
        def _make(self, fields):
            log.append(f"copy {self.frames.item()}")
            return super()._make(fields)

    steps = Stream()
    backend = SimpleNamespace(Stream=Stream, stream=nullcontext, current_stream=lambda: steps)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    loader = (Numbered(*torch.full((7, 1), k)) for k in range(3))
    for batch in data.to_device(loader, "cpu"):
        log.append(f"step {batch.frames.item()}")
    assert ", ".join(log) == (
        "copies wait, copy 0, steps wait, copies wait, copy 1, step 0, "
        "steps wait, copies wait, copy 2, step 1, steps wait, step 2")


# ---- inspection


def test_data_main_counts_and_draws_what_a_set_holds(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5]], length=10)
    make_set(tmp_path, [[2]], "val", length=10)
    data.main([str(tmp_path), "--class_names=car,bike", f"--picture={tmp_path}/new/sizes.png"])
    train, boxes, val, _ = capsys.readouterr().out.splitlines()
    assert train == "train: 2 sequences, 3 labelled frames"
    assert boxes.split() == ["3", "boxes", "of", "bike,", "median", "side", "9", "px"]
    assert val == "val: 1 sequences, 1 labelled frames"
    assert min(size_of(tmp_path / "new/sizes.png")) > 300


# ==== train.py


# ---- schedule and configs


@pytest.mark.parametrize("steps", [400, 1000, 100_000])
def test_learning_rate_at_equals_torchs_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-4, total_steps=steps, pct_start=0.005, div_factor=20,
        final_div_factor=10_000 / 20, anneal_strategy="linear", cycle_momentum=False)
    for step in range(min(steps - 1, 2000)):
        want = optimizer.param_groups[0]["lr"]
        assert train.learning_rate_at(step, steps, 2e-4) == pytest.approx(want, rel=1e-6)
        optimizer.step()
        cycle.step()
    assert train.learning_rate_at(steps - 1, steps, 2e-4) == pytest.approx(2e-8)


@pytest.mark.parametrize("steps", [1, 2, 3, 199, 201])
def test_learning_rate_at_works_for_any_number_of_steps(steps):
    rates = [train.learning_rate_at(step, steps, 1.0) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)


# ---- optimiser


@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (40, 8)])  # wide and tall
def test_muon_equals_torchs_on_matrices_and_adamw_on_vectors(shape):
    torch.manual_seed(0)
    ours = [torch.randn(shape), torch.randn(5)]
    matrix, vector = ours[0].flatten(1).clone(), ours[1].clone()
    muon = train.Muon(ours, 0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(  # its steps are 0.2 of the learning rate, taken in bfloat16
        [matrix], 0.1, weight_decay=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([vector], 0.02, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(ours, (matrix, vector)):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.reshape(q.shape)
        for optimizer in (muon, theirs, adamw):
            optimizer.step()
    torch.testing.assert_close(ours[0].flatten(1), matrix, atol=4e-3, rtol=0)
    torch.testing.assert_close(ours[1], vector)


TABLE = {  # patch, stages, weight or None, steps, batch, eval batch, interval, rate
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
    path = str(ROOT / "configs" / f"{name}.py")
    config = configurator.configure(train.defaults, [path])
    weight = config["size_aware_weight"] if config["size_aware_loss"] else None
    assert TABLE[name] == (
        config["patch_size"], config["fpn_stages"], weight, config["max_steps"],
        config["batch_size"], config["eval_batch_size"], config["eval_interval"],
        config["learning_rate"])
    assert (config["sequence_length"], config["sampling"]) == (5, "stream")
    assert config["weight_type"] == "exponential"


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_train_two_steps_and_evaluate_from_their_checkpoint(
        name, traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "draw_report", lambda *a: None)  # slow; tested elsewhere
    file = str(ROOT / "configs" / name)
    argv = [*TINY, "--sequence_length=2", f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(file, *argv, "--max_steps=2") == 0
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["step"] == 2 and checkpoint["config"]["num_classes"] == 8
    written = configurator.configure(train.defaults, [file])
    for key in ("patch_size", "fpn_stages", "size_aware_loss", "size_aware_weight", "sampling"):
        assert checkpoint["config"][key] == written[key]
    again = configurator.configure(train.defaults, [str(tmp_path / "config.py")])
    assert again == checkpoint["config"]
    assert (tmp_path / "curves.png").stat().st_size > 1000

    evaluation.main(["--ckpt", str(tmp_path / "ckpt.pt")])
    reports = list((tmp_path / "eval").glob("*.json"))
    assert json.loads(reports[0].read_text())


# ---- weights and precision


def test_train_starts_from_weights_of_its_own(traffic, tmp_path):
    options = ("--max_steps=1", "--learning_rate=1e-12")
    a = trained(traffic, tmp_path / "a", *options, "--seed=1")
    b = trained(traffic, tmp_path / "b", *options, f"--init_from={tmp_path}/a/ckpt.pt")
    name = "stages.0.conv.weight"
    torch.testing.assert_close(a["model"][name], b["model"][name])


def test_train_starts_from_weights_of_rvt_with_other_classes(tmp_path, capsys):
    reference, path = rvt_checkpoint(tmp_path)
    for split in ("train", "val"):
        make_set(tmp_path, [[2, 3]], split, length=5)
    options = ["--embed_dim=32", "--dim_head=32", "--num_classes=2", "--max_steps=1"]
    options += ["--learning_rate=1e-12", f"--init_from={path}"]
    weight = trained(tmp_path, tmp_path / "out", *options)["model"]["stages.0.conv.weight"]
    assert "class layers start from scratch" in capsys.readouterr().out
    weights = reference["checkpoint"]["state_dict"]
    want = weights["mdl.backbone.stages.0.downsample_cf2cl.conv.weight"]
    torch.testing.assert_close(weight, want.float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_train_in_half_precision_on_a_cpu(dtype, traffic, tmp_path):
    # float16's scaler skips the first steps
    checkpoint = trained(traffic, tmp_path, "--max_steps=10", f"--dtype={dtype}")
    assert math.isfinite(checkpoint["progress"]["log"][0]["loss"])
    assert checkpoint["progress"]["bad_steps"] == 0
    assert all(x.isfinite().all() for x in checkpoint["model"].values())


def test_train_waits_for_no_batch_beyond_its_last_step(traffic, tmp_path, monkeypatch):
    load = data.TrainData.__getitem__

    def damaged(self, index):
        if index >= 4:
            raise ValueError("a damaged frame")
        return load(self, index)

    monkeypatch.setattr(data.TrainData, "__getitem__", damaged)
    options = ("--max_steps=2", "--gradient_accumulation_steps=2")
    assert trained(traffic, tmp_path, *options)["progress"]["step"] == 2


# ---- processes


def test_two_processes_train_as_one_that_accumulates(traffic, tmp_path):
    options = ("--max_steps=2", "--eval_interval=2")
    one = trained(traffic, tmp_path / "one", *options, "--gradient_accumulation_steps=4")
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/two", *options]
    done = torchrun("train.py", *argv, "--gradient_accumulation_steps=2", capture_output=True)
    assert done.returncode == 0, done.stderr
    two = checkpoint_of(tmp_path / "two")
    for key, value in one["model"].items():
        if "running" not in key and "num_batches" not in key:  # of the first process alone
            torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-5, msg=key)
    one, two = one["progress"]["log"][0], two["progress"]["log"][0]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


# ---- changes in one place


def test_another_schedule_is_one_function(traffic, tmp_path, monkeypatch):
    def cosine(step, max_steps, peak):
        return peak * (1 + math.cos(math.pi * step / max_steps)) / 2

    monkeypatch.setattr(train, "learning_rate_at", cosine)
    options = ("--max_steps=2", "--log_interval=1", "--learning_rate=1e-3")
    progress = trained(traffic, tmp_path, *options)["progress"]
    assert progress["log"][1]["lr"] == pytest.approx(5e-4)


def test_another_logged_scalar_is_one_key_of_the_losses(traffic, tmp_path, monkeypatch):
    plain = train.detection_loss

    def with_largest(prediction, targets, size_aware):
        largest = prediction.box_cxcywh[..., 2:].amax()
        return plain(prediction, targets, size_aware) | {"largest_side": largest}

    monkeypatch.setattr(train, "detection_loss", with_largest)
    progress = trained(traffic, tmp_path, "--max_steps=1")["progress"]
    assert progress["log"][0]["largest_side"] > 0
    assert "largest_side" in (tmp_path / "log.csv").read_text()


# ==== configurator.py


@pytest.mark.parametrize("argv, key, want", [
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--batch_size", "4"], "batch_size", 4),
    (["--fpn_stages", "1,2"], "fpn_stages", (1, 2)),
    (["--compile=false"], "compile", False),
    (["--compile", "--batch_size=1"], "compile", True),
    (["--names=car,bus"], "names", ("car", "bus")),
    (["--names=tram"], "names", ("tram",)),
    (["--names=30"], "names", ("30",)),
    (["--names="], "names", ()),
    (["--out_dir=3"], "out_dir", "3")])
def test_configure_reads_options_by_the_type_of_their_default(argv, key, want):
    got = configurator.configure(KEYS, argv)[key]
    assert got == want and type(got) is type(want)


def test_configure_applies_files_and_options_in_order(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("batch_size = 3\n_half = batch_size * 0.5\nlearning_rate = _half / 100\n")
    config = configurator.configure(KEYS, ["--batch_size=7", str(file), "--names=b"])
    assert config == KEYS | dict(batch_size=3, learning_rate=0.015, names=("b",))
    assert configurator.configure(KEYS, [str(file), "--batch_size=5"])["batch_size"] == 5
    assert KEYS["batch_size"] == 6  # the defaults stay


# ==== detect.py


@pytest.mark.parametrize("n", [0, 1, 8, 60, 150, 250])
@pytest.mark.parametrize("decimals", [0, 6])
def test_nms_is_the_greedy_definition(n, decimals):
    rng = np.random.default_rng(n)
    # Whole numbers: equal boxes and scores, overlaps of exactly the threshold.
    corner = rng.uniform(0, 60, (n, 2)).round(decimals).astype("f4")
    size = rng.uniform(0, 30, (n, 2)).round(decimals).astype("f4")
    score = rng.random(n).round(decimals + 1)
    box = np.concatenate((corner, corner + size), axis=1)
    label = rng.integers(0, 3, n)
    tensors = [torch.from_numpy(x) for x in (box, score, label)]
    for iou in (0.45, 0.5):
        want = greedy(box, score, label, iou)
        assert nms(*tensors, iou).tolist() == want
        assert nms(*tensors, iou, block=16).tolist() == want


# ---- detections


def test_detections_by_hand(four_anchors):
    first, second = detections(four_anchors, [7, 8])
    # Anchor 2 (0.72, class 0) drops anchor 0 (0.45, class 0); anchor 1 is of class 1 (0.54).
    assert len(second) == 0
    assert first["class_id"].tolist() == [0, 1]
    np.testing.assert_allclose(first["class_confidence"], [0.8, 0.6], rtol=1e-5)  # p_cls ranks
    np.testing.assert_allclose(first["confidence"], [0.72, 0.54], rtol=1e-5)
    assert [first[0][name] for name in ("t", "x", "y", "w", "h")] == [7, 16, 20, 10, 20]
    ranked_by_product = detections(four_anchors, [7, 8], score="obj*cls", confidence=0.6)[0]
    np.testing.assert_allclose(ranked_by_product["class_confidence"], [0.72], rtol=1e-5)


# ---- run


@pytest.mark.parametrize("attention", (False, True))
def test_run_does_not_depend_on_batches_chunks_order_or_workers(attention):
    model = small_detector(small_object_attention=attention)
    sequences = some_sequences()
    labels, want = run(model, sequences, 1, 2)
    times = []
    for sequence in sequences:
        times += [sequence.timestamps_us[t] for t in sequence.label_frames]
    assert [boxes["t"][0] for boxes in labels] == times
    assert min(map(len, want)) > 5
    for batch, T, workers in ((3, 3, 0), (8, 30, 0), (2, 2, 2)):
        same_boxes(run(model, sequences, batch, T, num_workers=workers)[1], want)
    turned = run(model, sequences[::-1], 2, 5)[1]
    same_boxes(turned[:3] + turned[-3:], [want[9], *want[7:9], *want[:3]])
    for none in ([], sequences[-1:]):  # without labels
        assert run(model, none, 2, 5) == ([], [])


def test_run_carries_the_state_through_a_sequence_and_no_further():
    model = small_detector()
    sequence = MemorySequence("a", 20, (3, 19))
    labelled = torch.isin(torch.arange(20), torch.tensor([3, 19]))[:, None]
    with torch.inference_mode():
        prediction, _ = model(torch.from_numpy(sequence.data[:, None]), None, labelled)
    want = detections(prediction, sequence.timestamps_us[[3, 19]])
    # the other is longer, so that it plays first
    same_boxes(run(model, [sequence, MemorySequence("b", 30, (2, 29))], 1, 4)[1][:2], want)


def test_run_starts_T_minus_1_frames_before_the_first_label_and_leaves_the_model_as_it_was():
    model = small_detector().train()
    statistics = [buffer.clone() for buffer in model.buffers()]
    sequence = MemorySequence("a", 12, (8,))
    want = run(model, [sequence], 1, 3)[1]
    sequence.data[:6] = 0
    same_boxes(run(model, [sequence], 1, 3)[1], want, 0)
    sequence.data[6] = 0
    assert not np.array_equal(run(model, [sequence], 1, 3)[1][0]["x"], want[0]["x"])
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers()))


def run_as_one_of_two(rank, store, folder):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    for count in (5, 1):  # one sequence only: rank 1 has none
        found = run(small_detector(), some_sequences(count), 2, 3)[1]
        np.savez(f"{folder}/{rank}_{count}.npz", *found)
    torch.distributed.destroy_process_group()


def test_run_in_two_processes_equals_one(tmp_path):
    torch.multiprocessing.spawn(run_as_one_of_two, (tmp_path / "store", tmp_path), nprocs=2)
    for count in (5, 1):
        want = run(small_detector(), some_sequences(count), 2, 3)[1]
        for rank in range(2):
            same_boxes(list(np.load(tmp_path / f"{rank}_{count}.npz").values()), want)


# ---- StreamDetector


@pytest.mark.parametrize("attention", (False, True))
def test_stream_detector_equals_the_chunked_forward_pass(attention):
    model = small_detector(small_object_attention=attention)
    sequence = MemorySequence("a", 6, range(6))
    want = run(model, [sequence], 1, 6)[1]
    detector = StreamDetector(model)
    for _ in range(2):
        got = [detector(frame, t) for frame, t in zip(sequence.data, sequence.timestamps_us)]
        same_boxes(got, want)
        assert got[0].dtype == BOX_DTYPE
        detector.reset()
    assert detector(torch.from_numpy(sequence.data[0]))["t"][0] == 50_000


def test_stream_detector_in_bfloat16_finds_about_the_same():
    model = small_detector(hw=(64, 320))
    frame = MemorySequence("a", 2, (1,), (64, 320)).data[0]
    exact = StreamDetector(model, torch.float32)(frame)
    coarse = StreamDetector(model, torch.bfloat16)(frame)
    assert abs(len(exact) - len(coarse)) <= 0.1 * len(exact)
    right = (exact["x"] > 250).sum()
    assert right  # cells beyond 256 keep their place
    assert abs((coarse["x"] > 250).sum() - float(right)) <= 0.2 * right


# ---- scores


@pytest.mark.parametrize("hw", [(720, 1280), (360, 640), (240, 304), (480, 640)])
def test_prophesee_filter_in_proportion_to_the_sensor(hw):
    diagonal, side = (60, 20) if hw[1] == 1280 else (30, 10)
    long = (diagonal**2 - side**2) ** 0.5 + 0.01
    sizes = [(side, long), (side - 0.1, 2 * long), (side, long - 0.1), (long, side)]
    rows = [(0, 0, *size) for size in sizes]
    late, early = some_boxes(500_001, rows), some_boxes(500_000, rows)
    assert (prophesee_filter(late, hw[1])["h"] == late["h"][[0, 3]]).all()
    assert len(prophesee_filter(early, hw[1])) == 0
    both = [late, early]
    assert score_boxes(both, both, *hw, NAMES, "prophesee")["boxes"] == 2


@pytest.mark.parametrize("seed", range(6))
def test_score_boxes_equals_pycocotools(seed):
    # to the last bit; none is found, ties of scores and boxes without area, more than COCO's 100
    labels, dets = random_frames(seed, found=(30, 30, 0, 130, 60, 130)[seed], ties=seed % 2 == 1)
    for ids in (range(4), (0, 2)):
        for agnostic in (False, True):
            got = score_boxes(labels, dets, 360, 640, NAMES, "none", agnostic, ids)
            assert pycocotools_scores(labels, dets, ids, agnostic).items() <= got.items()
    rows = score_boxes(labels, dets, 360, 640, NAMES)["classes"]
    for i, name in enumerate(NAMES):
        assert pycocotools_scores(labels, dets, [i], False).items() <= rows[name].items()
        assert rows[name]["boxes"] == sum((boxes["class_id"] == i).sum() for boxes in labels)
        assert rows[name]["frames"] == sum(len(boxes) > 0 for boxes in labels)


def test_score_boxes_equals_rvt_and_its_fork_on_the_reference():
    arrays = np.load(shared("reference/scores.npz"))
    for case in json.loads(shared("reference/scores.json").read_text()):
        sides = [arrays[f"{case['case']}_{side}"] for side in ("labels", "detections")]
        times = np.unique(np.concatenate([side["t"] for side in sides]))
        frames = [[side[side["t"] == t] for t in times] for side in sides]
        scene = case["height"], case["width"], [str(i) for i in range(case["classes"])]
        fork = {"class_agnostic": True, "class_ids": range(min(3, case["classes"]))}
        for protocol, options in {"prophesee_class_mean": {}, "fork_overall": fork}.items():
            scores = score_boxes(*frames, *scene, "prophesee", **options)
            for key, value in case.get(protocol, {}).items():
                for theirs, ours in (("AR_max_det=", "AR"), ("AP_5", "AP5"), ("AP_7", "AP7")):
                    key = key.replace(theirs, ours)
                assert abs(scores[key] - value) < 1e-9


def test_score_boxes_without_labels_is_undefined_and_prints_nothing(capfd):
    some = some_boxes(0, [(10, 10, 20, 20)])
    none = some[:0]
    for labels, dets in (([], []), ([none], [none]), ([none], [some])):
        scores = score_boxes(labels, dets, 64, 64, NAMES)
        assert scores["frames"] == 0
        assert scores["AP"] == scores["AP_L"] == scores["AR1"] == -1
    # Frames without labels do not count.
    assert score_boxes([some, none], [some, some], 64, 64, NAMES)["AP"] > 0.999999
    assert capfd.readouterr() == ("", "")


def test_score_boxes_of_16_px_are_small_but_not_tiny():
    for xywh, tiny in (((0, 0, 16, 16), -1), ((0, 0, 15, 17), 1)):
        boxes = [some_boxes(0, [xywh])]
        scores = score_boxes(boxes, boxes, 64, 64, NAMES)
        assert scores["AP_T"] == pytest.approx(tiny)
        assert scores["AP_S"] == pytest.approx(1)


def test_score_boxes_keeps_frames_that_hold_only_other_classes():
    car, bus = (some_boxes(0, [(0, 0, 40, 40)], i) for i in (1, 3))
    found = [some_boxes(0, [(0, 0, 40, 40)], 1, score) for score in (0.5, 1.0)]
    scores = score_boxes([car, bus], found, 360, 640, NAMES, "none", True, range(3))
    assert (scores["frames"], scores["boxes"]) == (2, 1)
    assert scores["AP"] == pytest.approx(0.5)  # the better one is on the bus
    both = score_boxes([car, bus], found, 360, 640, NAMES, class_agnostic=True)
    assert both["boxes"] == 2
    assert both["AP"] > 0.999999


def test_score_boxes_counts_confusion_by_hand():
    def confusion(truth, found):
        return score_boxes(truth, found, 64, 200, ["a", "b"])["confusion"].tolist()

    truth = some_boxes(0, [(0, 0, 20, 20), (50, 0, 20, 20), (100, 0, 20, 20)], [0, 1, 1])
    places = [(0, 0, 20, 20), (51, 0, 20, 20), (50, 1, 20, 20), (0, 50, 9, 9)]
    found = some_boxes(0, places, [0, 0, 1, 1], [0.9, 0.8, 0.7, 0.6])
    # columns: as 0, as 1, missed; the second detection of a label is one of the background
    assert confusion([truth], [found]) == [[1, 0, 0], [1, 0, 1], [0, 2, 0]]
    # best first, whatever the order; frames without labels do not count
    assert confusion([truth[:0], truth], [found, found[::-1]]) == [[1, 0, 0], [1, 0, 1], [0, 2, 0]]
    assert confusion([truth], [found[:0]]) == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]
    # a second detection gets the next best label
    truth = some_boxes(0, [(0, 0, 20, 20), (0, 6, 20, 20)], [0, 1])
    found = some_boxes(0, [(0, 2, 20, 20), (0, 2, 20, 20)], [0, 0], [0.9, 0.8])
    assert confusion([truth], [found]) == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


# ==== eval.py


def test_report_has_a_row_for_every_protocol():
    labels, dets, result = some_report()
    json.dumps(result, allow_nan=False)
    for key, kind in detect.FILTERS.items():
        scene = labels, dets, 360, 640, NAMES, key
        mean = detect.score_boxes(*scene)
        want = {f"{name}, {kind}": row for name, row in mean["classes"].items()}
        want[f"class mean, {kind}"] = mean
        want[f"class-agnostic, {kind}"] = detect.score_boxes(*scene, class_agnostic=True)
        small = f"small_classes (pedestrian, bicycle), class mean, {kind}"
        want[small] = detect.score_boxes(*scene, class_ids=(0, 2))
        for title, scores in want.items():
            row = result["rows"].pop(title)
            assert row == {name: None if scores[name] == -1 else scores[name] for name in row}
    title = "eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"
    fork = detect.score_boxes(*scene, class_agnostic=True, class_ids=range(3))
    assert result["rows"].pop(title)["AP"] == fork["AP"]
    assert not result["rows"]
    assert result["settings"]["boxes"] == sum(len(boxes) for boxes in labels)


# ---- compare


def test_compare_shows_differences_and_a_metric_of_ones_own(monkeypatch, tmp_path):
    coco_row = detect.score_row

    def with_twice(*args):
        row = coco_row(*args)
        return row | {"twice": 2 * row["AP50"]}

    monkeypatch.setattr(detect, "score_row", with_twice)
    paths = [tmp_path / "base.json", tmp_path / "better.json"]
    result = some_report()[2]
    row = result["rows"]["class mean, all boxes"]
    assert row["twice"] == 2 * row["AP50"]
    paths[0].write_text(json.dumps(result))
    row["AP"] += 0.015
    paths[1].write_text(json.dumps(result))
    lines = evaluation.compare(paths).splitlines()
    assert "   twice  " in lines[0]
    assert lines[2].endswith(f"class mean, all boxes | {paths[1]}")
    assert lines[2].split()[2] == f"{row['AP']:.4f}"
    assert lines[3].split() == ["+0", "+0", "+0.015", *["+0"] * 14, "difference"]


# ---- main


def test_main_needs_the_checkpoint_alone_and_keeps_the_report_of_each_split(ckpt, tmp_path, capsys):
    write_prepared(tmp_path / "data", split="val", hw=(48, 96))
    for words in ([], ["--split=val"]):
        evaluation.main([f"--ckpt={ckpt}", "--device=cpu", *words])
    folder = tmp_path / "run" / "eval"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["ckpt_test.json", "ckpt_test.png", "ckpt_val.json", "ckpt_val.png"]
    result = json.loads((folder / "ckpt_test.json").read_text())
    assert result["rows"]["class mean, all boxes"]["frames"] == 6
    assert result["settings"]["boxes"] == 12
    assert result["settings"]["split"] == "test"
    assert result["settings"]["resolution"] == [48, 96]
    text = capsys.readouterr().out
    assert all(title in text for title in result["rows"])
    other = write_prepared(tmp_path / "other", hw=(48, 96))
    evaluation.main([f"--ckpt={ckpt}", "--device=cpu", f"--data_dir={other}"])
    assert (folder / "ckpt_test_other.json").exists()


def test_main_on_a_checkpoint_of_rvt(tmp_path):
    _, path = rvt_checkpoint(tmp_path)
    classes = [str(i) for i in range(8)]
    data = write_prepared(tmp_path / "data", ("a",), "test", (128, 160), 3, (1, 2), classes)
    config = tmp_path / "config.py"
    config.write_text("partition_split = 1\ndim_head = 32\nsequence_length = 2\nmax_steps = 7\n")
    words = [f"--ckpt={path}", str(config), f"--data_dir={data}"]
    evaluation.main([*words, "--device=cpu", "--num_workers=0"])
    assert (tmp_path / "eval" / "rvt_test.json").exists()


# ==== pictures.py


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_draw_shows_polarities_boxes_and_labels():
    events = np.zeros((20, 48, 480), np.uint8)
    events[[0, 15], 40, [5, 6]] = 9
    found = some_boxes(0, [(200, 20, 30, 15)], 1, 0.5)
    image = np.asarray(pictures.draw(events, found, NAMES, some_boxes(0, [(300, 20, 30, 15)])))
    assert image[40, 5:7].tolist() == [list(colour) for colour in pictures.EVENTS]
    assert (image[20, 310] == 255).all()  # a label, white
    assert image[35, 210].max() > image[35, 210].min()  # a detection, coloured


def test_draw_enlarges_small_frames_by_a_whole_number():
    assert pictures.draw(np.zeros((20, 32, 100), np.uint8), (), NAMES).size == (500, 160)
    assert pictures.draw(np.zeros((20, 360, 640), np.uint8), (), NAMES).size == (640, 360)


def test_draw_curves_of_every_column_and_of_fields_that_are_empty(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "AP": 0.1}]
    for k in (1, 2):
        pictures.draw_curves(tmp_path / "new" / "curves.png", rows[:k])
        assert min(size_of(tmp_path / "new" / "curves.png")) > 300


def test_pictures_of_frames_with_detections(tmp_path):
    sequence = MemorySequence("a", 4, (0, 2, 3))  # fewer frames than places
    boxes = sequence.boxes
    result = evaluation.report(boxes, boxes, 64, 64, NAMES)
    pictures.draw_report(tmp_path / "report.png", result, np.eye(5), [sequence], boxes, boxes)
    assert min(size_of(tmp_path / "report.png")) > 1000


# ==== prepare.py


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
@pytest.mark.parametrize("height, width", [(8, 12), (7, 11)])
def test_histogram_equals_its_slow_definition(downsample, height, width):
    rng = np.random.default_rng(0)
    for count, span in ((0, 1), (1, 1), (5, 1), (400, 50_000), (400, 7), (400, 49_999)):
        t = np.sort(rng.integers(0, span, count)) + 10**12
        x = rng.integers(0, width, count)
        y = rng.integers(0, height, count)
        p = rng.integers(-1, 2, count)
        slow = slow_histogram(t, x, y, p, height, width, downsample)
        for kind in (np.uint16, np.int64, np.uint32):
            got = histogram(t, x.astype(kind), y.astype(kind), p, height, width, downsample)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, slow)


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
def test_histogram_saturates_where_rvt_wraps(downsample):
    t = np.zeros(20 * 256 + 3, np.int64)
    ones = np.ones(len(t), np.uint16)
    got = histogram(t, ones, ones, ones, 4, 4, downsample)
    assert got.max() == got.sum() == 10


@pytest.mark.parametrize("span", [1, 3, 10, 4096, 33_333, 49_999, 50_000])
def test_histogram_bins_are_those_of_torch(span):
    t = torch.arange(0, span + 1)
    expected = torch.clamp(((t - t[0]) / max(t[-1] - t[0], 1) * 10).floor(), max=9).long().numpy()
    y, x = np.divmod(np.arange(len(t)), 64)
    got = histogram(t.numpy(), x, y, np.zeros(len(t)), len(t) // 64 + 1, 64)
    np.testing.assert_array_equal(got.argmax(0).ravel()[:len(t)], expected)


# ==== prepare.py: recordings


@pytest.mark.parametrize("name, size, count, span, first, limits, polarity", [
    ("driving_gen41_1280x720_8.8ms_evt3.raw", (720, 1280), 219_596, 8_811, 11_718_656,
     (0, 1279, 0, 719), (104_064, 115_532)),
    ("pedestrians_gen41_1280x720_45ms_evt3.raw", (720, 1280), 5_000, 45_210, None,
     (11, 1279, 22, 698), (2_106, 2_894)),
    ("indoor_640x480_2.08s_evt3_payload_noheader.evt3", (480, 640), 343_474, 2_078_178, None, None,
     (218_291, 125_183)),
    ("rotating_dot_gen3_640x480_50ms_evt2.raw", (480, 640), 539_481, 50_000, None,
     (60, 599, 18, 475), None),
    ("ncars_obj_004397_100ms_td.dat", (61, 54), 4_407, 100_000, None, (0, 53, 1, 60),
     (1_671, 2_736))])
def test_real_recordings_hold_what_their_description_says(
        name, size, count, span, first, limits, polarity):
    path = shared(f"data/{name}")
    if path.suffix != ".dat":
        pytest.importorskip("faery")
    recording = Recording(path, *size)
    assert (recording.height, recording.width) == size
    t, x, y, p = read_events(recording)
    assert len(t) == count == recording.events and recording.outside == recording.far == 0
    assert (np.diff(t) >= 0).all() and abs(t[-1] - t[0] - span) < 1000 and first in (None, t[0])
    assert limits in (None, (x.min(), x.max(), y.min(), y.max()))
    assert polarity is None or sorted(np.bincount((p > 0).astype(int))) == sorted(polarity)


def test_read_h5_takes_sizes_from_scalars_and_attributes_and_adds_dsecs_offset(tmp_path):
    path = write_h5(tmp_path / "b.hdf5", *some_events(100, 50_000), size=None, group="CD/events")
    with h5py.File(path, "a") as file:
        file["CD/events"].attrs["height"] = 260
        file.attrs["width"] = 346
        file["t_offset"] = 10**12
    recording = Recording(path, 100, 100)
    assert (recording.height, recording.width) == (260, 346)
    assert next(recording.chunks())[0][0] >= 10**12


def test_read_h5_reads_metavisions_table(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    columns = some_events(2500, 10**6)
    write_table(tmp_path / "a.hdf5", *columns, chunks=(400,))
    np.testing.assert_array_equal(read_events(Recording(tmp_path / "a.hdf5", 48, 64)), columns)


def test_read_dat_gives_the_events_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 100)
    columns = some_events(350, 10**6, (240, 304))
    recording = Recording(write_dat(tmp_path / "a_td.dat", *columns, size=(240, 304)))
    assert (recording.height, recording.width) == (240, 304)
    np.testing.assert_array_equal(read_events(recording), columns)


def read_csv(path):
    yield 48, 64
    yield np.loadtxt(path, np.int64, delimiter=",").T


def test_readers_take_another_format_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.READERS, ".csv", read_csv)
    raw = raw_set(tmp_path / "raw", some_labels([100_000, 200_000]), names=("h5", "csv"))
    np.savetxt(raw / "train/csv.csv", np.stack(some_events(3000, 700_000), 1), "%d", ",")
    (raw / "train/csv_td.h5").unlink()
    assert prepare.prepare(raw, tmp_path / "out") == {"prepared": 2}
    assert same_tree(load(tmp_path / "out/train/csv"), load(tmp_path / "out/train/h5"))


# ==== prepare.py: windows


@pytest.mark.parametrize("block", [7, 100, 1 << 19])
def test_windows_hold_both_their_ends_whatever_the_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", block)
    t, x, y, p = some_events(2000, 400_000)
    t[500:503] = 100_000
    t.sort()
    recording = Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))
    ends = [50_000, 60_000, 100_000, 150_000, 150_000, 380_000, 900_000]
    for end, window in zip(ends, windows(recording, ends), strict=True):
        inside = (t >= end - 50_000) & (t <= end)
        np.testing.assert_array_equal(window, [column[inside] for column in (t, x, y, p)])


def test_windows_without_ends_cover_the_recording_from_its_first_event_on(tmp_path):
    t, x, y, p = some_events(500, 430_000)
    t += 11_718_656
    got = list(windows(Recording(write_h5(tmp_path / "a_td.h5", t, x, y, p))))
    assert len(got) == -(-(t[-1] - t[0]) // 50_000)
    assert set(np.concatenate([window[0] for window in got])) == set(t)
    empty = Recording(write_h5(tmp_path / "b_td.h5", [], [], [], []))
    assert list(windows(empty)) == []
    assert [len(window[0]) for window in windows(empty, [50_000, 100_000])] == [0, 0]


# ==== prepare.py: labels


def test_read_labels_renames_and_sorts_those_of_older_files(tmp_path):
    names = ("ts", "x", "y", "w", "h", "class_id", "confidence", "track_id")
    old = np.zeros(3, list(zip(names, ("<u8", "<f4", "<f4", "<f4", "<f4", "u1", "<f4", "<u4"))))
    old["ts"] = [30, 10, 20]
    old["track_id"] = [3, 1, 2]
    np.save(tmp_path / "a_bbox.npy", old)
    boxes = read_labels(tmp_path / "a_bbox.npy")
    assert boxes.dtype == BOX_DTYPE
    assert boxes["t"].tolist() == [10, 20, 30] and boxes["track_id"].tolist() == [1, 2, 3]
    np.save(tmp_path / "b_bbox.npy", old[[*names[:6]]])
    assert read_labels(tmp_path / "b_bbox.npy")["class_confidence"].tolist() == [1, 1, 1]


def test_filter_boxes_crops_filters_and_counts():
    boxes = some_labels(np.arange(8))  # 0 and 1 are cut by the frame, 2 to 7 each have one fault
    boxes["x"][:5] = [-5, 50, 70, -30, np.nan]
    boxes["w"][:5] = [20, 40, 10, 20, 20]
    boxes["class_id"][5] = 99
    boxes["x"][6] = 1
    boxes["w"][6] = 60
    boxes["h"][7] = 4
    kept, dropped = filter_boxes(boxes.copy(), 48, 64, 8, "sides5", train=True)
    assert kept["t"].tolist() == [0, 1]
    assert kept["x"].tolist() == [0, 50] and kept["w"].tolist() == [15, 13]
    assert dropped["boxes of unknown class"] == dropped["boxes not finite"] == 1
    assert dropped["boxes off the frame"] == dropped["boxes cropped at right or lower edge"] == 2
    kept, _ = filter_boxes(boxes.copy(), 48, 64, 100, "none", train=False)
    assert kept["t"].tolist() == [0, 1, 5, 6, 7]
    large = some_labels([0, 1, 2], w=[55, 57, 30], h=[20, 20, 19])
    assert filter_boxes(large, 720, 1280, 8, "prophesee", train=False)[0]["t"].tolist() == [1]


@pytest.mark.parametrize("hertz, grid_us", [(30, 0), (60, 0), (4, 250_000), (1, 250_000)])
def test_label_frames_and_window_ends_are_rvts_on_labels_like_its_own(hertz, grid_us):
    rng = np.random.default_rng(hertz)
    for share in np.repeat((1, 0.9, 0.6, 0.45), 20):  # 45% of 60 Hz: the median is 30 Hz's
        grid = np.round(np.arange(1, 60 * hertz) * 1e6 / hertz)
        grid += rng.integers(-4, 4, len(grid))
        kept = rng.random(len(grid)) < share
        kept[20:80] &= rng.random() < 0.5
        times = grid[kept].astype(np.int64)
        interval = np.median(np.diff(times))
        if not grid_us and round(1e6 / interval) not in (30, 60):
            continue  # RVT's script asserts it
        base = grid_us or int(interval * {30: 3, 60: 6}[round(1e6 / interval)])
        frames, spacing_us = label_frames(times, grid_us)
        expected, steps = rvts_rule(times, base)
        assert frames.tolist() == expected
        between = np.searchsorted(window_ends(frames, spacing_us, 0), frames)
        assert np.diff(between).tolist() == [2 * count for count in steps]


@pytest.mark.parametrize("hertz, base, spacing", [
    (10, 100_000, 50_000), (20, 100_000, 50_000), (25, 80_000, 40_000), (30, 99_999, 49_999.5),
    (60, 100_002, 50_001), (4, 250_000, 50_000), (1, 1_000_000, 50_000)])
def test_label_frames_at_any_label_rate(hertz, base, spacing):
    times = np.round(np.arange(1, 4 * hertz) * 1e6 / hertz).astype(np.int64)
    frames, step = label_frames(times, 0)
    assert step == spacing
    assert frames[0] == times[times >= 100_000][0] and set(frames) <= set(times)
    assert np.abs(np.diff(frames) - base).max() <= 2000 and frames[-1] > times[-1] - base
    ends = window_ends(frames, step, 0)
    assert set(frames) <= set(ends)
    assert np.abs(np.diff(ends[ends >= frames[0]]) - spacing).max() <= 1500
    assert label_frames(times[:1] * 0 + 7, 0)[0].size == 0
    assert label_frames(times[-1:], 0)[0].tolist() == [times[-1]]


def test_label_frames_start_a_new_phase_after_a_gap():
    before = np.arange(1, 31) * 33_333
    after = 1_716_000 + np.arange(30) * 33_333
    frames, _ = label_frames(np.concatenate((before, after)), 0)
    assert frames[frames < 1_100_000].tolist() == (133_332 + np.arange(9) * 99_999).tolist()
    assert frames[frames > 1_100_000].tolist() == (1_716_000 + np.arange(10) * 99_999).tolist()
    ends = window_ends(frames, 49_999.5, 0)
    assert np.isin(frames, ends).all()
    assert 45_000 < np.diff(ends).min() and np.diff(ends).max() < 55_000
    tail = before[-1] + [5 * 33_333, 6 * 33_333]  # on the grid, not in phase: RVT drops it
    assert label_frames(np.concatenate((before, tail)), 0)[0].max() == 933_324


def test_window_ends_of_gen1_are_as_far_apart_as_rvts():
    frames, step = label_frames(np.array([250_000, 500_000, 1_000_000]), 250_000)
    ends = window_ends(frames, step, 0) // 1000
    assert ends.tolist() == [100, 150, 200, 250, 375, 500, 625, 750, 875, 1000]
    late = np.array([10**15 + 10**6])
    assert len(window_ends(late, 50_000, 10**15)) == 19  # a clock that does not begin at 0


# ==== prepare.py: sequences and data sets


@pytest.mark.parametrize("dataset", ["gen1", "gen4", "etram"])
def test_prepared_data_equal_rvts_to_the_bit(dataset, tmp_path):
    reference = shared(f"reference/prepared/{dataset}")
    assert prepare.prepare(reference / "raw", tmp_path, dataset) == {"prepared": 2}
    for sequence in ("train/a", "val/b"):
        assert same_tree(load(reference / "out" / sequence), load(tmp_path / sequence))
        path = next((reference / "out" / sequence).rglob("*.h5"))
        ours_path = tmp_path / sequence / data.REPRESENTATION / path.name
        with h5py.File(path) as theirs, h5py.File(ours_path) as ours:
            a, b = theirs["data"], ours["data"]
            assert a.chunks == b.chunks and a.maxshape == b.maxshape
            filters = [x.id.get_create_plist().get_filter(0) for x in (a, b)]
            assert filters[0] == filters[1]


@pytest.mark.parametrize("downsample", ["none", "nearest", "sum"])
def test_write_sequence_gives_every_window_its_histogram(downsample, tmp_path):
    events = some_events(4000, 400_000)
    raw_set(tmp_path / "raw", some_labels([100_000, 200_000, 300_000]), events)
    prepare.prepare(tmp_path / "raw", tmp_path / "out", downsample=downsample)
    got = load(tmp_path / "out/train/a")
    frames = got[data.FILES["full" if downsample == "none" else "half"]]
    for frame, end in zip(frames, got["stacke/timestamps_us.npy"], strict=True):
        inside = (events[0] >= end - 50_000) & (events[0] <= end)
        window = [column[inside] for column in events]
        np.testing.assert_array_equal(frame, slow_histogram(*window, 48, 64, downsample))


def test_prepare_keeps_small_boxes_of_own_data_and_numbers_their_classes(tmp_path):
    boxes = some_labels(np.repeat(GRID_US[:6], 2), w=3, h=2, class_id=[0, 4] * 6)
    raw_set(tmp_path / "raw", boxes, names=("b", "a"), splits=("train", "test"))
    assert prepare.prepare(tmp_path / "raw", tmp_path / "out", "own") == {"prepared": 4}
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["classes"] == ["0", "1", "2", "3", "4"]
    assert (about["height"], about["width"]) == (48, 64)
    got = load(tmp_path / "out/test/b")
    assert got["event_representations.h5"].shape == (11, 20, 48, 64)
    assert len(got["labels"]) == 12
    assert got["objframe_idx_2_label_idx"].tolist() == [0, 2, 4, 6, 8, 10]
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["dataset.json", "test", "train"]


def test_prepare_gives_a_recording_without_labels_windows_from_its_first_event_on(tmp_path):
    raw_set(tmp_path / "raw")
    prepare.prepare(tmp_path / "raw", tmp_path / "out", "etram")
    got = load(tmp_path / "out/train/a")
    assert len(got["labels"]) == len(got["objframe_idx_2_label_idx"]) == 0
    assert got["labels"].dtype == BOX_DTYPE and len(got["labels/timestamps_us.npy"]) == 0
    assert got["event_representations_ds2_nearest.h5"].shape == (14, 20, 24, 32)


def test_run_jobs_writes_with_two_processes_what_one_writes(tmp_path):
    raw = raw_set(tmp_path / "raw", some_labels(GRID_US[:2]), names="ab", splits=("train", "val"))
    for number in (0, 2):
        prepare.prepare(raw, tmp_path / str(number), num_workers=number)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        assert same_tree(load(tmp_path / "0" / name), load(tmp_path / "2" / name))
    one, two = ((tmp_path / number / "dataset.json").read_text() for number in "02")
    assert one == two


# ==== simulate.py


def test_simulate_depends_on_the_seed_alone(small_traffic, tmp_path):
    simulate.simulate(tmp_path / "two", 2, **SMALL_SCENE)
    simulate.simulate(tmp_path / "other", 0, **SMALL_SCENE | dict(seed=1))
    counts = set()
    for name in SMALL_NAMES:
        recording = raw_recording(small_traffic, name)
        assert all(map(np.array_equal, recording, raw_recording(tmp_path / "two", name)))
        counts |= {len(recording[0]), len(raw_recording(tmp_path / "other", name)[0])}
    assert len(counts) == 6


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_simulate_keeps_to_the_frame_in_time_and_space(small_traffic, name):
    t, x, y, p, boxes = raw_recording(small_traffic, name)
    assert 0 <= t[0] and t[-1] < 10**6 and x.max() < 64 and y.max() < 48
    assert set(p) == {0, 1} and 0.3 < p.mean() < 0.7
    assert len(boxes) > 20 and boxes["class_id"].max() < 8
    assert min(boxes["x"].min(), boxes["y"].min()) >= 0
    assert (boxes["x"] + boxes["w"]).max() <= 63.001 and (boxes["y"] + boxes["h"]).max() <= 47.001
    assert (boxes["w"] * boxes["h"]).min() >= 15.99  # 2 px of the network's input
    assert (np.unique(boxes["t"]) % 33_333 < 30).all()  # 30 Hz


def test_draw_raises_the_front_of_a_thing_that_goes_away():
    square = ((0, 0, 100, 0, 100),)
    cover = simulate.draw(square, 0, 1)[1]
    middle = np.arange(40) @ cover / cover.sum(0) + 0.5  # of each column, in cells
    np.testing.assert_allclose(middle[[10, 29]], (24.75, 15.25), atol=0.5)
    np.testing.assert_array_equal(cover[:, ::-1], simulate.draw(square, 0, -1)[1])


def test_render_covers_pixels_by_their_share(two_cars):
    scene, car, _ = two_cars
    car.picture[:] = 1  # log intensity, and cover
    car.box_xyxy[:] = (10.25, 20, 26, 27.5)
    image, owner = simulate.render(scene, [car], 0)
    np.testing.assert_allclose(image[22, 9:12], (0, 0.75, 1), atol=1e-5)
    np.testing.assert_allclose(image[26:29, 15], (1, 0.5, 0), atol=1e-5)
    assert image.sum() == pytest.approx(15.75 * 7.5, rel=1e-5)
    assert (owner[20:27, 10:26] == 0).all()


def test_labels_at_leaves_out_hidden_unmoved_and_tiny_things(two_cars):
    scene, wall, car = two_cars
    wall.picture[1] = 1
    wall.moved[:] = 0
    wall.box_xyxy[:] = (40, 10, 60, 30)

    def labels(*things):
        return simulate.labels_at(scene, things, 3, simulate.render(scene, things, 3)[1])

    assert labels(wall, car) == [(25_000, 10, 20, 16, 8, 1, 1, 1)]
    wall.box_xyxy[:] = (8, 10, 23, 30)  # now before the car
    assert labels(wall, car) == []
    car.moved[:] = 1
    assert labels(car) == []
    car.moved[:] = 100
    assert len(labels(car)) == 1
    car.box_xyxy[:] = (10, 20, 16, 25)
    assert labels(car) == []


def test_sensor_follows_the_contrast_threshold_model():
    span = 1e6 / simulate.FPS
    sensor = sensor_before([[0]])
    rise = sensor.events(np.float32([[0.9]]), 10)  # crosses 0.2, 0.4, 0.6 and 0.8
    times = (10 + np.array([0.2, 0.4, 0.6, 0.8]) / 0.9) * span
    np.testing.assert_allclose([t[0] for t, _, _ in rise], times, atol=2)
    assert all(p.all() for _, _, p in rise)
    sensor.threshold[:] = 0.25  # below the level that is left, 0.8
    fall = sensor.events(np.float32([[0]]), 11)  # crosses 0.55, 0.3 and 0.05
    times = (11 + np.array([0.35, 0.6, 0.85]) / 0.9) * span
    np.testing.assert_allclose([t[0] for t, _, _ in fall], times, atol=2)
    assert not any(p.any() for _, _, p in fall)


def test_sensor_is_dead_for_a_while_after_an_event():
    events = sensor_before([[0]]).events(np.float32([[30]]), 0)  # 150 crossings in a step
    times = np.concatenate([t for t, _, _ in events])
    assert len(times) > 10 and np.diff(times).min() >= simulate.REFRACTORY_US


def test_sensor_sees_nothing_of_what_stands_still(two_cars):
    scene, car, _ = two_cars
    car.box_xyxy += 0.5 * np.arange(120).clip(0, 59)[:, None] * (1, 0, 1, 0)
    sensor = sensor_before(simulate.render(scene, [car], 0)[0])
    counts = []
    for step in range(1, 120):
        events = sensor.events(simulate.render(scene, [car], step)[0], step - 1)
        counts.append(sum(len(t) for t, _, _ in events))
    assert sum(counts[:59]) > 500 and sum(counts[59:]) == 0
    assert np.abs(sensor.level - sensor.before).max() < 0.201  # all but a threshold was told


# ==== demo.py


def test_demo_writes_video_and_boxes(tmp_path, checkpoint, capsys):
    recording = write_recording(tmp_path / "drive_td.h5")
    out = tmp_path / "new" / "d.gif"
    run_demo(checkpoint, recording, out, f"--boxes={tmp_path / 'd.npy'}")
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.size) == (10, (512, 512))
        assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
    boxes = np.load(tmp_path / "d.npy")
    assert boxes.dtype == BOX_DTYPE
    assert len(np.unique(boxes["t"])) == 10
    assert (np.diff(boxes["t"]) >= 0).all()
    assert np.ptp(boxes["t"]) == 450_000
    assert boxes["class_confidence"].min() >= 0.01
    assert "frames of" in capsys.readouterr().out
    assert not list(tmp_path.rglob(".partial*"))


def test_demo_video_shows_what_draw_draws(tmp_path):
    picture = demo.draw(np.eye(480, dtype=np.uint8)[None, :40].repeat(20, 0), (), NAMES)
    video = demo.write_gif(tmp_path / "a.gif", picture.size)
    next(video)
    for turned in (picture, picture.rotate(180)):
        video.send(turned.tobytes())
    video.close()
    with Image.open(tmp_path / "a.gif") as gif:
        gif.seek(1)
        got = np.asarray(gif.convert("RGB"), int)
    assert np.abs(got - np.asarray(picture.rotate(180), int)).max() < 40  # 256 colours


def test_demo_of_a_prepared_sequence_and_of_mp4(tmp_path, checkpoint):
    pytest.importorskip("imageio_ffmpeg")
    data = write_prepared(tmp_path / "data", ("a",))
    run_demo(checkpoint, data / "test" / "a", tmp_path / "a.mp4", f"--boxes={tmp_path / 'a.npy'}")
    detector = StreamDetector(load_detector(checkpoint), confidence=0.01, score="obj*cls")
    sequence = MemorySequence("a", 8, (2, 5, 7))
    want = [detector(*pair) for pair in zip(sequence.data, sequence.timestamps_us)]
    same_boxes([np.load(tmp_path / "a.npy")], [np.concatenate(want)])
    assert (tmp_path / "a.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    "sensor, want", [((128, 128), 64), ((64, 64), 64), ((32, 32), 32), ((5, 80), 5)])
def test_demo_reads_a_sensor_of_twice_the_size_at_half_resolution_and_others_as_they_are(
        tmp_path, checkpoint, sensor, want):
    recording = write_recording(tmp_path / "a.h5", sensor, 0.1)
    scale, frames = demo.open_frames(recording, (64, 64))
    (first_us, first), (second_us, _) = list(frames)[:2]
    assert first.shape[1] == want == sensor[0] // scale
    assert second_us - first_us == 50_000
    run_demo(checkpoint, recording, tmp_path / "a.gif")
    assert (tmp_path / "a.gif").exists()


# ==== bench.py


def test_bench_memory_main_ends_with_json(capsys):
    argv = ["--input_hw=48,64", "--embed_dim=16", "--dim_head=8", "--device=cpu"]
    bench_memory.main([*argv, "--batch_sizes=1,2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, two = result["rows"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert one["peak_gib"] > 0 and one["step_s"] > 0
    assert two["kept_gib"] == pytest.approx(2 * one["kept_gib"], rel=0.1)
    assert one["parts"]["stages"] > one["parts"]["heads"] > 0


def test_largest_batch_lies_on_the_line_through_the_peaks():
    rows = [{"batch": 1, "peak_gib": 3.0}, {"batch": 3, "peak_gib": 7.0}]
    assert bench_memory.largest_batch(rows, 24.5) == 11  # 1 + 2 * 11 = 23
    assert bench_memory.largest_batch(rows[:1], 24.5) == "n/a"
    assert bench_memory.largest_batch([row | {"peak_gib": "n/a"} for row in rows], 24.5) == "n/a"


# ==== ablation.py


def test_intervals_span_what_differs_between_the_seeds():
    scores = np.zeros((2, 201, 1))  # sequences do not matter
    scores[1] = 2
    assert [x.item() for x in ablation.intervals(scores)] == [1, 0, 2]


def test_ablation_main_writes_table_and_picture_and_trains_nothing_twice(
        traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "ARMS", ("baseline_3scale", "4scale"))
    monkeypatch.setattr(ablation, "BASE", [*ablation.BASE, *TINY])
    monkeypatch.setattr(ablation, "COSTLY", 1.2)
    argv = ["--steps=2", "--seeds=1", "--resamples=3", "--device=cpu"]
    argv += [f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    ablation.main(argv)
    table = (tmp_path / "table.md").read_text().splitlines()
    rows = [line.split(" | ")[:2] for line in table[2:]]
    assert rows[:2] == [["| baseline_3scale", "2"], ["| 4scale", "2"]]
    assert rows[2:] == [["| baseline_3scale, cost of 4scale", "3"]]
    assert (tmp_path / "table.png").stat().st_size > 0
    written = (tmp_path / "4scale_2_0/ckpt.pt").stat().st_mtime_ns
    ablation.main(argv)
    assert (tmp_path / "4scale_2_0/ckpt.pt").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="baseline_3scale_2_0 has data_dir=.*another --out_dir"):
        ablation.main([*argv, "--data_dir=elsewhere"])

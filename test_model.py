"""model.py: parity with RVT, invariants of recurrent detectors, recomputation, compilation, and
changes that a fork makes in one place."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import model
from checkpoint import load_rvt, our_name
from conftest import random_events, shared, tiny_detector
from loss import SizeAware, detection_loss
from model import Detector, ModelConfig, reset_state

# ---- model.py

MODEL_VARIANTS = [
    dict(), dict(patch_size=3, fpn_stages=(1, 2, 3, 4)), dict(patch_size=2, fpn_stages=(1, 2)),
    dict(small_object_attention=True), dict(small_object_attention=True, attention_spatial=False),
    dict(small_object_attention=True, attention_temporal=False)]
TWO_BOXES = torch.tensor([[[1.0, 30, 20, 16, 16], [2.0, 10, 30, 6, 8]]])


def rvt_detector(tmp_path, **overrides):
    """What RVT computed on a few frames, and a detector with RVT's weights."""
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    path = tmp_path / "rvt.ckpt"
    torch.save(reference["checkpoint"], path)
    return reference, load_rvt(path, input_hw=(128, 160), partition_split=1, **overrides)


@pytest.mark.parametrize("key, value", [
    ("fpn_stages", (2, 4)), ("fpn_stages", (3, 2)), ("fpn_stages", (4,)), ("patch_size", 5),
    ("embed_dim", 20), ("embed_dim", 0), ("dim_head", 24), ("dim_head", 0),
    ("partition_split", -1), ("partition_split", 100)])
def test_model_config_names_what_cannot_work(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        ModelConfig(**{key: value})


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
    runs = []
    for checkpointing in (False, True):
        detector = tiny_detector(checkpointing=checkpointing, **changes).train()
        kept = {}

        def pack(x):
            if not isinstance(x, torch.nn.Parameter):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            prediction, _ = detector(random_events(3, 2, 20, 48, 64))
            loss = detection_loss(prediction, TWO_BOXES.repeat(6, 1, 1))["loss"]
        loss.backward()
        runs.append((sum(kept.values()), loss.detach(), detector))
    (kept, loss, detector), (kept_again, loss_again, detector_again) = runs
    assert kept_again < 0.5 * kept
    torch.testing.assert_close(loss, loss_again)
    for p, again in zip(detector.parameters(), detector_again.parameters()):
        assert float((p.grad - again.grad).norm()) <= 1e-3 * float(p.grad.norm()) + 1e-6
    for statistics, again in zip(detector.buffers(), detector_again.buffers()):  # moved once
        torch.testing.assert_close(statistics, again, rtol=1e-4, atol=1e-6)
    assert detector.state_dict().keys() == detector_again.state_dict().keys()


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
    for a, b in zip(plain(events)[0], off(events)[0]):
        assert torch.equal(a, b)


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
    for a, b in zip((*prediction, *after), (*fresh, *fresh_after)):
        assert torch.equal(a, b)
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


def test_detector_refuses_frames_of_another_size():
    with pytest.raises(ValueError, match="40x64.*built for .48, 64"):
        tiny_detector()(random_events(1, 1, 20, 40, 64))


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
    for i in range(3):
        joined = torch.cat([part[i] for part in parts])
        torch.testing.assert_close(joined, whole[i], rtol=1e-4, atol=1e-4)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", MODEL_VARIANTS)
def test_detector_streams_do_not_see_each_other(changes):
    detector = tiny_detector(**changes)
    events = random_events(3, 3, 20, 48, 64)
    order = torch.tensor([2, 0, 1])
    other = events.clone()
    other[:, [0, 2]] = random_events(3, 2, 20, 48, 64, seed=1)
    with torch.no_grad():
        prediction, state = detector(events)
        permuted, permuted_state = detector(events[:, order])
        alone, alone_state = detector(events[:, 1:2])
        beside, beside_state = detector(other)
    for i in range(3):
        rows = prediction[i].unflatten(0, (3, 3))
        permuted_rows = permuted[i].unflatten(0, (3, 3))
        torch.testing.assert_close(permuted_rows, rows[:, order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone[i], rows[:, 1], rtol=1e-4, atol=1e-4)
        # to the bit, as the shapes are the same
        assert torch.equal(beside[i].unflatten(0, (3, 3))[:, 1], rows[:, 1])
    for k, s in enumerate(state):
        torch.testing.assert_close(permuted_state[k], s[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone_state[k][0], s[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(beside_state[k][1], s[1])


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
    for p, again in zip(detector.parameters(), twin.parameters()):
        torch.testing.assert_close(again.grad, p.grad, rtol=1e-3, atol=1e-5)
    for statistics, again in zip(detector.buffers(), twin.buffers()):
        torch.testing.assert_close(again, statistics)


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
        for x, want in zip(got, (*prediction, *torch_state), strict=True):
            torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)


# ---- changes in one place

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

"""Tests of loss.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import loss
from conftest import TINY, run_train, tiny_detector
from loss import Assignment, SizeAware, assign, box_iou, detection_loss, focal_loss, size_weights
from model import Prediction

# ---- loss

BOTH = SizeAware(True, 2.5, 256, 1024, "exponential", ("iou", "cls"))


def weights_of(kind, *areas):
    return size_weights(torch.tensor(areas), kind, 2.5, 1024, 9216).tolist()


def test_size_weights_by_hand():
    got = weights_of("exponential", 256.0, 1024.0, 4096.0)
    assert got == pytest.approx([2.5 * math.exp(-0.25), 1, 1], rel=1e-6)
    assert got[0] == pytest.approx(1.947, abs=5e-4)
    got = weights_of("linear", 512.0, 1024.0, 5120.0, 9216.0, 20000.0)
    assert got == pytest.approx([2.5, 2.5, 1.75, 1, 1])
    got = weights_of("step", 512.0, 1024.0, 1025.0, 9216.0, 9217.0)
    assert got == pytest.approx([2.5, 2.5, 1.75, 1.75, 1])
    assert size_weights(torch.zeros(0), "exponential", 2.5, 1024, 9216).shape == (0,)


def test_size_weights_of_2_act_below_27x27():
    below, at = size_weights(torch.tensor([26.0**2, 27.0**2]), "exponential", 2.0, 1024, 9216)
    assert below > 1
    assert at == 1


@pytest.mark.parametrize("key, value", [
    ("weight_type", "cubic"), ("size_aware_terms", ("iou", "box")), ("size_aware_terms", ()),
    ("size_aware_weight", 0.5), ("small_threshold", -1.0), ("small_threshold", 9216.0),
    ("medium_threshold", -1.0), ("medium_threshold", 1024.0)])
def test_size_aware_names_what_cannot_work(key, value):
    with pytest.raises(ValueError, match=f"{key}={value:g}" if isinstance(value, float) else key):
        SizeAware(**{key: value})


def test_size_aware_takes_thresholds_that_the_data_will_set():
    SizeAware(small_threshold=0.0)
    SizeAware(medium_threshold=0.0)
    SizeAware(small_threshold=0.0, medium_threshold=0.0)


def test_size_weights_of_ones_own_train(traffic, tmp_path, monkeypatch):
    def inverse(area, kind, weight, small, medium):
        return 1 + (weight - 1) * small / (small + area)

    monkeypatch.setattr(loss, "size_weights", inverse)
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1",
                     "--size_aware_loss=True", "--weight_type=inverse") == 0


def test_box_iou_by_hand():
    one = torch.tensor([10.0, 10, 4, 4])
    others = torch.tensor([[10.0, 10, 4, 4], [12, 10, 4, 4], [12, 12, 4, 4], [30, 10, 4, 4], [10, 10, 0, 0]])
    assert box_iou(one, others).tolist() == pytest.approx([1, 8 / 24, 4 / 28, 0, 0])
    assert box_iou(torch.zeros(4), torch.zeros(4)) == 0


def overlap_by_definition(a, b):
    width = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    height = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    overlap = max(width, 0) * max(height, 0)
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def simota_by_definition(box, obj, cls, grid, targets):
    """One image, box and anchor after the other: {anchor: (box, IoU)} of a frame."""
    near, iou, cost, claims, matched = {}, {}, {}, {}, {}
    boxes = [row for row in targets.tolist() if row[3] > 0]
    for a, (x, y, stride) in enumerate(grid.tolist()):
        for m, (_, cx, cy, _, _) in enumerate(boxes):
            if max(abs((x + 0.5) * stride - cx), abs((y + 0.5) * stride - cy)) < 1.5 * stride:
                near.setdefault(a, set()).add(m)
    for a in near:
        p = [math.sqrt(float(p_obj)) for p_obj in obj[a].sigmoid() * cls[a].sigmoid()]
        for m, (label, *xywh) in enumerate(boxes):
            iou[m, a] = overlap_by_definition(xywh, box[a].tolist())
            entropy = -sum(math.log(q if k == label else 1 - q) for k, q in enumerate(p))
            cost[m, a] = entropy - 3 * math.log(iou[m, a] + 1e-8) + (0 if m in near[a] else 1e6)
    for m in range(len(boxes)):
        best = sorted((iou[m, a] for a in near), reverse=True)[:10]
        for a in sorted(near, key=lambda a: cost[m, a])[:max(1, int(sum(best)))]:
            claims.setdefault(a, []).append(m)
    for a, (m, *others) in claims.items():
        if others:
            m = min(range(len(boxes)), key=lambda m: cost[m, a])
        matched[a] = (m, iou[m, a])
    return matched


def grid_of(*strides, height=64, width=96):
    cells = [(x, y, stride) for stride in strides for y in range(height // stride) for x in range(width // stride)]
    return torch.tensor(cells, dtype=torch.float)


def random_boxes(N, M, generator):
    boxes = torch.rand(N, M, 5, generator=generator) * torch.tensor([2.99, 96, 64, 40, 40])
    boxes[..., 0] = boxes[..., 0].floor()
    boxes[..., 3:] += 4
    return boxes


def random_prediction(N, grid, generator):
    A = len(grid)
    centre = (grid[:, :2] + 0.5) * grid[:, 2:] + 4 * torch.randn(N, A, 2, generator=generator)
    size = grid[:, 2:] * (0.75 + 1.5 * torch.rand(N, A, 2, generator=generator))
    obj = torch.randn(N, A, generator=generator)
    return Prediction(torch.cat((centre, size), -1), obj, torch.randn(N, A, 3, generator=generator), grid)


ODD_BOXES = torch.tensor([
    [[0, 16, 24, 20, 12], [1, 16, 24, 10, 30], [2, 40, 32, 8, 8], [1, 90, 60, 30, 30]],  # on borders, one centre
    [[2, -3, 10, 20, 20], [0, 95, 63, 12, 12], [1, 20, 64, 10, 10], [0, 0, 0, 0, 0]],  # outside, padding
    [[1, 33.3, 41.7, 25, 9], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    [[0, 0, 0, 0, 0]] * 4])


def assert_simota(prediction, targets):
    found = assign(prediction, targets)
    for n in range(len(targets)):
        want = simota_by_definition(*[field[n] for field in prediction[:3]], prediction.grid, targets[n])
        at = found.matched[n].nonzero()[:, 0]
        assert sorted(found.anchor[n, at].tolist()) == sorted(want)
        for a, m, iou in zip(*[field[n, at].tolist() for field in (found.anchor, found.box, found.iou)]):
            assert m == want[a][0]
            assert iou == pytest.approx(want[a][1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16)])  # more and fewer candidates than anchors
@pytest.mark.parametrize("seed", range(4))
def test_assign_simota_equals_its_slow_definition(seed, strides):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat((ODD_BOXES, random_boxes(4, 4, generator)))
    assert_simota(random_prediction(len(targets), grid_of(*strides), generator), targets)


def test_assign_over_all_anchors_is_a_change_in_one_place(traffic, tmp_path, monkeypatch):
    def best_overlap(prediction, targets):  # each box takes the anchor that overlaps it most
        iou = box_iou(prediction.box_cxcywh[:, :, None], targets[:, None, :, 1:])  # (N, A, M)
        taken = (iou == iou.amax(1, keepdim=True)) & (iou > 0)
        anchor = torch.arange(iou.shape[1]).expand(len(iou), -1)
        return Assignment(anchor, taken.any(2), taken.int().argmax(2), iou.amax(2))

    monkeypatch.setattr(loss, "assign", torch.no_grad()(best_overlap))
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0


def test_focal_loss_by_hand():
    p = torch.tensor([0.9, 0.2])
    got = focal_loss(p.logit(), torch.tensor([1.0, 0.0]))
    assert got.tolist() == pytest.approx([0.25 * 0.01 * -math.log(0.9), 0.75 * 0.04 * -math.log(0.8)], rel=1e-4)


def loss_prediction():
    generator = torch.Generator().manual_seed(0)
    grid = tiny_detector().grid
    box = torch.cat(((grid[:, :2] + 0.5) * grid[:, 2:], grid[:, 2:].repeat(1, 2)), 1)
    box = box + torch.rand(2, len(grid), 4, generator=generator)
    obj = torch.randn(2, len(grid), generator=generator)
    cls = torch.randn(2, len(grid), 3, generator=generator)
    return Prediction(box.requires_grad_(), obj.requires_grad_(), cls.requires_grad_(), grid)


THREE_BOXES = torch.tensor([[[0, 20.0, 20, 12, 14], [2, 44, 30, 20, 9]], [[1, 12, 40, 8, 8], [0, 0, 0, 0, 0]]])


def losses_by_definition(prediction, targets, aware):
    """Losses with the anchors taken one by one: plain, size-aware."""
    plain, weighted = {"iou": 0.0, "cls": 0.0}, {"iou": 0.0, "cls": 0.0}
    is_object = torch.zeros_like(prediction.obj)
    for n in range(len(targets)):
        fields = [field[n].detach() for field in prediction[:3]]
        for a, (m, iou) in simota_by_definition(*fields, prediction.grid, targets[n]).items():
            label, _, _, w, h = targets[n, m].tolist()
            onehot = F.one_hot(torch.tensor(int(label)), 3).float()
            weight = min(max(aware.size_aware_weight * math.exp(-w * h / aware.small_threshold), 1),
                         aware.size_aware_weight)
            entropy = F.binary_cross_entropy_with_logits(fields[2][a], onehot * iou, reduction="sum")
            plain["iou"] += 5 * (1 - iou**2)
            plain["cls"] += float(entropy)
            weighted["iou"] += 5 * weight * (1 - iou**2)
            weighted["cls"] += weight * float(focal_loss(fields[2][a], onehot).sum())
            is_object[n, a] = 1
    obj = float(F.binary_cross_entropy_with_logits(prediction.obj, is_object, reduction="sum"))
    matched = float(is_object.sum())
    for losses in (plain, weighted):
        losses["obj"] = obj
        losses["loss"] = losses["iou"] + obj + losses["cls"]
        for key in losses:
            losses[key] = pytest.approx(losses[key] / matched, rel=1e-5)
        losses["num_fg"] = pytest.approx(matched / 3)
    return plain, weighted


def test_detection_loss_equals_its_formulas_written_out():
    prediction = loss_prediction()
    plain, weighted = losses_by_definition(prediction, THREE_BOXES, BOTH)
    assert {key: float(x) for key, x in detection_loss(prediction, THREE_BOXES).items()} == plain
    assert {key: float(x) for key, x in detection_loss(prediction, THREE_BOXES, BOTH).items()} == weighted
    only = SizeAware(True, 2.5, 256, 1024, "exponential", ("iou",))
    got = detection_loss(prediction, THREE_BOXES, only)
    assert float(got["iou"]) == weighted["iou"]
    assert float(got["cls"]) == plain["cls"]


@pytest.mark.parametrize("aware", [
    SizeAware(), SizeAware(True, 1.0), SizeAware(True, 1.0, weight_type="linear"),
    SizeAware(True, 1.0, weight_type="step")])
def test_detection_loss_with_a_weight_of_one_or_switched_off_is_the_plain_one(aware):
    prediction = loss_prediction()
    assert detection_loss(prediction, THREE_BOXES, aware) == detection_loss(prediction, THREE_BOXES)


@pytest.mark.parametrize("M", [0, 4])
def test_detection_loss_without_boxes_trains_the_objectness_only(M):
    prediction = loss_prediction()
    losses = detection_loss(prediction, torch.zeros(2, M, 5), BOTH)
    losses["loss"].backward()
    assert losses["iou"] == losses["cls"] == 0
    assert losses["obj"].isfinite()
    assert losses["num_fg"] == 1
    assert prediction.obj.grad.abs().sum() > 0
    assert prediction.box_cxcywh.grad.abs().sum() == 0


def test_detection_loss_does_not_depend_on_padding_or_the_order_of_frames():
    prediction = loss_prediction()
    want = detection_loss(prediction, THREE_BOXES)["loss"]
    padded = F.pad(THREE_BOXES, (0, 0, 0, 15))
    torch.testing.assert_close(detection_loss(prediction, padded)["loss"], want)
    swapped = Prediction(*[field.flip(0) for field in prediction[:3]], prediction.grid)
    torch.testing.assert_close(detection_loss(swapped, THREE_BOXES.flip(0))["loss"], want)

"""Tests of loss.py."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

import loss
from conftest import TINY, run_train
from loss import Assignment, SizeAware, box_iou, detection_loss, focal_loss, size_weights
from model import Prediction

# ---- loss


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


@pytest.mark.parametrize("wrong", [
    {"weight_type": "cubic"}, {"size_aware_terms": ("iou", "box")}, {"size_aware_terms": ()},
    {"size_aware_weight": 0.5}, {"small_threshold": -1}, {"small_threshold": 9216},
    {"medium_threshold": -1}, {"medium_threshold": 1024}])
def test_size_aware_names_what_cannot_work(wrong):
    [(key, value)] = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
        SizeAware(**wrong)


def test_size_weights_of_ones_own_train(traffic, tmp_path, monkeypatch):
    def inverse(area, kind, weight, small, medium):
        return 1 + (weight - 1) * small / (small + area)

    monkeypatch.setattr(loss, "size_weights", inverse)
    options = ("--max_steps=1", "--size_aware_loss=True", "--weight_type=inverse")
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", *options) == 0


def test_box_iou_by_hand():
    one = torch.tensor([10.0, 10, 4, 4])
    others = torch.tensor([[10.0, 10, 4, 4], [12, 10, 4, 4], [12, 12, 4, 4], [30, 10, 4, 4]])
    assert box_iou(one, others).tolist() == pytest.approx([1, 8 / 24, 4 / 28, 0])
    assert box_iou(torch.zeros(4), torch.zeros(4)) == 0


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


def random_frames(targets, strides, seed):
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


PAD, ANY = [0.0] * 5, [math.nan] * 5
FRAMES = [
    [[0, 16, 24, 20, 12], [1, 16, 24, 10, 30], [2, 40, 32, 8, 8], [1, 90, 60, 30, 30]],  # borders
    [[2, -3, 10, 20, 20], [0, 95, 63, 12, 12], [1, 20, 64, 10, 10], PAD],  # outside, padding
    [[1, 33.3, 41.7, 25, 9], PAD, PAD, PAD], [PAD] * 4, [ANY] * 4, [ANY] * 4, [ANY] * 3 + [PAD]]


@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16), (1, 2)])  # few anchors and many
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("targets", [FRAMES, [[ANY] * (2 * loss.CHUNK + 6)]])
def test_assign_simota_equals_its_slow_definition(targets, seed, strides):
    prediction, targets = random_frames(targets, strides, seed)
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
    loss.assign(*random_frames([[ANY] * 300], strides, 0))
    assert max(pairs) == (loss.CHUNK, most + 1)


def test_assign_over_all_anchors_is_a_change_in_one_place(traffic, tmp_path, monkeypatch):
    @torch.no_grad()
    def best_overlap(prediction, targets):  # each box takes the anchor that overlaps it most
        iou = box_iou(prediction.box_cxcywh[:, :, None], targets[:, None, :, 1:])  # (N, A, M)
        taken = (iou == iou.amax(1, keepdim=True)) & (iou > 0)
        anchor = torch.arange(iou.shape[1]).expand(len(iou), -1)
        return Assignment(anchor, taken.any(2), taken.int().argmax(2), iou.amax(2))

    monkeypatch.setattr(loss, "assign", best_overlap)
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0


def test_focal_loss_by_hand():
    p = torch.tensor([0.9, 0.2])
    got = focal_loss(p.logit(), torch.tensor([1.0, 0.0])).tolist()
    want = [0.25 * 0.01 * -math.log(0.9), 0.75 * 0.04 * -math.log(0.8)]
    assert got == pytest.approx(want, rel=1e-4)


BOTH = SizeAware(True, 2.5, 256, 1024, "exponential", ("iou", "cls"))


@pytest.fixture
def scene():
    boxes = [[[0, 20.0, 20, 12, 14], [2, 44, 30, 20, 9]], [[1, 12, 40, 8, 8], PAD]]
    return random_frames(boxes, (8, 16, 32), 0)


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

"""Predictions and boxes -> losses: SimOTA, IoU, objectness and class terms, size-aware weights.

In: a Prediction of model.py and targets (N, M, 5). Out: a dict of named scalars. All frames are
assigned in one batch, over each frame's few candidate anchors only.
Sources: YOLOX, arXiv 2107.08430; OTA, arXiv 2103.14259.

    losses = detection_loss(prediction, targets); losses["loss"].backward()
"""

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LEVELS = 4  # of a pyramid, at most, each of half the rows and columns of the one before
MAX_CLAIMS = 10  # anchors that a box can claim
CHUNK = 32  # boxes of a frame that are compared with its candidates at once
Assignment = namedtuple("Assignment", "anchor matched box iou")


def size_weights(area, kind, weight, small, medium):
    """Loss weight of a box by its area, 1 for large ones and up to `weight` for small ones.

    area (...) in input pixels^2  ->  weights (...)
    kind: "exponential": weight * exp(-area / small), kept within 1 and weight; "linear": weight up
    to small, falling linearly to 1 at medium; "step": weight up to small, (1 + weight) / 2 up to
    medium, 1 above. ValueError for another kind.
    Source: the experiment notes; the linear and step forms are ours.
    """
    if kind == "exponential":
        return (weight * torch.exp(-area / small)).clamp(1, weight)
    if kind == "linear":
        share = ((medium - area) / (medium - small)).clamp(0, 1)
    elif kind == "step":
        share = 0.5 * (area <= small) + 0.5 * (area <= medium)
    else:
        raise ValueError(f"weight_type={kind!r}: expected exponential, linear or step")
    return 1 + (weight - 1) * share


@dataclass
class SizeAware:
    """Settings of the size-aware loss: config keys, declared here and nowhere else."""

    size_aware_loss: bool = False       # on or off
    size_aware_weight: float = 2.0      # of the smallest boxes, 1 or more
    small_threshold: float = 1024.0     # area in input pixels^2
    medium_threshold: float = 9216.0    # area in input pixels^2
    weight_type: str = "exponential"    # exponential | linear | step
    size_aware_terms: tuple = ("iou",)  # what is weighted: iou, cls (a focal class term), or both

    def __post_init__(self):
        """ValueError, naming key and value, for what cannot work."""
        self.weights(torch.ones(1))  # knows the weight types
        if (
            self.size_aware_weight < 1
            or not 0 < self.small_threshold < self.medium_threshold
            or self.size_aware_terms not in (("iou",), ("cls",), ("iou", "cls"), ("cls", "iou"))
        ):
            raise ValueError(
                f"{self}: expected a weight of 1 or more, two areas of which the first is the "
                "smaller one, and for terms iou, cls or both"
            )

    def weights(self, area):
        """size_weights of boxes of `area` under these settings."""
        return size_weights(
            area,
            self.weight_type,
            self.size_aware_weight,
            self.small_threshold,
            self.medium_threshold,
        )


def area_of(size):
    """Width times height of sizes (..., 2); prod would synchronise in its backward pass."""
    return size[..., 0] * size[..., 1]


def box_iou(a, b):
    """Intersection over union of boxes a and b (..., 4) as cx, cy, w, h, broadcast.

    0 where both are empty.
    """
    centre_a, size_a = a.split(2, dim=-1)
    centre_b, size_b = b.split(2, dim=-1)
    low = torch.maximum(centre_a - size_a / 2, centre_b - size_b / 2)
    high = torch.minimum(centre_a + size_a / 2, centre_b + size_b / 2)
    overlap = area_of((high - low).clamp(min=0))
    union = area_of(size_a) + area_of(size_b) - overlap
    return overlap / (union + 1e-16)


def take(x, index):
    """Rows of x (N, R, C) at index (N, U) of R, frame by frame -> (N, U, C)."""
    # take_along_dim would recompile for each N
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def is_box(targets):
    """Which rows of targets (N, M, 5) are no padding -> (N, M) bool."""
    return targets[..., 3:].amin(-1) > 0


def candidate_anchors(grid, targets):
    """Candidates of each frame: anchors whose cell centre is near the centre of any of its boxes.

    Near is strictly within 1.5 strides along each axis: at most 9 anchors a level and box.
    grid (A, 3) cell x, cell y, stride; targets (N, M, 5)
    -> anchor (N, U) int64; valid (N, U) bool, on for candidates, each once; own (N, M, 9 * LEVELS),
    the places in U of each box's candidates, filled with a place that is not valid.
    U = 9 * LEVELS * M + 1, or at most A + 1 where frames are crowded; the last is never valid.
    The levels are found on the device: no synchronisation.
    """
    A = len(grid)
    # cells to look at: on each level 3 x 3 around the one that holds the centre of a box
    level = torch.arange(LEVELS, device=grid.device)
    step = torch.arange(-1, 2, device=grid.device)
    probe = torch.cartesian_prod(level, step, step)  # (P, 3), P = 9 * LEVELS

    # of their levels: the stride, twice the one before; the first anchor; columns and rows
    stride = grid[0, 2] * 2 ** probe[:, :1]  # (P, 1)
    first = (grid[:, 2] < stride).sum(1)  # (P,), A where the pyramid has no such level
    size = ((grid[:, :2] + 1) * grid[:, 2:]).amax(0) // stride  # (P, 2)

    # the anchors there that are near enough, A for none; absent levels have larger numbers
    middle = targets[:, :, None, 1:3]  # (N, M, 1, 2)
    cell = (middle / stride).floor() + probe[:, 1:]  # (N, M, P, 2)
    centre = (cell + 0.5) * stride
    reach = 1.5 * stride
    near = (centre > middle - reach) & (centre < middle + reach)
    near &= (cell >= 0) & (cell < size)
    near = near.all(-1) & is_box(targets)[..., None]  # (N, M, P)
    anchor = first + (cell[..., 0] + cell[..., 1] * size[..., 0]).long()
    anchor = torch.where(near, anchor, A).clamp(max=A)  # (N, M, P)

    # one list for all boxes of a frame
    listed = anchor.flatten(1).sort(dim=1).values
    if listed.shape[1] > max(A, MAX_CLAIMS):
        # crowded: each anchor once, and no more of a level than it has: of A anchors the nth finest
        # of LEVELS has at most 3 * A / (4**n - 1), since each has a quarter of the one before
        repeated = F.pad(listed[:, 1:] == listed[:, :-1], (1, 0))
        listed = torch.where(repeated, A, listed).sort(dim=1).values
        most = sum(
            min(9 * targets.shape[1], 3 * A // (4**n - 1))
            for n in range(1, LEVELS + 1)
        )
        listed = listed[:, : max(MAX_CLAIMS, min(A, most))]  # a box may claim MAX_CLAIMS
    listed = F.pad(listed, (0, 1), value=A)  # (N, U)
    own = torch.searchsorted(listed, anchor.flatten(1))
    valid = torch.zeros_like(listed).scatter(1, own, 1).bool() & (listed < A)
    return listed.clamp(max=A - 1), valid, own.view_as(anchor)


def claim(target, own, predicted, cost_cls):
    """What some boxes claim, and for each candidate the cheapest of them.

    target (N, M, 5), own (N, M, 9 * LEVELS), predicted boxes (N, U, 4), cost_cls (N, K, U)
    -> places in U (N, M, MAX_CLAIMS), filled with the last; cost (N, U) and index (N, U) of the
    cheapest
    """
    iou = box_iou(target[:, :, None, 1:], predicted[:, None])  # (N, M, U)
    count = iou.topk(MAX_CLAIMS).values.sum(-1, keepdim=True).int().clamp(min=1)  # (N, M, 1)

    # in place, since memory is what takes time here
    cost = take(cost_cls, target[..., 0].long())  # (N, M, U)
    cost -= iou.add_(1e-8).log_().mul_(3)
    cost += torch.full_like(cost, 1e6).scatter_(2, own, 0)  # for what is not its own

    place = cost.topk(MAX_CLAIMS, largest=False).indices
    chosen = torch.arange(MAX_CLAIMS, device=cost.device) < count
    chosen &= is_box(target)[..., None]
    last = cost.shape[2] - 1
    return torch.where(chosen, place, last), *cost.min(1)


@torch.no_grad()
def assign(prediction, targets):
    """SimOTA: which anchors answer for which box, from the cost of letting them.

    prediction: box_cxcywh (N, A, 4), obj (N, A), cls (N, A, K), grid (A, 3)
    targets (N, M, 5), zero rows padding
    -> Assignment(anchor (N, U), matched (N, U) bool, box (N, U) index into M, iou (N, U) with it)
    A box claims its cheapest candidates; where it has too few, others' too. An anchor that several
    boxes claim goes to the box of the frame that is cheapest there. Frames without boxes match
    nothing. Another assigner may well return all anchors, U = A.
    """
    anchor, valid, own = candidate_anchors(prediction.grid, targets)

    # what is no candidate overlaps nothing and costs infinitely much
    boxes = take(prediction.box_cxcywh, anchor)
    predicted = torch.where(valid[..., None], boxes, 0)  # (N, U, 4)
    predicted = predicted.mT.contiguous().mT  # coordinates apart in memory: IoUs take half the time
    p_obj = take(prediction.obj[..., None], anchor).sigmoid()
    probability = (take(prediction.cls, anchor).sigmoid() * p_obj).sqrt()  # (N, U, K)
    log_yes = probability.log().clamp(min=-100)
    log_no = (1 - probability).log().clamp(min=-100)
    cost_cls = log_no - log_yes - log_no.sum(-1, keepdim=True)
    cost_cls = torch.where(valid[..., None], cost_cls, torch.inf).mT.contiguous()  # (N, K, U)

    # chunks of boxes, so that memory grows with the candidates, not with their pairs with boxes
    chunks = zip(targets.split(CHUNK, 1), own.split(CHUNK, 1))
    parts = [claim(*chunk, predicted, cost_cls) for chunk in chunks]
    places, lowest, cheapest = zip(*parts)
    part = torch.stack(lowest).argmin(0, keepdim=True)  # (1, N, U)
    cheapest = CHUNK * part + torch.stack(cheapest).gather(0, part)

    # each anchor to its only claimant, or to the cheapest box
    places = torch.cat(places, 1).flatten(1)  # (N, M * MAX_CLAIMS)
    claimant = torch.arange(places.shape[1], device=own.device) // MAX_CLAIMS
    zeros = torch.zeros_like(anchor)
    claims = zeros.scatter_add(1, places, torch.ones_like(places))
    only = zeros.scatter(1, places, claimant.expand_as(places))
    box = torch.where(claims > 1, cheapest[0], only)
    iou = box_iou(predicted, take(targets, box)[..., 1:])
    return Assignment(anchor, (claims > 0) & valid, box, iou)


def focal_loss(logits, onehot):
    """Focal loss with alpha 0.25 and gamma 2, elementwise.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 5.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    alpha = 0.75 - 0.5 * onehot
    return alpha * (onehot - logits.sigmoid()) ** 2 * cross_entropy


def detection_loss(prediction, targets, size_aware=None):
    """Training losses of a batch of frames, in float32 as a Detector's predictions are.

    No operator here computes in another type under autocast.
    prediction: box_cxcywh (N, A, 4) pixels, obj (N, A) and cls (N, A, K) logits, grid (A, 3)
    targets (N, M, 5): class, cx, cy, w, h in pixels; rows of zeros are padding
    size_aware: SizeAware; None, or size_aware_loss off, is the plain loss
    -> dict of scalars: loss = iou + obj + cls, each summed and divided by the matched anchors of
    the batch; num_fg = matched anchors a box, for the log. Without any box the divisor is 1 and
    only the objectness is trained. Weights act on the IoU term ("iou") and on a focal class term
    in place of the plain one ("cls").
    """
    if targets.shape[1] == 0:
        targets = targets.new_zeros(len(targets), 1, 5)
    found = assign(prediction, targets)
    num_matched = found.matched.sum().clamp(min=1)
    num_boxes = is_box(targets).sum().clamp(min=1)

    # each anchor beside the box it answers for
    target = take(targets, found.box)  # (N, U, 5)
    box = take(prediction.box_cxcywh, found.anchor)  # (N, U, 4)
    logits = take(prediction.cls, found.anchor)  # (N, U, K)
    onehot = F.one_hot(target[..., 0].long(), logits.shape[-1]).float()

    iou = 1 - box_iou(box, target[..., 1:]) ** 2  # (N, U)
    quality = onehot * found.iou[..., None]
    cls = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    cls = cls.sum(-1)
    if size_aware is not None and size_aware.size_aware_loss:
        weight = size_aware.weights(area_of(target[..., 3:]))
        if "iou" in size_aware.size_aware_terms:
            iou = weight * iou
        if "cls" in size_aware.size_aware_terms:
            cls = weight * focal_loss(logits, onehot).sum(-1)

    # an anchor may be listed more than once, but is matched once at most
    is_object = torch.zeros_like(prediction.obj)
    is_object.scatter_add_(1, found.anchor, found.matched.float())
    obj = F.binary_cross_entropy_with_logits(prediction.obj, is_object, reduction="sum")
    obj = obj / num_matched
    iou = 5 * torch.where(found.matched, iou, 0).sum() / num_matched
    cls = torch.where(found.matched, cls, 0).sum() / num_matched
    return {
        "loss": iou + obj + cls,
        "iou": iou,
        "obj": obj,
        "cls": cls,
        "num_fg": num_matched / num_boxes,
    }

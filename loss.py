"""Predictions and boxes -> losses: SimOTA assignment, IoU, objectness and class terms, size-aware weights.

In: a Prediction of model.py and targets (N, M, 5). Out: a dict of named scalars. All frames and boxes are assigned
in one batch, over each frame's few candidate anchors only. Sources: YOLOX, arXiv 2107.08430; OTA, arXiv 2103.14259.

    losses = detection_loss(prediction, targets); losses["loss"].backward()
"""

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LEVELS = 4  # of a pyramid, at most; one with fewer leaves the others without cells
MOST = 10   # anchors that one box can claim
Assignment = namedtuple("Assignment", "anchor matched box iou")


def size_weights(area, kind, weight, small, medium):
    """Loss weight of a box by its area, 1 for large ones and up to `weight` for small ones.

    area (...) in input pixels^2  ->  weights (...)
    kind: "exponential": weight * exp(-area / small), kept within 1 and weight; "linear": weight up to small, falling
    linearly to 1 at medium; "step": weight up to small, (1 + weight) / 2 up to medium, 1 above.
    Source: the experiment notes; the linear and step forms are ours. ValueError for another kind.
    """
    if kind == "exponential":
        return (weight * torch.exp(-area / small)).clamp(1, weight)
    if kind == "linear":
        share = (medium - area) / (medium - small)
        return 1 + (weight - 1) * share.clamp(0, 1)
    if kind == "step":
        share = 0.5 * (area <= small) + 0.5 * (area <= medium)
        return 1 + (weight - 1) * share
    raise ValueError(f"weight_type={kind!r}: expected exponential, linear or step")


@dataclass
class SizeAware:
    """Settings of the size-aware loss. The fields are config keys, declared here and nowhere else."""

    size_aware_loss: bool = False       # on or off
    size_aware_weight: float = 2.0      # of the smallest boxes, 1 or more
    small_threshold: float = 1024.0     # area in input pixels^2; 0: a tercile of the data set's
    medium_threshold: float = 9216.0    # area in input pixels^2; 0: a tercile of the data set's
    weight_type: str = "exponential"    # exponential | linear | step
    size_aware_terms: tuple = ("iou",)  # what is weighted: iou, cls (a focal class term), or both

    def __post_init__(self):
        """ValueError, naming key and value, for what cannot work."""
        self.weights(torch.ones(1))  # knows the weight types
        if self.size_aware_terms not in (("iou",), ("cls",), ("iou", "cls"), ("cls", "iou")):
            raise ValueError(f"size_aware_terms={self.size_aware_terms}: expected iou, cls or both")
        if self.size_aware_weight < 1:
            raise ValueError(f"size_aware_weight={self.size_aware_weight}: below 1")
        small, medium = self.small_threshold, self.medium_threshold
        if min(small, medium) < 0 or 0 < medium <= small:
            raise ValueError(f"small_threshold={small:g}, medium_threshold={medium:g}: expected areas, "
                             "the small one below the medium one; 0 is a tercile of the data set's")

    def weights(self, area):
        """size_weights of boxes of `area` under these settings."""
        return size_weights(area, self.weight_type, self.size_aware_weight,
                            self.small_threshold, self.medium_threshold)


def box_iou(a, b):
    """Intersection over union of boxes a and b (..., 4) as cx, cy, w, h, broadcast; 0 where both are empty."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    # prod would synchronise in its backward pass
    overlap_w, overlap_h = (high - low).clamp(min=0).unbind(-1)
    overlap = overlap_w * overlap_h
    area_a = a[..., 2] * a[..., 3]
    area_b = b[..., 2] * b[..., 3]
    return overlap / (area_a + area_b - overlap + 1e-16)


def take(x, index):
    """Rows of x (N, R, C) at index (N, U) of R, frame by frame -> (N, U, C)."""
    # take_along_dim would recompile for each N
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def candidate_anchors(grid, box, exists):
    """Distinct anchors of each frame that lie near any of its boxes, at most 9 a level and box.

    grid (A, 3) cell x, cell y, stride; box (N, M, 4), exists (N, M) bool  ->  anchor (N, U) int64 in ascending order
    and valid (N, U) bool, U = M * 9 * LEVELS. The levels are found on the device: no synchronisation.
    """
    A = len(grid)
    step = torch.arange(-1, 2, device=grid.device)
    around = torch.cartesian_prod(step, step)  # (9, 2)

    # each level's stride, twice the one before; its first anchor; its columns and rows
    stride = grid[0, 2] * 2 ** torch.arange(LEVELS, device=grid.device)  # (L,)
    first = (grid[:, 2] < stride[:, None]).sum(1)  # (L,)
    on_level = (grid[:, 2] == stride[:, None])[..., None]  # (L, A, 1)
    size = torch.where(on_level, grid[:, :2] + 1, 0).amax(1).long()  # (L, 2)

    # the cells around each box centre
    cell = (box[:, :, None, :2] / stride[:, None]).floor().long()  # (N, M, L, 2)
    cell = cell[..., None, :] + around  # (N, M, L, 9, 2)
    inside = ((cell >= 0) & (cell < size[:, None])).all(-1) & exists[..., None, None]  # (N, M, L, 9)
    anchor = first[:, None] + cell[..., 1] * size[:, :1] + cell[..., 0]

    # anchors outside the frame go to the end, duplicates to places side by side
    anchor = torch.where(inside, anchor, A).flatten(1).sort(dim=1).values  # (N, U)
    duplicate = F.pad(anchor[:, 1:] == anchor[:, :-1], (1, 0))
    return anchor.clamp(max=A - 1), (anchor < A) & ~duplicate


@torch.no_grad()
def assign(prediction, targets):
    """SimOTA: which anchors answer for which box, from the cost of letting them.

    prediction: box_cxcywh (N, A, 4), obj (N, A), cls (N, A, K), grid (A, 3); targets (N, M, 5), zero rows padding
    -> Assignment(anchor (N, U), matched (N, U) bool, box (N, U) index into M, iou (N, U) with that box)
    A candidate's cell centre lies strictly within 1.5 strides of a box centre. An anchor that several boxes claim goes
    to the box of the frame that is cheapest there. Boxes without a candidate of their own claim those of others; frames
    without boxes match nothing. Another assigner may return all A anchors, U = A.
    """
    box = targets[..., 1:]
    exists = box[..., 2:].amin(-1) > 0  # (N, M)
    anchor, valid = candidate_anchors(prediction.grid, box, exists)

    # whose candidate an anchor is
    cell = prediction.grid[anchor]  # (N, U, 3)
    centre = (cell[..., :2] + 0.5) * cell[..., 2:]  # (N, U, 2)
    reach = 1.5 * cell[..., 2:]  # (N, U, 1)
    low = box[:, :, None, :2] - reach[:, None]  # (N, M, U, 2)
    high = box[:, :, None, :2] + reach[:, None]
    own = ((centre[:, None] > low) & (centre[:, None] < high)).all(-1)  # (N, M, U)
    valid = valid & (own & exists[..., None]).any(1)
    pair = valid[:, None] & exists[..., None]  # (N, M, U)

    # what it costs that an anchor answers for a box
    iou = box_iou(box[:, :, None], take(prediction.box_cxcywh, anchor)[:, None])
    iou = torch.where(pair, iou, 0)
    p_obj = take(prediction.obj[..., None], anchor).sigmoid()
    probability = (take(prediction.cls, anchor).sigmoid() * p_obj).sqrt()  # (N, U, K)
    log_yes = probability.log().clamp(min=-100)
    log_no = (1 - probability).log().clamp(min=-100)
    label = targets[..., :1].long().expand(-1, -1, anchor.shape[1])  # (N, M, U)
    cost_cls = (log_no - log_yes).mT.gather(1, label) - log_no.sum(-1)[:, None]
    cost = cost_cls - 3 * (iou + 1e-8).log() + 1e6 * ~own
    cost = torch.where(pair, cost, torch.inf)

    # each box claims its cheapest anchors
    count = iou.topk(MOST).values.sum(-1).int().clamp(min=1)  # (N, M)
    cheapest, where = cost.topk(MOST, largest=False)  # (N, M, MOST)
    chosen = torch.arange(MOST, device=cost.device) < count[..., None]
    claimed = torch.zeros_like(pair).scatter(2, where, chosen & cheapest.isfinite())

    claims = claimed.sum(1)  # (N, U)
    winner = torch.where(claims > 1, cost.argmin(1), claimed.int().argmax(1))
    return Assignment(anchor, claims > 0, winner, iou.gather(1, winner[:, None])[:, 0])


def focal_loss(logits, onehot):
    """Focal loss with alpha 0.25 and gamma 2, elementwise. Source: Lin et al. 2017, arXiv 1708.02002, equation 5."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    p = logits.sigmoid()
    p_true = p * onehot + (1 - p) * (1 - onehot)
    alpha = 0.25 * onehot + 0.75 * (1 - onehot)
    return alpha * (1 - p_true) ** 2 * cross_entropy


def detection_loss(prediction, targets, size_aware=None):
    """Training losses of a batch of frames, in float32 whatever the autocast.

    prediction: box_cxcywh (N, A, 4) pixels, obj (N, A) and cls (N, A, K) logits, grid (A, 3)
    targets (N, M, 5): class, cx, cy, w, h in pixels; rows of zeros are padding
    size_aware: SizeAware; None, or size_aware_loss off, is the plain loss
    -> dict of scalars: loss = iou + obj + cls, each summed and divided by the matched anchors of the batch;
    num_fg = these per box, for the log. Without any box the divisor is 1 and only the objectness is trained.
    Weights act on the IoU term ("iou") and on a focal class term in place of the plain one ("cls").
    """
    with torch.autocast(targets.device.type, enabled=False):
        prediction = type(prediction)(*[field.float() for field in prediction])
        targets = targets.float()
        if targets.shape[1] == 0:
            targets = targets.new_zeros(len(targets), 1, 5)
        found = assign(prediction, targets)
        num_matched = found.matched.sum().clamp(min=1)
        num_boxes = (targets[..., 3:].amin(-1) > 0).sum().clamp(min=1)

        # each anchor beside the box it answers for
        target = take(targets, found.box)  # (N, U, 5)
        box = take(prediction.box_cxcywh, found.anchor)  # (N, U, 4)
        logits = take(prediction.cls, found.anchor)  # (N, U, K)
        onehot = F.one_hot(target[..., 0].long(), logits.shape[-1]).float()

        iou = 1 - box_iou(box, target[..., 1:]) ** 2  # (N, U)
        quality = onehot * found.iou[..., None]
        cls = F.binary_cross_entropy_with_logits(logits, quality, reduction="none").sum(-1)
        if size_aware is not None and size_aware.size_aware_loss:
            weight = size_aware.weights(target[..., 3] * target[..., 4])
            if "iou" in size_aware.size_aware_terms:
                iou = weight * iou
            if "cls" in size_aware.size_aware_terms:
                cls = weight * focal_loss(logits, onehot).sum(-1)

        # duplicates of an anchor are unmatched and add nothing
        is_object = torch.zeros_like(prediction.obj).scatter_add(1, found.anchor, found.matched.float())
        obj = F.binary_cross_entropy_with_logits(prediction.obj, is_object, reduction="sum") / num_matched
        iou = 5 * torch.where(found.matched, iou, 0).sum() / num_matched
        cls = torch.where(found.matched, cls, 0).sum() / num_matched
        return {"loss": iou + obj + cls, "iou": iou, "obj": obj, "cls": cls,
                "num_fg": num_matched / num_boxes}

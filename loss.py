"""Predictions and boxes -> losses: SimOTA assignment, IoU, objectness and class terms, size-aware weights.

In: a Prediction of model.py and targets (N, M, 5). Out: a dict of named scalars. All frames and boxes are assigned
in one batch, over each frame's few candidate anchors only. Sources: YOLOX, arXiv 2107.08430; OTA, arXiv 2103.14259.

    losses = detection_loss(prediction, targets); losses["loss"].backward()
"""

from collections import namedtuple

import torch
import torch.nn.functional as F

LEVELS = 4  # at most; a pyramid with fewer leaves the others without cells
SizeAware = namedtuple("SizeAware", "weight_type size_aware_weight small_threshold medium_threshold size_aware_terms")
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
        return 1 + (weight - 1) * ((medium - area) / (medium - small)).clamp(0, 1)
    if kind == "step":
        return 1 + (weight - 1) * (0.5 * (area <= small) + 0.5 * (area <= medium))
    raise ValueError(f"weight_type={kind!r}: expected exponential, linear or step")


def box_iou(a, b):
    """Intersection over union of boxes a and b (..., 4) as cx, cy, w, h, broadcast; 0 where both are empty."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    overlap_w, overlap_h = (high - low).clamp(min=0).unbind(-1)  # prod would synchronise in its backward pass
    overlap = overlap_w * overlap_h
    return overlap / (a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - overlap + 1e-16)


def take(x, index):
    """Rows of x (N, R, C) at index (N, U) of R, frame by frame -> (N, U, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # take_along_dim would recompile for each N


def candidate_anchors(grid, box, exists):
    """Distinct anchors of each frame that lie near any of its boxes, at most 9 a level and box.

    grid (A, 3) cell x, cell y, stride; box (N, M, 4), exists (N, M) bool  ->  anchor (N, U) int64 in ascending order
    and valid (N, U) bool, U = M * 9 * LEVELS. The levels are found on the device: no synchronisation.
    """
    A = len(grid)
    stride = grid[0, 2] * 2 ** torch.arange(LEVELS, device=grid.device)  # (L,), each level twice the one before
    on_level = grid[:, 2] == stride[:, None]  # (L, A)
    size = torch.where(on_level[..., None], grid[:, :2] + 1, 0).amax(1).long()  # (L, 2) columns, rows
    start = (grid[:, 2] < stride[:, None]).sum(1)  # (L,)
    # the cells around the box centre, (N, M, L, 2, 3)
    cell = (box[:, :, None, :2] / stride[:, None]).floor().long()[..., None] + torch.arange(-1, 2, device=grid.device)
    inside = (cell >= 0) & (cell < size[..., None]) & exists[:, :, None, None, None]
    anchor = start[:, None, None] + cell[..., 1, :, None] * size[:, 0, None, None] + cell[..., 0, None, :]
    inside = inside[..., 1, :, None] & inside[..., 0, None, :]  # (N, M, L, 3, 3)
    anchor = torch.where(inside, anchor, A).flatten(1).sort(dim=1).values  # (N, U)
    valid = (anchor < A) & ~F.pad(anchor[:, 1:] == anchor[:, :-1], (1, 0))
    return anchor.clamp(max=A - 1), valid


@torch.no_grad()
def assign(prediction, targets):
    """SimOTA: which anchors answer for which box, from the cost of letting them.

    prediction: box_cxcywh (N, A, 4), obj (N, A), cls (N, A, K), grid (A, 3); targets (N, M, 5), zero rows padding
    -> Assignment(anchor (N, U), matched (N, U) bool, box (N, U) index into M, iou (N, U) with that box)
    A candidate's cell centre lies strictly within 1.5 strides of a box centre. An anchor that several boxes claim goes
    to the box of the frame that is cheapest there. Boxes without a candidate and frames without boxes match nothing.
    """
    box, exists = targets[..., 1:], targets[..., 3:].amin(-1) > 0
    anchor, valid = candidate_anchors(prediction.grid, box, exists)
    cell = prediction.grid[anchor]  # (N, U, 3)
    centre, reach = (cell[..., :2] + 0.5) * cell[..., 2:], 1.5 * cell[..., 2:]  # (N, U, 2), (N, U, 1)
    low, high = box[:, :, None, :2] - reach[:, None], box[:, :, None, :2] + reach[:, None]  # (N, M, U, 2)
    own = torch.minimum(centre[:, None] - low, high - centre[:, None]).amin(-1) > 0  # (N, M, U)
    valid = valid & (own & exists[:, :, None]).any(1)
    pair = valid[:, None] & exists[:, :, None]

    iou = torch.where(pair, box_iou(box[:, :, None], take(prediction.box_cxcywh, anchor)[:, None]), 0)
    # (N, U, K)
    probability = (take(prediction.cls, anchor).sigmoid() * take(prediction.obj[..., None], anchor).sigmoid()).sqrt()
    log_no, log_yes = (1 - probability).log().clamp(min=-100), probability.log().clamp(min=-100)
    label = targets[..., :1].long().expand(-1, -1, anchor.shape[1])  # (N, M, U)
    cost_cls = (log_no - log_yes).transpose(1, 2).gather(1, label) - log_no.sum(-1)[:, None]
    cost = torch.where(pair, cost_cls - 3 * (iou + 1e-8).log() + 1e6 * ~own, torch.inf)

    count = iou.topk(10).values.sum(-1).int().clamp(min=1)  # (N, M) anchors for each box
    rank = torch.arange(10, device=cost.device) < count[..., None]
    cheapest, where = cost.topk(10, largest=False)
    claimed = torch.zeros_like(pair).scatter(2, where, rank & cheapest.isfinite())  # (N, M, U)
    claims = claimed.sum(1)  # (N, U)
    winner = torch.where(claims > 1, cost.argmin(1), claimed.int().argmax(1))
    return Assignment(anchor, claims > 0, winner, iou.gather(1, winner[:, None]).squeeze(1))


def focal_loss(logits, onehot):
    """Focal loss with alpha 0.25 and gamma 2, elementwise. Source: Lin et al. 2017, arXiv 1708.02002, equation 5."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    p = logits.sigmoid()
    p_true = p * onehot + (1 - p) * (1 - onehot)
    return (0.25 * onehot + 0.75 * (1 - onehot)) * (1 - p_true) ** 2 * cross_entropy


def detection_loss(prediction, targets, size_aware=None):
    """Training losses of a batch of frames, in float32 whatever the autocast.

    prediction: box_cxcywh (N, A, 4) pixels, obj (N, A) and cls (N, A, K) logits, grid (A, 3)
    targets (N, M, 5): class, cx, cy, w, h in pixels; rows of zeros are padding
    size_aware: None, or SizeAware(type, weight, small, medium, terms), terms out of "iou" and "cls"
    -> dict of scalars: loss = iou + obj + cls, each summed and divided by the matched anchors F of the batch;
    num_fg = F per box, for the log. Without any box F is 1 and only the objectness is trained.
    Weights act on the IoU term ("iou") and on a focal class term in place of the plain one ("cls").
    """
    with torch.autocast(targets.device.type, enabled=False):
        targets = targets.float() if targets.shape[1] else targets.new_zeros(len(targets), 1, 5)
        prediction = type(prediction)(*[field.float() for field in prediction])
        found = assign(prediction, targets)
        F_matched = found.matched.sum().clamp(min=1)

        target = take(targets, found.box)  # (N, U, 5)
        box, logits = take(prediction.box_cxcywh, found.anchor), take(prediction.cls, found.anchor)
        onehot = F.one_hot(target[..., 0].long(), logits.shape[-1]).float()

        iou = 1 - box_iou(box, target[..., 1:]) ** 2  # (N, U)
        cls = F.binary_cross_entropy_with_logits(logits, onehot * found.iou[..., None], reduction="none").sum(-1)
        if size_aware is not None:
            weight = size_weights(target[..., 3] * target[..., 4], *size_aware[:4])
            iou = weight * iou if "iou" in size_aware.size_aware_terms else iou
            cls = weight * focal_loss(logits, onehot).sum(-1) if "cls" in size_aware.size_aware_terms else cls
        # duplicates of an anchor are unmatched and add nothing
        matched = torch.zeros_like(prediction.obj).scatter_add(1, found.anchor, found.matched.float())
        terms = dict(iou=5 * torch.where(found.matched, iou, 0).sum() / F_matched,
                     obj=F.binary_cross_entropy_with_logits(prediction.obj, matched, reduction="sum") / F_matched,
                     cls=torch.where(found.matched, cls, 0).sum() / F_matched)
        boxes = (targets[..., 3:].amin(-1) > 0).sum().clamp(min=1)
        return dict(loss=terms["iou"] + terms["obj"] + terms["cls"], **terms, num_fg=F_matched / boxes)

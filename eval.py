"""A checkpoint -> numbers and pictures, each line naming its protocol; and a detector for live streams.

In: a checkpoint (ours, RVT's or its eTraM fork's) and prepared sequences. Architecture, data and classes come from the
checkpoint. Out: a table, and in out_dir/eval (by default beside the checkpoint) report.json and pictures.

    python eval.py --ckpt out/ckpt.pt --split=test
    python eval.py --ckpt rvt-b.ckpt configs/gen1.py --data_dir=datasets/gen1
    python eval.py --compare a/eval/report.json b/eval/report.json
"""

import contextlib
import copy
import hashlib
import io
import json as jsonlib
import os
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from configurator import command_line, configure
from data import BOX_DTYPE, load_classes, open_split
from model import Conv, Detector, ModelConfig, load_rvt, load_weights, read_checkpoint, reset_state

ckpt = "out/ckpt.pt"      # checkpoint of train.py, or a Lightning checkpoint of RVT
split = "test"            # train, val or test
score = "cls"             # detections rank by: cls (p_cls, as in RVT) or obj*cls (p_obj * p_cls)
confidence = 0.001        # detections below this p_obj * p_cls are dropped
nms_iou = 0.45            # of two detections of a class that overlap more, the worse is dropped
small_classes = ()        # the group of classes whose mean gets a line; empty: those of SMALL that the data has
picture_confidence = 0.3  # pictures show detections from this p_obj * p_cls
json = ""                 # path of the report; empty: out_dir/eval/report.json
out_dir = ""              # empty: the folder of the checkpoint
dtype = "float32"         # float32, bfloat16 or float16
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

SMALL = ("pedestrian", "two-wheeler", "bicycle", "motorbike", "wheelchair")
SIZES = {"T": (0, np.nextafter(16 ** 2, 0)), "S": (0, 32 ** 2), "M": (32 ** 2, 96 ** 2), "L": (96 ** 2, 1e10)}  # px^2
METRICS = ("AP", "AP50", "AP75", "AP_T", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_T", "AR_S", "AR_M", "AR_L")
FILTERS = {"none": "all boxes", "prophesee": "Prophesee filter"}
# beside Prophesee's fields: p_obj * p_cls, whatever class_confidence ranks by, and the stride of the pyramid level
DETECTION_DTYPE = np.dtype(BOX_DTYPE.descr + [("confidence", "<f4"), ("stride", "<u2")])


# ---- predictions -> detections

def iou_matrix(a, b):
    """IoU (n, m) of box_xyxy a (n, 4) and b (m, 4); NaN where both are without area."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.T[..., None].contiguous(), b.T.contiguous()  # (n, 1), (m,) each
    overlap = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap = overlap * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    return overlap / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap)


def nms(box_xyxy, score, label, iou, block=None):
    """Indices of the boxes that greedy non-maximum suppression keeps within each class, best score first.

    box_xyxy (n, 4), score (n,), label (n,) -> (k,) int64. A box goes where a kept box of its label that ranks before it
    overlaps it by more than `iou`; equal scores rank by index. Boxes go block by block: which of a block are kept is
    the one fixed point of "clashes with no kept box before it", and these then thin out the rest. Memory is bounded by
    16 * block^2 pairs, time by n * k pairs.
    """
    def clash(a, b):
        return (iou_matrix(box_xyxy[a], box_xyxy[b]) > iou) & (label[a][:, None] == label[b])

    block = block or (1024 if box_xyxy.is_cuda else 128)  # a CPU's cache holds the pairs
    rest, kept = score.argsort(descending=True, stable=True), [label.new_zeros(0, dtype=torch.int64)]
    while len(rest):
        head, rest = rest[:block], rest[block:]
        clashes = clash(head, head).triu(1)
        keep, before = torch.ones_like(head, dtype=torch.bool), None
        while before is None or not torch.equal(keep, before):
            keep, before = ~(clashes & keep[:, None]).any(0), keep
        kept.append(head[keep])
        if len(rest):
            rest = torch.cat([part[~clash(kept[-1], part).any(0)] for part in rest.split(16 * block)])
    return torch.cat(kept)


def detections(prediction, t_us, confidence=0.001, nms_iou=0.45, score="cls"):
    """Detections of each frame, best p_obj * p_cls first: one array of DETECTION_DTYPE for each of the N frames.

    prediction as from Detector (N frames), t_us: N label times. Each anchor stands for its best class only, is kept
    where p_obj * p_cls >= confidence, and competes on that product. class_confidence is p_cls for score="cls" (RVT
    ranks by it), the product for "obj*cls". Source: RVT's and YOLOX's postprocessing, arXiv 2107.08430.
    """
    if score not in ("cls", "obj*cls"):
        raise ValueError(f"score={score!r}: expected cls or obj*cls")
    p_cls, label = prediction.cls.sigmoid().max(-1)
    product = prediction.obj.sigmoid() * p_cls  # (N, A)
    frame, anchor = (product >= confidence).nonzero(as_tuple=True)
    box, rank = prediction.box_cxcywh[frame, anchor], p_cls if score == "cls" else product
    columns = (product[frame, anchor], rank[frame, anchor], label[frame, anchor].float(), prediction.grid[anchor, 2])
    found = torch.cat((box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2, torch.stack(columns, dim=1)), dim=1)
    counts = frame.bincount(minlength=len(product)).tolist()
    if max(counts, default=0) < 4096:  # a few hundred boxes are faster there than many small kernels
        found = found.cpu()
    out = []
    for t, part in zip(t_us, found.split(counts)):  # (candidates, 8)
        part = part[nms(part[:, :4], part[:, 4], part[:, 6], nms_iou)]
        boxes = np.zeros(len(part), DETECTION_DTYPE)
        x1, y1, x2, y2, boxes["confidence"], boxes["class_confidence"], boxes["class_id"], boxes["stride"] = part.cpu().numpy().T
        boxes["t"], boxes["x"], boxes["y"], boxes["w"], boxes["h"] = t, x1, y1, x2 - x1, y2 - y1
        out.append(boxes)
    return out


# ---- streams

def schedule(spans, todo, batch_size, T):
    """Steps of a batch of streams: lists of (row in the step before, sequence, first frame of its chunk).

    spans: (first frame, end) of each sequence; todo: those to play, in order of their turn. A row that ends takes the
    next sequence; when none is left, the batch gets smaller.
    """
    step, todo, steps = [(0, i, spans[i][0]) for i in todo[:batch_size]], todo[batch_size:], []
    while step:
        steps.append(step)
        step = []
        for row, (_, i, t) in enumerate(steps[-1]):
            if t + T < spans[i][1]:
                step.append((row, i, t + T))
            elif todo:
                i, *todo = todo
                step.append((row, i, spans[i][0]))
    return steps


class Chunks(torch.utils.data.Dataset):
    """Step of a schedule -> events uint8 (T, B, 20, H, W), zeros behind a sequence's end."""

    def __init__(self, sequences, spans, steps, T):
        self.sequences, self.spans, self.steps, self.T = sequences, spans, steps, T

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, k):
        step = self.steps[k]
        events = torch.zeros(self.T, len(step), 20, *self.sequences[0].hw, dtype=torch.uint8)
        for b, (_, i, t) in enumerate(step):
            self.sequences[i].read(t, min(t + self.T, self.spans[i][1]), events[:, b].numpy())
        return events


@torch.inference_mode()
def run(model, sequences, batch_size, sequence_length, device="cpu", dtype=torch.float32, num_workers=0, **options):
    """Labels and detections of every labelled frame: two lists of structured arrays, by sequence name, then by frame.

    Sequences play as streams with carried state, in chunks of sequence_length = T frames, from T - 1 frames before
    their first label (as RVT's do) to their last; the longest first, sharded over the ranks of torchrun, where every
    rank gets the whole result. `model` is on `device`; options: confidence, nms_iou, score of `detections`.
    """
    T, training, found, state = sequence_length, model.training, {}, None
    device = torch.device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sequences = sorted((s for s in sequences if len(s.label_frames)), key=lambda s: s.name)
    spans = [(max(int(s.label_frames[0]) - T + 1, 0), int(s.label_frames[-1]) + 1) for s in sequences]
    longest_first = sorted(range(len(spans)), key=lambda i: spans[i][0] - spans[i][1])
    steps = schedule(spans, longest_first[rank::world], batch_size, T)
    loader = torch.utils.data.DataLoader(Chunks(sequences, spans, steps, T), batch_size=None, num_workers=num_workers,
                                         pin_memory=device.type == "cuda")
    model.eval()
    for step, events in zip(steps, tqdm(loader, "evaluating", unit=" chunks", leave=False, disable=rank > 0)):
        due = sorted((int(sequences[i].label_frames[j]) - t, b, i, j) for b, (_, i, t) in enumerate(step)
                     for j in range(*np.searchsorted(sequences[i].label_frames, (t, t + T))))
        frames = torch.zeros(T, len(step), dtype=torch.bool)
        for t, b, _, _ in due:
            frames[t, b] = True
        if state is not None:
            rows = [row for row, _, _ in step]
            state = state if rows == list(range(len(state[0]))) else [s[rows] for s in state]
            state = reset_state(state, torch.tensor([t == spans[i][0] for _, i, t in step], device=device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction, state = model(events.to(device, non_blocking=True), state, frames)
        t_us = [sequences[i].boxes[j]["t"][0] for _, _, i, j in due]
        found.update(zip([(i, j) for _, _, i, j in due], detections(prediction, t_us, **options)))
    model.train(training)
    if world > 1:
        shards = [None] * world
        dist.all_gather_object(shards, found)
        found = {key: boxes for shard in shards for key, boxes in shard.items()}
    order = [(i, j) for i, s in enumerate(sequences) for j in range(len(s.label_frames))]
    return [sequences[i].boxes[j] for i, j in order], [found[key] for key in order]


def fold_batch_norm(model):
    """The model, in evaluation mode, with each batch norm merged into the convolution before it; the same function."""
    for part in [m for m in model.modules() if isinstance(m, Conv)]:
        part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), torch.nn.Identity()
    return model


class StreamDetector:
    """Detector for live streams: one 50 ms frame in, boxes out, state kept from call to call.

    model: a Detector, of which it keeps a copy in `dtype`; on a GPU with batch norm folded and captured as a CUDA graph.
     confidence, nms_iou, score: as in `detections`.

        detector = StreamDetector(model)
        boxes = detector(frame)         # frame (20, H, W) uint8 -> BOX_DTYPE (n,), pixels of the frame, best first
        detector.reset()                # before another recording
    """

    @torch.inference_mode()
    def __init__(self, model, dtype=torch.float32, **options):
        grid, self.options, self.frames, self.graph = model.grid, options, 0, None
        self.model = copy.deepcopy(model).eval()
        if grid.is_cuda:  # on a CPU it gains nothing (334 ms a frame either way: RVT-B, 360x640, one core, 2026-11)
            fold_batch_norm(self.model)
        self.model.to(dtype).grid = grid  # cell numbers are not exact in bfloat16
        self.events = torch.zeros(1, 1, 20, *model.config.input_hw, dtype=torch.uint8, device=grid.device)
        self.state = self.model.initial_state(1)
        if grid.is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up before the capture
                for _ in range(3):
                    self.network()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.prediction = self.network()
            self.graph = graph
            self.reset()

    def network(self):
        """Prediction for self.events; self.state moves on in place, since a CUDA graph has fixed addresses."""
        prediction, state = self.model(self.events, self.state)
        for old, new in zip(self.state, state):
            old.copy_(new)
        return prediction

    @torch.inference_mode()
    def __call__(self, frame, t_us=None):
        """Boxes of BOX_DTYPE in the next frame, at t_us (None: 50 ms after the one before)."""
        frame = torch.as_tensor(frame)
        if frame.shape != self.events.shape[2:] or frame.dtype != torch.uint8:
            raise ValueError(f"frame is {frame.dtype} {tuple(frame.shape)}; expected uint8 {tuple(self.events.shape[2:])}")
        self.events.copy_(frame)
        self.frames += 1
        if self.graph is not None:
            self.graph.replay()
        prediction = self.prediction if self.graph is not None else self.network()
        found = detections(prediction, [50_000 * self.frames if t_us is None else t_us], **self.options)[0]
        boxes = np.zeros(len(found), BOX_DTYPE)
        for name in BOX_DTYPE.names:
            boxes[name] = found[name]
        return boxes

    def reset(self):
        """Forget what was seen."""
        self.frames = 0
        for s in self.state:
            s.zero_()


def speed(model, sequence, dtype=torch.float32, frames=100):
    """Milliseconds a frame (median, 95th percentile) through StreamDetector, boxes included, on a sequence's frames."""
    detector, ms = StreamDetector(model, dtype), []
    for t in range(min(frames, sequence.length)):
        frame = sequence.read(t, t + 1)[0]
        start = time.perf_counter()
        detector(frame)
        ms.append(1000 * (time.perf_counter() - start))
    median, p95 = np.percentile(ms[len(ms) // 10:], (50, 95))  # the first ones warm up
    cuda = model.grid.is_cuda
    return {"ms_median": round(median, 3), "ms_p95": round(p95, 3), "frames_per_s": round(1000 / median, 1),
            "frames": len(ms), "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"}


# ---- scores

def prophesee_filter(boxes, width):
    """The boxes that the Prophesee protocol scores: later than 0.5 s, diagonal >= 60 px, sides >= 20 px at 1280x720.

    Other widths in proportion, but for Gen1 (304 px), which has 30 and 10 px. Source: Perot et al. 2020,
    arXiv 2009.13436, as its toolbox and RVT apply it, to labels and detections.
    """
    w, h, scale = boxes["w"], boxes["h"], 0.5 if width == 304 else width / 1280
    keep = (boxes["t"] > 500_000) & (w ** 2 + h ** 2 >= (60 * scale) ** 2) & (w >= 20 * scale) & (h >= 20 * scale)
    return boxes[keep]


def match(truth, found, thresholds):
    """Matches in one frame, one class (or all as one), as COCOeval.evaluateImg finds them, but 10 times faster.

    Best score first, at most 100, each detection takes the free label that it overlaps most, by `thresholds` (10,) at
    least; labels outside of the size range only where no other is left. All thresholds and size ranges go at once.
    -> for each size range what COCOeval.accumulate reads; None where there are no boxes. Of equals the last label wins.
    """
    if not len(truth) and not len(found):
        return None
    found = found[np.argsort(-found["class_confidence"], kind="stable")[:100]]
    boxes, areas = ([np.stack([side[name] for name in "xywh"], 1).astype(float) for side in (found, truth)],
                    [(side["w"] * side["h"]).astype(float) for side in (found, truth)])  # product in float32, as RVT's
    limits = np.array([(0, 1e10), *SIZES.values()])[..., None]
    far, ignored = ((a < limits[:, 0]) | (a > limits[:, 1]) for a in areas)  # (5, D), (5, G)
    free, hits = np.ones((5, 10, len(truth)), bool), np.zeros((5, 10, len(found)), bool)
    passed = hits.copy()  # detections that count neither way
    iou = np.reshape(coco_mask.iou(*boxes, [0] * len(truth)), (len(found), len(truth)))
    for d in np.flatnonzero((iou >= thresholds[0]).any(1)):
        able = free & (iou[d] >= thresholds[:, None])
        rank = np.where(able, iou[d] + 2 * ~ignored[:, None], 0)
        best = len(truth) - 1 - rank[..., ::-1].argmax(-1)[..., None]  # (5, 10, 1)
        hits[..., d] = able.any(-1)
        passed[..., d] = hits[..., d] & np.take_along_axis(ignored[:, None], best, -1)[..., 0]
        np.put_along_axis(free, best, np.take_along_axis(free, best, -1) & ~hits[..., d, None], -1)
    passed |= ~hits & far[:, None]
    return [{"dtScores": found["class_confidence"], "dtMatches": hits[a], "dtIgnore": passed[a], "gtIgnore": ignored[a]}
            for a in range(5)]


def summary(precision, recall):
    """METRICS from precision (10 IoUs, 101, K, 5 sizes, 3 limits) and recall (10, K, 5, 3); -1: undefined."""
    def mean(values):
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    p, r = precision[..., 2], recall[..., 2]  # at most 100 detections
    values = [p[..., 0], p[0, ..., 0], p[5, ..., 0], *np.moveaxis(p[..., 1:], -1, 0),
              recall[..., 0, 0], recall[..., 0, 1], r[..., 0], *np.moveaxis(r[..., 1:], -1, 0)]
    return {metric: mean(value) for metric, value in zip(METRICS, values)}


def score_boxes(labels, detections, height, width, class_names, box_filter="none", class_agnostic=False, class_ids=None):
    """COCO scores of detections, by pycocotools; METRICS in 0..1, -1 where undefined.

    labels, detections: lists of structured arrays (t, x, y, w, h, class_id, class_confidence), one of each per frame;
    T, S, M, L are boxes under 16x16 px, under 32x32 (tiny ones too), up to 96x96, and above. Frames without labels
    (after the filter) are not scored. class_agnostic: classes do not matter for a match, as with the eTraM fork's
    useCats=0; class_ids: only these classes exist, but frames with labels of others stay.
    -> METRICS, "frames" and "boxes" scored, "classes": {name: METRICS and "boxes"} of the same run, and "curves":
    {name: precision (101,) over recall 0..1 at IoU 0.5}; the last two are empty where class_agnostic.
    """
    if box_filter not in FILTERS:
        raise ValueError(f"box_filter={box_filter!r}: expected one of {', '.join(FILTERS)}")
    if box_filter == "prophesee":
        labels, detections = ([prophesee_filter(boxes, width) for boxes in side] for side in (labels, detections))
    ids = sorted(range(len(class_names)) if class_ids is None else class_ids)
    pairs = [(truth, found) for truth, found in zip(labels, detections) if len(truth)]
    if class_agnostic:  # what would tie goes in the order of classes
        pairs = [[side[np.isin(side["class_id"], ids)] for side in pair] for pair in pairs]
        groups = [[[side[np.argsort(side["class_id"], kind="stable")] for side in pair] for pair in pairs]]
    else:
        groups = [[[side[side["class_id"] == i] for side in pair] for pair in pairs] for i in ids]
    coco = COCOeval(iouType="bbox")
    coco.params.imgIds, coco.params.catIds, coco.params.useCats = list(range(len(pairs))), ids, int(not class_agnostic)
    coco.params.areaRng = [(0, 1e10), *SIZES.values()]
    coco._paramsEval = copy.deepcopy(coco.params)
    found = [[match(*pair, coco.params.iouThrs) or [None] * 5 for pair in group] for group in groups]
    coco.evalImgs = [result[a] for group in found for a in range(5) for result in group]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.accumulate()
    precision, recall = coco.eval["precision"], coco.eval["recall"]
    boxes = [sum(len(truth) for truth, _ in group) for group in groups]
    named = [] if class_agnostic else [class_names[i] for i in ids]
    return {**summary(precision, recall), "frames": len(pairs), "boxes": sum(boxes),
            "classes": {name: {**summary(precision[:, :, [k]], recall[:, [k]]), "boxes": boxes[k]}
                        for k, name in enumerate(named)},
            "curves": {name: precision[0, :, k, 0, 2] for k, name in enumerate(named)}}


# ---- report

def report(labels, detections, height, width, class_names, small_classes=(), strides=(), **settings):
    """All scores of a run, each row under its protocol, ready for JSON; undefined values are None.

    labels, detections: as `run` returns them; strides: the model's, for a row on the detections of each alone.
    -> "settings" (what was passed, numbers of frames and boxes, a fingerprint of the labels), "sizes" (boxes of each
    size, and the share that the Prophesee filter removes), "rows" ({protocol: frames, boxes, METRICS}), "curves" (per
    class precision at recall 0, 0.04, ... 1 for IoU 0.5, all boxes). ValueError: small_classes names an unknown class.
    """
    if unknown := set(small_classes) - set(class_names):
        raise ValueError(f"small_classes: no class {', '.join(sorted(unknown))}; there are {', '.join(class_names)}")
    group, rows, curves = small_classes or [name for name in class_names if name in SMALL], {}, {}

    def add(protocol, box_filter, found=detections, class_agnostic=False, class_ids=None):
        rows[protocol] = score_boxes(labels, found, height, width, class_names, box_filter, class_agnostic, class_ids)
        return rows[protocol].pop("classes"), rows[protocol].pop("curves")

    for key, kind in FILTERS.items():
        classes, curve = add(f"class mean, {kind}", key)
        add(f"class-agnostic, {kind}", key, class_agnostic=True)
        rows.update({f"{name}, {kind}": row for name, row in classes.items()})
        members = [classes[name] for name in group]
        if group:
            rows[f"small_classes ({', '.join(group)}), class mean, {kind}"] = {**{
                key: np.mean([row[key] for row in members if row[key] > -1] or -1) for key in METRICS},
                "frames": members[0]["frames"], "boxes": sum(row["boxes"] for row in members)}
        curves = curves or {name: precision[::4].round(3).tolist() for name, precision in curve.items()}
    add("eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter", "prophesee", detections, True,
        range(min(3, len(class_names))))
    for stride in strides:
        add(f"detections of stride {stride} alone, class mean, all boxes", "none",
            [boxes[boxes["stride"] == stride] for boxes in detections])
    for row in rows.values():
        row.update({key: None if row[key] == -1 else round(float(row[key]), 7) for key in METRICS})

    everything, sizes = np.concatenate([*labels, np.zeros(0, BOX_DTYPE)]), {}
    area, left = ((boxes["w"] * boxes["h"]).astype(float) for boxes in (everything, prophesee_filter(everything, width)))
    for name, (low, high) in SIZES.items():
        before, after = (int(((a >= low) & (a <= high)).sum()) for a in (area, left))
        sizes[name] = {"boxes": before, "removed": round(1 - after / before, 4) if before else None}
    print_of_labels = hashlib.sha256(everything[["t", "x", "y", "w", "h", "class_id"]].tobytes()).hexdigest()[:12]
    return {"settings": {**settings, "resolution": [height, width], "classes": list(class_names), "frames": len(labels),
                         "boxes": len(everything), "labels": print_of_labels}, "sizes": sizes, "rows": rows, "curves": curves}

"""A checkpoint -> numbers and pictures, each line naming its protocol; and a detector for live streams.

In: a checkpoint (ours, RVT's or its eTraM fork's) and prepared sequences. Architecture, data and classes come from the
checkpoint. Out: a table, and in out_dir/eval (out_dir: the checkpoint's folder) report.json and pictures.

    python eval.py --ckpt out/ckpt.pt --split=test
    python eval.py --ckpt rvt-b.ckpt configs/gen1.py --data_dir=datasets/gen1
    python eval.py --compare a/eval/report.json b/eval/report.json
"""

import copy
import hashlib
import json as jsonlib
import re
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou as coco_iou
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from configurator import command_line, configure
from data import BOX_DTYPE, load_classes, make_loader, open_split
from model import Conv, Detector, ModelConfig, keep_buffers, load_rvt, load_weights, read_checkpoint, reset_state

ckpt = "out/ckpt.pt"      # checkpoint of train.py, or a Lightning checkpoint of RVT
split = "test"            # train, val or test
score = "cls"             # detections rank by: cls (p_cls, as in RVT) or obj*cls (p_obj * p_cls)
confidence = 0.001        # detections below this p_obj * p_cls are dropped
nms_iou = 0.45            # of two detections of a class that overlap more, the worse is dropped
small_classes = ()        # the group of classes whose mean gets a line; empty: those of SMALL that the data has
picture_confidence = 0.3  # pictures show detections from this p_obj * p_cls
json = ""                 # path of the report; empty: out_dir/eval/report.json
dtype = "float32"         # float32, bfloat16 or float16
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

SMALL = ("pedestrian", "two-wheeler", "bicycle", "motorbike", "wheelchair")
SIZES = {"tiny, < 16x16 px": (0, np.nextafter(16 ** 2, 0)), "small, < 32x32 px": (0, 32 ** 2),  # areas in px^2
         "medium, to 96x96 px": (32 ** 2, 96 ** 2), "large, above": (96 ** 2, 1e10)}
METRICS = ("AP", "AP50", "AP75", "AP_T", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_T", "AR_S", "AR_M", "AR_L")
FILTERS = {"none": "all boxes", "prophesee": "Prophesee filter"}
COMPARABLE = ("split", "labels", "resolution", "classes", "confidence", "nms_iou", "score")  # settings of a comparison
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
        part = part[nms(part[:, :4], part[:, 4], part[:, 6], nms_iou)].cpu().numpy().T
        boxes = np.zeros(part.shape[1], DETECTION_DTYPE)
        x1, y1, x2, y2, boxes["confidence"], boxes["class_confidence"], boxes["class_id"], boxes["stride"] = part
        boxes["t"], boxes["x"], boxes["y"], boxes["w"], boxes["h"] = t, x1, y1, x2 - x1, y2 - y1
        out.append(boxes)
    return out


# ---- streams

class Chunks:
    """Item k: events uint8 (T, B, 20, H, W) of steps[k], a list of (sequence, first frame); zeros behind the stops."""

    def __init__(self, sequences, stops, steps, T):
        self.sequences, self.stops, self.steps, self.T = sequences, stops, steps, T

    def __getitem__(self, k):
        events = torch.zeros(self.T, len(self.steps[k]), 20, *self.sequences[0].hw, dtype=torch.uint8)
        for b, (i, t) in enumerate(self.steps[k]):
            self.sequences[i].read(t, min(t + self.T, self.stops[i]), events[:, b].numpy())
        return events


@torch.inference_mode()
def run(model, sequences, batch_size, sequence_length, device="cpu", dtype=torch.float32, num_workers=0, **options):
    """Labels and detections of every labelled frame: two lists of structured arrays, by sequence name, then by frame.

    Sequences play as streams with carried state, in chunks of sequence_length = T frames, from T - 1 frames before
    their first label (as RVT's do) to their last; the longest first, sharded over the ranks of torchrun, where every
    rank gets the whole result. `model` is on `device`; options: confidence, nms_iou, score of `detections`.
    """
    T, training, device, found = sequence_length, model.training, torch.device(device), {}
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sequences = sorted((s for s in sequences if len(s.label_frames)), key=lambda s: s.name)
    starts = [max(int(s.label_frames[0]) - T + 1, 0) for s in sequences]
    stops = [int(s.label_frames[-1]) + 1 for s in sequences]
    slots = [[] for _ in range(batch_size)]
    for i in sorted(range(len(sequences)), key=lambda i: starts[i] - stops[i])[rank::world]:
        min(slots, key=len).extend((i, t) for t in range(starts[i], stops[i], T))  # into the slot that is free first
    slots.sort(key=len, reverse=True)  # so the batch gets smaller from its end
    steps = [[slot[k] for slot in slots if k < len(slot)] for k in range(len(slots[0]))]
    loader = make_loader(Chunks(sequences, stops, steps, T), 0, num_workers, pin_memory=device.type == "cuda")
    state = model.eval().initial_state(batch_size)
    for step in tqdm(steps, "evaluating", unit=" chunks", leave=False, disable=rank > 0):
        events = next(loader).to(device, non_blocking=True)
        due = sorted((int(sequences[i].label_frames[j]) - t, b, i, j) for b, (i, t) in enumerate(step)
                     for j in range(*np.searchsorted(sequences[i].label_frames, (t, t + T))))
        index = torch.tensor([t * len(step) + b for t, b, _, _ in due], dtype=torch.int64, device=device)
        first = torch.tensor([t == starts[i] for i, t in step], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction, state = model(events, reset_state([s[:len(step)] for s in state], first), index)
        t_us = [sequences[i].boxes[j]["t"][0] for _, _, i, j in due]
        found.update(zip([place[2:] for place in due], detections(prediction, t_us, **options)))
    model.train(training)
    if world > 1:
        shards = [None] * world
        dist.all_gather_object(shards, found)
        found = {place: boxes for shard in shards for place, boxes in shard.items()}
    return [boxes for s in sequences for boxes in s.boxes], [found[place] for place in sorted(found)]


class StreamDetector:
    """Detector for live streams: one 50 ms frame in, boxes out, state kept from call to call.

    model: a Detector, of which it keeps a copy in `dtype`; on a GPU with batch norm folded, and captured as a CUDA
    graph. options: confidence, nms_iou, score as in `detections`.

        detector = StreamDetector(model)
        boxes = detector(frame)         # frame (20, H, W) uint8 -> BOX_DTYPE (n,), pixels of the frame, best first
        detector.reset()                # before another recording
    """

    @torch.inference_mode()
    def __init__(self, model, dtype=torch.float32, **options):
        grid, self.options, self.frames, self.graph = model.grid, options, 0, None
        self.model = copy.deepcopy(model).eval()
        for part in self.model.modules():  # some 50 kernels fewer; a CPU gains nothing by it
            if isinstance(part, Conv):
                part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), torch.nn.Identity()
        self.model.to(dtype).grid = grid  # cell numbers are not exact in bfloat16
        self.events = torch.zeros(1, 1, 20, *model.config.input_hw, dtype=torch.uint8, device=grid.device)
        self.state = self.model.initial_state(1)
        if grid.is_cuda:
            device, graph = torch.cuda.device(grid.device), torch.cuda.CUDAGraph()
            torch.cuda.synchronize(grid.device)
            with device, torch.cuda.stream(torch.cuda.Stream(grid.device)):  # libraries set up before the capture
                for _ in range(3):
                    self.step()
            torch.cuda.synchronize(grid.device)
            with device, torch.cuda.graph(graph):
                self.step()
            self.graph = graph
            self.reset()

    def step(self):
        """Sets self.prediction; self.state moves on in place, since a CUDA graph has fixed addresses."""
        self.prediction, state = self.model(self.events, self.state)
        torch._foreach_copy_(self.state, state)

    @torch.inference_mode()
    def __call__(self, frame, t_us=None):
        """Boxes of BOX_DTYPE in the next frame, at t_us (None: 50 ms after the one before)."""
        frame, expected = torch.as_tensor(frame), self.events.shape[2:]
        if frame.shape != expected or frame.dtype != torch.uint8:
            raise ValueError(f"frame is {frame.dtype} {tuple(frame.shape)}; expected uint8 {tuple(expected)}")
        self.events.copy_(frame)
        self.frames += 1
        self.graph.replay() if self.graph else self.step()
        found = detections(self.prediction, [50_000 * self.frames if t_us is None else t_us], **self.options)[0]
        return found[list(BOX_DTYPE.names)].astype(BOX_DTYPE)

    @torch.inference_mode()
    def reset(self):
        """Forget what was seen."""
        self.frames = 0
        torch._foreach_zero_(self.state)


def speed(model, sequence, dtype=torch.float32, frames=100):
    """Milliseconds a frame (median, 95th percentile) through StreamDetector, boxes included, on a sequence's frames."""
    detector, ms = StreamDetector(model, dtype), []
    for t in range(min(frames, sequence.length)):
        frame, start = sequence.read(t, t + 1)[0], time.perf_counter()
        detector(frame)
        ms.append(1000 * (time.perf_counter() - start))
    median, p95 = np.percentile(ms[len(ms) // 10:], (50, 95)).round(3).tolist()  # the first ones warm up
    place = model.grid.device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "batch": 1, "ms_median": median, "ms_p95": p95, "frames_per_s": round(1000 / median, 1)}


# ---- scores

def prophesee_filter(boxes, width):
    """The boxes that the Prophesee protocol scores: later than 0.5 s, diagonal >= 60 px, sides >= 20 px at 1280x720.

    Other widths in proportion, but for Gen1 (304 px), which has 30 and 10 px. Source: Perot et al. 2020,
    arXiv 2009.13436, as its toolbox and RVT apply it, to labels and detections.
    """
    w, h, scale = boxes["w"], boxes["h"], 0.5 if width == 304 else width / 1280
    keep = (boxes["t"] > 500_000) & (w ** 2 + h ** 2 >= (60 * scale) ** 2) & (w >= 20 * scale) & (h >= 20 * scale)
    return boxes[keep]


def overlaps(found, truth):
    """IoU (n, m) of structured boxes found (n,) and truth (m,), by pycocotools."""
    boxes = [np.stack([side[name] for name in "xywh"], 1).astype(float) for side in (found, truth)]
    return np.reshape(coco_iou(*boxes, [0] * len(truth)), (len(found), len(truth)))


def match(truth, found, thresholds):
    """Matches in one frame, one class (or all as one): what COCOeval.evaluateImg finds, 3 to 8 times faster.

    Best score first, at most 100, each detection takes the free label that it overlaps most, by `thresholds` (10,) at
    least (of equals the last); labels outside of the size range only where no other is left. All thresholds and size
    ranges go at once. -> for each size range what COCOeval.accumulate reads, None where there are no boxes.
    """
    if not len(truth) and not len(found):
        return [None] * 5
    found = found[np.argsort(-found["class_confidence"], kind="stable")[:100]]
    iou = overlaps(found, truth)
    areas = [(side["w"] * side["h"]).astype(float) for side in (found, truth)]  # products in float32, as RVT's
    far, ignored = (np.array([(a < low) | (a > high) for low, high in ((0, 1e10), *SIZES.values())]) for a in areas)
    free, hits = np.ones((5, 10, len(truth)), bool), np.zeros((5, 10, len(found)), bool)
    passed = hits.copy()  # detections that count neither way
    for d in np.flatnonzero((iou >= thresholds[0]).any(1)):
        able = free & (iou[d] >= thresholds[:, None])
        preference = np.where(able, iou[d] + 2 * ~ignored[:, None], 0)
        best = len(truth) - 1 - preference[..., ::-1].argmax(-1)[..., None]  # (5, 10, 1)
        hits[..., d] = able.any(-1)
        passed[..., d] = hits[..., d] & np.take_along_axis(ignored[:, None], best, -1)[..., 0]
        np.put_along_axis(free, best, np.take_along_axis(free, best, -1) & ~hits[..., d, None], -1)
    passed |= ~hits & far[:, None]
    return [{"dtScores": found["class_confidence"], "dtMatches": hit, "dtIgnore": skip, "gtIgnore": outside}
            for hit, skip, outside in zip(hits, passed, ignored)]


def summary(precision, recall):
    """METRICS from precision (10 IoUs, 101, K, 5 sizes, 3 limits) and recall (10, K, 5, 3); -1: undefined."""
    p, r = np.moveaxis(precision[..., 2], -1, 0), np.moveaxis(recall[..., 2], -1, 0)  # at most 100 detections; (5, ...)
    values = (p[0], p[0, 0], p[0, 5], *p[1:], recall[..., 0, 0], recall[..., 0, 1], *r)
    return {metric: float(v[v > -1].mean()) if (v > -1).any() else -1.0 for metric, v in zip(METRICS, values)}


def score_boxes(labels, detections, height, width, class_names, box_filter="none", class_agnostic=False,
                class_ids=None):
    """COCO scores of detections, by pycocotools; METRICS in 0..1, -1 where undefined.

    labels, detections: lists of structured arrays (t, x, y, w, h, class_id, class_confidence), one of each per frame;
    T, S, M, L are boxes under 16x16 px, under 32x32 (tiny ones too), up to 96x96, and above. Frames without labels
    (after the filter) are not scored. class_agnostic: classes do not matter for a match, as with the eTraM fork's
    useCats=0; class_ids: only these classes exist, but frames with labels of others stay.
    -> METRICS, "frames" and "boxes" scored; "classes": {name: the same of this class, from the same run} and "curves":
    {name: precision (101,) over recall 0..1 at IoU 0.5}, both empty where class_agnostic.
    """
    if box_filter not in FILTERS:
        raise ValueError(f"box_filter={box_filter!r}: expected one of {', '.join(FILTERS)}")
    if box_filter == "prophesee":
        labels, detections = ([prophesee_filter(boxes, width) for boxes in side] for side in (labels, detections))
    ids = sorted(range(len(class_names)) if class_ids is None else class_ids)
    pairs = [(truth, found) for truth, found in zip(labels, detections) if len(truth)]
    groups = [[[side[side["class_id"] == i] for side in pair] for pair in pairs] for i in ids]
    if class_agnostic:  # equal scores rank by class
        groups = [[[np.concatenate(sides) for sides in zip(*parts)] for parts in zip(*groups)]]
    coco = COCOeval(iouType="bbox")
    coco.params.imgIds, coco.params.catIds, coco.params.useCats = list(range(len(pairs))), ids, int(not class_agnostic)
    coco.params.areaRng = [(0, 1e10), *SIZES.values()]
    coco._paramsEval = copy.deepcopy(coco.params)
    found = [[match(*pair, coco.params.iouThrs) for pair in group] for group in groups]
    coco.evalImgs = [result[a] for group in found for a in range(5) for result in group]
    with redirect_stdout(None):
        coco.accumulate()
    precision, recall = coco.eval["precision"], coco.eval["recall"]
    boxes = [sum(len(truth) for truth, _ in group) for group in groups]
    named = [] if class_agnostic else [class_names[i] for i in ids]
    return {**summary(precision, recall), "frames": len(pairs), "boxes": sum(boxes),
            "classes": {name: {**summary(precision[:, :, [k]], recall[:, [k]]), "frames": len(pairs), "boxes": boxes[k]}
                        for k, name in enumerate(named)},
            "curves": {name: precision[0, :, k, 0, 2] for k, name in enumerate(named)}}


# ---- report

def report(labels, detections, height, width, class_names, small_classes=(), strides=(), **settings):
    """All scores of a run, each row under its protocol, ready for JSON; undefined values are None.

    labels, detections: as `run` returns them; strides: the model's, for a row on the detections of each alone.
    -> "settings" (what was passed, numbers of frames and boxes, a fingerprint of the labels), "sizes" (boxes of each
    size, and the share that the Prophesee filter removes), "rows" ({protocol: frames, boxes, METRICS}), "curves" (per
    class precision at recall 0, 0.04, ... 1 for IoU 0.5, all boxes).
    """
    scene, rows, curves = (height, width, class_names), {}, {}
    group = [name for name in class_names if name in (small_classes or SMALL)]
    for key, kind in FILTERS.items():
        scores = rows[f"class mean, {kind}"] = score_boxes(labels, detections, *scene, key)
        rows[f"class-agnostic, {kind}"] = score_boxes(labels, detections, *scene, key, class_agnostic=True)
        if group:
            members = [scores["classes"][name] for name in group]
            rows[f"small_classes ({', '.join(group)}), class mean, {kind}"] = {
                m: np.mean([row[m] for row in members if row[m] > -1] or -1) for m in METRICS} | {
                "frames": scores["frames"], "boxes": sum(row["boxes"] for row in members)}
        rows |= {f"{name}, {kind}": row for name, row in scores["classes"].items()}
        curves = curves or {name: curve[::4].round(3).tolist() for name, curve in scores["curves"].items()}
    rows["eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"] = score_boxes(
        labels, detections, *scene, "prophesee", True, range(min(3, len(class_names))))
    for stride in strides:
        level = [boxes[boxes["stride"] == stride] for boxes in detections]
        rows[f"detections of stride {stride} alone, class mean, all boxes"] = score_boxes(labels, level, *scene)
    rows = {protocol: {"frames": row["frames"], "boxes": row["boxes"]} | {
        m: None if row[m] == -1 else round(float(row[m]), 7) for m in METRICS} for protocol, row in rows.items()}

    everything, sizes = np.concatenate([*labels, np.zeros(0, BOX_DTYPE)]), {}
    areas = [(b["w"] * b["h"]).astype(float) for b in (everything, prophesee_filter(everything, width))]
    for name, (low, high) in SIZES.items():
        before, after = (int(((a >= low) & (a <= high)).sum()) for a in areas)
        sizes[name] = {"boxes": before, "Prophesee filter removes": round(1 - after / before, 4) if before else None}
    fingerprint = hashlib.sha256(b"".join(everything[name].tobytes() for name in ("t", "x", "y", "w", "h", "class_id")))
    settings |= {"resolution": [height, width], "classes": list(class_names), "frames": len(labels),
                 "boxes": len(everything), "labels": fingerprint.hexdigest()[:12]}
    return {"settings": settings, "sizes": sizes, "rows": rows, "curves": curves}


HEAD = " frames   boxes" + "".join(f"{m:>7}" for m in METRICS) + "   in %, by protocol"


def line(name, row, sign=""):
    """Line of a table: frames, boxes and METRICS in percent (sign "+": differences), name."""
    values = "".join("    n/a" if row[m] is None else f"{100 * row[m]:{sign}7.1f}" for m in METRICS)
    return f"{row['frames']:7}{row['boxes']:8}{values}   {name}"


def compare(paths):
    """Reports side by side, as text: each protocol of the first, with the differences of the others to it.

    ValueError: a file that is no report; a report of another split, data, threshold or ranking than the first.
    """
    blocks, first = {}, None
    for path in paths:
        try:
            report = jsonlib.loads(Path(path).read_text())
            first = first or report
            for here, there, key in ((report["settings"][key], first["settings"][key], key) for key in COMPARABLE):
                if here != there:
                    raise ValueError(f"{path}: {key} is {here}, but {there} in {paths[0]}: these are not comparable")
            for protocol, base in first["rows"].items():
                if row := report["rows"].get(protocol):
                    blocks.setdefault(protocol, []).append(line(f"{protocol} | {path}", row))
                    if report is not first:
                        change = {m: None if None in (row[m], base[m]) else row[m] - base[m] for m in METRICS}
                        blocks[protocol].append(line("  difference", row | change, "+"))
        except (KeyError, TypeError, AttributeError, jsonlib.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a report of eval.py ({type(error).__name__}: {error})") from error
    return "\n".join([HEAD, *sum(blocks.values(), [])])


# ---- pictures

def confusion(labels, detections, K, confidence):
    """Counts (F, K + 1, K + 1) in each frame of labelled class (rows) against detected class; K is background.

    Best first, each detection with p_obj * p_cls >= confidence takes the label of any class that it overlaps most, if
    that is free and the IoU 0.5 or more.
    """
    counts = np.zeros((len(labels), K + 1, K + 1), int)
    for count, truth, found in zip(counts, labels, detections):
        found, missed = found[found["confidence"] >= confidence], truth["class_id"].astype(int)
        for overlap, detected in zip(overlaps(found, truth), found["class_id"]):
            best = overlap.argmax()
            hit = overlap[best] >= 0.5 and missed[best] < K
            count[missed[best] if hit else K, detected] += 1
            missed[best] = K if hit else missed[best]
        np.add.at(count, (missed[missed < K], K), 1)
    return counts


def pictures(folder, report, sequences, labels, detections, class_names, confidence):
    """Write report.png (precision-recall, confusion, AP by size) and frames.png (best, worst, random) to `folder`."""
    from matplotlib.figure import Figure

    from demo import draw  # here, since demo.py imports this file
    names, K, rows = [*class_names, "background"], len(class_names), report["rows"]
    figure = Figure(figsize=(21, 7), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, curve in report["curves"].items():
        if rows[f"{name}, all boxes"]["boxes"]:
            ap50 = 100 * rows[f"{name}, all boxes"]["AP50"]
            left.plot(np.linspace(0, 1, len(curve)), curve, label=f"{name} (AP50 {ap50:.1f})")
    left.set(title="IoU 0.5, all boxes", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    left.legend()

    counts = confusion(labels, detections, K, confidence)
    total = counts.sum(0)
    share = total / total.sum(1, keepdims=True).clip(1)
    middle.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(total):
        middle.text(j, i, n or "", ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    middle.set(title=f"boxes, p_obj * p_cls >= {confidence}, IoU >= 0.5", xlabel="detected", ylabel="labelled",
               xticks=range(K + 1), yticks=range(K + 1), yticklabels=names)
    middle.set_xticklabels(names, rotation=45, ha="right")

    for k, kind in enumerate(FILTERS.values()):
        values = [rows[f"class mean, {kind}"][m] for m in ("AP_T", "AP_S", "AP_M", "AP_L")]
        bars = right.bar(np.arange(4) + 0.4 * k, [100 * (v or 0) for v in values], 0.4, label=f"class mean, {kind}")
        right.bar_label(bars, ["n/a" if v is None else f"{100 * v:.1f}" for v in values])
    right.set_xticks(np.arange(4) + 0.2, [
        f"{name.replace(', ', chr(10))}\n{size['boxes']} boxes" for name, size in report["sizes"].items()])
    right.set(title="AP by size", ylabel="AP in %")
    right.legend()
    figure.savefig(folder / "report.png", dpi=80)

    frames = [(s, int(t)) for s in sequences for t in s.label_frames]
    f1 = 2 * np.trace(counts[:, :K, :K], axis1=1, axis2=2) / (counts[:, :K].sum((1, 2)) + counts[:, :, :K].sum((1, 2)))
    order = np.argsort(-f1, kind="stable")
    chosen = [*order[:4], *order[4:][-4:], *np.random.default_rng(0).permutation(order[4:-4])[:4]]
    figure = Figure(figsize=(24, 14), layout="constrained")
    axes = figure.subplots(3, 4, subplot_kw={"xticks": (), "yticks": ()})
    for axis, k, kind in zip(axes.flat, chosen, np.repeat(("best", "worst", "random"), 4)):
        (sequence, t), found = frames[k], detections[k]
        axis.imshow(draw(sequence.read(t, t + 1)[0], found[found["confidence"] >= confidence], class_names, labels[k]))
        axis.set_title(f"{kind}: {sequence.name}, frame {t}, F1 {f1[k]:.2f} at p_obj * p_cls >= {confidence}")
    figure.savefig(folder / "frames.png", dpi=60)


# ---- command line

def load_detector(path, input_hw=None, **rvt):
    """Detector of a checkpoint, ours or RVT's, for frames of input_hw (None: those it was trained on; RVT's need it).

    rvt: partition_split and dim_head, which RVT's checkpoints do not tell. ValueError: no checkpoint of either kind.
    """
    saved = read_checkpoint(path)
    if "model_config" not in saved:
        return load_rvt(path, input_hw=input_hw, **rvt)
    try:
        config = ModelConfig(**saved["model_config"])
    except TypeError as error:
        raise ValueError(f"{path}: its model_config is not of this version ({error})") from error
    if input_hw and tuple(input_hw) != config.input_hw:  # no weight depends on it
        config = replace(config, input_hw=input_hw, partition_split=0)
    return load_weights(Detector(config), saved["model"], path)


def main(argv):
    if argv[:1] == ["--compare"]:
        return print(compare(argv[1:]))
    import train  # here, since it imports this file
    path = configure(train.defaults | defaults, argv)["ckpt"]
    trained = dict(read_checkpoint(path).get("config", {}), out_dir=str(Path(path).parent))
    config = SimpleNamespace(**configure(train.defaults | trained | defaults, argv))
    train.check(config)
    keep_buffers()
    device, dtype = train.resolve_device(config)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    sequences = open_split(config.data_dir, config.split)
    hw = sequences[0].hw
    model = load_detector(path, hw, partition_split=config.partition_split, dim_head=config.dim_head).to(device)
    K = model.config.num_classes
    names = load_classes(config.data_dir, config.class_names or tuple(map(str, range(K))))
    largest = max((boxes["class_id"].max() for s in sequences for boxes in s.boxes), default=0)
    if max(len(names), largest + 1) != K:
        raise ValueError(f"{path}: detects {K} classes, but {config.data_dir} has {max(len(names), largest + 1)}")
    if unknown := set(config.small_classes) - set(names):
        raise ValueError(f"small_classes: no {', '.join(sorted(unknown))} in {config.data_dir}: {', '.join(names)}")
    options = {key: getattr(config, key) for key in ("confidence", "nms_iou", "score")}
    T, workers = config.sequence_length, config.num_workers
    labels, found = run(model, sequences, config.eval_batch_size, T, device, dtype, workers, **options)
    if dist.is_initialized() and dist.get_rank():
        return
    result = report(labels, found, *hw, names, config.small_classes, model.config.strides, ckpt=path,
                    data_dir=config.data_dir, split=config.split, sequences=len(sequences), **options,
                    sequence_length=T, dtype=config.dtype, speed=speed(model, sequences[0], dtype))
    path = Path(config.json or Path(config.out_dir, "eval", "report.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\n(?=   |  [}\]])\s*", " ", jsonlib.dumps(result, indent=1))  # one line for each row
    path.write_text(text + "\n")
    pictures(path.parent, result, sequences, labels, found, names, config.picture_confidence)
    print(text.partition(' "rows"')[0], HEAD, *(line(*item) for item in result["rows"].items()), sep="\n")
    print(f"written: report.json, report.png and frames.png in {path.parent}")


if __name__ == "__main__":
    command_line(main)

"""Predictions -> detections -> scores: NMS, streams with carried state, a live detector, COCO scores.

    labels, found = run(model, sequences, 4, 5); scores = score_boxes(labels, found, 360, 640, names)
"""

import copy
import time
from contextlib import redirect_stdout

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from data import make_loader
from formats import BOX_DTYPE, require
from loss import box_iou
from model import Conv, reset_state

SIZES = dict(zip(("tiny, < 16x16 px", "small, < 32x32 px", "medium, to 96x96 px", "large, above"), (  # areas in px^2
    (0, np.nextafter(16 ** 2, 0)), (0, 32 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e10))))


METRICS = ("AP", "AP50", "AP75", "AP_T", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_T", "AR_S", "AR_M", "AR_L")


FILTERS = {"none": "all boxes", "prophesee": "Prophesee filter"}


# beside Prophesee's fields: p_obj * p_cls, whatever class_confidence ranks by, and the stride of the pyramid level
DETECTION_DTYPE = np.dtype(BOX_DTYPE.descr + [("confidence", "<f4"), ("stride", "<u2")])


def nms(box_xyxy, score, label, iou, block=256):
    """Indices of the boxes that greedy non-maximum suppression keeps within each class, best score first.

    box_xyxy (n, 4), score (n,), label (n,) -> (k,) int64. A box goes where a kept box of its label that ranks before it
    overlaps it by more than `iou`; equal scores rank by index. Boxes go block by block: which of a block are kept is
    the one fixed point of "clashes with no kept box before it", and these then thin out the rest. Memory is bounded by
    16 * block^2 pairs, time by n * k pairs.
    """
    def clash(a, b):
        return (box_iou(box[a][:, None], box[b]) > iou) & (label[a][:, None] == label[b])

    box = torch.cat(((box_xyxy[:, :2] + box_xyxy[:, 2:]) / 2, box_xyxy[:, 2:] - box_xyxy[:, :2]), dim=1)  # cx, cy, w, h
    rest, kept = score.argsort(descending=True, stable=True), [label.new_zeros(0, dtype=torch.int64)]
    while len(rest):
        head, rest = rest[:block], rest[block:]
        clashes = clash(head, head).triu(1)
        keep, before = torch.ones_like(head, dtype=torch.bool), None
        while before is None or not torch.equal(keep, before):
            keep, before = ~(clashes & keep[:, None]).any(0), keep
        kept.append(head[keep])
        rest = torch.cat([part[~clash(kept[-1], part).any(0)] for part in rest.split(16 * block)])
    return torch.cat(kept)


def detections(prediction, t_us, confidence=0.001, nms_iou=0.45, score="cls"):
    """Detections of each frame, best p_obj * p_cls first: one array of DETECTION_DTYPE for each of the N frames.

    prediction as from Detector (N frames), t_us: N label times. Each anchor stands for its best class only, is kept
    where p_obj * p_cls >= confidence, and competes on that product. class_confidence is p_cls for score="cls" (RVT
    ranks by it), the product for "obj*cls". Source: RVT's and YOLOX's postprocessing, arXiv 2107.08430.
    """
    require(score in ("cls", "obj*cls"), f"{score=}: expected cls or obj*cls")
    p_cls, label = prediction.cls.sigmoid().max(-1)
    product, out = prediction.obj.sigmoid() * p_cls, []  # (N, A)
    at = frame, anchor = (product >= confidence).nonzero(as_tuple=True)
    rank, (xy, wh) = p_cls if score == "cls" else product, prediction.box_cxcywh[at].split(2, dim=1)
    found = torch.column_stack((xy - wh / 2, xy + wh / 2, label[at], rank[at], product[at], prediction.grid[anchor, 2]))
    counts = frame.bincount(minlength=len(product)).tolist()
    found = found.cpu() if max(counts, default=0) < 4096 else found  # a GPU is slower with a few boxes
    for t, part in zip(t_us, found.split(counts)):  # (candidates, 8)
        rows = part[nms(part[:, :4], part[:, 6], part[:, 4], nms_iou)].tolist()
        out.append(np.array([(t, x, y, r - x, b - y, int(k), 0, *p) for x, y, r, b, k, *p in rows], DETECTION_DTYPE))
    return out


@torch.inference_mode()
def run(model, sequences, batch_size, sequence_length, device="cpu", dtype=torch.float32, num_workers=0, **options):
    """Labels and detections of every labelled frame: two lists of structured arrays, by sequence name, then by frame.

    Sequences play as streams with carried state, in chunks of sequence_length = T frames, from T - 1 frames before
    their first label (as RVT's do) to their last; the longest first, sharded over the ranks of torchrun, where every
    rank gets the whole result. `model` is on `device`; options: confidence, nms_iou, score of `detections`.
    """
    T, training, kind, found = sequence_length, model.training, torch.device(device).type, {}
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sequences = sorted((s for s in sequences if len(s.label_frames)), key=lambda s: s.name)
    labelled = {(i, int(t)): boxes for i, s in enumerate(sequences) for t, boxes in zip(s.label_frames, s.boxes)}
    spans = [range(max(int(s.label_frames[0]) - T + 1, 0), int(s.label_frames[-1]) + 1, T) for s in sequences]
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i]))[rank::world]
    # the longest first, so no slot outlasts the one before it, and the batch gets smaller from its end
    slots = [[(i, t) for i in order[b::batch_size] for t in spans[i]] for b in range(batch_size)[:len(order) or 1]]
    steps = [[slot[k] for slot in slots if k < len(slot)] for k in range(len(slots[0]))]

    def read(k):
        """Events (T, B, 20, H, W) uint8 of step k, zeros behind the end of a sequence."""
        events = torch.zeros(T, len(steps[k]), 20, *sequences[0].hw, dtype=torch.uint8, pin_memory=kind == "cuda")
        for b, (i, t) in enumerate(steps[k]):
            sequences[i].read(t, min(t + T, sequences[i].length), events[:, b].numpy())
        return events

    loader, state = make_loader(read, 0, num_workers), model.eval().initial_state(len(slots))
    for step in tqdm(steps, "evaluating", unit=" chunks", leave=False, disable=rank > 0):
        due = {n: at for n, at in enumerate((i, t + k) for k in range(T) for i, t in step) if at in labelled}
        index = torch.tensor([*due], dtype=torch.int64, device=device)
        first = torch.tensor([t == spans[i][0] for i, t in step], device=device)
        state = reset_state([s[:len(step)] for s in state], first)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            prediction, state = model(next(loader).to(device, non_blocking=True), state, index)
        found |= zip(due.values(), detections(prediction, [labelled[at]["t"][0] for at in due.values()], **options))
    model.train(training)
    if world > 1:
        dist.all_gather_object(shards := [None] * world, found)
        found = {at: boxes for shard in shards for at, boxes in shard.items()}
    return list(labelled.values()), [found[at] for at in labelled]


class StreamDetector:
    """Detector for live streams: one 50 ms frame in, boxes out, state kept from call to call.

    model: a Detector, of which it keeps a copy in `dtype` with batch norm folded; on a GPU captured as a CUDA graph.
    options: confidence, nms_iou, score as in `detections`.

        detector = StreamDetector(model)
        boxes = detector(frame)         # frame (20, H, W) uint8 -> BOX_DTYPE (n,), pixels of the frame, best first
        detector.reset()                # before another recording
    """

    def __init__(self, model, dtype=torch.float32, **options):
        self.options, self.graph, self.ms, self.state = options, None, [], model.initial_state(1)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for part in [part for part in self.model.modules() if isinstance(part, Conv)]:  # some 50 kernels fewer
            part.conv, part.bn = torch.nn.utils.fuse_conv_bn_eval(part.conv, part.bn), torch.nn.Identity()
        self.model.to(dtype).grid = model.grid  # cell numbers are not exact in bfloat16
        self.events = torch.zeros(1, 1, 20, *model.config.input_hw, dtype=torch.uint8, device=model.grid.device)
        if self.events.is_cuda:
            device, self.graph = torch.cuda.device(self.events.device), torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.events.device)
            with device, torch.cuda.stream(torch.cuda.Stream(self.events.device)):
                for _ in range(3):  # libraries set up before the capture, which waits for this
                    self.step()
            with device, torch.cuda.graph(self.graph):
                self.step()
        self.reset()

    def step(self):
        """Sets self.prediction; self.state moves on in place, since a CUDA graph has fixed addresses."""
        self.prediction, state = self.model(self.events, self.state)
        torch._foreach_copy_(self.state, state)

    def __call__(self, frame, t_us=None):
        """Boxes of BOX_DTYPE in the next frame, at t_us (None: 50 ms after the one before). ValueError: its size."""
        require(frame.shape == self.events.shape[2:], f"a frame of {*frame.shape,}, expected {*self.events.shape[2:],}")
        start, self.t_us = time.perf_counter(), self.t_us + 50_000 if t_us is None else t_us
        self.events.copy_(torch.as_tensor(frame))
        self.graph.replay() if self.graph else self.step()
        found = detections(self.prediction, [self.t_us], **self.options)[0]
        self.ms = [*self.ms[-999:], 1000 * (time.perf_counter() - start)]
        return found[list(BOX_DTYPE.names)].astype(BOX_DTYPE)

    def reset(self):
        """Forget what was seen."""
        self.t_us = 0
        torch._foreach_zero_(self.state)

    def speed(self):
        """Device, frames per second, and ms a frame of the last 1000 calls but for a tenth: median, 95th percentile."""
        on, (median, p95) = self.events.device, np.percentile(self.ms[len(self.ms) // 10:], (50, 95)).round(3).tolist()
        name = torch.cuda.get_device_name(on) if on.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        return {"device": name, "frames_per_s": round(1000 / median, 1), "ms_median": median, "ms_p95": p95}


def prophesee_filter(boxes, width):
    """The boxes that the Prophesee protocol scores: later than 0.5 s, diagonal >= 60 px, sides >= 20 px at 1280x720.

    Other widths in proportion, but for Gen1 (304 px), which has 30 and 10 px. Source: Perot et al. 2020,
    arXiv 2009.13436, as its toolbox and RVT apply it, to labels and detections.
    """
    w, h, scale = boxes["w"], boxes["h"], 0.5 if width == 304 else width / 1280
    return boxes[(boxes["t"] > 500_000) & (np.minimum(w, h) >= 20 * scale) & (w ** 2 + h ** 2 >= (60 * scale) ** 2)]


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
    require(box_filter in FILTERS, f"{box_filter=}: expected {' or '.join(FILTERS)}")
    if box_filter == "prophesee":
        labels, detections = ([prophesee_filter(boxes, width) for boxes in side] for side in (labels, detections))
    ids = sorted(range(len(class_names)) if class_ids is None else class_ids)
    pairs, coco = [pair for pair in zip(labels, detections) if len(pair[0])], COCOeval(iouType="bbox")
    coco.params.imgIds, coco.params.catIds, coco.params.useCats = list(range(len(pairs))), ids, int(not class_agnostic)
    # what it prepares, _gts and _dts, is filled below, from other containers than its own
    coco.params.areaRng, coco._prepare = [(0, 1e10), *SIZES.values()], lambda: None
    for k, pair in enumerate(pairs):
        for side, boxes in zip((coco._gts, coco._dts), pair):
            columns = *(boxes[name] for name in ("class_id", "class_confidence", *"xywh")), boxes["w"] * boxes["h"]
            for n, (i, rank, *xywh, area) in enumerate(zip(*(column.tolist() for column in columns)), 1):
                side[k, i].append(dict(id=n, score=rank, bbox=xywh, area=area, ignore=0, iscrowd=0))
    with redirect_stdout(None):
        coco.evaluate()
        coco.accumulate()
    precision, recall = coco.eval["precision"], coco.eval["recall"]  # (10, 101, K, 5 sizes, 3 limits), (10, K, 5, 3)

    def summary(at, ids):
        """METRICS of the classes `at` in precision and recall, with the numbers of frames and of boxes of `ids`."""
        p, r = precision[:, :, at].transpose(4, 3, 0, 1, 2), recall[:, at].transpose(3, 2, 0, 1)  # (3, 5, 10, ...)
        values = (p[2, 0], p[2, 0, 0], p[2, 0, 5], *p[2, 1:], *r[:, 0], *r[2, 1:])
        mean = {metric: float(v[v > -1].mean()) if (v > -1).any() else -1.0 for metric, v in zip(METRICS, values)}
        return mean | {"frames": len(pairs), "boxes": sum(len(coco._gts[k, i]) for k in range(len(pairs)) for i in ids)}

    classes = {class_names[i]: summary(slice(k, k + 1), [i]) for k, i in enumerate([] if class_agnostic else ids)}
    return summary(slice(None), ids) | {"classes": classes, "curves": dict(zip(classes, precision[0, :, :, 0, 2].T))}

"""Predictions -> detections -> scores: NMS, streams with state, a live detector, COCO scores.

In: a Detector of model.py and the sequences of data.open_split. Out: labels and detections of
each labelled frame, as structured arrays, and their scores. `python eval.py` makes a report:

    labels, found = run(model, sequences, batch_size=4, sequence_length=5)
    scores = score_boxes(labels, found, 360, 640, class_names)
"""

import copy
import itertools

import numpy as np
import torch
import torch.distributed as dist
from hotcoco import COCO, COCOeval
from numpy.lib.recfunctions import (
    require_fields,
    structured_to_unstructured,
    unstructured_to_structured,
)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import make_loader
from formats import BOX_DTYPE, CHANNELS, WINDOW_US
from loss import box_iou
from model import Conv

# Beside the fields of labels: p_obj * p_cls, whatever class_confidence ranks by.
DETECTION_DTYPE = np.dtype([*BOX_DTYPE.descr, ("confidence", "<f4")])

# Which boxes are scored, and how the report calls that.
FILTERS = {"none": "all boxes", "prophesee": "Prophesee filter"}

# Sizes that are scored apart: smallest and largest area, in pixels^2. All but tiny are COCO's.
SIZES = {
    "T": (0, np.nextafter(256, 0)),
    "S": (0, 1024),
    "M": (1024, 9216),
    "L": (9216, 1e10),
}


# ---- predictions -> detections


def nms(box_xyxy, score, label, iou, block=128):
    """Indices of the boxes that greedy non-maximum suppression keeps in each class, best first.

    box_xyxy (n, 4), score (n,), label (n,) -> (k,) int64. A box is dropped if a kept box of its
    label that ranks before it overlaps it by more than `iou`; equal scores rank by index. Memory
    is bounded by k * block pairs of boxes, time by k * n.
    """
    low, high = box_xyxy.split(2, dim=1)
    box_cxcywh = torch.cat(((low + high) / 2, high - low), dim=1)
    rest = score.argsort(descending=True, stable=True)
    kept = [rest[:0]]
    while len(rest):
        part = rest[:block, None]
        clash = box_iou(box_cxcywh[part], box_cxcywh[rest]) > iou
        drops = (clash & (label[part] == label[rest])).triu(1).numpy()  # (block, rest)
        keep = np.ones(len(rest), bool)
        for i, dropped in enumerate(drops):  # a box that is still there drops those after it
            if keep[i]:
                keep &= ~dropped
        kept.append(rest[:block][keep[:block]])
        rest = rest[block:][keep[block:]]
    return torch.cat(kept)


def detections(prediction, t_us, confidence=0.001, nms_iou=0.45, score="cls"):
    """Detections of each frame, best p_obj * p_cls first: N arrays of DETECTION_DTYPE.

    prediction as from Detector (N frames), t_us: N label times. Each anchor stands for its best
    class only, is kept where p_obj * p_cls >= confidence, and competes on that product.
    class_confidence is p_cls for score="cls" (RVT ranks by it), the product for "obj*cls".
    Source: RVT's and YOLOX's postprocessing, arXiv 2107.08430.
    """
    if score not in ("cls", "obj*cls"):
        raise ValueError(f"score={score!r}: expected cls or obj*cls")
    p_cls, label = prediction.cls.sigmoid().max(-1)  # (N, A)
    product = prediction.obj.sigmoid() * p_cls
    rank = p_cls if score == "cls" else product
    center, size = prediction.box_cxcywh.split(2, dim=-1)
    low = center - size / 2
    high = center + size / 2
    others = torch.stack((label, 0 * label, rank, product), dim=-1)
    columns = torch.cat((low, high, low, high - low, others), dim=-1)  # (N, A, 12)

    found = []
    for t, rows, candidate in zip(t_us, columns, product >= confidence):
        rows = rows[candidate].cpu()  # a GPU is slower with a few boxes
        rows = rows[nms(rows[:, :4], rows[:, 11], rows[:, 8], nms_iou)]
        # Behind `high` they are the fields of DETECTION_DTYPE, but for the time.
        rows = np.column_stack((np.full(len(rows), t), rows[:, 4:]))
        found.append(unstructured_to_structured(rows, DETECTION_DTYPE))
    return found


# ---- streams


def batches(sequences, T, batch_size):
    """Batches of chunks of T frames that play all sequences up to their last labels.

    Groups of about one length play side by side, where the shorter ones end before. Yields the
    number of the batch in its group and its chunks: [(sequence, first frame), ...].
    """
    plays = []
    for sequence in sequences:
        frames = sequence.label_frames
        if len(frames):
            first = max(frames[0] - T + 1, 0)  # RVT, too, starts T - 1 frames before the first
            plays.append([(sequence, start) for start in range(first, frames[-1] + 1, T)])
    plays.sort(key=len, reverse=True)
    for first in range(0, len(plays), batch_size):
        group = plays[first : first + batch_size]
        for k, chunks in enumerate(itertools.zip_longest(*group)):
            yield k, [chunk for chunk in chunks if chunk]


@torch.inference_mode()
def run(
    model, sequences, batch_size, sequence_length,
    device="cpu", dtype=torch.float32, num_workers=0, **options,
):
    """Labels and detections of every labelled frame, in order: two lists of arrays.

    Sequences (each has its own name) play as streams with carried state, sharded over the ranks
    of torchrun, where every rank gets the whole result. model: on `device`; options: confidence,
    nms_iou, score of `detections`.
    """
    T = sequence_length
    rank = 0
    world = 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    labels = {}  # by (name, frame)
    for sequence in sequences:
        for frame, boxes in zip(sequence.label_frames, sequence.boxes):
            labels[sequence.name, frame] = boxes
    steps = list(batches(sequences[rank::world], T, batch_size))

    def read(step):
        """Events (T, B, 20, H, W) uint8 of a step, zeros behind the end of a sequence."""
        _, chunks = step
        clips = []
        for sequence, start in chunks:
            stop = min(start + T, sequence.length)
            clips.append(torch.from_numpy(sequence.read(start, stop)))
        return pad_sequence(clips)  # T is less where all have ended

    training = model.training
    model.eval()
    loader = make_loader(read, steps, num_workers)
    found = {}
    for k, chunks in tqdm(steps, "evaluating", leave=False, disable=rank > 0):
        # A group starts from nothing; the sequences that have ended were its last.
        if k == 0:
            state = None
        else:
            state = [s[: len(chunks)] for s in state]
        frames = itertools.product(range(T), chunks)
        keys = [(sequence.name, start + t) for t, (sequence, start) in frames]
        labelled = torch.tensor([key in labels for key in keys]).view(T, -1)
        events = next(loader).to(device)
        with torch.autocast(events.device.type, dtype, enabled=dtype != torch.float32):
            prediction, state = model(events, state, labelled)
        due = [key for key in keys if key in labels]
        t_us = [labels[key]["t"][0] for key in due]
        found |= zip(due, detections(prediction, t_us, **options))
    model.train(training)

    if world > 1:
        shards = [None] * world
        dist.all_gather_object(shards, found)
        for shard in shards:
            found |= shard
    return list(labels.values()), [found[key] for key in labels]


class StreamDetector:
    """Detector for live streams: one 50 ms frame in, boxes out, state kept from call to call.

    model: a Detector, of which it keeps a copy in `dtype` with batch norm folded; on a GPU
    captured as a CUDA graph. options: confidence, nms_iou, score as in `detections`.

        detector = StreamDetector(model)
        boxes = detector(frame)   # frame (20, H, W) uint8 -> BOX_DTYPE (n,), pixels, best first
        detector.reset()          # before another recording
    """

    def __init__(self, model, dtype=torch.float32, **options):
        self.options = options
        self.state = model.initial_state(1)
        self.model = copy.deepcopy(model).eval()
        for part in self.model.modules():
            if isinstance(part, Conv):  # some 50 kernels fewer
                part.conv = torch.nn.utils.fuse_conv_bn_eval(part.conv, part.bn)
                part.bn = torch.nn.Identity()
        self.model.to(dtype)
        self.model.grid = model.grid  # cell numbers are not exact in bfloat16
        self.frame = model.grid.new_zeros(CHANNELS, *model.config.input_hw, dtype=torch.uint8)
        self.graph = None
        if self.frame.is_cuda:
            self.step()  # libraries set up before the capture
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.frame.device), torch.cuda.graph(self.graph):
                self.step()
        self.reset()

    @torch.no_grad()
    def step(self):
        """Set self.prediction, and self.state in place, as a CUDA graph has fixed addresses."""
        self.prediction, state = self.model(self.frame[None, None], self.state)
        torch._foreach_copy_(self.state, state)

    def __call__(self, frame, t_us=None):
        """Boxes of BOX_DTYPE in the next frame, at t_us (None: 50 ms after the one before).

        ValueError: a frame of another size.
        """
        size = self.frame.shape
        if frame.shape != size:  # copy_ would repeat a smaller one
            raise ValueError(f"a frame of {tuple(frame.shape)}, expected {tuple(size)}")
        self.frame.copy_(torch.as_tensor(frame))
        self.t_us = self.t_us + WINDOW_US if t_us is None else t_us
        if self.graph:
            self.graph.replay()
        else:
            self.step()
        found = detections(self.prediction, [self.t_us], **self.options)[0]
        return require_fields(found, BOX_DTYPE)

    def reset(self):
        """Forget what was seen."""
        self.t_us = 0
        torch._foreach_zero_(self.state)


# ---- scores


def prophesee_filter(boxes, width):
    """The boxes that Prophesee's protocol scores: later than 0.5 s, and large enough.

    At 1280x720 the diagonal has 60 px or more, a side 20 px; other widths in proportion, but for
    Gen1 (304 px), which has 30 and 10 px. Source: Perot et al. 2020, arXiv 2009.13436, as its
    toolbox and RVT apply it, to labels and detections.
    """
    scale = 0.5 if width == 304 else width / 1280
    w, h = boxes["w"], boxes["h"]
    long = w**2 + h**2 >= (60 * scale) ** 2
    wide = np.minimum(w, h) >= 20 * scale
    return boxes[(boxes["t"] > 500_000) & long & wide]


def table(frames, scored, class_ids):
    """Boxes as rows (n, 7): frame, x, y, w, h, class_confidence, class_id.

    scored: numbers of the frames that count; class_ids: the classes that count, None: all.
    """
    fields = ["x", "y", "w", "h", "class_confidence", "class_id"]
    rows = [np.zeros((0, 7))]
    for k in scored:
        values = structured_to_unstructured(frames[k][fields], float)
        rows.append(np.insert(values, 0, k, axis=1))
    rows = np.concatenate(rows)
    if class_ids is not None:
        rows = rows[np.isin(rows[:, 6], class_ids)]
    return rows[rows[:, 6].argsort(kind="stable")]  # equal scores rank by class, as in pycocotools


def score_row(coco, classes, sizes):
    """Row of the report for some classes: numbers in 0..1, -1 where undefined.

    coco: a COCOeval that has accumulated. A metric of your own becomes a column of the report
    where it is added to the row.
    """

    def mean(values):
        defined = values[values > -1]
        return float(defined.mean()) if defined.size else -1.0

    # By IoU 0.5, 0.55, ... 0.95; recall 0, 0.01, ... 1; class; size (all, then sizes); of at most
    # 100 detections in a frame, or of at most 1, 10, 100.
    precision = coco.eval["precision"][:, :, classes]  # (10, 101, K, 5, 3)
    recall = coco.eval["recall"][:, classes]  # (10, K, 5, 3)
    row = {
        "frames": len(coco.params.img_ids),
        "boxes": len(coco.coco_gt.get_ann_ids(cat_ids=classes)),
        "AP": mean(precision[..., 0, 2]),
        "AP50": mean(precision[0, ..., 0, 2]),
        "AP75": mean(precision[5, ..., 0, 2]),
        "AR1": mean(recall[..., 0, 0]),
        "AR10": mean(recall[..., 0, 1]),
        "AR100": mean(recall[..., 0, 2]),
    }
    for k, size in enumerate(sizes, 1):
        row[f"AP_{size}"] = mean(precision[..., k, 2])
        row[f"AR_{size}"] = mean(recall[..., k, 2])
    return row


def score_boxes(
    labels, detections, height, width, class_names,
    box_filter="none", class_agnostic=False, class_ids=None, sizes=SIZES,
):
    """COCO scores of detections, by hotcoco, which equals pycocotools: a row of `score_row`.

    labels, detections: lists of structured arrays (t, x, y, w, h, class_id, class_confidence), one
    of each per frame. Frames without labels (after the filter) are not scored. class_agnostic:
    classes do not matter for a match, as with the eTraM fork's useCats=0; class_ids: only these
    classes exist, but frames with labels of others stay; sizes: as SIZES, of which T is under
    16x16 px, S under 32x32 (tiny ones too), M up to 96x96, L above.
    -> the row, and "classes": {name: the row of this class}; "curves" (101, K): precision over
    recall 0..1 at IoU 0.5; "confusion" (K + 1, K + 1): counts of labelled (rows) against detected
    class, where K is the background and detections choose in turn, best first: each the free label
    of any class that it overlaps most, if their IoU is 0.5 or more.
    """
    if box_filter not in FILTERS:
        raise ValueError(f"box_filter={box_filter!r}: expected {' or '.join(FILTERS)}")
    if box_filter == "prophesee":
        labels = [prophesee_filter(boxes, width) for boxes in labels]
        detections = [prophesee_filter(boxes, width) for boxes in detections]
    scored = np.flatnonzero(list(map(len, labels)))  # frames without labels do not count
    truth = table(labels, scored, class_ids)
    found = table(detections, scored, class_ids)
    if class_agnostic:
        truth[:, 6] = 0
        found[:, 6] = 0
        class_names = ["all"]
    K = len(class_names)
    empty = COCO({
        "images": [{"id": k} for k in scored],
        "categories": [{"id": k, "name": "class"} for k in range(K)],
        "annotations": [],
    })
    coco = COCOeval(empty.load_res(truth), empty.load_res(found), "bbox")
    coco.params.area_rng = [(0, 1e10), *sizes.values()]
    coco.evaluate()
    coco.accumulate()
    return score_row(coco, range(K), sizes) | {
        "classes": {name: score_row(coco, [k], sizes) for k, name in enumerate(class_names)},
        "curves": coco.eval["precision"][0, :, :, 0, 2],
        "confusion": coco.confusion_matrix()["matrix"],
    }

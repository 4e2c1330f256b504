"""Predictions -> detections -> scores: NMS, streams with state, a live detector, COCO scores.

In: a Detector of model.py and the sequences of data.open_split. Out: labels and detections of
each labelled frame, as structured arrays, and their scores. `python eval.py` makes a report:

    labels, found = run(model, sequences, batch_size=4, sequence_length=5)
    scores = score_boxes(labels, found, 360, 640, class_names)
"""

import copy
import itertools
import time
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from hotcoco import COCO, COCOeval
from numpy.lib.recfunctions import unstructured_to_structured
from tqdm import tqdm

from data import make_loader
from formats import BOX_DTYPE
from loss import box_iou
from model import Conv

# Beside the fields of labels: p_obj * p_cls, whatever class_confidence ranks by.
DETECTION_DTYPE = np.dtype([*BOX_DTYPE.descr, ("confidence", "<f4")])

# Which boxes are scored, and how the report calls that.
FILTERS = {
    "none": "all boxes",
    "prophesee": "Prophesee filter",
}

# Sizes that are scored apart: smallest and largest area, in pixels^2. All but "tiny" are COCO's.
SIZES = {
    "tiny, < 16x16 px": (0, np.nextafter(16**2, 0)),
    "small, < 32x32 px": (0, 32**2),
    "medium, to 96x96 px": (32**2, 96**2),
    "large, above": (96**2, 1e10),
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

    def clashes(one, other):
        """Which of the boxes `one` (a,) and `other` (b,) exclude each other: (a, b) bool."""
        overlap = box_iou(box_cxcywh[one][:, None], box_cxcywh[other])
        return (overlap > iou) & (label[one][:, None] == label[other])

    order = score.argsort(descending=True, stable=True)
    kept = order[:0]
    for part in order.split(block):
        part = part[~clashes(kept, part).any(0)]
        # Within the block one by one: a box that is still there drops those after it.
        drops = clashes(part, part).triu(1).cpu().numpy()
        keep = np.ones(len(part), bool)
        for i in range(len(part)):
            if keep[i]:
                keep &= ~drops[i]
        kept = torch.cat((kept, part[torch.from_numpy(keep)]))
    return kept


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
        for k in range(len(group[0])):
            yield k, [play[k] for play in group if k < len(play)]


@torch.inference_mode()
def run(
    model,
    sequences,
    batch_size,
    sequence_length,
    device="cpu",
    dtype=torch.float32,
    num_workers=0,
    **options,
):
    """Labels and detections of every labelled frame: two lists of arrays, by name, then frame.

    Sequences (each has its own name) play as streams with carried state, sharded over the ranks
    of torchrun, where every rank gets the whole result. model: on `device`; options: confidence,
    nms_iou, score of `detections`.
    """
    T = sequence_length
    kind = torch.device(device).type
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()

    labels = {}  # by (name, frame)
    for sequence in sorted(sequences, key=lambda s: s.name):
        for frame, boxes in zip(sequence.label_frames, sequence.boxes):
            labels[sequence.name, frame] = boxes

    steps = list(batches(sequences[rank::world], T, batch_size))

    def read(index):
        """Events (T, B, 20, H, W) uint8 of a step, zeros behind the end of a sequence."""
        chunks = steps[index][1]
        shape = (T, len(chunks), 20, *sequences[0].hw)
        events = torch.zeros(shape, dtype=torch.uint8, pin_memory=kind == "cuda")
        for b, (sequence, start) in enumerate(chunks):
            stop = min(start + T, sequence.length)
            sequence.read(start, stop, events[:, b].numpy())
        return events

    training = model.training
    model.eval()
    loader = make_loader(read, 0, num_workers)
    found = {}
    for k, chunks in tqdm(steps, "evaluating", leave=False, disable=rank > 0):
        # A group starts from nothing; the sequences that have ended were its last.
        if k == 0:
            state = model.initial_state(len(chunks))
        state = [s[: len(chunks)] for s in state]
        frames = itertools.product(range(T), chunks)
        keys = [(sequence.name, start + t) for t, (sequence, start) in frames]
        labelled = torch.tensor([key in labels for key in keys])
        due = [key for key in keys if key in labels]
        events = next(loader).to(device, non_blocking=True)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            prediction, state = model(events, state, labelled.view(T, -1))
        t_us = [labels[key]["t"][0] for key in due]
        found.update(zip(due, detections(prediction, t_us, **options)))
    model.train(training)

    if world > 1:
        shards = [None] * world
        dist.all_gather_object(shards, found)
        for shard in shards:
            found.update(shard)
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
        self.ms = deque(maxlen=1000)  # of the last calls
        self.state = model.initial_state(1)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for part in self.model.modules():
            if isinstance(part, Conv):  # some 50 kernels fewer
                part.conv = torch.nn.utils.fuse_conv_bn_eval(part.conv, part.bn)
                part.bn = torch.nn.Identity()
        self.model.to(dtype)
        self.model.grid = model.grid  # cell numbers are not exact in bfloat16
        shape = (1, 1, 20, *model.config.input_hw)
        self.events = torch.zeros(shape, dtype=torch.uint8, device=model.grid.device)
        self.graph = None
        if self.events.is_cuda:
            self.capture()
        self.reset()

    @torch.no_grad()
    def step(self):
        """Set self.prediction, and self.state in place, as a CUDA graph has fixed addresses."""
        self.prediction, state = self.model(self.events, self.state)
        torch._foreach_copy_(self.state, state)

    def capture(self):
        """Make self.graph, a CUDA graph of step()."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.events.device):
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):  # libraries set up before the capture, which waits for this
                    self.step()
            with torch.cuda.graph(self.graph):
                self.step()

    def __call__(self, frame, t_us=None):
        """Boxes of BOX_DTYPE in the next frame, at t_us (None: 50 ms after the one before).

        ValueError: a frame of another size.
        """
        size = tuple(self.events.shape[2:])
        if frame.shape != size:
            raise ValueError(f"a frame of {tuple(frame.shape)}, expected {size}")
        start = time.perf_counter()
        self.t_us = self.t_us + 50_000 if t_us is None else t_us
        self.events.copy_(torch.as_tensor(frame))
        if self.graph:
            self.graph.replay()
        else:
            self.step()
        found = detections(self.prediction, [self.t_us], **self.options)[0]
        self.ms.append(1000 * (time.perf_counter() - start))
        return found[list(BOX_DTYPE.names)].astype(BOX_DTYPE)

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


def table(frames, box_filter, width):
    """Rows (n, 7) of the boxes of all frames: frame, x, y, w, h, class_confidence, class_id."""
    rows = [np.zeros((0, 7))]
    for k, boxes in enumerate(frames):
        if box_filter == "prophesee":
            boxes = prophesee_filter(boxes, width)
        columns = [boxes[name] for name in ("x", "y", "w", "h", "class_confidence", "class_id")]
        rows.append(np.column_stack((np.full(len(boxes), k), *columns)))
    rows = np.concatenate(rows)
    return rows[rows[:, 6].argsort(kind="stable")]  # equal scores rank by class, as in pycocotools


def score_row(truth, found, ids):
    """Row of the report, numbers in 0..1, -1 where undefined; and the curve at IoU 0.5 (101,).

    truth, found: labels and detections as from `table`; ids: the classes that are scored as one,
    in the frames with labels of any class. A metric of your own becomes a column of the report
    where it is added to the row.
    """
    frames = np.unique(truth[:, 0])
    truth = truth[np.isin(truth[:, 6], ids)]
    # hotcoco would warn of each detection in other frames
    found = found[np.isin(found[:, 6], ids) & np.isin(found[:, 0], frames)]
    images = [{"id": k} for k in frames]
    kinds = [{"id": 1, "name": "object"}]  # load_res fills in a 1, too
    labels = COCO.from_arrays(images, kinds, truth[:, 0], np.ones(len(truth)), truth[:, 1:5])
    coco = COCOeval(labels, labels.load_res(found[:, :6]), "bbox")
    coco.params.area_rng = [(0, 1e10), *SIZES.values()]
    coco.evaluate()
    coco.accumulate()

    # By IoU 0.5, 0.55, ... 0.95; recall 0, 0.01, ... 1; size (all, then SIZES); of at most 100
    # detections in a frame, or of at most 1, 10, 100.
    precision = coco.eval["precision"][:, :, 0, :, 2]  # (10, 101, 5)
    recall = coco.eval["recall"][:, 0]  # (10, 5, 3)
    curve = precision[0, :, 0]
    ap = precision.mean((0, 1))
    ar = recall.mean(0)
    row = {
        "frames": len(frames),
        "boxes": len(truth),
        "AP": ap[0],
        "AP50": curve.mean(),
        "AP75": precision[5, :, 0].mean(),
        "AP_T": ap[1],
        "AP_S": ap[2],
        "AP_M": ap[3],
        "AP_L": ap[4],
        "AR1": ar[0, 0],
        "AR10": ar[0, 1],
        "AR100": ar[0, 2],
        "AR_T": ar[1, 2],
        "AR_S": ar[2, 2],
        "AR_M": ar[3, 2],
        "AR_L": ar[4, 2],
    }
    return row, curve


def class_mean(rows):
    """Row of several classes: means over those in which a metric is defined, boxes of all."""
    total = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] > -1]
        total[name] = float(np.mean(values)) if values else -1.0
    total["frames"] = rows[0]["frames"]
    total["boxes"] = sum(row["boxes"] for row in rows)
    return total


def score_boxes(
    labels,
    detections,
    height,
    width,
    class_names,
    box_filter="none",
    class_agnostic=False,
    class_ids=None,
):
    """COCO scores of detections, by hotcoco, which equals pycocotools: a row of `score_row`.

    labels, detections: lists of structured arrays (t, x, y, w, h, class_id, class_confidence), one
    of each per frame; T, S, M, L are boxes under 16x16 px, under 32x32 (tiny ones too), up to
    96x96, and above. Frames without labels (after the filter) are not scored. class_agnostic:
    classes do not matter for a match, as with the eTraM fork's useCats=0; class_ids: only these
    classes exist, but frames with labels of others stay.
    -> the row, and "classes": {name: the row of this class} and "curves": {name: precision (101,)
    over recall 0..1 at IoU 0.5}, both of "all" where class_agnostic.
    """
    if box_filter not in FILTERS:
        raise ValueError(f"box_filter={box_filter!r}: expected {' or '.join(FILTERS)}")
    truth = table(labels, box_filter, width)
    found = table(detections, box_filter, width)
    ids = range(len(class_names)) if class_ids is None else class_ids
    groups = {"all": ids}
    if not class_agnostic:
        groups = {class_names[i]: [i] for i in ids}
    rows = {}
    curves = {}
    for name, group in groups.items():
        rows[name], curves[name] = score_row(truth, found, group)
    return class_mean(list(rows.values())) | {"classes": rows, "curves": curves}

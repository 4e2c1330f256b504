"""All drawing: event frames with boxes, training curves, the report's charts and frames, box sizes.

In: frames, boxes, the rows of a log, a report. Out: a Pillow image (draw) or a PNG file (the
others), whole or not at all. train.py, eval.py, data.py and demo.py call it.

    from pictures import draw; draw(frame, boxes, class_names).save("frame.png")
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from formats import write
from loss import box_iou

EVENTS = ((90, 150, 255), (255, 140, 40))  # colours of negative and of positive ones


# ---- event frames

def outline(image, scale, box, colour, text=""):
    """Draw a box and a text above it; `image` is a frame enlarged by `scale`, box in its pixels."""
    enlarged = np.multiply([box[name] for name in "xywh"], scale)
    x, y, w, h = np.nan_to_num(enlarged)
    # what lies outside moves to the border
    edges = np.clip([x, y, x + w, y + h], 0, max(image.size) - 1).tolist()
    canvas = ImageDraw.Draw(image)
    canvas.rectangle(edges, outline=colour)
    above = (edges[0], max(edges[1] - 13, 0))
    canvas.text(above, text, colour, stroke_width=2, stroke_fill="black")


def draw(events, detections, class_names, truth=()):
    """Picture (PIL, RGB) of a frame with boxes.

    events (20, H, W) uint8: negative ones are blue, positive ones orange. detections are drawn in
    class colours with their scores, truth (labels) in white, both boxes in pixels of the frame.
    Small frames are enlarged by a whole number, to 480 px at least.
    """
    counts = reduce(events, "(polarity bin) h w -> h w polarity", "sum", polarity=2)
    # four events of a pixel give the full colour, those of both kinds a mixture
    share = counts / counts.sum(2, keepdims=True).clip(4)
    pixels = (share @ EVENTS).astype(np.uint8)  # (H, W, 3)
    scale = -(-480 // events.shape[2])
    image = Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))
    for box in truth:
        outline(image, scale, box, "white")
    for box in detections:
        k = box["class_id"]
        colour = f"hsl({137 * k % 360}, 80%, 70%)"  # golden angle: far apart for any classes
        text = f"{class_names[k]} {box['class_confidence']:.2f}"
        outline(image, scale, box, colour, text)
    return image


# ---- training

def draw_curves(path, rows):
    """Every column of a log over its steps, a panel each, as a picture; rows: dicts with a step."""
    curves = {}
    for row in rows:
        for key, value in row.items():
            curves.setdefault(key, []).append((row["step"], value))
    del curves["step"]
    figure = Figure((16, 8), layout="constrained")
    panels = figure.subplots(-(-len(curves) // 4), 4, squeeze=False)
    for axes, key in zip(panels.flat, curves):
        steps, values = np.transpose(curves[key])
        axes.plot(steps, values, ".-")
        axes.set(title=key, xlabel="step")
    write(path, figure.savefig)


# ---- report

def centred(boxes):
    """Tensor (n, 4) of cx, cy, w, h of structured boxes."""
    x = boxes["x"] + boxes["w"] / 2
    y = boxes["y"] + boxes["h"] / 2
    return torch.from_numpy(np.column_stack((x, y, boxes["w"], boxes["h"])))


def confusion(labels, detections, K, confidence):
    """Counts (F, K + 1, K + 1) in each frame of labelled class (rows) against detected class.

    Class K is the background. Detections with p_obj * p_cls >= confidence choose in turn, best
    first: each the label, of any class and not chosen yet, that it overlaps most, if their IoU is
    0.5 or more, else the background. Labels that none chooses are missed.
    """
    counts = np.zeros((len(labels), K + 1, K + 1), int)
    for count, truth, found in zip(counts, labels, detections):
        found = found[found["confidence"] >= confidence]
        found = found[np.argsort(-found["confidence"])]
        iou = box_iou(centred(found)[:, None], centred(truth)).nan_to_num()
        iou = F.pad(iou, (0, 1), value=0.5)  # the last column is the background
        classes = [*truth["class_id"], K]
        for overlap, detected in zip(iou, found["class_id"]):
            chosen = overlap.argmax()
            count[classes[chosen], detected] += 1
            iou[:, chosen] = 0  # no other detection gets it
            iou[:, -1] = 0.5
        labelled = np.bincount(truth["class_id"], minlength=K)
        count[:K, K] = labelled - count[:K].sum(1)
    return counts


def draw_precision_recall(axes, curves):
    """A line for each class; curves: {name: precision at even steps of recall from 0 to 1}."""
    for name, precision in curves.items():
        recall = np.linspace(0, 1, len(precision))
        axes.plot(recall, precision, label=name)
    axes.set(
        title="IoU 0.5, all boxes",
        xlabel="recall",
        ylabel="precision",
    )
    axes.legend()


def draw_confusion(axes, counts, names, confidence):
    """Counts of labelled (rows) against detected class, coloured by their share of the row."""
    share = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(share, cmap="Blues", vmax=2)  # pale, so that black can be read
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, count or "", ha="center")
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_yticks(range(len(names)), names)
    axes.set(
        title=f"boxes, IoU >= 0.5, p_obj * p_cls >= {confidence}",
        xlabel="detected",
        ylabel="labelled",
    )


def draw_ap_by_size(axes, row, sizes):
    """AP of tiny to large boxes as bars; where it is undefined there is none."""
    values = np.array([row[f"AP_{size}"] for size in "TSML"], float)
    bars = axes.bar(sizes, 100 * values)
    axes.bar_label(bars, fmt="%.1f")
    axes.set(title="AP by size, %, class mean, all boxes")


def pictures(path, report, sequences, labels, detections, class_names, confidence=0.3):
    """Write precision-recall, confusion and AP by size, then some frames, as one picture.

    report: as eval.py makes it; labels, detections: boxes of each labelled frame of `sequences`,
    in their order. Confusion and frames show detections with p_obj * p_cls >= confidence.
    """
    figure = Figure((19, 19), layout="constrained")
    left, middle, right, *places = figure.subplots(4, 3).flat
    counts = confusion(labels, detections, len(class_names), confidence)
    draw_precision_recall(left, report["curves"])
    draw_confusion(middle, counts.sum(0), [*class_names, "background"], confidence)
    row = report["rows"]["class mean, all boxes"]
    draw_ap_by_size(right, row, list(report["sizes"]))

    # as many frames as there are places, spread over all sequences
    frames = []
    for sequence in sequences:
        for t in sequence.label_frames:
            frames.append((sequence, t))
    step = len(frames) // len(places) + 1
    for axes, k in zip(places, range(0, len(frames), step)):
        sequence, t = frames[k]
        events = sequence.read(t, t + 1)[0]
        found = detections[k]
        found = found[found["confidence"] >= confidence]
        axes.imshow(draw(events, found, class_names, labels[k]))
        axes.set_title(f"{sequence.name}, frame {t}")
        axes.set_axis_off()
    write(path, figure.savefig)


# ---- data set

def draw_box_sizes(path, sides):
    """Histogram of box sides (sqrt of the area, pixels), one line for each split of `sides`."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.hist(
        list(sides.values()),
        bins=60,
        histtype="step",
        label=list(sides),
    )
    axes.set(
        xlabel="sqrt(box area), pixels",
        ylabel="boxes",
        yscale="log",
    )
    axes.legend()
    write(path, figure.savefig)

"""All drawing: event frames with boxes, training curves, the report's charts and frames, box sizes.

In: frames, boxes, the rows of a log, a report. Out: a Pillow image (draw) or a PNG file (the
others), whole or not at all. train.py, eval.py, data.py, demo.py and ablation.py call it.

    from pictures import draw; draw(frame, boxes, class_names).save("frame.png")
"""

import numpy as np
from einops import reduce
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from formats import write

EVENTS = ((90, 150, 255), (255, 140, 40))  # colours of negative and of positive ones
STRONG = 0.3  # least p_obj * p_cls of the detections in a report's confusion and frames


# ---- event frames

def outline(image, scale, box, colour, text=""):
    """Draw a box and a text above it; `image` is a frame enlarged by `scale`, box in its pixels."""
    x, y, w, h = np.nan_to_num([box[name] * scale for name in "xywh"])
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
    keys = sorted(set().union(*rows) - {"step"})
    figure = Figure((16, 8), layout="constrained")
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(-(-len(keys) // 4), 4, place, title=key, xlabel="step")
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*np.transpose(points), ".-")
    write(path, figure.savefig)


# ---- report

def draw_confusion(axes, counts, names):
    """Counts of labelled (rows) against detected class."""
    axes.imshow(np.log1p(counts), cmap="Blues", alpha=0.5)  # pale, so that black can be read
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, count, ha="center")
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_yticks(range(len(names)), names)
    axes.set(
        title=f"boxes, IoU >= 0.5, p_obj * p_cls >= {STRONG}",
        xlabel="detected",
        ylabel="labelled",
    )


def draw_report(path, report, confusion, sequences, labels, detections):
    """Write precision-recall, confusion and AP by size, then some frames, as one picture.

    report: as eval.py makes it; confusion: counts as of score_boxes; labels, detections: boxes
    that are shown in each labelled frame of `sequences`, in their order.
    """
    figure = Figure((19, 19), layout="constrained")
    left, middle, right, *places = figure.subplots(4, 3).flat
    names = report["settings"]["classes"]

    # precision at recall 0, 0.01, ... 1, a line for each class
    left.plot(np.linspace(0, 1, 101), np.transpose(report["curves"]), label=names)
    left.set(
        title="IoU 0.5, all boxes",
        xlabel="recall",
        ylabel="precision",
        ylim=(0, 1.02),  # where there are no labels it is -1
    )
    left.legend()

    draw_confusion(middle, confusion, [*names, "background"])

    # where an AP is undefined there is no bar
    row = report["rows"]["class mean, all boxes"]
    values = np.array([row[f"AP_{size}"] for size in "TSML"], float)
    right.bar_label(right.bar(["tiny", "small", "medium", "large"], values), fmt="%.3f")
    right.set(title="AP by size, class mean, all boxes")

    # as many frames as there are places, spread over all sequences
    frames = []
    for sequence in sequences:
        frames += [(sequence, t) for t in sequence.label_frames]
    step = len(frames) // len(places) + 1
    for axes, k in zip(places, range(0, len(frames), step)):
        sequence, t = frames[k]
        events = sequence.read(t, t + 1)[0]
        axes.imshow(draw(events, detections[k], names, labels[k]))
        axes.set_title(f"{sequence.name}, frame {t}")
        axes.set_axis_off()
    write(path, figure.savefig)


# ---- data set

def draw_box_sizes(path, sides):
    """Histogram of box sides (sqrt of the area, pixels), one line for each split of `sides`."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(
        xlabel="sqrt(box area), pixels",
        ylabel="boxes",
        yscale="log",
    )
    axes.hist(
        list(sides.values()),
        bins=60,
        histtype="step",
        label=list(sides),
    )
    axes.legend()
    write(path, figure.savefig)


# ---- ablation

def draw_differences(path, arms, metrics, differences):
    """Differences (arms, 3, metrics) to the baseline: mean, low, high; a panel for each metric."""
    figure = Figure((20, 4), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True)
    for axes, metric, (mean, low, high) in zip(panels, metrics, np.transpose(differences)):
        axes.errorbar(mean, arms, xerr=(mean - low, high - mean), fmt="o")
        axes.axvline(0, color="gray")
        axes.set(title=metric, xlabel="points")
    write(path, figure.savefig)

"""All drawing: training curves, the report's charts, event frames with boxes, box sizes.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from formats import BOX_DTYPE
from loss import box_iou

BACKGROUND, COLOURS = (20, 22, 28), ((90, 150, 255), (255, 140, 40))  # of negative and of positive events


PALETTE = ("#f2d16b", "#7be08a", "#e58af2", "#6bdcf2", "#f28a8a", "#b3f26b", "#8a9df2", "#f2a76b")  # of classes


def draw(events, detections, class_names, truth=()):
    """Picture (PIL, RGB) of a frame: negative events blue, positive orange, detections in class colours, labels white.

    events (20, H, W) uint8; detections, truth: boxes in its pixels. Small frames are enlarged, to 480 px at least.
    """
    H, W = events.shape[1:]
    scale = -(-480 // W)
    counts = events.reshape(2, 10, H, W).sum(1).clip(0, 4)[..., None] / 4
    pixels = BACKGROUND + sum(count * np.subtract(colour, BACKGROUND) for count, colour in zip(counts, COLOURS))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((W * scale, H * scale), Image.NEAREST)
    canvas = ImageDraw.Draw(image)
    for k, (_, x, y, w, h, kind, _, score) in enumerate(box.tolist() for box in (*truth, *detections)):
        edges = np.clip(np.nan_to_num([x, y, x + w, y + h]) * scale, 0, (W * scale - 1, H * scale - 1) * 2).tolist()
        colour = PALETTE[kind % len(PALETTE)] if k >= len(truth) else "white"
        text = f"{class_names[kind]} {score:.2f}" if k >= len(truth) else ""
        canvas.rectangle(edges, outline=colour, width=2 if k >= len(truth) else 1)
        canvas.text((edges[0], max(edges[1] - 13, 0)), text, colour, stroke_width=2, stroke_fill=BACKGROUND)
    return image


def draw_curves(path, rows):
    """Losses, validation scores and the health of the run over the steps of the log's `rows`, as a picture."""
    panels = {"training loss": ("loss", "iou", "obj", "cls"), "validation, class mean, all boxes": ("AP", "AP50"),
              "gradient norm, matched anchors per box": ("grad_norm", "num_fg")}
    figure = Figure((15, 4), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items()):
        for key in keys:
            axes.plot(*([row[x] for row in rows if row[key] != ""] for x in ("step", key)), ".-", label=key)
        axes.set(title=title, xlabel="step", yscale="linear" if "AP" in keys else "log")
        axes.legend()
    figure.savefig(path, dpi=80)


def confusion(labels, detections, K, confidence):
    """Counts (F, K + 1, K + 1) in each frame of labelled class (rows) against detected class; K is background.

    Detections with p_obj * p_cls >= confidence choose in turn, best first: each the label, of any class and not chosen
    yet, that it overlaps most, if their IoU is 0.5 or more, else the background. Labels that none chooses are missed.
    """
    counts = np.zeros((len(labels), K + 1, K + 1), int)
    for count, truth, found in zip(counts, labels, detections):
        found = np.sort(found[found["confidence"] >= confidence], order="confidence")[::-1]
        centres = ((b["x"] + b["w"] / 2, b["y"] + b["h"] / 2, b["w"], b["h"]) for b in (found[:, None], truth))
        iou = box_iou(*(torch.from_numpy(np.stack(box, axis=-1)) for box in centres)).nan_to_num().numpy()
        classes, free = np.append(truth["class_id"], K), np.ones(len(truth) + 1)  # last the background, always free
        for overlap, detected in zip(np.pad(iou, ((0, 0), (0, 1)), constant_values=0.5), found["class_id"]):
            chosen = (overlap * free).argmax()
            count[classes[chosen], detected] += 1
            free[chosen] = chosen == len(truth)
        np.add.at(count, (classes[:-1][free[:-1] > 0], K), 1)
    return counts


def pictures(path, report, sequences, labels, detections, class_names, confidence=0.3):
    """Write precision-recall, confusion and AP by size, then the best, worst and some random frames, as one picture."""
    names, K, figure = [*class_names, "background"], len(class_names), Figure((24, 23), layout="constrained")
    charts, sheet = figure.subfigures(2, height_ratios=(1, 2))
    curves, matrix, bars = charts.subplots(1, 3)
    curves.plot(np.linspace(0, 1, 26), np.transpose([*report["curves"].values()]), label=[*report["curves"]])
    curves.set(title="IoU 0.5, all boxes", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    counts = confusion(labels, detections, K, confidence)
    total = counts.sum(0)
    matrix.imshow(total / total.sum(1, keepdims=True).clip(1), cmap="Blues", vmax=2)  # pale: black can be read
    for (i, j), n in np.ndenumerate(total):
        matrix.text(j, i, n or "", ha="center")
    matrix.set(title=f"boxes, p_obj * p_cls >= {confidence}, IoU >= 0.5", xlabel="detected", ylabel="labelled",
               xticks=range(K + 1), yticks=range(K + 1), xticklabels=[n[:9] for n in names], yticklabels=names)
    for k, protocol in enumerate(f"class mean, {kind}" for kind in ("all boxes", "Prophesee filter")):
        values = 100 * np.array([report["rows"][protocol][m] for m in ("AP_T", "AP_S", "AP_M", "AP_L")], float)  # None, NaN: no bar
        bars.bar_label(bars.bar(np.arange(4) + 0.4 * k, values, 0.4, label=protocol), fmt="%.1f")
    bars.set(title="AP by size, %", xlim=(-0.5, 3.9), xticks=np.arange(4) + 0.2, xticklabels=[
        f"{name.replace(', ', chr(10))}\n{size['boxes']} boxes" for name, size in report["sizes"].items()])
    curves.legend()
    bars.legend()

    frames = [(s, int(t)) for s in sequences for t in s.label_frames]
    f1 = 2 * np.trace(counts[:, :K, :K], axis1=1, axis2=2) / (counts[:, :K].sum((1, 2)) + counts[:, :, :K].sum((1, 2)))
    order = np.argsort(-f1, kind="stable")
    chosen = {"best": order[:4], "worst": order[-4:], "random": np.random.default_rng(0).permutation(order)[:4]}
    for row, kind in zip(sheet.subplots(3, 4, subplot_kw={"xticks": (), "yticks": ()}), chosen):
        for axes, k in zip(row, chosen[kind]):
            (sequence, t), found = frames[k], detections[k][detections[k]["confidence"] >= confidence]
            axes.imshow(draw(sequence.read(t, t + 1)[0], found[list(BOX_DTYPE.names)], class_names, labels[k]))
            axes.set(title=f"{kind}: {sequence.name}, frame {t}, F1 {f1[k]:.2f}")
    figure.savefig(path, dpi=80)


def draw_box_sizes(path, sides):
    """Histogram of box sides (sqrt of the area, pixels), one line for each split of `sides`."""
    axes = Figure(layout="constrained").subplots()
    axes.hist(list(sides.values()), bins=60, histtype="step", label=list(sides))
    axes.set(xlabel="sqrt(box area), pixels", ylabel="boxes", xticks=(16, 32, 96, 192), yscale="log")
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path)

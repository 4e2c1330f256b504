"""A checkpoint -> numbers and pictures, each line naming its protocol; and a detector for live streams.

In: a checkpoint (ours, RVT's or its eTraM fork's) and prepared sequences. Architecture, data and classes come from the
checkpoint. Out: a table, and in out_dir/eval (out_dir: the checkpoint's folder) report.json and report.png.

    python eval.py --ckpt out/ckpt.pt --split=test
    python eval.py --ckpt rvt-b.ckpt configs/gen1.py --data_dir=datasets/gen1
    python eval.py --compare a/eval/report.json b/eval/report.json
"""

import hashlib
import json as jsonlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist

import train
from checkpoint import load_detector, read_checkpoint
from configurator import command_line, configure, value_of
from data import load_classes, open_split
from detect import FILTERS, METRICS, SIZES, StreamDetector, prophesee_filter, run, score_boxes
from formats import BOX_DTYPE, reading, require, write
from pictures import pictures

ckpt = "out/ckpt.pt"      # checkpoint of train.py, or a Lightning checkpoint of RVT
split = "test"            # train, val or test
score = "cls"             # detections rank by: cls (p_cls, as in RVT) or obj*cls (p_obj * p_cls)
confidence = 0.001        # detections below this p_obj * p_cls are dropped
nms_iou = 0.45            # of two detections of a class that overlap more, the worse is dropped
small_classes = ("pedestrian", "two-wheeler", "bicycle", "motorbike", "wheelchair")  # those there are get a mean
json = ""                 # path of the report (.json is added); empty: out_dir/eval/report.json
dtype = "float32"         # float32, bfloat16 or float16
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

HEAD = " frames   boxes" + "".join(f"{metric:>7}" for metric in METRICS) + "   in %, by protocol"


# ---- predictions -> detections


# ---- streams


# ---- scores


# ---- report

def report(labels, detections, height, width, class_names, small_classes=small_classes, strides=(), **settings):
    """All scores of a run, each row under its protocol, ready for JSON; undefined values are None.

    labels, detections: as `run` returns them; strides: the model's, for a row on the detections of each alone.
    -> "settings" (what was passed, resolution, classes, number and fingerprint of the labels), "sizes" (boxes of each
    size, and the share that the Prophesee filter removes), "rows" ({protocol: frames, boxes, METRICS}), "curves" (per
    class precision at recall 0, 0.04, ... 1 for IoU 0.5, all boxes).
    """
    scene, rows, sizes = (labels, detections, height, width, class_names), {}, {}
    group = [k for k, name in enumerate(class_names) if name in small_classes]
    small = f"small_classes ({', '.join(class_names[k] for k in group) or 'none'}), class mean"
    protocols = {"class mean": {}, "class-agnostic": {"class_agnostic": True}, small: {"class_ids": group}}
    for key, kind in FILTERS.items():
        rows |= {f"{name}, {kind}": score_boxes(*scene, key, **options) for name, options in protocols.items()}
        rows |= {f"{name}, {kind}": row for name, row in rows[f"class mean, {kind}"]["classes"].items()}
    title = "eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"
    rows[title] = score_boxes(*scene, "prophesee", class_agnostic=True, class_ids=range(3))
    rows |= {f"detections of stride {stride} alone, class mean, all boxes": score_boxes(
        labels, [boxes[boxes["stride"] == stride] for boxes in detections], *scene[2:]) for stride in strides}
    curves = {name: curve[::4].round(3).tolist() for name, curve in rows["class mean, all boxes"]["curves"].items()}
    rows = {p: {k: None if row[k] == -1 else row[k] for k in ("frames", "boxes", *METRICS)} for p, row in rows.items()}
    boxes = np.concatenate([*labels, np.zeros(0, BOX_DTYPE)])
    areas = [(b["w"] * b["h"]).astype(float) for b in (boxes, prophesee_filter(boxes, width))]
    for name, (low, high) in SIZES.items():
        before, after = (int(((a >= low) & (a <= high)).sum()) for a in areas)
        sizes[name] = {"boxes": before, "Prophesee filter removes": round(1 - after / before, 4) if before else None}
    labels = hashlib.sha256(b"".join(boxes[name].tobytes() for name in ("t", *"xywh", "class_id"))).hexdigest()[:12]
    settings |= dict(resolution=[height, width], classes=list(class_names), boxes=len(boxes), labels=labels)
    return {"settings": settings, "sizes": sizes, "rows": rows, "curves": curves}


def line(name, row, sign=""):
    """Line of a table: frames, boxes and METRICS in percent (sign "+": differences), name."""
    values = "".join("    n/a" if row[m] is None else f"{100 * row[m]:{sign}7.1f}" for m in METRICS)
    return f"{row['frames']:7}{row['boxes']:8}{values}   {name}"


def compare(paths):
    """Reports side by side, as text: their settings and sizes, then each row, with its difference to the first's.

    ValueError: a file that is no report; a report of another split, data, threshold or ranking than the first.
    """
    blocks, first = {"settings": [], "head": [HEAD]}, None
    for path in paths:
        with reading(path):
            report = jsonlib.loads(Path(path).read_text())
            first = first or report
            here, there = (r["settings"] | r["sizes"] for r in (report, first))
            for key in ("split", "labels", "resolution", "classes", "confidence", "nms_iou", "score"):
                require(here[key] == there[key], f"not comparable with {paths[0]}: {key} {here[key]}, not {there[key]}")
            blocks["settings"] += [f"report: {path}", *(f"{key}: {value}" for key, value in here.items())]
            for protocol, row in report["rows"].items():
                base = first["rows"].get(protocol, dict.fromkeys(METRICS))
                change = {m: None if None in (row[m], base[m]) else row[m] - base[m] for m in METRICS}
                text = [line(f"{protocol} | {path}", row), line("  difference", row | change, "+")]
                blocks.setdefault(protocol, []).extend([line(protocol, row)] if report is first else text)
    return "\n".join(sum(blocks.values(), []))


# ---- pictures


# ---- command line


def main(argv):
    if argv[:1] == ["--compare"]:
        return print(compare(argv[1:]))
    path = configure(known := train.defaults | defaults, argv)["ckpt"]
    trained = {k: value_of(k, x, known, path) for k, x in read_checkpoint(path).get("config", {}).items() if k in known}
    config = SimpleNamespace(**configure(known | trained | defaults | {"out_dir": str(Path(path).parent)}, argv))
    reading(f"{path} or an option")(train.check)(config)
    device, dtype = train.resolve_device(config)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    names = load_classes(config.data_dir, config.class_names, config.num_classes)
    sequences = open_split(config.data_dir, config.split, len(names), config.resolution)
    model = load_detector(path, sequences[0].hw, config.partition_split, config.dim_head).to(device)
    own = (tuple(trained.get("class_names", names)), model.config.num_classes)
    require(own == (names, len(names)), f"{path} is for {own[1]} classes, {own[0]}, but {config.data_dir} has {names}")
    options = {key: getattr(config, key) for key in ("num_workers", "confidence", "nms_iou", "score")}
    labels, found = run(model, sequences, config.eval_batch_size, config.sequence_length, device, dtype, **options)
    if dist.is_initialized() and dist.get_rank():
        return
    detector = StreamDetector(model, dtype)
    for t in range(min(100, sequences[0].length)):
        detector(sequences[0].read(t, t + 1)[0])
    settings = {k: getattr(config, k) for k in ("data_dir", "sequence_length", *defaults)} | {"speed": detector.speed()}
    result = report(labels, found, *sequences[0].hw, names, strides=model.config.strides, **settings)
    path = Path((config.json or f"{config.out_dir}/eval/report").removesuffix(".json") + ".json")
    write(path, jsonlib.dumps(result, indent=1) + "\n")
    pictures(path.with_suffix(".png"), result, sequences, labels, found, names)
    print(compare([path]), f"written: {path} and .png", sep="\n")


if __name__ == "__main__":
    command_line(main)

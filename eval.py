"""A checkpoint -> numbers and pictures, each line naming its protocol.

In: a checkpoint (ours, RVT's or its eTraM fork's) and prepared sequences. Architecture, data and
classes come from the checkpoint. Out: a table, and in out_dir/eval (out_dir: the checkpoint's
folder) a report, CHECKPOINT_SPLIT.json, with pictures, CHECKPOINT_SPLIT.png.

    python eval.py --ckpt out/ckpt.pt --split=test
    python eval.py --ckpt rvt-b.ckpt configs/gen1.py --data_dir=datasets/gen1
    python eval.py --compare a/eval/best_test.json b/eval/best_test.json
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import train
from checkpoint import load_detector, read_checkpoint
from configurator import command_line, configure, value_of
from data import load_classes, open_split
from detect import FILTERS, StreamDetector, run, score_boxes  # noqa: F401, StreamDetector
from formats import reading, write
from pictures import STRONG, draw_report

defaults = {
    "ckpt": "out/ckpt.pt",  # checkpoint of train.py, or a Lightning checkpoint of RVT
    "split": "test",  # train, val or test
    "score": "cls",  # detections rank by: cls (p_cls, as in RVT) or obj*cls (p_obj * p_cls)
    "confidence": 0.001,  # detections below this p_obj * p_cls are dropped
    "nms_iou": 0.45,  # of two detections of a class that overlap more, the worse is dropped
    "small_classes": ("pedestrian", "two-wheeler", "bicycle", "motorbike", "wheelchair"),  # a mean
    "dtype": "float32",  # auto | float32 | bfloat16 | float16
}


# ---- report


def report(
    labels, detections, height, width, class_names,
    small_classes=defaults["small_classes"], **settings,
):
    """All scores of a run, each row under its protocol, ready for JSON; undefined values are None.

    labels, detections: as `run` returns them. A row of your own is added like these.
    -> "settings" (what was passed, resolution, classes, number of labels), "rows" (by protocol),
    "curves" (of each class: precision at recall 0, 0.01, ... 1 for IoU 0.5, all boxes).
    """
    played = labels, detections, height, width, class_names
    small = [name for name in class_names if name in small_classes]
    small_ids = [class_names.index(name) for name in small]
    scores = {}
    for box_filter, kind in FILTERS.items():
        every = score_boxes(*played, box_filter)
        scores[f"class mean, {kind}"] = every
        scores[f"class-agnostic, {kind}"] = score_boxes(*played, box_filter, class_agnostic=True)
        if small:
            title = f"small_classes ({', '.join(small)}), class mean, {kind}"
            scores[title] = score_boxes(*played, box_filter, class_ids=small_ids)
        for name, row in every["classes"].items():
            scores[f"{name}, {kind}"] = row
    title = "eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"
    scores[title] = score_boxes(*played, "prophesee", True, range(3))

    rows = {}
    for title, row in scores.items():
        rows[title] = {k: None if v == -1 else v for k, v in row.items() if np.isscalar(v)}
    settings |= {"resolution": [height, width], "classes": list(class_names),
                 "small_classes": small, "boxes": sum(map(len, labels))}
    curves = scores["class mean, all boxes"]["curves"].T.tolist()
    return {"settings": settings, "rows": rows, "curves": curves}


def line(form, values, title):
    """Line of a table: values, each in the form of printf, then a title."""
    return (form * len(values)) % tuple(values) + f"  {title}"


def compare(paths):
    """Reports as text: rows by protocol, a line for each report, its differences to the first.

    ValueError: a file that is no report; one of another split, data, threshold or ranking.
    """
    if not paths:
        raise ValueError("--compare needs reports: --compare a.json b.json")
    reports = []
    for path in paths:
        with reading(path):
            report = json.loads(Path(path).read_text())
            reports.append(report)
            if report["settings"] != reports[0]["settings"]:
                raise ValueError(f"not comparable with {paths[0]}: {report['settings']}")
            head = next(iter(report["rows"].values()))
    lines = [line("%8s", head, "protocol | report")]
    for title in reports[0]["rows"]:
        for path, report in zip(paths, reports):
            values = np.array(list(report["rows"][title].values()), float)  # None becomes NaN
            lines.append(line("%8.7g", values.round(4), f"{title} | {path}"))
            if report is reports[0]:
                base = values
            else:
                lines.append(line("%+8.7g", (values - base).round(4), "  difference"))
    return "\n".join(lines)


# ---- command line


def main(argv):
    if argv[:1] == ["--compare"]:
        print(compare(argv[1:]))
        return

    # The checkpoint's settings, but for those that evaluation has of its own; then files, options.
    known = train.defaults | defaults
    path = configure(known, argv)["ckpt"]
    trained = read_checkpoint(path).get("config", {})
    with reading(path):
        trained = {k: value_of(k, v, known) for k, v in trained.items() if k in known}
    known |= trained | defaults | {"out_dir": str(Path(path).parent)}
    config = SimpleNamespace(**configure(known, argv))
    train.check(config)
    folder = Path(config.out_dir, "eval")
    with reading(f"no report can be written to {folder}; choose another --out_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    device, dtype = train.resolve_device(config)
    rank, _ = train.start_processes("gloo")

    names = load_classes(config.data_dir, config.class_names, config.num_classes)
    sequences = open_split(config.data_dir, config.split, len(names))
    hw = sequences[0].hw
    model = load_detector(path, hw, config.partition_split, config.dim_head).to(device)
    K = model.config.num_classes
    own = trained.get("class_names", names)
    if own != names or K != len(names):
        raise ValueError(f"{path} is for {K} classes, {own}, but {config.data_dir} has {names}")

    options = {key: getattr(config, key) for key in ("confidence", "nms_iou", "score")}
    labels, found = run(model, sequences, config.eval_batch_size, config.sequence_length, device,
                        dtype, config.num_workers, **options)
    if rank > 0:
        return
    result = report(labels, found, *hw, names, config.small_classes, **options,
                    split=config.split, data_dir=config.data_dir)
    name = f"{Path(path).stem}_{config.split}"
    if config.data_dir != trained.get("data_dir", config.data_dir):
        name += f"_{Path(config.data_dir).name}"  # a report of its own
    path = folder / f"{name}.json"
    write(path, json.dumps(result, indent=1))
    print(compare([path]))
    strong = [boxes[boxes["confidence"] >= STRONG] for boxes in found]
    confusion = score_boxes(labels, strong, *hw, names)["confusion"]
    draw_report(path.with_suffix(".png"), result, confusion, sequences, labels, strong)


if __name__ == "__main__":
    command_line(main)

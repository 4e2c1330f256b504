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
import torch.distributed as dist

import train
from checkpoint import load_detector, read_checkpoint
from configurator import command_line, configure, value_of
from data import load_classes, open_split
from detect import (
    FILTERS,
    SIZES,
    StreamDetector,  # noqa: F401, for `from eval import StreamDetector`
    class_mean,
    run,
    score_boxes,
)
from formats import BOX_DTYPE, reading, write
from pictures import pictures

defaults = {
    "ckpt": "out/ckpt.pt",  # checkpoint of train.py, or a Lightning checkpoint of RVT
    "split": "test",  # train, val or test
    "score": "cls",  # detections rank by: cls (p_cls, as in RVT) or obj*cls (p_obj * p_cls)
    "confidence": 0.001,  # detections below this p_obj * p_cls are dropped
    "nms_iou": 0.45,  # of two detections of a class that overlap more, the worse is dropped
    "small_classes": ("pedestrian", "two-wheeler", "bicycle", "motorbike", "wheelchair"),  # a mean
    "dtype": "float32",  # auto | float32 | bfloat16 | float16
}

# Reports are compared only where these agree.
COMPARABLE = (
    "split",
    "data_dir",
    "resolution",
    "classes",
    "boxes",
    "score",
    "confidence",
    "nms_iou",
)


# ---- report


def report(
    labels,
    detections,
    height,
    width,
    class_names,
    small_classes=defaults["small_classes"],
    **settings,
):
    """All scores of a run, each row under its protocol, ready for JSON; undefined values are None.

    labels, detections: as `run` returns them. A row of your own is added like these.
    -> "settings" (what was passed, resolution, classes, number of labels), "sizes" (labels of each
    size), "rows" (by protocol), "curves" (per class, precision at recall 0, 0.04, ... 1 for IoU
    0.5, all boxes).
    """
    run_of = labels, detections, height, width, class_names
    small = [name for name in class_names if name in small_classes]
    scores = {}
    for box_filter, kind in FILTERS.items():
        every = score_boxes(*run_of, box_filter)
        scores[f"class mean, {kind}"] = every
        scores[f"class-agnostic, {kind}"] = score_boxes(*run_of, box_filter, class_agnostic=True)
        if small:
            title = f"small_classes ({', '.join(small)}), class mean, {kind}"
            scores[title] = class_mean([every["classes"][name] for name in small])
        for name, row in every["classes"].items():
            scores[f"{name}, {kind}"] = row
    title = "eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"
    scores[title] = score_boxes(*run_of, "prophesee", True, range(3))

    rows = {}
    for title, row in scores.items():
        rows[title] = {k: None if v == -1 else v for k, v in row.items() if np.isscalar(v)}
    curves = {}
    for name, curve in scores["class mean, all boxes"]["curves"].items():
        curves[name] = curve[::4].round(3).tolist()
    boxes = np.concatenate([*labels, np.zeros(0, BOX_DTYPE)])
    area = boxes["w"] * boxes["h"]
    sizes = {}
    for name, (low, high) in SIZES.items():
        sizes[name] = int(((area >= low) & (area <= high)).sum())
    settings |= {
        "resolution": [height, width],
        "classes": list(class_names),
        "boxes": len(boxes),
    }
    return {"settings": settings, "sizes": sizes, "rows": rows, "curves": curves}


def line(title, row, columns, sign=""):
    """Line of a table: counts, scores in percent, title."""
    text = ""
    for name in columns:
        value = row.get(name)
        if value is None:
            text += "    n/a"
        elif isinstance(value, int):
            text += f"{value:7}"
        else:
            text += f"{100 * value:{sign}7.1f}"
    return f"{text}   {title}"


def compare(paths):
    """Reports as text: their settings, then rows by protocol, with differences to the first report.

    ValueError: a file that is no report; one of another split, data, threshold or ranking.
    """
    first = None
    columns = ()
    settings = []
    table = {}  # lines by protocol
    for path in paths:
        with reading(path):
            report = json.loads(Path(path).read_text())
            first = first or report
            for key in COMPARABLE:
                value = report["settings"][key]
                if value != first["settings"][key]:
                    raise ValueError(f"not comparable with {paths[0]}: {key} is {value}")
            settings.append(f"{path}: {report['settings']}, boxes by size: {report['sizes']}")
            for title, row in report["rows"].items():
                columns = list(row)
                name = title if report is first else f"{title} | {path}"
                block = table.setdefault(title, [])
                block.append(line(name, row, columns))
                if report is not first:
                    base = first["rows"].get(title, {})
                    both = [k for k in columns if None not in (row[k], base.get(k))]
                    change = {k: row[k] - base[k] for k in both}
                    block.append(line("  difference", change, columns, "+"))
    head = "".join([f"{name:>7}" for name in columns])
    return "\n".join([*settings, f"{head}   in %, by protocol", *sum(table.values(), [])])


# ---- command line


def main(argv):
    if argv == ["--compare"]:
        raise ValueError("--compare needs reports: --compare a.json b.json")
    if argv[:1] == ["--compare"]:
        print(compare(argv[1:]))
        return

    # The checkpoint's settings, but for those that evaluation has of its own; then files, options.
    known = train.defaults | defaults
    path = configure(known, argv)["ckpt"]
    trained = read_checkpoint(path).get("config", {})
    trained = {k: value_of(k, v, known, path) for k, v in trained.items() if k in known}
    known |= trained | defaults | {"out_dir": str(Path(path).parent)}
    config = SimpleNamespace(**configure(known, argv))
    with reading(f"{path} or an option"):
        train.check(config)
    folder = Path(config.out_dir, "eval")
    with reading(f"no report can be written to {folder}; choose another --out_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    device, dtype = train.resolve_device(config)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")

    names = load_classes(config.data_dir, config.class_names, config.num_classes)
    sequences = open_split(config.data_dir, config.split, len(names))
    hw = sequences[0].hw
    model = load_detector(path, hw, config.partition_split, config.dim_head).to(device)
    K = model.config.num_classes
    own = trained.get("class_names", names)
    if own != names or K != len(names):
        raise ValueError(f"{path} is for {K} classes, {own}, but {config.data_dir} has {names}")

    labels, found = run(
        model,
        sequences,
        config.eval_batch_size,
        config.sequence_length,
        device,
        dtype,
        config.num_workers,
        confidence=config.confidence,
        nms_iou=config.nms_iou,
        score=config.score,
    )
    if dist.is_initialized() and dist.get_rank():
        return
    settings = {key: getattr(config, key) for key in ("data_dir", "sequence_length", *defaults)}
    result = report(labels, found, *hw, names, **settings)
    path = folder / f"{Path(path).stem}_{config.split}.json"
    write(path, json.dumps(result, indent=1))
    pictures(path.with_suffix(".png"), result, sequences, labels, found, names)
    print(compare([path]))
    print(f"written: {path} and .png")


if __name__ == "__main__":
    command_line(main)

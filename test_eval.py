"""Tests of eval.py."""

import copy
import json

import torch

import detect
import eval as evaluation
from conftest import NAMES, shared, small_detector, some_boxes, write_checkpoint, write_prepared
from eval import compare, report
from test_detect import random_frames

# ---- report


def some_report():
    """Labels, detections and their report, of 10 frames."""
    labels, dets = random_frames(0, frames=10)
    labels[0] = some_boxes(0, [(9, 9, 9, 9)])
    settings = {"split": "test", "data_dir": "data", "confidence": 0.001, "nms_iou": 0.45}
    return labels, dets, report(labels, dets, 360, 640, NAMES, score="cls", **settings)


def test_report_has_a_row_for_every_protocol():
    labels, dets, result = some_report()
    for key, kind in detect.FILTERS.items():
        scene = labels, dets, 360, 640, NAMES, key
        mean = detect.score_boxes(*scene)
        want = {f"{name}, {kind}": row for name, row in mean["classes"].items()}
        want[f"class mean, {kind}"] = mean
        want[f"class-agnostic, {kind}"] = detect.score_boxes(*scene, class_agnostic=True)
        small = f"small_classes (pedestrian, bicycle), class mean, {kind}"
        want[small] = detect.score_boxes(*scene, class_ids=(0, 2))
        for title, scores in want.items():
            row = result["rows"].pop(title)
            assert list(row)[:3] == ["frames", "boxes", "AP"]
            assert row == {name: None if scores[name] == -1 else scores[name] for name in row}
    title = "eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"
    fork = detect.score_boxes(*scene, class_agnostic=True, class_ids=range(3))
    assert result["rows"].pop(title)["AP"] == fork["AP"]
    assert not result["rows"]


def test_report_has_no_zero_for_undefined():
    labels, _, result = some_report()
    assert result["rows"]["class mean, Prophesee filter"]["AP_T"] is None  # none is left
    assert result["sizes"]["tiny, < 16x16 px"] >= 1
    assert result["settings"]["boxes"] == sum(len(boxes) for boxes in labels)
    json.dumps(result, allow_nan=False)
    empty = report([], [], 64, 64, NAMES)
    assert empty["rows"]["class mean, all boxes"]["AP"] is None
    assert empty["sizes"]["large, above"] == 0


def test_report_and_compare_show_a_metric_of_ones_own(monkeypatch, tmp_path):
    coco_row = detect.score_row

    def with_twice(*args):
        row, curve = coco_row(*args)
        return row | {"twice": 2 * row["AP50"]}, curve

    monkeypatch.setattr(detect, "score_row", with_twice)
    result = some_report()[2]
    row = result["rows"]["car, all boxes"]
    assert row["twice"] == 2 * row["AP50"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(result))
    assert "  twice   in %" in compare([path])


# ---- compare


def test_compare_shows_differences(tmp_path):
    result = some_report()[2]
    better = copy.deepcopy(result)
    better["rows"]["class mean, all boxes"]["AP"] += 0.015
    better["settings"]["ckpt"] = "better.pt"
    better["rows"]["mine"] = better["rows"]["car, all boxes"]
    paths = [tmp_path / "base.json", tmp_path / "better.json"]
    for path, content in zip(paths, (result, better)):
        path.write_text(json.dumps(content))
    lines = compare(paths).splitlines()
    assert lines[0].startswith(f"{paths[0]}: ") and "'split': 'test'" in lines[0]
    assert lines[1].startswith(f"{paths[1]}: ") and "better.pt" in lines[1]
    row = [line.endswith(f"class mean, all boxes | {paths[1]}") for line in lines].index(True)
    assert "+1.5" in lines[row + 1] and "difference" in lines[row + 1]
    assert lines[-2].endswith(f"mine | {paths[1]}") and "+" not in lines[-1]


# ---- main


def write_trained(folder):
    """A checkpoint for the four classes of the prepared set in folder/data."""
    data = write_prepared(folder / "data", hw=(48, 96))  # not what it was trained on
    config = {"data_dir": str(data), "class_names": NAMES, "num_classes": 4, "sequence_length": 3}
    config |= {"eval_batch_size": 2, "num_workers": 0}
    (folder / "run").mkdir()
    return write_checkpoint(folder / "run" / "ckpt.pt", small_detector(), **config)


def test_main_needs_the_checkpoint_alone_and_keeps_the_report_of_each_split(tmp_path, capsys):
    trained = write_trained(tmp_path)
    write_prepared(tmp_path / "data", split="val", hw=(48, 96))
    for words in ([], ["--split=val"]):
        evaluation.main([f"--ckpt={trained}", "--device=cpu", *words])
    folder = tmp_path / "run" / "eval"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["ckpt_test.json", "ckpt_test.png", "ckpt_val.json", "ckpt_val.png"]
    result = json.loads((folder / "ckpt_test.json").read_text())
    assert result["rows"]["class mean, all boxes"]["frames"] == 6
    assert result["settings"]["boxes"] == 12
    assert result["settings"]["split"] == "test"
    assert result["settings"]["resolution"] == [48, 96]
    text = capsys.readouterr().out
    assert all(title in text for title in result["rows"])


def test_main_on_a_checkpoint_of_rvt(tmp_path):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    classes = [str(i) for i in range(8)]
    data = write_prepared(tmp_path / "data", ("a",), "test", (128, 160), 3, (1, 2), classes)
    config = tmp_path / "config.py"
    config.write_text("partition_split = 1\ndim_head = 32\nsequence_length = 2\nmax_steps = 7\n")
    words = [f"--ckpt={tmp_path / 'rvt.ckpt'}", str(config), f"--data_dir={data}"]
    evaluation.main([*words, "--device=cpu", "--num_workers=0"])
    assert (tmp_path / "eval" / "rvt_test.json").exists()

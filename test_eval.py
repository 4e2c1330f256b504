"""Tests of eval.py."""

import copy
import json

import numpy as np
import pytest
import torch

import detect
import eval as evaluation
from conftest import (
    NAMES,
    MemorySequence,
    shared,
    small_detector,
    some_boxes,
    write_checkpoint,
    write_prepared,
)
from eval import compare, report
from pictures import confusion, pictures
from test_detect import random_frames

# ---- report


def as_detections(boxes):
    """Boxes with the further fields of detections; even classes at stride 8, odd ones at 16."""
    found = np.zeros(len(boxes), detect.DETECTION_DTYPE)
    for name in boxes.dtype.names:
        found[name] = boxes[name]
    found["confidence"] = boxes["class_confidence"]
    found["stride"] = 8 + 8 * (boxes["class_id"] % 2)
    return found


def some_report():
    """Labels, detections and their report, of 10 frames."""
    labels, dets = random_frames(0, frames=10)
    labels[0] = some_boxes(0, [(9, 9, 9, 9)])
    dets = [as_detections(boxes) for boxes in dets]
    settings = {"split": "test", "confidence": 0.001, "nms_iou": 0.45, "score": "cls"}
    return labels, dets, report(labels, dets, 360, 640, NAMES, strides=(8, 16), **settings)


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
    strides = [f"detections of stride {s} alone, class mean, all boxes" for s in (8, 16)]
    assert list(result["rows"]) == strides


def test_report_has_no_zero_for_undefined():
    labels, _, result = some_report()
    assert result["rows"]["class mean, Prophesee filter"]["AP_T"] is None  # none is left
    tiny = result["sizes"]["tiny, < 16x16 px"]
    assert tiny["boxes"] and tiny["Prophesee filter leaves"] == 0
    assert result["settings"]["boxes"] == sum(len(boxes) for boxes in labels)
    json.dumps(result, allow_nan=False)
    empty = report([], [], 64, 64, NAMES, strides=(8,))
    assert empty["rows"]["class mean, all boxes"]["AP"] is None
    assert empty["sizes"]["large, above"]["boxes"] == 0


def test_report_and_compare_show_a_metric_of_ones_own(monkeypatch, tmp_path):
    coco_row = detect.score_row

    def with_ratio(truth, found, frames):
        row, curve = coco_row(truth, found, frames)
        row["ratio"] = len(found) / len(truth) if len(truth) else -1
        return row, curve

    monkeypatch.setattr(detect, "score_row", with_ratio)
    labels, dets, result = some_report()
    cars = [sum((boxes["class_id"] == 1).sum() for boxes in side) for side in (labels, dets)]
    assert result["rows"]["car, all boxes"]["ratio"] == cars[1] / cars[0]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(result))
    assert "  ratio   in %" in compare([path])


# ---- compare


def test_compare_shows_differences(tmp_path):
    result = some_report()[2]
    better = copy.deepcopy(result)
    better["rows"]["class mean, all boxes"]["AP"] += 0.015
    better["settings"]["ckpt"] = "better.pt"
    del better["rows"]["detections of stride 16 alone, class mean, all boxes"]
    paths = [tmp_path / "base.json", tmp_path / "better.json"]
    for path, content in zip(paths, (result, better)):
        path.write_text(json.dumps(content))
    lines = compare(paths).splitlines()
    assert lines[0] == f"report: {paths[0]}"
    assert lines.count("split: test") == 2
    assert lines.count(f"labels: {result['settings']['labels']}") == 2
    assert lines.index("ckpt: better.pt") > lines.index(f"report: {paths[1]}")
    row = [line.endswith(f"class mean, all boxes | {paths[1]}") for line in lines].index(True)
    assert "+1.5" in lines[row + 1] and "difference" in lines[row + 1]
    assert f"stride 16 alone, class mean, all boxes | {paths[1]}" not in "".join(lines)


def test_compare_refuses_other_protocols_and_what_is_no_report(tmp_path):
    result = some_report()[2]
    base, other = tmp_path / "base.json", tmp_path / "other.json"
    base.write_text(json.dumps(result))
    for key, value in {"split": "val", "confidence": 0.1, "labels": "another"}.items():
        changed = copy.deepcopy(result)
        changed["settings"][key] = value
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"other.json: not comparable.*: {key} {value}, not "):
            compare([base, other])
    other.write_text('{"settings": {}}')
    for paths in ([base, other], [base, tmp_path / "nowhere.json"], [__file__]):
        with pytest.raises(ValueError):
            compare(paths)


# ---- pictures


def test_confusion_by_hand():
    truth = some_boxes(0, [(0, 0, 20, 20), (50, 0, 20, 20), (100, 0, 20, 20)], [0, 1, 1])
    xywh = [(0, 0, 20, 20), (51, 0, 20, 20), (50, 1, 20, 20), (0, 50, 9, 9), (100, 0, 20, 20)]
    found = as_detections(some_boxes(0, xywh, [0, 0, 1, 1, 1], [0.9, 0.8, 0.7, 0.6, 0.1]))
    counts = confusion([truth], [found], 2, 0.3)
    #            as 0, as 1, missed: the second box on a label is one on the background
    assert counts.tolist() == [[[1, 0, 0], [1, 0, 1], [0, 2, 0]]]
    assert (confusion([truth], [found[::-1]], 2, 0.3) == counts).all()  # best first anyway
    counts = confusion([truth, truth[:0]], [found[:0], found], 2, 0.3)
    assert counts[0].tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]
    assert counts[1].tolist() == [[0, 0, 0], [0, 0, 0], [2, 2, 0]]


def test_confusion_gives_the_next_best_label_where_one_is_taken():
    pair = some_boxes(0, [(0, 0, 20, 20), (0, 6, 20, 20)], [0, 1])
    both = as_detections(some_boxes(0, [(0, 2, 20, 20), (0, 2, 20, 20)], [0, 0], [0.9, 0.8]))
    assert confusion([pair], [both], 2, 0.3).tolist() == [[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]


def test_pictures_of_fewer_frames_than_places(tmp_path):
    sequence = MemorySequence("a", 4, (0, 2, 3))
    found = [as_detections(boxes) for boxes in sequence.boxes]  # confidence 1: all are drawn
    result = report(sequence.boxes, found, 64, 64, NAMES)
    pictures(tmp_path / "report.png", result, [sequence], sequence.boxes, found, NAMES)
    assert (tmp_path / "report.png").stat().st_size > 10_000


# ---- main


@pytest.fixture
def trained(tmp_path):
    """A checkpoint for the four classes of the prepared set in tmp_path/data."""
    data = write_prepared(tmp_path / "data")
    config = {"data_dir": str(data), "class_names": NAMES, "num_classes": 4, "sequence_length": 3}
    config |= {"eval_batch_size": 2, "num_workers": 0}
    (tmp_path / "run").mkdir()
    return write_checkpoint(tmp_path / "run" / "ckpt.pt", small_detector(), **config)


def test_main_needs_the_checkpoint_alone(trained, tmp_path, capsys):
    evaluation.main([f"--ckpt={trained}", "--device=cpu"])
    folder = tmp_path / "run" / "eval"
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt_test.json", "ckpt_test.png"]
    result = json.loads((folder / "ckpt_test.json").read_text())
    assert result["rows"]["class mean, all boxes"]["frames"] == 6
    assert result["settings"]["boxes"] == 12
    assert result["settings"]["split"] == "test"
    text = capsys.readouterr().out
    assert all(title in text for title in result["rows"])


def test_main_keeps_the_reports_of_other_splits_and_protocols(trained, tmp_path):
    write_prepared(tmp_path / "data", split="val")
    for words in (["--split=test"], ["--split=val"], ["--score=obj*cls"]):
        evaluation.main([f"--ckpt={trained}", "--device=cpu", *words])
    reports = sorted((tmp_path / "run" / "eval").glob("*.json"))
    names = [path.name for path in reports]
    assert names == ["ckpt_test.json", "ckpt_test_score=objxcls.json", "ckpt_val.json"]
    splits = [json.loads(path.read_text())["settings"]["split"] for path in reports]
    assert splits == ["test", "test", "val"]


def test_main_finds_a_folder_that_cannot_be_written_before_it_evaluates(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "run", None)
    with pytest.raises(ValueError, match="no report can be written to .*ckpt.pt.eval; choose"):
        evaluation.main([f"--ckpt={trained}", f"--out_dir={trained}"])


def test_main_refuses_other_classes(trained, tmp_path):
    other = write_prepared(tmp_path / "three", classes=NAMES[:3])
    with pytest.raises(ValueError, match="3 class_names, num_classes=4"):
        evaluation.main([f"--ckpt={trained}", f"--data_dir={other}"])
    turned = write_prepared(tmp_path / "turned", classes=NAMES[::-1])
    with pytest.raises(ValueError, match="ckpt.pt is for 4 classes"):
        evaluation.main([f"--ckpt={trained}", f"--data_dir={turned}"])


def test_main_names_what_is_wrong(trained):
    words = {"--score=objectness": "score", "--dtype=int8": "dtype", "--split=val": "val"}
    words |= {"--spilt=val": "did you mean split", "--confidence=-1": "confidence"}
    words |= {"--ckpt=nowhere.pt": "nowhere.pt: no such", f"--ckpt={__file__}": "not a checkpoint"}
    for word, message in words.items():
        with pytest.raises(ValueError, match=message):
            evaluation.main([f"--ckpt={trained}", word])


def test_main_on_frames_of_another_size_than_trained_on(tmp_path):
    data = write_prepared(tmp_path / "data", hw=(48, 96))
    config = {"data_dir": str(data), "eval_batch_size": 2, "num_workers": 0}
    ckpt = write_checkpoint(tmp_path / "ckpt.pt", small_detector(), **config)
    evaluation.main([f"--ckpt={ckpt}", "--device=cpu", f"--out_dir={tmp_path / 'out'}"])
    result = json.loads((tmp_path / "out/eval/ckpt_test.json").read_text())
    assert result["settings"]["resolution"] == [48, 96]


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

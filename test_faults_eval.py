"""Mistakes of users of detect.py and eval.py; long runs in constant memory (SOAK=1 runs them)."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from conftest import (
    NAMES,
    MemorySequence,
    random_events,
    small_detector,
    soak,
    write_prepared,
)
from detect import StreamDetector, detections, run, score_boxes
from eval import compare
from test_detect import four_anchors
from test_eval import some_report, write_trained

# ---- mistakes


def test_stream_detector_refuses_a_frame_of_another_size_and_goes_on():
    frame = MemorySequence("a", 2, (1,)).data[0]
    detector = StreamDetector(small_detector())
    for wrong in (frame[0, :32], frame[:, :32], frame.reshape(20, 32, 128)):
        with pytest.raises(ValueError, match=r"a frame of \(.*, expected \(20, 64, 64\)"):
            detector(wrong)
    assert detector(frame)["t"][0] == 50_000  # the clock did not move meanwhile


def test_detections_and_score_boxes_refuse_an_unknown_score_or_filter():
    with pytest.raises(ValueError, match="expected cls or obj"):
        detections(four_anchors(), [7, 8], score="obj")
    with pytest.raises(ValueError, match="box_filter='psee': expected none or prophesee"):
        score_boxes([], [], 64, 64, NAMES, "psee")


def test_compare_refuses_other_protocols_and_what_is_no_report(tmp_path):
    result = some_report()[2]
    base, other = tmp_path / "base.json", tmp_path / "other.json"
    base.write_text(json.dumps(result))
    for key, value in {"split": "val", "confidence": 0.1, "boxes": 7, "data_dir": "b"}.items():
        changed = copy.deepcopy(result)
        changed["settings"][key] = value
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"other.json: not comparable.*: {key} is {value}"):
            compare([base, other])
    for text in ('{"settings": {}}', "[]", "3", ""):
        other.write_text(text)
        with pytest.raises(ValueError, match="other.json"):
            compare([base, other])
    for paths in ([base, tmp_path / "nowhere.json"], [__file__]):
        with pytest.raises(ValueError):
            compare(paths)


def test_main_finds_a_folder_that_cannot_be_written_before_it_evaluates(tmp_path, monkeypatch):
    trained = write_trained(tmp_path)
    monkeypatch.setattr(evaluation, "run", None)
    with pytest.raises(ValueError, match="no report can be written to .*ckpt.pt.eval; choose"):
        evaluation.main([f"--ckpt={trained}", f"--out_dir={trained}"])


def test_main_refuses_other_classes(tmp_path):
    trained = write_trained(tmp_path)
    other = write_prepared(tmp_path / "three", classes=NAMES[:3])
    with pytest.raises(ValueError, match="3 class_names, num_classes=4"):
        evaluation.main([f"--ckpt={trained}", f"--data_dir={other}"])
    turned = write_prepared(tmp_path / "turned", classes=NAMES[::-1])
    with pytest.raises(ValueError, match="ckpt.pt is for 4 classes"):
        evaluation.main([f"--ckpt={trained}", f"--data_dir={turned}"])


def test_main_names_what_is_wrong(tmp_path):
    trained = write_trained(tmp_path)
    words = {"--score=objectness": "score", "--dtype=int8": "dtype", "--split=val": "val"}
    words |= {"--spilt=val": "did you mean split", "--confidence=-1": "confidence"}
    words |= {"--ckpt=nowhere.pt": "nowhere.pt: no such", f"--ckpt={__file__}": "not a checkpoint"}
    for word, message in words.items():
        with pytest.raises(ValueError, match=message):
            evaluation.main([f"--ckpt={trained}", word])


# ---- long runs


def resident_mb():
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak_detector():
    torch.set_num_threads(1)
    model = small_detector(hw=(32, 64), small_object_attention=True)
    for head in model.heads:
        head.cls_pred.bias.data.fill_(0.5)  # boxes with p_obj * p_cls of some 0.4
    return model


@soak
def test_stream_detector_takes_twenty_thousand_frames_in_constant_memory():
    detector = StreamDetector(soak_detector(), confidence=0.3)
    events = random_events(50, 20, 32, 64)
    for k in range(20_000):
        detector(events[k % 50])
        if k == 2000:
            before = resident_mb()
    assert resident_mb() - before < 20


class EndlessSequence(MemorySequence):
    """20,000 frames, a hundred of them labelled; notes what memory is in use as it is read."""

    def __init__(self):
        super().__init__("a", 50, range(0, 50, 5), (32, 64))
        self.length = 20_000
        self.label_frames = np.arange(199, 20_000, 200)
        self.boxes = 10 * self.boxes
        self.memory = []

    def read(self, start, stop, out):
        self.memory.append(resident_mb())
        out[:] = self.data[start % 50 : start % 50 + 1]


@soak
def test_run_takes_twenty_thousand_frames_in_constant_memory():
    sequence = EndlessSequence()
    labels, found = run(soak_detector(), [sequence], 1, 5, confidence=0.3)
    kept = sum(boxes.nbytes for boxes in found) / 1e6
    memory = sequence.memory
    assert len(found) == len(labels) == 100
    assert memory[-1] - memory[len(memory) // 10] < 20 + kept

"""Tests of pictures.py."""

import numpy as np
import pytest
from PIL import Image

import pictures
from conftest import NAMES, MemorySequence, some_boxes
from detect import DETECTION_DTYPE
from eval import report
from pictures import confusion, draw

# ---- pictures


def scored(boxes):
    """Detections of which p_obj * p_cls is the class_confidence."""
    found = np.zeros(len(boxes), DETECTION_DTYPE)
    for name in boxes.dtype.names:
        found[name] = boxes[name]
    found["confidence"] = boxes["class_confidence"]
    return found


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_draw_shows_polarities_boxes_and_labels():
    events = np.zeros((20, 48, 480), np.uint8)
    events[[0, 15], 40, [5, 6]] = 9
    found = some_boxes(0, [(200, 20, 30, 15)], 1, 0.5)
    image = np.asarray(draw(events, found, NAMES, some_boxes(0, [(300, 20, 30, 15)])))
    assert image[40, 5:7].tolist() == [list(colour) for colour in pictures.EVENTS]
    assert (image[20, 310] == 255).all()  # a label, white
    assert image[35, 210].max() > image[35, 210].min()  # a detection, coloured


def test_draw_enlarges_small_frames_by_a_whole_number():
    assert draw(np.zeros((20, 32, 100), np.uint8), (), NAMES).size == (500, 160)
    assert draw(np.zeros((20, 360, 640), np.uint8), (), NAMES).size == (640, 360)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -1e30])
def test_draw_of_boxes_that_are_no_numbers_or_lie_far_outside(value):
    places = [(value, 3, 10, 10), (3, value, 10, 10), (3, 3, abs(value), 10)]
    boxes = some_boxes(0, places, 1, 0.5)
    assert draw(np.zeros((20, 32, 100), np.uint8), boxes, NAMES, boxes).size == (500, 160)


def test_draw_curves_of_every_column_and_of_fields_that_are_empty(tmp_path):
    rows = [{"step": 1, "loss": 3.0, "AP": ""}, {"step": 2, "loss": 2.0, "AP": 0.1}]
    for k in (1, 2):
        pictures.draw_curves(tmp_path / "new" / "curves.png", rows[:k])
        assert min(size_of(tmp_path / "new" / "curves.png")) > 300


def test_confusion_by_hand():
    truth = some_boxes(0, [(0, 0, 20, 20), (50, 0, 20, 20), (100, 0, 20, 20)], [0, 1, 1])
    places = [(0, 0, 20, 20), (51, 0, 20, 20), (50, 1, 20, 20), (0, 50, 9, 9), (100, 0, 20, 20)]
    found = scored(some_boxes(0, places, [0, 0, 1, 1, 1], [0.9, 0.8, 0.7, 0.6, 0.1]))
    counts = confusion([truth], [found], 2, 0.3)
    # columns: as 0, as 1, missed; the second detection of a label is one of the background
    assert counts.tolist() == [[[1, 0, 0], [1, 0, 1], [0, 2, 0]]]
    again = confusion([truth], [found[::-1]], 2, 0.3)
    assert (again == counts).all()  # best first, whatever the order


def test_confusion_of_frames_without_labels_or_detections():
    boxes = scored(some_boxes(0, [(0, 0, 20, 20), (50, 0, 20, 20)], [0, 1]))
    got = confusion([boxes, boxes[:0]], [boxes[:0], boxes], 2, 0.3)
    assert got[0].tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert got[1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_confusion_leaves_a_second_detection_the_next_best_label():
    truth = some_boxes(0, [(0, 0, 20, 20), (0, 6, 20, 20)], [0, 1])
    found = scored(some_boxes(0, [(0, 2, 20, 20), (0, 2, 20, 20)], [0, 0], [0.9, 0.8]))
    assert confusion([truth], [found], 2, 0.3).tolist() == [[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]


def test_pictures_of_frames_with_detections(tmp_path):
    sequence = MemorySequence("a", 4, (0, 2, 3))  # fewer frames than places
    found = [scored(boxes) for boxes in sequence.boxes]
    result = report(sequence.boxes, found, 64, 64, NAMES)
    pictures.pictures(tmp_path / "report.png", result, [sequence], sequence.boxes, found, NAMES)
    assert min(size_of(tmp_path / "report.png")) > 1000


def test_draw_box_sizes_of_each_split(tmp_path):
    pictures.draw_box_sizes(tmp_path / "new" / "sizes.png", {"train": [3.0, 20, 40], "val": [5.0]})
    assert min(size_of(tmp_path / "new" / "sizes.png")) > 300

"""Tests of detect.py."""

import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conftest import NAMES, MemorySequence, same_boxes, shared, small_detector, some_boxes
from detect import SIZES, StreamDetector, detections, nms, prophesee_filter, run, score_boxes
from formats import BOX_DTYPE
from model import Prediction

# ---- nms


def greedy(box, score, label, iou):
    """Non-maximum suppression by its definition, box by box."""

    def clash(i, j):
        low = np.maximum(box[i][:2], box[j][:2])
        high = np.minimum(box[i][2:], box[j][2:])
        both = np.prod(np.clip(high - low, 0, None))
        areas = np.prod(box[j][2:] - box[j][:2]) + np.prod(box[i][2:] - box[i][:2])
        return label[i] == label[j] and both > 0 and both / (areas - both) > iou

    kept = []
    for i in sorted(range(len(score)), key=lambda i: -float(score[i])):
        if not any(clash(i, j) for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("n", [0, 1, 8, 60, 150, 250])
@pytest.mark.parametrize("decimals", [0, 6])
def test_nms_is_the_greedy_definition(n, decimals):
    rng = np.random.default_rng(n)
    # Whole numbers: equal boxes and scores, overlaps of exactly the threshold.
    corner = rng.uniform(0, 60, (n, 2)).round(decimals).astype("f4")
    size = rng.uniform(0, 30, (n, 2)).round(decimals).astype("f4")
    score = rng.random(n).round(decimals + 1)
    box = np.concatenate((corner, corner + size), axis=1)
    label = rng.integers(0, 3, n)
    tensors = [torch.from_numpy(x) for x in (box, score, label)]
    for iou in (0.45, 0.5):
        want = greedy(box, score, label, iou)
        assert nms(*tensors, iou).tolist() == want
        assert nms(*tensors, iou, block=16).tolist() == want


def test_nms_of_many_boxes_in_bounded_blocks():
    torch.manual_seed(0)
    corner = 8 * torch.randint(0, 40, (20_000, 2)).float()
    box = torch.cat((corner, corner + 10), 1)  # neighbours overlap by less than the threshold
    kept = nms(box, torch.rand(20_000), torch.zeros(20_000), 0.45)
    assert len(kept) == len(corner.unique(dim=0)) == len(corner[kept].unique(dim=0))


# ---- detections


def four_anchors():
    """Two frames: anchor 2 overlaps anchors 0 and 1, anchor 3 is weak; all are in the second."""
    box = torch.tensor([[20, 30, 10, 20.0], [21, 30, 10, 20], [21, 30, 10, 20], [50, 50, 4, 4]])
    obj = torch.tensor([[0.5, 0.9, 0.9, 0.01], [1e-5, 1e-5, 1e-5, 1e-5]])
    cls = torch.tensor([[0.9, 0.2], [0.4, 0.6], [0.8, 0.1], [0.05, 0.09]])
    grid = torch.tensor([[0, 0, 8.0], [1, 0, 8], [0, 0, 16], [0, 0, 32]])
    twice = [x.repeat(2, 1, 1) for x in (box, cls.logit())]
    return Prediction(twice[0], obj.logit(), twice[1], grid)


def test_detections_by_hand():
    first, second = detections(four_anchors(), [7, 8])
    # Anchor 2 (0.72, class 0) drops anchor 0 (0.45, class 0); anchor 1 is of class 1 (0.54).
    assert len(second) == 0
    assert first["class_id"].tolist() == [0, 1]
    np.testing.assert_allclose(first["class_confidence"], [0.8, 0.6], rtol=1e-5)  # p_cls ranks
    np.testing.assert_allclose(first["confidence"], [0.72, 0.54], rtol=1e-5)
    assert [first[0][name] for name in ("t", "x", "y", "w", "h")] == [7, 16, 20, 10, 20]
    ranked_by_product = detections(four_anchors(), [7, 8], score="obj*cls", confidence=0.6)[0]
    np.testing.assert_allclose(ranked_by_product["class_confidence"], [0.72], rtol=1e-5)


# ---- run


def some_sequences(count=5):
    streams = [("c", 12, (1, 4, 9)), ("a", 20, (0, 3, 8, 19)), ("b", 7, (1, 6)), ("d", 9, (0,))]
    streams.append(("e", 5, ()))  # name, length, labelled frames
    return [MemorySequence(*stream) for stream in streams[:count]]


@pytest.mark.parametrize("attention", (False, True))
def test_run_does_not_depend_on_batches_chunks_order_or_workers(attention):
    model = small_detector(small_object_attention=attention)
    sequences = some_sequences()
    labels, want = run(model, sequences, 1, 2)
    times = []
    for sequence in sorted(sequences, key=lambda sequence: sequence.name):
        times += [sequence.timestamps_us[t] for t in sequence.label_frames]
    assert [boxes["t"][0] for boxes in labels] == times
    assert min(map(len, want)) > 5
    for batch, T, workers in ((3, 3, 0), (8, 30, 0), (2, 2, 2)):
        again, got = run(model, sequences[::-1], batch, T, num_workers=workers)
        same_boxes(got, want)
        assert all((a == b).all() for a, b in zip(again, labels))
    for none in ([], sequences[-1:]):  # without labels
        assert run(model, none, 2, 5) == ([], [])


def test_run_carries_the_state_through_a_sequence_and_no_further():
    model = small_detector()
    sequence = MemorySequence("a", 20, (3, 19))
    labelled = torch.zeros(20, 1, dtype=torch.bool)
    labelled[[3, 19]] = True
    with torch.inference_mode():
        prediction, _ = model(torch.from_numpy(sequence.data[:, None]), None, labelled)
    want = detections(prediction, sequence.timestamps_us[[3, 19]])
    before = MemorySequence("b", 30, (2, 29))  # longer, so that it plays first
    same_boxes(run(model, [sequence, before], 1, 4)[1][:2], want)


def test_run_starts_T_minus_1_frames_before_the_first_label_and_leaves_the_model_as_it_was():
    model = small_detector().train()
    statistics = [buffer.clone() for buffer in model.buffers()]
    sequence = MemorySequence("a", 12, (8,))
    want = run(model, [sequence], 1, 3)[1]
    sequence.data[:6] = 0
    same_boxes(run(model, [sequence], 1, 3)[1], want, 0)
    sequence.data[6] = 0
    assert not np.array_equal(run(model, [sequence], 1, 3)[1][0]["x"], want[0]["x"])
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers()))


def run_as_one_of_two(rank, store, folder):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    for count in (5, 1):  # one sequence only: rank 1 has none
        found = run(small_detector(), some_sequences(count), 2, 3)[1]
        np.savez(f"{folder}/{rank}_{count}.npz", *found)
    torch.distributed.destroy_process_group()


def test_run_in_two_processes_equals_one(tmp_path):
    torch.multiprocessing.spawn(run_as_one_of_two, (tmp_path / "store", tmp_path), nprocs=2)
    for count in (5, 1):
        want = run(small_detector(), some_sequences(count), 2, 3)[1]
        for rank in range(2):
            same_boxes(list(np.load(tmp_path / f"{rank}_{count}.npz").values()), want)


# ---- StreamDetector


@pytest.mark.parametrize("attention", (False, True))
def test_stream_detector_equals_the_chunked_forward_pass(attention):
    model = small_detector(small_object_attention=attention)
    sequence = MemorySequence("a", 6, range(6))
    want = run(model, [sequence], 1, 6)[1]
    detector = StreamDetector(model)
    for _ in range(2):
        got = [detector(frame, t) for frame, t in zip(sequence.data, sequence.timestamps_us)]
        same_boxes(got, want)
        assert got[0].dtype == BOX_DTYPE
        detector.reset()
    assert min(detector.ms) > 0
    assert detector(torch.from_numpy(sequence.data[0]))["t"][0] == 50_000
    assert not isinstance(model.heads[0].stem.bn, torch.nn.Identity)  # it folded a copy


def test_stream_detector_in_bfloat16_finds_about_the_same():
    model = small_detector(hw=(64, 320))
    frame = MemorySequence("a", 2, (1,), (64, 320)).data[0]
    exact = StreamDetector(model, torch.float32)(frame)
    coarse = StreamDetector(model, torch.bfloat16)(frame)
    assert abs(len(exact) - len(coarse)) <= 0.1 * len(exact)
    right = (exact["x"] > 250).sum()
    assert right  # cells beyond 256 keep their place
    assert abs((coarse["x"] > 250).sum() - float(right)) <= 0.2 * right


# ---- scores


@pytest.mark.parametrize("hw", [(720, 1280), (360, 640), (240, 304), (480, 640)])
def test_prophesee_filter_in_proportion_to_the_sensor(hw):
    diagonal, side = (60, 20) if hw[1] == 1280 else (30, 10)
    long = (diagonal**2 - side**2) ** 0.5 + 0.01
    sizes = [(side, long), (side - 0.1, 2 * long), (side, long - 0.1), (long, side)]
    rows = [(0, 0, *size) for size in sizes]
    late, early = some_boxes(500_001, rows), some_boxes(500_000, rows)
    assert (prophesee_filter(late, hw[1])["h"] == late["h"][[0, 3]]).all()
    assert len(prophesee_filter(early, hw[1])) == 0
    both = [late, early]
    assert score_boxes(both, both, *hw, NAMES, "prophesee")["boxes"] == 2


def random_frames(seed, frames=12, found=30, ties=False):
    """Labels and detections, many near a label; with ties scores and coordinates repeat."""
    rng = np.random.default_rng(seed)
    labels, dets = [], []
    for k in range(frames):
        n = int(rng.integers(0, 10))
        xywh = rng.uniform((0, 0, 4, 4), (550, 270, 120, 120), (n, 4))
        truth = some_boxes(k * 100_000, xywh, rng.integers(0, 4, n))
        near = truth[rng.integers(0, n, rng.integers(0, found + 1))] if n else truth
        near["class_confidence"] = rng.random(len(near)).round(1 if ties else 9)
        other = rng.random(len(near)) < 0.2
        near["class_id"][other] = rng.integers(0, 4, other.sum())
        for name in "xywh":
            near[name] *= rng.uniform(0.85, 1.15, len(near)).astype("f4")
            truth[name] = truth[name].round(-1 if ties else 9)
            near[name] = near[name].round(-1 if ties else 9)
        labels.append(truth)
        dets.append(near)
    return labels, dets


def as_coco(frames, kept, ids):
    """COCO object of the boxes of the classes `ids` in the frames `kept`."""
    coco = COCO()
    entries = []
    for k in kept:
        for box in frames[k][np.isin(frames[k]["class_id"], ids)]:
            entry = {"id": len(entries) + 1, "image_id": k, "iscrowd": 0}
            entry |= {"category_id": int(box["class_id"]), "area": float(box["w"] * box["h"])}
            entry["bbox"] = [float(box[name]) for name in "xywh"]
            entry["score"] = float(box["class_confidence"])
            entries.append(entry)
    images = [{"id": k} for k in kept]
    categories = [{"id": i} for i in ids]
    coco.dataset = {"images": images, "categories": categories, "annotations": entries}
    coco.createIndex()
    return coco


def pycocotools_scores(labels, dets, ids, agnostic):
    """The scores by pycocotools' own classes, as RVT calls them: the independent oracle."""
    kept = [k for k, boxes in enumerate(labels) if len(boxes)]
    with redirect_stdout(None):
        coco = COCOeval(as_coco(labels, kept, ids), as_coco(dets, kept, ids), "bbox")
        coco.params.useCats = int(not agnostic)
        coco.params.areaRng = [(0, 1e10), *SIZES.values()]
        coco.params.areaRngLbl = ["all", *SIZES]
        coco.evaluate()
        coco.accumulate()

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1

    p, r = coco.eval["precision"], coco.eval["recall"]
    scores = {"AP50": mean(p[0, ..., 0, 2]), "AP75": mean(p[5, ..., 0, 2])}
    scores |= {"AR1": mean(r[..., 0, 0]), "AR10": mean(r[..., 0, 1])}
    for k, size in enumerate(("", "_T", "_S", "_M", "_L")):
        scores["AP" + size] = mean(p[..., k, 2])
        scores["AR" + (size or "100")] = mean(r[..., k, 2])
    return scores


def same_scores(got, want):
    assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_score_boxes_equals_pycocotools(seed):
    # None is found, ties of scores and boxes without area, more than COCO's 100 in a frame.
    labels, dets = random_frames(seed, found=(30, 30, 0, 130, 60, 130)[seed], ties=seed % 2 == 1)
    for ids in (range(4), (0, 2)):
        for agnostic in (False, True):
            got = score_boxes(labels, dets, 360, 640, NAMES, "none", agnostic, ids)
            same_scores(got, pycocotools_scores(labels, dets, ids, agnostic))
    rows = score_boxes(labels, dets, 360, 640, NAMES)["classes"]
    for i, name in enumerate(NAMES):
        same_scores(rows[name], pycocotools_scores(labels, dets, [i], False))
        assert rows[name]["boxes"] == sum((boxes["class_id"] == i).sum() for boxes in labels)
        assert rows[name]["frames"] == sum(len(boxes) > 0 for boxes in labels)


def test_score_boxes_equals_rvt_and_its_fork_on_the_reference():
    arrays = np.load(shared("reference/scores.npz"))
    for case in json.loads(shared("reference/scores.json").read_text()):
        sides = [arrays[f"{case['case']}_{side}"] for side in ("labels", "detections")]
        times = np.unique(np.concatenate([side["t"] for side in sides]))
        frames = [[side[side["t"] == t] for t in times] for side in sides]
        scene = case["height"], case["width"], [str(i) for i in range(case["classes"])]
        fork = {"class_agnostic": True, "class_ids": range(min(3, case["classes"]))}
        for protocol, options in {"prophesee_class_mean": {}, "fork_overall": fork}.items():
            scores = score_boxes(*frames, *scene, "prophesee", **options)
            for key, value in case.get(protocol, {}).items():
                for theirs, ours in (("AR_max_det=", "AR"), ("AP_5", "AP5"), ("AP_7", "AP7")):
                    key = key.replace(theirs, ours)
                assert abs(scores[key] - value) < 1e-9


def test_score_boxes_without_detections_is_zero():
    truth = some_boxes(0, [(10, 10, 20, 20)])
    missed = score_boxes([truth], [truth[:0]], 64, 64, NAMES)
    assert missed["boxes"] == 1
    assert type(missed["AP"]) is float  # a checkpoint holds the best, and loads no numpy scalar
    assert missed["AP"] == missed["AR100"] == missed["AP_S"] == 0
    assert missed["AP_M"] == missed["AP_T"] == -1
    assert missed["classes"]["car"]["AP"] == -1  # a class without labels stays out of the mean


def test_score_boxes_without_labels_is_undefined_and_prints_nothing(capfd):
    some = some_boxes(0, [(10, 10, 20, 20)])
    none = some[:0]
    for labels, dets in (([], []), ([none], [none]), ([none], [some])):
        scores = score_boxes(labels, dets, 64, 64, NAMES)
        assert scores["frames"] == 0
        assert scores["AP"] == scores["AP_L"] == scores["AR1"] == -1
    # Frames without labels do not count.
    assert score_boxes([some, none], [some, some], 64, 64, NAMES)["AP"] > 0.999999
    assert capfd.readouterr() == ("", "")


def test_score_boxes_of_16_px_are_small_but_not_tiny():
    for xywh, tiny in (((0, 0, 16, 16), -1), ((0, 0, 15, 17), 1)):
        boxes = [some_boxes(0, [xywh])]
        scores = score_boxes(boxes, boxes, 64, 64, NAMES)
        assert scores["AP_T"] == pytest.approx(tiny)
        assert scores["AP_S"] == pytest.approx(1)


def test_score_boxes_keeps_frames_that_hold_only_other_classes():
    car, bus = (some_boxes(0, [(0, 0, 40, 40)], i) for i in (1, 3))
    found = [some_boxes(0, [(0, 0, 40, 40)], 1, score) for score in (0.5, 1.0)]
    scores = score_boxes([car, bus], found, 360, 640, NAMES, "none", True, range(3))
    assert (scores["frames"], scores["boxes"]) == (2, 1)
    assert scores["AP"] == pytest.approx(0.5)  # the better one is on the bus
    both = score_boxes([car, bus], found, 360, 640, NAMES, class_agnostic=True)
    assert both["boxes"] == 2
    assert both["AP"] > 0.999999

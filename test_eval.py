"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ==== eval.py and demo.py

def random_frames(seed, frames=12, classes=4, most=9, found=30, ties=False, hw=(360, 640)):
    """Labels and detections of `frames` frames: some near a label, some nowhere; with ties scores and boxes repeat."""
    rng, labels, dets = np.random.default_rng(seed), [], []
    for k in range(frames):
        n = int(rng.integers(0, most + 1))
        truth = some_boxes(k * 100_000, rng.uniform((0, 0, 4, 4), (hw[1] - 90, hw[0] - 90, 120, 120), (n, 4)),
                           rng.integers(0, classes, n))
        near = truth[rng.integers(0, n, found)] if n else truth
        near = near[: int(rng.integers(0, found + 1))]
        for name in "xywh":
            near[name] *= rng.uniform(0.85, 1.15, len(near)).astype(np.float32)
        near["class_id"] = np.where(rng.random(len(near)) < 0.8, near["class_id"], rng.integers(0, classes, len(near)))
        near["class_confidence"] = rng.integers(1, 5, len(near)) / 4 if ties else rng.random(len(near))
        if ties:
            for boxes in (truth, near):
                for name in "xywh":
                    boxes[name] = np.round(boxes[name] / 16) * 16 + 8
        labels.append(truth)
        dets.append(near)
    return labels, dets


def plain_coco(labels, dets, ids, agnostic):
    """The same scores by pycocotools' own classes, as RVT calls them: the independent oracle."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    kept = [k for k, boxes in enumerate(labels) if len(boxes)]

    def entries(side, extra):
        return [{"image_id": i, "category_id": int(b["class_id"]) + 1, "bbox": [float(b[n]) for n in "xywh"],
                 **extra(b)} for i, k in enumerate(kept, 1) for b in side[k]]

    with contextlib.redirect_stdout(None):
        coco = COCO()
        truth = entries(labels, lambda b: {"area": float(b["w"] * b["h"]), "iscrowd": 0})
        coco.dataset = {"images": [{"id": i} for i in range(1, len(kept) + 1)], "categories": [{"id": i + 1} for i in ids],
                        "annotations": [{**entry, "id": i} for i, entry in enumerate(truth, 1)]}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(entries(dets, lambda b: {"score": float(b["class_confidence"])})), "bbox")
        evaluator.params.useCats = int(not agnostic)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [(0, 1e10), *SIZES.values()], ["all", *SIZES]
        evaluator.evaluate()
        evaluator.accumulate()
    p, r = evaluator.eval["precision"], evaluator.eval["recall"]

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1

    return {"AP": mean(p[..., 0, 2]), "AP50": mean(p[0, ..., 0, 2]), "AP75": mean(p[5, ..., 0, 2]),
            "AR1": mean(r[..., 0, 0]), "AR10": mean(r[..., 0, 1]), "AR100": mean(r[..., 0, 2]),
            **{f"AP_{s}": mean(p[..., i, 2]) for i, s in enumerate("TSML", 1)},
            **{f"AR_{s}": mean(r[..., i, 2]) for i, s in enumerate("TSML", 1)}}


# ---- scores

def test_scores_equal_rvt_and_its_fork_on_the_reference():
    if not (SHARED / "reference/scores.npz").exists():
        pytest.skip("../shared/reference is absent")
    arrays = np.load(SHARED / "reference/scores.npz")
    for case in json.loads((SHARED / "reference/scores.json").read_text()):
        labels, dets = (arrays[f"{case['case']}_{side}"] for side in ("labels", "detections"))
        times = np.unique(np.concatenate((labels["t"], dets["t"])))
        frames = [[side[side["t"] == t] for t in times] for side in (labels, dets)]
        scene = (case["height"], case["width"], [str(i) for i in range(case["classes"])], "prophesee")
        for protocol, options in (("prophesee_class_mean", {}), ("fork_overall", {"class_agnostic": True, "class_ids": range(
                min(3, case["classes"]))})):
            scores = score_boxes(*frames, *scene, **options)
            for key, value in case.get(protocol, {}).items():
                assert abs(scores[key.replace("AR_max_det=", "AR").replace("AP_5", "AP5").replace("AP_7", "AP7")] - value) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_pycocotools_on_random_boxes(seed):
    labels, dets = random_frames(seed, found=130 if seed == 3 else 30, ties=seed % 2 == 1)
    for agnostic in (False, True):
        got, want = score_boxes(labels, dets, 360, 640, NAMES, class_agnostic=agnostic), plain_coco(labels, dets, range(4), agnostic)
        assert {m: got[m] for m in METRICS} == pytest.approx(want, abs=1e-12)
    for i, name in enumerate(NAMES):
        alone = [[boxes[boxes["class_id"] == i] for boxes in side] for side in (labels, dets)]
        kept = [k for k, boxes in enumerate(labels) if len(boxes)]
        got = score_boxes(labels, dets, 360, 640, NAMES)["classes"][name]
        assert got["boxes"] == sum(map(len, alone[0])) and got["frames"] == len(kept)
        assert got["AP"] == pytest.approx(score_boxes(labels, dets, 360, 640, NAMES, class_ids=[i])["AP"], abs=1e-12)


def test_scores_without_detections_are_zero_and_without_labels_undefined():
    truth, none = some_boxes(0, [(10, 10, 20, 20)]), some_boxes(0, [])
    missed = score_boxes([truth], [none], 64, 64, NAMES)
    assert missed["AP"] == missed["AR100"] == missed["AP_S"] == 0 and missed["AP_M"] == missed["AP_T"] == -1
    assert missed["classes"]["car"]["AP"] == -1 and missed["boxes"] == 1  # a class without labels stays out of the mean
    for labels, dets in (([], []), ([none], [none]), ([none], [truth])):
        scores = score_boxes(labels, dets, 64, 64, NAMES)
        assert scores["frames"] == 0 and all(scores[m] == -1 for m in METRICS)
    assert score_boxes([truth], [truth], 64, 64, NAMES)["AP"] > 0.999999
    assert score_boxes([truth, none], [truth, truth], 64, 64, NAMES)["AP"] > 0.999999  # frames without labels do not count


def test_a_16_px_box_is_small_but_not_tiny():
    boxes = some_boxes(0, [(0, 0, 16, 16)]), some_boxes(0, [(0, 0, 15, 17)])
    assert [score_boxes([b], [b], 64, 64, NAMES)["AP_T"] for b in boxes] == pytest.approx([-1, 1])
    assert [score_boxes([b], [b], 64, 64, NAMES)["AP_S"] for b in boxes] == pytest.approx([1, 1])


@pytest.mark.parametrize("hw, diagonal, side", [((720, 1280), 60, 20), ((360, 640), 30, 10), ((240, 304), 30, 10), ((480, 640), 30, 10)])
def test_prophesee_filter_in_proportion_to_the_sensor(hw, diagonal, side):
    long = (diagonal ** 2 - side ** 2) ** 0.5 + 0.01
    rows = [(0, 0, side, long), (0, 0, side - 0.1, 2 * long), (0, 0, side, long - 0.1), (0, 0, long, side)]
    late, early = some_boxes(500_001, rows), some_boxes(500_000, rows)
    assert (evaluation.prophesee_filter(late, hw[1])["h"] == late["h"][[0, 3]]).all()
    assert len(evaluation.prophesee_filter(early, hw[1])) == 0
    assert score_boxes([late, early], [late, early], *hw, NAMES, "prophesee")["boxes"] == 2


def test_class_ids_keep_frames_that_hold_only_other_classes():
    car, bus = some_boxes(0, [(0, 0, 40, 40)], 1), some_boxes(0, [(0, 0, 40, 40)], 3)
    false_car = some_boxes(0, [(0, 0, 40, 40)], 1, 1.0)
    found = some_boxes(0, [(0, 0, 40, 40)], 1, 0.5)
    scores = score_boxes([car, bus], [found, false_car], 360, 640, NAMES, class_agnostic=True, class_ids=range(3))
    assert scores["frames"] == 2 and scores["boxes"] == 1 and scores["AP"] == pytest.approx(0.5)
    both = score_boxes([car, bus], [found, false_car], 360, 640, NAMES, class_agnostic=True)
    assert both["boxes"] == 2 and both["AP"] > 0.999999


def test_scoring_rejects_an_unknown_filter():
    with pytest.raises(ValueError, match="box_filter='psee': expected none or prophesee"):
        score_boxes([], [], 64, 64, NAMES, "psee")


# ---- predictions to detections

def greedy(box, score, label, iou):
    """Non-maximum suppression by its definition, box by box."""
    kept = []
    for i in sorted(range(len(score)), key=lambda i: -float(score[i])):
        def clashes(j):
            w, h = (np.clip(min(box[i][k + 2], box[j][k + 2]) - max(box[i][k], box[j][k]), 0, None) for k in (0, 1))
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box[j], box[i])]
            with np.errstate(invalid="ignore"):
                return label[i] == label[j] and np.float32(w * h) / (areas[0] + areas[1] - w * h) > iou
        if not any(clashes(j) for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_nms_is_the_greedy_definition(seed):
    rng, n = np.random.default_rng(seed), (0, 1, 8, 60, 150, 250)[seed]
    corner, size = rng.uniform(0, 60, (n, 2)), rng.uniform(0, 30, (n, 2))
    if seed % 2:  # whole numbers: equal boxes, overlaps of exactly the threshold, boxes without area
        corner, size = corner.round(), size.round()
    box = torch.tensor(np.concatenate((corner, corner + size), 1), dtype=torch.float32)
    score = torch.tensor(rng.integers(0, 6, n) / 6 if seed % 2 else rng.random(n), dtype=torch.float32)
    label = torch.tensor(rng.integers(0, 3, n))
    for iou in (0.45, 0.5):
        for block in (256, 1, 16):
            assert nms(box, score, label, iou, block).tolist() == greedy(box.numpy(), score, label, iou)


def test_nms_of_many_boxes_in_bounded_blocks():
    torch.manual_seed(0)
    corner = 8 * torch.randint(0, 40, (20_000, 2)).float()
    box = torch.cat((corner, corner + 10), 1)  # neighbours overlap by less than the threshold: one box is left per cell
    kept = nms(box, torch.rand(20_000), torch.zeros(20_000), 0.45)
    assert len(kept) == len(corner.unique(dim=0)) == len(corner[kept].unique(dim=0))


def test_detections_by_hand():
    def logit(*p):
        return torch.tensor(p).logit()

    grid = torch.tensor([[0, 0, 8.0], [1, 0, 8], [0, 0, 16], [0, 0, 32]])
    box = torch.tensor([[20, 30, 10, 20.0], [21, 30, 10, 20], [21, 30, 10, 20], [50, 50, 4, 4]]).repeat(2, 1, 1)
    obj = torch.stack((logit(0.5, 0.9, 0.9, 0.01), logit(1e-5, 1e-5, 1e-5, 1e-5)))
    cls = torch.stack([logit(0.9, 0.2), logit(0.4, 0.6), logit(0.8, 0.1), logit(0.05, 0.09)]).repeat(2, 1, 1)
    first, second = detections(Prediction(box, obj, cls, grid), [7, 8])
    # anchor 2 (0.72, class 0) drops anchor 0 (0.45, class 0); anchor 1 is of class 1 (0.54); anchor 3 (0.0009) is too weak
    assert len(second) == 0 and first["class_id"].tolist() == [0, 1] and first["stride"].tolist() == [16, 8]
    np.testing.assert_allclose(first["class_confidence"], [0.8, 0.6], rtol=1e-5)  # p_cls ranks
    np.testing.assert_allclose(first["confidence"], [0.72, 0.54], rtol=1e-5)
    assert [first[0][name] for name in ("t", "x", "y", "w", "h")] == [7, 16, 20, 10, 20]
    product = detections(Prediction(box, obj, cls, grid), [7, 8], score="obj*cls", confidence=0.6)[0]
    assert product["class_confidence"].tolist() == product["confidence"].tolist() and len(product) == 1
    with pytest.raises(ValueError, match="expected cls or obj"):
        detections(Prediction(box, obj, cls, grid), [7, 8], score="obj")


# ---- streams

SEQUENCES = [("c", 12, (1, 4, 9)), ("a", 20, (0, 3, 8, 19)), ("b", 7, (1, 6)), ("d", 9, (0,)), ("e", 5, ())]


@pytest.mark.parametrize("attention", (False, True))
def test_run_does_not_depend_on_batches_chunks_order_or_workers(attention):
    model, sequences = small_detector(small_object_attention=attention), [MemorySequence(*s) for s in SEQUENCES]
    labels, want = run(model, sequences, 1, 2)
    assert [boxes["t"][0] for boxes in labels] == [s.timestamps_us[t] for s in sorted(sequences, key=lambda s: s.name)
                                                  for t in s.label_frames]
    assert min(map(len, want)) > 5
    for batch, T, workers in ((3, 3, 0), (8, 30, 0), (2, 2, 2)):
        again, got = run(model, sequences[::-1], batch, T, num_workers=workers)
        same_boxes(got, want)
        assert all((a == b).all() for a, b in zip(again, labels))
    assert run(model, [], 2, 5) == ([], []) and run(model, sequences[-1:], 2, 5) == ([], [])


def test_run_carries_the_state_and_starts_each_sequence_afresh():
    model, sequence = small_detector(), MemorySequence("a", 20, (3, 19))
    twin = MemorySequence("b", 3, (2,))  # after it, sequence a must start from nothing again
    both = run(model, [sequence, twin], 1, 4)[1]
    same_boxes(both[:2], run(model, [sequence], 1, 4)[1])
    with torch.inference_mode():  # the whole sequence at once
        prediction, _ = model(torch.from_numpy(sequence.data[:, None]), None, torch.isin(torch.arange(20), torch.tensor([3, 19]))[:, None])
    same_boxes(both[:2], detections(prediction, sequence.timestamps_us[[3, 19]]))
    sequence.data[10] = 9 - sequence.data[10]  # 9 frames before the last label, in another chunk
    changed = run(model, [sequence], 1, 4)[1]
    same_boxes(changed[:1], both[:1])
    assert len(changed[1]) != len(both[1]) or np.abs(changed[1]["x"] - both[1]["x"]).max() > 1e-4


def test_run_starts_T_minus_1_frames_before_the_first_label():
    model, sequence = small_detector(), MemorySequence("a", 12, (8,))
    want = run(model, [sequence], 1, 3)[1]
    sequence.data[:6] = 0
    same_boxes(run(model, [sequence], 1, 3)[1], want, 0)
    sequence.data[6] = 0
    assert not np.array_equal(run(model, [sequence], 1, 3)[1][0]["x"], want[0]["x"])


def test_run_leaves_the_model_in_its_mode():
    model = small_detector().train()
    statistics = [b.clone() for b in model.buffers()]
    run(model, [MemorySequence("a", 4, (2,))], 1, 2)
    assert model.training and all(torch.equal(a, b) for a, b in zip(statistics, model.buffers()))


def shard(rank, store, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for k, count in enumerate((5, 1)):  # one sequence only: rank 1 has none
        found = run(small_detector(), [MemorySequence(*s) for s in SEQUENCES[:count]], 2, 3)[1]
        np.savez(f"{path}/{rank}{k}.npz", *found)
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(shard, (tmp_path / "store", tmp_path), nprocs=2)
    for k, count in enumerate((5, 1)):
        want = run(small_detector(), [MemorySequence(*s) for s in SEQUENCES[:count]], 2, 3)[1]
        for rank in range(2):
            same_boxes(list(np.load(tmp_path / f"{rank}{k}.npz").values()), want)


@pytest.mark.parametrize("attention", (False, True))
def test_stream_detector_equals_the_chunked_forward_pass(attention):
    model, sequence = small_detector(small_object_attention=attention), MemorySequence("a", 6, range(6))
    want, detector = run(model, [sequence], 1, 6)[1], StreamDetector(model)
    for _ in range(2):
        got = [detector(frame, t) for frame, t in zip(sequence.data, sequence.timestamps_us)]
        same_boxes(got, want)
        assert got[0].dtype == BOX_DTYPE
        detector.reset()
    assert detector(sequence.data[0])["t"][0] == 50_000 and detector(torch.from_numpy(sequence.data[1]))["t"][0] == 100_000
    assert model.heads[0].stem.bn.training is False and not isinstance(model.heads[0].stem.bn, torch.nn.Identity)
    with pytest.raises(ValueError, match=r"a frame of \(20, 32, 64\), expected \(20, 64, 64\)"):
        detector(sequence.data[0, :, :32])
    with pytest.raises(ValueError, match=r"a frame of \(20, 32, 128\)"):  # the same number of values
        detector(sequence.data[0].reshape(20, 32, 128))
    assert detector(sequence.data[1])["t"][0] == 150_000  # the clock did not move meanwhile


def test_stream_detector_in_bfloat16_finds_about_the_same():
    model, sequence = small_detector(hw=(64, 320)), MemorySequence("a", 2, (1,), (64, 320))
    exact, coarse = (StreamDetector(model, dtype)(sequence.data[0]) for dtype in (torch.float32, torch.bfloat16))
    assert abs(len(exact) - len(coarse)) <= 0.1 * len(exact)
    right = [boxes[boxes["x"] > 250] for boxes in (exact, coarse)]  # cells beyond 256 keep their place
    assert len(right[0]) and abs(len(right[0]) - len(right[1])) <= 0.2 * len(right[0])


# ---- report

def some_report(seed=0, **settings):
    labels, dets = random_frames(seed, frames=10)
    labels = [boxes if len(boxes) else some_boxes(0, [(9, 9, 9, 9)]) for boxes in labels]
    dets = [with_level(boxes) for boxes in dets]
    return labels, dets, report(labels, dets, 360, 640, NAMES, strides=(8, 16), split="test", confidence=0.001, nms_iou=0.45,
                                score="cls", **settings)


def with_level(boxes):
    out = np.zeros(len(boxes), evaluation.DETECTION_DTYPE)
    for name in BOX_DTYPE.names:
        out[name] = boxes[name]
    out["confidence"], out["stride"] = boxes["class_confidence"], 8 + 8 * (boxes["class_id"] % 2)
    return out


def test_report_names_every_protocol_and_has_no_zero_for_undefined():
    labels, dets, result = some_report()
    rows = result["rows"]
    for kind in ("all boxes", "Prophesee filter"):
        for protocol in ("class mean", "class-agnostic", *NAMES, "small_classes (pedestrian, bicycle), class mean"):
            assert set(rows[f"{protocol}, {kind}"]) == {"frames", "boxes", *METRICS}
        assert sum(rows[f"{name}, {kind}"]["boxes"] for name in NAMES) == rows[f"class mean, {kind}"]["boxes"]
        pair = [rows[f"{name}, {kind}"]["AP"] for name in ("pedestrian", "bicycle")]
        assert rows[f"small_classes (pedestrian, bicycle), class mean, {kind}"]["AP"] == pytest.approx(np.mean(pair), abs=1e-6)
    fork = rows["eTraM fork's overall: class-agnostic, ids 0 to 2 only, Prophesee filter"]
    assert fork["AP"] == pytest.approx(score_boxes(labels, dets, 360, 640, NAMES, "prophesee", True, range(3))["AP"], abs=1e-6)
    assert {f"detections of stride {s} alone, class mean, all boxes" for s in (8, 16)} <= set(rows)
    assert rows["class mean, Prophesee filter"]["AP_T"] is None  # no tiny box survives the filter
    tiny = result["sizes"]["tiny, < 16x16 px"]
    assert tiny["boxes"] and tiny["Prophesee filter removes"] == 1
    assert result["settings"]["boxes"] == sum(map(len, labels))
    json.dumps(result, allow_nan=False)


def test_report_without_any_label_or_detection():
    result = report([], [], 64, 64, NAMES, strides=(8,))
    assert result["rows"]["class mean, all boxes"]["AP"] is None and result["sizes"]["large, above"]["boxes"] == 0


def test_compare_shows_differences_and_refuses_other_protocols(tmp_path):
    result = some_report()[2]
    better = json.loads(json.dumps(result))
    better["rows"]["class mean, all boxes"]["AP"] += 0.015
    better["settings"]["ckpt"] = "better.pt"
    del better["rows"]["detections of stride 16 alone, class mean, all boxes"]
    val, loose, data = (json.loads(json.dumps(result)) for _ in range(3))
    val["settings"]["split"], loose["settings"]["confidence"] = "val", 0.1
    data["settings"]["labels"] = "another"
    paths = [str(tmp_path / f"{name}.json") for name in ("base", "better", "val", "loose", "data", "broken")]
    for path, content in zip(paths, (result, better, val, loose, data)):
        Path(path).write_text(json.dumps(content))
    text = compare(paths[:2])
    head = text[:text.index(evaluation.HEAD)].splitlines()
    assert head[0] == f"report: {paths[0]}" and head.count("split: test") == 2 and "labels: " + result["settings"]["labels"] in head
    assert head.index("ckpt: better.pt") > head.index(f"report: {paths[1]}")
    start = text.index("class mean, all boxes | " + paths[1])
    assert "+1.5" in text[start:].splitlines()[1] and "difference" in text[start:].splitlines()[1]
    assert f"stride 16 alone, class mean, all boxes | {paths[1]}" not in text
    for path, word in zip(paths[2:5], ("split val, not test", "confidence 0.1, not 0.001", "labels another, not [0-9a-f]+")):
        with pytest.raises(ValueError, match=f"not comparable.*: {word}"):
            compare([paths[0], path])
    Path(paths[5]).write_text('{"settings": {}}')
    for bad in ([paths[0], paths[5]], [paths[0], str(tmp_path / "nowhere.json")], [__file__]):
        with pytest.raises((ValueError, OSError)):
            compare(bad)


def test_confusion_by_hand():
    truth = some_boxes(0, [(0, 0, 20, 20), (50, 0, 20, 20), (100, 0, 20, 20)], [0, 1, 1])
    found = with_level(some_boxes(0, [(0, 0, 20, 20), (51, 0, 20, 20), (50, 1, 20, 20), (0, 50, 9, 9), (100, 0, 20, 20)],
                                  [0, 0, 1, 1, 1], [0.9, 0.8, 0.7, 0.6, 0.1]))
    counts = confusion([truth], [found], 2, 0.3)
    #            as 0, as 1, missed: the second box on a label is one on the background
    assert counts.tolist() == [[[1, 0, 0], [1, 0, 1], [0, 2, 0]]]
    assert (confusion([truth], [found[::-1]], 2, 0.3) == counts).all()  # best first, whatever the order
    none = found[:0], truth[:0]
    assert confusion([truth, none[1]], [none[0], found], 2, 0.3).tolist() == [
        [[0, 0, 1], [0, 0, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [2, 2, 0]]]
    pair = some_boxes(0, [(0, 0, 20, 20), (0, 6, 20, 20)], [0, 1])  # a label that is taken leaves the next best one
    both = with_level(some_boxes(0, [(0, 2, 20, 20), (0, 2, 20, 20)], [0, 0], [0.9, 0.8]))
    assert confusion([pair], [both], 2, 0.3).tolist() == [[[1, 0, 0], [1, 0, 0], [0, 0, 0]]]


def test_pictures_of_frames_with_detections(tmp_path):
    sequence = MemorySequence("a", 4, (0, 2, 3))  # fewer frames than places
    found = [with_level(boxes) for boxes in sequence.boxes]  # confidence 1: all of them are drawn
    result = report(sequence.boxes, found, 64, 64, NAMES)
    evaluation.pictures(tmp_path / "report.png", result, [sequence], sequence.boxes, found, NAMES)
    assert (tmp_path / "report.png").stat().st_size > 10_000


# ---- scripts

def test_eval_from_a_checkpoint_alone(tmp_path, capsys):
    data = write_prepared(tmp_path / "data")
    (tmp_path / "run").mkdir()
    ckpt = write_checkpoint(tmp_path / "run" / "ckpt.pt", small_detector(), data_dir=str(data), class_names=NAMES,
                            num_classes=4, sequence_length=3, eval_batch_size=2, num_workers=0)
    evaluation.main([f"--ckpt={ckpt}", "--device=cpu"])
    text, written = capsys.readouterr().out, sorted(p.name for p in (tmp_path / "run" / "eval").iterdir())
    assert written == ["report.json", "report.png"]
    result = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())
    assert result["rows"]["class mean, all boxes"]["frames"] == 6 and result["settings"]["boxes"] == 12 and result["settings"]["split"] == "test"
    speed = result["settings"]["speed"]
    assert speed["ms_median"] > 0 and "CPU" in speed["device"]
    assert speed["frames_per_s"] == pytest.approx(1000 / speed["ms_median"], abs=0.06)
    assert all(protocol in text for protocol in result["rows"])
    evaluation.main([f"--ckpt={ckpt}", "--device=cpu", f"--json={tmp_path / 'lr0.1'}", "--score=obj*cls", "--num_classes", "4"])
    assert (tmp_path / "lr0.1.png").exists() and json.loads((tmp_path / "lr0.1.json").read_text())["settings"]["score"] == "obj*cls"
    with pytest.raises(ValueError, match=r"score obj\*cls, not cls"):
        evaluation.main(["--compare", str(tmp_path / "run/eval/report.json"), str(tmp_path / "lr0.1.json")])
    other = write_prepared(tmp_path / "three", classes=NAMES[:3])
    with pytest.raises(ValueError, match="3 class_names, num_classes=4"):
        evaluation.main([f"--ckpt={ckpt}", f"--data_dir={other}"])
    with pytest.raises(ValueError, match="ckpt.pt is for 4 classes"):
        evaluation.main([f"--ckpt={ckpt}", f"--data_dir={write_prepared(tmp_path / 'turned', classes=NAMES[::-1])}"])
    for option in ("--score=objectness", "--dtype=int8", "--confidence=-1"):
        with pytest.raises(ValueError, match=option[2:].split("=")[0]):
            evaluation.main([f"--ckpt={ckpt}", option])
    for words, message in ((["--ckpt=nowhere.pt"], "nowhere.pt: no such"), ([f"--ckpt={data / 'dataset.json'}"], "not a checkpoint"),
                           ([f"--ckpt={ckpt}", "--spilt=val"], "did you mean split"), ([f"--ckpt={ckpt}", "--split=val"], "val")):
        with pytest.raises(ValueError, match=message):
            evaluation.main(words)


def test_eval_on_frames_of_another_size_than_trained_on(tmp_path):
    data = write_prepared(tmp_path / "data", hw=(48, 96))
    write_checkpoint(tmp_path / "ckpt.pt", small_detector(), data_dir=str(data), eval_batch_size=2, num_workers=0)
    evaluation.main([f"--ckpt={tmp_path / 'ckpt.pt'}", "--device=cpu", f"--out_dir={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out/eval/report.json").read_text())["settings"]["resolution"] == [48, 96]


def test_eval_of_rvts_own_checkpoint(tmp_path):
    if not (SHARED / "reference/rvt_tiny.pt").exists():
        pytest.skip("../shared/reference is absent")
    reference = torch.load(SHARED / "reference/rvt_tiny.pt", weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    write_prepared(tmp_path / "data", ("a",), hw=(128, 160), length=3, labelled=(1, 2), classes=[str(i) for i in range(8)])
    config = tmp_path / "config.py"
    config.write_text("partition_split = 1\ndim_head = 32\nsequence_length = 2\nmax_steps = 7\n")
    evaluation.main([f"--ckpt={tmp_path / 'rvt.ckpt'}", str(config), f"--data_dir={tmp_path / 'data'}", "--device=cpu", "--num_workers=0"])
    assert (tmp_path / "eval" / "report.json").exists()
    model = load_detector(tmp_path / "rvt.ckpt", (128, 160), partition_split=1)
    prediction, _ = model.eval()(reference["events"], None, torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]]).bool())
    want = reference["prediction"]
    torch.testing.assert_close(prediction.box_cxcywh, want[..., :4], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(prediction.cls.sigmoid(), want[..., 5:], rtol=1e-4, atol=1e-4)



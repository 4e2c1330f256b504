"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ==== data.py

# ---- prepared sequences


def test_boxes_are_clipped_halved_and_dropped_by_hand():
    boxes = make_boxes([(0, -10, 4, 30, 20, 0),  # left edge out: x 0..20
                        (0, 50, 30, 40, 40, 1),  # right and bottom out: clamped to 63, 47, then to 31, 23
                        (0, 62.5, 10, 5, 10, 2),  # only in the last column: halved it is flat
                        (0, 70, 10, 5, 10, 3),  # out of the frame
                        (0, 3, 5, 7, 9, 4)])
    fitted, left = move_boxes(boxes, (48, 64), View(zoom=0.5))
    assert left.tolist() == [True, True, False, False, True]
    assert [tuple(box)[1:5] for box in fitted[left]] == [(0, 2, 10, 10), (25, 15, 6, 8), (1.5, 2.5, 3.5, 4.5)]
    fitted, left = move_boxes(boxes, (48, 64), View())
    assert left.tolist() == [True, True, True, False, True]
    assert [tuple(box)[1:5] for box in fitted[left]] == [(0, 4, 20, 20), (50, 30, 13, 17), (62.5, 10, 0.5, 10),
                                                         (3, 5, 7, 9)]


def test_a_labelled_frame_left_without_boxes_counts_as_unlabelled(tmp_path):
    write_sequence(tmp_path / "train" / "a", {2: [BOX], 5: [(62.5, 0, 5, 5, 0)], 7: [(62.5, 0, 5, 5, 0), BOX]}, 9)
    (sequence,) = open_split(tmp_path, "train")
    assert sequence.label_frames.tolist() == [2, 7]
    assert [box.tolist() for box in sequence.boxes] == [[(t, 5, 4, 10, 8, 1, 0, 1)] for t in (150_000, 400_000)]
    assert sequence.dropped == 2


def test_sequence_attributes_and_frames_are_what_was_written(tmp_path):
    frames = write_sequence(tmp_path / "val" / "b", {1: [BOX], 4: [BOX, BOX]}, 6, half=False)
    write_sequence(tmp_path / "val" / "a", {}, 3, half=False)
    (tmp_path / "val" / ".partial").mkdir()
    (tmp_path / "val" / "notes.txt").write_text("")
    a, b = open_split(tmp_path, "val", num_classes=2)
    assert (a.name, a.length, len(a.label_frames), a.boxes) == ("a", 3, 0, [])
    assert (b.name, b.path, b.length, b.hw) == ("b", tmp_path / "val" / "b", 6, (24, 32))
    assert b.timestamps_us.tolist() == [50_000 * n for n in range(1, 7)] and b.timestamps_us.dtype == np.int64
    assert [len(boxes) for boxes in b.boxes] == [1, 2] and b.boxes[0].dtype == BOX_DTYPE and b.dropped == 0
    assert np.array_equal(b.read(2, 6), frames[2:]) and b.read(3, 3).shape == (0, 20, 24, 32)
    again = pickle.loads(pickle.dumps(b))
    out = np.full((7, 2, 20, 24, 32), 9, np.uint8)
    again.read(0, 6, out[:, 1])
    assert np.array_equal(out[:6, 1], frames) and (out[:, 0] == 9).all() and (out[6] == 9).all()


def test_older_labels_without_track_id_and_labels_with_more_fields_load(tmp_path):
    write_sequence(tmp_path / "train" / "a", {1: [BOX]}, 3)
    path = tmp_path / "train" / "a" / "labels_v2" / "labels.npz"
    fields = [("class_id", ">u2"), ("t", "<u8"), *((name, "<f8") for name in "hwyx"), ("invalid", "?")]
    for chosen, extra in ((fields, (0, 1.0)), (fields + [("track_id", "<i8"), ("class_confidence", "<f8")], (5, 0.25))):
        labels = np.zeros(1, chosen)
        for name, value in dict(class_id=3, t=7, x=10, y=8, w=20, h=16, track_id=5, class_confidence=0.25).items():
            if name in labels.dtype.names:
                labels[name] = value
        np.savez(path, labels=labels, objframe_idx_2_label_idx=np.array([0], np.uint32))
        (sequence,) = open_split(tmp_path, "train")
        assert sequence.boxes[0].tolist()[0][:6] == (7, 5, 4, 10, 8, 3) and sequence.boxes[0].tolist()[0][7] == extra[1]


def test_the_half_resolution_file_is_taken_where_both_are_there_and_what_is_asked_for_must_be_there(tmp_path):
    write_sequence(tmp_path / "train" / "a", {1: [BOX]}, 3, hw=(48, 64), half=False)
    with pytest.raises(ValueError, match="resolution='half'"):
        open_split(tmp_path, "train", resolution="half")
    assert open_split(tmp_path, "train")[0].hw == (48, 64)
    write_sequence(tmp_path / "other", {1: [BOX]}, 3)
    os.rename(tmp_path / "other" / data.REPRESENTATION / data.FILES["half"],
              tmp_path / "train" / "a" / data.REPRESENTATION / data.FILES["half"])
    assert open_split(tmp_path, "train")[0].hw == (24, 32)
    assert open_split(tmp_path, "train", resolution="full")[0].boxes[0]["x"] == 10
    with pytest.raises(ValueError, match="resolution='quarter'"):
        open_split(tmp_path, "train", resolution="quarter")


def test_a_missing_or_empty_split_says_what_to_do(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / ".keep").write_text("")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"{split}.*prepare.py") as error:
            open_split(tmp_path, split)
        assert "\n" not in str(error.value)


def test_class_names_come_from_dataset_json_then_from_the_caller_then_are_numbers(tmp_path):
    assert data.load_classes(tmp_path, ("car", "tram")) == ("car", "tram")
    assert data.load_classes(tmp_path, num_classes=3) == ("0", "1", "2")
    for call in (lambda: data.load_classes(tmp_path), lambda: data.load_classes(tmp_path, ("car",), 2)):
        with pytest.raises(ValueError, match="class"):
            call()
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["a", "b", "c"], "height": 1}))
    assert data.load_classes(tmp_path, ("car", "tram")) == ("a", "b", "c")
    for text in ("", "{", "[]", '{"classes": 3}', '{"classes": [1]}', '{"classes": []}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match="dataset.json"):
            data.load_classes(tmp_path)


def test_a_class_id_beyond_the_classes_names_the_file(tmp_path):
    make_set(tmp_path, [[1]], length=3)
    open_split(tmp_path, "train", num_classes=2)
    with pytest.raises(ValueError, match="labels.npz.*class ids from"):
        open_split(tmp_path, "train", num_classes=1)


def test_sequences_of_other_sizes_are_refused(tmp_path):
    make_set(tmp_path, [[1]], length=3)
    write_sequence(tmp_path / "train" / "t", {1: [BOX]}, 3, hw=(16, 32))
    with pytest.raises(ValueError, match="t: frames of"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("filters", [
    BLOSC, hdf5plugin.Blosc(cname="zstd", clevel=9, shuffle=0), hdf5plugin.Blosc(cname="lz4", shuffle=1),
    hdf5plugin.Blosc(cname="zstd", clevel=0), hdf5plugin.Blosc(cname="zstd", shuffle=2), dict(shuffle=True, **BLOSC),
    hdf5plugin.Blosc2(cname="zstd"), dict(compression="gzip")], ids=str)
def test_frames_decode_whatever_the_compression(tmp_path, filters):
    rng = np.random.default_rng(0)
    for name, fill in (("sparse", None), ("zero", 0), ("noise", rng.integers(0, 256, (3, 20, 48, 64)))):
        frames = write_sequence(tmp_path / "train" / name, {}, 3, hw=(48, 64), fill=fill, **filters)
        sequence = data.Sequence(tmp_path / "train" / name)
        assert np.array_equal(sequence.read(0, 3), frames)


def test_a_chunk_whose_header_lies_about_its_sizes_is_refused(tmp_path):
    write_sequence(tmp_path / "train" / "a", {}, 3, hw=(48, 64))
    file = Path(data.Sequence(tmp_path / "train" / "a").file)
    with h5py.File(file) as opened:
        at = opened["data"].id.get_chunk_info(1).byte_offset
    whole = file.read_bytes()
    for place in (4, 12):  # bytes of the frame, bytes of the chunk
        file.write_bytes(whole[:at + place] + b"xxxx" + whole[at + place + 4:])
        with pytest.raises(ValueError, match="frame 1 does not decode.*sizes are damaged"):
            data.Sequence(tmp_path / "train" / "a").read(0, 3)


def reference_sets():
    if not (SHARED / "reference" / "prepared").is_dir():
        pytest.skip("../shared/reference is absent")
    return [(kind, split) for kind in ("gen1", "gen4", "etram") for split in ("train", "val")]


def test_reference_sets_read_as_rvt_reads_them():
    for kind, split in reference_sets():
        (sequence,) = open_split(SHARED / "reference" / "prepared" / kind / "out", split, num_classes=8)
        half, (H, W) = kind != "gen1", {"gen1": (240, 304)}.get(kind, (720, 1280))
        with h5py.File(sequence.file) as file:
            assert np.array_equal(sequence.read(3, 6), file["data"][3:6]) and sequence.length == len(file["data"])
        assert sequence.hw == ((H // 2, W // 2) if half else (H, W))
        stored = np.load(sequence.path / "labels_v2" / "labels.npz")
        index = np.load(sequence.path / data.REPRESENTATION / "objframe_idx_2_repr_idx.npy")
        first = [*stored["objframe_idx_2_label_idx"], len(stored["labels"])]
        expected, f = {}, np.float32
        for i, frame in enumerate(index.tolist()):
            for label in stored["labels"][first[i]:first[i + 1]]:
                x0, y0 = (min(max(label[n], f(0)), f(size - 1)) for n, size in (("x", W), ("y", H)))
                w = min(max(label["x"] + label["w"], f(0)), f(W - 1)) - x0
                h = min(max(label["y"] + label["h"], f(0)), f(H - 1)) - y0
                if half:
                    x1, y1 = min((x0 + w) * f(0.5), f(W / 2 - 1)), min((y0 + h) * f(0.5), f(H / 2 - 1))
                    x0, y0 = x0 * f(0.5), y0 * f(0.5)
                    w, h = x1 - x0, y1 - y0
                if w > 0 and h > 0:
                    row = (label["t"], x0, y0, w, h, label["class_id"], label["track_id"], 1)
                    expected.setdefault(frame, []).append(row)
        assert sequence.label_frames.tolist() == list(expected)
        for boxes, rows in zip(sequence.boxes, expected.values()):
            assert boxes.tolist() == np.array(rows, BOX_DTYPE).tolist()


# ---- the plan


def test_runs_by_hand(toy_set):
    runs = data.Runs(toy_set, 4, seed=0, random=False)  # gaps longer than T = 4 cut: 6 -> 20, 22 -> 29, 13 -> 26
    assert runs.chunks == [(0, 0, 0, 4), (0, 0, 4, 7), (0, 17, 17, 21), (0, 17, 21, 23), (0, 26, 26, 30), (1, 6, 6, 10),
                           (1, 6, 10, 14), (1, 23, 23, 27), (2, 12, 12, 16)]
    assert runs.run_of.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5]
    windows = data.Runs(toy_set, 4, seed=0, random=True)  # frame 1 has no three frames before it
    assert windows.chunks[:3] == [(0, 0, 0, 4), (0, 2, 2, 6), (0, 3, 3, 7)] and len(windows.chunks) == 6 + 6 + 1
    assert data.Runs([], 4, 0, False).chunks == []


def test_each_slot_plays_every_chunk_once_a_pass_in_order_within_a_run(toy_set):
    for batch_size in (1, 3, 13):  # fewer runs than slots is fine
        train = plan(toy_set, batch_size=batch_size)
        L = train.steps_per_epoch
        assert L == 9
        batches = [train[k] for k in range(2 * L)]
        for b in range(batch_size):
            plays = [(shown(batch, b), bool(batch.is_first[b])) for batch in batches]
            begin = -(b * L // batch_size) % L  # the first step at which this slot begins a pass
            one_pass = plays[begin:begin + L]
            frames = sorted((s, f) for (s, seen), _ in one_pass for f in seen if f >= 0)
            chunks = train.runs[0].chunks
            assert frames == sorted((i + 1, f) for i, _, start, stop in chunks for f in range(start, stop))
            for i, ((sequence, seen), first) in enumerate(one_pass):
                starts_run = (sequence - 1, seen[0]) in [chunk[:2] for chunk in chunks]
                assert first == starts_run
                if not first:
                    (before, previous), _ = one_pass[i - 1]
                    assert before == sequence and previous[-1] + 1 == seen[0]


def test_every_labelled_frame_carries_its_boxes_and_every_chunk_one_at_least(toy_set):
    train = plan(toy_set, flip=0.0, zoom_stream=0.0, batch_size=3)
    for k in range(12):
        batch = train[k]
        assert batch.has_boxes and batch.frames.any(0).all()
        for b in range(3):
            sequence, frames = shown(batch, b)
            assert batch.frames[:, b].tolist() == [frame in toy_set[sequence - 1].label_frames for frame in frames]
        assert batch.targets.shape == (batch.frames.sum(), 16, 5)
        assert (batch.targets[:, 0] == torch.tensor([1, 10.0, 8.0, 10.0, 8.0])).all() and not batch.targets[:, 1:].any()


def test_a_chunk_beyond_the_end_of_its_run_is_zeros_without_boxes(toy_set):
    train = plan(toy_set, batch_size=1)
    short = [batch for batch in map(train.__getitem__, range(9)) if shown(batch, 0)[1][-1] == -1]
    assert len(short) == 2  # runs of 7 and 6 frames
    for batch in short:
        end = shown(batch, 0)[1].index(-1)
        assert not batch.events[end:].any() and batch.events[:end].any() and not batch.frames[end:].any()


def test_random_windows_end_at_a_labelled_frame_and_start_from_a_reset_state(toy_set):
    train = plan(toy_set, sampling="random", batch_size=2)
    assert train.steps_per_epoch == 13
    seen = []
    for k in range(13):
        batch = train[k]
        assert batch.is_first.all()
        for b in range(2):
            sequence, frames = shown(batch, b)
            assert frames == list(range(frames[0], frames[0] + 4)) and frames[-1] in toy_set[sequence - 1].label_frames
            seen += [(b, sequence, frames[-1])]
    first = [window[1:] for window in seen if window[0] == 0]
    assert len(set(first)) == 13 and first != sorted(first)


def test_mixed_batches_hold_streams_and_windows_in_their_proportion(toy_set):
    for B, weights, streams in ((2, (1, 1), 1), (4, (1, 1), 2), (4, (9, 1), 3), (5, (1, 20), 1), (6, (1, 2), 2)):
        train = plan(toy_set, sampling="mixed", batch_size=B, mixed_stream=weights[0], mixed_random=weights[1])
        assert train.slots == (streams, B - streams)
        firsts = torch.stack([train[k].is_first for k in range(9)])
        assert firsts[:, streams:].all() and not firsts[:, :streams].all()


def test_the_plan_is_the_same_for_any_number_of_workers_and_any_start(toy_set):
    train = plan(toy_set, sampling="mixed", batch_size=3)
    expected = [train[k] for k in range(5, 11)]
    for workers, start in ((0, 5), (1, 5), (3, 5), (0, 7), (2, 8)):
        loader = make_loader(plan(toy_set, sampling="mixed", batch_size=3).__getitem__, start, workers)
        for batch in expected[start - 5:]:
            got = next(loader)
            assert type(got) is data.Batch and same_batch(got, batch)
        loader.close()


@pytest.mark.parametrize("sampling", ["stream", "random", "mixed"])
def test_processes_and_accumulation_show_the_data_of_one_larger_batch(toy_set, sampling):
    whole = plan(toy_set, sampling=sampling, batch_size=4)
    parts = [plan(toy_set, sampling=sampling, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    folded = plan(toy_set, sampling=sampling, batch_size=2, gradient_accumulation_steps=2)
    for k in range(6):
        def views(batches):
            return sorted((shown(batch, b), batch.rows[b].tolist(), batch.cols[b].tolist()) for batch in batches
                          for b in range(len(batch.is_first)))
        assert views([whole[k]]) == views([part[k] for part in parts]) == views([folded[2 * k], folded[2 * k + 1]])
        assert same_batch(parts[1][k], folded[2 * k + 1])
    if sampling != "mixed":  # in order, too; a mixed batch has its streams first
        assert torch.equal(whole[3].events[:, 2:], parts[1][3].events)


def test_one_by_two_is_two_by_one_and_other_seeds_differ(toy_set):
    two, one = plan(toy_set), plan(toy_set, batch_size=1, gradient_accumulation_steps=2)
    for k in range(5):
        for b in range(2):
            assert torch.equal(two[k].events[:, b], one[2 * k + b].events[:, 0])
    assert not all(same_batch(two[k], plan(toy_set, seed=1)[k]) for k in range(5))


def test_nothing_to_play_is_named(toy_set, tmp_path):
    unlabelled = open_split(make_set(tmp_path, [[], []], length=3), "train")
    for sequences, options in ((unlabelled, {}), (toy_set, dict(sampling="random", sequence_length=31))):
        with pytest.raises(ValueError, match="train.*no labelled frame"):
            plan(sequences, **options)


def test_targets_are_padded_to_a_few_sizes():
    for n, size in ((1, 16), (16, 16), (17, 32), (100, 128)):
        boxes = make_boxes([(0, 2 * i, i, 4, 6, 3) for i in range(n)])
        targets = data.pad_targets([boxes[:1], boxes])
        assert targets.shape == (2, size, 5) and targets.dtype == torch.float32
        assert targets[1, n - 1].tolist() == [3, 2 * (n - 1) + 2, n - 1 + 3, 4, 6] and not targets[1, n:].any()
    assert data.pad_targets([]).shape == (1, 16, 5) and not data.pad_targets([]).any()


# ---- augmentation


def per_pixel(frames, view):
    """Slow reference: flip, then zoom by looking up each pixel, exactly in fractions."""
    from fractions import Fraction
    frames = frames[..., ::-1] if view.flip else frames
    H, W = frames.shape[-2:]
    out = np.zeros_like(frames)
    h, w = (int(n * min(view.zoom, 1 / view.zoom)) for n in (H, W))
    for y in range(H):
        for x in range(W):
            if view.zoom > 1:
                source = int((y + Fraction(1, 2)) * h / H) + view.y, int((x + Fraction(1, 2)) * w / W) + view.x
            elif view.zoom < 1:
                if not (view.y <= y < view.y + h and view.x <= x < view.x + w):
                    continue
                source = int((y - view.y + Fraction(1, 2)) * H / h), int((x - view.x + Fraction(1, 2)) * W / w)
            else:
                source = y, x
            out[..., y, x] = frames[..., source[0], source[1]]
    return out


def maps(views, hw):
    return (torch.stack([index_map(hw[0], v.y, v.zoom, False) for v in views]),
            torch.stack([index_map(hw[1], v.x, v.zoom, v.flip) for v in views]))


VIEWS = [View(), View(True, 1.0, 0, 0), View(False, 1.31, 5, 3), View(True, 1.5, 0, 8), View(False, 1 / 1.2, 3, 2),
         View(True, 1 / 1.07, 1, 0)]


def test_flips_and_zooms_equal_a_slow_per_pixel_reference():
    rng, hw = np.random.default_rng(0), (25, 34)
    events = torch.from_numpy(rng.integers(0, 255, (2, len(VIEWS), 3, *hw), dtype=np.uint8))
    out = augment(events, *maps(VIEWS, hw))
    for b, view in enumerate(VIEWS):
        assert np.array_equal(out[:, b].numpy(), per_pixel(events[:, b].numpy(), view)), view
    assert torch.equal(augment(events, *maps(VIEWS[:1] * len(VIEWS), hw)), events)
    assert torch.equal(augment(events.float(), *maps(VIEWS, hw)), out.float())


def test_zooms_equal_torch_nearest_exact_of_crop_and_canvas_bit_for_bit():
    rng = np.random.default_rng(1)
    from torch.nn.functional import interpolate
    for _ in range(60):
        hw = H, W = int(rng.integers(20, 400)), int(rng.integers(20, 700))
        events = torch.from_numpy(rng.integers(0, 11, (1, 1, 1, H, W), dtype=np.uint8))
        for inward in (0, 1):
            view = data.draw_view(rng, hw, make_boxes([(0, 1, 2, 9, 7, 0)]), 0.5, 1.0, inward, 1.5, 1.2)
            frame = events[0].flip(-1) if view.flip else events[0]
            h, w = int(H * min(view.zoom, 1 / view.zoom)), int(W * min(view.zoom, 1 / view.zoom))
            if view.zoom > 1:
                expected = interpolate(frame[..., view.y:view.y + h, view.x:view.x + w], size=hw, mode="nearest-exact")
            else:
                expected = torch.zeros_like(frame)
                small = interpolate(frame, size=(h, w), mode="nearest-exact")
                expected[..., view.y:view.y + h, view.x:view.x + w] = small
            assert torch.equal(augment(events, *maps([view], hw))[0], expected)


def test_boxes_of_flips_and_zooms_by_hand():
    boxes, hw = make_boxes([(0, 4, 6, 10, 8, 0), (0, 20, 10, 8, 8, 1), (0, 30, 20, 1, 3, 2)]), (24, 32)

    def xywh(view):
        moved, left = move_boxes(boxes, hw, view)
        return [(*np.round(box.tolist()[1:5], 4), box["class_id"]) for box in moved[left]]

    assert xywh(View()) == [(4, 6, 10, 8, 0), (20, 10, 8, 8, 1), (30, 20, 1, 3, 2)]
    assert xywh(View(True, 1.0, 0, 0)) == [(17, 6, 10, 8, 0), (3, 10, 8, 8, 1), (0, 20, 1, 3, 2)]
    # window (8, 4) to (24, 16), edges end one short of it: the first box is cut left, the second right and below
    assert xywh(View(False, 2.0, 8, 4)) == [(0, 4, 12, 16, 0), (24, 12, 6, 10, 1)]
    # half size at (5, 3); the third box starts at 15 and ends at 15.5, beyond the small frame's last pixel, 15: flat
    assert xywh(View(False, 0.5, 5, 3)) == [(7, 6, 5, 4, 0), (15, 8, 4, 4, 1)]
    assert xywh(View(True, 0.5, 5, 3)) == [(13.5, 6, 5, 4, 0), (6.5, 8, 4, 4, 1), (5, 13, 0.5, 1, 2)]
    assert len(move_boxes(boxes[:0], hw, View(True, 2.0))[0]) == 0


def test_views_are_drawn_in_rvts_ranges_and_zooming_in_holds_a_box():
    rng, hw = np.random.default_rng(0), (240, 304)
    boxes = make_boxes([(0, 200, 100, 40, 30, 0), (0, 10, 200, 12, 20, 1), (0, 0, 0, 303, 239, 2)])
    kinds = {"flip": 0, "in": 0, "out": 0, "none": 0}
    held = [0, 0, 0]
    for _ in range(2000):
        view = data.draw_view(rng, hw, boxes, 0.5, 0.8, 0.8, 1.5, 1.2)
        kinds["flip"] += view.flip
        kinds["in" if view.zoom > 1 else "out" if view.zoom < 1 else "none"] += 1
        h, w = (int(n * min(view.zoom, 1 / view.zoom)) for n in hw)
        assert 1 / 1.2 <= view.zoom <= 1.5 and 0 <= view.y <= hw[0] - h and 0 <= view.x <= hw[1] - w
        if view.zoom > 1:
            for i, (_, x, y, width, height, *_) in enumerate(boxes.tolist()):
                x = hw[1] - 1 - x - width if view.flip else x
                if view.x <= x and view.y <= y and x + width < view.x + w + 1 and y + height < view.y + h + 1:
                    held[i] += 1
    assert held[0] > 450 and held[1] > 450 and held[2] < 20  # the third is larger than nearly all windows
    assert abs(kinds["flip"] - 1000) < 100 and abs(kinds["in"] - 1280) < 100 and abs(kinds["out"] - 320) < 80
    stream = [data.draw_view(rng, hw, boxes, 0.5, 0.5, 0.0, 1.5, 1.2).zoom for _ in range(1000)]
    assert max(stream) == 1.0 and abs(sum(zoom < 1 for zoom in stream) - 500) < 80


def test_the_view_of_a_stream_does_not_depend_on_how_many_boxes_there_are():
    box = make_boxes([(0, 3, 4, 5, 6, 0)])
    for seed in range(200):
        views = [data.draw_view(np.random.default_rng(seed), (48, 64), np.repeat(box, n), 0.5, 0.5, 0.0, 1.5, 1.2)
                 for n in (1, 2, 5)]
        assert views[0] == views[1] == views[2]


def test_augmentation_is_constant_along_a_run_and_differs_between_runs(toy_set):
    train = plan(toy_set, batch_size=1, zoom_stream=1.0)
    batches = [train[k] for k in range(18)]
    changed = 0
    drawn = {batches[0].rows.numpy().tobytes() + batches[0].cols.numpy().tobytes()}
    for before, batch in zip(batches, batches[1:]):
        key = batch.rows.numpy().tobytes() + batch.cols.numpy().tobytes()
        if batch.is_first:
            changed += key not in drawn
        else:
            assert torch.equal(batch.rows, before.rows) and torch.equal(batch.cols, before.cols)
        drawn.add(key)
    assert changed > 7  # of 11; in a small frame two zooms may coincide


def test_a_streams_view_is_constant_along_a_run_whose_chunks_have_1_2_and_5_boxes(tmp_path):
    labels = {4 * i + 3: [(2, 2, 20, 16, 0), *[(3.0 * j, 4, 12, 10, 1) for j in range(n - 1)]]
              for i, n in enumerate((1, 2, 5, 1, 5))}
    write_sequence(tmp_path / "train" / "a", labels, 20, hw=(48, 64))
    sequences = open_split(tmp_path, "train")
    for seed in range(25):
        train = plan(sequences, batch_size=1, seed=seed, zoom_stream=1.0, zoom_out_max=2.0)
        batches = [train[k] for k in range(5)]
        assert [int(b.is_first[0]) for b in batches] == [1, 0, 0, 0, 0]
        for batch in batches[1:]:
            assert torch.equal(batch.rows, batches[0].rows) and torch.equal(batch.cols, batches[0].cols), seed


def test_frames_emptied_by_a_zoom_make_a_filler(tmp_path):
    # at half resolution to (30.95, 22.95); zoomed out that is beyond the last pixel of the small frame
    boxes = {f: [(61.2, 45.2, 0.7, 0.7, 0)] for f in range(3, 12)}
    write_sequence(tmp_path / "train" / "a", boxes, 12, seed=1)
    train = plan(open_split(tmp_path, "train"), zoom_stream=1.0, flip=0.0, zoom_out_max=1.5, batch_size=2)
    batch = next(batch for batch in map(train.__getitem__, range(200)) if not batch.has_boxes)
    assert batch.frames.sum() == 1 and batch.targets.shape == (1, 16, 5) and not batch.targets.any()
    assert plan(open_split(tmp_path, "train"), zoom_stream=0.0)[0].has_boxes


# ---- damage


def test_an_error_in_a_worker_is_one_line_that_names_the_file(tmp_path):
    root = make_set(tmp_path, [[5, 9, 13]], length=15)
    sequences = open_split(root, "train")
    with h5py.File(sequences[0].file) as file:
        at = file["data"].id.get_chunk_info(9).byte_offset
    content = bytearray(Path(sequences[0].file).read_bytes())
    content[at:at + 200] = bytes(200)
    Path(sequences[0].file).write_bytes(content)
    for workers in (0, 1):
        loader = make_loader(plan(sequences).__getitem__, 0, workers)
        with pytest.raises(ValueError, match=r"s0/event.*frame 9 does not decode") as error:
            for _ in range(9):
                next(loader)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_missing_files_and_inconsistent_arrays_name_the_file(tmp_path):
    def attempt(name, change):
        path = tmp_path / name / "train" / "s"
        write_sequence(path, {2: [BOX], 5: [BOX, BOX]}, 8)
        change(path)
        with pytest.raises(ValueError) as error:
            open_split(tmp_path / name, "train")
        assert str(path) in str(error.value) and "\n" not in str(error.value), error.value
        return str(error.value)

    folder, labels = data.REPRESENTATION, "labels_v2/labels.npz"
    index, times, events = f"{folder}/objframe_idx_2_repr_idx.npy", f"{folder}/timestamps_us.npy", f"{folder}/{data.FILES['half']}"
    for i, file in enumerate((index, times, labels)):
        assert "No such file" in attempt(f"gone{i}", lambda path: (path / file).unlink())
        attempt(f"empty{i}", lambda path: (path / file).write_bytes(b""))
        attempt(f"pickle{i}", lambda path: (path / file).write_bytes(pickle.dumps(np.array([{}, None]))))
        attempt(f"object{i}", lambda path: np.save(open(path / file, "wb"), np.array([{}, None, 1, 2] * 2)))
    for i, value in enumerate(([2, 2], [5, 2], [-1, 5], [2, 8], [2], [2, 5, 6], [2.0, 5.0], [[2, 5]], 3)):
        attempt(f"index{i}", lambda path: np.save(path / index, np.array(value)))
    for i, value in enumerate((np.arange(7), np.arange(9), np.arange(8)[::-1], np.zeros(8, int), np.arange(8.0))):
        attempt(f"times{i}", lambda path: np.save(path / times, value))
    good = make_boxes([(n, 10, 8, 20, 16, 1) for n in (1, 2, 2)])

    def write(path, boxes, first):
        np.savez(path / labels, labels=boxes, objframe_idx_2_label_idx=np.array(first))

    for i, first in enumerate(([1, 1], [0, 3], [-1, 1], [1, 0], [0], [0.0, 1.0])):
        attempt(f"first{i}", lambda path: write(path, good, first))
    values = ("x", np.nan), ("w", np.inf), ("h", -np.inf), ("class_id", 2**32 - 1), ("t", 9)
    for i, (name, value) in enumerate(values):
        changed = good.copy()
        changed[name][1] = value
        attempt(f"value{i}", lambda path: write(path, changed, [0, 1]))
    for i, boxes in enumerate((good["x"], good[["x", "y", "w"]], np.zeros(3), np.array(["a"] * 3), good[None],
                               np.full(3, "a", "U3").astype([(n, "U3") for n in BOX_DTYPE.names]))):
        attempt(f"dtype{i}", lambda path: write(path, boxes, [0, 1]))
    for i, content in enumerate((b"", b"\x89HDF\r\n\x1a\n", bytes(5000))):
        attempt(f"h5{i}", lambda path: (path / events).write_bytes(content))
    attempt("cut", lambda path: os.truncate(path / events, (path / events).stat().st_size - 1000))
    kinds = [((8, 20, 24), "u1"), ((8, 10, 24, 32), "u1"), ((0, 20, 24, 32), "u1"), ((8, 20, 0, 32), "u1"),
             ((10**9, 20, 24, 32), "u1"), ((8, 20, 24, 32), "i2"), ((8, 20, 24, 32), "f4")]
    for i, (shape, dtype) in enumerate(kinds):
        def other(path):
            with h5py.File(path / events, "w") as file:
                file.create_dataset("data", shape, dtype, chunks=(1, *shape[1:]) if 0 not in shape else None)
        attempt(f"shape{i}", other)
    creators = (lambda file: file.create_group("data"), lambda file: file.create_dataset("frames", data=1),
                lambda file: file.create_dataset("data", data=3))
    for i, create in enumerate(creators):
        attempt(f"layout{i}", lambda path: create(h5py.File(path / events, "w")))


# ---- inspection


def test_inspection_counts_and_draws_what_a_set_holds(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5]], length=10)
    make_set(tmp_path, [[2]], "val", length=10)
    write_sequence(tmp_path / "train" / "z", {0: [(0, 0, 62, 46, 0), (-9, 0, 20, 20, 1)]}, 10)
    (tmp_path / "dataset.json").write_text('{"classes": ["car", "tram"]}')
    data.main([str(tmp_path), f"--picture={tmp_path}/sizes.png"])
    out = capsys.readouterr().out
    assert "train: 3 sequences" in out and "4 (13.3%) with boxes, 5 boxes" in out and "val: 1 sequences" in out
    assert "/test:" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["0", "car", "0", "1", "0", "0"] in rows and ["1", "tram", "4", "0", "0", "0"] in rows
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_inspection_ends_with_an_error_where_training_would_fail(tmp_path, capsys):
    make_set(tmp_path, [[1, 3], [5], [4]], length=10)
    make_set(tmp_path, [[2]], "val", length=10)
    os.truncate(tmp_path / "train" / "s1" / data.REPRESENTATION / data.FILES["half"], 9000)
    np.save(tmp_path / "train" / "s2" / data.REPRESENTATION / "timestamps_us.npy", np.arange(10)[::-1])
    with pytest.raises(ValueError, match="findings: 2"):
        data.main([str(tmp_path), "--picture="])
    out = capsys.readouterr().out
    assert "train: 1 sequences" in out and "train/s1" in out and "unsorted" in out
    data.main([str(tmp_path), "--split=val", "--picture="])
    with pytest.raises(ValueError):
        data.main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError):
        data.main([str(tmp_path), "--split=val", "--class_names=car", "--picture="])


def test_inspection_finds_a_frame_that_does_not_decode(tmp_path, capsys):
    root = make_set(tmp_path, [[1, 3]], length=10)
    file = Path(open_split(root, "train")[0].file)
    with h5py.File(file) as opened:
        at = opened["data"].id.get_chunk_info(4).byte_offset
    file.write_bytes(file.read_bytes()[:at] + bytes(100) + file.read_bytes()[at + 100:])
    assert len(open_split(root, "train")) == 1  # opening decodes the last frame only
    with pytest.raises(ValueError):
        data.main([str(root), "--split=train", "--picture="])
    assert "frame 4 does not decode" in capsys.readouterr().out


def test_size_thresholds_are_the_terciles_of_the_areas(tmp_path):
    write_sequence(tmp_path / "train" / "a", {f: [(0, 0, 2 * f, 2, 0)] for f in range(1, 8)}, 9)
    small, medium = data.size_thresholds(open_split(tmp_path, "train"))
    assert (small, medium) == (pytest.approx(3), pytest.approx(5))
    with pytest.raises(ValueError, match="thresholds"):
        data.size_thresholds([])



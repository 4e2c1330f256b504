"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ==== damaged files: each ends in success or in one line that names it

FUZZ = int(os.environ.get("FUZZ", 1))  # so many times the cases
EXTREMES = 0, 1, -1, 255, 2**31 - 1, 2**63 - 1, -2**63


def damaged(rng, content, others):
    """`content` with bits flipped, cut, with two stretches swapped, 8 bytes of extremes, emptied, or one of `others`."""
    damage, kind = bytearray(content), rng.integers(6)
    if kind == 0:
        for at in rng.integers(0, len(damage), rng.integers(1, 20)):
            damage[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        damage = damage[:rng.integers(len(damage))]
    elif kind == 2:
        a, b = sorted(rng.integers(0, len(damage), 2))
        n = min(rng.integers(1, 64), b - a, len(damage) - b)
        damage[a:a + n], damage[b:b + n] = damage[b:b + n], damage[a:a + n]
    elif kind < 5:  # often in the header
        at = int(rng.integers(0, min(len(damage) - 8, 10 ** rng.integers(1, 6))))
        damage[at:at + 8] = struct.pack("<q", int(rng.choice(EXTREMES)))
    else:
        damage = others[rng.integers(len(others))] * int(rng.integers(0, 2))
    return bytes(damage)


def attempt(name, files, action):
    """Write the files, run action() -> "fine", "refused" (ValueError or OSError, one line with `name`) or what is wrong."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    signal.alarm(30)  # a hang ends the process
    said = "fine"
    try:
        action()
    except Exception as error:
        named = isinstance(error, (ValueError, OSError)) and str(name) in str(error) and "\n" not in str(error)
        said = "refused" if named else traceback.format_exc()
    signal.alarm(0)
    changed = [str(path) for path, content in files.items() if path.read_bytes() != content]
    return f"changed: {changed}" if changed else said


def survive(cases, least=10):
    """Every case, (what, name, files, action) for `attempt`, is fine or refused, and `least` of the cases are of either.

    One child process runs them all, so that a crash of the interpreter shows as the case that it happened in.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        for what, *case in cases:
            theirs.send(what)
            theirs.send(attempt(*case))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()
    found, what = {"fine": 0, "refused": 0}, ""
    with contextlib.suppress(EOFError):
        while True:
            what = ours.recv()
            said = ours.recv()
            found.setdefault(said, what)
            if said in ("fine", "refused"):
                found[said] += 1
    process.join()
    assert process.exitcode == 0, f"{what}: the process ended with status {process.exitcode}"
    assert len(found) == 2, "\n".join(f"{what}: {said}" for said, what in list(found.items())[2:])
    assert min(found.values()) >= least, found


def test_damaged_prepared_sequences_are_named(tmp_path):
    rng, whole = np.random.default_rng(0), tmp_path / "whole"
    write_sequence(whole, {2: [BOX], 5: [BOX, BOX], 6: [BOX]}, 8, seed=1)
    contents = {path.relative_to(whole): path.read_bytes() for path in sorted(whole.rglob("*.*"))}

    def read(root):
        train = plan(open_split(root, "train", num_classes=8), batch_size=1)
        for k in range(train.steps_per_epoch):
            augment(*train[k][:3])

    def cases():
        for case in range(120 * FUZZ):
            root, name = tmp_path / str(case), list(contents)[case % len(contents)]
            changed = contents | {name: damaged(rng, contents[name], list(contents.values()))}
            yield (f"case {case}, {name}", root / "train", {root / "train" / "s" / file: content for file, content in
                   changed.items()}, lambda: read(root))

    survive(cases())


def raw_recordings(folder):
    """{name: content} of the same small recording in several formats: HDF5 (Blosc), DAT and, by faery, EVT2 and EVT3."""
    folder.mkdir()
    t, x, y, p = some_events(3000, 700_000)
    with h5py.File(folder / "a_td.h5", "w") as file:
        for key, column, kind in (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "u1")):
            file.create_dataset(f"events/{key}", data=column.astype(kind), chunks=(1000,), **hdf5plugin.Blosc(cname="zstd"))
        file["events/height"], file["events/width"] = 48, 64
    records = np.empty(len(t), [("t", "<u4"), ("xyp", "<u4")])
    records["t"], records["xyp"] = t, x | y << 14 | p << 28
    Path(folder, "a_td.dat").write_bytes(b"% Version 2\n% Height 48\n% Width 64\n\x00\x08" + records.tobytes())
    with contextlib.suppress(ImportError):
        import faery
        events = np.empty(len(t), faery.EVENTS_DTYPE)
        events["t"], events["x"], events["y"], events["on"] = t, x, y, p
        for version in ("evt2", "evt3"):
            faery.events_stream_from_array(events, (64, 48)).to_file(folder / f"{version}.raw", version=version)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def other_columns(rng, file):
    """Change a field of the open HDF5 recording `file`."""
    key, events = rng.choice(list("txyp")), file["events"]
    column, kind = events[key][()], rng.integers(9)
    odd = (column.astype(str).astype("S8"), column.astype("f8") * np.nan, -column.astype("i8"), column.astype("?"),
           column[:100], np.stack([column] * 2, 1), column[0], column[:, None], np.full(3000, rng.choice(EXTREMES)))[kind]
    if rng.random() < 0.2:
        file.attrs["height"] = events.attrs["width"] = rng.choice([0, -5, 2**40, 1 << 13])
    elif rng.random() < 0.2:
        del events["height"]
        events["height"] = (np.float32(np.nan), "48", [48, 48], [48])[rng.integers(4)]
    else:
        del events[key]
        if rng.random() < 0.9:
            events[key] = odd


def prepare_anew(src, **options):
    prepare.prepare(src, src.with_name("out"), **options)


def test_damaged_recordings_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    rng, contents, labels = np.random.default_rng(1), raw_recordings(tmp_path / "whole"), tmp_path / "a_bbox.npy"
    np.save(labels, some_labels([100_000, 200_000, 600_000]))
    with h5py.File(tmp_path / "whole" / "a_td.h5") as file:
        chunks = [file["events"][key].id.get_chunk_info(k).byte_offset for key in "txyp" for k in range(3)]

    def read(path):
        for _ in prepare.windows(prepare.Recording(path, 48, 64)):
            pass

    def cases():
        for case in range(160 * FUZZ):
            name = [*contents, "a_td.h5"][case % (len(contents) + 1)]
            path, content = tmp_path / str(case) / "raw" / "train" / name, contents[name]
            if name.endswith("h5") and case % 4 == 1:  # in the header of a chunk, or behind it
                at = chunks[rng.integers(len(chunks))] + int(rng.integers(40))
                content = content[:at] + rng.bytes(4) + content[at + 4:]
            elif name.endswith("h5") and case % 4 == 0:
                with h5py.File(io := BytesIO(content), "a") as file:
                    other_columns(rng, file)
                content = io.getvalue()
            else:
                content = damaged(rng, content, list(contents.values()))
            files = {path: content, path.with_name(f"{name[:4].removesuffix('_td.')}_bbox.npy"): labels.read_bytes()}
            how = [lambda: read(path), lambda: prepare_anew(path.parent.parent, height=48, width=64, class_names=("a",)),
                   lambda: prepare_anew(path.parent.parent)][rng.integers(3)]
            yield f"case {case}, {name}", path.parent, files, how

    survive(cases())


def other_labels(rng, boxes):
    """Labels like `boxes` of which a field has odd values, another type, or is gone; or another kind of array."""
    boxes, name, kind = boxes.copy(), rng.choice(boxes.dtype.names), rng.integers(4)
    if kind == 0:  # values
        values = np.array([*EXTREMES, *10.0 ** rng.uniform(0, 12, 3), -5, np.nan, np.inf, -np.inf])
        with np.errstate(all="ignore"):
            boxes[name][rng.random(len(boxes)) < rng.choice([0.3, 1])] = rng.choice(values).astype(boxes.dtype[name])
        return boxes
    if kind < 3:  # types
        other = rng.choice(["f8", "f2", "i1", "u1", "i8", "?", "U3", "S8", "O", "c8", "M8[us]", "(2,)f4", "gone", "ts"])
        fields = [(field, other if field == name else boxes.dtype[field]) for field in boxes.dtype.names
                  if (field, other) != (name, "gone")]
        changed = np.zeros(len(boxes), [("ts", "f8") if pair == (name, "ts") else pair for pair in fields])
        for field in set(changed.dtype.names) & set(boxes.dtype.names):
            with contextlib.suppress(ValueError):
                changed[field] = boxes[field] if changed.dtype[field].shape == () else boxes[field][:, None]
        return changed
    return (np.zeros(7), np.array([{}, None]), boxes[:0], boxes[0], boxes[None], boxes[::-1], np.repeat(boxes, 500),
            np.array("labels"), np.zeros((0, 3)))[rng.integers(9)]


def test_damaged_label_files_are_named(tmp_path):
    rng, boxes = np.random.default_rng(2), some_labels([100_000, 200_000, 300_000, 600_000])
    recording = raw_recordings(tmp_path / "whole")["a_td.dat"]
    np.save(tmp_path / "a.npy", boxes)
    whole = (tmp_path / "a.npy").read_bytes()

    def cases():
        for case in range(120 * FUZZ):
            src = tmp_path / str(case) / "raw"
            if case % 2:
                np.save(tmp_path / "a.npy", other_labels(rng, boxes))
            content = (tmp_path / "a.npy").read_bytes() if case % 2 else damaged(rng, whole, [recording])
            options = dict(dataset=rng.choice(list(prepare.DATASETS)), class_names=[(), ("a", "b")][rng.integers(2)])
            files = {src / "train" / "a_td.dat": recording, src / "train" / "a_bbox.npy": content}
            yield f"case {case}", src / "train" / "a_", files, lambda: prepare_anew(src, **options)

    survive(cases())


def changed(rng, whole, path):
    """What was done to the nested dict `whole`, saved at `path`: one thing in it is gone, swapped, or of another kind."""
    found = place = copy.deepcopy(whole)
    while True:
        key = list(place if isinstance(place, dict) else range(len(place)))[rng.integers(len(place))]
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    value, kind = place.pop(key), rng.integers(4)
    if kind == 1 and place:
        other = list(place)[rng.integers(len(place))] if isinstance(place, dict) else 0
        value, place[other] = place[other], value
    odd = [None, "word", -1, 0, 2**62, math.nan, [], {}, torch.zeros(3), (1, 2), Hostile()]
    if torch.is_tensor(value):
        odd += [value[None], value * math.nan, value.to(torch.complex64), value.to_sparse(), value.flatten()[:1], value.bool()]
    if kind:
        new = value if kind == 1 else odd[rng.integers(len(odd))]
        place.insert(key, new) if isinstance(place, list) else place.update({key: new})
    torch.save(found, path)
    return f"{key!r}: {str(value)[:40]!r}, {kind}"


def damaged_checkpoints(rng, number, folder, whole, *actions):
    """Cases of damaged bytes and of damaged contents in turn, each for one of the actions(path)."""
    torch.save(whole, folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    for case in range(number * FUZZ):
        what = changed(rng, whole, folder / "changed.pt") if case % 3 else "bytes"
        damage = (folder / "changed.pt").read_bytes() if case % 3 else damaged(rng, content, [b"", content[:999]])
        path, action = folder / str(case) / "ckpt.pt", actions[case % len(actions)]
        yield f"case {case}, {what}", path, {path: damage}, lambda: action(path)


def test_damaged_checkpoints_are_named(tmp_path, traffic, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/whole", "--embed_dim=8", "--fpn_stages=1,2"]
    for name in ("run", "score_boxes", "report", "pictures", "compare"):  # slow
        monkeypatch.setattr(evaluation, name, lambda *a, **k: dict.fromkeys(("AP", "AP50"), 0.5))
    # hotcoco's threads do not survive a fork, and each case runs in one
    monkeypatch.setattr(detect, "score_boxes", lambda *a: dict.fromkeys(("AP", "AP50"), 0.5))
    assert run_train(*argv, "--max_steps=1") == 0
    whole = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    monkeypatch.setattr(train, "write", lambda *a: ...)  # so that a run that goes on leaves its checkpoint as it was

    def evaluate(path):
        evaluation.main(["--ckpt", str(path), f"--data_dir={traffic}", "--num_workers=0", f"--out_dir={path.parent}/a"])

    def resume(path):
        run_train(f"--out_dir={path.parent}", f"--data_dir={traffic}", "--init_from=resume", "--max_steps=2", *TINY[-3:])

    survive(damaged_checkpoints(np.random.default_rng(3), 120, tmp_path, whole, resume, load_detector, evaluate))


def test_damaged_rvt_checkpoints_are_named(tmp_path):
    weights = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]["state_dict"]
    survive(damaged_checkpoints(np.random.default_rng(4), 40, tmp_path, {"state_dict": weights, "epoch": 3},
                                lambda path: load_detector(path, (128, 160), 1)))

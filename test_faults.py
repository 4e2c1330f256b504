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


# ==== twenty thousand frames in constant memory

def resident_mb():
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soaked(frames, step):
    """Call step(k) `frames` times; the memory must not grow by 20 MB after a tenth of them."""
    for k in range(frames):
        step(k)
        if k == frames // 10:
            before = resident_mb()
    print(f"{frames} frames, {before:.1f} MB after a tenth, {resident_mb():.1f} MB at the end")
    assert resident_mb() - before < 20


def soak_detector():
    torch.set_num_threads(1)
    model = small_detector(hw=(32, 64), small_object_attention=True)
    for head in model.heads:
        head.cls_pred.bias.data.fill_(0.5)  # boxes with p_obj * p_cls of some 0.4
    return model


@soak
def test_twenty_thousand_frames_of_a_live_stream_take_constant_memory():
    detector, events = StreamDetector(soak_detector(), confidence=0.3), random_events(50, 20, 32, 64)
    soaked(20_000, lambda k: detector(events[k % 50]))


@soak
def test_twenty_thousand_frames_of_evaluation_take_constant_memory():
    class Endless(MemorySequence):
        """20,000 frames, a hundred of them labelled, that notes what memory is in use as it is read."""

        def read(self, start, stop, out):
            memory.append(resident_mb())
            out[:] = self.data[start % 50:start % 50 + 1]

    memory, labelled = [], range(199, 20_000, 200)
    sequence = Endless("a", 50, range(0, 50, 5), (32, 64))
    sequence.length, sequence.label_frames = 20_000, np.array(labelled)
    sequence.boxes = [sequence.boxes[k % 10] for k in range(100)]
    labels, found = run(soak_detector(), [sequence], 1, 5, confidence=0.3)
    kept = sum(boxes.nbytes for boxes in found) / 1e6
    print(f"{5 * len(memory)} frames, {memory[len(memory) // 10]:.1f} MB after a tenth, {memory[-1]:.1f} MB at the end, "
          f"{kept:.1f} MB of detections")
    assert len(found) == len(labels) == 100 and memory[-1] - memory[len(memory) // 10] < 20 + kept



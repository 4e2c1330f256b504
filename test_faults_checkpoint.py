"""Damaged and hostile checkpoints: each ends in success or in one line that names the file."""

import copy
import math

import numpy as np
import torch

import detect
import eval as evaluation
import train
from checkpoint import load_detector
from conftest import TINY, Hostile, run_train, shared
from test_faults import FUZZ, damaged, survive

# ---- checkpoint.py


def random_place(rng, whole):
    """(container, key) of something inside nested dicts and lists, at any depth."""
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.2:
            return place, key
        place = inner


def with_odd_contents(rng, whole):
    """A copy of nested dicts in which one thing is gone, swapped or of another kind; which."""
    found = copy.deepcopy(whole)
    place, key = random_place(rng, found)
    value = place[key]
    kind = rng.choice(["gone", "swapped", "odd", "odd"])
    if kind == "gone":
        del place[key]
    elif kind == "swapped":
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        other = keys[rng.integers(len(keys))]
        place[key] = place[other]
        place[other] = value
    else:
        odd = [None, "word", -1, 0, 2**62, math.nan, [], {}, torch.zeros(3), (1, 2), Hostile()]
        if torch.is_tensor(value):
            odd += [value[None], value * math.nan, value.to(torch.complex64), value.to_sparse()]
            odd += [value.flatten()[:1], value.bool(), value.to("meta")]
        place[key] = odd[rng.integers(len(odd))]
    return found, f"{key!r}, {str(value)[:40]!r}, is {kind}"


def damaged_checkpoints(rng, number, folder, whole, actions):
    """Cases for `survive` of damaged bytes and contents, each for one of the actions(path)."""
    torch.save(whole, folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    for case in range(number * FUZZ):
        if case % 3 == 0:
            what = "bytes"
            damage = damaged(rng, content, [b"", content[:999]])
        else:
            found, what = with_odd_contents(rng, whole)
            torch.save(found, folder / "changed.pt")
            damage = (folder / "changed.pt").read_bytes()
        path = folder / str(case) / "ckpt.pt"
        action = actions[case % len(actions)]
        yield f"case {case}, {what}", path, {path: damage}, lambda: action(path)


def test_damaged_checkpoints_are_named(tmp_path, traffic, monkeypatch):
    data_dir = f"--data_dir={traffic}"
    argv = [*TINY, data_dir, f"--out_dir={tmp_path}/whole", "--embed_dim=8", "--fpn_stages=1,2"]
    assert run_train(*argv, "--max_steps=1") == 0
    whole = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    # what takes long is left out, and a run that goes on leaves its checkpoint as it was
    for name in ("run", "score_boxes", "report", "pictures", "compare"):
        monkeypatch.setattr(evaluation, name, lambda *a, **k: {"AP": 0.5, "AP50": 0.5})
    # its threads do not survive a fork, and each case runs in one
    monkeypatch.setattr(detect, "score_boxes", lambda *a: {"AP": 0.5, "AP50": 0.5})
    monkeypatch.setattr(train, "write", lambda *a: ...)

    def evaluate(path):
        out_dir = f"--out_dir={path.parent}/a"
        evaluation.main(["--ckpt", str(path), data_dir, "--num_workers=0", out_dir])

    def resume(path):
        out_dir = f"--out_dir={path.parent}"
        run_train(out_dir, data_dir, "--init_from=resume", "--max_steps=2", *TINY[-3:])

    rng = np.random.default_rng(3)
    actions = (resume, load_detector, evaluate)
    survive(damaged_checkpoints(rng, 120, tmp_path, whole, actions))


def test_damaged_rvt_checkpoints_are_named(tmp_path):
    checkpoint = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    whole = {"state_dict": checkpoint["state_dict"], "epoch": 3}

    def load(path):
        load_detector(path, (128, 160), 1)

    rng = np.random.default_rng(4)
    survive(damaged_checkpoints(rng, 40, tmp_path, whole, [load]))

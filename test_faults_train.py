"""Kills, signals, full disks and hostile checkpoints against train.py."""

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from conftest import ROOT, TINY, run_train, soak
from test_train import assert_same, assert_same_run, checkpoint_of

# ==== train.py


def spawn(*argv, **options):
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env, **options)


def kill_and_resume(traffic, tmp_path, options, kills, rng):
    """What a run was at each time it was killed: "writing" a checkpoint, or else "working"."""
    steps = 6 + 2 * kills
    argv = [*TINY, *options, f"--data_dir={traffic}", f"--max_steps={steps}", "--log_interval=2",
            f"--eval_interval={steps // 2}", "--checkpoint_interval=1"]
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    broken = tmp_path / "broken"
    ready, writing = broken / "ckpt.pt", broken / "ckpt.pt.tmp"
    resume = []
    happened = []
    for _ in range(kills):
        process = spawn(*argv, f"--out_dir={broken}", *resume)
        before = ready.stat().st_mtime if ready.exists() else 0
        writing.unlink(missing_ok=True)
        while process.poll() is None and not (ready.exists() and ready.stat().st_mtime > before):
            time.sleep(0.01)  # until the first checkpoint of this life
        time.sleep(rng.random())
        if rng.random() < 0.5:
            while process.poll() is None and not writing.exists():
                pass
        process.kill()
        process.communicate()
        if process.returncode < 0:
            happened.append("writing" if writing.exists() else "working")
        resume = ["--init_from=resume"]
    assert run_train(*argv, f"--out_dir={broken}", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", broken)
    return happened


@pytest.mark.parametrize("options", [
    ("--sampling=stream",),
    ("--sampling=random", "--gradient_accumulation_steps=2"),
    ("--sampling=mixed", "--num_workers=2"),
])
def test_train_killed_resumes_as_if_never_stopped(options, traffic, tmp_path):
    kill_and_resume(traffic, tmp_path, options, 1, np.random.default_rng(len(options[0])))


@soak
def test_train_fifty_kills_at_random_moments_change_nothing(traffic, tmp_path):
    rng = np.random.default_rng(0)
    happened = []
    plans = itertools.product(("stream", "random", "mixed"), (1, 2), (0, 2))
    for i, (kind, micro, workers) in enumerate(plans):
        options = (f"--sampling={kind}", f"--gradient_accumulation_steps={micro}",
                   f"--num_workers={workers}")
        happened += kill_and_resume(traffic, tmp_path / str(i), options, 4, rng)
    happened += kill_and_resume(traffic, tmp_path / "half", ("--dtype=float16",), 4, rng)
    print(f"{len(happened)} kills, {happened.count('writing')} as a checkpoint was written")
    assert len(happened) > 50
    assert happened.count("writing") > 5


@pytest.mark.parametrize("number, times, status", [(signal.SIGTERM, 2, 0), (signal.SIGINT, 1, 130)])
def test_train_saves_at_a_signal_and_says_how_to_go_on(number, times, status, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--log_interval=1"]
    process = spawn(*argv, start_new_session=True)
    while process.poll() is None and not (tmp_path / "log.csv").exists():
        time.sleep(0.05)
    for _ in range(times):  # a job's end may reach a process twice, from torchrun as well
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    step = checkpoint_of(tmp_path)["step"]
    go_on = f"python train.py --out_dir={tmp_path} --init_from=resume"
    assert step >= 1 and f"stopped at step {step}; go on: {go_on}" in output
    assert "Traceback" not in output


def test_train_stops_at_once_at_a_second_ctrl_c_and_leaves_the_checkpoint(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    before = checkpoint_of(tmp_path)["model"]
    script = (
        "import sys, time, train\n"
        "def endless(*inputs):\n"
        "    print('step', flush=True)\n"
        "    time.sleep(60)\n"
        "train.Forward.forward = endless\n"
        "train.main(sys.argv[1:])\n")
    argv = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=9"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "step\n" in process.stdout
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes its step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert_same(before, checkpoint_of(tmp_path)["model"])


def test_train_on_a_full_disk_leaves_the_checkpoint_before(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="ckpt.pt: not written .is the disk full.*intact"):
            train.main([*argv, "--init_from=resume", "--max_steps=2", "--eval_interval=9"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert run_train(*argv, "--init_from=resume", "--max_steps=2") == 0


def test_train_out_of_memory_says_what_to_change_and_leaves_the_checkpoint(
        traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(train.Forward, "forward", full)
        with pytest.raises(ValueError, match="out of memory; lower batch_size"):
            train.main([*argv, "--max_steps=2"])
    assert checkpoint_of(tmp_path)["step"] == 0
    assert run_train(*argv, "--init_from=resume", "--max_steps=1") == 0


def test_train_from_poisoned_weights_ends_the_run(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path / "a")
    checkpoint["model"]["stages.0.norm.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "poisoned.pt")
    with pytest.raises(ValueError, match="2 steps in a row"):
        train.main([*argv, f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/poisoned.pt",
                    "--max_steps=9", "--max_bad_steps=2"])


@pytest.mark.parametrize("kind", ["longer", "shorter", "of stride 0"])
def test_moments_of_another_shape_in_a_checkpoint_cannot_crash_the_optimizer(
        kind, traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path)
    for state in checkpoint["optimizer"]["state"].values():
        if kind == "longer":
            state["exp_avg"] = torch.zeros(7)
        elif kind == "shorter":
            state["exp_avg"] = torch.zeros(1)
        else:
            state["exp_avg"] = torch.zeros(1).expand(state["exp_avg"].shape)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with contextlib.suppress(ValueError):  # in one line, or as if they had been of this shape
        assert run_train(f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=2") == 0

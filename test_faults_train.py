"""Kills, signals, full disks and hostile checkpoints against train.py."""

import contextlib
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from conftest import (
    ROOT,
    TINY,
    assert_same,
    assert_same_run,
    checkpoint_of,
    make_set,
    run_train,
    soak,
)

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


@pytest.mark.parametrize("option, word", [
    ("--class_names=a,b --num_classes=3", "class"),
    ("--num_classes=3", "num_classes"),
    ("--data_dir=nowhere", "nowhere"),
    ("--init_from=missing.pt", "missing.pt"),
    ("--learning_rat=1", "learning_rate"),
    ("--input_hw=10,10", "input_hw"),
    ("--device=cuda:99", "device"),
])
def test_train_names_what_does_not_fit_the_data_before_any_work(option, word, traffic, tmp_path):
    out = tmp_path / "out"
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={out}", *option.split()]
    with pytest.raises(ValueError, match=word) as error:
        train.main(argv)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("option", [
    "--sampling=strem", "--batch_size=0", "--sequence_length=0", "--max_steps=0", "--seed=-1",
    "--zoom_in_max=0.5", "--zoom_out_max=0.9", "--gradient_accumulation_steps=0",
    "--sampling=mixed --mixed_random=0", "--sampling=mixed --batch_size=1", "--eval_interval=0",
    "--patch_size=5", "--fpn_stages=1,3", "--fpn_stages=3,2", "--device=tpu", "--num_workers=-1",
    "--grad_clip_by=x", "--device=cpu:x", "--dtype=int8", "--grad_clip=-1", "--learning_rate=1e999",
    "--weight_type=cubic", "--small_threshold=9999", "--size_aware_terms=iou,box",
    "--size_aware_weight=0.5",
])
def test_check_names_values_that_cannot_work_before_a_set_is_simulated(option, monkeypatch):
    monkeypatch.setattr(train, "ensure_toy", lambda *a: pytest.fail("simulated"))
    key = option.split()[-1][2:].split("=")[0]
    with pytest.raises(ValueError, match=key):
        train.main(option.split())


@pytest.mark.parametrize("script, option, word", [
    ("train.py", "--data_dir=nowhere", "nowhere"),
    ("train.py", "configs/toi.py", "configs/toi.py"),
    ("eval.py", "--ckpt=nothing.pt", "nothing.pt"),
])
def test_scripts_end_in_one_line_for_a_mistake(script, option, word):
    done = subprocess.run(
        [sys.executable, script, option], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_train_names_a_validation_set_of_another_size(traffic, tmp_path):
    shutil.copytree(Path(traffic) / "train", tmp_path / "train")
    shutil.copy(Path(traffic) / "dataset.json", tmp_path)
    make_set(tmp_path, [[3]], "val", length=5)
    with pytest.raises(ValueError, match=r"\(24, 32\) in val"):
        train.main([*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out"])


def test_train_refuses_an_out_dir_that_holds_a_checkpoint(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1"]
    assert run_train(*argv) == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="--init_from=resume.*--out_dir"):
        train.main(argv)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_resume_of_weights_without_a_training_state_is_refused(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path)
    del checkpoint["progress"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="--init_from="):
        train.main([f"--out_dir={tmp_path}", "--init_from=resume"])


def poisoned(monkeypatch, what, steps):
    """Let the micro-batches of `steps` carry a NaN in their boxes, or infinite events."""
    make_loader = data.make_loader

    def loader(item, start=0, num_workers=0):
        for i, batch in enumerate(make_loader(item, start, num_workers), start):
            if i in steps and what == "boxes":
                batch.targets[0, 0] = torch.tensor([0, math.nan, 20, 10, 10])
            if i in steps and what == "events":
                batch = batch._replace(events=torch.full(batch.events.shape, math.inf))
            yield batch

    monkeypatch.setattr(data, "make_loader", loader)


@pytest.mark.parametrize("what", ["boxes", "events"])
def test_step_that_is_not_finite_is_skipped_and_leaves_nothing_behind(
        what, traffic, tmp_path, monkeypatch, capsys):
    argv = [*TINY, f"--data_dir={traffic}", "--log_interval=1"]
    assert run_train(*argv, "--max_steps=1", f"--out_dir={tmp_path}/one") == 0
    poisoned(monkeypatch, what, {1})
    assert run_train(*argv, "--max_steps=2", f"--out_dir={tmp_path}/two") == 0
    one, two = checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "two")
    assert_same(one["states"], two["states"])
    for key in one["model"]:  # the rate of step 0 differs with max_steps, the statistics do not
        if "running" in key or "num_batches" in key:
            assert torch.equal(one["model"][key], two["model"][key]), key
    assert all(value.isfinite().all() for value in two["model"].values())
    assert two["progress"]["bad_steps"] == 1
    assert "step 1:" in capsys.readouterr().out
    assert "loss" not in two["progress"]["log"][1]  # no mean of no steps


def test_max_bad_steps_in_a_row_end_the_run_and_keep_the_checkpoint(
        traffic, tmp_path, monkeypatch):
    poisoned(monkeypatch, "boxes", {2, 3, 4})
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=9"]
    with pytest.raises(ValueError, match="3 steps in a row"):
        train.main([*argv, "--max_bad_steps=3", "--checkpoint_interval=1"])
    assert all(x.isfinite().all() for x in checkpoint_of(tmp_path)["model"].values())


@pytest.mark.parametrize("options, word", [
    ("--max_memory_gib=0.01", "passed max_memory_gib.*checkpointing"),
    ("--max_loss_ratio=0.5 --patience=3", "diverged"),
])
def test_max_memory_gib_and_max_loss_ratio_end_the_run(options, word, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=30"]
    with pytest.raises(ValueError, match=word):
        train.main([*argv, *options.split()])
    assert checkpoint_of(tmp_path)["step"] == 0

"""Tests of train.py."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import configurator
import data
import detect
import eval as evaluation
import train
from conftest import CONFIGS, ROOT, TINY, make_set, run_train, shared

# ==== train.py


def checkpoint_of(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def assert_same(a, b, where="checkpoint"):
    """Equal to the bit, NaN included."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i in range(len(a)):
            assert_same(a[i], b[i], f"{where}.{i}")
    else:
        assert a == b or a != a and b != b, where


def assert_same_run(a, b):
    """Two folders hold the same run, but for what it is called and how fast it went."""
    a, b = checkpoint_of(a), checkpoint_of(b)
    for run in (a, b):
        for key in ("out_dir", "init_from", "num_workers"):
            del run["config"][key]
        for row in run["progress"]["log"]:
            for key in ("frames_per_s", "data_wait", "peak_gib"):
                row.pop(key, None)
    assert_same(a, b)


# ---- schedule and configs


@pytest.mark.parametrize("steps", [400, 1000, 100_000])
def test_learning_rate_at_equals_torchs_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-4, total_steps=steps, pct_start=0.005, div_factor=20,
        final_div_factor=10_000 / 20, anneal_strategy="linear", cycle_momentum=False)
    for step in range(min(steps - 1, 2000)):
        want = optimizer.param_groups[0]["lr"]
        assert train.learning_rate_at(step, steps, 2e-4) == pytest.approx(want, rel=1e-6)
        optimizer.step()
        cycle.step()
    assert train.learning_rate_at(steps - 1, steps, 2e-4) == pytest.approx(2e-8)


@pytest.mark.parametrize("steps", [1, 2, 3, 199, 201])
def test_learning_rate_at_works_for_any_number_of_steps(steps):
    rates = [train.learning_rate_at(step, steps, 1.0) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)


TABLE = {  # of the experiments: patch, stages, weight or None, steps, batch, eval batch, interval, rate
    "baseline_3scale": (4, (2, 3, 4), None, 100_000, 6, 2, 3500, 1.7e-4),
    "4scale": (4, (1, 2, 3, 4), None, 100_000, 6, 2, 3500, 1.7e-4),
    "4scale_sizeaware": (4, (1, 2, 3, 4), 2.5, 100_000, 6, 2, 3500, 1.7e-4),
    "3scale_sizeaware": (4, (2, 3, 4), 2.5, 100_000, 6, 2, 3500, 1.7e-4),
    "3scale_sizeaware_attention": (4, (2, 3, 4), 2.0, 100_000, 6, 2, 3500, 1e-3),
    "patch2_sizeaware": (2, (2, 3, 4), 2.0, 100_000, 2, 2, 3500, 1e-4),
    "patch2_4scale_sizeaware": (2, (1, 2, 3, 4), 2.0, 200_000, 2, 2, 5000, 1e-4),
    "patch3_4scale_sizeaware": (3, (1, 2, 3, 4), 2.0, 200_000, 4, 4, 5000, 1.4e-4),
}


@pytest.mark.parametrize("name", TABLE)
def test_configs_say_what_the_notes_say(name):
    path = str(ROOT / "configs" / f"{name}.py")
    config = SimpleNamespace(**configurator.configure(train.defaults, [path]))
    weight = config.size_aware_weight if config.size_aware_loss else None
    assert TABLE[name] == (
        config.patch_size, config.fpn_stages, weight, config.max_steps, config.batch_size,
        config.eval_batch_size, config.eval_interval, config.learning_rate)
    assert (config.sequence_length, config.sampling) == (5, "stream")
    assert config.weight_type == "exponential"


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_train_two_steps_and_evaluate_from_their_checkpoint(
        name, traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pictures", lambda *a: None)  # slow; tested elsewhere
    file = str(ROOT / "configs" / name)
    argv = [*TINY, "--sequence_length=2", f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(file, *argv, "--max_steps=2") == 0
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["step"] == 2 and checkpoint["config"]["num_classes"] == 8
    written = configurator.configure(train.defaults, [file])
    for key in ("patch_size", "fpn_stages", "size_aware_loss", "size_aware_weight", "sampling"):
        assert checkpoint["config"][key] == written[key]
    again = configurator.configure(train.defaults, [str(tmp_path / "config.py")])
    assert again == checkpoint["config"]
    assert (tmp_path / "curves.png").stat().st_size > 1000

    evaluation.main(["--ckpt", str(tmp_path / "ckpt.pt")])
    reports = list((tmp_path / "eval").glob("*.json"))
    assert json.loads(reports[0].read_text())


# ---- mistakes


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


# ---- weights and precision


def test_train_starts_from_weights_of_its_own(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=1", "--learning_rate=1e-12"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a", "--seed=1") == 0
    start = f"--init_from={tmp_path}/a/ckpt.pt"
    assert run_train(*argv, f"--out_dir={tmp_path}/b", start) == 0
    a, b = checkpoint_of(tmp_path / "a")["model"], checkpoint_of(tmp_path / "b")["model"]
    torch.testing.assert_close(a["stages.0.conv.weight"], b["stages.0.conv.weight"])
    with pytest.raises(ValueError, match="do not fit"):
        train.main([*argv, f"--out_dir={tmp_path}/c", start, "--embed_dim=32"])


def test_train_starts_from_weights_of_rvt(traffic, tmp_path):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    torch.save(reference, tmp_path / "rvt.ckpt")
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=1", "--learning_rate=1e-12"]
    argv += ["--embed_dim=32", "--dim_head=32"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a", f"--init_from={tmp_path}/rvt.ckpt") == 0
    weight = checkpoint_of(tmp_path / "a")["model"]["stages.0.conv.weight"]
    want = reference["state_dict"]["mdl.backbone.stages.0.downsample_cf2cl.conv.weight"]
    torch.testing.assert_close(weight, want.float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_train_in_half_precision_on_a_cpu(dtype, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=2"]
    assert run_train(*argv, f"--dtype={dtype}") == 0
    assert math.isfinite(checkpoint_of(tmp_path)["progress"]["log"][0]["loss"])


# ---- resume


def test_resume_equals_an_unbroken_run_also_where_the_validation_broke(
        traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=4", "--eval_interval=2", "--log_interval=3"]
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    broken = f"--out_dir={tmp_path}/broken"

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(detect, "run", full)
        with pytest.raises(ValueError, match="out of memory.*eval_batch_size"):
            train.main([*argv, broken])
    assert checkpoint_of(tmp_path / "broken")["step"] == 2
    assert run_train(broken, "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_resume_takes_changed_options_and_a_moved_folder(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=1"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a/") == 0
    (tmp_path / "a").rename(tmp_path / "b")
    options = ["--init_from=resume", "--max_steps=2", "--weight_decay=0.5"]
    assert run_train(f"--out_dir={tmp_path}/b", *options) == 0
    checkpoint = checkpoint_of(tmp_path / "b")
    assert checkpoint["step"] == 2
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert "init_from = 'scratch'" in (tmp_path / "b/config.py").read_text()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("option", ["--sequence_length=2", "--batch_size=1", "--seed=3"])
def test_resume_with_other_streams_starts_their_states_at_zero(
        option, traffic, tmp_path, monkeypatch, capsys):
    argv = [f"--out_dir={tmp_path}", "--max_steps=1"]
    assert run_train(*TINY, f"--data_dir={traffic}", *argv) == 0
    assert any(x.any() for x in checkpoint_of(tmp_path)["states"][0][0])
    assert run_train(*argv, "--init_from=resume", option) == 0
    assert "their states start at 0" in capsys.readouterr().out


def test_resume_of_weights_without_a_training_state_is_refused(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = checkpoint_of(tmp_path)
    del checkpoint["progress"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="--init_from="):
        train.main([f"--out_dir={tmp_path}", "--init_from=resume"])


# ---- guards


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


# ---- processes


def torchrun(*argv, start=subprocess.run, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29567", *argv]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return start(command, text=True, cwd=ROOT, env=env, **options)


def test_two_processes_train_as_one_that_accumulates(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=2", "--eval_interval=2"]
    one = [f"--out_dir={tmp_path}/one", "--gradient_accumulation_steps=4"]
    assert run_train(*argv, *one) == 0
    two = [f"--out_dir={tmp_path}/two", "--gradient_accumulation_steps=2"]
    done = torchrun("train.py", *argv, *two, capture_output=True)
    assert done.returncode == 0, done.stderr
    one, two = checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "two")
    for key, value in one["model"].items():
        if "running" not in key and "num_batches" not in key:  # of the first process alone
            torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert two["progress"]["log"][0]["loss"] == pytest.approx(one["progress"]["log"][0]["loss"], rel=1e-4)


def test_two_processes_stop_at_one_step_by_sigterm_resume_and_evaluate(traffic, tmp_path):
    argv = ["train.py", *TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    process = torchrun(*argv, "--eval_interval=2", start=subprocess.Popen,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (tmp_path / "best.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    checkpoint = checkpoint_of(tmp_path)
    step = checkpoint["step"]
    assert f"stopped at step {step}" in output
    assert len(checkpoint["states"]) == 2 and step >= 2
    again = ["--init_from=resume", f"--max_steps={step + 1}"]
    more = torchrun("train.py", f"--out_dir={tmp_path}", *again, capture_output=True)
    assert more.returncode == 0, more.stderr
    assert checkpoint_of(tmp_path)["step"] == step + 1
    report = f"--json={tmp_path}/two.json"
    done = torchrun("eval.py", f"--ckpt={tmp_path}/ckpt.pt", report, capture_output=True)
    assert done.returncode == 0, done.stderr


# ---- changes in one place


def test_another_schedule_is_one_function(traffic, tmp_path, monkeypatch):
    def cosine(step, max_steps, peak):
        return peak * (1 + math.cos(math.pi * step / max_steps)) / 2

    monkeypatch.setattr(train, "learning_rate_at", cosine)
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=2"]
    assert run_train(*argv, "--log_interval=1", "--learning_rate=1e-3") == 0
    assert checkpoint_of(tmp_path)["progress"]["log"][1]["lr"] == pytest.approx(5e-4)


def test_another_logged_scalar_is_one_key_of_the_losses(traffic, tmp_path, monkeypatch):
    plain = train.detection_loss

    def with_largest(prediction, targets, size_aware):
        largest = prediction.box_cxcywh[..., 2:].amax()
        return plain(prediction, targets, size_aware) | {"largest_side": largest}

    monkeypatch.setattr(train, "detection_loss", with_largest)
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1"]
    assert run_train(*argv) == 0
    assert checkpoint_of(tmp_path)["progress"]["log"][0]["largest_side"] > 0
    assert "largest_side" in (tmp_path / "log.csv").read_text()

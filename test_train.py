"""Tests of train.py."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import configurator
import detect
import eval as evaluation
import train
from conftest import (
    CONFIGS,
    ROOT,
    TINY,
    assert_same_run,
    checkpoint_of,
    run_train,
    shared,
)

# ==== train.py


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


TABLE = {  # patch, stages, weight or None, steps, batch, eval batch, interval, rate
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
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=4", "--log_interval=3"]
    argv += ["--eval_interval=2"]
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
    one, two = one["progress"]["log"][0], two["progress"]["log"][0]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


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
    done = torchrun("eval.py", f"--ckpt={tmp_path}/ckpt.pt", capture_output=True)
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

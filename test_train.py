"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- training

@pytest.mark.parametrize("steps", [400, 1000, 100_000])
def test_learning_rate_equals_torchs_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-4, total_steps=steps, pct_start=0.005, div_factor=20, final_div_factor=10_000 / 20,
        anneal_strategy="linear", cycle_momentum=False)
    want = {}
    for step in range(min(steps, 2000)):
        want[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if step < steps - 1:
            cycle.step()
    for step in (0, 1, 2, 10, 399, min(steps, 2000) - 1):
        assert train.learning_rate_at(step, steps, 2e-4) == pytest.approx(want[step], rel=1e-6)
    assert train.learning_rate_at(steps - 1, steps, 2e-4) == pytest.approx(2e-8)


def test_learning_rate_works_for_any_number_of_steps():
    for steps in (1, 2, 3, 199, 201):
        rates = [train.learning_rate_at(step, steps, 1.0) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates) and rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_trains_two_steps_and_evaluates_from_its_checkpoint(name, traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pictures", lambda *a: None)  # slow; tested below
    small = ("--embed_dim=16", "--dim_head=8", "--fpn_depth=0.33", "--sequence_length=2", "--batch_size=2", "--max_steps=2",
             "--num_workers=0", "--device=cpu", f"--data_dir={traffic}", f"--out_dir={tmp_path}")
    assert run_train(str(ROOT / "configs" / name), *small) == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    written = configurator.configure(train.defaults, [str(ROOT / "configs" / name)])
    for key in ("patch_size", "fpn_stages", "size_aware_loss", "size_aware_weight", "learning_rate", "sampling"):
        assert checkpoint["config"][key] == written[key]
    assert checkpoint["step"] == 2 and checkpoint["config"]["num_classes"] == 8
    evaluation.main(["--ckpt", str(tmp_path / "ckpt.pt")])
    assert json.loads((tmp_path / "eval" / "ckpt_test.json").read_text())
    assert (tmp_path / "curves.png").stat().st_size > 1000
    again = configurator.configure(train.defaults, [str(tmp_path / "config.py")])
    assert again == checkpoint["config"]


TABLE = {  # design of the experiments: patch, stages, weight or None, steps, batch, eval batch, interval, lr
    "baseline_3scale": (4, (2, 3, 4), None, 100_000, 6, 2, 3500, 1.7e-4),
    "4scale": (4, (1, 2, 3, 4), None, 100_000, 6, 2, 3500, 1.7e-4),
    "4scale_sizeaware": (4, (1, 2, 3, 4), 2.5, 100_000, 6, 2, 3500, 1.7e-4),
    "3scale_sizeaware": (4, (2, 3, 4), 2.5, 100_000, 6, 2, 3500, 1.7e-4),
    "3scale_sizeaware_attention": (4, (2, 3, 4), 2.0, 100_000, 6, 2, 3500, 1e-3),
    "patch2_sizeaware": (2, (2, 3, 4), 2.0, 100_000, 2, 2, 3500, 1e-4),
    "patch2_4scale_sizeaware": (2, (1, 2, 3, 4), 2.0, 200_000, 2, 2, 5000, 1e-4),
    "patch3_4scale_sizeaware": (3, (1, 2, 3, 4), 2.0, 200_000, 4, 4, 5000, 1.4e-4)}


@pytest.mark.parametrize("name", TABLE)
def test_configs_say_what_the_notes_say(name):
    config = SimpleNamespace(**configurator.configure(train.defaults, [str(ROOT / "configs" / f"{name}.py")]))
    weight = config.size_aware_weight if config.size_aware_loss else None
    assert (config.patch_size, config.fpn_stages, weight, config.max_steps, config.batch_size, config.eval_batch_size,
            config.eval_interval, config.learning_rate) == TABLE[name]
    assert config.sequence_length == 5 and config.sampling == "stream" and config.weight_type == "exponential"


def measured(rows):
    return [{k: v for k, v in row.items() if k not in ("frames_per_s", "data_wait", "peak_gib")} for row in rows]


def assert_same(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b or a != a and b != b, where


def assert_same_run(a, b):
    a, b = (torch.load(path / "ckpt.pt", weights_only=True) for path in (a, b))
    a["log"], b["log"] = measured(a["log"]), measured(b["log"])
    for key in ("out_dir", "init_from", "num_workers"):
        del a["config"][key], b["config"][key]
    assert_same(a, b)


def spawn(*argv, **options):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)


def kill_and_resume(traffic, tmp_path, options, kills, rng):
    """What a run was at when it was killed, each time: "writing" a checkpoint, or else "working"."""
    steps = 6 + 2 * kills
    argv = [*TINY, *options, f"--data_dir={traffic}", f"--max_steps={steps}", f"--eval_interval={steps // 2}",
            "--log_interval=2", "--checkpoint_interval=1"]
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    resume, happened = [], []
    ready, writing = tmp_path / "broken" / "ckpt.pt", tmp_path / "broken" / "ckpt.pt.tmp"
    for _ in range(kills):
        process = spawn(*argv, f"--out_dir={tmp_path}/broken", *resume)
        before = ready.stat().st_mtime if ready.exists() else 0
        writing.unlink(missing_ok=True)
        while process.poll() is None and not (ready.exists() and ready.stat().st_mtime > before):
            time.sleep(0.01)  # the first checkpoint of this life
        time.sleep(rng.random())
        wanted = rng.random() < 0.5
        while wanted and process.poll() is None and not writing.exists():
            pass
        process.kill()
        process.communicate()
        happened += [["working", "writing"][writing.exists()]] * (process.returncode < 0)
        resume = ["--init_from=resume"]
    assert run_train(*argv, f"--out_dir={tmp_path}/broken", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    return happened


@pytest.mark.parametrize("options", [("--sampling=stream",), ("--sampling=random", "--gradient_accumulation_steps=2"),
                                     ("--sampling=mixed", "--num_workers=2")])
def test_a_killed_run_resumes_as_if_never_stopped(options, traffic, tmp_path):
    kill_and_resume(traffic, tmp_path, options, 1, np.random.default_rng(len(options[0])))


def test_a_run_that_ends_during_its_validation_loses_no_step(traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=4", "--eval_interval=2", "--checkpoint_interval=100", "--log_interval=3"]
    assert run_train(*argv, f"--out_dir={tmp_path}/whole") == 0
    for step, resume in ((2, ()), (4, ("--init_from=resume",))):

        def dies(*args, run=evaluation.run):
            if torch.load(tmp_path / "broken" / "ckpt.pt", weights_only=True)["step"] == step:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(*args)

        with monkeypatch.context() as patch, pytest.raises(ValueError, match="out of memory.*eval_batch_size"):
            patch.setattr(evaluation, "run", dies)
            train.main([*argv, f"--out_dir={tmp_path}/broken", *resume])
        assert torch.load(tmp_path / "broken" / "ckpt.pt", weights_only=True)["step"] == step
    assert run_train(*argv, f"--out_dir={tmp_path}/broken", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@soak
def test_fifty_kills_at_random_moments_change_nothing(traffic, tmp_path):
    rng, happened = np.random.default_rng(0), []
    for i, (kind, micro, workers) in enumerate(itertools.product(("stream", "random", "mixed"), (1, 2), (0, 2))):
        options = (f"--sampling={kind}", f"--gradient_accumulation_steps={micro}", f"--num_workers={workers}")
        happened += kill_and_resume(traffic, tmp_path / str(i), options, 4, rng)
    happened += kill_and_resume(traffic, tmp_path / "half", ("--dtype=float16",), 4, rng)  # with a scaler
    print(f"{len(happened)} kills, {happened.count('writing')} as a checkpoint was written")
    assert len(happened) > 50 and happened.count("writing") > 5


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=100000", f"--out_dir={tmp_path}", "--log_interval=1",
            "--num_workers=1"]
    process = spawn(*argv, start_new_session=True)
    while process.poll() is None and not ((tmp_path / "log.csv").exists()):
        time.sleep(0.05)
    for _ in range(1 + (number == signal.SIGTERM)):  # a job's end may reach a process twice, from torchrun as well
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert step >= 1 and f"stopped at step {step}; go on: python train.py --out_dir={tmp_path} --init_from=resume" in output
    assert "Traceback" not in output


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint(traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    script = "import sys, time, train; train.Forward.forward = lambda *x: (print('step', flush=True), time.sleep(60)); train.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=9"],
                               stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert "step\n" in process.stdout
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes its step
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert_same(before, torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"])


def test_a_full_disk_leaves_the_checkpoint_before(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    before, limits = (tmp_path / "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="ckpt.pt: not written .is the disk full.*intact"):
            train.main([*argv, "--init_from=resume", "--max_steps=2", "--eval_interval=9"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert run_train(*argv, "--init_from=resume", "--max_steps=2") == 0


def test_too_little_gpu_memory_ends_in_one_line_that_says_what_to_change(traffic, tmp_path, monkeypatch):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(train.Forward, "forward", full)
    with pytest.raises(ValueError, match="B=2, T=3, config.patch_size=4, config.checkpointing=False; lower"):
        train.main([*argv, "--init_from=resume", "--max_steps=2"])
    assert_same(before, torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"])
    with pytest.raises(SystemExit, match="^error: CUDA out of memory. Tried to allocate 2 GiB$"):
        configurator.command_line(full)


def poisoned(traffic, monkeypatch, what, steps):
    """data.make_loader whose micro-batches of `steps` carry a NaN or Inf in their boxes, or in their events."""
    make_loader = data.make_loader

    def loader(train_data, start=0, *args, **kwargs):
        for i, batch in enumerate(make_loader(train_data, start, *args, **kwargs), start):
            if i in steps and what == "boxes":
                batch.targets[0, 0] = torch.tensor([0, math.nan, 20, 10, 10])
            yield batch._replace(events=torch.full_like(batch.events, math.inf, dtype=torch.float32)) \
                if i in steps and what == "events" else batch

    monkeypatch.setattr(data, "make_loader", loader)


@pytest.mark.parametrize("what", ["boxes", "events"])
def test_a_poisoned_step_is_skipped_and_leaves_nothing_behind(what, traffic, tmp_path, monkeypatch, capsys):
    argv = [*TINY, f"--data_dir={traffic}", "--patience=0", "--log_interval=1"]
    assert run_train(*argv, "--max_steps=1", f"--out_dir={tmp_path}/one") == 0
    poisoned(traffic, monkeypatch, what, {1})
    assert run_train(*argv, "--max_steps=2", f"--out_dir={tmp_path}/two") == 0
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    assert_same(one["states"], two["states"])
    for key in one["model"]:  # the learning rate of step 0 differs with max_steps, batch-norm statistics do not
        if "running" in key or "num_batches" in key:
            assert torch.equal(one["model"][key], two["model"][key]), key
    assert two["progress"]["bad"] == 1 and all(value.isfinite().all() for value in two["model"].values())
    assert "step 1:" in capsys.readouterr().out and two["log"][-1]["loss"] == ""  # no mean of no steps


def test_too_many_poisoned_steps_end_the_run_and_keep_the_checkpoint(traffic, tmp_path, monkeypatch):
    poisoned(traffic, monkeypatch, "boxes", {2, 3, 4})
    with pytest.raises(ValueError, match="3 steps in a row"):
        train.main([*TINY, f"--data_dir={traffic}", "--max_steps=9", "--max_bad_steps=3", "--checkpoint_interval=1",
                    f"--out_dir={tmp_path}"])
    assert all(value.isfinite().all() for value in torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"].values())


def test_poisoned_weights_end_the_run(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}"]
    assert run_train(*argv, "--max_steps=1") == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["stages.0.norm.bias"][0] = math.nan
    torch.save(checkpoint, tmp_path / "poisoned.pt")
    with pytest.raises(ValueError, match="2 steps in a row"):
        train.main([*argv[:-1], f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/poisoned.pt", "--max_steps=9",
                    "--max_bad_steps=2"])


def test_a_diverging_loss_or_too_much_memory_ends_the_run(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=30"]
    with pytest.raises(ValueError, match="passed max_memory_gib.*checkpointing"):
        train.main([*argv, "--max_memory_gib=0.01"])
    with pytest.raises(ValueError, match="diverged"):
        train.main([*argv, "--max_loss_ratio=0.5", "--patience=3", "--checkpoint_interval=1"])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["progress"]["above"] == 0  # from before it did


def test_a_run_has_a_checkpoint_from_its_start_and_goes_on_where_its_folder_was_moved_to(traffic, tmp_path, monkeypatch):
    argv, out = [*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/a/"], tmp_path / "b"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="out of memory"):
        patch.setattr(train.Forward, "forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        train.main(argv)
    assert run_train(f"--out_dir={tmp_path}/a", "--init_from=resume", "--max_steps=1") == 0
    assert run_train(*argv, "--max_steps=1") == 0  # moves the older one aside, whatever slash there is
    assert len(list(tmp_path.glob("a-*/ckpt.pt"))) == 1
    (tmp_path / "a").rename(out)
    assert run_train(f"--out_dir={out}", "--init_from=resume", "--max_steps=2") == 0
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 2 and not (tmp_path / "a").exists()
    assert "init_from = 'scratch'" in (out / "config.py").read_text()


def test_a_run_resumes_with_what_was_changed(traffic, tmp_path):
    argv = [f"--out_dir={tmp_path}", "--init_from=resume"]
    assert run_train(*TINY, f"--data_dir={traffic}", *argv[:1], "--max_steps=3", "--max_loss_ratio=0.5", "--patience=0") == 0
    before = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert before["progress"]["above"] > 0 and any(s.any() for s in before["states"][0][0])
    assert run_train(*argv, "--max_steps=4", "--weight_decay=0.5") == 0
    assert run_train(*argv, "--sequence_length=2") == 0  # the slots are somewhere else now
    after = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert after["optimizer"]["param_groups"][0]["weight_decay"] == 0.5 and not any(s.any() for s in after["states"][0][0])
    with pytest.raises(ValueError, match="batch_size.*scratch"):
        train.main([*argv, "--batch_size=1"])


@pytest.mark.parametrize("moment", [torch.zeros(7), torch.zeros(1), torch.zeros(1).expand(64)])
def test_moments_of_another_shape_in_a_checkpoint_cannot_crash_the_optimizer(moment, traffic, tmp_path):
    assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--max_steps=1") == 0
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for state in checkpoint["optimizer"]["state"].values():
        state["exp_avg"] = moment if moment.numel() < 64 else moment[:1].expand(state["exp_avg"].shape)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with contextlib.suppress(ValueError):  # in one line, or as if they had been of this shape
        run_train(f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=2")


def test_a_validation_set_of_another_size_is_named_before_training(traffic, tmp_path):
    shutil.copytree(Path(traffic) / "train", tmp_path / "train")
    shutil.copy(Path(traffic) / "dataset.json", tmp_path)
    make_set(tmp_path, [[3]], "val", 5)
    with pytest.raises(ValueError, match="val.*frames of"):
        train.main([*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out"])


@pytest.mark.parametrize("option, word", [
    ("--fpn_stages=2,4", "fpn_stages"), ("--sequence_length=0", "sequence_length"), ("--max_steps=0", "max_steps"),
    ("--class_names=a,b --num_classes=3", "class"), ("--num_classes=3", "num_classes"), ("--data_dir=nowhere", "nowhere"),
    ("--weight_type=cubic", "weight_type"), ("--small_threshold=9999", "small_threshold"), ("--dtype=int8", "dtype"),
    ("--device=cuda:0", "device|CUDA"), ("--init_from=missing.pt", "missing.pt"), ("--learning_rat=1", "learning_rate"),
    ("--size_aware_terms=iou,box", "size_aware_terms"), ("--input_hw=10,10", "input_hw"), ("--sampling=some", "sampling"),
    ("--resolution=full", "full"), ("--sampling=mixed --batch_size=1", "mixed"), ("--fpn_stages=3,2", "fpn_stages")])
def test_what_cannot_work_fails_before_any_work(option, word, traffic, tmp_path):
    if option.startswith("--device") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match=word) as error:
        train.main([*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/out", "--max_steps=1", *option.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [
    "--sampling=strem", "--batch_size=0", "--sequence_length=0", "--seed=-1", "--zoom_in_max=0.5", "--zoom_out_max=0.9",
    "--gradient_accumulation_steps=0", "--sampling=mixed --mixed_random=0", "--sampling=mixed --batch_size=1",
    "--eval_interval=0", "--patch_size=5", "--fpn_stages=1,3", "--device=tpu", "--num_workers=-1", "--grad_clip_by=x",
    "--device=", "--device=cpu:x", "--dtype=int8", "--grad_clip=-1", "--learning_rate=1e999", "--fpn_depth=nan"])
def test_what_no_data_set_could_mend_fails_before_one_is_simulated(option, monkeypatch):
    monkeypatch.setattr(train, "ensure_toy", lambda *a: pytest.fail("simulated"))
    with pytest.raises(ValueError, match=option.split()[-1][2:].split("=")[0]):
        train.main(option.split())


def test_mistakes_reach_the_user_as_one_line(tmp_path):
    for argv, word in ((["train.py", "--data_dir=nowhere"], "nowhere"), (["train.py", "configs/toi.py"], "configs/toi.py"),
                       (["eval.py", "--ckpt", "nothing.pt"], "nothing.pt")):
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and word in done.stderr and done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_a_script_with_status_130():
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as status:
        configurator.command_line(interrupted)
    assert status.value.code == 130


def test_training_starts_from_weights_ours_or_rvts(traffic, tmp_path):
    argv = [*TINY, f"--data_dir={traffic}", "--max_steps=1"]
    assert run_train(*argv, f"--out_dir={tmp_path}/a") == 0
    assert run_train(*argv, f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/a/ckpt.pt", "--learning_rate=1e-12") == 0
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in "ab")
    torch.testing.assert_close(a["stages.0.conv.weight"], b["stages.0.conv.weight"])
    with pytest.raises(ValueError, match="do not fit"):
        train.main([*argv, f"--out_dir={tmp_path}/c", f"--init_from={tmp_path}/a/ckpt.pt", "--embed_dim=32"])
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    assert run_train(*argv, f"--out_dir={tmp_path}/d", f"--init_from={tmp_path}/rvt.ckpt", "--learning_rate=1e-12",
                     "--embed_dim=32", "--dim_head=32") == 0
    weight = torch.load(tmp_path / "d" / "ckpt.pt", weights_only=True)["model"]["stages.0.conv.weight"]
    want = reference["checkpoint"]["state_dict"]["mdl.backbone.stages.0.downsample_cf2cl.conv.weight"].float()
    torch.testing.assert_close(weight, want)


def test_half_precision_trains_on_the_cpu(traffic, tmp_path):
    for dtype in ("bfloat16", "float16"):
        assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/{dtype}", "--max_steps=2", f"--dtype={dtype}") == 0
        rows = torch.load(tmp_path / dtype / "ckpt.pt", weights_only=True)["log"]
        assert all(math.isfinite(row["loss"]) for row in rows)


def test_an_older_run_in_the_same_folder_is_kept(traffic, tmp_path):
    for _ in range(2):
        assert run_train(*TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}/out", "--max_steps=1") == 0
    assert len(list(tmp_path.glob("out*"))) == 2 and len(list(tmp_path.glob("out*/ckpt.pt"))) == 2


def torchrun(*argv, start=subprocess.run, **options):
    options = options or dict(capture_output=True, timeout=300)
    return start([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29567", *argv],
                 text=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), **options)


def test_two_processes_train_evaluate_stop_at_one_step_by_sigterm_and_resume(traffic, tmp_path):
    argv = ["train.py", *TINY, f"--data_dir={traffic}", f"--out_dir={tmp_path}", "--log_interval=1", "--eval_interval=2"]
    process = torchrun(*argv, start=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (tmp_path / "best.pt").exists():
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    step = checkpoint["step"]
    assert f"stopped at step {step}" in output and len(checkpoint["states"]) == 2 and step > 2
    # torchrun itself ends with status 1 and a traceback that names the signal; its processes ended with 0
    assert output.count("Traceback") == 1 and "SignalException" in output and process.returncode == 1, output
    more = torchrun("train.py", f"--out_dir={tmp_path}", "--init_from=resume", f"--max_steps={step + 1}")
    assert more.returncode == 0, more.stderr
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step + 1
    done = torchrun("eval.py", "--ckpt", f"{tmp_path}/ckpt.pt", f"--json={tmp_path}/two.json")
    assert done.returncode == 0, done.stderr



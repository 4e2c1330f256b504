"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- simulate

SMALL_SCENE = dict(train=2, val=1, test=0, seconds=1.0, height=48, width=64, sizes=(2.0, 8.0), users=8.0)


@pytest.fixture(scope="module")
def small_traffic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_traffic")
    simulate.simulate(folder / "raw", 0, **SMALL_SCENE)
    return folder / "raw"


def recording_of(path):
    return list(map(np.concatenate, zip(*prepare.Recording(path).chunks())))


def test_simulation_depends_on_the_seed_alone(small_traffic, tmp_path):
    simulate.simulate(tmp_path / "two", 2, **SMALL_SCENE)
    simulate.simulate(tmp_path / "other", 0, **SMALL_SCENE | dict(train=1, val=0, seed=1))
    names = [f"{split}/{split}_{i:04d}" for split, i in (("train", 0), ("train", 1), ("val", 0))]
    for name in names:
        first, second = (small_traffic / name, tmp_path / "two" / name)
        for one, other in zip(recording_of(f"{first}_td.h5"), recording_of(f"{second}_td.h5"), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(np.load(f"{first}_bbox.npy"), np.load(f"{second}_bbox.npy"))
    lengths = {len(recording_of(folder / f"{name}_td.h5")[0]) for folder, name in
               ((small_traffic, names[0]), (small_traffic, names[1]), (small_traffic, names[2]), (tmp_path / "other", names[0]))}
    assert len(lengths) == 4


def test_simulated_recordings_and_labels_keep_to_the_frame(small_traffic):
    boxes = np.concatenate([np.load(path) for path in sorted(small_traffic.glob("*/*_bbox.npy"))])
    assert len(boxes) > 20 and boxes.dtype == prepare.LABEL and boxes["class_id"].max() < 8
    assert boxes["x"].min() >= 0 and boxes["y"].min() >= 0
    assert (boxes["x"] + boxes["w"]).max() <= 63.001 and (boxes["y"] + boxes["h"]).max() <= 47.001
    assert (boxes["w"] * boxes["h"]).min() >= 15.99  # 2 px at the network's input
    assert set(np.unique(boxes["t"]) % 33_333) <= {0, 1, *range(30)}
    for path in small_traffic.glob("*/*_td.h5"):
        t, x, y, p = recording_of(path)
        assert x.max() < 64 and y.max() < 48 and set(p) == {0, 1} and 0 <= t[0] and t[-1] < 10**6
        assert 0.3 < p.mean() < 0.7 and not list(path.parent.glob(".*"))


def still_scene():
    scene = SimpleNamespace(height=48, width=64, focal=64, sizes=(6.0, 8.0), horizon=8, camera=4, road=0.0, night=False,
                            contrast=np.float32(1), ground=np.zeros((48, 64), np.float32))
    return scene, simulate.travel(np.random.default_rng(1), 1, scene, 120)


def test_what_stands_still_causes_no_events():
    scene, car = still_scene()
    car.box[:] = (10, 20, 16, 8, 0)
    car.box[:60, 0] += np.arange(60) * 0.5
    car.box[60:, 0] = car.box[59, 0]
    threshold = np.full(48 * 64, 0.2, "f4")
    pixel = SimpleNamespace(on=threshold, off=threshold, leak=0 * threshold, noise=0, hot=np.zeros(0, int), hot_rate=0)
    rng, before = np.random.default_rng(0), simulate.render(scene, [car], 0)[0].ravel()
    level, last_us, counts = before.copy(), np.full(48 * 64, -1e9), []
    for step in range(1, 120):
        image = simulate.render(scene, [car], step)[0].ravel()
        t, where, p = simulate.make_events(rng, image, before, level, last_us, pixel, step - 1)
        assert (np.diff(t) >= 0).all()
        assert (t >= (step - 1) * 1e6 / simulate.FPS - 1).all() and (t < step * 1e6 / simulate.FPS).all()
        counts.append(len(t))
        before = image
    assert sum(counts[:59]) > 500 and sum(counts[60:]) == 0
    assert np.abs(level - before).max() < 0.21  # every pixel has told all but less than a threshold (or its dead time)


def test_events_follow_the_contrast_threshold_model():
    pixel = SimpleNamespace(on=np.array([0.2], "f4"), off=np.array([0.25], "f4"), leak=np.zeros(1, "f4"), noise=0,
                            hot=np.zeros(0, int), hot_rate=0)
    rng, span = np.random.default_rng(0), 1e6 / simulate.FPS
    level = np.zeros(1, "f4")
    t, _, p = simulate.make_events(rng, np.array([0.9], "f4"), np.zeros(1, "f4"), level, np.full(1, -1e9), pixel, 10)
    np.testing.assert_allclose(t, (10 + np.arange(1, 5) * 0.2 / 0.9) * span, atol=2)  # crossings at 0.2, 0.4, 0.6, 0.8
    assert p.all() and abs(level[0] - 0.8) < 1e-6
    t, _, p = simulate.make_events(rng, np.zeros(1, "f4"), np.array([0.9], "f4"), level, np.full(1, -1e9), pixel, 11)
    np.testing.assert_allclose(t, (11 + (0.9 - np.array([0.55, 0.3, 0.05])) / 0.9) * span, atol=2)
    assert not p.any()
    zero = np.zeros(1, "f4")
    t, _, _ = simulate.make_events(rng, zero + 30, zero, zero.copy(), np.full(1, -1e9), pixel, 0)
    assert len(t) < 2  # 150 crossings within one step: faster than the dead time


def test_hidden_unmoved_and_tiny_things_have_no_label():
    scene, car = still_scene()
    options = SimpleNamespace(width=64, height=48, sizes=(3.0, 8.0))
    car.box[:] = (10, 20, 16, 8, 0)

    def labels(things, step):
        return list(simulate.labels_at(things, step, simulate.render(scene, things, step)[1], options))

    car.pace[:] = 0
    assert labels([car], 0) == []  # it stands and always did
    car.pace[:] = 200
    assert [label[1:6] for label in labels([car], 0)] == [(10, 20, 16, 8, 1)]
    _, wall = still_scene()
    wall.kind, wall.images, wall.Z = 10, np.ones((1, 40, 2, 40), "f4"), car.Z - 1
    wall.box[:] = (8, 10, 15, 20, 0)
    wall.pace[:] = 0
    assert labels([car, wall], 0) == []
    car.box[:] = (10, 20, 6, 5, 0)
    assert labels([car], 0) == []


def test_an_interrupted_simulation_leaves_no_half_recording_and_resumes(small_traffic, tmp_path, monkeypatch):
    calls, make_events = [], simulate.make_events

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 250:  # in the second recording
            raise KeyboardInterrupt
        return make_events(*arguments)

    monkeypatch.setattr(simulate, "make_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate.simulate(tmp_path, 0, **SMALL_SCENE)
    assert [path.name for path in tmp_path.glob("*/*_td.h5")] == ["train_0000_td.h5"]
    monkeypatch.setattr(simulate, "make_events", make_events)
    simulate.simulate(tmp_path, 0, **SMALL_SCENE | dict(val=0))
    for one, other in zip(*(recording_of(folder / "train" / "train_0001_td.h5") for folder in (small_traffic, tmp_path))):
        np.testing.assert_array_equal(one, other)
    assert len(calls) == 250


def test_the_toy_set_is_made_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "defaults", simulate.defaults | SMALL_SCENE)
    prepare_set = simulate.prepare

    def interrupted(*arguments, **changes):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate.ensure_toy(tmp_path / "toy", 0)
    monkeypatch.setattr(simulate, "prepare", prepare_set)
    simulate.ensure_toy(tmp_path / "toy", 0)
    assert len(list((tmp_path / "toy" / "train").iterdir())) == 2
    got = load(tmp_path / "toy" / "val" / "val_0000")
    assert got["event_representations_ds2_nearest.h5"].shape[1:] == (20, 24, 32) and got["labels"]["w"].min() < 10
    capsys.readouterr()
    shutil.rmtree(tmp_path / "toy_raw")
    simulate.ensure_toy(tmp_path / "toy", 0)
    assert not (tmp_path / "toy_raw").exists() and capsys.readouterr().out == ""


def test_wrong_simulation_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="sizes=.9, 6."):
        simulate.simulate(tmp_path, sizes=(9, 6))
    with pytest.raises(ValueError, match="unknown key"):
        simulate.main(["--second=3"])



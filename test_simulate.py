"""Tests of simulate.py."""

from types import SimpleNamespace

import numpy as np
import pytest

import prepare
import simulate
from conftest import load

SMALL_SCENE = dict(train=1, val=2, test=0, seconds=1.0, height=48, width=64, sizes=(2.0, 8.0),
                   users=8.0)
SMALL_NAMES = ("train/train_0000", "val/val_0000", "val/val_0001")


@pytest.fixture(scope="module")
def small_traffic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_traffic")
    simulate.simulate(folder, 0, **SMALL_SCENE)
    return folder


def raw_recording(folder, name):
    """Events (t, x, y, p) and boxes of a raw recording."""
    events = map(np.concatenate, zip(*prepare.Recording(folder / f"{name}_td.h5").chunks()))
    return *events, np.load(folder / f"{name}_bbox.npy")


def two_cars():
    """A plain scene of 48 x 64 px and two cars in one place, the first before the second."""
    ground = np.zeros((48, 64), np.float32)
    scene = SimpleNamespace(ground=ground, sizes=(3, 8), horizon=8, camera=4, road=0, night=False)
    cars = [simulate.make_thing(np.random.default_rng(1), 1, scene, 120) for _ in range(2)]
    for distance, car in enumerate(cars, 1):
        car.depth[:] = distance
        car.box_xyxy[:] = (10, 20, 26, 28)
        car.moved[:] = 100
    return scene, *cars


def sensor_before(image):
    sensor = simulate.Sensor(np.random.default_rng(0), np.float32(image), 1)
    sensor.threshold[:] = 0.2
    return sensor


def test_simulate_depends_on_the_seed_alone(small_traffic, tmp_path):
    simulate.simulate(tmp_path / "two", 2, **SMALL_SCENE)
    simulate.simulate(tmp_path / "other", 0, **SMALL_SCENE | dict(seed=1))
    counts = set()
    for name in SMALL_NAMES:
        recording = raw_recording(small_traffic, name)
        assert all(map(np.array_equal, recording, raw_recording(tmp_path / "two", name)))
        counts |= {len(recording[0]), len(raw_recording(tmp_path / "other", name)[0])}
    assert len(counts) == 6


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_simulate_keeps_to_the_frame_in_time_and_space(small_traffic, name):
    t, x, y, p, boxes = raw_recording(small_traffic, name)
    assert 0 <= t[0] and t[-1] < 10**6 and x.max() < 64 and y.max() < 48
    assert set(p) == {0, 1} and 0.3 < p.mean() < 0.7
    assert len(boxes) > 20 and boxes["class_id"].max() < 8
    assert min(boxes["x"].min(), boxes["y"].min()) >= 0
    assert (boxes["x"] + boxes["w"]).max() <= 63.001 and (boxes["y"] + boxes["h"]).max() <= 47.001
    assert (boxes["w"] * boxes["h"]).min() >= 15.99  # 2 px of the network's input
    assert (np.unique(boxes["t"]) % 33_333 < 30).all()  # 30 Hz


def test_render_covers_pixels_by_their_share():
    scene, car, _ = two_cars()
    car.picture[:] = 1  # log intensity, and cover
    car.box_xyxy[:] = (10.25, 20, 26, 27.5)
    image, owner = simulate.render(scene, [car], 0)
    np.testing.assert_allclose(image[22, 9:12], (0, 0.75, 1), atol=1e-5)
    np.testing.assert_allclose(image[26:29, 15], (1, 0.5, 0), atol=1e-5)
    assert image.sum() == pytest.approx(15.75 * 7.5, rel=1e-5)
    assert (owner[20:27, 10:26] == 0).all()


def test_labels_at_leaves_out_hidden_unmoved_and_tiny_things():
    scene, wall, car = two_cars()
    wall.picture[1] = 1
    wall.moved[:] = 0
    wall.box_xyxy[:] = (40, 10, 60, 30)

    def labels(*things):
        return simulate.labels_at(scene, things, 3, simulate.render(scene, things, 3)[1])

    assert labels(wall, car) == [(25_000, 10, 20, 16, 8, 1, 1, 1)]
    wall.box_xyxy[:] = (8, 10, 23, 30)  # now before the car
    assert labels(wall, car) == []
    car.moved[:] = 1
    assert labels(car) == []
    car.moved[:] = 100
    assert len(labels(car)) == 1
    car.box_xyxy[:] = (10, 20, 16, 25)
    assert labels(car) == []


def test_sensor_follows_the_contrast_threshold_model():
    span = 1e6 / simulate.FPS
    sensor = sensor_before([[0]])
    rise = sensor.events(np.float32([[0.9]]), 10)  # crosses 0.2, 0.4, 0.6 and 0.8
    times = (10 + np.array([0.2, 0.4, 0.6, 0.8]) / 0.9) * span
    np.testing.assert_allclose([t[0] for t, _, _ in rise], times, atol=2)
    assert all(p.all() for _, _, p in rise)
    sensor.threshold[:] = 0.25  # below the level that is left, 0.8
    fall = sensor.events(np.float32([[0]]), 11)  # crosses 0.55, 0.3 and 0.05
    times = (11 + np.array([0.35, 0.6, 0.85]) / 0.9) * span
    np.testing.assert_allclose([t[0] for t, _, _ in fall], times, atol=2)
    assert not any(p.any() for _, _, p in fall)


def test_sensor_is_dead_for_a_while_after_an_event():
    events = sensor_before([[0]]).events(np.float32([[30]]), 0)  # 150 crossings in a step
    times = np.concatenate([t for t, _, _ in events])
    assert len(times) > 10 and np.diff(times).min() >= simulate.REFRACTORY_US


def test_sensor_sees_nothing_of_what_stands_still():
    scene, car, _ = two_cars()
    car.box_xyxy += 0.5 * np.arange(120).clip(0, 59)[:, None] * (1, 0, 1, 0)
    sensor = sensor_before(simulate.render(scene, [car], 0)[0])
    counts = []
    for step in range(1, 120):
        events = sensor.events(simulate.render(scene, [car], step)[0], step - 1)
        counts.append(sum(len(t) for t, _, _ in events))
    assert sum(counts[:59]) > 500 and sum(counts[59:]) == 0
    assert np.abs(sensor.level - sensor.before).max() < 0.201  # all but a threshold was told


def test_simulate_interrupted_leaves_no_half_recording(small_traffic, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *a: 1 / 0)  # once the events are written
    with pytest.raises(ZeroDivisionError):
        simulate.simulate(tmp_path, 0, **SMALL_SCENE)
    assert not list(tmp_path.glob("*/*_td.h5"))
    monkeypatch.undo()
    simulate.simulate(tmp_path, 0, **SMALL_SCENE)
    both = [raw_recording(folder, SMALL_NAMES[0]) for folder in (small_traffic, tmp_path)]
    assert all(map(np.array_equal, *both))
    monkeypatch.setattr(simulate, "make_scene", lambda *a: pytest.fail("simulated again"))
    simulate.simulate(tmp_path, 0, **SMALL_SCENE)


def test_ensure_toy_makes_the_set_once_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate, "defaults", simulate.defaults | SMALL_SCENE)
    (tmp_path / "toy/.partial").mkdir(parents=True)  # as an interrupted prepare.py leaves it
    simulate.ensure_toy(tmp_path / "toy", 0)
    assert len(list((tmp_path / "toy/val").iterdir())) == 2
    prepared = load(tmp_path / "toy/val/val_0000")
    assert prepared["event_representations_ds2_nearest.h5"].shape[1:] == (20, 24, 32)
    assert prepared["labels"]["w"].min() < 10
    monkeypatch.setattr(simulate, "simulate", lambda *a: pytest.fail("made again"))
    simulate.ensure_toy(tmp_path / "toy", 0)


def test_simulate_names_wrong_options(tmp_path):
    with pytest.raises(ValueError, match="sizes=.9, 6."):
        simulate.simulate(tmp_path, sizes=(9, 6))
    with pytest.raises(ValueError, match="0.2 or more"):
        simulate.simulate(tmp_path, seconds=0.0)
    with pytest.raises(ValueError, match="unknown key"):
        simulate.main(["--second=3"])

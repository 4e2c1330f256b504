"""Tests of demo.py."""

import numpy as np
import pytest
from PIL import Image

import demo
from checkpoint import load_detector
from conftest import (
    NAMES,
    MemorySequence,
    same_boxes,
    small_detector,
    write_checkpoint,
    write_prepared,
    write_recording,
)
from detect import StreamDetector
from formats import BOX_DTYPE

# ---- demo


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt.pt", small_detector(), class_names=NAMES)


def run_demo(checkpoint, recording, out, *options):
    paths = (f"--ckpt={checkpoint}", f"--recording={recording}", f"--out={out}")
    demo.main([*paths, "--confidence=0.01", "--device=cpu", *options])


def test_demo_writes_video_and_boxes(tmp_path, checkpoint, capsys):
    recording = write_recording(tmp_path / "drive_td.h5")
    out = tmp_path / "new" / "d.gif"
    run_demo(checkpoint, recording, out, f"--boxes={tmp_path / 'd.npy'}")
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.size) == (10, (512, 512))
        assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
    boxes = np.load(tmp_path / "d.npy")
    assert boxes.dtype == BOX_DTYPE
    assert len(np.unique(boxes["t"])) == 10
    assert (np.diff(boxes["t"]) >= 0).all()
    assert np.ptp(boxes["t"]) == 450_000
    assert boxes["class_confidence"].min() >= 0.01
    assert "ms a frame" in capsys.readouterr().out
    assert not list(tmp_path.rglob(".partial*"))


def test_demo_video_shows_what_draw_draws(tmp_path):
    picture = demo.draw(np.eye(480, dtype=np.uint8)[None, :40].repeat(20, 0), (), NAMES)
    video = demo.write_gif(tmp_path / "a.gif", picture.size)
    next(video)
    for turned in (picture, picture.rotate(180)):
        video.send(turned.tobytes())
    video.close()
    with Image.open(tmp_path / "a.gif") as gif:
        gif.seek(1)
        got = np.asarray(gif.convert("RGB"), int)
    assert np.abs(got - np.asarray(picture.rotate(180), int)).max() < 40  # 256 colours


def test_demo_of_a_prepared_sequence_and_of_mp4(tmp_path, checkpoint):
    pytest.importorskip("imageio_ffmpeg")
    data = write_prepared(tmp_path / "data", ("a",))
    run_demo(checkpoint, data / "test" / "a", tmp_path / "a.mp4", f"--boxes={tmp_path / 'a.npy'}")
    detector = StreamDetector(load_detector(checkpoint), confidence=0.01, score="obj*cls")
    sequence = MemorySequence("a", 8, (2, 5, 7))
    want = [detector(*pair) for pair in zip(sequence.data, sequence.timestamps_us)]
    same_boxes([np.load(tmp_path / "a.npy")], [np.concatenate(want)])
    assert (tmp_path / "a.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    "sensor, want", [((128, 128), 64), ((64, 64), 64), ((32, 32), 32), ((5, 80), 5)])
def test_demo_reads_a_sensor_of_twice_the_size_at_half_resolution_and_others_as_they_are(
        tmp_path, checkpoint, sensor, want):
    recording = write_recording(tmp_path / "a.h5", sensor, 0.1)
    scale, frames = demo.open_frames(recording, (64, 64))
    (first_us, first), (second_us, _) = list(frames)[:2]
    assert first.shape[1] == want == sensor[0] // scale
    assert second_us - first_us == 50_000
    run_demo(checkpoint, recording, tmp_path / "a.gif")
    assert (tmp_path / "a.gif").exists()


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "absent"])
def test_demo_leaves_nothing_behind_a_bad_recording(tmp_path, checkpoint, kind):
    recording = tmp_path / "bad.h5"
    if kind in ("cut", "empty"):
        whole = write_recording(recording, events=200_000 * (kind == "cut")).read_bytes()
        recording.write_bytes(whole[:100_000])
    if kind == "text":
        recording.write_text("hello")
    before = set(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match="bad.h5"):
        run_demo(checkpoint, recording, tmp_path / "out.gif", f"--boxes={tmp_path / 'b.npy'}")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option, word", [
    ("--class_names=a,b", "class_names"), ("--dtype=int8", "dtype"),
    ("--recording=notes.txt", "notes.txt"), ("--recording=nowhere", "nowhere"),
    ("--recording=", "expected --recording"),
    ("--out=x.avi", "expected --recording"), ("--boxes=x.txt", "expected --recording")])
def test_demo_names_what_does_not_fit(tmp_path, checkpoint, option, word):
    recording = write_recording(tmp_path / "drive_td.h5")
    with pytest.raises((ValueError, OSError), match=word):
        run_demo(checkpoint, recording, tmp_path / "e.gif", option)

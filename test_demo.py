"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- demo

@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt.pt", small_detector(), class_names=NAMES)


def test_demo_writes_video_and_boxes(tmp_path, checkpoint, capsys):
    from PIL import Image
    recording = write_recording(tmp_path / "drive_td.h5")
    demo.main([f"--ckpt={checkpoint}", f"--recording={recording}", f"--out={tmp_path / 'new' / 'd.gif'}", f"--boxes={tmp_path / 'd.npy'}",
               "--confidence=0.01", "--device=cpu"])
    boxes = np.load(tmp_path / "d.npy")
    with Image.open(tmp_path / "new" / "d.gif") as gif:
        assert gif.n_frames == 10 and gif.size == (512, 512) and gif.info["duration"] == 50
    assert boxes.dtype == BOX_DTYPE and len(boxes) and (np.diff(boxes["t"]) >= 0).all()
    assert len(np.unique(boxes["t"])) == 10 and np.ptp(boxes["t"]) == 450_000 and boxes["class_confidence"].min() >= 0.01
    assert "ms a frame" in capsys.readouterr().out
    assert not list(tmp_path.rglob(".partial*"))
    for option in ("--class_names=a,b", "--dtype=int8"):
        with pytest.raises(ValueError, match=option[2:].split("=")[0]):
            demo.main([f"--ckpt={checkpoint}", f"--recording={recording}", f"--out={tmp_path / 'e.gif'}", "--device=cpu", option])


def test_demo_of_a_prepared_sequence_and_of_mp4(tmp_path, checkpoint):
    pytest.importorskip("imageio_ffmpeg")
    data = write_prepared(tmp_path / "data", ("a",))
    demo.main([f"--ckpt={checkpoint}", f"--recording={data / 'test' / 'a'}", f"--out={tmp_path / 'a.mp4'}", f"--boxes={tmp_path / 'a.npy'}",
               "--confidence=0.01", "--device=cpu"])
    want = StreamDetector(load_detector(checkpoint), confidence=0.01, score="obj*cls")
    sequence = MemorySequence("a", 8, (2, 5, 7))
    same_boxes([np.load(tmp_path / "a.npy")], [np.concatenate([want(*pair) for pair in zip(sequence.data, sequence.timestamps_us)])])
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_demo_reads_a_sensor_of_twice_the_size_at_half_resolution_and_others_as_they_are(tmp_path):
    for hw, want in (((128, 128), (64, 64)), ((64, 64), (64, 64)), ((48, 80), (48, 80))):
        size, scale, _, frames = demo.open_frames(write_recording(tmp_path / f"{hw[0]}.h5", hw, 0.1), (64, 64))
        frames = list(frames)
        assert size == want and scale * want[0] == hw[0] and frames[0][1].shape == (20, *want) and frames[1][0] - frames[0][0] == 50_000


def test_demo_leaves_nothing_behind_a_bad_recording(tmp_path, checkpoint):
    whole = write_recording(tmp_path / "whole.h5", events=200_000)
    cut, empty, text = tmp_path / "cut.h5", write_recording(tmp_path / "empty.h5", events=0), tmp_path / "notes.txt"
    cut.write_bytes(whole.read_bytes()[:100_000])
    text.write_text("hello")
    for path in (cut, empty, text, tmp_path / "nowhere.h5", tmp_path / "nowhere"):
        with pytest.raises((ValueError, OSError), match=path.name):
            demo.main([f"--ckpt={checkpoint}", f"--recording={path}", f"--out={tmp_path / 'out.gif'}", f"--boxes={tmp_path / 'b.npy'}"])
    assert {p.name for p in tmp_path.iterdir()} == {"whole.h5", "cut.h5", "empty.h5", "notes.txt", "ckpt.pt"}
    for words in ([], ["--recording=x.h5", "--out=x.avi"]):
        with pytest.raises(ValueError, match="expected --recording"):
            demo.main([f"--ckpt={checkpoint}", *words])


def test_frames_are_drawn_with_their_polarities_boxes_and_labels():
    events = np.zeros((20, 48, 480), np.uint8)
    events[0, 40, 5], events[15, 40, 6] = 9, 9
    image = np.asarray(demo.draw(events, some_boxes(0, [(200, 20, 30, 15)], 1, 0.5), NAMES, some_boxes(0, [(300, 20, 30, 15)])))
    assert image.shape == (48, 480, 3)
    assert image[40, 5, 2] > image[40, 5, 0] and image[40, 6, 0] > image[40, 6, 2]  # blue is negative, orange positive
    assert (image[20, 310] == 255).all() and (image[35, 210] != demo.BACKGROUND).any()



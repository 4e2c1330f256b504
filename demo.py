"""A checkpoint and a recording -> an annotated video, and the detections as a file.

In: a checkpoint and a recording of any format that prepare.py reads, or a prepared sequence's folder; it is streamed in
windows of 50 ms, state carried, in memory that grows by the detections only. Out: a GIF or an mp4 (imageio-ffmpeg),
and with --boxes the detections in Prophesee's box format.

    python demo.py --ckpt out/ckpt.pt --recording drive.raw --out drive.gif --boxes drive_bbox.npy
"""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import GifImagePlugin, Image
from tqdm import tqdm

from checkpoint import load_detector, read_checkpoint
from configurator import command_line, configure
from data import Sequence, load_classes
from detect import StreamDetector
from formats import WINDOW_US, histogram, reading, require, write
from pictures import draw
from prepare import Recording, windows
from train import resolve_device

# Of train.py or RVT; .h5 .hdf5 .dat .raw .evt2 .evt3 ..., or the folder of a prepared sequence; video, .gif or .mp4, in
# real time; detections in pixels of the sensor, .npy, empty: none.
ckpt, recording, out, boxes = "out/ckpt.pt", "", "out/demo.gif", ""
confidence, height, width = 0.3, 0, 0  # least p_obj * p_cls, the score in video and file; px, if a recording tells none
class_names, device, dtype = (), "auto", "float32"  # for checkpoints without names; also cpu, cuda:1; bfloat16, float16
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}


def open_frames(path, input_hw, height=0, width=0):
    """((H, W), scale, number of frames or None, iterator of (time in us, frame uint8 (20, H, W))) of a recording.

    path: a recording, or the folder of a prepared sequence. A recording about twice as wide as input_hw, the detector's
    input, is read at half resolution, as in training: then scale is 2, pixels of the sensor for one of the frame.
    """
    if Path(path).is_dir():
        file = Sequence(path)
        return file.hw, 1, file.length, ((int(t), file.read(k, k + 1)[0]) for k, t in enumerate(file.timestamps_us))
    file = Recording(path, height, width)
    H, W = file.height, file.width
    scale, how = (2, "nearest") if W >= 1.5 * input_hw[1] else (1, "none")
    frames = ((file.first_us + k * WINDOW_US, histogram(*chunk, H, W, how)) for k, chunk in enumerate(windows(file), 1))
    return (H // scale, W // scale), scale, None, frames


def open_video(path, size, stack):
    """Function that appends a picture of `size` to a new GIF or mp4, at once; `stack` (ExitStack) ends the file."""
    if path.suffix == ".mp4":
        with reading("mp4 needs: pip install imageio-ffmpeg"):
            import imageio_ffmpeg
        writer = imageio_ffmpeg.write_frames(str(path), size, fps=20, macro_block_size=2)
        stack.callback(writer.close)
        writer.send(None)
        return lambda picture: writer.send(picture.tobytes())
    file = stack.enter_context(open(path, "wb"))
    file.write(b"GIF89a" + np.array(size, "<u2").tobytes() + b"\0\0\0!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
    stack.callback(file.write, b";")
    return lambda picture: file.writelines(GifImagePlugin.getdata(
        picture.quantize(256, Image.Quantize.FASTOCTREE), duration=50, include_color_table=True))


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    if not config.recording or config.out[-4:] not in (".gif", ".mp4") or config.boxes[-4:] not in ("", ".npy"):
        raise ValueError("expected --recording=FILE, --out=FILE.gif or FILE.mp4, and perhaps --boxes=FILE.npy")
    (device, dtype), saved, found = resolve_device(config), read_checkpoint(config.ckpt), []
    trained_hw = saved.get("model_config", {}).get("input_hw", (360, 640))  # RVT's do not tell
    hw, scale, total, frames = open_frames(config.recording, trained_hw, config.height, config.width)
    model = load_detector(config.ckpt, hw).to(device)
    names = config.class_names or saved.get("config", {}).get("class_names")
    names = load_classes(config.recording, names, model.config.num_classes)
    detector = StreamDetector(model, dtype, confidence=config.confidence, score="obj*cls")
    part = Path(config.out).with_name(f".partial-{Path(config.out).name}")
    part.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleaning:
        cleaning.callback(part.unlink, missing_ok=True)
        with ExitStack() as stack:
            append = open_video(part, draw(np.zeros((20, *hw), np.uint8), (), names).size, stack)
            for t_us, frame in tqdm(frames, "detecting", total, unit=" frames"):
                found.append(detector(frame, t_us))
                append(draw(frame, found[-1], names))
        require(found, f"{config.recording}: no events in it")
        found = np.concatenate(found)
        for name in "xywh":
            found[name] *= scale
        if config.boxes:
            write(config.boxes, lambda file: np.save(file, found))
        part.replace(config.out)
    print(f"{config.out}: frames of {hw}, trained on {trained_hw}; ms a frame: {detector.speed()}")


if __name__ == "__main__":
    command_line(main)

"""A checkpoint and a recording -> an annotated video, and the detections as a file.

In: a checkpoint and a recording of any format that prepare.py reads, or a prepared sequence's
folder; it is read whole to check it, then streamed in windows of 50 ms, state carried, in memory
that grows by the detections only. Out: a GIF or an mp4 (imageio-ffmpeg), and with --boxes the
detections in Prophesee's format.

    python demo.py --ckpt out/ckpt.pt --recording drive.raw --out drive.gif --boxes found.npy
"""

import itertools
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import GifImagePlugin, Image
from tqdm import tqdm

from checkpoint import load_detector, read_checkpoint
from configurator import command_line, configure
from data import Sequence, load_classes
from detect import StreamDetector
from formats import SCALES, WINDOW_US, histogram, reading, write
from pictures import draw
from prepare import Recording, windows
from train import resolve_device

defaults = {
    "ckpt": "out/ckpt.pt",  # of train.py or RVT
    "recording": "",        # .h5 .dat .raw .evt2 .evt3 ..., or a prepared sequence's folder
    "out": "out/demo.gif",  # video in real time, .gif or .mp4
    "boxes": "",            # .npy for the detections, in pixels of the sensor; empty: none
    "confidence": 0.3,      # least p_obj * p_cls, the score in video and file
    "height": 0,            # pixels of the sensor, where a recording does not tell
    "width": 0,
    "class_names": (),      # for checkpoints without names
    "device": "auto",       # auto | cpu | cuda | cuda:1
    "dtype": "float32",     # auto | float32 | bfloat16 | float16
}


def open_frames(path, input_hw, height=0, width=0):
    """(scale, iterator of (time in us, frame (20, H, W))) of a recording or a prepared sequence.

    A recording about twice as wide as input_hw, the detector's input, is read at half resolution,
    as in training: then scale is 2, pixels of the sensor for one of the frame.
    """
    if Path(path).is_dir():
        sequence = Sequence(path)
        frames = (sequence.read(k, k + 1)[0] for k in range(sequence.length))
        return 1, zip(sequence.timestamps_us, frames)

    recording = Recording(path, height, width)
    hw = recording.height, recording.width
    downsample = "none"
    if recording.width >= 1.5 * input_hw[1]:
        downsample = "nearest"
    frames = (
        (recording.first_us + k * WINDOW_US, histogram(*events, *hw, downsample))
        for k, events in enumerate(windows(recording), 1)
    )
    return SCALES[downsample], frames


def write_gif(path, size):
    """Generator that writes each picture sent to it, the bytes of its RGB, as write_mp4 does.

    Each goes to the file at once: Image.save would keep all in memory until the last.
    """
    with open(path, "wb") as file:
        blank = Image.new("P", size)
        file.writelines(GifImagePlugin.getheader(blank, info={"loop": 0})[0])
        try:
            while True:
                picture = Image.frombytes("RGB", size, (yield))
                picture = picture.quantize(method=Image.Quantize.FASTOCTREE)
                data = GifImagePlugin.getdata(picture, duration=50, include_color_table=True)
                file.writelines(data)
        finally:
            file.write(b";")


def write_mp4(path, size):
    """Generator that writes each picture sent to it. ValueError without imageio-ffmpeg."""
    with reading("mp4 needs: pip install imageio-ffmpeg"):
        import imageio_ffmpeg
    return imageio_ffmpeg.write_frames(str(path), size, fps=20, macro_block_size=2)


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    out = Path(config.out)
    writers = {".gif": write_gif, ".mp4": write_mp4}
    if not config.recording or out.suffix not in writers or config.boxes[-4:] not in ("", ".npy"):
        raise ValueError(
            "expected --recording=FILE, --out=FILE.gif or FILE.mp4, and perhaps --boxes=FILE.npy"
        )

    if config.boxes and Path(config.boxes).exists():  # labels, perhaps
        raise ValueError(f"{config.boxes} is there already; give another name to --boxes")

    # the detector, for frames of the recording's size
    device, dtype = resolve_device(config)
    saved = read_checkpoint(config.ckpt)
    input_hw = saved.get("model_config", {}).get("input_hw", (360, 640))  # RVT's do not tell
    scale, frames = open_frames(config.recording, input_hw, config.height, config.width)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{config.recording}: no events in it")
    model = load_detector(config.ckpt, first[1].shape[1:]).to(device)
    names = config.class_names or saved.get("config", {}).get("class_names")
    # no dataset.json there: it makes numbers names, and counts them
    names = load_classes(config.recording, names, model.config.num_classes)
    detector = StreamDetector(model, dtype, confidence=config.confidence, score="obj*cls")

    # the video gets its name when it is whole
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".partial-{out.name}")
    size = draw(first[1], (), names).size
    found = []
    try:
        with closing(writers[out.suffix](part, size)) as video:
            next(video)
            stream = itertools.chain([first], frames)
            for t_us, frame in tqdm(stream, "detecting", unit=" frames"):
                boxes = detector(frame, t_us)
                video.send(draw(frame, boxes, names).tobytes())
                for name in "xywh":
                    boxes[name] *= scale
                found.append(boxes)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    if config.boxes:
        write(config.boxes, lambda file: np.save(file, np.concatenate(found)))
    print(f"{out}: {len(found)} frames of {size}")


if __name__ == "__main__":
    command_line(main)

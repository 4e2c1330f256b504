"""A checkpoint and a recording -> an annotated video, and the detections as a file.

In: a checkpoint and a recording of any format that prepare.py reads, or a prepared sequence's folder; it is streamed in
windows of 50 ms, state carried, in memory that does not grow with its length. Out: a GIF or an mp4 (imageio-ffmpeg),
and with --boxes the detections in Prophesee's box format.

    python demo.py --ckpt out/ckpt.pt --recording drive.raw --out drive.gif --boxes drive_bbox.npy
"""

import collections
import colorsys
import contextlib
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont
from tqdm import tqdm

from configurator import command_line, configure
from data import BOX_DTYPE, Sequence
from eval import StreamDetector, load_detector
from model import keep_buffers, read_checkpoint
from prepare import WINDOW_US, histogram, open_recording, windows
from train import resolve_device

ckpt = "out/ckpt.pt"  # checkpoint of train.py, or of RVT
recording = ""        # .h5 .hdf5 .dat .raw .evt2 .evt3 ..., or the folder of a prepared sequence
out = "out/demo.gif"  # video, .gif or .mp4
boxes = ""            # detections in pixels of the sensor, .npy; empty: none
confidence = 0.3      # least p_obj * p_cls of a detection; its score in the video and in the file
height = 0            # px, of a recording that does not tell its size
width = 0
fps = 20.0            # frames a second of the video; 20 is real time
device = "auto"       # auto, cpu, cuda, cuda:1
dtype = "float32"     # float32, bfloat16 or float16
class_names = ()      # for checkpoints without names
partition_split = 0   # of RVT's checkpoints; 0: the default rule
dim_head = 32         # of RVT's checkpoints
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

BACKGROUND, COLOURS = (20, 22, 28), ((90, 150, 255), (255, 140, 40))  # of negative and of positive events


def draw(events, detections, class_names, truth=()):
    """Picture (PIL, RGB) of a frame: negative events blue, positive orange, detections in class colours, labels white.

    events (20, H, W) uint8; detections, truth: boxes in its pixels. Small frames are enlarged, to 480 px at least.
    """
    def corners(box):  # within the picture, whatever a detector puts out
        edges = np.array((box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])) * scale
        return np.nan_to_num(edges).clip(0, (W * scale - 1, H * scale - 1) * 2).tolist()

    H, W = events.shape[1:]
    scale = -(-480 // W)
    counts = events.reshape(2, 10, H, W).sum(1).clip(0, 4)[..., None] / 4
    pixels = BACKGROUND + sum(count * np.subtract(colour, BACKGROUND) for count, colour in zip(counts, COLOURS))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((W * scale, H * scale), Image.NEAREST)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for box in truth:
        canvas.rectangle(corners(box), outline="white")
    for box in detections:
        x1, y1, x2, y2 = corners(box)
        colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(0.12 + box["class_id"] * 0.618 % 1, 0.55, 1))
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        text = f"{class_names[box['class_id']]} {box['class_confidence']:.2f}"
        place = canvas.textbbox((x1, max(y1 - 16, 0)), text, font=font)
        canvas.rectangle(place, fill=BACKGROUND)
        canvas.text(place[:2], text, fill=colour, font=font, anchor="lt")
    return image


def open_frames(path, input_hw, height=0, width=0):
    """((H, W), scale, number of frames or None, iterator of (time in us, frame uint8 (20, H, W))) of a recording.

    path: a recording, or the folder of a prepared sequence. A recording about twice as wide as input_hw, the detector's
    input, is read at half resolution, as in training: then scale is 2, pixels of the sensor for one of the frame.
    """
    if os.path.isdir(path):
        sequence = Sequence(path)
        frames = ((int(t), sequence.read(k, k + 1)[0]) for k, t in enumerate(sequence.timestamps_us))
        return sequence.hw, 1, sequence.length, frames
    recording = open_recording(path, height, width)
    H, W = recording.height, recording.width
    scale, how = (2, "nearest") if W >= 1.5 * input_hw[1] else (1, "none")
    frames = ((recording.first_us + k * WINDOW_US, histogram(*events, H, W, how))
              for k, events in enumerate(windows(recording), 1))
    return (H // scale, W // scale), scale, None, frames


@contextlib.contextmanager
def open_video(path, size, fps):
    """Function that appends a picture of `size` to a new GIF or mp4, at once, so that memory holds one of them."""
    if path.suffix == ".mp4":
        try:
            from imageio_ffmpeg import write_frames
        except ImportError:
            raise ValueError(f"{path.name}: mp4 needs a package: pip install imageio-ffmpeg; or write a .gif") from None
        with contextlib.closing(write_frames(str(path), size, fps=fps, macro_block_size=2)) as writer:
            writer.send(None)
            yield lambda picture: writer.send(picture.tobytes())
        return
    with open(path, "wb") as file:
        file.write(struct.pack("<6sHHBBB", b"GIF89a", *size, 0, 0, 0) + b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
        yield lambda picture: file.writelines(GifImagePlugin.getdata(
            picture.quantize(256, Image.Quantize.FASTOCTREE), duration=1000 / fps, include_color_table=True))
        file.write(b";")


def play(detector, frames, scale, class_names, append, file):
    """Detect and draw frame by frame; ms of the last 1000 frames. append: open_video's; file: takes the boxes."""
    ms, count, header = collections.deque(maxlen=1000), 0, {"descr": BOX_DTYPE.descr, "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, {**header, "shape": (count,)})
    for t_us, frame in frames:
        start = time.perf_counter()
        boxes = detector(frame, t_us)
        ms.append(1000 * (time.perf_counter() - start))
        append(draw(frame, boxes, class_names))
        for name in "xywh":
            boxes[name] *= scale
        file.write(boxes.tobytes())
        count += len(boxes)
    file.seek(0)  # numpy leaves room in the header for the number to grow
    np.lib.format.write_array_header_1_0(file, {**header, "shape": (count,)})
    return ms


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    if not config.recording or config.out[-4:] not in (".gif", ".mp4") or config.boxes[-4:] not in ("", ".npy"):
        raise ValueError("expected --recording=FILE, --out=FILE.gif or FILE.mp4, and perhaps --boxes=FILE.npy")
    keep_buffers()
    device, dtype = resolve_device(config)
    rvt = dict(partition_split=config.partition_split, dim_head=config.dim_head)
    model = load_detector(config.ckpt, **rvt)
    names = config.class_names or read_checkpoint(config.ckpt).get("config", {}).get("class_names", ())
    names = [*names, *map(str, range(len(names), model.config.num_classes))]
    hw, scale, total, frames = open_frames(config.recording, model.config.input_hw, config.height, config.width)
    if hw != model.config.input_hw:
        print(f"frames are {hw}, but the detector was trained at {model.config.input_hw}: rebuilt with its weights; it "
              f"may miss objects of other sizes in pixels than in training")
        model = load_detector(config.ckpt, hw, **rvt)
    detector = StreamDetector(model.to(device), dtype, confidence=config.confidence, score="obj*cls")
    size = draw(np.zeros((20, *hw), np.uint8), (), names).size
    files = {name: Path(name).with_name(f".partial-{Path(name).name}") for name in (config.out, config.boxes) if name}
    try:
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with (open_video(files[config.out], size, config.fps) as append,
              open(files.get(config.boxes, os.devnull), "wb") as file):
            ms = play(detector, tqdm(frames, "detecting", total, unit=" frames"), scale, names, append, file)
        if not ms:
            raise ValueError(f"{config.recording}: no events in it")
        for name, path in files.items():
            path.replace(name)
    finally:
        for path in files.values():
            path.unlink(missing_ok=True)
    median, p95 = np.percentile(ms, (50, 95))
    print(f"{', '.join(files)}: {median:.1f} ms a frame, 95th percentile {p95:.1f} ms, on {device}, {config.dtype}")


if __name__ == "__main__":
    command_line(main)

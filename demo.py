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
import torch
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont
from tqdm import tqdm

from configurator import command_line, configure
from data import BOX_DTYPE, Sequence
from eval import StreamDetector, load_detector
from model import keep_buffers, read_checkpoint
from prepare import WINDOW_US, histogram, open_recording, windows

ckpt = "out/ckpt.pt"  # checkpoint of train.py, or of RVT
recording = ""        # .h5 .hdf5 .dat .raw .evt2 .evt3 ..., or the folder of a prepared sequence
out = "out/demo.gif"  # video, .gif or .mp4; empty: none
boxes = ""            # detections, .npy; empty: none
confidence = 0.3      # least p_obj * p_cls of a detection; its score in the video and in the file
height = 0            # px, of a recording that does not tell its size
width = 0
fps = 20.0            # frames a second of the video; 20 is real time
device = "auto"       # auto, cpu or cuda
class_names = ()      # for checkpoints without names
partition_split = 0   # of RVT's checkpoints; 0: the default rule
dim_head = 32         # of RVT's checkpoints
defaults = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (bool, int, float, str, tuple))}

BACKGROUND, COLOURS = (20, 22, 28), ((90, 150, 255), (255, 140, 40))  # of negative and of positive events


def draw(events, detections, class_names, truth=()):
    """Picture (PIL, RGB) of a frame: negative events blue, positive orange, detections in class colours, labels white.

    events (20, H, W) uint8; detections, truth: boxes in its pixels. Small frames are enlarged, to 480 px at least.
    """
    H, W = events.shape[1:]
    scale = -(-480 // W)
    counts = events.reshape(2, 10, H, W).sum(1).clip(0, 4)[..., None] / 4
    pixels = BACKGROUND + sum(count * np.subtract(colour, BACKGROUND) for count, colour in zip(counts, COLOURS))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((W * scale, H * scale), Image.NEAREST)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for kind, group in ((0, truth), (1, detections)):
        for box in group:
            x1, y1 = max(box["x"] * scale, 0), max(box["y"] * scale, 0)
            x2, y2 = max((box["x"] + box["w"]) * scale, x1), max((box["y"] + box["h"]) * scale, y1)
            hue = colorsys.hsv_to_rgb(0.12 + box["class_id"] * 0.618 % 1, 0.55, 1)
            colour = tuple(int(255 * c) for c in hue) if kind else "white"
            canvas.rectangle((x1, y1, x2, y2), outline=colour, width=1 + kind)
            if kind:
                text = f"{class_names[box['class_id']]} {box['class_confidence']:.2f}"
                place = canvas.textbbox((x1, max(y1 - 16, 0)), text, font=font)
                canvas.rectangle(place, fill=BACKGROUND)
                canvas.text(place[:2], text, fill=colour, font=font, anchor="lt")
    return image


def open_frames(path, input_hw, height=0, width=0):
    """((H, W), number of frames or None, iterator of (time in us, frame uint8 (20, H, W))) of a recording.

    path: a recording, or the folder of a prepared sequence. A recording about twice as wide as input_hw, the detector's
    input, is read at half resolution as in training.
    """
    if os.path.isdir(path):
        sequence = Sequence(path)
        return sequence.hw, sequence.length, ((int(t), sequence.read(k, k + 1)[0])
                                              for k, t in enumerate(sequence.timestamps_us))
    recording = open_recording(path, height, width)
    H, W = recording.height, recording.width
    half = W >= 1.5 * input_hw[1]

    def stream():
        for k, events in enumerate(windows(recording), 1):
            yield recording.first_us + k * WINDOW_US, histogram(*events, H, W, "nearest" if half else "none")

    return ((H // 2, W // 2) if half else (H, W)), None, stream()


def video_writer(path, size, fps):
    """Generator that writes each picture sent to it at once, as GIF or mp4 by the path's ending; close() ends the file."""
    if path.suffix == ".mp4":
        try:
            from imageio_ffmpeg import write_frames
        except ImportError:
            raise ValueError(f"{path.name}: mp4 needs an optional package: pip install imageio-ffmpeg; or write a .gif") from None
        writer = write_frames(str(path), size, fps=fps, macro_block_size=2)
        writer.send(None)
        with contextlib.closing(writer):
            while True:
                writer.send((yield).tobytes())
    with open(path, "wb") as file:
        file.write(struct.pack("<6sHHBBB", b"GIF89a", *size, 0, 0, 0) + b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
        try:
            while True:
                picture = (yield).quantize(256, Image.Quantize.FASTOCTREE)
                file.writelines(GifImagePlugin.getdata(picture, duration=1000 / fps, include_color_table=True))
        finally:
            file.write(b";")


def play(config, detector, frames, total, class_names, video, boxes):
    """Detect and draw frame by frame into the files `video` and `boxes` (None: not wanted); ms a frame, of the last 1000."""
    ms, writer, count = collections.deque(maxlen=1000), None, 0
    header = {"descr": BOX_DTYPE.descr, "fortran_order": False}
    with contextlib.ExitStack() as stack:
        file = boxes and stack.enter_context(open(boxes, "wb"))
        if file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
        for t_us, frame in tqdm(frames, "detecting", total, unit=" frames"):
            start = time.perf_counter()
            found = detector(frame, t_us)
            ms.append(1000 * (time.perf_counter() - start))
            count += len(found)
            if video:
                picture = draw(frame, found, class_names)
                if writer is None:
                    writer = stack.enter_context(contextlib.closing(video_writer(video, picture.size, config.fps)))
                    writer.send(None)
                writer.send(picture)
            if file:
                found.tofile(file)
        if file:
            file.seek(0)  # numpy leaves room in the header for the number to grow
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (count,)})
    if not ms:
        raise ValueError(f"{config.recording}: no events in it")
    return ms


def main(argv):
    config = SimpleNamespace(**configure(defaults, argv))
    if not config.recording or config.out[-4:] not in ("", ".gif", ".mp4") or config.boxes[-4:] not in ("", ".npy"):
        raise ValueError("expected --recording=FILE, --out=FILE.gif or .mp4 (empty: none), --boxes=FILE.npy or none")
    keep_buffers()
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    rvt = dict(partition_split=config.partition_split, dim_head=config.dim_head)
    model = load_detector(config.ckpt, **rvt)
    names = config.class_names or read_checkpoint(config.ckpt).get("config", {}).get("class_names")
    names = names or tuple(map(str, range(model.config.num_classes)))
    hw, total, frames = open_frames(config.recording, model.config.input_hw, config.height, config.width)
    if hw != model.config.input_hw:
        print(f"frames of {hw}, but the detector was trained at {model.config.input_hw}: rebuilt for {hw} with the same "
              f"weights; objects of other sizes than in training may be missed")
        model = load_detector(config.ckpt, hw, **rvt)
    detector = StreamDetector(model.to(device), confidence=config.confidence, score="obj*cls")
    targets = [Path(name) if name else None for name in (config.out, config.boxes)]
    partial = [target and target.with_name(f".partial-{target.name}") for target in targets]
    try:
        for target in filter(None, targets):
            target.parent.mkdir(parents=True, exist_ok=True)
        ms = play(config, detector, frames, total, names, *partial)
        for source, target in zip(partial, targets):
            source and os.replace(source, target)
    finally:
        for source in filter(None, partial):
            source.unlink(missing_ok=True)
    print(f"{', '.join(filter(None, (config.out, config.boxes)))}: {np.median(ms):.1f} ms a frame (median), "
          f"{np.percentile(ms, 95):.1f} ms (95th percentile) on {device}")


if __name__ == "__main__":
    command_line(main)

"""Long runs of detect.py in constant memory; SOAK=1 runs them."""

import os
from pathlib import Path

import numpy as np
import torch

from conftest import MemorySequence, random_events, small_detector, soak
from detect import StreamDetector, run


def resident_mb():
    """Memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak_detector():
    torch.set_num_threads(1)
    model = small_detector(hw=(32, 64), small_object_attention=True)
    for head in model.heads:
        head.cls_pred.bias.data.fill_(0.5)  # boxes with p_obj * p_cls of some 0.4
    return model


@soak
def test_stream_detector_takes_twenty_thousand_frames_in_constant_memory():
    detector = StreamDetector(soak_detector(), confidence=0.3)
    events = random_events(50, 20, 32, 64)
    for k in range(20_000):
        detector(events[k % 50])
        if k == 2000:
            before = resident_mb()
    assert resident_mb() - before < 20


class EndlessSequence(MemorySequence):
    """20,000 frames, a hundred of them labelled; notes what memory is in use as it is read."""

    def __init__(self):
        super().__init__("a", 50, range(0, 50, 5), (32, 64))
        self.length = 20_000
        self.label_frames = np.arange(199, 20_000, 200)
        self.boxes = 10 * self.boxes
        self.memory = []

    def read(self, start, stop, out):
        self.memory.append(resident_mb())
        out[:] = self.data[start % 50 : start % 50 + 1]


@soak
def test_run_takes_twenty_thousand_frames_in_constant_memory():
    sequence = EndlessSequence()
    labels, found = run(soak_detector(), [sequence], 1, 5, confidence=0.3)
    kept = sum(boxes.nbytes for boxes in found) / 1e6
    memory = sequence.memory
    assert len(found) == len(labels) == 100
    assert memory[-1] - memory[len(memory) // 10] < 20 + kept

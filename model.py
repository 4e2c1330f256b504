"""Event frames -> box predictions: MaxViT-RNN backbone, pyramid over 2 to 4 scales, YOLOX head.

In: uint8 event histograms (T, B, 20, H, W) and the recurrent state of each stream. Out: boxes with
logits for every anchor of the chosen frames, and the next state. Only the recurrent cells look back
in time, so each stage runs its convolution and attention on all T * B frames at once and then scans
its cell over T. Source: RVT, arXiv 2212.05598.

    model = Detector(ModelConfig(input_hw=(360, 640), num_classes=8))
    prediction, state = model(events)
"""

import dataclasses
import math
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from itertools import islice, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from formats import CHANNELS

Prediction = namedtuple("Prediction", "box_cxcywh obj cls grid")


@dataclasses.dataclass
class ModelConfig:
    """All that decides the network's shape. Saved in every checkpoint; its fields are config keys.

    ValueError names a value that cannot work.
    """

    input_hw: tuple = (0, 0)       # rows and columns of the event frames; (0, 0): from the data
    patch_size: int = 4            # stride of the first stage: 2, 3 or 4
    partition_split: int = 0       # a map at 8 * patch_size has split x split attention groups; 0:
                                   # the split whose groups are nearest to 60 tokens
    embed_dim: int = 64            # width of stage 1; doubles with each stage
    dim_head: int = 32             # width of an attention head
    fpn_stages: tuple = (2, 3, 4)  # stages in the pyramid: 2 to 4 neighbours, finest first
    fpn_depth: float = 0.67        # a CSP layer has round(3 * depth) bottlenecks
    num_classes: int = 0           # 0: from the data
    small_object_attention: bool = False  # on the pyramid's outputs
    attention_spatial: bool = True        # its spatial part
    attention_temporal: bool = True       # its temporal part
    checkpointing: bool = False    # recompute activations in the backward pass: less memory, slower

    def __post_init__(self):
        choices = {
            "patch_size": (2, 3, 4),
            "partition_split": range(100),
            "embed_dim": range(8, 4097, 8),
            "dim_head": [d for d in range(1, 129) if self.embed_dim % d == 0],
            "fpn_stages": ((1, 2), (2, 3), (3, 4), (1, 2, 3), (2, 3, 4), (1, 2, 3, 4)),
        }
        for key, allowed in choices.items():
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"{key}={value}: expected one of {allowed}")

        self.input_hw = tuple(self.input_hw)
        # width and stride of each level of the pyramid
        self.dims = [self.embed_dim * 2 ** (k - 1) for k in self.fpn_stages]
        self.strides = tuple(self.patch_size * 2 ** (k - 1) for k in self.fpn_stages)
        # tokens of an attention group (rows, columns), in every stage; the input that groups tile
        unit = 8 * self.patch_size * max(self.partition_split, 1)
        ph, pw = (math.ceil(size / unit) for size in self.input_hw)
        self.part = (ph, pw)
        self.padded_hw = (unit * ph, unit * pw)

    def resolved(self):
        """Copy with the partition split decided; ValueError while size or classes are unknown."""
        if min(*self.input_hw, self.num_classes) < 1:
            raise ValueError(f"unknown: input_hw {self.input_hw} or num_classes {self.num_classes}")
        if self.partition_split:
            return self
        splits = [dataclasses.replace(self, partition_split=split) for split in range(1, 9)]
        return min(splits, key=lambda config: abs(math.log(math.prod(config.part) / 60)))


# ---- recomputation in the backward pass

@contextmanager
def frozen_statistics(module):
    """Batch norms of `module` normalise as usual inside; then their statistics are as before."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:  # torch ends a recomputation early, by an exception
        for buffer, value in zip(module.buffers(), before):
            buffer.data = value  # autograd would take a write in place for a change


class Recomputable(nn.Module):
    """A module that can keep only its inputs for the backward pass, which computes the rest again.

    `recompute` says where it does. Batch statistics still move once a step.
    """

    recomputed = False

    def __call__(self, *args):
        if not self.recomputed or not torch.is_grad_enabled():
            return super().__call__(*args)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        # a compiler does not repeat side effects, and takes no contexts
        if not torch.compiler.is_compiling():
            options["context_fn"] = lambda: (nullcontext(), frozen_statistics(self))
        return checkpoint(super().__call__, *args, **options)


def recompute(module):
    """Recompute the parts of `module` that can be, each as a whole."""
    for part in module.children():
        if isinstance(part, Recomputable):
            part.recomputed = True
        else:
            recompute(part)


# ---- backbone

# Groups of ph x pw tokens that attend to each other: neighbours, or tokens H / ph rows and
# W / pw columns apart.
LAYOUT = {
    "window": "b (nh ph) (nw pw) c",
    "grid": "b (ph nh) (pw nw) c",
}
GROUPS = "(b nh nw) (ph pw) c"


class PartitionAttention(Recomputable):
    """Self-attention and MLP in windows or grids of a map, each with pre-norm, scale and residual.

    x (B, H, W, C) -> like x; part = (ph, pw) divides (H, W). Source: MaxViT, arXiv 2204.01697.
    """

    def __init__(self, dim, dim_head, part, mode):
        super().__init__()
        self.part = part
        self.layout = LAYOUT[mode]
        self.dim_head = dim_head
        # windows come first in a stage, whose input was just normalised
        self.norm1 = nn.LayerNorm(dim) if mode == "grid" else nn.Identity()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale1 = nn.Parameter(torch.full((dim,), 1e-5))  # CaiT, arXiv 2103.17239
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.scale2 = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        H, W = x.shape[1:3]
        ph, pw = self.part
        sizes = dict(ph=ph, pw=pw, nh=H // ph, nw=W // pw)
        # the tokens stay in groups through attention and MLP
        x = rearrange(x, f"{self.layout} -> {GROUPS}", **sizes)

        qkv = self.qkv(self.norm1(x))
        qkv = rearrange(qkv, "g n (heads qkv d) -> qkv g heads n d", qkv=3, d=self.dim_head)
        attended = F.scaled_dot_product_attention(*qkv)
        attended = rearrange(attended, "g heads n d -> g n (heads d)")
        x = x + self.scale1 * self.proj(attended)

        hidden = F.gelu(self.fc1(self.norm2(x)))
        x = x + self.scale2 * self.fc2(hidden)
        return rearrange(x, f"{GROUPS} -> {self.layout}", **sizes)


class LSTMCell(Recomputable):
    """LSTM whose gates are 1x1 convolutions of a map: every position has a memory of its own.

    x (B, H, W, C), state h and c like x, c in float32  ->  next h and c.

    Another cell goes here: `states` is the number of tensors in its state, each of x's shape, zero
    at the start of a stream and float32 between calls of the detector; forward(x, *state) returns
    the next state, of which the first tensor is the output. The attribute of a stage stays `lstm`:
    it is part of the weights' names.
    """

    states = 2

    def __init__(self, dim):
        super().__init__()
        self.gates = nn.Linear(2 * dim, 4 * dim)

    def forward(self, x, h, c):
        C = x.shape[-1]
        both = torch.cat((x, h.to(x.dtype)), dim=-1)
        gates, new = self.gates(both).split((3 * C, C), dim=-1)
        forget, update, output = gates.sigmoid().chunk(3, dim=-1)
        c = forget * c + update * new.tanh()
        h = output * c.tanh()
        return h.to(x.dtype), c


class Stage(nn.Module):
    """Downsampling, window and grid attention on all frames, then a cell over time.

    k = 0..3; fpn_stages counts from 1
    x (T * B, C_in, H, W), the cell's state (B, H / f, W / f, C) each
    -> features (T * B, C, H / f, W / f), like x in dtype, and the next state in float32
    """

    def __init__(self, config, k):
        super().__init__()
        dim = config.embed_dim * 2 ** k
        dim_in = dim // 2 if k else CHANNELS
        factor = 2 if k else config.patch_size
        self.conv = nn.Conv2d(dim_in, dim, 2 * factor - 1, factor, factor - 1, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.Sequential(
            PartitionAttention(dim, config.dim_head, config.part, "window"),
            PartitionAttention(dim, config.dim_head, config.part, "grid"),
        )
        self.lstm = LSTMCell(dim)
        self.checkpointing = config.checkpointing

    def forward(self, x, *state):
        B = len(state[0])
        tokens = self.norm(self.conv(x).permute(0, 2, 3, 1))  # (T * B, H / f, W / f, C)
        # attention takes all frames at once, or is recomputed for one time step at a time
        parts = tokens.split(B) if self.checkpointing else [tokens]
        features = []
        for part in parts:
            part = self.attention(part).to(x.dtype)  # scales and norms make float32 of it
            for x_t in part.split(B):
                state = self.lstm(x_t, *state)
                features.append(state[0])
        features = torch.cat(features).permute(0, 3, 1, 2)  # (T * B, C, H / f, W / f)
        return features, [s.float() for s in state]


# ---- pyramid

class Convs(Recomputable, nn.Sequential):
    """Layers one after the other, recomputed as one."""


class Conv(Convs):
    """Convolution + batch norm + SiLU: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, dim_in, dim_out, kernel=1, stride=1, dilation=1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)
        self.act = nn.SiLU()


class CSP(Recomputable):
    """Cross-stage partial layer: bottlenecks on half of the channels; the other half bypasses them.

    x (N, C_in, H, W) -> (N, C_out, H, W). Source: CSPNet, arXiv 1911.11929, as in YOLOX.
    """

    def __init__(self, dim_in, dim_out, depth):
        super().__init__()
        half = dim_out // 2
        self.conv1 = Conv(dim_in, half)
        self.conv2 = Conv(dim_in, half)
        self.conv3 = Conv(2 * half, dim_out)
        self.m = nn.Sequential()
        for _ in range(depth):
            self.m.append(nn.Sequential(Conv(half, half), Conv(half, half, 3)))

    def forward(self, x):
        bottlenecks = self.m(self.conv1(x))
        bypass = self.conv2(x)
        return self.conv3(torch.cat((bottlenecks, bypass), dim=1))


class PAFPN(nn.Module):
    """Path-aggregation pyramid over neighbouring scales, finest first.

    list of (N, C_i, H_i, W_i), C_i = config.dims -> the same shapes. Another pyramid does the same.
    Source: PANet, arXiv 1803.01534, as in YOLOX.
    """

    def __init__(self, config):
        super().__init__()
        depth = round(3 * config.fpn_depth)
        pairs = list(zip(config.dims, config.dims[1:]))  # of a level and the next coarser one
        self.lateral = nn.ModuleList(Conv(coarse, fine) for fine, coarse in pairs)
        self.top_down = nn.ModuleList(CSP(2 * fine, fine, depth) for fine, _ in pairs)
        self.down = nn.ModuleList(Conv(fine, fine, 3, stride=2) for fine, _ in pairs)
        self.bottom_up = nn.ModuleList(CSP(2 * fine, coarse, depth) for fine, coarse in pairs)

    def forward(self, features):
        # top-down: each level receives what the coarser ones know
        x = features[-1]
        laterals = []
        for i in reversed(range(len(self.lateral))):
            x = self.lateral[i](x)
            laterals.append(x)
            x = F.interpolate(x, scale_factor=2, mode="nearest-exact")
            x = self.top_down[i](torch.cat((x, features[i]), dim=1))
        # bottom-up: and then what the finer ones know
        outputs = [x]
        for down, bottom_up in zip(self.down, self.bottom_up):
            x = torch.cat((down(x), laterals.pop()), dim=1)
            x = bottom_up(x)
            outputs.append(x)
        return outputs


# ---- attention for small objects

class MultiScaleSpatialAttention(nn.Module):
    """x (N, C, H, W) -> x * a + x, a map a (N, 1, H, W) in 0..1 from three dilated convolutions."""

    def __init__(self, dim):
        super().__init__()
        width = dim // 3
        narrow = 3 * width // 4
        self.scales = nn.ModuleList(Conv(dim, width, 3, dilation=d) for d in (1, 2, 4))
        self.squeeze = Conv(3 * width, narrow)
        self.map = nn.Conv2d(narrow, 1, 1)

    def forward(self, x):
        scales = [scale(x) for scale in self.scales]
        a = self.squeeze(torch.cat(scales, dim=1))
        return x * self.map(a).sigmoid() + x


class ChannelAttention(nn.Sequential):
    """A weight in 0..1 for each channel: x (N, C, H, W) -> (N, C, 1, 1).

    Source: squeeze and excitation, arXiv 1709.01507.
    """

    def __init__(self, dim, hidden):
        super().__init__(
            nn.Linear(dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x):
        weights = super().forward(x.mean((-2, -1))).sigmoid()
        return weights[..., None, None]


class EventTemporalAttention(nn.Module):
    """Adds what three successive frames have in common, where the last two differ, by channel.

    x (T * B, C, H, W), past (B, 2, C, H, W): the two frames before the first, zeros at the start
    -> like x, and the next past
    """

    def __init__(self, dim):
        super().__init__()
        self.time = nn.Conv3d(dim, dim, (3, 1, 1), bias=False)
        self.bn = nn.BatchNorm3d(dim)
        self.motion = nn.Conv2d(2 * dim, 1, 3, padding=1)
        self.channel = ChannelAttention(dim, dim // 4)

    def forward(self, x, past):
        B = len(past)
        past = rearrange(past.to(x.dtype), "b t c h w -> (t b) c h w")
        frames = torch.cat((past, x))  # ((2 + T) * B, C, H, W)
        common = self.time(rearrange(frames, "(t b) c h w -> b c t h w", b=B))
        common = rearrange(self.bn(common), "b c t h w -> (t b) c h w")
        pairs = torch.cat((x, frames[B:-B]), dim=1)  # each frame and the one before
        motion = self.motion(pairs).sigmoid()  # (T * B, 1, H, W)
        channel = self.channel(common)  # (T * B, C, 1, 1)
        x = x + common * motion * channel
        past = rearrange(frames[-2 * B :], "(t b) c h w -> b t c h w", b=B)
        return x, past.float()


class SmallObjectAttention(nn.Module):
    """Spatial, then temporal attention, then a convolution that joins them.

    x (T * B, C, H, W), with temporal attention also its past (B, 2, C, H, W)
    -> like x, and a list that holds the next past, if any
    """

    def __init__(self, config, dim):
        super().__init__()
        spatial = config.attention_spatial
        temporal = config.attention_temporal
        self.spatial = MultiScaleSpatialAttention(dim) if spatial else nn.Identity()
        self.temporal = EventTemporalAttention(dim) if temporal else nn.Identity()
        self.join = Conv(dim, dim) if spatial and temporal else nn.Identity()

    def forward(self, x, *past):
        x = self.spatial(x)
        if past:
            x, *past = self.temporal(x, *past)
        return self.join(x), past


class ScaleAwareChannelAttention(nn.Module):
    """Channel attention times x (N, C, H, W), stronger from the start at small strides.

    That it depends on the stride is ours.
    """

    def __init__(self, dim, stride):
        super().__init__()
        fine = stride <= 8
        reduction = 16 if fine else 8
        self.fc = ChannelAttention(dim, max(1, dim // reduction))
        nn.init.constant_(self.fc[-1].bias, 1.0 if fine else 0.0)

    def forward(self, x):
        return x * self.fc(x)


# ---- head and detector

class Head(nn.Module):
    """Decoupled YOLOX head of one level: x (N, C, H, W) -> (N, H * W, 4 + 1 + K).

    The last axis holds box offsets, objectness, classes; the latter two start at a probability of
    0.01.
    Source: YOLOX, arXiv 2107.08430.
    """

    def __init__(self, dim_in, dim, num_classes):
        super().__init__()
        self.stem = Conv(dim_in, dim)
        self.cls_convs = Convs(Conv(dim, dim, 3), Conv(dim, dim, 3))
        self.reg_convs = Convs(Conv(dim, dim, 3), Conv(dim, dim, 3))
        self.cls_pred = nn.Conv2d(dim, num_classes, 1)
        self.reg_pred = nn.Conv2d(dim, 4, 1)
        self.obj_pred = nn.Conv2d(dim, 1, 1)
        for pred in (self.cls_pred, self.obj_pred):
            nn.init.constant_(pred.bias, -math.log(99))

    def forward(self, x):
        x = self.stem(x)
        cls = self.cls_pred(self.cls_convs(x))
        x = self.reg_convs(x)
        out = torch.cat((self.reg_pred(x), self.obj_pred(x), cls), dim=1)
        return out.flatten(2).transpose(1, 2)


def reset_state(state, is_first):
    """State with the rows of new sequences set to zero; is_first (B,) bool on the same device."""
    cleared = []
    for s in state:
        rows = is_first.view(-1, *[1] * (s.ndim - 1))
        cleared.append(s.masked_fill(rows, 0))
    return cleared


class Detector(nn.Module):
    """The whole network. `config` holds its resolved ModelConfig."""

    def __init__(self, config):
        super().__init__()
        config = config.resolved()
        self.config = config
        depth = config.fpn_stages[-1]
        self.stages = nn.ModuleList(Stage(config, k) for k in range(depth))
        self.fpn = PAFPN(config)
        head_dim = config.dims[-1] // 4
        self.heads = nn.ModuleList(
            Head(dim, head_dim, config.num_classes) for dim in config.dims
        )
        if config.small_object_attention:
            fine = config.dims[:2]
            self.attention = nn.ModuleList(SmallObjectAttention(config, dim) for dim in fine)
            channel_attention = map(ScaleAwareChannelAttention, config.dims, config.strides)
            self.channel_attention = nn.ModuleList(channel_attention)

        if config.checkpointing:
            recompute(self)

        # anchors: one a cell, level by level, row by row
        H, W = config.padded_hw
        cells = []
        for stride in config.strides:
            cells += product([stride], range(H // stride), range(W // stride))
        grid = torch.tensor(cells).flip(1).float()  # (A, 3): x, y, stride
        self.register_buffer("grid", grid, persistent=False)

        for p in self.parameters():
            if p.ndim == 4:
                p.data = p.data.to(memory_format=torch.channels_last)

    def initial_state(self, B):
        """Zeros for B new streams, a flat list of float32 tensors.

        Of each stage its cell's (B, H_k, W_k, C_k), then the attention's pasts (B, 2, C, H, W).
        """
        config = self.config
        H, W = config.padded_hw
        shapes = []
        for k, stage in enumerate(self.stages):
            stride = config.patch_size * 2 ** k
            shape = (B, H // stride, W // stride, config.embed_dim * 2 ** k)
            shapes += [shape] * stage.lstm.states
        if config.small_object_attention and config.attention_temporal:
            for stride, dim in zip(config.strides, config.dims[:2]):
                shapes.append((B, 2, dim, H // stride, W // stride))
        return [torch.zeros(shape, device=self.grid.device) for shape in shapes]

    def forward(self, events, state=None, frames=None):
        """Predictions for the chosen frames and the state after the last frame.

        events (T, B, 20, H, W) uint8, bool or float
        state: list of tensors with leading dim B, or None for new streams
        frames: which frames run pyramid and head: (T, B) bool on the CPU, or their flat indices
        t * B + b, int64 (N,) on the events' device (what torch.compile needs), or None for all
        -> Prediction(box_cxcywh (N, A, 4) pixels, obj (N, A) and cls (N, A, K) logits, grid (A, 3)
        cell x, cell y, stride) in float32, N = chosen frames in (t, b) order, anchors level by
        level, finest first, row-major; and the next state
        ValueError if the frames are of another size than the detector was built for.
        """
        config = self.config
        H, W = events.shape[-2:]
        if (H, W) != config.input_hw:
            raise ValueError(
                f"event frames are {H}x{W}, the detector was built for {config.input_hw}"
            )
        if state is None:
            state = self.initial_state(events.shape[1])
        if frames is not None and frames.dtype == torch.bool:
            frames = frames.flatten().nonzero().flatten()
            frames = frames.to(events.device, non_blocking=True)

        # zeros right and below, in the type that convolutions compute in
        dtype = self.stages[0].conv.weight.dtype
        device_type = events.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        padded_H, padded_W = config.padded_hw
        x = F.pad(events.flatten(0, 1), (0, padded_W - W, 0, padded_H - H))
        x = x.to(dtype, memory_format=torch.channels_last)  # (T * B, C, H, W), as all maps

        # backbone; each part takes its tensors off the state, one part after the other
        state = iter(state)
        next_state = []
        maps = []
        for stage in self.stages:
            x, new = stage(x, *islice(state, stage.lstm.states))
            next_state += new
            maps.append(x)
        features = maps[-len(config.dims) :]

        # pyramid of the chosen frames; attention looks back in time, so with it of every frame
        if config.small_object_attention:
            features = self.fpn(features)
            for level, attention in enumerate(self.attention):
                features[level], new = attention(features[level], *islice(state, 1))
                next_state += new
            features = [module(x) for module, x in zip(self.channel_attention, features)]
        if frames is not None:
            features = [x.index_select(0, frames) for x in features]
        if not config.small_object_attention:
            features = self.fpn(features)

        # heads, and their outputs as boxes
        out = [head(x) for head, x in zip(self.heads, features)]
        out = torch.cat(out, dim=1).float()  # (N, A, 4 + 1 + K)
        centre = out[..., :2] + self.grid[:, :2]
        size = out[..., 2:4].exp()
        box = torch.cat((centre, size), dim=-1) * self.grid[:, 2:]  # cells to pixels
        return Prediction(box, out[..., 4], out[..., 5:], self.grid), next_state

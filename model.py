"""Event frames -> box predictions: MaxViT-RNN backbone, PA-FPN over 2 to 4 scales, small-object attention, YOLOX head.

In: uint8 event histograms (T, B, 20, H, W) and the recurrent state of each stream. Out: decoded boxes with logits for
every anchor of the chosen frames, and the next state. Only the LSTMs look back in time, so each stage runs its
convolution and attention on all T * B frames at once and then scans its LSTM over T. Source: RVT, arXiv 2212.05598.

    model = Detector(ModelConfig(input_hw=(360, 640), num_classes=8)); prediction, state = model(events)
"""

import ctypes
import dataclasses
import math
from collections import namedtuple
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from formats import require

Prediction = namedtuple("Prediction", "box_cxcywh obj cls grid")


@dataclasses.dataclass
class ModelConfig:
    """Everything that decides the network's shape. Saved whole in every checkpoint; the fields are config keys."""

    input_hw: tuple = (0, 0)            # rows and columns of the event frames; (0, 0): taken from the data
    patch_size: int = 4                 # stride of the first stage: 2, 3 or 4
    partition_split: int = 0            # attention groups: padded input / (8 * patch_size * split); 0: about 60 tokens
    embed_dim: int = 64                 # width of stage 1; doubles with each stage
    dim_head: int = 32                  # width of an attention head
    fpn_stages: tuple = (2, 3, 4)       # backbone stages in the pyramid: 2 to 4 neighbours
    fpn_depth: float = 0.67             # a CSP layer has round(3 * depth) bottlenecks
    num_classes: int = 0                # 0: taken from the data
    small_object_attention: bool = False
    attention_spatial: bool = True      # parts of small_object_attention
    attention_temporal: bool = True
    checkpointing: bool = False         # recompute activations in the backward pass: less memory, more time

    def __post_init__(self):
        self.input_hw, self.fpn_stages = tuple(map(int, self.input_hw)), tuple(self.fpn_stages)
        if self.fpn_stages not in [tuple(range(low, high)) for low in (1, 2, 3) for high in range(low + 2, 6)]:
            raise ValueError(f"fpn_stages={self.fpn_stages}: expected 2 to 4 neighbours, finest first, like (2, 3, 4)")
        if self.patch_size not in (2, 3, 4) or self.partition_split not in range(100):
            raise ValueError(f"patch_size={self.patch_size}: 2, 3, 4; partition_split={self.partition_split}: 0 to 99")
        if self.embed_dim < 8 or self.embed_dim % 8 or self.dim_head < 1 or self.embed_dim % self.dim_head:
            raise ValueError(f"embed_dim={self.embed_dim}: expected a multiple of 8 and of dim_head={self.dim_head}")
        self.strides = tuple(self.patch_size * 2 ** (k - 1) for k in self.fpn_stages)  # of the pyramid's levels
        self.dims = [self.embed_dim * 2 ** (k - 1) for k in self.fpn_stages]  # their channels
        unit = self.patch_size * 8 * max(self.partition_split, 1)
        self.part = tuple(math.ceil(size / unit) for size in self.input_hw)  # token rows, columns of attention groups
        self.padded_hw = tuple(tokens * unit for tokens in self.part)

    def resolved(self):
        """Copy with the partition split decided; ValueError where input size or classes are not known yet."""
        require(min(*self.input_hw, self.num_classes) > 0, f"{self.input_hw=}, {self.num_classes=}: not all positive")
        splits = [dataclasses.replace(self, partition_split=split) for split in range(1, 9)]
        return self if self.partition_split else min(splits, key=lambda c: abs(math.log(math.prod(c.part) / 60)))


@contextmanager
def frozen_statistics(module):
    """Batch norms of `module` normalise by the batch as ever, but their running statistics stay what they are."""
    with ExitStack() as after:  # also where torch ends the recomputation early, which it does by an exception
        for buffer in module.buffers():
            after.callback(setattr, buffer, "data", buffer.clone())  # in place, autograd would take it for changed
        yield


def recompute(again, module, *args):
    """module(*args); if `again`, only the arguments are kept for the backward pass. Batch statistics move once."""
    if not (again and torch.is_grad_enabled()):
        return module(*args)
    # a compiler recomputes without repeating mutations, and takes no contexts
    once = {} if torch.compiler.is_compiling() else {"context_fn": lambda: (nullcontext(), frozen_statistics(module))}
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, **once)


# ---- backbone

# groups of ph x pw tokens that attend to each other: neighbours, or tokens H / ph rows and W / pw columns apart
LAYOUT = {"window": "b (nh ph) (nw pw) c", "grid": "b (ph nh) (pw nw) c"}
GROUPS = "(b nh nw) (ph pw) c"


class PartitionAttention(nn.Module):
    """Self-attention and MLP inside windows or grids of a map (B, H, W, C), each with pre-norm, scale and residual.

    part = (ph, pw) divides (H, W). Source: MaxViT, arXiv 2204.01697.
    """

    def __init__(self, dim, dim_head, part, mode, first_norm):
        super().__init__()
        self.sizes, self.layout, self.dim_head = {"ph": part[0], "pw": part[1]}, LAYOUT[mode], dim_head
        self.norm1 = nn.LayerNorm(dim, eps=1e-5) if first_norm else nn.Identity()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))  # CaiT, arXiv 2103.17239
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        groups = {"nh": x.shape[1] // self.sizes["ph"], "nw": x.shape[2] // self.sizes["pw"]}
        x = rearrange(x, f"{self.layout} -> {GROUPS}", **self.sizes)  # stays in groups through attention and MLP
        qkv = rearrange(self.qkv(self.norm1(x)), "g n (heads d) -> g heads n d", d=3 * self.dim_head)
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # each head: [q | k | v]
        x = x + self.scale1 * self.proj(rearrange(attended, "g heads n d -> g n (heads d)"))
        x = x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return rearrange(x, f"{GROUPS} -> {self.layout}", **self.sizes, **groups)


class LSTMCell(nn.Module):
    """LSTM whose gates are 1x1 convolutions of a map: every position has a memory of its own.

    x (B, H, W, C), h and c like x, c in float32 -> h, c. Gate order: forget, input, output, cell input.
    """

    def __init__(self, dim):
        super().__init__()
        self.gates = nn.Linear(2 * dim, 4 * dim)

    def forward(self, x, h, c):
        mix, g = self.gates(torch.cat((x, h), dim=-1)).split((3 * x.shape[-1], x.shape[-1]), dim=-1)
        f, i, o = mix.sigmoid().chunk(3, dim=-1)
        c = f * c + i * g.tanh()
        return (o * c.tanh()).to(mix.dtype), c


class Stage(nn.Module):
    """Stage k = 0..3: downsampling, window and grid attention on all frames at once, then an LSTM over time.

    x (T * B, C_in, H, W), h and c (B, H/f, W/f, C)  ->  features (T * B, C, H/f, W/f), like x, and the next h and c
    """

    def __init__(self, config, k):
        super().__init__()
        self.checkpointing, dim, factor = config.checkpointing, config.embed_dim * 2 ** k, 2 if k else config.patch_size
        self.conv = nn.Conv2d(dim // 2 if k else 20, dim, 2 * factor - 1, factor, padding=factor - 1, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.attention = nn.Sequential(*[PartitionAttention(dim, config.dim_head, config.part, mode, mode == "grid")
                                         for mode in ("window", "grid")])
        self.lstm = LSTMCell(dim)

    def forward(self, x, h, c):
        tokens, B = self.norm(self.conv(x).permute(0, 2, 3, 1)), len(h)  # (T * B, H/f, W/f, C)
        # one time step after the other: a T-th is recomputed at once
        parts = tokens.split(B) if self.checkpointing else [tokens]
        for block in self.attention:
            parts = [recompute(self.checkpointing, block, part) for part in parts]
        h, features = h.to(x.dtype), []  # what autocast computes in
        for x_t in (x_t for part in parts for x_t in part.to(x.dtype).split(B)):
            h, c = recompute(self.checkpointing, self.lstm, x_t, h, c)
            features.append(h)
        return torch.cat(features).permute(0, 3, 1, 2), h.float(), c


# ---- pyramid

class Conv(nn.Module):
    """Convolution + batch norm + SiLU, same size over the stride."""

    def __init__(self, dim_in, dim_out, kernel=1, stride=1, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


class CSP(nn.Module):
    """Cross-stage partial layer: bottlenecks on one half of the channels, the other half goes round them.

    x (N, C_in, H, W) -> (N, C_out, H, W). Source: CSPNet, arXiv 1911.11929, as in YOLOX.
    """

    def __init__(self, dim_in, dim_out, depth):
        super().__init__()
        half = dim_out // 2
        self.conv1, self.conv2, self.conv3 = Conv(dim_in, half), Conv(dim_in, half), Conv(2 * half, dim_out)
        self.m = nn.Sequential(*[nn.Sequential(Conv(half, half), Conv(half, half, 3)) for _ in range(depth)])

    def forward(self, x):
        return self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))


class PAFPN(nn.Module):
    """Path-aggregation pyramid over L neighbouring scales, finest first: list of (N, C_i, H_i, W_i) -> the same shapes.

    Source: PANet, arXiv 1803.01534, as in YOLOX.
    """

    def __init__(self, config):
        super().__init__()
        depth, pairs = round(3 * config.fpn_depth), list(zip(config.dims, config.dims[1:]))  # (finer, coarser) widths
        self.recomputed = 2 * config.checkpointing  # levels, the finest, which hold most of the activations
        self.lateral = nn.ModuleList(Conv(coarse, fine) for fine, coarse in pairs)
        self.top_down = nn.ModuleList(CSP(2 * fine, fine, depth) for fine, _ in pairs)
        self.down = nn.ModuleList(Conv(fine, fine, 3, stride=2) for fine, _ in pairs)
        self.bottom_up = nn.ModuleList(CSP(2 * fine, coarse, depth) for fine, coarse in pairs)

    def forward(self, features):
        x, laterals = features[-1], []
        for i in reversed(range(len(self.lateral))):
            laterals.append(recompute(i + 1 < self.recomputed, self.lateral[i], x))
            x = F.interpolate(laterals[-1], scale_factor=2, mode="nearest-exact")
            x = recompute(i < self.recomputed, self.top_down[i], torch.cat((x, features[i]), dim=1))
        outputs = [x]
        for i, down in enumerate(self.down):
            x = torch.cat((recompute(i < self.recomputed, down, outputs[-1]), laterals.pop()), dim=1)
            outputs.append(recompute(i + 1 < self.recomputed, self.bottom_up[i], x))
        return outputs


# ---- attention for small objects

class MultiScaleSpatialAttention(nn.Module):
    """x (N, C, H, W) -> x * a + x, with one map a (N, 1, H, W) in 0..1 from convolutions of three dilations."""

    def __init__(self, dim):
        super().__init__()
        width = max(1, dim // 3)
        self.scales = nn.ModuleList(Conv(dim, width, 3, dilation=d) for d in (1, 2, 4))
        self.squeeze = Conv(3 * width, max(1, 3 * width // 4))
        self.map = nn.Conv2d(max(1, 3 * width // 4), 1, 1)

    def forward(self, x):
        a = torch.cat([scale(x) for scale in self.scales], dim=1)
        return x * self.map(self.squeeze(a)).sigmoid() + x


class EventTemporalAttention(nn.Module):
    """Adds what three successive frames have in common where the last two differ, channel by channel.

    x (T, B, C, H, W), past (B, 2, C, H, W): the two frames before the first (zeros at a start)  ->  like x, next past
    """

    def __init__(self, dim):
        super().__init__()
        self.time = nn.Conv3d(dim, dim, (3, 1, 1), bias=False)
        self.bn = nn.BatchNorm3d(dim)
        self.motion = nn.Conv2d(2 * dim, 1, 3, padding=1)
        self.channel = nn.Sequential(nn.Linear(dim, max(1, dim // 4)), nn.ReLU(), nn.Linear(max(1, dim // 4), dim))

    def forward(self, x, past):
        frames = torch.cat((past.to(x.dtype).transpose(0, 1), x))  # (T + 2, B, C, H, W)
        u = self.bn(self.time(frames.permute(1, 2, 0, 3, 4))).permute(2, 0, 1, 3, 4)  # (T, B, C, H, W)
        pairs = torch.cat((x, frames[1:-1]), dim=2).flatten(0, 1)
        m = self.motion(pairs).sigmoid().unflatten(0, x.shape[:2])  # (T, B, 1, H, W)
        v = self.channel(u.mean((-2, -1))).sigmoid()[..., None, None]  # (T, B, C, 1, 1)
        return x + u * m * v, frames[-2:].transpose(0, 1).float()


class SmallObjectAttention(nn.Module):
    """Spatial, then temporal attention, then a convolution that joins them.

    x (T * B, C, H, W), where there is temporal attention its past (B, 2, C, H, W)  ->  like x and, then, the next past
    """

    def __init__(self, config, level):
        super().__init__()
        dim, spatial, temporal = config.dims[level], config.attention_spatial, config.attention_temporal
        self.spatial = MultiScaleSpatialAttention(dim) if spatial else nn.Identity()
        self.temporal = EventTemporalAttention(dim) if temporal else None
        self.join = Conv(dim, dim) if spatial and temporal else nn.Identity()

    def forward(self, x, *past):
        x = self.spatial(x)
        if past:
            x, *past = self.temporal(x.unflatten(0, (-1, len(past[0]))), *past)
            x = x.flatten(0, 1)
        return self.join(x), *past


class ScaleAwareChannelAttention(nn.Module):
    """Squeeze-and-excitation of x (N, C, H, W), stronger from the start at small strides. Source: arXiv 1709.01507."""

    def __init__(self, dim, stride):
        super().__init__()
        hidden = max(1, dim // (16 if stride <= 8 else 8))
        self.fc = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        nn.init.constant_(self.fc[-1].bias, 1.0 if stride <= 8 else 0.0)

    def forward(self, x):
        return x * self.fc(x.mean((-2, -1))).sigmoid()[..., None, None]


# ---- head and detector

class Head(nn.Module):
    """Decoupled YOLOX head of one level, 0 the finest: x (N, C, H, W) -> (N, H * W, 4 + 1 + K).

    The last axis holds box offsets, objectness, classes; the latter start at a probability of 0.01.
    Source: YOLOX, arXiv 2107.08430.
    """

    def __init__(self, config, level):
        super().__init__()
        self.checkpointing, dim = config.checkpointing and level < 2, config.dims[-1] // 4
        self.stem = Conv(config.dims[level], dim)
        self.cls_convs, self.reg_convs = (nn.Sequential(Conv(dim, dim, 3), Conv(dim, dim, 3)) for _ in range(2))
        self.cls_pred, self.reg_pred, self.obj_pred = (nn.Conv2d(dim, n, 1) for n in (config.num_classes, 4, 1))
        for pred in (self.cls_pred, self.obj_pred):
            nn.init.constant_(pred.bias, -math.log(99))

    def forward(self, x):
        x = recompute(self.checkpointing, self.stem, x)
        cls, reg = recompute(self.checkpointing, self.cls_convs, x), recompute(self.checkpointing, self.reg_convs, x)
        out = torch.cat((self.reg_pred(reg), self.obj_pred(reg), self.cls_pred(cls)), dim=1)
        return out.flatten(2).transpose(1, 2)


def reset_state(state, is_first):
    """State with the rows of new sequences set to zero. is_first (B,) bool, on the state's device."""
    return [s.masked_fill(is_first.view(-1, *[1] * (s.ndim - 1)), 0) for s in state]


class Detector(nn.Module):
    """The whole network. `config` holds its resolved ModelConfig."""

    def __init__(self, config):
        super().__init__()
        # glibc reuses large buffers: else each big tensor on a CPU goes back to the kernel and is paged in anew. One
        # arena, too: a loader's threads would have arenas of their own, which are too small for a batch
        with suppress(OSError, AttributeError):  # another libc
            for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-8, 1)):  # M_MMAP_, M_TRIM_THRESHOLD, ARENA_MAX
                ctypes.CDLL(None).mallopt(option, value)
        self.config = config = config.resolved()
        self.stages = nn.ModuleList(Stage(config, k) for k in range(config.fpn_stages[-1]))
        self.fpn = PAFPN(config)
        self.heads = nn.ModuleList(Head(config, level) for level in range(len(config.fpn_stages)))
        if config.small_object_attention:
            self.attention = nn.ModuleList(SmallObjectAttention(config, level) for level in range(2))
            self.channel_attention = nn.ModuleList(map(ScaleAwareChannelAttention, config.dims, config.strides))
        H, W = config.padded_hw
        cells = [(x, y, stride) for stride in config.strides for y in range(H // stride) for x in range(W // stride)]
        self.register_buffer("grid", torch.tensor(cells, dtype=torch.float32), persistent=False)  # (A, 3)
        for p in self.parameters():
            p.data = p.data.to(memory_format=torch.channels_last) if p.ndim == 4 else p.data

    def initial_state(self, B):
        """Zeros for B new streams: h and c (B, H_k, W_k, C_k) per stage, then the attention's past (B, 2, C, H, W)."""
        config, C, patch, (H, W) = self.config, self.config.embed_dim, self.config.patch_size, self.config.padded_hw
        maps = [(C * f, H // (patch * f), W // (patch * f)) for f in (2 ** k for k in range(len(self.stages)))]
        shapes = [(B, H, W, C) for C, H, W in maps for _ in range(2)]
        if config.small_object_attention and config.attention_temporal:
            shapes += [(B, 2, *maps[k - 1]) for k in config.fpn_stages[:2]]
        return [torch.zeros(shape, device=self.grid.device) for shape in shapes]

    def forward(self, events, state=None, frames=None):
        """Predictions for the chosen frames and the state after the last frame.

        events (T, B, 20, H, W) uint8 or float; state: list of tensors with leading dim B, or None for new streams;
        frames: which frames run pyramid and head: (T, B) bool on the CPU, or their flat indices t * B + b, int64 (N,)
        on the events' device (what torch.compile needs), or None for all.
        -> Prediction(box_cxcywh (N, A, 4) pixels, obj (N, A) and cls (N, A, K) logits, grid (A, 3) cell x, cell y,
        stride) in float32, N = chosen frames in (t, b) order, anchors level by level, finest first, row-major.
        ValueError if the frames are of another size than the detector was built for.
        """
        config, (H, W), kind = self.config, events.shape[-2:], events.device.type
        require((H, W) == config.input_hw, f"event frames are {H}x{W}, this detector was built for {config.input_hw}")
        if frames is not None and frames.dtype == torch.bool:
            frames = frames.flatten().nonzero().flatten().to(events.device, non_blocking=True)
        state = self.initial_state(events.shape[1]) if state is None else state
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.stages[0].conv.weight.dtype
        x = F.pad(events.flatten(0, 1), (0, config.padded_hw[1] - W, 0, config.padded_hw[0] - H))
        x, maps, following = x.to(dtype, memory_format=torch.channels_last), [], []  # (T * B, C, H, W), as all maps
        for stage, h, c in zip(self.stages, state[::2], state[1::2]):
            x, h, c = stage(x, h, c)
            maps.append(x)
            following += [h, c]
        features, past = [maps[k - 1] for k in config.fpn_stages], state[len(following):]
        if config.small_object_attention:  # it looks back in time, so every frame passes the pyramid
            features = self.fpn(features)
            for level, module in enumerate(self.attention):
                features[level], *new = module(features[level], *past[level:level + 1])
                following += new
            features = [module(f) for module, f in zip(self.channel_attention, features)]
        features = [f if frames is None else f.index_select(0, frames) for f in features]
        features = features if config.small_object_attention else self.fpn(features)
        out = torch.cat([head(f) for head, f in zip(self.heads, features)], dim=1).float()  # (N, A, 4 + 1 + K)
        box = torch.cat((out[..., :2] + self.grid[:, :2], out[..., 2:4].exp()), dim=-1) * self.grid[:, 2:]
        return Prediction(box, out[..., 4], out[..., 5:], self.grid), following


# ---- checkpoints



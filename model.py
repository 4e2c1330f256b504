"""Event frames -> box predictions: MaxViT-RNN backbone, PA-FPN over 2 to 4 scales, small-object attention, YOLOX head.

In: uint8 event histograms (T, B, 20, H, W) and the recurrent state of each stream. Out: decoded boxes with logits for
every anchor of the chosen frames, and the next state. Only the LSTMs look back in time, so each stage runs its
convolution and attention on all T * B frames at once and then scans its LSTM over T. Source: RVT, arXiv 2212.05598.

    model = Detector(ModelConfig(input_hw=(360, 640), num_classes=8)); prediction, state = model(events)
"""

import ctypes
import dataclasses
import math
import re
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

TOKENS = 60  # attention group size that the default partition split aims at
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
        self.input_hw, self.fpn_stages = tuple(self.input_hw), tuple(self.fpn_stages)
        if self.fpn_stages not in [tuple(range(low, high + 1)) for low in (1, 2, 3) for high in range(low + 1, 5)]:
            raise ValueError(f"fpn_stages={self.fpn_stages}: expected 2 to 4 neighbours, finest first, like (2, 3, 4)")
        if self.patch_size not in (2, 3, 4) or self.partition_split < 0:
            raise ValueError(f"patch_size={self.patch_size}, partition_split={self.partition_split}: expected a patch "
                             f"size of 2, 3 or 4 and a split of 1, 2, ..., or 0 for the default rule")
        if self.embed_dim < 8 or self.embed_dim % 8 or self.dim_head < 1 or self.embed_dim % self.dim_head:
            raise ValueError(f"embed_dim={self.embed_dim}, dim_head={self.dim_head}: expected an embed_dim that is a "
                             f"multiple of 8 and of dim_head, like 64 and 32, or 48 and 24")

    @property
    def strides(self):
        return tuple(self.patch_size * 2 ** (k - 1) for k in self.fpn_stages)

    @property
    def part(self):
        """Tokens (rows, columns) of an attention group."""
        return tuple(math.ceil(size / (self.patch_size * 8 * self.partition_split)) for size in self.input_hw)

    @property
    def padded_hw(self):
        return tuple(tokens * self.patch_size * 8 * self.partition_split for tokens in self.part)

    def resolved(self):
        """Copy with the partition split decided; ValueError where input size or classes are not known yet."""
        if min(self.input_hw) < 1 or self.num_classes < 1:
            raise ValueError(f"input_hw={self.input_hw}, num_classes={self.num_classes}: expected positive numbers")
        splits = [dataclasses.replace(self, partition_split=split) for split in range(1, 9)]
        return self if self.partition_split else min(splits, key=lambda c: abs(math.log(math.prod(c.part) / TOKENS)))


@contextmanager
def frozen_statistics(module):
    """Batch norms of `module` normalise by the batch as ever, but move a copy of their running statistics."""
    kept = [(norm, norm._buffers) for norm in module.modules() if hasattr(norm, "running_mean")]
    for norm, buffers in kept:
        norm._buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers = buffers


def recompute(again, module, *args):
    """module(*args); if `again`, only the arguments are kept for the backward pass. Batch statistics move once."""
    if not (again and torch.is_grad_enabled()):
        return module(*args)
    # a compiler recomputes without repeating mutations, and takes no contexts
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():
        options["context_fn"] = lambda: (nullcontext(), frozen_statistics(module))
    return checkpoint(module, *args, **options)


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
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))  # CaiT, arXiv 2103.17239
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def attend(self, x):
        qkv = rearrange(self.qkv(x), "g n (heads d) -> g heads n d", d=3 * self.dim_head)  # [q | k | v] per head
        x = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return self.proj(rearrange(x, "g heads n d -> g n (heads d)"))

    def forward(self, x):
        groups = {"nh": x.shape[1] // self.sizes["ph"], "nw": x.shape[2] // self.sizes["pw"]}
        x = rearrange(x, f"{self.layout} -> {GROUPS}", **self.sizes)  # stays in groups through attention and MLP
        x = x + self.scale1 * self.attend(self.norm1(x))
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
        C = x.shape[-1]
        mix = self.gates(torch.cat((x, h), dim=-1))
        f, i, o = mix[..., :3 * C].sigmoid().chunk(3, dim=-1)
        c = f * c + i * mix[..., 3 * C:].tanh()
        return (o * c.tanh()).to(mix.dtype), c


class Stage(nn.Module):
    """Downsampling, window and grid attention on all frames at once, then an LSTM over time.

    x (T, B, C_in, H, W), h and c (B, H/f, W/f, C)  ->  features (T, B, C, H/f, W/f) and the next h and c
    """

    def __init__(self, dim_in, dim, factor, part, dim_head, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        self.conv = nn.Conv2d(dim_in, dim, 2 * factor - 1, stride=factor, padding=factor - 1, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.attention = nn.Sequential(PartitionAttention(dim, dim_head, part, "window", first_norm=False),
                                       PartitionAttention(dim, dim_head, part, "grid", first_norm=True))
        self.lstm = LSTMCell(dim)

    def forward(self, x, h, c):
        T, B = x.shape[:2]
        x = self.conv(x.flatten(0, 1))
        dtype = x.dtype  # what autocast computes in
        x = self.norm(x.permute(0, 2, 3, 1))  # (T * B, H, W, C)
        parts = x.split(B) if self.checkpointing else [x]  # one time step after the other: a T-th is recomputed at once
        for block in self.attention:
            parts = [recompute(self.checkpointing, block, part) for part in parts]
        h, features = h.to(dtype), []
        for x_t in (x_t for part in parts for x_t in part.to(dtype).split(B)):
            h, c = recompute(self.checkpointing, self.lstm, x_t, h, c)
            features.append(h)
        return torch.stack(features).permute(0, 1, 4, 2, 3), h.float(), c


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
        self.conv1 = Conv(dim_in, half)
        self.conv2 = Conv(dim_in, half)
        self.conv3 = Conv(2 * half, dim_out)
        self.m = nn.Sequential(*[nn.Sequential(Conv(half, half), Conv(half, half, 3)) for _ in range(depth)])

    def forward(self, x):
        return self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))


class PAFPN(nn.Module):
    """Path-aggregation pyramid over L neighbouring scales, finest first: list of (N, C_i, H_i, W_i) -> the same shapes.

    Source: PANet, arXiv 1803.01534, as in YOLOX.
    """

    def __init__(self, dims, depth, checkpointing):
        super().__init__()
        depth, pairs = round(3 * depth), list(zip(dims, dims[1:]))  # (finer, coarser) widths
        self.checkpointing = checkpointing
        self.lateral = nn.ModuleList(Conv(coarse, fine) for fine, coarse in pairs)
        self.top_down = nn.ModuleList(CSP(2 * fine, fine, depth) for fine, _ in pairs)
        self.down = nn.ModuleList(Conv(fine, fine, 3, stride=2) for fine, _ in pairs)
        self.bottom_up = nn.ModuleList(CSP(2 * fine, coarse, depth) for fine, coarse in pairs)

    def forward(self, features):
        def run(module, level, x):  # the two finest levels hold most of the activations
            return recompute(self.checkpointing and level < 2, module, x)

        x, laterals, outputs = features[-1], [], []
        for i in reversed(range(len(self.lateral))):
            laterals.append(run(self.lateral[i], i + 1, x))
            x = F.interpolate(laterals[-1], scale_factor=2, mode="nearest-exact")
            x = run(self.top_down[i], i, torch.cat((x, features[i]), dim=1))
        outputs.append(x)
        for i in range(len(self.down)):
            x = run(self.down[i], i, x)
            x = run(self.bottom_up[i], i + 1, torch.cat((x, laterals.pop()), dim=1))
            outputs.append(x)
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
        T = x.shape[0]
        frames = torch.cat((past.to(x.dtype).transpose(0, 1), x))  # (T + 2, B, C, H, W)
        u = self.bn(self.time(frames.permute(1, 2, 0, 3, 4))).permute(2, 0, 1, 3, 4)  # (T, B, C, H, W)
        pairs = torch.cat((x, frames[1:T + 1]), dim=2).flatten(0, 1)
        m = self.motion(pairs).sigmoid().unflatten(0, x.shape[:2])  # (T, B, 1, H, W)
        v = self.channel(u.mean((-2, -1))).sigmoid()[..., None, None]  # (T, B, C, 1, 1)
        return x + u * m * v, frames[T:].transpose(0, 1).float()


class SmallObjectAttention(nn.Module):
    """Spatial, then temporal attention, then a convolution that joins them: x (T, B, C, H, W), past -> like x, past."""

    def __init__(self, dim, spatial, temporal):
        super().__init__()
        self.spatial = MultiScaleSpatialAttention(dim) if spatial else nn.Identity()
        self.temporal = EventTemporalAttention(dim) if temporal else None
        self.join = Conv(dim, dim) if spatial and temporal else nn.Identity()

    def forward(self, x, past):
        TB = x.shape[:2]
        x = self.spatial(x.flatten(0, 1)).unflatten(0, TB)
        if self.temporal is not None:
            x, past = self.temporal(x, past)
        return self.join(x.flatten(0, 1)).unflatten(0, TB), past


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
    """Decoupled YOLOX head of one level: x (N, C, H, W) -> (N, H * W, 4 + 1 + K): box offsets, objectness, classes.

    Source: YOLOX, arXiv 2107.08430. Class and objectness biases start at a probability of 0.01.
    """

    def __init__(self, dim_in, dim, num_classes, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = Conv(dim_in, dim)
        self.cls_convs = nn.Sequential(Conv(dim, dim, 3), Conv(dim, dim, 3))
        self.reg_convs = nn.Sequential(Conv(dim, dim, 3), Conv(dim, dim, 3))
        self.cls_pred = nn.Conv2d(dim, num_classes, 1)
        self.reg_pred = nn.Conv2d(dim, 4, 1)
        self.obj_pred = nn.Conv2d(dim, 1, 1)
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
        self.config = config = config.resolved()
        dims = [config.embed_dim * 2 ** k for k in range(4)]
        again = config.checkpointing
        self.stages = nn.ModuleList(
            Stage(dims[k - 1] if k else 20, dims[k], 2 if k else config.patch_size, config.part, config.dim_head, again)
            for k in range(config.fpn_stages[-1]))
        dims = [dims[k - 1] for k in config.fpn_stages]
        self.fpn = PAFPN(dims, config.fpn_depth, again)
        self.heads = nn.ModuleList(Head(dim, dims[-1] // 4, config.num_classes, again and level < 2)
                                   for level, dim in enumerate(dims))
        if config.small_object_attention:
            self.attention = nn.ModuleList(
                SmallObjectAttention(dim, config.attention_spatial, config.attention_temporal) for dim in dims[:2])
            self.channel_attention = nn.ModuleList(
                ScaleAwareChannelAttention(dim, stride) for dim, stride in zip(dims, config.strides))
        grids = []
        for stride in config.strides:
            y, x = torch.meshgrid(*[torch.arange(size // stride) for size in config.padded_hw], indexing="ij")
            grids.append(torch.stack((x, y, torch.full_like(x, stride)), dim=-1).flatten(0, 1))
        self.register_buffer("grid", torch.cat(grids).float(), persistent=False)  # (A, 3) cell x, cell y, stride
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)

    def initial_state(self, B):
        """Zeros for B new streams: h and c (B, H_k, W_k, C_k) per stage, then the attention's past (B, 2, C, H, W)."""
        config, (H, W) = self.config, self.config.padded_hw
        maps = [(config.embed_dim * 2 ** k, H // stride, W // stride)
                for k, stride in enumerate(config.patch_size * 2 ** k for k in range(len(self.stages)))]
        shapes = [(B, H, W, C) for C, H, W in maps for _ in range(2)]
        if config.small_object_attention and config.attention_temporal:
            shapes += [(B, 2, *maps[k - 1]) for k in config.fpn_stages[:2]]
        return [torch.zeros(shape, device=self.grid.device) for shape in shapes]

    def backbone(self, events, state):
        """events (T, B, 20, H, W), state -> a feature map (T, B, C, H, W) for each of fpn_stages, next h and c."""
        (T, B), (H, W) = events.shape[:2], events.shape[-2:]
        if (H, W) != self.config.input_hw:
            raise ValueError(f"event frames are {H}x{W} but this detector was built for "
                             f"{self.config.input_hw[0]}x{self.config.input_hw[1]} (input_hw)")
        device, (padded_h, padded_w) = events.device.type, self.config.padded_hw
        dtype = self.stages[0].norm.weight.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        x = F.pad(events.flatten(0, 1), (0, padded_w - W, 0, padded_h - H))
        x = x.to(dtype, memory_format=torch.channels_last).unflatten(0, (T, B))
        features, following = [], []
        for k, stage in enumerate(self.stages):
            x, h, c = stage(x, state[2 * k], state[2 * k + 1])
            features.append(x)
            following += [h, c]
        return [features[k - 1] for k in self.config.fpn_stages], following

    def forward(self, events, state=None, frames=None):
        """Predictions for the chosen frames and the state after the last frame.

        events (T, B, 20, H, W) uint8 or float; state: list of tensors with leading dim B, or None for new streams;
        frames: which frames run pyramid and head: (T, B) bool on the CPU, or their flat indices t * B + b, int64 (N,)
        on the events' device (what torch.compile needs), or None for all.
        -> Prediction(box_cxcywh (N, A, 4) pixels, obj (N, A) and cls (N, A, K) logits, grid (A, 3) cell x, cell y,
        stride) in float32, N = chosen frames in (t, b) order, anchors level by level, finest first, row-major.
        ValueError if the frames are of another size than the detector was built for.
        """
        if frames is not None and frames.dtype == torch.bool:
            frames = frames.flatten().nonzero().flatten().to(events.device, non_blocking=True)
        state = self.initial_state(events.shape[1]) if state is None else state
        features, following = self.backbone(events, state)
        TB, past = events.shape[:2], state[len(following):]
        features = [f.flatten(0, 1) for f in features]
        if self.config.small_object_attention:  # it looks back in time, so every frame passes the pyramid
            features = self.fpn(features)
            for level, module in enumerate(self.attention):
                x, new = module(features[level].unflatten(0, TB), past[level] if past else None)
                features[level] = x.flatten(0, 1)
                following += [new] if past else []
            features = [module(f) for module, f in zip(self.channel_attention, features)]
        features = [f if frames is None else f.index_select(0, frames) for f in features]
        features = features if self.config.small_object_attention else self.fpn(features)
        out = torch.cat([head(f) for head, f in zip(self.heads, features)], dim=1).float()  # (N, A, 4 + 1 + K)
        stride = self.grid[:, 2:]
        box = torch.cat(((out[..., :2] + self.grid[:, :2]) * stride, out[..., 2:4].exp() * stride), dim=-1)
        return Prediction(box, out[..., 4], out[..., 5:], self.grid), following


def keep_buffers():
    """Let glibc reuse large buffers: else each big tensor on a CPU goes back to the kernel and is paged in anew."""
    with suppress(OSError, AttributeError):  # another libc
        for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


# ---- checkpoints

def read_checkpoint(path):
    """Contents of a checkpoint file (ours or RVT's) on the CPU, read without running code.

    ValueError in one line: no such file, truncated, no checkpoint, or holding objects that only unpickling could make.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for damaged files
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = "no such file" if isinstance(error, FileNotFoundError) else "not a checkpoint, or truncated"
        if culprit:
            what = (f"holds more than weights ({culprit[1]}) and is not loaded, since that could run code. If you "
                    f"trust its source, convert it: python -c \"import torch; c = torch.load('{path}', weights_only="
                    f"False); torch.save({{'state_dict': c['state_dict']}}, 'converted.ckpt')\"")
        raise ValueError(f"{path}: {what}") from error
    if not isinstance(found, dict) or not {"model", "model_config"} <= found.keys() and "state_dict" not in found:
        raise ValueError(f"{path}: a file of torch, but no checkpoint of nanoRVT or RVT (no 'model' or 'state_dict')")
    return found


RVT_NAMES = [  # (RVT's name, ours) as regular expressions, applied in turn
    (r"backbone\.", ""), (r"downsample_cf2cl\.", ""), (r"att_blocks\.0\.att_window", "attention.0"),
    (r"att_blocks\.0\.att_grid", "attention.1"), (r"self_attn\.", ""), (r"ls(\d)\.gamma", r"scale\1"),
    (r"mlp\.net\.0\.0", "fc1"), (r"mlp\.net\.2", "fc2"), (r"lstm\.conv1x1", "lstm.gates"),
    (r"lateral_conv0", "lateral.1"), (r"reduce_conv1", "lateral.0"), (r"C3_p4", "top_down.1"), (r"C3_p3", "top_down.0"),
    (r"bu_conv2", "down.0"), (r"bu_conv1", "down.1"), (r"C3_n3", "bottom_up.0"), (r"C3_n4", "bottom_up.1"),
    (r"(m\.\d+)\.conv1", r"\1.0"), (r"(m\.\d+)\.conv2", r"\1.1"),
    (r"yolox_head\.(stem|cls_pred|reg_pred|obj_pred)s\.(\d)", r"heads.\2.\1"),
    (r"yolox_head\.(cls|reg)_convs\.(\d)", r"heads.\2.\1_convs")]


def load_weights(model, weights, where):
    """Copy a state dict into `model`; ValueError names what is missing, left over or of another shape."""
    own = {key: value.shape for key, value in model.state_dict().items()}
    given = {key: getattr(value, "shape", None) for key, value in weights.items()}
    wrong = sorted(f"{key} is {tuple(given[key] or ()) if key in given else 'missing'}, expected "
                   f"{tuple(own[key]) if key in own else 'nothing'}"
                   for key in own.keys() | given.keys() if own.get(key) != given.get(key))
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} weights do not fit this architecture: {'; '.join(wrong[:3])}")
    model.load_state_dict(weights)
    return model


def load_rvt(path, **overrides):
    """Detector with the weights of a Lightning checkpoint of RVT or its eTraM fork, under our names.

    embed_dim, patch_size, fpn_depth and num_classes are read off the weights; input_hw, partition_split and dim_head
    come as overrides, since no weight tells them. ValueError names every weight that is unmatched.
    """
    weights = {key[4:]: value for key, value in read_checkpoint(path).get("state_dict", {}).items()
               if key.startswith("mdl.") and isinstance(value, torch.Tensor)}
    try:
        stem = weights["backbone.stages.0.downsample_cf2cl.conv.weight"]
        bottlenecks = len({key.split(".")[3] for key in weights if key.startswith("fpn.C3_p4.m.")})
        told = dict(embed_dim=stem.shape[0], patch_size=(stem.shape[2] + 1) // 2, fpn_depth=round(bottlenecks / 3, 2),
                    num_classes=weights["yolox_head.cls_preds.0.weight"].shape[0])
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: no checkpoint of RVT: weight {error} is missing") from error
    renamed = {}
    for key, value in weights.items():
        for pattern, name in RVT_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value.flatten(1) if "lstm" in key and value.ndim == 4 else value  # a 1x1 convolution is linear
    return load_weights(Detector(ModelConfig(**told | overrides)), renamed, path)

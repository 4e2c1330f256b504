"""Checkpoint files -> detectors: ours and RVT's, read without running code.

    model = load_detector("out/best.pt")
"""

import re

import torch

from formats import reading, require
from model import Detector, ModelConfig

def read_checkpoint(path):
    """Contents of a checkpoint file (ours or RVT's) on the CPU, read without running code.

    ValueError in one line: no such file, truncated, no checkpoint, or holding objects that only unpickling could make.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for damaged files
        what = "no such file" if isinstance(error, FileNotFoundError) else "not a checkpoint, or truncated"
        if culprit := re.search(r"GLOBAL (\S+)", str(error)):
            what = (f"{culprit[1]} in it could run code; if you trust it, convert it: python -c \"import torch; "
                    f"torch.save(dict(state_dict=torch.load('{path}', weights_only=False)['state_dict']), 'ok.ckpt')\"")
        raise ValueError(f"{path}: {what}") from error
    parts = {key for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else set()
    if not {"model", "model_config"} <= parts and "state_dict" not in parts or "config" in found.keys() - parts:
        raise ValueError(f"{path}: a file of torch, but no checkpoint of nanoRVT or RVT (no 'model' or 'state_dict')")
    return found


# (RVT's name, ours) as regular expressions, applied in turn
RVT_NAMES = [(r"backbone.|downsample_cf2cl.|self_attn.", ""), (r"att_blocks.0.att_window", "attention.0"),
             (r"att_blocks.0.att_grid", "attention.1"), (r"ls(\d).gamma", r"scale\1"), (r"mlp.net.0.0", "fc1"),
             (r"mlp.net.2", "fc2"), (r"lstm.conv1x1", "lstm.gates"), (r"C3_p4", "top_down.1"), (r"C3_p3", "top_down.0"),
             (r"lateral_conv0", "lateral.1"), (r"reduce_conv1", "lateral.0"), (r"C3_n3", "bottom_up.0"),
             (r"bu_conv2", "down.0"), (r"bu_conv1", "down.1"), (r"C3_n4", "bottom_up.1"), (r"(m\.\d+).conv1", r"\1.0"),
             (r"(m\.\d+).conv2", r"\1.1"), (r"yolox_head.(stem|\w+_pred|\w+_convs)s?.(\d)", r"heads.\2.\1")]


def load_weights(model, weights, where):
    """Copy a state dict into `model`; ValueError names what is missing, left over or of another shape."""
    own, given = ({k: tuple(x.shape) if torch.is_tensor(x) and x.layout == torch.strided and not x.is_meta else type(x)
                   for k, x in found.items()} for found in (model.state_dict(), weights))
    wrong = sorted(f"{key} is {given.get(key, 'missing')}, expected {own.get(key, 'nothing')}"
                   for key in own.keys() | given.keys() if own.get(key) != given.get(key))
    require(not wrong, f"{where}: {len(wrong)} weights do not fit this architecture: {'; '.join(wrong[:3])}")
    model.load_state_dict(weights)
    return model


def load_rvt(path, **overrides):
    """Detector with the weights of a Lightning checkpoint of RVT or its eTraM fork, under our names.

    embed_dim, patch_size, fpn_depth and num_classes are read off the weights; input_hw, partition_split and dim_head
    come as overrides, since no weight tells them. ValueError names every weight that is unmatched.
    """
    weights = {key[4:]: value for key, value in read_checkpoint(path).get("state_dict", {}).items()
               if key.startswith("mdl.") and isinstance(value, torch.Tensor)}
    with reading(f"{path}: no checkpoint of RVT, or not all of its weights"):
        stem = weights["backbone.stages.0.downsample_cf2cl.conv.weight"]
        bottlenecks = len({key.split(".")[3] for key in weights if key.startswith("fpn.C3_p4.m.")})
        told = dict(embed_dim=stem.shape[0], patch_size=(stem.shape[2] + 1) // 2, fpn_depth=round(bottlenecks / 3, 2),
                    num_classes=weights["yolox_head.cls_preds.0.weight"].shape[0])
    for pattern, name in RVT_NAMES:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    # a 1x1 convolution is linear
    weights = {key: x.flatten(1) if "lstm" in key and x.ndim == 4 else x for key, x in weights.items()}
    return load_weights(Detector(ModelConfig(**told | overrides)), weights, path)


def load_detector(path, input_hw=None, partition_split=0, dim_head=32):
    """Detector of a checkpoint, ours or RVT's, for frames of input_hw (None: those it was trained on; RVT's need it).

    partition_split, dim_head: RVT's checkpoints do not tell these. ValueError: no checkpoint of either kind.
    """
    file = read_checkpoint(path)
    if "model_config" not in file:
        return load_rvt(path, input_hw=input_hw, partition_split=partition_split, dim_head=dim_head)
    with reading(path):
        # no weight depends on these two
        new = {} if input_hw in (None, file["model_config"]["input_hw"]) else dict(input_hw=input_hw, partition_split=0)
        model = Detector(ModelConfig(**file["model_config"] | new))
    return load_weights(model, file["model"], path)

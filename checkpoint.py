"""Checkpoint files -> detectors: ours and RVT's, read without running code.

In: what train.py wrote, or a Lightning checkpoint of RVT or its eTraM fork. Out: a Detector with
its weights, or one line that says what does not fit.

    model = load_detector("out/best.pt")
"""

import dataclasses
import re
import zipfile

import torch

from formats import reading
from model import Detector, ModelConfig


def read_checkpoint(path):
    """Contents of a checkpoint file (ours or RVT's) on the CPU, read without running code.

    ValueError in one line: no such file, damaged, no checkpoint, or with objects in it that only
    running code could restore.
    """
    try:
        # torch checks no checksums; the message is made below
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("damaged")
        found = torch.load(path, map_location="cpu", weights_only=True)
        dict_keys = {key for key, value in found.items() if isinstance(value, dict)}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for damaged files
        what = "not a checkpoint, truncated or damaged"
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            what = (
                f"{unsafe[1]} in it could run code; if you trust it, convert it: python -c "
                f"\"import torch; found = torch.load('{path}', weights_only=False); "
                "torch.save({'state_dict': found['state_dict']}, 'weights.ckpt')\""
            )
        raise ValueError(f"{path}: {what}") from error
    known = {"model", "model_config"} <= dict_keys or "state_dict" in dict_keys
    if not known or "config" in found.keys() - dict_keys:
        raise ValueError(f"{path}: no checkpoint of nanoRVT or RVT (no 'model' or 'state_dict')")
    return found


def shape(x):
    """Shape of a plain tensor as text; of anything else the type."""
    if x is None:
        return "missing"
    if torch.is_tensor(x) and x.layout == torch.strided and not x.is_meta:
        return str(tuple(x.shape))
    return type(x).__name__


def load_weights(model, weights, where, new_classes=False):
    """Copy a state dict into `model`; ValueError names what is missing, left over or misshapen.

    new_classes: where nothing but the class layers does not fit, for they have another number of
    classes or are left out, these stay as they are in `model`, and a line says so.
    """
    own = model.state_dict()
    fitting = {}
    wrong = []
    for name in own | weights:
        has = shape(weights.get(name))
        needs = shape(own.get(name))
        if has != needs:
            wrong.append(f"{name} is {has} in the file, {needs} in the model")
        elif weights[name].isfinite().all():
            fitting[name] = weights[name]
        else:
            raise ValueError(f"{where}: {name} is not finite; take an earlier checkpoint")
    first = "; ".join(wrong[:3])
    if wrong and new_classes and all(".cls_pred." in line for line in wrong):
        print(f"{where}: the class layers start from scratch: {first}")
    elif wrong:
        raise ValueError(f"{where}: {len(wrong)} weights do not fit this architecture: {first}")
    model.load_state_dict(own | fitting)
    return model


# parts of names in RVT's checkpoints: what they are called here
RVT_NAMES = {
    "backbone.": "",
    "downsample_cf2cl.": "",
    "att_blocks.0.att_window": "attention.0",
    "att_blocks.0.att_grid": "attention.1",
    "self_attn.": "",
    "ls1.gamma": "scale1",
    "ls2.gamma": "scale2",
    "mlp.net.0.0": "fc1",
    "mlp.net.2": "fc2",
    "lstm.conv1x1": "lstm.gates",
    "lateral_conv0": "lateral.1",
    "reduce_conv1": "lateral.0",
    "C3_p4": "top_down.1",
    "C3_p3": "top_down.0",
    "bu_conv2": "down.0",
    "bu_conv1": "down.1",
    "C3_n3": "bottom_up.0",
    "C3_n4": "bottom_up.1",
    "m.0.conv1": "m.0.0",
    "m.0.conv2": "m.0.1",
    "m.1.conv1": "m.1.0",
    "m.1.conv2": "m.1.1",
    "m.2.conv1": "m.2.0",
    "m.2.conv2": "m.2.1",
    "stems": "stem",
    "preds": "pred",
}


def our_name(name):
    """Name of a weight of RVT in our Detector."""
    for part, ours in RVT_NAMES.items():
        name = name.replace(part, ours)
    # yolox_head.cls_pred.0.bias -> heads.0.cls_pred.bias
    return re.sub(r"yolox_head\.(\w+)\.(\d+)", r"heads.\2.\1", name)


def weights_of(found):
    """Weights of a checkpoint that was read, ours or RVT's, under our names."""
    if "state_dict" not in found:
        return found["model"]
    weights = {}
    for name, x in found["state_dict"].items():
        if name.endswith("lstm.conv1x1.weight"):
            x = x.squeeze()  # a 1x1 convolution is linear
        if name.startswith("mdl."):
            weights[our_name(name[4:])] = x
    return weights


def load_rvt(path, **overrides):
    """Detector with the weights of a Lightning checkpoint of RVT or its eTraM fork.

    embed_dim, patch_size, fpn_depth and num_classes are read off the weights; input_hw,
    partition_split and dim_head come as overrides, since no weight tells them. ValueError as in
    load_weights.
    """
    with reading(f"{path}: no checkpoint of RVT, or not all of its weights"):
        weights = weights_of(read_checkpoint(path))
        depth = 0
        while f"fpn.top_down.0.m.{depth}.0.conv.weight" in weights:
            depth += 1
        stem = weights["stages.0.conv.weight"]
        told = {
            "embed_dim": stem.shape[0],
            "patch_size": (stem.shape[2] + 1) // 2,
            "fpn_depth": round(depth / 3, 2),
            "num_classes": len(weights["heads.0.cls_pred.weight"]),
        }
        model = Detector(ModelConfig(**told | overrides))
    return load_weights(model, weights, path)


def load_detector(path, input_hw=None, partition_split=0, dim_head=32):
    """Detector of a checkpoint, ours or RVT's. ValueError: no checkpoint of either kind.

    input_hw: (H, W) of the frames; None: those it was trained on, which RVT's do not tell.
    partition_split, dim_head: for RVT's, which do not tell these either.
    """
    found = read_checkpoint(path)
    if "model_config" not in found:
        return load_rvt(
            path, input_hw=input_hw, partition_split=partition_split, dim_head=dim_head)
    with reading(path):
        config = ModelConfig(**found["model_config"])
        if input_hw not in (None, config.input_hw):  # no weight depends on these two
            config = dataclasses.replace(config, input_hw=input_hw, partition_split=0)
        model = Detector(config)
    return load_weights(model, found["model"], path)

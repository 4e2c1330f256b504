"""checkpoint.py: what it reads, what it refuses in one line, and weights under our names."""

import pickle
from pathlib import Path

import pytest
import torch

from checkpoint import load_detector, load_rvt, load_weights, read_checkpoint, read_weights
from conftest import Hostile, shared, tiny_detector, write_checkpoint
from model import Detector, ModelConfig

# ---- checkpoint.py


def test_read_checkpoint_names_what_is_none_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("good.pt", tiny_detector())
    assert read_checkpoint("good.pt")["model_config"]["embed_dim"] == 16
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("no checkpoint")
    Path("raw.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"a": 1}, "other.pt")
    torch.save({"state_dict": {}, "callbacks": Hostile()}, "hostile.pt")
    for name, word in (
            ("cut.pt", "truncated"), ("empty.pt", "not a checkpoint"), ("raw.pt", "raw.pt"),
            ("text.pt", "not a checkpoint"), ("other.pt", "no checkpoint of"),
            ("hostile.pt", "convert it"), ("missing.pt", "no such")):
        with pytest.raises(ValueError, match=word) as error:
            read_checkpoint(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not Path("hostile_code_ran").exists()


def test_load_weights_names_what_does_not_fit():
    detector = tiny_detector()
    weights = detector.state_dict()
    sparse = weights["stages.0.norm.bias"].to_sparse()
    for name, x, words in (
            ("stages.0.norm.bias", None, "is missing in the file"),
            ("stages.0.norm.bias", torch.zeros(3), "is .3,. in the file, .16,. in the model"),
            ("stages.0.norm.bias", sparse, "is Tensor in the file"),
            ("stages.9.norm.bias", torch.zeros(3), "is .3,. in the file, missing in the model")):
        changed = weights | {name: x}
        with pytest.raises(ValueError, match=f"^a.pt: 1 weights do not fit .*{name} {words}"):
            load_weights(detector, changed, "a.pt", new_classes=True)


def test_load_weights_starts_class_layers_from_scratch_where_asked(capsys):
    weights = tiny_detector(num_classes=3).state_dict()
    with pytest.raises(ValueError, match="6 weights do not fit"):
        load_weights(tiny_detector(num_classes=5), weights, "a.pt")
    fresh = tiny_detector(num_classes=5).state_dict()
    detector = load_weights(tiny_detector(num_classes=5), weights, "a.pt", new_classes=True)
    said = capsys.readouterr().out
    assert said.startswith("a.pt: the class layers start from scratch: heads.0.cls_pred.")
    assert said.count("\n") == 1
    for name, x in detector.state_dict().items():
        source = fresh if ".cls_pred." in name else weights
        assert torch.equal(x, source[name]), name
    load_weights(tiny_detector(num_classes=3), weights, "a.pt", new_classes=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="do not fit"):  # another architecture as well
        load_weights(tiny_detector(num_classes=5, embed_dim=24), weights, "a.pt", new_classes=True)


def test_load_rvt_names_what_is_unmatched(tmp_path):
    path = tmp_path / "changed.ckpt"
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    for change, words in (
        ({"mdl.backbone.extra": torch.zeros(3)}, "extra is .3,. in the file"),
        ({"mdl.fpn.bu_conv1.conv.weight": None}, "fpn.down.1.conv.weight is missing"),
        ({"mdl.yolox_head.cls_preds.1.bias": torch.zeros(5)}, "heads.1.cls_pred.bias is .5,."),
    ):
        changed = reference["state_dict"] | change
        weights = {name: x for name, x in changed.items() if x is not None}
        torch.save({"state_dict": weights}, path)
        with pytest.raises(ValueError, match=words):
            load_rvt(path, input_hw=(128, 160), partition_split=1)
    torch.save({"state_dict": {"mdl.other": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="changed.ckpt: no checkpoint of RVT"):
        load_rvt(path, input_hw=(128, 160))


def test_weights_of_rvt_start_class_layers_from_scratch_where_asked(tmp_path, capsys):
    path = tmp_path / "rvt.ckpt"
    torch.save(torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"], path)
    shape = dict(input_hw=(128, 160), partition_split=1, num_classes=5)
    with pytest.raises(ValueError, match="do not fit"):
        load_rvt(path, **shape)
    detector = Detector(ModelConfig(embed_dim=32, fpn_depth=0.33, **shape))
    load_weights(detector, read_weights(path), path, new_classes=True)
    assert "class layers start from scratch" in capsys.readouterr().out


def test_load_detector_takes_frames_of_another_size(tmp_path):
    detector = tiny_detector()
    path = write_checkpoint(tmp_path / "a.pt", detector)
    assert load_detector(path).config == detector.config
    other = load_detector(path, input_hw=(384, 640))
    assert other.config.input_hw == (384, 640)
    assert other.config.partition_split == 2  # chosen for the new size
    assert torch.equal(other.stages[0].conv.weight, detector.stages[0].conv.weight)

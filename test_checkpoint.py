"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- checkpoints

def test_a_checkpoint_that_is_none_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detector = tiny_detector()
    good = dict(model=detector.state_dict(), model_config=dataclasses.asdict(detector.config))
    torch.save(good, "good.pt")
    assert read_checkpoint("good.pt")["model_config"]["embed_dim"] == 16
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("no checkpoint")
    torch.save({"a": 1}, "other.pt")
    torch.save({"state_dict": {}, "callbacks": Hostile()}, "hostile.pt")
    Path("raw.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    for name, word in (("cut.pt", "truncated"), ("empty.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                       ("other.pt", "no checkpoint of"), ("hostile.pt", "convert it"), ("missing.pt", "no such"),
                       ("raw.pt", "raw.pt")):
        with pytest.raises(ValueError, match=word) as error:
            read_checkpoint(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not Path("hostile_code_ran").exists()


def test_load_rvt_names_what_is_unmatched(tmp_path):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)["checkpoint"]
    for change, word in (({"mdl.backbone.extra": torch.zeros(3)}, "backbone.extra|extra"),
                         ({"mdl.fpn.bu_conv1.conv.weight": None}, "fpn.down.1.conv.weight is missing"),
                         ({"mdl.yolox_head.cls_preds.1.bias": torch.zeros(5)}, r"heads.1.cls_pred.bias is \(5,\)")):
        weights = {key: value for key, value in (reference["state_dict"] | change).items() if value is not None}
        torch.save({"state_dict": weights}, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match=word):
            load_rvt(tmp_path / "changed.ckpt", input_hw=(128, 160), partition_split=1)
    torch.save({"state_dict": {"mdl.other": torch.zeros(1)}}, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of RVT"):
        load_rvt(tmp_path / "changed.ckpt", input_hw=(128, 160))



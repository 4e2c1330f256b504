"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- configuration

KEYS = dict(out_dir="out", learning_rate=1e-4, batch_size=6, fpn_stages=(2, 3, 4), compile=True, names=("a",))


def test_options_are_read_by_the_type_of_their_default():
    config = configurator.configure(KEYS, ["--learning_rate=1", "--fpn_stages", "1,2", "--compile=false", "--names=car,bus",
                                           "--batch_size", "4"])
    assert config == dict(KEYS, learning_rate=1.0, fpn_stages=(1, 2), compile=False, names=("car", "bus"), batch_size=4)
    assert isinstance(config["learning_rate"], float) and KEYS["batch_size"] == 6
    assert configurator.configure(KEYS, ["--names=tram"])["names"] == ("tram",)
    assert configurator.configure(KEYS, ["--names="])["names"] == ()
    assert configurator.configure(KEYS, ["--compile", "--batch_size=1"])["compile"] is True


def test_config_files_and_options_apply_in_order_and_the_result_runs_again(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 3\n_half = batch_size * 0.5\nlearning_rate = _half / 100\n")
    config = configurator.configure(KEYS, [str(tmp_path / "a.py"), "--batch_size=5"])
    assert config["batch_size"] == 5 and config["learning_rate"] == 0.015
    (tmp_path / "b.py").write_text(configurator.dump(config))
    assert configurator.configure(KEYS, [str(tmp_path / "b.py")]) == config


@pytest.mark.parametrize("text, word", [
    ("batchsize = 3", "batch_size"), ("batch_size = 2.5", "no int"), ("batch_size = True", "no int"),
    ("fpn_stages = 3", "fpn_stages"), ("out_dir = 3", "out_dir"), ("x = (", "never closed"), ("1 / 0", "division by zero")])
def test_a_mistake_in_a_config_file_is_named(tmp_path, text, word):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=word) as error:
        configurator.configure(KEYS, [str(tmp_path / "c.py")])
    assert "c.py" in str(error.value)


@pytest.mark.parametrize("argv, word", [
    (["--learning_rat=1"], "learning_rate"), (["--batch_size=x"], "batch_size"), (["--batch_size"], "no value"),
    (["nothing.py"], "nothing.py"), (["--compile=7"], "compile"), (["--zzz", "3"], "known keys")])
def test_a_mistake_on_the_command_line_is_named(argv, word):
    with pytest.raises(ValueError, match=word):
        configurator.configure(KEYS, argv)



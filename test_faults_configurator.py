"""Mistakes in a config."""

import pytest

import configurator
from test_configurator import KEYS


@pytest.mark.parametrize("text, word", [
    ("batchsize = 3", "did you mean batch_size"),
    ("batch_size = 2.5", "no int"),
    ("batch_size = True", "no int"),
    ("fpn_stages = 3", "fpn_stages"),
    ("out_dir = 3", "out_dir"),
    ("learning_rate = float('nan')", "finite"),
    ("x = (", "never closed"),
    ("1 / 0", "division by zero"),
])
def test_configure_names_a_mistake_in_a_file(tmp_path, text, word):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=f"c.py.*{word}"):
        configurator.configure(KEYS, [str(tmp_path / "c.py")])


@pytest.mark.parametrize("argv, word", [
    (["--learning_rat=1"], "learning_rate"),
    (["--batch_size=x"], "batch_size"),
    (["--batch_size"], "no value"),
    (["nothing.py"], "nothing.py"),
    (["--compile=7"], "compile"),
    (["--zzz", "3"], "known are batch_size"),
])
def test_configure_names_a_mistake_on_the_command_line(argv, word):
    with pytest.raises(ValueError, match=word):
        configurator.configure(KEYS, argv)

"""Tests of configurator.py."""

import pytest

import configurator

# ==== configurator.py

KEYS = dict(out_dir="out", learning_rate=1e-4, batch_size=6, fpn_stages=(2, 3, 4), compile=True,
            names=("a",))


@pytest.mark.parametrize("argv, key, want", [
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--batch_size", "4"], "batch_size", 4),
    (["--fpn_stages", "1,2"], "fpn_stages", (1, 2)),
    (["--compile=false"], "compile", False),
    (["--compile", "--batch_size=1"], "compile", True),
    (["--names=car,bus"], "names", ("car", "bus")),
    (["--names=tram"], "names", ("tram",)),
    (["--names=30"], "names", (30,)),
    (["--names="], "names", ()),
    (["--out_dir=3"], "out_dir", "3"),
])
def test_configure_reads_options_by_the_type_of_their_default(argv, key, want):
    got = configurator.configure(KEYS, argv)[key]
    assert got == want and type(got) is type(want)


def test_configure_leaves_the_defaults_as_they_are():
    configurator.configure(KEYS, ["--batch_size=4"])
    assert KEYS["batch_size"] == 6


def test_configure_applies_files_and_options_in_order(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("batch_size = 3\n_half = batch_size * 0.5\nlearning_rate = _half / 100\n")
    config = configurator.configure(KEYS, ["--batch_size=7", str(file), "--names=b"])
    assert config == KEYS | dict(batch_size=3, learning_rate=0.015, names=("b",))
    assert configurator.configure(KEYS, [str(file), "--batch_size=5"])["batch_size"] == 5


def test_dump_is_a_config_file_that_gives_the_same_config(tmp_path):
    config = configurator.configure(KEYS, ["--batch_size=5", "--names=car,bus"])
    (tmp_path / "b.py").write_text(configurator.dump(config))
    assert configurator.configure(KEYS, [str(tmp_path / "b.py")]) == config


def test_command_line_ends_in_one_line_for_a_mistake_and_in_130_for_ctrl_c():
    def mistaken(argv):
        raise ValueError("two\n  lines")

    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^error: two lines$"):
        configurator.command_line(mistaken)
    with pytest.raises(SystemExit, match="^130$"):
        configurator.command_line(interrupted)


def test_command_line_shows_where_a_bug_is():
    def buggy(argv):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        configurator.command_line(buggy)

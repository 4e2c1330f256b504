"""Tests of bench_memory.py."""

import json

import pytest

import bench_memory


@pytest.fixture(scope="module")
def bench_rows():
    argv = ["--input_hw=48,64", "--embed_dim=16", "--dim_head=8", "--batch_sizes=1,2", "--steps=1",
            "--device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **options: lines.append(words[0]))
        bench_memory.main(argv)
    return json.loads(lines[-1])["rows"]


def test_main_ends_with_json_of_a_row_for_each_batch_size_and_recomputation(bench_rows):
    settings = [(row["checkpointing"], row["batch"]) for row in bench_rows]
    assert settings == [(False, 1), (False, 2), (True, 1), (True, 2)]
    for row in bench_rows:
        assert row["peak_gib"] > 0
        assert row["spread_s"][0] <= row["step_s"] <= row["spread_s"][1]


def test_kept_gib_grows_with_the_batch_and_shrinks_by_recomputation(bench_rows):
    one, two, one_recomputed, _ = [row["kept_gib"] for row in bench_rows]
    assert two == pytest.approx(2 * one, rel=0.1)
    assert one_recomputed < 0.8 * one
    assert any(name.startswith("stages") for name in bench_rows[0]["parts"])


def test_largest_batch_lies_on_the_line_through_the_peaks():
    rows = [{"batch": 1, "peak_gib": 3.0}, {"batch": 3, "peak_gib": 7.0}]
    assert bench_memory.largest_batch(rows, 24.5) == 11  # 1 + 2 * 11 = 23
    assert bench_memory.largest_batch(rows[:1], 24.5) == "n/a"
    assert bench_memory.largest_batch([row | {"peak_gib": "n/a"} for row in rows], 24.5) == "n/a"

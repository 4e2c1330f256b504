"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ==== bench_memory.py

BENCH = ["--input_hw=48,64", "--embed_dim=16", "--dim_head=8", "--batch_sizes=1,2", "--steps=1", "--device=cpu"]


@pytest.fixture(scope="module")
def bench_lines():
    import contextlib
    import io
    with contextlib.redirect_stdout(io.StringIO()) as text:
        bench_memory.main(BENCH)
    return text.getvalue().splitlines()


def test_the_last_line_is_json_with_a_row_for_each_batch_size_with_and_without_recomputation(bench_lines):
    rows = json.loads(bench_lines[-1])["rows"]
    assert [(row["checkpointing"], row["batch"]) for row in rows] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert all(row["peak_gib"] > 0 and row["spread_s"][0] <= row["step_s"] <= row["spread_s"][1] for row in rows)


def test_recomputation_keeps_fewer_bytes(bench_lines):
    rows = json.loads(bench_lines[-1])["rows"]
    assert rows[2]["kept_gib"] < 0.8 * rows[0]["kept_gib"] and rows[3]["kept_gib"] < 0.8 * rows[1]["kept_gib"]
    assert any(name.startswith("stages") for name in rows[0]["parts"])

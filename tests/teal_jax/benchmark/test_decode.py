import dataclasses

import pytest

from teal_jax.benchmark.decode import Bench, Work
from teal_jax.benchmark.plot import plot_speed
from teal_jax.benchmark.tables import DECODE, markdown_table
from teal_jax.benchmark.traffic import limit, token_bytes
from teal_jax.errors import ContextError
from tests.teal_jax.benchmark.tiny import CONFIG, counting_step, fake_timer, model

WORK = Work(sparsities=(0.0, 0.5), context=40, tokens=16, repeats=2)
BANDWIDTH = 1e9
UNEVEN = ["greedy-like 50 %", "greedy-like 50 %, biases"]


def collect(step=counting_step, timer=fake_timer, work=WORK):
    failed, came = [], []
    bench = Bench(model(), work, BANDWIDTH, step, timer=timer)
    rows = bench.rows(lambda what, error: failed.append(what), came.append)
    assert came == rows
    return rows, failed


@pytest.fixture(scope="module")
def rows():
    rows, failed = collect()
    assert not failed
    return rows


def test_every_row_is_measured(rows):
    assert [row.name for row in rows] == ["dense", "sparse path, 0 %", "sparse 50 %", *UNEVEN]
    for row in rows[:-1]:
        assert row.ms_per_token == pytest.approx(1e3 / row.tokens_per_second)
        assert len(row.repeats) == WORK.repeats
        assert row.tokens_per_second == max(row.repeats)
        read = token_bytes(CONFIG, 4, row.realised, WORK.lengths)
        assert row.bytes_per_token == read
        assert row.bandwidth_share == pytest.approx(read * row.tokens_per_second / BANDWIDTH)
        assert row.kernels_per_token == pytest.approx(2 / WORK.tokens)
        assert row.kernel_ms == pytest.approx(3 / WORK.tokens)
        assert row.kernels["kept_matvec"] == pytest.approx([1 / WORK.tokens, 2 / WORK.tokens])
        assert row.memory_bytes > 4 * CONFIG.num_params
        assert row.first_token_s > 0


def test_realised_sparsity_is_counted_on_the_run(rows):
    assert rows[0].realised == 0
    assert rows[1].realised < 0.01
    for row in rows[2:]:
        assert row.realised == pytest.approx(0.5, abs=0.03)  # a model this small has few channels to count
        assert "other tokens" not in row.note


def test_biases_change_what_is_read_but_not_the_tokens(rows):
    plain, biased = rows[-2:]
    outputs = sum(d_out for _, d_out in CONFIG.projection_shapes)
    assert biased.bytes_per_token == plain.bytes_per_token + 4 * CONFIG.num_layers * outputs
    assert biased.note == plain.note  # not: other tokens than the counted run's


def test_a_failing_path_leaves_the_other_rows():
    def broken(*arguments):
        raise RuntimeError("no such kernel in /some/folder/here.py\nand a long trace")

    rows, failed = collect(step=broken)
    assert failed == [row.name for row in rows[1:]]
    assert rows[0].tokens_per_second > 0
    assert rows[1].note == "RuntimeError: no such kernel in <path>"
    assert "| sparse 50 % | - |" in markdown_table(rows, DECODE)


def test_without_a_profiler_the_wall_time_stands():
    def broken(call, iterations):
        raise RuntimeError("no CUPTI")

    (row,), failed = collect(timer=broken, work=dataclasses.replace(WORK, sparsities=()))
    assert not failed
    assert row.tokens_per_second > 0
    assert row.kernel_ms is None
    assert row.note == "no profile: RuntimeError: no CUPTI"


def test_plot(rows, tmp_path):
    curve = lambda share: limit(CONFIG, 4, share, WORK.lengths, BANDWIDTH)  # noqa: E731
    path = plot_speed(rows, curve, tmp_path / "new" / "speed.png", title="tiny")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_prompt_needs_room():
    with pytest.raises(ContextError, match="longer context"):
        Work(context=128, tokens=128)

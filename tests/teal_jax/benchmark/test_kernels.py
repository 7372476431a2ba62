import jax
import jax.numpy as jnp
import pytest

from teal_jax.benchmark import cases
from teal_jax.benchmark.cases import Cases
from teal_jax.benchmark.kernels import bench_kernels, measure
from teal_jax.nn.quantized import QuantSpec
from tests.teal_jax.benchmark.tiny import CONFIG, TILES

LAUNCHES = {
    "norm": "norm_select",
    "qkv": "matvec",
    "o": "matvec",
    "down": "matvec",
    "lm_head": "matvec",
    "gate_up": "gate_up",
    "attention": "decode_attention",
}


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch):
    monkeypatch.setattr(cases, "ROTATION", 1)


def tiny_cases():
    return Cases(CONFIG, TILES, 0.5, jnp.float32, contexts=(32,), interpret=True)


def test_every_kernel_is_measured():
    built = {}

    class Recorded:
        def __iter__(self):
            for what, build in tiny_cases():
                yield what, lambda what=what, build=build: built.setdefault(what, build())

    def timer(call, iterations):
        outputs = jax.block_until_ready([call() for _ in range(1 + iterations)][-1])
        case = list(built.values())[-1]
        assert len(outputs) == case.calls
        # Twice as long for each kernel, and a copy that is nobody's.
        name = {"dense": "dense_matvec", "sparse": "kept_matvec"}.get(case.path, "gemm")
        name = case.launch if case.launch and "matvec" not in case.launch else name
        extra = [("copy", 1.0)] if case.launch else []
        return [[(f"{name}_1", 3e-6)] * case.calls + extra] * iterations

    failed, came = [], []
    rows = bench_kernels(
        Recorded(), 1e12, lambda what, error: failed.append((what, error)), came.append, iterations=2, timer=timer
    )
    assert not failed
    assert rows == came
    assert [what for what in built] == [f"{row.kernel} {row.path}" for row in rows[: len(built)]]
    assert all(row.microseconds == pytest.approx(3) for row in rows[: len(built)])
    total = rows[-2]
    assert (total.kernel, total.path) == ("four GEMVs", "sparse")
    assert total.microseconds == pytest.approx(12)
    dense = {row.kernel: row for row in rows if row.path == "dense"}
    sparse = {row.kernel: row for row in rows if row.path == "sparse"}
    assert dense["four GEMVs"].bytes == 4 * sum(CONFIG.projection_sizes)
    assert sparse["four GEMVs"].bytes == pytest.approx(dense["four GEMVs"].bytes / 2, rel=0.02)
    assert dense["down"].limit_us == pytest.approx(4 * 160 * 64 / 1e6)
    assert dense["down"].ratio == pytest.approx(3 / dense["down"].limit_us)


def test_quantised_kernels_read_fewer_bytes():
    spec = QuantSpec.parse("int4-g8")
    built = dict(Cases(CONFIG, TILES, 0.5, jnp.float32, contexts=(), quantize=spec, interpret=True))
    case = built["down sparse"]()
    assert case.bytes == pytest.approx(spec.bytes_of(160, 64) / 2, rel=0.02)
    jax.block_until_ready(case.start()())
    assert built["gate_up dense"]().bytes == 2 * spec.bytes_of(64, 160)
    assert built["lm_head dense"]().bytes == 64 * 96 + 4 * 96
    assert built["down xla"]().bytes == 4 * 160 * 64


def test_a_kernel_that_is_not_seen_is_an_error():
    _, build = next(iter(tiny_cases()))
    with pytest.raises(Exception, match="expected 2 launches of norm_select, got 0; seen: other"):
        measure(build(), lambda call, iterations: [[("other", 1.0)]], 1)


def test_a_failing_kernel_leaves_the_others_and_no_sum():
    def timer(call, iterations):
        raise RuntimeError("no profiler")

    failed = []
    rows = bench_kernels(tiny_cases(), 1e12, lambda what, error: failed.append(what), lambda row: None, timer=timer)
    assert not rows
    assert "qkv sparse" in failed

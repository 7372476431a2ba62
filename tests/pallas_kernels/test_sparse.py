import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse, support
from pallas_kernels.sparse import sparse_matvec
from pallas_kernels.support import use_pallas
from tests.pallas_kernels.float64 import draws, f64, masked, poisoned, product, same_bits


def check(batch, d_in, d_out, dtype, **how) -> None:
    """Raise unless the product matches float64, whatever is kept; `how` it is computed."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(d_in, d_out))
    for name, x, thresholds in draws(rng, batch, d_in, 1, 64, dtype):
        (kept,) = masked(x, thresholds)
        clean = jnp.asarray(weight, dtype)
        w = clean if how.get("implementation") == "xla" else poisoned(clean, kept)
        read = (kept != 0).any(axis=0)
        y = sparse_matvec(jnp.asarray(x, dtype), w, thresholds[0], **how)
        assert y.dtype == dtype
        product(kept[:, read], f64(w)[read]).rounded(dtype).check(y, name)
        assert same_bits(y, sparse_matvec(jnp.asarray(x, dtype), w, thresholds[0], **how)), name


@pytest.mark.parametrize(("batch", "d_in", "d_out", "dtype"), [(1, 257, 33, "float32"), (2, 320, 7, "bfloat16")])
def test_kernels_match_float64(batch, d_in, d_out, dtype):
    check(batch, d_in, d_out, dtype, interpret=True)


@pytest.mark.parametrize(("batch", "d_in", "d_out", "dtype"), [(1, 257, 33, "float32"), (20, 320, 7, "bfloat16")])
def test_xla_matches_float64(batch, d_in, d_out, dtype):
    check(batch, d_in, d_out, dtype, implementation="xla")


@pytest.fixture
def here(monkeypatch):
    """Says which of the two runs, and lets a test decide whether the kernels can."""
    ran = []
    monkeypatch.setattr(sparse, "masked_matmul", lambda x, w, t: ran.append("xla") or x @ w)
    monkeypatch.setattr("pallas_kernels.matvec.matvec", lambda *_, **__: ran.append("pallas") or (None,))
    monkeypatch.setattr("pallas_kernels.select.select", lambda *_, **__: None)

    def set_reason(reason: str | None) -> list[str]:
        monkeypatch.setattr("pallas_kernels.support.why_not", lambda: reason)
        return ran

    return set_reason


X, W = jnp.ones((1, 4)), jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("reason", "implementation", "expected"),
    [
        (None, None, "pallas"),
        (None, "pallas", "pallas"),
        (None, "xla", "xla"),
        ("no GPU", None, "xla"),
        ("no GPU", "xla", "xla"),
    ],
)
def test_implementation(here, reason, implementation, expected):
    ran = here(reason)
    sparse_matvec(X, W, 0.5, implementation=implementation)
    assert ran == [expected]


def test_asked_for_and_not_possible_raises(here):
    ran = here("there is no GPU")
    with pytest.raises(NotImplementedError, match=r'implementation="pallas": .*there is no GPU'):
        sparse_matvec(X, W, 0.5, implementation="pallas")
    assert ran == []


@pytest.mark.parametrize(
    ("batch", "dtype", "reason"), [(9, "float32", "1 to 8 rows, got 9"), (1, "float8_e4m3fn", "got float8")]
)
def test_what_the_kernels_do_not_take_falls_back_or_raises(here, batch, dtype, reason):
    here(None)
    assert use_pallas(None, jnp.dtype(dtype), batch) is False
    assert use_pallas("xla", jnp.dtype(dtype), batch) is False
    with pytest.raises(NotImplementedError, match=reason):
        use_pallas("pallas", jnp.dtype(dtype), batch)


def test_on_this_machine():
    """None never raises; "pallas" raises exactly where `why_not` has a reason."""
    reason = support.why_not()
    np.testing.assert_array_equal(sparse_matvec(X, W, 0.5), [[4, 4, 4]])
    if reason is not None:
        with pytest.raises(NotImplementedError, match="cannot run here"):
            sparse_matvec(X, W, 0.5, implementation="pallas")


def test_under_jit_with_a_traced_threshold():
    f = jax.jit(lambda t: sparse_matvec(jnp.asarray([[1.0, 2.0, 3.0, 4.0]]), W, t))
    np.testing.assert_array_equal(f(2.5), [[7, 7, 7]])
    np.testing.assert_array_equal(f(0.0), [[10, 10, 10]])


WRONG = {
    "x ndim": ((jnp.ones(4), W, 0.5), ValueError, r"expected x \[batch, d_in\].*got \(4,\)"),
    "weight ndim": ((X, jnp.ones(4), 0.5), ValueError, r"got \(1, 4\) and \(4,\)"),
    "transposed": ((X, W.T, 0.5), ValueError, r"got \(1, 4\) and \(3, 4\)"),
    "dtype": ((X, W.astype(jnp.bfloat16), 0.5), TypeError, "expected the dtype of x, float32, got bfloat16"),
    "negative": ((X, W, -0.5), ValueError, "expected every one >= 0.*got -0.5"),
    "NaN": ((X, W, jnp.nan), ValueError, "expected every one >= 0.*got nan"),
    "array": ((X, W, jnp.ones(4)), ValueError, r"expected a scalar, got \(4,\)"),
}


@pytest.mark.parametrize("how", [{}, {"implementation": "xla"}, {"interpret": True}], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_raises(wrong, how):
    arguments, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        sparse_matvec(*arguments, **how)


def test_wrong_implementation_raises():
    with pytest.raises(ValueError, match="""expected "pallas", "xla" or None, got 'triton'"""):
        sparse_matvec(X, W, 0.5, implementation="triton")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kept import Cut, KeptRows, kept_shapes, select_reference
from tests.pallas_kernels.float64 import Bounded, check_rows, draws, f64

THRESHOLDS = np.arange(21, dtype=np.float32).reshape(3, 7)


CASES = [(1, 1, 1, "float32"), (3, 129, 32, "bfloat16"), (8, 320, 64, "float32"), (2, 33, 64, "float16")]


@pytest.mark.parametrize(("batch", "d_in", "width", "dtype"), CASES)
def test_select_reference_lists_what_numpy_keeps(batch, d_in, width, dtype):
    reference = jax.jit(select_reference, static_argnames="width")
    for name, x, thresholds in draws(np.random.default_rng(0), batch, d_in, 3, width, dtype):
        rows = reference(jnp.asarray(x, dtype), jnp.asarray(thresholds, jnp.float32), width)
        check_rows(rows, Bounded(x, np.zeros_like(x)), thresholds, width, name)


def test_lists_made_by_hand():
    x = jnp.asarray([[0.0, -2.0, 1.0, 1.5, -0.0], [3.0, 1.0, -1.0, 0.5, 0.0]])
    rows = select_reference(x, jnp.asarray([1.0, 2.5]), width=4)
    np.testing.assert_array_equal(rows.count, [[3, 0], [1, 0]])
    np.testing.assert_array_equal(rows.index[0, 0], [0, 1, 3, 2])
    np.testing.assert_array_equal(np.sort(rows.index[0, 1]), [4, 5, 6, 7])
    np.testing.assert_array_equal(np.sort(rows.index[1, 0]), [0, 1, 2, 3])
    assert rows.index[1, 0, 0] == 0
    np.testing.assert_array_equal(rows.value[0, 0], [[0, -2, 1.5, 0], [3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.value[1, 0], [[0, 0, 0, 0], [3, 0, 0, 0]])
    assert not rows.value[:, 1].any()


def test_shapes_are_those_of_the_lists():
    rows = select_reference(jnp.ones((3, 20)), jnp.zeros(2), width=8)
    expected = kept_shapes(segments=2, lists=3, batch=3, width=8)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), rows) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    assert rows.batch == expected.batch == 3


def test_a_cut_of_one_call():
    cut = Cut.of([0.5, 2, 0])
    assert cut.thresholds.dtype == jnp.float32
    np.testing.assert_array_equal(cut.values, [0.5, 2, 0])
    np.testing.assert_array_equal(jnp.stack(cut.read()), [0.5, 2, 0])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("projections", [(0, 1, 2), (3,), (6, 4)])
def test_a_cut_picks_its_layer_and_projections(layer, projections):
    cut = Cut(jnp.asarray(THRESHOLDS), jnp.asarray([layer], jnp.int32), projections)
    np.testing.assert_array_equal(cut.values, THRESHOLDS[layer, list(projections)])
    np.testing.assert_array_equal(jnp.stack(cut.read()), THRESHOLDS[layer, list(projections)])


def test_one_program_serves_every_layer_and_threshold():
    traced = []

    @jax.jit
    def f(cut: Cut):
        traced.append(cut.projections)
        return cut.values

    for layer in (0, 2):
        for scale in (1, 2):
            values = f(Cut(jnp.asarray(scale * THRESHOLDS), jnp.asarray([layer], jnp.int32), (1, 5)))
            np.testing.assert_array_equal(values, scale * THRESHOLDS[layer, [1, 5]])
    assert traced == [(1, 5)]


def test_rows_are_a_pytree():
    rows = select_reference(jnp.ones((1, 4)), jnp.zeros(1), width=4)
    again = jax.jit(lambda r: r)(rows)
    assert isinstance(again, KeptRows)
    assert f64(again.value).sum() == 4

import jax.numpy as jnp
import numpy as np

from teal_jax.nn.cache import slot_positions, write, write_slots


def test_no_slot_is_written_twice_in_one_call():
    """A scatter with equal indices picks either value on a GPU."""
    positions = jnp.arange(11)[None]
    slots = write_slots(positions, jnp.ones((1, 11), bool), jnp.array([11]), 4)
    np.testing.assert_array_equal(slots, [[4] * 7 + [3, 0, 1, 2]])  # 4 is out of range: dropped


def test_padding_is_written_nowhere():
    positions = jnp.array([[0, 0, 0, 1]])
    mask = jnp.array([[False, False, True, True]])
    slots = write_slots(positions, mask, jnp.array([2]), 8)
    np.testing.assert_array_equal(slots, [[8, 8, 0, 1]])
    cache = write(jnp.zeros((1, 8, 1, 1)), jnp.arange(1.0, 5).reshape(1, 4, 1, 1), slots)
    np.testing.assert_array_equal(cache.ravel(), [3, 4, 0, 0, 0, 0, 0, 0])


def test_slots_know_their_positions():
    np.testing.assert_array_equal(slot_positions(jnp.array([0, 2, 6]), 4)[1:], [[0, 1, -2, -1], [4, 5, 2, 3]])
    assert (slot_positions(jnp.array([0]), 4) < 0).all()

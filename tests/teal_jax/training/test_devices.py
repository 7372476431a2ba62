import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from teal_jax.errors import TrainingError
from teal_jax.training.devices import check_batch, make_mesh, shardings

FOUR = AbstractMesh((4,), ("data",))


def test_largest_axis_that_divides():
    shapes = {"a": (8, 12), "b": (12, 8), "c": (8, 8), "d": (4, 6), "e": (3, 5), "f": (), "g": (16,)}
    tree = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    found = {name: sharding.spec for name, sharding in shardings(FOUR, tree, sharded=True).items()}
    cut = {"a": (None, "data"), "b": ("data", None), "c": ("data", None), "d": ("data", None), "g": ("data",)}
    assert found == {name: PartitionSpec(*cut.get(name, [None] * len(shape))) for name, shape in shapes.items()}
    whole = shardings(FOUR, tree, sharded=False)
    assert all(sharding.is_fully_replicated for sharding in whole.values())


def test_devices_must_divide_the_batch():
    check_batch(FOUR, 8, 2)
    with pytest.raises(TrainingError, match=r"4 devices do not divide the batch: 6 rows \("):
        check_batch(FOUR, 6, 1)
    with pytest.raises(TrainingError, match="8 rows in 4 parts, 2 rows each"):
        check_batch(FOUR, 8, 4)


def test_as_many_devices_as_there_are():
    here = len(jax.local_devices())
    assert make_mesh().size == here
    assert make_mesh(1).size == 1
    for count in (0, here + 1):
        with pytest.raises(TrainingError, match=f"got {count}"):
            make_mesh(count)

"""How a training lies on the devices: one mesh axis, `data`; one code for one device or many."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from teal_jax.errors import TrainingError

AXIS = "data"


def make_mesh(devices: Sequence[Any] | int | None = None) -> Mesh:
    """A mesh over `devices`: themselves, so many of the local ones, or all of those (None).

    Raises:
      TrainingError: fewer devices here than asked for.
    """
    local = jax.local_devices()
    if isinstance(devices, int):
        if not 1 <= devices <= len(local):
            raise TrainingError(f"devices must lie in [1, {len(local)}] here, got {devices}")
        devices = local[:devices]
    return Mesh(np.array(local if devices is None else devices), (AXIS,), axis_types=(AxisType.Auto,))


def check_batch(mesh: Mesh, batch: int, accumulate: int) -> None:
    """Raise `TrainingError` unless the rows that are read at a time fall evenly on the devices."""
    rows = batch // accumulate
    if rows % mesh.size:
        parts = f" in {accumulate} parts, {rows} rows each" if accumulate > 1 else ""
        raise TrainingError(
            f"{mesh.size} devices do not divide the batch: {batch} rows{parts}",
            hint=f"a batch that is a multiple of {mesh.size * accumulate}, or fewer devices",
        )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays `[accumulate, rows, ...]`: the rows shared out."""
    return NamedSharding(mesh, PartitionSpec(None, AXIS))


def shardings(mesh: Mesh, tree: Any, *, sharded: bool) -> Any:
    """A sharding for every leaf of `tree` (arrays or shapes): its own copy on each device, or a share of it.

    A share is cut along the largest axis that the devices divide, the first of equals; what has none is copied.
    """

    def one(leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        axes = [i for i, n in enumerate(leaf.shape) if n % mesh.size == 0]
        if sharded and axes:
            spec[max(axes, key=lambda i: leaf.shape[i])] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, tree)

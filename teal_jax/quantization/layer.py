"""The seven matrices of one block's parameters: read, replaced, checked."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS
from teal_jax.errors import QuantizationError
from teal_jax.nn.quantized import QuantizedWeight

type Layer = dict[str, Any]
"""The parameters of a block, as in `LanguageModel.params["weights"]["layers"][i]`."""


def matrix(layer: Layer, projection: int) -> Any:
    """The matrix of a projection, an array or a `QuantizedWeight`."""
    return layer[part_of(projection)][f"{PROJECTIONS[projection]}_proj"]["weight"]


def part_of(projection: int) -> str:
    """`"attn"` or `"mlp"`."""
    return "attn" if projection < 4 else "mlp"


def with_matrices(layer: Layer, matrices: Mapping[int, Any]) -> Layer:
    """The layer with other matrices, by index of projection; the rest is shared."""
    new = {key: dict(value) for key, value in layer.items()}
    for i, weight in matrices.items():
        name = f"{PROJECTIONS[i]}_proj"
        new[part_of(i)][name] = new[part_of(i)][name] | {"weight": weight}
    return new


def map_matrices(layer: Layer, change: Callable[[int, jax.Array], Any]) -> Layer:
    """The layer with `change(projection, matrix)` in the place of every matrix."""
    return with_matrices(layer, {i: change(i, matrix(layer, i)) for i in range(len(PROJECTIONS))})


def check_matrix(weight: jax.Array, name: str) -> str:
    """What to warn of: channels of the matrix `[d_in, d_out]` that are all zero, which stay so; `""` without any.

    Raises:
      QuantizationError: the matrix is not finite, or zero throughout.
    """
    finite, inputs, outputs = (int(count) for count in _counts(weight))
    if not finite:
        row, column = np.argwhere(~np.isfinite(np.asarray(weight, np.float32)))[0]
        raise QuantizationError(
            f"{name}: input channel {row}, output channel {column} is {float(weight[row, column])}", hint=_DAMAGED
        )
    if inputs == weight.shape[0]:
        raise QuantizationError(f"{name} is zero throughout", hint=_DAMAGED)
    return f"{name}: {inputs} input and {outputs} output channels" if inputs or outputs else ""


_DAMAGED = "the checkpoint is damaged: download it again, or load it in its own dtype"


@jax.jit
def _counts(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether all are finite; input and output channels that are all zero."""
    live = weight != 0
    return jnp.isfinite(weight).all(), (~live.any(axis=1)).sum(), (~live.any(axis=0)).sum()


def check_layer(layer: Layer, index: int) -> list[str]:
    """`check_matrix` for those of the seven that are arrays; what to warn of."""
    plain = {name: w for i, name in enumerate(PROJECTIONS) if not isinstance(w := matrix(layer, i), QuantizedWeight)}
    found = [check_matrix(weight, f"layer {index} {name}") for name, weight in plain.items()]
    return [line for line in found if line]

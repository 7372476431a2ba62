"""CATS (arXiv 2404.08763): a threshold on |silu(gate_proj x)| says which hidden channels up computes and down reads.

Gate and attention stay dense, so that no more than the share of up and down in a block's weights can be dropped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.errors import SparsityError
from teal_jax.nn.gates import Dense
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, block_graph, dense_block, embed
from teal_jax.sparsity.histogram import NUM_BINS, count_magnitudes, magnitude_quantiles
from teal_jax.sparsity.methods.choice import Choice, Task, no_thresholds

_UP, _DOWN = PROJECTIONS.index("up"), PROJECTIONS.index("down")


def choose(task: Task) -> Choice:
    """The same share of every block's hidden channels, so that the model sparsity is the target.

    Raises:
      SparsityError: more than up and down hold.
    """
    config = task.lm.config
    sizes = np.array(config.projection_sizes, np.float64)
    most = float((sizes[_UP] + sizes[_DOWN]) / sizes.sum())
    if task.target > most:
        raise SparsityError(
            f"cats drops weights of up and down only: at most {most:.3f} of this model, got a target of {task.target}",
            hint="choose a lower target or another method",
        )
    sparsity = np.zeros((config.num_layers, len(PROJECTIONS)))
    sparsity[:, [_UP, _DOWN]] = task.target / most
    thresholds = no_thresholds(sparsity)
    thresholds[:, _UP] = [magnitude_quantiles(counts, np.array(task.target / most)) for counts in _counts(task)]
    return Choice(sparsity=sparsity, thresholds=thresholds, gate="gate_output", notes={"most": most})


def _counts(task: Task) -> np.ndarray:
    """Histograms of |silu(gate_proj x)| of every layer, int64 `[layers, NUM_BINS]`; kept in the memo."""
    memo, lm, tokens = task.calibration.memo, task.lm, task.calibration.tokens
    if "cats" in memo:
        return memo["cats"]
    prefix = task.calibration.notes.get("dense_prefix", 0)
    counts = np.zeros((lm.config.num_layers, NUM_BINS), np.int64)
    x = embed(lm, tokens)
    for layer in track(range(lm.config.num_layers), "Counting gate outputs", enabled=task.progress):
        outputs = []
        for part in batches(*tokens.shape):
            y, found = _count_block(lm.config, lm.params["weights"]["layers"][layer], x[part], prefix)
            counts[layer] += np.asarray(found)
            outputs.append(y)
        x = jnp.concatenate(outputs)
    memo["cats"] = counts
    return counts


@functools.partial(jax.jit, static_argnums=0)
def _count_block(
    config: ModelConfig, layer_params: dict, x: jax.Array, prefix: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, taps = dense_block(config, layer_params, x)
    gated = nnx.merge(block_graph(config), layer_params).mlp.gated(taps.mlp_in, Dense())
    return y, count_magnitudes(gated, jnp.broadcast_to(jnp.arange(x.shape[1]) >= prefix, x.shape[:2]))

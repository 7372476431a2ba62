"""WiSparse (arXiv 2602.14452): thresholds of |x_i| ||W[i, :]||_2 ** a, with an exponent for each site of each layer.

The paper searches exponents and the shares of blocks by evolution; here each exponent is the best of a grid by block
error, one site after the other, and blocks share alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.nn.attention import make_context
from teal_jax.nn.gates import Threshold
from teal_jax.progress import track
from teal_jax.sparsity.blocks import TOKENS_PER_BATCH, block_graph, dense_block, embed
from teal_jax.sparsity.gating import layer_weights, row_norms
from teal_jax.sparsity.methods import greedy
from teal_jax.sparsity.methods.choice import Choice, Task
from teal_jax.sparsity.methods.was import statistics
from teal_jax.sparsity.plan import Score

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Exponents tried; 0 is TEAL's score, 1 WINA's."""

SEARCHED_AT = 0.5
"""The sparsity at which exponents are compared: one search then serves every target."""


def choose(task: Task) -> Choice:
    """Thresholds of the score along its own greedy path."""
    memo = task.calibration.memo
    if "wisparse exponents" not in memo:
        memo["wisparse exponents"] = exponents(task)
    score = Score(norm=2, exponent=memo["wisparse exponents"].tolist())
    found = statistics(task, score, "wisparse")
    sparsity, notes = greedy.shares(task, greedy.scaled_path(task, found, "wisparse path"))
    return Choice(sparsity=sparsity, thresholds=found.thresholds(sparsity), score=score, notes=notes)


def exponents(task: Task) -> np.ndarray:
    """The best exponent of the grid for each site, one site after the other, float64 `[layers, 7]`."""
    lm, tokens = task.lm, task.calibration.tokens
    config = lm.config
    rows = max(1, min(len(tokens), TOKENS_PER_BATCH // tokens.shape[1]))
    x = embed(lm, tokens[:rows])
    best = []
    for layer in track(range(config.num_layers), "Choosing exponents", enabled=task.progress):
        params = lm.params["weights"]["layers"][layer]
        norms = tuple(row_norms(weight, 2) for weight in layer_weights(lm.params["weights"], layer))
        rungs, x = _of_block(config, params, x, norms)
        best.append(np.array(GRID)[np.asarray(rungs)])
    return np.stack(best)


@functools.partial(jax.jit, static_argnums=0)
def _of_block(config: ModelConfig, layer_params: dict, x: jax.Array, norms: tuple) -> tuple[jax.Array, jax.Array]:
    """Places in the grid of the exponents with the least mean square error of the block's output, and that output.

    Every projection stands at `SEARCHED_AT`. One program a block: a candidate at a time from the host had each of them
    compute the dense block and all medians again. Int32 `[7]`, and the dense y, the shape of x.
    """
    dense, taps = dense_block(config, layer_params, x)
    block, context = (
        nnx.merge(block_graph(config), layer_params),
        make_context(config, jnp.ones(x.shape[:2], bool), None),
    )
    grid = jnp.asarray(GRID, jnp.float32)

    def cuts(site: jax.Array, norm: jax.Array) -> jax.Array:
        score = jnp.abs(site.astype(jnp.float32))
        return jax.lax.map(lambda exponent: jnp.quantile(score * norm**exponent, SEARCHED_AT), grid)

    thresholds = [cuts(taps[site], norms[i]) for i, site in enumerate(SITE_OF_PROJECTION)]

    def error(rungs: jax.Array) -> jax.Array:
        gates = [Threshold(cut[rungs[i]], scale=norms[i] ** grid[rungs[i]]) for i, cut in enumerate(thresholds)]
        y, _, _ = block(x, tuple(gates), context)
        return jnp.mean((y.astype(jnp.float32) - dense.astype(jnp.float32)) ** 2)

    def one_site(rungs: jax.Array, site: jax.Array) -> tuple[jax.Array, None]:
        own = jnp.asarray(SITE_OF_PROJECTION) == site
        tried = jnp.where(own, jnp.arange(len(GRID))[:, None], rungs)
        return tried[jnp.argmin(jax.lax.map(error, tried))], None

    rungs, _ = jax.lax.scan(one_site, jnp.zeros(len(SITE_OF_PROJECTION), jnp.int32), jnp.arange(len(SITES)))
    return rungs, dense

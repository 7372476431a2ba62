"""R-Sparse (arXiv 2504.19449): the channels a threshold drops go through W's leading singular vectors instead.

`y = W^T s(x) + b^T a^T (x - s(x))`, with `a b` the best approximation of W of rank r. Rank and channels share one
budget of weights read; how, the paper searches by evolution over the model. Here each projection takes the split with
the least error of its own output on calibration text.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import keep_mask
from pallas_kernels.reference import matmul
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.progress import track
from teal_jax.sparsity.blocks import TOKENS_PER_BATCH, dense_block, embed
from teal_jax.sparsity.gating import layer_weights
from teal_jax.sparsity.methods.choice import Choice, Task, flat
from teal_jax.sparsity.plan import array_name

SPLITS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Shares of the budget that the low rank may have."""


def choose(task: Task) -> Choice:
    """The target everywhere, counted in weights read: what the low rank reads is dropped beside from the rows."""
    lm, tokens = task.lm, task.calibration.tokens
    rows = max(1, min(len(tokens), TOKENS_PER_BATCH // tokens.shape[1]))
    x = embed(lm, tokens[:rows])
    sparsity, arrays = flat(task), {}
    ranks = np.zeros(sparsity.shape, int)
    layers = range(lm.config.num_layers)
    columns = task.calibration.site_thresholds
    for layer in track(layers, "Low rank", enabled=task.progress):
        weights = layer_weights(lm.params["weights"], layer)
        x, taps = _block(lm.config, lm.params["weights"]["layers"][layer], x)
        for i, weight in enumerate(weights):
            a, b = factors(weight)
            tried = options(task.target, *weight.shape)
            shares = np.array([share for _, share in tried])
            thresholds = columns(i, np.tile(shares, (lm.config.num_layers, 1)))[layer]
            site = taps[SITE_OF_PROJECTION[i]].reshape(-1, weight.shape[0])
            errors = _errors(site, weight, a, b, np.array([rank for rank, _ in tried]), thresholds)
            rank, sparsity[layer, i] = tried[int(np.argmin(errors))]
            ranks[layer, i] = rank
            if rank:
                arrays[array_name("low_rank_a", layer, i)] = np.asarray(a, np.float32)[:, :rank]
                arrays[array_name("low_rank_b", layer, i)] = np.asarray(b, np.float32)[:rank]
    return Choice(sparsity=sparsity, arrays=arrays, notes={"ranks": ranks.tolist()})


def options(target: float, d_in: int, d_out: int) -> list[tuple[int, float]]:
    """Ranks and the sparsity of rows that goes with each: together they read `1 - target` of the weights."""
    found = {0: target}
    for split in SPLITS:
        rank = int(split * (1 - target) * d_in * d_out / (d_in + d_out))
        found[rank] = target + rank * (d_in + d_out) / (d_in * d_out)
    return sorted(found.items())


def factors(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a [d_in, n]`, `b [n, d_out]`, float32, with `a b = W` at n = min(d_in, d_out) and nearest W at every fewer."""
    u, s, v = jnp.linalg.svd(weight.astype(jnp.float32), full_matrices=False)
    return u * jnp.sqrt(s), jnp.sqrt(s)[:, None] * v


_block = functools.partial(jax.jit, static_argnums=0)(dense_block)


@jax.jit
def _errors(
    x: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array, ranks: jax.Array, thresholds: jax.Array
) -> jax.Array:
    """Mean square of what is lost of `W^T x` for each rank and its threshold, over x `[tokens, d_in]`."""

    def error(tried: tuple[jax.Array, jax.Array]) -> jax.Array:
        rank, threshold = tried
        dropped = jnp.where(keep_mask(x, threshold), 0, x).astype(jnp.float32)
        # Zeros in the place of the columns beyond the rank: a program serves every rank.
        low = matmul(dropped, a) * (jnp.arange(a.shape[1]) < rank)
        return jnp.mean((matmul(dropped, weight.astype(jnp.float32)) - matmul(low, b)) ** 2)

    return jax.lax.map(error, (ranks, thresholds))

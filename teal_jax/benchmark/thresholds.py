"""Thresholds for random weights that realise a given sparsity: fitted block by block, then corrected by the counts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.model import LanguageModel
from teal_jax.nn.attention import make_context
from teal_jax.nn.gates import Threshold
from teal_jax.sparsity.blocks import block_graph, embed

SHARES = np.linspace(0, 1, 1025)
"""At which the quantiles of |x| are kept."""

TOLERANCE = 0.01
"""Realised sparsity of a projection may be this far off before its threshold is corrected."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Thresholds that realise a sparsity on the fitted tokens.

    Attributes:
      sparsity: float64 `[layers, 7]`, asked for.
      thresholds: float32 `[layers, 7]`.
      quantiles: float32 `[layers, 4, 1025]`, of |x| at every site under those thresholds, at `SHARES`.
    """

    sparsity: np.ndarray
    thresholds: np.ndarray
    quantiles: np.ndarray

    def corrected(self, realised: np.ndarray) -> "Fit":
        """Thresholds rescaled where `realised [layers, 7]`, counted on a run, is off by more than `TOLERANCE`.

        The run's |x| are taken for the fitted ones times a factor, `t / Q(realised)`.
        """
        off = (np.abs(realised - self.sparsity) > TOLERANCE) & (self.sparsity > 0)
        found = np.stack([quantiles_at(q, r) for q, r in zip(self.quantiles, realised, strict=True)])
        factor = self.thresholds / np.maximum(found, np.finfo(np.float32).tiny)
        thresholds = np.where(off & (found > 0), self.thresholds * factor, self.thresholds)
        return dataclasses.replace(self, thresholds=thresholds.astype(np.float32))


def fit_thresholds(lm: LanguageModel, tokens: np.ndarray, sparsity: np.ndarray, prefix: int) -> Fit:
    """Thresholds under which the tokens after the first `prefix` realise `sparsity`.

    A fixed point: a threshold changes what later sites see. Inside a block each of the four sites depends only on
    those before it, and on earlier blocks: as many rounds a block as there are sites end at it.

    Args:
      lm: its gates are ignored.
      tokens: int `[rows, seq]`.
      sparsity: `[layers, 7]`; 0 gets threshold 0.
      prefix: leading tokens that stay dense, as a prompt does, and are not counted.
    """
    x = embed(lm, tokens)
    thresholds, quantiles = [], []
    for layer, wanted in enumerate(sparsity):
        weights = lm.params["weights"]["layers"][layer]
        threshold = np.zeros(len(wanted), np.float32)
        for _ in SITES:
            _, found = _block(lm.config, prefix, weights, x, threshold)
            threshold = quantiles_at(np.asarray(found), wanted)
        x, found = _block(lm.config, prefix, weights, x, threshold)
        thresholds.append(threshold)
        quantiles.append(np.asarray(found))
    return Fit(np.asarray(sparsity, np.float64), np.stack(thresholds), np.stack(quantiles))


def quantiles_at(quantiles: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The quantile of |x| at the share of each projection, float32 `[7]`, 0 at 0; quantiles `[4, 1025]`, by site."""
    found = [np.interp(share, SHARES, quantiles[site]) for site, share in zip(SITE_OF_PROJECTION, shares, strict=True)]
    return np.where(np.asarray(shares) > 0, found, 0).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(
    config: ModelConfig, prefix: int, weights: dict[str, Any], x: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A block's output under `threshold [7]`, and the quantiles of |x| at its sites `[4, 1025]`."""
    block = nnx.merge(block_graph(config), weights)
    where = jnp.broadcast_to(jnp.arange(x.shape[1]) >= prefix, x.shape[:2])
    context = make_context(config, jnp.ones(x.shape[:2], bool), None)
    y, _, taps = block(x, Threshold(threshold, where), context)

    def quantiles(tap: jax.Array) -> jax.Array:
        ordered = jnp.sort(jnp.abs(tap[:, prefix:].astype(jnp.float32)).reshape(-1))
        return ordered[np.rint(SHARES * (ordered.size - 1)).astype(np.int32)]

    return y, jnp.stack([quantiles(tap) for tap in taps])

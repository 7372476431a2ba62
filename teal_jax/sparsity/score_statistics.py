"""Histograms of a scaled score, `scale_i |x_i|`, one for each projection: where its thresholds come from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.model import LanguageModel
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, dense_block, embed
from teal_jax.sparsity.histogram import NUM_BINS, count_magnitudes, magnitude_quantiles
from teal_jax.sparsity.statistics import Calibration


@dataclasses.dataclass(frozen=True)
class ScoreStatistics:
    """As `Calibration`, for the score of one method.

    Attributes:
      config: of the model.
      counts: int64 `[layers, 7, NUM_BINS]`, histograms of the scores.
      tokens: int32 `[rows, seq]`, the calibration tokens.
      scales: float32 `[d_in]` for each projection of each layer.
    """

    config: ModelConfig
    counts: np.ndarray
    tokens: np.ndarray
    scales: tuple[tuple[jax.Array, ...], ...]

    def site_thresholds(self, projection: int, shares: np.ndarray) -> np.ndarray:
        """Thresholds of one projection, float32, for shares `[layers, ...]` in [0, 1]: each layer has its own."""
        rows = enumerate(np.minimum(shares, 1))
        return np.stack([magnitude_quantiles(self.counts[layer, projection], row) for layer, row in rows])

    def thresholds(self, sparsity: np.ndarray) -> np.ndarray:
        """Thresholds float32 `[layers, 7]` that drop the shares `sparsity [layers, 7]` of the calibration scores."""
        return np.stack([self.site_thresholds(i, sparsity[:, i]) for i in range(len(PROJECTIONS))], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _count_block(
    config: ModelConfig, layer_params: dict, x: jax.Array, prefix: jax.Array, scales: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    y, taps = dense_block(config, layer_params, x)
    mask = jnp.broadcast_to(jnp.arange(x.shape[1]) >= prefix, x.shape[:2])
    sites = [taps[site].astype(jnp.float32) * scale for site, scale in zip(SITE_OF_PROJECTION, scales, strict=True)]
    return y, jnp.stack([count_magnitudes(site, mask) for site in sites])


def count_scores(
    lm: LanguageModel, calibration: Calibration, scales: tuple[tuple[jax.Array, ...], ...], *, progress: bool = True
) -> ScoreStatistics:
    """Histograms of `scales[layer][projection] * |x|` on the calibration tokens, the model dense.

    A pass over the text, block by block, as `calibrate` makes one.
    """
    counts = np.zeros((lm.config.num_layers, len(PROJECTIONS), NUM_BINS), np.int64)
    prefix = calibration.notes.get("dense_prefix", 0)
    x = embed(lm, calibration.tokens)
    for layer in track(range(lm.config.num_layers), "Counting scores", enabled=progress):
        outputs = []
        for part in batches(*calibration.tokens.shape):
            params = lm.params["weights"]["layers"][layer]
            y, found = _count_block(lm.config, params, x[part], prefix, scales[layer])
            counts[layer] += np.asarray(found)
            outputs.append(y)
        x = jnp.concatenate(outputs)
    return ScoreStatistics(lm.config, counts, calibration.tokens, scales)

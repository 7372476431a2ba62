"""Calibration: push text through the dense model block by block and count |x| at every site."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import SITES, ModelConfig
from teal_jax.data import TextSource, calibration_rows
from teal_jax.default_text import default_documents
from teal_jax.errors import DataError
from teal_jax.model import LanguageModel, dense_prefix_length
from teal_jax.nn.block import Taps
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, dense_block, embed
from teal_jax.sparsity.histogram import NUM_BINS, count_magnitudes
from teal_jax.sparsity.parity import SignedHistogram
from teal_jax.sparsity.statistics import Calibration

type ThresholdRule = Literal["magnitude", "signed"]


@functools.partial(jax.jit, static_argnums=0)
def _count_block(
    config: ModelConfig, layer_params: dict, x: jax.Array, prefix: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, taps = dense_block(config, layer_params, x)
    mask = jnp.broadcast_to(jnp.arange(x.shape[1]) >= prefix, x.shape[:2])
    return y, jnp.stack([count_magnitudes(site, mask) for site in taps])


@functools.partial(jax.jit, static_argnums=0)
def _tap_block(config: ModelConfig, layer_params: dict, x: jax.Array) -> tuple[jax.Array, Taps]:
    return dense_block(config, layer_params, x)


def calibrate(
    lm: LanguageModel,
    data: TextSource | None = None,
    *,
    num_tokens: int = 20480,
    seq_len: int | None = None,
    seed: int = 0,
    dense_prefix: float | int = 0,
    threshold_rule: ThresholdRule = "magnitude",
    progress: bool = True,
) -> Calibration:
    """Count the activations of the dense model on calibration text.

    Block by block: each block runs once over all tokens, its four sites go into histograms of |x| inside jit,
    and only the activations between two blocks are kept, `num_tokens * d_model` values.

    Args:
      lm: the model; its gates are ignored.
      data: text, path(s) of .txt or .jsonl, or tokens int `[rows, seq]` (taken as they are). None takes the
        paper's Alpaca where the hub is reachable, else the bundled stories with a warning (the embedded model
        always takes those).
      num_tokens: tokens to use, >= `seq_len`; text is cut into rows of `seq_len`.
      seq_len: tokens a row; None: 2048, or the model's longest sequence where that is shorter.
      seed: which rows of a longer text are taken, and in which order.
      dense_prefix: leading tokens of each row left out of the counts, a share (float) or a count (int).
      threshold_rule: `"magnitude"`: quantiles of |x|. `"signed"`: the reference code's rule, for parity; it holds
        one block's activations in host memory.
      progress: draw a progress bar.

    Returns:
      A `Calibration`: thresholds for any sparsity, and the tokens that a greedy allocation needs.

    Raises:
      DataError: empty, too short or undecodable data, or tokens outside the vocabulary.

    References:
      TEAL, arXiv 2408.14690, section 4.1.
    """
    if threshold_rule not in ("magnitude", "signed"):
        raise ValueError(f"threshold_rule must be 'magnitude' or 'signed', got {threshold_rule!r}")
    data = default_documents(lm.name) if data is None else data
    rows = calibration_rows(lm, data, num_tokens=num_tokens, seq_len=seq_len, seed=seed)
    prefix = dense_prefix_length(dense_prefix, rows.tokens.shape[1])
    if prefix >= rows.tokens.shape[1]:
        raise DataError(
            f"dense_prefix leaves nothing to count: {prefix} of {rows.tokens.shape[1]} tokens a row",
            hint="lower dense_prefix or raise seq_len",
        )
    calibration = Calibration(
        config=lm.config,
        counts=np.zeros((lm.config.num_layers, len(SITES), NUM_BINS), np.int64),
        tokens=rows.tokens,
        notes={
            "model": lm.name,
            "data": rows.source,
            "rows": len(rows.tokens),
            "seq_len": rows.tokens.shape[1],
            "seed": seed,
            "dense_prefix": prefix,
            "threshold_rule": threshold_rule,
            "dtype": str(lm.dtype),
            "quantization": lm.quantization,
        },
    )
    signed = []
    x = embed(lm, rows.tokens)
    slices = batches(*rows.tokens.shape)
    layers = lm.params["weights"]["layers"]
    for layer in track(range(lm.config.num_layers), "Calibrating", enabled=progress):
        outputs = []
        for part in slices:
            # Counts leave the device per batch: a batch cannot overflow 32 bits, a model's whole text could.
            y, counts = _count_block(lm.config, layers[layer], x[part], prefix)
            calibration.counts[layer] += np.asarray(counts)
            outputs.append(y)
        if threshold_rule == "signed":
            signed.append(_signed_histograms(lm.config, layers[layer], x, slices, prefix))
        x = jnp.concatenate(outputs)
    calibration.check_finite()
    return dataclasses.replace(calibration, signed=signed) if signed else calibration


def _signed_histograms(
    config: ModelConfig, layer_params: dict[str, Any], x: jax.Array, slices: list[slice], prefix: int
) -> list[SignedHistogram]:
    taps = [jax.tree.map(np.asarray, _tap_block(config, layer_params, x[part])[1]) for part in slices]
    return [SignedHistogram.of(np.concatenate([tap[site][:, prefix:] for tap in taps])) for site in range(len(SITES))]

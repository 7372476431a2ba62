"""Kullback-Leibler divergence of a sparse model from the dense one, per token, on calibration text."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.model import LanguageModel, abstract_decoder, model_functions
from teal_jax.nn.decoder import Observer
from teal_jax.nn.gates import Dense, ModelGates, Threshold
from teal_jax.sparsity.blocks import TOKENS_PER_BATCH
from teal_jax.sparsity.statistics import Calibration

_LOGITS_AT_ONCE = 1024


def sample(calibration: Calibration) -> np.ndarray:
    """Calibration rows for one batch, int32 `[rows, seq]`."""
    return calibration.tokens[: max(1, TOKENS_PER_BATCH // calibration.tokens.shape[1])]


def divergence(lm: LanguageModel, thresholds: np.ndarray, tokens: np.ndarray) -> float:
    """Mean over tokens `[rows, seq]` of KL(dense || sparse), nats, for thresholds `[layers, 7]` of |x|."""
    gates = Threshold(jnp.asarray(thresholds, jnp.float32))
    return float(_divergence(lm.config)(lm.params["weights"], gates, jnp.asarray(tokens)))


def nearest(
    lm: LanguageModel, calibration: Calibration, shares: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, float]]:
    """Which of several sparsities `[layers, 7]` leaves the model nearest to the dense one, the first of equals.

    Also the divergence of each, on `sample(calibration)`, in nats a token.
    """
    tokens = sample(calibration)
    found = {name: divergence(lm, calibration.thresholds(share), tokens) for name, share in shares.items()}
    return min(found, key=lambda name: found[name]), found


@functools.cache
def _divergence(config: ModelConfig) -> Any:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def value(weights: dict[str, Any], gates: ModelGates, tokens: jax.Array) -> jax.Array:
        model, where = nnx.merge(graphdef, weights), jnp.ones(tokens.shape, bool)
        dense, sparse = (
            model_functions(config)
            .forward({"weights": weights, "gates": of}, tokens, where)[0]
            .reshape(-1, config.d_model)
            for of in (Dense(), gates)
        )

        def of_token(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            p, q = (jax.nn.log_softmax(model.logits(x)) for x in pair)
            return jnp.sum(jnp.exp(p) * (p - q))

        # In slices: the logits of all tokens over a large vocabulary would outweigh the model.
        return jax.lax.map(of_token, (dense, sparse), batch_size=_LOGITS_AT_ONCE).mean()

    return jax.jit(value)


def mean_divergence(dense: jax.Array, sparse: jax.Array) -> jax.Array:
    """Mean of KL(dense || sparse) for log-probabilities `[rows, seq, vocab]`."""
    return jnp.mean(jnp.sum(jnp.exp(dense) * (dense - sparse), axis=-1))


def log_probabilities(
    config: ModelConfig,
    weights: dict[str, Any],
    gates: ModelGates,
    tokens: jax.Array,
    observe: Observer | None = None,
    *,
    remat: bool = False,
) -> tuple[jax.Array, list[Any]]:
    """Log-probabilities float32 `[rows, seq, vocab]`, every token gated; and what `observe` found.

    With `remat` a backward pass keeps one activation a block and computes the rest again.
    """
    graphdef, _ = nnx.split(abstract_decoder(config))
    params = {"weights": weights, "gates": gates}
    x, found = model_functions(config).forward(params, tokens, jnp.ones(tokens.shape, bool), None, observe, remat)
    return jax.nn.log_softmax(nnx.merge(graphdef, weights).logits(x)), found

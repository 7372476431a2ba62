"""A sparse model beside the dense one on the same tokens: likelihood, divergence, agreement, error by depth."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.model import LanguageModel, Params, abstract_decoder
from teal_jax.nn.attention import make_context
from teal_jax.nn.gates import Dense
from teal_jax.progress import track
from teal_jax.scoring import Batch, Layout, dropped_channels

_LOGITS_AT_ONCE = 1024

_KEPT_BYTES = 1 << 29
"""Host memory that the dense model's streams may take; a larger model or text has them computed again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` measured; the scored tokens in the layout's order.

    Attributes:
      nll: negative log-likelihood under the sparse model, nats, float32 `[tokens]`.
      kl: KL(dense || sparse) of the distributions that predict each token, nats, float32 `[tokens]`.
      same: whether both rank the same token first, bool `[tokens]`.
      realised: share of input channels dropped, float64 `[layers, 7]`, over all tokens that the gates acted on.
      depth_error: `|y - x| / |x|` of the residual stream after each block, dense x and sparse y, the mean over the
        positions that predict a scored token, float64 `[layers]`.
    """

    nll: np.ndarray
    kl: np.ndarray
    same: np.ndarray
    realised: np.ndarray
    depth_error: np.ndarray


class DenseSide:
    """The dense model on a layout: what `compare` holds every sparse model against.

    Its residual streams at the scored positions are kept where they are small, so that a sweep computes them once.
    """

    def __init__(self, lm: LanguageModel, layout: Layout):
        """Nothing runs yet; of `lm` the gates are ignored."""
        self.layout = layout
        self._lm = lm.dense()
        batches = [(batch, _scored_positions(batch.scored)) for batch in layout]
        # One length for all batches, so that one compiled program serves them.
        longest = max(len(at) for _, at in batches)
        padded = [np.concatenate([at, np.full(longest - len(at), -1)]).astype(np.int32) for _, at in batches]
        self._batches = [(batch, pad, len(at)) for (batch, at), pad in zip(batches, padded, strict=True)]
        config = lm.config
        size = len(batches) * longest * config.num_layers * config.d_model * lm.dtype.itemsize
        self._kept: list[np.ndarray | None] | None = [None] * len(batches) if size <= _KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray, int, jax.Array | np.ndarray]]:
        """Per batch: it, flat positions `[n]` (-1: none), how many there are, and the streams `[layers, n, d]`."""
        for i, (batch, at, count) in enumerate(self._batches):
            kept = None if self._kept is None else self._kept[i]
            if kept is None:
                kept = _dense_streams(self._lm.config)(self._lm.params, batch.tokens, batch.mask, at)
                if self._kept is not None:
                    self._kept[i] = np.asarray(kept)
            yield batch, at, count, kept


@functools.cache
def _dense_streams(config: ModelConfig) -> Any:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def streams(params: Params, tokens: jax.Array, mask: jax.Array, at: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params["weights"])
        context = make_context(config, mask, None)
        x, found = model.embed(tokens), []
        for block in model.layers:
            x, _, _ = block(x, Dense(), context)
            found.append(x.reshape(-1, x.shape[-1])[at])
        return jnp.stack(found)

    return jax.jit(streams)


@functools.cache
def _compare(config: ModelConfig) -> Any:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def compare(
        dense_params: Params,
        params: Params,
        tokens: jax.Array,
        mask: jax.Array,
        where: jax.Array,
        at: jax.Array,
        streams: jax.Array,
    ) -> tuple[jax.Array, ...]:
        """Nll, kl and agreement `[n]` at the flat positions `at` (-1: none), dropped channels and error sums."""
        dense, model = (nnx.merge(graphdef, p["weights"]) for p in (dense_params, params))
        gates, context = params["gates"].on(where), make_context(config, mask, None)
        x, here = model.embed(tokens), None
        dropped, errors = [], []
        for i, block in enumerate(model.layers):
            x, _, taps = block(x, gates[i], context)
            dropped.append(dropped_channels(taps, gates[i]))
            here = x.reshape(-1, x.shape[-1])[at]
            a, b = (value.astype(jnp.float32) for value in (streams[i], here))
            error = jnp.linalg.norm(b - a, axis=-1) / jnp.linalg.norm(a, axis=-1)
            errors.append(jnp.where(at >= 0, error, 0).sum())

        def token(triple: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            a, b, target = triple
            p, q = dense.logits(a), model.logits(b)
            log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
            return -log_q[target], jnp.sum(jnp.exp(log_p) * (log_p - log_q)), jnp.argmax(p) == jnp.argmax(q)

        # In slices: the logits of a whole batch over a large vocabulary would outweigh the model.
        targets = jnp.roll(tokens, -1, axis=1).reshape(-1)[at]
        found = jax.lax.map(token, (streams[-1], here, targets), batch_size=_LOGITS_AT_ONCE)
        return *found, jnp.stack(dropped), jnp.stack(errors)

    return jax.jit(compare)


def compare(side: DenseSide, sparse: LanguageModel, *, description: str = "", progress: bool = True) -> Comparison:
    """Run a model over the layout of `side`; its gates act as in decoding, beyond each window's dense prefix.

    Args:
      side: the dense model, and which tokens.
      sparse: the same model under a plan; or dense again, for which the divergence is 0.
      description: of the progress bar.
      progress: draw it.
    """
    shape = (sparse.config.num_layers, len(PROJECTIONS))
    nll, kl, same = [], [], []
    dropped, acted, errors = np.zeros(shape), 0, np.zeros(shape[0])
    run, dense = _compare(sparse.config), sparse.dense().params
    for batch, at, count, streams in track(side, description or f"Comparing {sparse.name}", enabled=progress):
        found = run(dense, sparse.params, batch.tokens, batch.mask, batch.where, at, streams)
        for parts, values in zip((nll, kl, same), found[:3], strict=True):
            parts.append(np.asarray(values)[:count])
        dropped += np.asarray(found[3], np.float64)
        errors += np.asarray(found[4], np.float64)
        acted += int((batch.where & batch.mask).sum())
    widths = np.array([d_in for d_in, _ in sparse.config.projection_shapes])
    return Comparison(
        nll=np.concatenate(nll),
        # Rounding can leave a divergence of next to nothing below 0.
        kl=np.maximum(np.concatenate(kl), 0),
        same=np.concatenate(same),
        realised=dropped / (acted * widths) if acted else dropped,
        depth_error=errors / side.layout.num_tokens,
    )


def _scored_positions(scored: np.ndarray) -> np.ndarray:
    """Flat positions that predict a scored token, in order, for bool `[batch, seq]`: one before each."""
    return np.flatnonzero(scored) - 1

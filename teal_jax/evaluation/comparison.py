"""A sparse model beside the dense one on the same tokens: likelihood, divergence, agreement, error by depth."""

import dataclasses
import functools
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
from teal_jax.scoring import Layout, _dropped

_LOGITS_AT_ONCE = 1024


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


@functools.cache
def _compare(config: ModelConfig) -> Any:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def compare(
        dense_params: Params, params: Params, tokens: jax.Array, mask: jax.Array, where: jax.Array, at: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Nll, kl and agreement `[n]` at the flat positions `at` (-1: none), dropped channels and error sums."""
        dense, model = (nnx.merge(graphdef, p["weights"]) for p in (dense_params, params))
        gates, context = params["gates"].on(where), make_context(config, mask, None)
        x, y = dense.embed.weight[...][tokens], model.embed.weight[...][tokens]
        real = at >= 0
        flat = lambda x: x.reshape(-1, x.shape[-1])[at]  # noqa: E731
        dropped, errors = [], []
        for i, (thick, thin) in enumerate(zip(dense.layers, model.layers, strict=True)):
            x, _, _ = thick(x, Dense(), context)
            y, _, taps = thin(y, gates[i], context)
            dropped.append(_dropped(taps, gates[i]))
            a, b = (flat(value).astype(jnp.float32) for value in (x, y))
            error = jnp.linalg.norm(b - a, axis=-1) / jnp.linalg.norm(a, axis=-1)
            errors.append(jnp.where(real, error, 0).sum())

        def token(triple: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            a, b, target = triple
            p, q = dense.logits(a), model.logits(b)
            log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
            return -log_q[target], jnp.sum(jnp.exp(log_p) * (log_p - log_q)), jnp.argmax(p) == jnp.argmax(q)

        # In slices: the logits of a whole batch over a large vocabulary would outweigh the model.
        targets = jnp.roll(tokens, -1, axis=1).reshape(-1)[at]
        found = jax.lax.map(token, (flat(x), flat(y), targets), batch_size=_LOGITS_AT_ONCE)
        return *found, jnp.stack(dropped), jnp.stack(errors)

    return jax.jit(compare)


def compare(
    dense: LanguageModel, sparse: LanguageModel, layout: Layout, *, description: str = "", progress: bool = True
) -> Comparison:
    """Run both models over the layout; the gates of `sparse` act as in decoding, beyond each window's dense prefix.

    Args:
      dense: the model without sparsity.
      sparse: the same under a plan; or dense again, for which the divergence is 0.
      layout: which tokens.
      description: of the progress bar.
      progress: draw it.
    """
    shape = (sparse.config.num_layers, len(PROJECTIONS))
    nll, kl, same = [], [], []
    dropped, acted, errors = np.zeros(shape), 0, np.zeros(shape[0])
    batches = [(batch, _scored_positions(batch.scored)) for batch in layout]
    # One length for all batches, so that one compiled program serves them.
    longest = max(len(at) for _, at in batches)
    run = _compare(sparse.config)
    params = dense.dense().params
    for batch, at in track(batches, description or f"Comparing {sparse.name}", enabled=progress):
        padded = np.full(longest, -1, np.int32)
        padded[: len(at)] = at
        found = run(params, sparse.params, batch.tokens, batch.mask, batch.where, padded)
        for parts, values in zip((nll, kl, same), found[:3], strict=True):
            parts.append(np.asarray(values)[: len(at)])
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
        depth_error=errors / layout.num_tokens,
    )


def _scored_positions(scored: np.ndarray) -> np.ndarray:
    """Flat positions that predict a scored token, in order, for bool `[batch, seq]`: one before each."""
    return np.flatnonzero(scored) - 1

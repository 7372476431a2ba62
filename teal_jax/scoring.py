"""Perplexity under an explicit protocol, with the sparsity counted on the very tokens that were scored."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.data import TextSource, evaluation_streams
from teal_jax.errors import DataError
from teal_jax.model import LanguageModel, Params, abstract_decoder, dense_prefix_length, model_functions
from teal_jax.nn.block import Taps
from teal_jax.nn.decoder import Decoder
from teal_jax.nn.gates import BlockGates, Dense, GateOutput
from teal_jax.progress import track
from teal_jax.sparsity.plan import model_sparsity

type Protocol = Literal["strided", "teal"]

_TOKENS_PER_BATCH = 4096
_LOGITS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
      ppl: `exp(nll)`.
      nll: mean negative log-likelihood of a scored token, nats.
      num_tokens: tokens scored.
      realised_sparsity: share of the projections' input channels dropped, weighted by size, over all tokens that
        the gates acted on; 0 for a dense model.
      realised: the same per layer and projection, float64 `[layers, 7]`.
      target_sparsity: the plan's target; 0 for a dense model.
      protocol: how it was measured, in words.
    """

    ppl: float
    nll: float
    num_tokens: int
    realised_sparsity: float
    realised: np.ndarray
    target_sparsity: float
    protocol: str


class Window(NamedTuple):
    """Tokens `[start, stop)` of a stream, of which those from `score` on are scored."""

    start: int
    score: int
    stop: int


def windows(length: int, context: int, window: int, protocol: Protocol) -> list[Window]:
    """The windows over a stream of `length` tokens, `context + window` long at most, `window` apart.

    `"strided"`: every token but the first is scored once; the first window scores its whole length, later ones
    their last `window` tokens; the last may be short. `"teal"`: full windows only, each scoring its last
    `window` tokens, so that the first `context` tokens of the stream are never scored.
    """
    size = context + window
    if protocol == "teal":
        return [Window(s, s + context, s + size) for s in range(0, length - size + 1, window)]
    result = [Window(0, 1, min(size, length))]
    while result[-1].stop < length:
        done = result[-1].stop
        stop = min(done + window, length)
        result.append(Window(max(0, stop - size), done, stop))
    return result


def dropped_channels(taps: Taps, gates: BlockGates) -> jax.Array:
    """Input channels each projection drops, float32 `[7]`, over the tokens that the gates act on.

    What CATS drops of up are outputs: counted as the inputs of up that hold as many weights.
    """
    if isinstance(gates, Dense):
        return jnp.zeros(len(PROJECTIONS))
    counts = []
    for i, site in enumerate(SITE_OF_PROJECTION):
        gate = gates[i]
        if isinstance(gate, GateOutput):
            dead = (taps.mlp_hidden == 0).sum(axis=-1, dtype=jnp.int32).sum(dtype=jnp.float32)
            counts.append(dead * taps[site].shape[-1] / taps.mlp_hidden.shape[-1])
            continue
        dropped = ~gate.keep(taps[site])
        counts.append(dropped.sum(axis=-1, dtype=jnp.int32).sum(dtype=jnp.float32))
    return jnp.stack(counts)


def token_nll(model: Decoder, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihood of every token but the first, float32 `[batch, seq - 1]`, nats.

    x is the residual stream `[batch, seq, d_model]` after the last block, tokens int32 `[batch, seq]`.
    """

    def of_token(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, target = pair
        logits = model.logits(hidden)
        return jax.nn.logsumexp(logits) - logits[target]

    # In slices: the logits of a whole batch over a large vocabulary would outweigh the model.
    pairs = (x[:, :-1].reshape(-1, x.shape[-1]), tokens[:, 1:].reshape(-1))
    return jax.lax.map(of_token, pairs, batch_size=_LOGITS_AT_ONCE).reshape(tokens[:, 1:].shape)


@functools.cache
def _score(config: ModelConfig) -> Any:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def score(
        params: Params, tokens: jax.Array, mask: jax.Array, where: jax.Array, scored: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Negative log-likelihoods `[batch, seq - 1]` (0 where not scored), and dropped channels `[layers, 7]`."""
        x, dropped = model_functions(config).forward(params, tokens, where, mask, dropped_channels)
        nll = token_nll(nnx.merge(graphdef, params["weights"]), x, tokens)
        return jnp.where(scored[:, 1:], nll, 0), jnp.stack(dropped)

    return jax.jit(score)


def default_windows(config: ModelConfig, context: int | None, window: int | None) -> tuple[int, int]:
    """`(context, window)` with None filled in: 2048 and 512, or four fifths and one fifth of a shorter maximum."""
    longest = min(2560, config.max_position)
    window = longest // 5 if window is None else window
    context = longest - window if context is None else context
    if context < 1 or window < 1:
        raise ValueError(f"context and window must be >= 1, got {context} and {window}")
    if context + window > config.max_position:
        raise DataError(
            f"context + window must be at most the model's {config.max_position} positions, got {context} + {window}"
        )
    return context, window


def perplexity(
    lm: LanguageModel,
    data: TextSource,
    *,
    context: int | None = None,
    window: int | None = None,
    dense_prefix: float | int | None = None,
    sparse_prefill: bool = True,
    protocol: Protocol = "strided",
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """`exp(mean negative log-likelihood)` of `data` under the model and its gates.

    Args:
      lm: dense or sparse.
      data: text, path(s) of .txt or .jsonl, or tokens int `[seq]` or `[rows, seq]`, each row a stream of its own.
      context: tokens before the scored ones, >= 1. None: 2048, or what fits the model.
      window: tokens scored at a time, >= 1; also the stride. None: 512, or what fits the model.
      dense_prefix: leading tokens of each window left dense, a share (float) or a count (int). None: 0, or a half
        under the `"teal"` protocol.
      sparse_prefill: thin the tokens that stand before a window's scored ones, too. False leaves them dense, as
        generation leaves the prompt; `dense_prefix` counts from the start of a window and cannot ask for that.
      protocol: see `windows`. `"teal"` is the reference code's.
      max_tokens: score no more than this many tokens, from the start; None scores all.
      progress: draw a progress bar.

    Returns:
      A `Perplexity`.

    Raises:
      DataError: no text, too little for one window, or windows longer than the model's positions.
    """
    streams, source = evaluation_streams(lm, data)
    layout = lay_windows(
        lm.config,
        streams,
        source,
        context=context,
        window=window,
        dense_prefix=dense_prefix,
        sparse_prefill=sparse_prefill,
        protocol=protocol,
        max_tokens=max_tokens,
    )
    total, count, acted = 0.0, 0, 0
    dropped = np.zeros((lm.config.num_layers, len(PROJECTIONS)))
    for tokens, mask, where, scored in track(layout, f"Perplexity ({lm.name})", enabled=progress):
        nll, drops = _score(lm.config)(lm.params, tokens, mask, where, scored)
        total += float(np.asarray(nll, np.float64).sum())
        count += int(scored[:, 1:].sum())
        acted += int((where & mask).sum())
        dropped += np.asarray(drops, np.float64)
    widths = np.array([lm.config.projection_shapes[i][0] for i in range(len(PROJECTIONS))])
    realised = dropped / (acted * widths) if acted else np.zeros_like(dropped)
    nll_mean = total / count
    return Perplexity(
        ppl=math.exp(min(nll_mean, 700.0)),
        nll=nll_mean,
        num_tokens=count,
        realised_sparsity=model_sparsity(lm.config, realised),
        realised=realised,
        target_sparsity=lm.plan.target if lm.plan else 0.0,
        protocol=layout.protocol,
    )


class Batch(NamedTuple):
    """Windows side by side, `[batch, seq]` each, padded on the right: int32 tokens, and bool masks.

    `mask`: which are real. `where`: which are gated. `scored`: which are predicted and counted.
    """

    tokens: np.ndarray
    mask: np.ndarray
    where: np.ndarray
    scored: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens of which streams are scored, as batches of one shape: iterate over it.

    Attributes:
      pieces: `(index of the stream, window)`, in order.
      streams: tokens int32 `[seq]` each.
      dense_prefix: leading tokens of each window left dense, a share (float) or a count (int).
      sparse_prefill: False leaves all dense that stands before the scored tokens.
      protocol: how the windows were laid, in words.
    """

    pieces: list[tuple[int, Window]]
    streams: list[np.ndarray]
    dense_prefix: float | int
    sparse_prefill: bool = True
    protocol: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return sum(piece.stop - piece.score for _, piece in self.pieces)

    @property
    def _shape(self) -> tuple[int, int]:
        size = max(piece.stop - piece.start for _, piece in self.pieces)
        return max(1, min(len(self.pieces), _TOKENS_PER_BATCH // size)), size

    def __len__(self) -> int:
        return -(-len(self.pieces) // self._shape[0])

    def __iter__(self) -> Iterator[Batch]:
        batch = self._shape[0]
        for start in range(0, len(self.pieces), batch):
            yield self._pack(self.pieces[start : start + batch])

    def _pack(self, pieces: list[tuple[int, Window]]) -> Batch:
        tokens = np.zeros(self._shape, np.int32)
        mask, where, scored = (np.zeros(self._shape, bool) for _ in range(3))
        for row, (stream, piece) in enumerate(pieces):
            length, prompt = piece.stop - piece.start, piece.score - piece.start
            tokens[row, :length] = self.streams[stream][piece.start : piece.stop]
            mask[row, :length] = True
            where[row, dense_tokens(length, prompt, self.dense_prefix, self.sparse_prefill) : length] = True
            scored[row, prompt:length] = True
        return Batch(tokens, mask, where, scored)


def lay_windows(
    config: ModelConfig,
    streams: list[np.ndarray],
    source: str,
    *,
    context: int | None = None,
    window: int | None = None,
    dense_prefix: float | int | None = None,
    sparse_prefill: bool = True,
    protocol: Protocol = "strided",
    max_tokens: int | None = None,
) -> Layout:
    """The windows over token streams read from `source`; arguments and errors as in `perplexity`."""
    if protocol not in ("strided", "teal"):
        raise ValueError(f"protocol must be 'strided' or 'teal', got {protocol!r}")
    context, window = default_windows(config, context, window)
    if dense_prefix is None:
        dense_prefix = 0.5 if protocol == "teal" else 0
    pieces = [
        (i, piece) for i, stream in enumerate(streams) for piece in windows(len(stream), context, window, protocol)
    ]
    pieces = _limit([(i, p) for i, p in pieces if p.stop > p.score], max_tokens)
    if not pieces:
        raise DataError(
            f"{source} is too short to score: {max(map(len, streams))} tokens; "
            f"expected at least {context + window if protocol == 'teal' else 2}",
            hint="give more text, or a smaller context and window",
        )
    said = f"{protocol}, context {context}, window {window}, dense_prefix {dense_prefix}, "
    said += f"{'' if sparse_prefill else 'dense before the scored tokens, '}{source}"
    return Layout(
        pieces=pieces, streams=streams, dense_prefix=dense_prefix, sparse_prefill=sparse_prefill, protocol=said
    )


def dense_tokens(length: int, prompt: int, dense_prefix: float | int, sparse_prefill: bool) -> int:
    """Leading tokens left dense of a sequence of `length`, of which the first `prompt` only lead to the scored ones."""
    prefix = dense_prefix_length(dense_prefix, length)
    return prefix if sparse_prefill else max(prefix, prompt)


def _limit(pieces: list[tuple[int, Window]], max_tokens: int | None) -> list[tuple[int, Window]]:
    if max_tokens is None:
        return pieces
    kept, count = [], 0
    for stream, piece in pieces:
        stop = min(piece.stop, piece.score + max_tokens - count)
        if stop <= piece.score:
            break
        kept.append((stream, piece._replace(stop=stop)))
        count += stop - piece.score
    return kept

"""Log-probabilities of token rows under a model and its gates, in batches of like length."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.harness.rows import Row, padded_length
from teal_jax.model import LanguageModel, Params, abstract_decoder, model_functions
from teal_jax.progress import Bar
from teal_jax.scoring import dropped_channels
from teal_jax.sparsity.plan import model_sparsity

_TOKENS_PER_BATCH = 4096
_LOGITS_AT_ONCE = 1024


class RowScore(NamedTuple):
    """Sum of the scored tokens' log-probabilities, nats, and whether greedy decoding would have chosen every one."""

    logprob: float
    greedy: bool


class Tally:
    """Channels dropped so far, counted on the tokens that the gates acted on."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._dropped = np.zeros((config.num_layers, len(PROJECTIONS)))
        self.tokens = 0

    def add(self, dropped: np.ndarray, tokens: int) -> None:
        """`dropped [layers, 7]` channels over `tokens` more tokens."""
        self._dropped += np.asarray(dropped, np.float64)
        self.tokens += tokens

    @property
    def realised_sparsity(self) -> float | None:
        """Share of channels dropped, weighted by size; None before the gates have acted on any token."""
        if not self.tokens:
            return None
        widths = np.array([shape[0] for shape in self._config.projection_shapes])
        return model_sparsity(self._config, self._dropped / (self.tokens * widths))


@functools.cache
def _score(config: ModelConfig) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def score(
        params: Params, inputs: jax.Array, targets: jax.Array, mask: jax.Array, where: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log-probabilities and top-1 hits of the targets `[batch, seq]`, and dropped channels `[layers, 7]`."""
        x, dropped = model_functions(config).forward(params, inputs, where, mask, dropped_channels)
        model = nnx.merge(graphdef, params["weights"])

        def of_token(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, target = pair
            logits = model.logits(hidden)
            return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

        # In slices: the logits of a whole batch over a large vocabulary would outweigh the model.
        pairs = (x.reshape(-1, x.shape[-1]), targets.reshape(-1))
        logprob, hit = jax.lax.map(of_token, pairs, batch_size=_LOGITS_AT_ONCE)
        return logprob.reshape(targets.shape), hit.reshape(targets.shape), jnp.stack(dropped)

    return jax.jit(score)


def score_rows(
    lm: LanguageModel,
    rows: Sequence[Row],
    *,
    batch_size: int | None = None,
    most: int | None = None,
    tally: Tally | None = None,
    description: str = "Scoring",
    progress: bool = False,
) -> list[RowScore]:
    """The score of each row, in the order given; the longest are run first.

    Args:
      lm: dense or sparse.
      rows: see `Row`.
      batch_size: rows at a time; None: as many as make 4096 tokens, and no more than `most`.
      most: see `batch_size`.
      tally: told what the gates dropped.
      description: what the bar says.
      progress: draw it.
    """
    result: list[RowScore | None] = [None] * len(rows)
    with Bar(enabled=progress) as bar:
        bar.start(description, len(rows))
        for length, batch in _batches(rows, batch_size, most):
            inputs, targets, mask, where, scored = _pack([rows[i] for i in batch], length)
            logprob, hit, dropped = _score(lm.config)(lm.params, inputs, targets, mask, where)
            sums = np.where(scored, np.asarray(logprob, np.float64), 0).sum(axis=1)
            greedy = (np.asarray(hit) | ~scored).all(axis=1)
            for i, total, same in zip(batch, sums, greedy, strict=False):
                result[i] = RowScore(float(total), bool(same))
            if tally is not None:
                tally.add(np.asarray(dropped), int((where & mask).sum()))
            bar.advance(len(batch))
    return [score for score in result if score is not None]


def _batches(rows: Sequence[Row], batch_size: int | None, most: int | None) -> list[tuple[int, list[int]]]:
    """Padded lengths and the indices of the rows that share a batch, longest first."""
    buckets: dict[int, list[int]] = {}
    for i, row in sorted(enumerate(rows), key=lambda pair: -len(pair[1].tokens)):
        buckets.setdefault(padded_length(len(row.tokens) - 1), []).append(i)
    batches = []
    for length, members in buckets.items():
        size = batch_size or max(1, min(_TOKENS_PER_BATCH // length, most or _TOKENS_PER_BATCH))
        batches += [(length, members[start : start + size]) for start in range(0, len(members), size)]
    return batches


def _pack(rows: Sequence[Row], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets, which inputs are real, which are gated, which targets are scored: `[batch, length]` each."""
    # A power of two of rows, the last ones empty: few shapes to compile.
    batch = 1 << (len(rows) - 1).bit_length()
    inputs, targets = np.zeros((2, batch, length), np.int32)
    mask, where, scored = np.zeros((3, batch, length), bool)
    for i, row in enumerate(rows):
        n = len(row.tokens) - 1
        inputs[i, :n], targets[i, :n] = row.tokens[:-1], row.tokens[1:]
        mask[i, :n] = True
        where[i, row.dense : n] = True
        scored[i, row.score - 1 : n] = True
    return inputs, targets, mask, where, scored

"""Generated text: where the sparse model agrees with what the dense one wrote, and how much its own repeats itself."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from teal_jax.decode.generation import generate
from teal_jax.decode.sampling import Greedy, Sampler
from teal_jax.evaluation.comparison import DenseSide, compare
from teal_jax.evaluation.text import EvaluationText
from teal_jax.model import LanguageModel
from teal_jax.progress import track
from teal_jax.scoring import Layout, Window

_ROWS = 8
"""Prompts decoded at once: as many as the GPU's decode step takes."""


@dataclasses.dataclass(frozen=True)
class Prompted:
    """Prompts, and the dense model's greedy continuations; tokens."""

    prompts: list[list[int]]
    dense: list[list[int]]


def choose_prompts(text: EvaluationText, bos: int | None, *, count: int, length: int) -> list[list[int]]:
    """At most `count` prompts of `length` tokens, from the beginnings of documents, spread over the text.

    A text of fewer documents is cut at evenly spaced places, and `bos` put before each where the model has one.
    """
    streams = text.layout.streams
    begins = [(i, int(s)) for i, starts in enumerate(text.starts) for s in starts]
    ends = {begin: end for begin, end in itertools.pairwise(begins) if begin[0] == end[0]}
    fit = [b for b in begins if (ends[b][1] if b in ends else len(streams[b[0]])) - b[1] >= length]
    if len(fit) >= count:
        chosen = [fit[i] for i in np.linspace(0, len(fit) - 1, count).astype(int)]
        return [streams[i][s : s + length].tolist() for i, s in chosen]
    longest = max(range(len(streams)), key=lambda i: len(streams[i]))
    stream, lead = streams[longest], [] if bos is None else [bos]
    body = length - len(lead)
    room = min(count, max(1, len(stream) // max(body, 1)))
    places = np.linspace(0, max(len(stream) - body, 0), room).astype(int)
    return [(lead + stream[s : s + body].tolist())[:length] for s in places]


def continue_prompts(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    description: str = "",
    progress: bool = True,
) -> list[list[int]]:
    """Tokens of each continuation, through the decoder that users get: prompts dense, the rest under the plan."""
    found = []
    starts = range(0, len(prompts), _ROWS)
    for start in track(starts, description or f"Generating ({lm.name})", enabled=progress):
        rows = [list(row) for row in prompts[start : start + _ROWS]]
        told = generate(lm, rows, max_new_tokens=new_tokens, sampler=sampler or Greedy(), seed=seed + start)
        assert isinstance(told, list)
        found += [list(one.tokens) for one in told]
    return found


def dense_sides(dense: LanguageModel, prompted: Prompted) -> list[tuple[DenseSide, list[int]]]:
    """The dense model on the prompts and its own continuations, and which prompts: one a length of prompt.

    Everything is dense up to the end of the prompt, as in decoding. The first token of a continuation is not scored:
    it comes from the dense prompt.
    """
    found = []
    for length in sorted({len(prompt) for prompt in prompted.prompts}):
        of_length = [i for i, prompt in enumerate(prompted.prompts) if len(prompt) == length]
        rows = [i for i in of_length if len(prompted.dense[i]) > 1]
        if rows:
            streams = [np.array([*prompted.prompts[i], *prompted.dense[i]], np.int32) for i in rows]
            pieces = [(i, Window(0, length + 1, len(stream))) for i, stream in enumerate(streams)]
            found.append((DenseSide(dense, Layout(pieces=pieces, streams=streams, dense_prefix=length)), rows))
    return found


def agreement(
    sides: list[tuple[DenseSide, list[int]]],
    sparse: LanguageModel,
    count: int,
    *,
    description: str = "",
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at which both models rank the same token first, and tokens asked, int64 `[count]` each, by prompt.

    It is what a greedy speculative decoder would have accepted of a sparse drafter's tokens, drafted one at a time.

    Args:
      sides: from `dense_sides`.
      sparse: the model under a plan.
      count: prompts there are.
      description: of the progress bars.
      progress: draw them.
    """
    same, asked = (np.zeros(count, np.int64) for _ in range(2))
    for side, rows in sides:
        found = compare(side, sparse, description=description or "Agreement", progress=progress)
        lengths = [piece.stop - piece.score for _, piece in side.layout.pieces]
        owner = np.repeat(np.arange(len(rows)), lengths)
        same[rows] = np.bincount(owner, weights=found.same, minlength=len(rows)).astype(np.int64)
        asked[rows] = lengths
    return same, asked


def repeated_ngrams(tokens: Sequence[int], n: int) -> tuple[int, int]:
    """How many of the n-grams of `tokens` occurred before in it, and how many there are."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(grams) - len(set(grams)), len(grams)

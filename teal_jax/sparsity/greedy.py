"""TEAL's greedy search: block by block, raise the sparsity of whichever projection hurts the output least."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.errors import DataError, SparsityError
from teal_jax.model import LanguageModel
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, dense_block, embed
from teal_jax.sparsity.greedy_path import GreedyPath
from teal_jax.sparsity.objective import ERRORS, Positions, block_errors, prepare
from teal_jax.sparsity.score_statistics import ScoreStatistics
from teal_jax.sparsity.statistics import Calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedySettings:
    """How a search is done.

    Attributes:
      step: sparsity that one step gives to q_proj, in (0, 0.5]; every projection's step drops as many weights.
      max_sparsity: where the path ends, in (0, 1): no later target can be looked up.
      error: what is minimised: `"mse"`, or `"teal"` (see `teal_jax.sparsity.objective.reduce_error`).
      dense_share: leading share of each calibration row left dense. scored_share: trailing share compared.
      max_rows: calibration rows used, from the first; None uses all.
    """

    step: float = 0.05
    max_sparsity: float = 0.9
    error: str = "mse"
    dense_share: float = 0.5
    scored_share: float = 0.25
    max_rows: int | None = None

    def __post_init__(self):
        if not 0 < self.step <= 0.5:
            raise ValueError(f"step must lie in (0, 0.5], got {self.step}")
        if not 0 < self.max_sparsity < 1:
            raise SparsityError(f"max_sparsity must lie in (0, 1), got {self.max_sparsity}")
        if self.error not in ERRORS:
            raise ValueError(f"error must be one of {', '.join(ERRORS)}, got {self.error!r}")
        if not 0 <= self.dense_share <= 1 - self.scored_share < 1:
            raise ValueError(
                f"expected 0 <= dense_share <= 1 - scored_share < 1, got {self.dense_share}, {self.scored_share}"
            )


def greedy_path(
    lm: LanguageModel,
    calibration: Calibration | ScoreStatistics,
    *,
    settings: GreedySettings = GreedySettings(),
    progress: bool = True,
) -> GreedyPath:
    """Walk the greedy path of every block, each from the dense model's own input to it.

    A block starts dense. Each step tries every projection at its next sparsity, on the calibration tokens, and
    keeps the one whose block output differs least from the dense block's. A block's whole path is one compiled
    loop on the device, the same program for every block.

    Args:
      lm: the model; its gates are ignored.
      calibration: of this model; statistics of a scaled score walk with thresholds of that score.
      settings: see `GreedySettings`.
      progress: draw a progress bar.

    References:
      TEAL, arXiv 2408.14690, section 4.3 and algorithm 1.
    """
    tokens = calibration.tokens[: settings.max_rows]
    seq = tokens.shape[1]
    gated = int(seq * (1 - settings.dense_share))
    positions = Positions(dense=seq - gated, scored=int(seq * settings.scored_share))
    if positions.scored < 1:
        raise DataError(f"greedy allocation needs rows of at least 4 tokens, got {seq}", hint="raise seq_len")
    grid = _Grid(lm.config, settings)
    columns = [calibration.site_thresholds(i, np.tile(grid.ladders[i], (lm.config.num_layers, 1))) for i in range(7)]
    uniform = calibration_uniform(calibration, grid.effective)
    scales = calibration.scales if isinstance(calibration, ScoreStatistics) else None
    parts = batches(len(tokens), seq)
    x = embed(lm, tokens)
    paths = []
    for layer in track(range(lm.config.num_layers), "Greedy allocation", enabled=progress):
        ladders = np.stack(
            [np.pad(column[layer], (0, grid.longest - column.shape[1]), mode="edge") for column in columns]
        )
        params = lm.params["weights"]["layers"][layer]
        stacked = x.reshape(len(parts), -1, *x.shape[1:])
        scale = None if scales is None else scales[layer]
        path, x = _walk(
            lm.config, positions, settings.error, params, stacked, ladders, grid.rungs, uniform[layer], scale
        )
        x = x.reshape(-1, *x.shape[2:])
        paths.append(jax.tree.map(np.asarray, path))
    rungs, error, rival, candidates = (np.stack(field) for field in zip(*paths, strict=True))
    sparsity = np.stack([np.asarray(grid.ladders[i])[rungs[..., i]] for i in range(len(PROJECTIONS))], axis=-1)
    facts = dataclasses.asdict(settings) | {"rows": len(tokens), "seq_len": seq}
    return GreedyPath(sparsity, grid.effective, error, rival, candidates, facts)


def calibration_uniform(calibration: Calibration | ScoreStatistics, effective: np.ndarray) -> np.ndarray:
    """Thresholds of uniform sparsity at each point of the path, float32 `[layers, steps + 1, 7]`."""
    shares = np.tile(effective, (calibration.config.num_layers, 1))
    return np.stack([calibration.site_thresholds(i, shares) for i in range(len(PROJECTIONS))], axis=-1)


class _Grid:
    """The sparsities a path can visit.

    Attributes:
      ladders: per projection, sparsity after 0, 1, 2, ... of its steps; a step moves the same number of weights
        for every projection.
      rungs: int32 `[7]`, number of steps each projection has.
      steps: steps of a path. effective: float64 `[steps + 1]`, its weighted sparsity after each.
    """

    def __init__(self, config: ModelConfig, settings: GreedySettings):
        sizes = np.array(config.projection_sizes, np.float64)
        moves = settings.step * sizes[0] / sizes
        self.ladders = []
        for move in moves:
            ladder = [0.0]
            # Added up, not multiplied, as the reference does: rounding decides whether a last rung stands just below
            # 1. The reference then takes one step more, beyond 1; we do not.
            while ladder[-1] < 1 and (settings.error == "teal" or ladder[-1] + move <= 1 + 1e-9):
                ladder.append(ladder[-1] + move)
            self.ladders.append(ladder)
        self.rungs = np.array([len(ladder) - 1 for ladder in self.ladders], np.int32)
        self.longest = max(len(ladder) for ladder in self.ladders)
        each = settings.step * sizes[0] / sizes.sum()
        self.steps = int(np.ceil(settings.max_sparsity / each - 1e-9))
        self.effective = each * np.arange(self.steps + 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _walk(
    config: ModelConfig,
    positions: Positions,
    error: str,
    layer_params: dict,
    x: jax.Array,
    ladders: jax.Array,
    rungs: jax.Array,
    uniform: jax.Array,
    scale: tuple[jax.Array, ...] | None,
) -> tuple[tuple[Any, ...], jax.Array]:
    """One block's path, and the dense block's output for the next.

    x `[parts, rows, seq, d_model]`; ladders float32 `[7, longest]`, thresholds; uniform `[steps + 1, 7]`.
    """
    prepared = jax.lax.map(lambda part: prepare(config, layer_params, part, positions), x)
    projections = jnp.arange(len(PROJECTIONS))

    def errors(now: jax.Array, tried: jax.Array, rival: jax.Array) -> jax.Array:
        each = lambda part: block_errors(config, layer_params, part, now, tried, rival, error, scale)  # noqa: E731
        return jax.lax.map(each, prepared).mean(axis=0)

    def step(rung: jax.Array, rival: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        now = ladders[projections, rung]
        # A threshold of 0 would drop exact zeros of |x|: harmless, and what rung 0 means.
        tried = ladders[projections, jnp.minimum(rung + 1, rungs)]
        found = errors(now, tried, rival)
        candidates = jnp.where(rung < rungs, found[:-1], jnp.inf)
        best = jnp.argmin(candidates)
        rung = rung.at[best].add(1)
        return rung, (rung, candidates[best], found[-1], candidates)

    start = jnp.zeros(len(PROJECTIONS), jnp.int32)
    _, rows = jax.lax.scan(step, start, uniform[1:])
    first = (start, jnp.float32(0), jnp.float32(0), jnp.zeros(len(PROJECTIONS)))
    path = jax.tree.map(lambda head, tail: jnp.concatenate([head[None], tail]), first, rows)
    return path, jax.lax.map(lambda part: dense_block(config, layer_params, part)[0], x)

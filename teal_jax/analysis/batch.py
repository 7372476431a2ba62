"""Decoding several sequences together: which rows of the weights must still be read, and what the output is.

Sequences run side by side, position by position: the tokens at one position are decoded in one step.

References:
  TEAL, arXiv 2408.14690, section 5.4.4.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import keep_mask
from teal_jax.analysis.cost import Cost
from teal_jax.analysis.forward import Scored, count_dropped, score, thinned_block
from teal_jax.analysis.rows import Rows
from teal_jax.config import SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.errors import DataError
from teal_jax.model import LanguageModel
from teal_jax.progress import track
from teal_jax.sparsity.blocks import dense_block, embed
from teal_jax.sparsity.histogram import NUM_BINS, count_magnitudes, magnitude_quantiles
from teal_jax.sparsity.plan import SparsityPlan, model_sparsity
from teal_jax.sparsity.statistics import Calibration

BATCHES = (1, 2, 4, 8, 16)

RULES = {
    "own": "a channel is read if any sequence keeps it; each sequence uses what it keeps itself (our GPU kernels)",
    "union": "a channel is read if any sequence keeps it; all sequences use it",
    "mean": "a channel is read, and used by all, if the batch's mean |x| exceeds the threshold",
}
"""How a batch shares a mask."""

SHARED = ("union", "mean")
"""The rules under which all sequences have one mask; of these the thresholds can be fitted to the batch size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRow:
    """One rule at one batch size.

    Attributes:
      rule: a name in `RULES`. batch: sequences decoded together. target: of the plan.
      fitted: thresholds chosen on the calibration text for this rule and batch size, so that the plan's sparsities
        survive; otherwise the plan's own.
      independent: the sparsity that would survive if the sequences' masks had nothing to do with each other, mean of
        `s ** batch` over projections, `s` what a batch of one realises.
      cost: its sparsity is what survived: the share of the block weights that no sequence of the batch needed.
    """

    rule: str
    batch: int
    target: float
    fitted: bool
    independent: float
    cost: Cost


def _grouped(x: jax.Array, batch: int) -> jax.Array:
    return x.reshape(-1, batch, *x.shape[1:])


def _magnitude(x: jax.Array, rule: str, batch: int) -> jax.Array:
    """What a rule compares with its threshold, float32 `[rows / batch, seq, width]`, of x `[rows, seq, width]`."""
    size = _grouped(jnp.abs(x.astype(jnp.float32)), batch)
    return size.mean(axis=1) if rule == "mean" else size.max(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_step(
    rule: str,
    batch: int,
    config: ModelConfig,
    layer_params: dict,
    x: jax.Array,
    where: jax.Array,
    thresholds: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    read = []

    def keep(i: int, x: jax.Array, gate: jax.Array | None) -> jax.Array:
        kept = keep_mask(_magnitude(x, rule, batch), thresholds[i]) | ~where[:, None]
        read.append(jnp.repeat(kept, batch, axis=0))
        return keep_mask(x, thresholds[i]) | ~where[:, None] if rule == "own" else read[-1]

    y, _ = thinned_block(config, layer_params, x, keep)
    return y, count_dropped(tuple(read), where)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_shared(
    config: ModelConfig, kinds: tuple[tuple[str, int], ...], layer_params: dict, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Dense output, and histograms uint32 `[kinds, 4, NUM_BINS]` of what each rule and batch size compares."""
    y, taps = dense_block(config, layer_params, x)
    return y, jnp.stack([jnp.stack([count_magnitudes(_magnitude(tap, *kind)) for tap in taps]) for kind in kinds])


def fit_thresholds(
    lm: LanguageModel,
    tokens: np.ndarray,
    shares: Sequence[np.ndarray],
    kinds: Sequence[tuple[str, int]],
    *,
    seed: int = 0,
) -> dict[tuple[str, int], np.ndarray]:
    """Per rule and batch size, thresholds float32 `[plans, layers, 7]` under which the given shares survive.

    Args:
      lm: its gates are ignored.
      tokens: calibration tokens `[rows, seq]`; batches are drawn from them.
      shares: `[layers, 7]` for each plan.
      kinds: rules of `SHARED` with batch sizes.
      seed: which rows meet in a batch.

    Raises:
      DataError: fewer rows than the largest batch.
    """
    largest = max(batch for _, batch in kinds)
    if len(tokens) < largest:
        raise DataError(
            f"thresholds for a batch of {largest} need as many calibration rows, got {len(tokens)}",
            hint="calibrate on more or shorter rows: --calibration-tokens, --seq-len",
        )
    rows = np.random.default_rng(seed).permutation(len(tokens))[: len(tokens) // largest * largest]
    inputs = [embed(lm, tokens[rows[start : start + largest]]) for start in range(0, len(rows), largest)]
    fitted = {kind: np.empty((len(shares), lm.config.num_layers, 7), np.float32) for kind in kinds}
    for layer in range(lm.config.num_layers):
        # A layer at a time: its histograms become thresholds, and only one boundary of activations is kept.
        counts = np.zeros((len(kinds), len(SITES), NUM_BINS), np.int64)
        for part, x in enumerate(inputs):
            inputs[part], found = _count_shared(lm.config, tuple(kinds), lm.params["weights"]["layers"][layer], x)
            counts += np.asarray(found)
        for k, kind in enumerate(kinds):
            for i, site in enumerate(SITE_OF_PROJECTION):
                wanted = np.array([share[layer, i] for share in shares])
                fitted[kind][:, layer, i] = magnitude_quantiles(counts[k, site], wanted)
    return fitted


def compare_batches(
    lm: LanguageModel,
    plans: Sequence[SparsityPlan],
    calibration: Calibration,
    rows: Rows,
    dense: Scored,
    *,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
    progress: bool = True,
) -> list[BatchRow]:
    """Every rule at every batch size, under every plan; prompts stay dense.

    Args:
      lm: its gates are ignored.
      plans: of this model, with one threshold a projection.
      calibration: whose tokens the fitted thresholds come from.
      rows: what to score; their number is a multiple of every batch size.
      dense: the dense model's score of `rows`.
      batches: batch sizes, each dividing the largest.
      seed: of the calibration batches.
      progress: draw a progress bar.

    Raises:
      ValueError: batch sizes that do not divide each other, or the number of rows.
      DataError: too few calibration rows.
    """
    batches = sorted(set(batches))
    largest = batches[-1]
    if batches[0] < 1 or any(largest % batch for batch in batches) or len(rows.tokens) % largest:
        raise ValueError(
            f"batch sizes must be >= 1 and divide the largest, and that the {len(rows.tokens)} rows, got {batches}"
        )
    kinds = [(rule, batch) for rule in SHARED for batch in batches if batch > 1]
    fitted = (
        fit_thresholds(lm, calibration.tokens, [plan.sparsity for plan in plans], kinds, seed=seed) if kinds else {}
    )
    # A batch of one, on which all rules agree, then the others.
    ways = [("own", 1, False), *((rule, batch, False) for rule in RULES for batch in batches if batch > 1)]
    ways += [(*kind, True) for kind in kinds]
    work = [(p, plan, *way) for p, plan in enumerate(plans) for way in ways]
    found, alone = [], {}
    for p, plan, rule, batch, refit in track(work, "Batched decoding", enabled=progress):
        plan.check_fits(lm.config)
        thresholds = fitted[rule, batch][p] if refit else plan.thresholds
        step = functools.partial(_batch_step, rule, batch)
        scored = score(lm, rows, step, thresholds, rows_at_once=largest)
        if batch == 1:
            alone[p] = scored.realised
        cost = Cost.of(lm.config, scored, dense)
        independent = model_sparsity(lm.config, alone[p] ** batch)
        found.append(
            BatchRow(rule=rule, batch=batch, target=plan.target, fitted=refit, independent=independent, cost=cost)
        )
    return found

"""Learning what a sparse model can be given for nothing: thresholds, exponents of the score, biases.

The loss is KL(dense || sparse) on calibration text. Gates are hard forwards and soft backwards (`Soft`), the softness
annealed; the budget on weights read is held by an augmented Lagrangian, `loss + m g + p/2 g^2` with `g = target -
realised` and m raised by g after every step, and met exactly at the end by one factor on all thresholds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.model import LanguageModel
from teal_jax.nn.block import Taps
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import BlockGates, Dense, Gates, Soft
from teal_jax.progress import track
from teal_jax.sparsity.divergence import log_probabilities, mean_divergence
from teal_jax.sparsity.gating import layer_weights, row_norms
from teal_jax.sparsity.plan import model_sparsity

type Norms = list[list[jax.Array]]
"""Logarithms of the rows' norms, float32 `[d_in]` for each projection of each layer."""

PENALTY, STEP_OF_MULTIPLIER = 50.0, 5.0
COUNTED = 8192
"""Calibration tokens that realised sparsity is counted on."""

KEPT_BYTES = 1 << 30
"""Activations that a step may keep for its backward pass; a larger model computes its blocks again."""

SMALLEST_NORM = 1e-3
"""Of a row of W, over the largest: below it an exponent has no more to say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """How the training is done.

    Attributes:
      steps: of Adam, >= 1; warm-up over a twentieth of them, then a cosine to 2 %.
      tokens_per_step: calibration tokens in a step; at least one row is taken.
      threshold_rate: learning rate of log thresholds. bias_rate: of biases, relative to the projection's output:
        outputs of one model differ by two orders of magnitude.
      exponents: also learn exponents of the score's norm, at `exponent_rate`. Off: the score is |x_i|, which is what
        the GPU kernels take; exponents gained nothing where they were tried (stories260K at 50 %).
      softness: of the gates' derivative, relative to the threshold, at the first and at the last step.
      seed: of the order of rows.
    """

    steps: int = 300
    tokens_per_step: int = 1024
    threshold_rate: float = 0.03
    bias_rate: float = 0.02
    exponents: bool = False
    exponent_rate: float = 0.03
    softness: tuple[float, float] = (0.5, 0.1)
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.tokens_per_step < 1:
            raise ValueError(f"steps and tokens_per_step must be >= 1, got {self.steps} and {self.tokens_per_step}")
        if not min(self.softness) > 0:
            raise ValueError(f"softness must be > 0, got {self.softness}")


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What training left.

    Attributes:
      thresholds: float32 `[layers, 7]`. exponents: float64 `[layers, 7]`, of the L2 norms.
      biases: by layer and projection, float32 `[d_out]`.
      sparsity: float64 `[layers, 7]`, realised with hard gates on the calibration text.
      divergence: mean over the first and over the last tenth of the steps, nats a token.
    """

    thresholds: np.ndarray
    exponents: np.ndarray
    biases: dict[tuple[int, int], np.ndarray]
    sparsity: np.ndarray
    divergence: tuple[float, float]


def distil(
    lm: LanguageModel,
    tokens: np.ndarray,
    thresholds: np.ndarray,
    target: float,
    *,
    learn: tuple[str, ...] = ("threshold", "bias"),
    settings: DistilSettings = DistilSettings(),
    progress: bool = True,
) -> Learnt:
    """Train what `learn` names; the weights stay as they are.

    Memory: the activations of one step's forward pass, or one a block (`KEPT_BYTES`), kept for the backward pass.

    Args:
      lm: the model; its gates are ignored.
      tokens: calibration tokens int32 `[rows, seq]`.
      thresholds: float32 `[layers, 7]`, of |x|: where to begin, or what to keep.
      target: model sparsity to hold where thresholds are learnt; else not looked at.
      learn: of `"threshold"`, `"bias"` and `"exponent"`.
      settings: see `DistilSettings`.
      progress: draw a progress bar.
    """
    config, weights = lm.config, lm.params["weights"]
    # A threshold of 0 has no logarithm, and no relative softness: the least that can still grow.
    start = np.maximum(np.asarray(thresholds, np.float32), 1e-6)
    given: dict[str, Any] = {
        "threshold": jnp.log(start),
        "exponent": jnp.zeros((config.num_layers, len(PROJECTIONS))),
        "bias": [[jnp.zeros(n) for _, n in config.projection_shapes] for _ in range(config.num_layers)],
    }
    learnt = {name: given[name] for name in learn}
    fixed = {name: value for name, value in given.items() if name not in learn}
    fixed["output"] = output_scales(config, weights, tokens)
    norms = log_norms(weights, config) if "exponent" in learn else None
    program = _program(config, learn, settings)
    state, multiplier, values = program.start(learnt), jnp.float32(1), []
    rows = min(len(tokens), max(1, settings.tokens_per_step // tokens.shape[1]))
    generator = np.random.default_rng(settings.seed)
    first, last = settings.softness
    for i in track(range(settings.steps), "Learning", enabled=progress):
        part = tokens[np.sort(generator.choice(len(tokens), rows, replace=False))]
        width = jnp.float32(first * (last / first) ** (i / settings.steps))
        learnt, state, multiplier, value = program.step(
            learnt, state, multiplier, fixed, jnp.asarray(part), width, jnp.float32(target), weights, norms
        )
        values.append(value)
    tenth = max(1, settings.steps // 10)
    found = fixed | learnt
    if "threshold" in learn:
        found["threshold"] = found["threshold"] + _meet(config, weights, found, norms, tokens, target)
    return Learnt(
        thresholds=np.exp(np.asarray(found["threshold"], np.float64)).astype(np.float32),
        exponents=np.asarray(found["exponent"], np.float64),
        biases={
            (i, j): np.asarray(bias * found["output"][i, j])
            for i, row in enumerate(found["bias"])
            for j, bias in enumerate(row)
        },
        sparsity=_realised(config, weights, found, norms, tokens),
        divergence=(float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))),
    )


class _Program(NamedTuple):
    """Optimiser state for what is learnt, and one step; compiled once for all targets and models of a config."""

    start: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, jax.Array, jax.Array]]


@functools.cache
def _program(config: ModelConfig, learn: tuple[str, ...], settings: DistilSettings) -> _Program:
    import optax

    def adam(rate: float) -> optax.GradientTransformation:
        warm = settings.steps // 20 + 1
        return optax.adam(
            optax.warmup_cosine_decay_schedule(0, rate, warm, settings.steps + warm, 0.02 * rate), b2=0.99
        )

    rates: dict[Any, Any] = {name: adam(getattr(settings, f"{name}_rate")) for name in learn}
    optimizer = optax.partition(rates, {name: name for name in learn})

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        learnt: Any,
        state: Any,
        multiplier: jax.Array,
        fixed: Any,
        tokens: jax.Array,
        width: jax.Array,
        target: jax.Array,
        weights: Any,
        norms: Norms | None,
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        dense, _ = log_probabilities(config, weights, Dense(), tokens)
        remat = activation_bytes(config, tokens.size, dense.dtype.itemsize) > KEPT_BYTES

        def loss(learnt: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            gates = soft_gates(learnt | fixed, norms, width)
            sparse, dropped = log_probabilities(config, weights, gates, tokens, _dropped_share, remat=remat)
            value, gap = mean_divergence(dense, sparse), target - _mean(config, jnp.stack(dropped))
            held = multiplier * gap + 0.5 * PENALTY * gap**2 if "threshold" in learn else 0.0
            return value + held, (value, gap)

        (_, (value, gap)), slope = jax.value_and_grad(loss, has_aux=True)(learnt)
        updates, state = optimizer.update(slope, state, learnt)
        return optax.apply_updates(learnt, updates), state, multiplier + STEP_OF_MULTIPLIER * gap, value

    return _Program(optimizer.init, step)


def activation_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """About what a backward pass keeps: a few vectors of each width a token and layer."""
    return config.num_layers * tokens * (8 * config.d_model + 4 * config.d_mlp) * itemsize


def log_norms(weights: dict[str, Any], config: ModelConfig) -> Norms:
    """Logarithm of the rows' L2 norms over the largest, at least that of `SMALLEST_NORM`: float32 `[d_in]` each."""
    return [
        [jnp.log(jnp.maximum(row_norms(weight, 2), SMALLEST_NORM)) for weight in layer_weights(weights, layer)]
        for layer in range(config.num_layers)
    ]


def output_scales(config: ModelConfig, weights: dict[str, Any], tokens: np.ndarray) -> jax.Array:
    """Root mean square of each projection's output, float32 `[layers, 7]`, were its inputs uncorrelated.

    `sqrt(sum_i E[x_i^2] |W[i, :]|^2 / d_out)`, on at most `COUNTED` tokens, the model dense.
    """
    squares = _squares(config)(weights, jnp.asarray(tokens[: max(1, COUNTED // tokens.shape[1])]))
    rows = [
        [
            jnp.sqrt(square @ jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=1) / weight.shape[1])
            for square, weight in zip(layer_squares, layer_weights(weights, layer), strict=True)
        ]
        for layer, layer_squares in enumerate(squares)
    ]
    return jnp.array(rows)


@functools.cache
def _squares(config: ModelConfig) -> Any:
    def observe(taps: Taps, gates: BlockGates) -> list[jax.Array]:
        return [jnp.mean(jnp.square(taps[site].astype(jnp.float32)), axis=(0, 1)) for site in SITE_OF_PROJECTION]

    return jax.jit(lambda weights, tokens: log_probabilities(config, weights, Dense(), tokens, observe)[1])


def soft_gates(values: dict[str, Any], norms: Norms | None, width: jax.Array) -> Gates:
    """The gates of one step; without `norms` the score is |x_i|."""

    def one(layer: int, i: int) -> Biased:
        scale = None if norms is None else jnp.exp(values["exponent"][layer, i] * norms[layer][i])
        bias = values["output"][layer, i] * values["bias"][layer][i]
        return Biased(Soft(jnp.exp(values["threshold"][layer, i]), scale, width), bias)

    layers, seven = range(len(values["bias"])), range(len(PROJECTIONS))
    return Gates(tuple(tuple(one(layer, i) for i in seven) for layer in layers))


def _dropped_share(taps: Taps, gates: BlockGates) -> jax.Array:
    """Share of channels dropped, float32 `[7]`: the hard one, with the soft one's slope."""
    shares = []
    for i, site in enumerate(SITE_OF_PROJECTION):
        gate: Any = gates[i]  # Biased(Soft), of soft_gates
        shares.append(1 - jnp.mean(gate.gate.mask(taps[site])))
    return jnp.stack(shares)


def _mean(config: ModelConfig, shares: jax.Array) -> jax.Array:
    sizes = np.array(config.projection_sizes, np.float64)
    return jnp.sum(shares.mean(axis=0) * jnp.asarray(sizes / sizes.sum(), jnp.float32))


def _meet(
    config: ModelConfig,
    weights: Any,
    values: dict[str, Any],
    norms: Norms | None,
    tokens: np.ndarray,
    target: float,
) -> float:
    """The shift of all log thresholds under which the realised sparsity is the target, by bisection."""
    low, high = -1.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        shifted = values | {"threshold": values["threshold"] + middle}
        below = model_sparsity(config, _realised(config, weights, shifted, norms, tokens)) < target
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def _realised(
    config: ModelConfig, weights: Any, values: dict[str, Any], norms: Norms | None, tokens: np.ndarray
) -> np.ndarray:
    """Share of channels that the hard gates drop, float64 `[layers, 7]`, on at most `COUNTED` tokens."""
    rows = max(1, COUNTED // tokens.shape[1])
    gates = soft_gates(values, norms, jnp.float32(1))
    return np.asarray(_count(config)(weights, gates, jnp.asarray(tokens[:rows])), np.float64)


@functools.cache
def _count(config: ModelConfig) -> Any:
    def count(weights: Any, gates: Gates, tokens: jax.Array) -> jax.Array:
        return jnp.stack(log_probabilities(config, weights, gates, tokens, _dropped_share)[1])

    return jax.jit(count)

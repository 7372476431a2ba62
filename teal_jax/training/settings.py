"""How a training is done: everything that its losses depend on beside model, plan and tokens."""

import dataclasses
from typing import Any

import jax
import optax

from teal_jax.errors import TrainingError

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("bfloat16", "float32")
ATTENTIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Numbers of a training run; a run is resumed under the same ones only.

    Attributes:
      steps: updates in all, >= 1.
      batch: rows of a step, over all devices and accumulated parts.
      seq_len: tokens of a row that are predicted.
      learning_rate: the peak.
      warmup: steps up to it; None: a fiftieth of all. After it along `schedule` down to `final_rate` of the peak.
      weight_decay: of AdamW, on matrices; vectors (norms, biases) do not decay.
      beta1, beta2: of AdamW.
      clip: largest global norm of the gradient; None does not clip.
      accumulate: parts that a step's rows are read in, one after another; the update is that of the whole batch.
      dtype: of products and activations. Master weights and optimizer state are float32.
      bitnet: the projections are BitNet b1.58's, of three values; gradients pass to the float32 ones.
      remat: the backward pass computes each block again in place of keeping its activations.
      distil: weight in [0, 1] of KL(dense start model || model), beside the loss on the tokens, which has the rest.
      hold_sparsity: with a plan of thresholds, each moves after every step towards its share of dropped channels; see
        `teal_jax.training.sparsity.moved`.
      straight_through: share of its gradient that a channel gets where a gate drops it, in [0, 1]; 1 is Q-Sparse's.
      attention: `"xla"`, or `"cudnn"`, on a GPU in bfloat16: less to read and write, but it adds in any order, so that
        a resumed run has the same losses to rounding only.
      seed: of the order of rows.
    """

    steps: int = 1000
    batch: int = 32
    seq_len: int = 512
    learning_rate: float = 3e-4
    warmup: int | None = None
    schedule: str = "cosine"
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float | None = 1.0
    accumulate: int = 1
    dtype: str = "bfloat16"
    bitnet: bool = False
    remat: bool = False
    distil: float = 0.0
    hold_sparsity: bool = True
    straight_through: float = 1.0
    attention: str = "xla"
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "seq_len", "accumulate"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("distil", "final_rate", "straight_through"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.learning_rate > 0 or self.weight_decay < 0 or (self.clip is not None and not self.clip > 0):
            raise TrainingError(
                f"learning_rate and clip must be > 0 and weight_decay >= 0, got {self.learning_rate}, {self.clip} and "
                f"{self.weight_decay}"
            )
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 50)
        if not 0 <= self.warmup_steps <= self.steps:
            raise TrainingError(f"warmup must lie in [0, steps], got {self.warmup} of {self.steps} steps")
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES), ("attention", ATTENTIONS)):
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise TrainingError(f"attention by cudnn is of bfloat16, got {self.dtype}", hint="xla's has no such limit")
        if self.batch % self.accumulate:
            raise TrainingError(
                f"batch must be a multiple of accumulate, got {self.batch} rows in {self.accumulate} parts"
            )

    @property
    def warmup_steps(self) -> int:
        """`warmup`, which is never None once made."""
        return self.warmup or 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


def learning_rates(settings: TrainSettings) -> optax.Schedule:
    """The learning rate of each step, counted from 0: step `warmup` has the peak, the last one nearly the end value."""
    peak, end = settings.learning_rate, settings.learning_rate * settings.final_rate
    rest = max(1, settings.steps - settings.warmup_steps)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.final_rate),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    # One step in already, so that the first update is not nothing.
    warm = (
        optax.linear_schedule(peak / (settings.warmup_steps + 1), peak, settings.warmup_steps)
        if settings.warmup_steps
        else after
    )
    return optax.join_schedules([warm, after], [settings.warmup_steps])


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """Clipping, then AdamW whose decay spares vectors.

    References:
      AdamW, arXiv 1711.05101.
    """
    adamw = optax.adamw(
        learning_rates(settings),
        settings.beta1,
        settings.beta2,
        weight_decay=settings.weight_decay,
        mask=lambda weights: jax.tree.map(lambda leaf: leaf.ndim >= 2, weights),
    )
    return adamw if settings.clip is None else optax.chain(optax.clip_by_global_norm(settings.clip), adamw)

"""`train`: from a model, tokens and settings to a trained model; killed at any step, it goes on with the same losses."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.errors import TrainingError
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.progress import Bar
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.training import order, run_record
from teal_jax.training.checkpoints import Checkpoints
from teal_jax.training.devices import check_batch, make_mesh, shardings
from teal_jax.training.flops import peak_flops, training_flops
from teal_jax.training.settings import TrainSettings, learning_rates
from teal_jax.training.sparsity import has_thresholds, trained_plan, training_gates
from teal_jax.training.step import Inputs, Program, State, cast, make_program, place_rows
from teal_jax.training.token_file import TokenFile

type Listener = Callable[[dict[str, Any]], None]
"""Called after every step with what log.csv says of it."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
      lm: the trained model in the compute dtype, under its plan where it has one: what the last steps ran.
      log: a dict a step, the columns of log.csv.
      directory: of the run.
    """

    lm: LanguageModel
    log: list[dict[str, Any]]
    directory: Path


def train(
    lm: LanguageModel,
    tokens: TokenFile,
    directory: str | Path,
    *,
    settings: TrainSettings = TrainSettings(),
    plan: SparsityPlan | None = None,
    devices: Sequence[Any] | int | None = None,
    fully_sharded: bool = False,
    resume: bool = False,
    save_every: int = 200,
    keep: int = 2,
    progress: bool = True,
    listen: Listener | None = None,
) -> Trained:
    """Train all weights of `lm` on next tokens; `lm` itself stays as it is.

    Args:
      lm: where to start: loaded, or `random_model`. Its own gates are ignored; with `settings.distil` it is the teacher.
      tokens: from `pack` or `open_token_file`.
      directory: of the run: configuration, log, checkpoints. It must not hold anything, or with `resume` this run.
      settings: see `TrainSettings`.
      plan: the sparsity of the forward pass, its derivative straight through; None: dense. See `top_k_plan`.
      devices: how many of the local devices, or which; None: all. Rows are shared out over them.
      fully_sharded: so are weights and optimizer state; else each device has a copy.
      resume: go on from the newest checkpoint, from the beginning where there is none.
      save_every: steps between checkpoints; the last step has one in any case.
      keep: newest checkpoints that are kept.
      progress: draw a progress bar.
      listen: see `Listener`.

    Raises:
      TrainingError: a run that is there already, or of another configuration; devices that do not divide the batch; a
        loss or gradient that is not finite (the last checkpoint then is the last good one).
      DataError: tokens of another tokenizer, or too few.
      PlanError: the plan is for another model or cannot be trained under.
    """
    directory = Path(directory)
    mesh = make_mesh(devices)
    _check(lm, tokens, settings, save_every)
    check_batch(mesh, settings.batch, settings.accumulate)
    gates = training_gates(plan, lm.config, lm.params["weights"])
    run_record.claim(directory, run_record.configuration(lm, tokens, settings, plan), resume=resume)
    program = make_program(lm.config, settings, mesh, fully_sharded)

    held = plan if settings.hold_sparsity and has_thresholds(plan) else None
    thresholds = None if held is None else jnp.asarray(held.thresholds)
    target = None if held is None else jnp.asarray(held.sparsity, jnp.float32)

    def placed(weights: Any) -> Any:
        return jax.device_put(weights, shardings(mesh, weights, sharded=fully_sharded))

    weights = lm.params["weights"]
    teacher = placed(cast(weights, settings.dtype)) if settings.distil > 0 else None
    inputs = Inputs(gates, target, teacher)
    with Checkpoints(directory / run_record.CHECKPOINTS, keep=keep) as checkpoints:
        done = checkpoints.latest or 0
        if done:
            shapes = jax.eval_shape(program.fresh, weights, thresholds)
            state = checkpoints.load(shapes, program.state_shardings(weights, thresholds))
        else:
            state = program.start(placed(weights), thresholds)
        log = run_record.Log(directory / run_record.LOG, done=done)
        try:
            with Bar(enabled=progress) as bar:
                bar.start("Training", settings.steps)
                bar.advance(done)
                course = _Course(lm, settings, mesh.devices.flat[0], mesh.size, log, bar, listen)
                state = _run(program, state, inputs, tokens, settings, mesh, done, save_every, checkpoints, course)
        finally:
            log.close()
    found = run_record.read_log(directory / run_record.LOG)
    return Trained(_finished(lm, state, settings, plan, held, tokens), found, directory)


def _check(lm: LanguageModel, tokens: TokenFile, settings: TrainSettings, save_every: int) -> None:
    if lm.quantization is not None:
        raise TrainingError(f"{lm.name} has {lm.quantization} weights", hint="train the model before it was quantised")
    if not 1 <= settings.seq_len <= lm.config.max_position:
        raise TrainingError(f"seq_len must lie in [1, {lm.config.max_position}] here, got {settings.seq_len}")
    if save_every < 1:
        raise TrainingError(f"save_every must be >= 1, got {save_every}")
    if lm.tokenizer is not None:
        tokens.check_tokenizer(lm.tokenizer.fingerprint, lm.name)
    order.num_rows(tokens, settings.seq_len)
    order.check_answers(tokens, settings.seq_len)
    order.check_vocabulary(tokens, lm.config.vocab_size)


def _run(
    program: Program,
    state: State,
    inputs: Inputs,
    tokens: TokenFile,
    settings: TrainSettings,
    mesh: jax.sharding.Mesh,
    done: int,
    save_every: int,
    checkpoints: Checkpoints,
    course: "_Course",
) -> State:
    for step in range(done, settings.steps):
        rows, scored = order.batch_of(tokens, settings, step)
        state, metrics = program.step(state, inputs, *place_rows(mesh, settings.accumulate, rows, scored))
        course.add(step + 1, int(scored.sum()), metrics)
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            course.settle(checkpoints.latest)
            checkpoints.save(step + 1, state)
        else:
            # One step behind: the device works on the next while the host reads this one's loss.
            course.settle(checkpoints.latest, behind=1)
    return state


class _Course:
    """Measures and reports the steps of a run."""

    def __init__(
        self,
        lm: LanguageModel,
        settings: TrainSettings,
        device: Any,
        devices: int,
        log: run_record.Log,
        bar: Bar,
        listen: Listener | None,
    ):
        self._rates, self._log, self._bar, self._listen = learning_rates(settings), log, bar, listen
        self._waiting: list[tuple[int, int, dict[str, jax.Array]]] = []
        self._before: float | None = None
        self._row_tokens = settings.batch * settings.seq_len
        self._flops = training_flops(lm.config, settings.seq_len, teacher=settings.distil > 0)
        peak = peak_flops(device) if settings.dtype == "bfloat16" else None
        self._peak = None if peak is None else peak * devices

    def add(self, step: int, scored: int, metrics: dict[str, jax.Array]) -> None:
        """A step that is under way."""
        self._waiting.append((step, scored, metrics))

    def settle(self, latest: int | None, *, behind: int = 0) -> None:
        """Wait for all steps but the newest `behind`, and report them; `latest` is the newest checkpoint.

        Raises:
          TrainingError: a loss or a gradient is not finite.
        """
        while len(self._waiting) > behind:
            step, scored, metrics = self._waiting.pop(0)
            values = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            # The first one compiled, which is no measure.
            seconds = None if self._before is None else now - self._before
            self._before = now
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                kept = f"the last good checkpoint is that of step {latest}" if latest else "there is no checkpoint yet"
                raise TrainingError(
                    f"step {step}: the loss is {values['loss']:g}, its gradient's norm {values['gradient_norm']:g}; {kept}",
                    hint="a lower learning rate or a longer warm-up, in another directory",
                )
            row = {"step": step, "tokens": scored, "learning_rate": float(self._rates(step - 1)), **values}
            if seconds is not None:
                row["seconds"] = round(seconds, 6)
            self._log.write(**row)
            self._bar.advance(description=self._text(values["loss"], seconds))
            if self._listen is not None:
                self._listen(row)

    def _text(self, loss: float, seconds: float | None) -> str:
        if not seconds:
            return f"loss {loss:.3f}"
        speed = self._row_tokens / seconds
        share = "" if self._peak is None else f" {100 * speed * self._flops / self._peak:.0f} % peak"
        return f"loss {loss:.3f} {speed:,.0f} tok/s{share}"


def _finished(
    lm: LanguageModel,
    state: State,
    settings: TrainSettings,
    plan: SparsityPlan | None,
    held: SparsityPlan | None,
    tokens: TokenFile,
) -> LanguageModel:
    # Whole, on one device, as every other function of this library expects its weights.
    host = jax.device_get(state["weights"])
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, settings.dtype), host)
    trained = dataclasses.replace(lm, params={"weights": weights, "gates": Dense()}, plan=None)
    if plan is None:
        return trained
    thresholds = None if held is None else np.asarray(jax.device_get(state["thresholds"]))
    notes = {"steps": settings.steps, "tokens": tokens.source, "distil": settings.distil}
    return trained.sparsify(trained_plan(plan, thresholds, notes))

"""`train`: from a model and tokens to a trained model; killed at any step, it goes on with the same losses."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax import artifact
from teal_jax.errors import TrainingError
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.progress import Bar
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.training import order, run_record
from teal_jax.training.checkpoints import Checkpoints
from teal_jax.training.course import Course, Listener, NotFiniteError
from teal_jax.training.devices import check_batch, make_mesh, shardings
from teal_jax.training.held_out import read_held_out
from teal_jax.training.plot import plot_losses
from teal_jax.training.settings import TrainSettings
from teal_jax.training.sparsity import has_thresholds, plan_after, training_gates
from teal_jax.training.step import Inputs, State, cast, computed_weights, make_program, place_rows
from teal_jax.training.token_file import TokenFile

DEFAULT = TrainSettings()

type Watcher = Callable[[int, LanguageModel], Any]
"""Called with the updates done and the model as it is then, in the compute dtype and under its plan: to evaluate it."""


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
    settings: TrainSettings = DEFAULT,
    plan: SparsityPlan | None = None,
    devices: Sequence[Any] | int | None = None,
    fully_sharded: bool = False,
    resume: bool = False,
    save_every: int = 200,
    keep: int = 2,
    progress: bool = True,
    listen: Listener | None = None,
    watch: Watcher | None = None,
    watch_every: int = 100,
) -> Trained:
    """Train all weights of `lm` on next tokens; `lm` itself stays as it is.

    Args:
      lm: where to start: loaded, or `random_model`. Its gates are ignored; with `settings.distil` it is the teacher.
      tokens: from `pack` or `open_token_file`.
      directory: of the run: configuration, log and its plot, checkpoints, at the end the model as an artifact. It must
        not hold anything, or with `resume` this run.
      settings: see `TrainSettings`.
      plan: the sparsity of the forward pass, its derivative straight through; None: dense. See `q_sparse_plan`.
      devices: how many of the local devices, or which; None: all. Rows are shared out over them.
      fully_sharded: so are weights and optimizer state; else each device has a copy.
      resume: go on from the newest checkpoint, from the beginning where there is none.
      save_every: steps between checkpoints; the last step has one in any case.
      keep: newest checkpoints that are kept, >= 2: the newest is known to be good when a step from it was.
      progress: draw a progress bar.
      listen: see `Listener`.
      watch: see `Watcher`; its time is not that of a step.
      watch_every: steps between two calls of it; it also sees the last step.

    Raises:
      TrainingError: a run that is there already, or of another configuration; devices that do not divide the batch; a
        loss or gradient that is not finite; the last good checkpoint stays, and is saved as the model.
      DataError: tokens of another tokenizer, or too few.
      PlanError: the plan is for another model or cannot be trained under.
    """
    directory = Path(directory)
    mesh = make_mesh(devices)
    _check(lm, tokens, settings, min(save_every, watch_every), keep)
    check_batch(mesh, settings.batch, settings.accumulate)
    gates = training_gates(plan, lm.config, lm.params["weights"], straight_through=settings.straight_through)
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
    shapes = jax.eval_shape(program.fresh, weights, thresholds)
    lies = program.state_shardings(weights, thresholds)

    def model_of(state: State) -> LanguageModel:
        return _finished(lm, state, settings, plan, tokens)

    def keep_model(state: State) -> LanguageModel:
        trained = model_of(state)
        artifact.save(trained, directory / run_record.MODEL, overwrite=True)
        return trained

    with Checkpoints(directory / run_record.CHECKPOINTS, keep=keep) as checkpoints:
        done = checkpoints.latest or 0
        state = checkpoints.load(done, shapes, lies) if done else program.start(placed(weights), thresholds)
        log = run_record.Log(directory / run_record.LOG, done=done)
        try:
            with Bar(enabled=progress) as bar:
                bar.start("Training", settings.steps)
                bar.advance(done)
                course = Course(lm.config, settings, mesh, log, bar, listen)
                for step in range(done, settings.steps):
                    rows, scored = order.batch_of(tokens, settings, step)
                    given = place_rows(mesh, settings.accumulate, rows, scored)
                    state, metrics = program.step(state, inputs, *given)
                    course.add(step + 1, int(scored.sum()), metrics)
                    last = step + 1 == settings.steps
                    due = last or (step + 1) % save_every == 0
                    watched = watch is not None and (last or (step + 1) % watch_every == 0)
                    # One step behind: the device works on the next while the host reads this one's loss.
                    course.settle(behind=0 if due or watched else 1)
                    if watched:  # before the checkpoint: a run that is killed here watches again
                        watch(step + 1, model_of(state))
                    if due:
                        checkpoints.save(step + 1, state)
                    if due or watched:
                        course.restart_clock()
        except NotFiniteError as error:
            # The weights that gave it may be the fault, so the good ones are older.
            good = checkpoints.before(error.step - 1)
            if good is None:
                raise TrainingError(f"{error}; there is no good checkpoint yet", hint=_CALMER) from error
            keep_model(checkpoints.load(good, shapes, lies))
            raise TrainingError(
                f"{error}; the last good checkpoint is that of step {good}, its model in "
                f"{directory / run_record.MODEL}",
                hint=_CALMER,
            ) from error
        finally:
            log.close()
    trained = keep_model(state)
    course_so_far = run_record.read_log(directory / run_record.LOG)
    if course_so_far:
        curves = {lm.name: [(row["step"], row["loss"]) for row in course_so_far]}
        if held_out := read_held_out(directory):
            curves["held-out text"] = [(step, loss) for step, loss, _ in held_out]
        plot_losses(curves, directory / run_record.PLOT)
    return Trained(trained, course_so_far, directory)


_CALMER = "a lower learning rate or a longer warm-up, in another directory"


def _check(lm: LanguageModel, tokens: TokenFile, settings: TrainSettings, every: int, keep: int) -> None:
    if lm.quantization is not None:
        raise TrainingError(f"{lm.name} has {lm.quantization} weights", hint="train the model before it was quantised")
    if not 1 <= settings.seq_len <= lm.config.max_position:
        raise TrainingError(f"seq_len must lie in [1, {lm.config.max_position}] here, got {settings.seq_len}")
    if settings.attention == "cudnn" and jax.default_backend() != "gpu":
        raise TrainingError(f"attention by cudnn needs an NVIDIA GPU, here is a {jax.default_backend()}")
    if every < 1 or keep < 2:
        raise TrainingError(f"save_every and watch_every must be >= 1 and keep >= 2, got {every} and {keep}")
    if lm.tokenizer is not None:
        tokens.check_tokenizer(lm.tokenizer.fingerprint, lm.name)
    order.num_rows(tokens, settings.seq_len)
    order.check_answers(tokens, settings.seq_len)
    order.check_vocabulary(tokens, lm.config.vocab_size)


def _finished(
    lm: LanguageModel,
    state: State,
    settings: TrainSettings,
    plan: SparsityPlan | None,
    tokens: TokenFile,
) -> LanguageModel:
    # Whole, on one device, as every other function of this library expects its weights.
    host = jax.device_get(state["weights"])
    weights = computed_weights(jax.tree.map(jnp.asarray, host), settings)
    trained = dataclasses.replace(lm, params={"weights": weights, "gates": Dense()}, plan=None)
    if plan is None:
        return trained
    thresholds = np.asarray(jax.device_get(state["thresholds"])) if "thresholds" in state else None
    notes = {"steps": settings.steps, "tokens": tokens.source, "distil": settings.distil}
    return trained.sparsify(plan_after(plan, thresholds, notes))

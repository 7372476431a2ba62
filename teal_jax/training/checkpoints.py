"""Checkpoints of a training's state: orbax's, each under its step, there whole or not at all."""

from pathlib import Path
from typing import Any

import jax

from teal_jax.errors import TrainingError
from teal_jax.training.step import State


class Checkpoints:
    """The newest `keep` states of a run; also a context manager, that waits for what is being written."""

    def __init__(self, directory: Path, *, keep: int = 2):
        """Open `directory`, made if missing; what a killed run left half-written is removed."""
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly compress
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),  # orbax takes a relative path and fails later, in a thread
            context=context,
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Updates that the newest checkpoint has seen; None where there is none."""
        return self.before(None)

    def before(self, step: int | None) -> int | None:
        """The newest checkpoint of fewer updates than `step` (None: of any); None where there is none."""
        found = [one.step for one in self._checkpointer.checkpoints if step is None or one.step < step]
        return max(found, default=None)

    def save(self, step: int, state: State) -> None:
        """Write `state`; returns when it is complete.

        Raises:
          TrainingError: it cannot be written (a full disk). Older checkpoints stay.
        """
        try:
            self._checkpointer.save(step, _flat(state), force=True)
        except Exception as error:  # orbax and the file systems below it raise many kinds
            raise TrainingError(
                f"cannot write the checkpoint of step {step}: {_line(error)}", hint="older ones are as they were"
            ) from error

    def load(self, step: int, like: Any, shardings: Any) -> State:
        """The state after `step` updates, of the structure of `like` (shapes), laid out by `shardings`.

        Raises:
          TrainingError: it cannot be read, or holds another structure.
        """
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, shardings)
        try:
            flat = self._checkpointer.load(step, _flat(target))
        except Exception as error:
            raise TrainingError(
                f"the checkpoint of step {step} cannot be read: {_line(error)}",
                hint="remove its folder to go on from the one before",
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _flat(like)])


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by path: optax's states are tuples with names, which a checkpoint need not know."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

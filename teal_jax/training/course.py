"""The course of a run: every step's loss checked, logged and shown, one step behind the device."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from teal_jax.config import ModelConfig
from teal_jax.progress import Bar
from teal_jax.training.flops import peak_flops, training_flops
from teal_jax.training.run_record import Log
from teal_jax.training.settings import TrainSettings

type Listener = Callable[[dict[str, Any]], None]
"""Called after every step with what log.csv says of it."""


class NotFiniteError(Exception):
    """A loss or a gradient that is NaN or infinite.

    Attributes:
      step: whose; the weights that it began with are those after `step - 1` updates.
    """

    def __init__(self, step: int, loss: float, norm: float):
        super().__init__(f"step {step}: the loss is {loss:g}, its gradient's norm {norm:g}")
        self.step = step


class Course:
    """Measures and reports the steps of a run."""

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainSettings,
        mesh: Mesh,
        log: Log,
        bar: Bar,
        listen: Listener | None,
    ):
        self._log, self._bar, self._listen = log, bar, listen
        self._waiting: list[tuple[int, int, dict[str, jax.Array]]] = []
        self._before: float | None = None
        self._row_tokens = settings.batch * settings.seq_len
        flops = training_flops(config, settings.seq_len, teacher=settings.distil > 0)
        peak = peak_flops(mesh.devices.flat[0]) if settings.dtype == "bfloat16" else None
        self._token_share = None if peak is None else flops / (peak * mesh.size)

    def add(self, step: int, scored: int, metrics: dict[str, jax.Array]) -> None:
        """A step that is under way, numbered from 1, with so many scored tokens."""
        self._waiting.append((step, scored, metrics))

    def settle(self, *, behind: int = 0) -> None:
        """Wait for all steps but the newest `behind`, and report them; raises `NotFiniteError`."""
        while len(self._waiting) > behind:
            step, scored, metrics = self._waiting.pop(0)
            # Nothing is computed here: it would wait behind the step that is under way.
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds = self._lap()
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                raise NotFiniteError(step, values["loss"], values["gradient_norm"])
            row: dict[str, Any] = {"step": step, "tokens": scored, **values}
            speed = ""
            if seconds is not None:
                row["seconds"] = round(seconds, 6)
                row["tokens_per_second"] = round(self._row_tokens / seconds, 1)
                speed = f" {row['tokens_per_second']:,.0f} tok/s"
                if self._token_share is not None:
                    row["share_of_peak"] = round(row["tokens_per_second"] * self._token_share, 4)
                    speed += f" {100 * row['share_of_peak']:.0f} % peak"
            self._log.write(**row)
            self._bar.advance(description=f"loss {values['loss']:.3f}{speed}")
            if self._listen is not None:
                self._listen(row)

    def restart_clock(self) -> None:
        """What was done just now is no part of the next step."""
        self._before = time.perf_counter()

    def _lap(self) -> float | None:
        """Seconds since the step before; None for the first, which was compiled."""
        before, self._before = self._before, time.perf_counter()
        return None if before is None else self._before - before

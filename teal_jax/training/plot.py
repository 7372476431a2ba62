"""The course of a training as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from teal_jax.plots import COLOURS, figure


def plot_losses(runs: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, *, title: str = "Loss") -> Path:
    """Loss over steps, a line a run: every step thin, their moving average thick.

    Args:
      runs: by name, points `(step, loss in nats a token)`.
      path: PNG to write.
      title: of the figure.

    Returns:
      The path.
    """
    path = Path(path)
    with figure(path, 7.2, 4.4) as axes:
        for i, (name, points) in enumerate(runs.items()):
            steps, losses = np.array(points, float).T
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            width = max(1, len(losses) // 50)
            sums = np.concatenate([[0.0], np.cumsum(losses)])
            low = np.maximum(0, np.arange(len(losses)) - width + 1)
            mean = (sums[1:] - sums[low]) / (np.arange(len(losses)) + 1 - low)
            axes.plot(steps, mean, color=colour, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token, lower is better)")
        axes.set_title(title)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="upper right")
    return path

"""Tokens a second over sparsity, under the curve that the read bandwidth allows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from teal_jax.benchmark.rows import DecodeRow
from teal_jax.plots import COLOURS, MARKERS, figure


def plot_speed(rows: Sequence[DecodeRow], limit: Callable[[float], float], path: str | Path, *, title: str) -> Path:
    """Draw the rows.

    Args:
      rows: of `bench_decode`; those without a speed are left out.
      limit: tokens a second that the measured bandwidth allows at a model sparsity.
      path: PNG to write.
      title: of the figure.

    Returns:
      The path.
    """
    path = Path(path)
    measured = [row for row in rows if row.tokens_per_second is not None]
    uniform = sorted((row for row in measured if row.target is not None and not _uneven(row)), key=_realised)
    formats = list(dict.fromkeys(row.quantization for row in uniform))
    with figure(path, 7.2, 4.4) as axes:
        shares = np.linspace(0, max([0.7, *(_realised(row) for row in measured)]), 100)
        speeds = [limit(share) for share in shares]
        axes.plot(100 * shares, speeds, color="#444444", linestyle=(0, (4, 3)), label="read bandwidth (unquantised)")
        for i, kind in enumerate(formats):
            own = [row for row in uniform if row.quantization == kind]
            xs, ys = [100 * _realised(row) for row in own], [row.tokens_per_second for row in own]
            label = f"teal_jax, {kind or 'unquantised'}"
            axes.plot(xs, ys, marker=MARKERS[0], color=COLOURS[i % len(COLOURS)], label=label, zorder=3)
        others = [row for row in measured if row not in uniform and row.quantization is None]
        for i, row in enumerate(others, max(1, len(formats))):
            style = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "linestyle": "none"}
            axes.plot([100 * _realised(row)], [row.tokens_per_second], label=row.name, zorder=4, **style)
        axes.set_xlabel("realised sparsity (% of block weights skipped)")
        axes.set_ylabel("tokens per second")
        axes.set_title(title)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
    return path


def _realised(row: DecodeRow) -> float:
    return row.realised or 0.0


def _uneven(row: DecodeRow) -> bool:
    return row.name.startswith("greedy-like")

"""Figures for reports: perplexity over sparsity, and a plan as a heat map. matplotlib is imported when one is drawn."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.sparsity.plan import SparsityPlan

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, told apart by colour-blind readers; markers differ, too."""

MARKERS = "osD^vP"

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


@contextmanager
def figure(path: Path, width: float, height: float, *, rows: int = 1, columns: int = 1) -> Generator[Any]:
    """Axes of a new figure, saved to `path` at the end; an array `[rows, columns]` of them where there are several."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no window system, no global state.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(rows, columns, squeeze=rows * columns == 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def plot_perplexity(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    dense: float | None = None,
    title: str = "Perplexity over sparsity",
) -> Path:
    """Perplexity over realised sparsity, one line a method.

    Args:
      curves: by method, points `(realised sparsity in [0, 1], perplexity)`.
      path: PNG to write.
      dense: perplexity of the dense model, a dashed line; every curve then starts from it.
      title: of the figure.

    Returns:
      The path.
    """
    path = Path(path)
    with figure(path, 7.2, 4.4) as axes:
        if dense is not None:
            axes.axhline(dense, color="#444444", linestyle=(0, (4, 3)), linewidth=1.4, label=f"dense ({dense:.2f})")
        for i, (name, points) in enumerate(curves.items()):
            points = sorted([(0.0, dense), *points] if dense is not None else points)
            share, ppl = np.array(points, float).T
            axes.plot(
                100 * share,
                ppl,
                marker=MARKERS[i % len(MARKERS)],
                markevery=range(dense is not None, len(ppl)),
                color=COLOURS[i % len(COLOURS)],
                label=name,
                zorder=3,
            )
        values = [ppl for points in curves.values() for _, ppl in points]
        if values and max(values) > 6 * min([*values, dense or np.inf]):
            axes.set_yscale("log")
            plain_log_ticks(axes)
        axes.set_xlabel("realised sparsity (% of block weights skipped)")
        axes.set_ylabel("perplexity (lower is better)")
        axes.set_title(title)
        axes.grid(axis="y", which="both")
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        axes.legend(loc="upper left")
    return path


def plain_log_ticks(axes: Any) -> None:
    """Ticks such as 2, 5, 10, 20 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_plan(plan: SparsityPlan, path: str | Path, *, title: str | None = None) -> Path:
    """A plan as a heat map, layers by projections; returns the path of the PNG written."""
    path = Path(path)
    layers = plan.num_layers
    with figure(path, 7.2, min(12.0, 1.7 + max(0.42 if layers <= 24 else 0.2, 1.6 / layers) * layers)) as axes:
        top = max(10.0, 10 * np.ceil(10 * plan.sparsity.max() - 1e-9))
        image = axes.imshow(100 * plan.sparsity, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set_xticks(range(len(plan.projections)), plan.projections)
        step = 1 if layers <= 24 else 4
        axes.set_yticks(range(0, layers, step))
        axes.set_xlabel("projection")
        axes.set_ylabel("layer")
        axes.set_title(title or f"{plan.model}: {plan.method} plan, {100 * plan.target:g} % model sparsity")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if layers <= 24:
            for (layer, column), share in np.ndenumerate(plan.sparsity):
                colour = "black" if 100 * share > 0.45 * top else "white"
                axes.text(column, layer, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=10)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("input channels dropped (%)")
        bar.outline.set_visible(False)
    return path

"""The analyses as figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.analysis.batch import RULES as BATCH_RULES
from teal_jax.analysis.batch import SHARED, BatchRow
from teal_jax.analysis.distribution import Distribution, shown_target
from teal_jax.analysis.prefill import PrefillRow
from teal_jax.analysis.run import Analysis
from teal_jax.analysis.up import RULES as UP_RULES
from teal_jax.analysis.up import UpRow
from teal_jax.config import PROJECTIONS
from teal_jax.plots import COLOURS, MARKERS, figure


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """A PNG for each analysis that was made, `analysis-MODEL-WHAT.png`; returns their paths."""
    stem, model = f"analysis-{Path(analysis.model).name}", Path(analysis.model).name
    work: list[tuple[str, Any, Sequence[Any]]] = [
        ("up", plot_up, analysis.up),
        ("distribution", plot_distribution, analysis.distribution),
        ("prefill", plot_prefill, analysis.prefill),
        ("batch", plot_batch, analysis.batch),
    ]
    return [plot(rows, folder / f"{stem}-{name}.png", model) for name, plot, rows in work if rows]


def plot_up(rows: Sequence[UpRow], path: Path, model: str) -> Path:
    """Error of the hidden entries over the sparsity of up, and excess log perplexity over the weights not needed."""
    with figure(path, 10.4, 4.2, columns=2) as axes:
        left, right = axes[0]
        for i, rule in enumerate(UP_RULES):
            style = _style(i, rule)
            of_rule = [row for row in rows if row.rule == rule]
            if of_rule and of_rule[0].error:
                errors = [np.mean(row.error["hidden"]) for row in of_rule]
                left.plot([100 * row.target for row in of_rule], errors, **style)
            weights = [100 * row.cost.realised_sparsity for row in of_rule]
            right.plot(weights, [row.cost.excess for row in of_rule], **style)
        _label(left, "sparsity of the thinned channels (%)", "relative error of the hidden entries", f"{model}: up")
        _label(right, "block weights not needed (%)", "excess negative log-likelihood (nats)", "whole model")
        right.legend(loc="upper left")
    return path


def plot_distribution(rows: Sequence[Distribution], path: Path, model: str) -> Path:
    """Sparsity over relative depth, a panel a projection, at the target nearest to 50 %; ours and the published."""
    target = shown_target(rows)
    rows = [row for row in rows if row.target == target]
    with figure(path, 14.0, 3.4, columns=len(PROJECTIONS)) as axes:
        for column, (panel, projection) in enumerate(zip(axes[0], PROJECTIONS, strict=True)):
            for i, row in enumerate(rows):
                shares = 100 * np.array(row.sparsity)[:, column]
                depth = (np.arange(len(shares)) + 0.5) / len(shares)
                ours = {"linewidth": 2.6, "marker": "o", "color": "black", "zorder": 4}
                style = {"linewidth": 1.0, "color": COLOURS[(i - 1) % len(COLOURS)]} if row.published else ours
                panel.plot(depth, shares, label=row.model, **style)
            panel.axhline(100 * target, color="#444444", linestyle=(0, (4, 3)), linewidth=1)
            _label(panel, "depth" if column == 3 else "", "", projection)
            panel.set_ylim(0, 100)
            panel.set_xticks([0, 0.5, 1], ["0", "1/2", "1"])
            if column:
                panel.set_yticklabels([])
        axes[0][0].set_ylabel(f"sparsity (%), target {100 * target:g}")
        _legend_below(axes[0][0])
    return path


def plot_prefill(rows: Sequence[PrefillRow], path: Path, model: str) -> Path:
    """Excess negative log-likelihood by policy, a colour for each target; with a standard error to both sides."""
    names = list(dict.fromkeys(row.policy for row in rows))
    targets = sorted({row.target for row in rows})
    with figure(path, 8.4, 0.4 * len(names) + 1.6) as axes:
        for i, target in enumerate(targets):
            of_target = {row.policy: row.cost for row in rows if row.target == target}
            where = np.arange(len(names)) + 0.16 * (i - (len(targets) - 1) / 2)
            errors = [of_target[name].standard_error or 0.0 for name in names]
            axes.errorbar(
                [of_target[name].excess for name in names],
                where,
                xerr=errors,
                linestyle="none",
                marker=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                label=f"{100 * target:g} %",
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        _label(axes, "excess negative log-likelihood after the prompt (nats)", "", f"{model}: which tokens are thinned")
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlim(left=-0.01 if min(row.cost.excess for row in rows) > -0.01 else None)
        axes.xaxis.set_major_formatter(_plain)
        axes.grid(axis="x")
        axes.legend(loc="best", title="target")
    return path


def plot_batch(rows: Sequence[BatchRow], path: Path, model: str) -> Path:
    """The sparsity that survives, and its cost, over the batch size, at the target nearest to 50 %."""
    target = shown_target(rows)
    rows = [row for row in rows if row.target == target]
    alone = [row for row in rows if row.batch == 1]
    ways = [(rule, False) for rule in BATCH_RULES] + [(rule, True) for rule in SHARED]
    with figure(path, 10.4, 4.2, columns=2) as axes:
        left, right = axes[0]
        for i, (rule, fitted) in enumerate(ways):
            of_way = alone + [row for row in rows if (row.rule, row.fitted) == (rule, fitted) and row.batch > 1]
            style = _style(i, f"{rule}, fitted" if fitted else rule)
            batch = [row.batch for row in of_way]
            left.plot(batch, [100 * row.cost.realised_sparsity for row in of_way], **style)
            right.plot(batch, [row.cost.excess for row in of_way], **style)
        by_size = {row.batch: 100 * row.independent for row in rows}
        sizes = sorted(by_size)
        left.plot(sizes, [by_size[size] for size in sizes], color="#444444", linestyle=(0, (4, 3)), label="independent")
        title = f"{model}, target {100 * target:g} %"
        _label(left, "sequences decoded together", "sparsity that survives (%)", title)
        _label(right, "sequences decoded together", "excess negative log-likelihood (nats)", "")
        for panel in (left, right):
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
        left.set_ylim(bottom=0)
        right.set_yscale("symlog", linthresh=0.01)
        right.set_ylim(bottom=-0.01 if min(row.cost.excess for row in rows) > -0.01 else None)
        right.yaxis.set_major_formatter(_plain)
        _legend_below(left)
    return path


def _plain(value: float, _: int) -> str:
    """A tick such as 0.01, in place of a power of ten."""
    return f"{value:g}"


def _style(i: int, label: str) -> dict[str, Any]:
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "label": label, "zorder": 3}


def _legend_below(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _label(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)

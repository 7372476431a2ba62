"""The figures of a report: what sparsity costs by method, and where in the model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, SITES
from teal_jax.evaluation.report import EvaluationReport
from teal_jax.evaluation.svg import FAINT, GLYPHS, INK, SERIES, drawing
from teal_jax.plots import MARKERS, plain_log_ticks

_NUMBERED_LAYERS = 16
"""The most layers whose heat map has room for numbers."""

_FEW = 6
"""The most methods whose intervals are told apart."""

_SHOWN_LAYERS = 3
"""Layers whose histograms are drawn: the first, the middle and the last."""


class FigureOf(NamedTuple):
    """An inline SVG and the line under it."""

    svg: str
    caption: str


class Style(NamedTuple):
    """How a method is drawn, the same in every figure; `glyph` is its marker in text, `variable` its CSS colour."""

    colour: str
    marker: str
    line: Any
    glyph: str
    variable: str


def method_styles(report: EvaluationReport) -> dict[str, Style]:
    """A style for each sparse method, in order of appearance."""
    names = list(dict.fromkeys(row["method"] for row in report.rows if row["target"] > 0))
    lines = ("-", (0, (4, 1.5)), (0, (1, 1)))
    return {
        name: Style(
            SERIES[i % len(SERIES)],
            MARKERS[i % len(MARKERS)],
            lines[i // len(SERIES) % len(lines)],
            GLYPHS[i % len(GLYPHS)],
            f"--series-{i % len(SERIES)}",
        )
        for i, name in enumerate(names)
    }


def quality_figures(report: EvaluationReport) -> list[FigureOf]:
    """Perplexity, KL, agreement and repetition over realised sparsity, with their intervals."""
    share = f"{100 * report.settings['confidence']:g} % bootstrap intervals"
    found = [
        _curves(report, "ppl", "Perplexity", "perplexity", lambda r: (r["ppl"], r["ppl_interval"]), log=True),
        _curves(report, "kl", "Divergence from dense", "KL, nats a token", lambda r: (r["kl"], r["kl_interval"])),
    ]
    captions = [
        f"Perplexity of the text; bars: {share}. Dashed: dense.",
        f"KL(dense || sparse), mean over the scored tokens; bars: {share}.",
    ]
    if any(row["agreement"] is not None for row in report.rows):
        found.append(
            _curves(
                report,
                "agreement",
                "Agreement with dense",
                "% of tokens",
                lambda r: (_percent(r["agreement"]), _percent(r["agreement_interval"])),
            )
        )
        captions.append("Tokens of the dense model's own text that the sparse model ranks first, too.")
    for kind in dict.fromkeys(kind for row in report.rows for kind in row["repetition"]):
        found.append(
            _curves(
                report,
                f"repeat-{kind}",
                f"Repetition, {kind}",
                "% of n-grams",
                lambda r, kind=kind: (
                    _percent(r["repetition"].get(kind)),
                    _percent(r["repetition_intervals"].get(kind)),
                ),
            )
        )
        captions.append(
            f"{report.settings['ngram']}-grams of {kind} text that occurred before in it. Dashed: dense; more is going "
            "in circles, much less is falling apart."
        )
    return [FigureOf(svg, caption) for svg, caption in zip(found, captions, strict=True)]


def _percent(value: Any) -> Any:
    if value is None:
        return None
    return [100 * v for v in value] if isinstance(value, Sequence) else 100 * value


def _curves(
    report: EvaluationReport,
    name: str,
    title: str,
    unit: str,
    read: Callable[[dict[str, Any]], tuple[float | None, Sequence[float] | None]],
    *,
    log: bool = False,
) -> str:
    """One line a method over realised sparsity; `read` gives a row's value and interval."""
    dense = read(report.rows[0])[0]
    with drawing(name, f"{title} over realised sparsity, by method", 4.6, 3.2) as drawn:
        axes, values = drawn.axes[0], []
        few = len(method_styles(report)) <= _FEW
        if dense is not None:
            axes.axhline(dense, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
            values.append(dense)
        for method, style in method_styles(report).items():
            rows = sorted((row for row in report.rows if row["method"] == method), key=lambda row: row["unread"])
            points = [(100 * row["unread"], *read(row)) for row in rows]
            points = [point for point in points if point[1] is not None]
            if not points:
                continue
            x, y = (np.array([point[i] for point in points], float) for i in (0, 1))
            low, high = (np.array([p[2][i] if p[2] else p[1] for p in points], float) for i in (0, 1))
            if dense is not None:
                axes.plot([0, x[0]], [dense, y[0]], color=style.colour, linestyle=style.line, linewidth=1, alpha=0.6)
            axes.errorbar(
                x,
                y,
                yerr=np.maximum([y - low, high - y], 0),
                color=style.colour,
                marker=style.marker,
                linestyle=style.line,
                capsize=2.5 if few else 0,
                elinewidth=1 if few else 0.5,
            )
            values += y.tolist()
        if log and min(values) > 0 and max(values) > 4 * min(values):
            axes.set_yscale("log")
            plain_log_ticks(axes)
        axes.set_title(title)
        axes.set_xlabel("realised: block weights left unread, %")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        if not log:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    return drawn.svg


def depth_figures(report: EvaluationReport) -> list[FigureOf]:
    """Error of the residual stream after each block, one figure a target."""
    found = []
    for target in sorted({row["target"] for row in report.rows if row["target"] > 0}):
        percent = f"{100 * target:g} %"
        with drawing(f"depth-{target:g}", f"Error by depth at {percent}", 4.6, 2.8) as drawn:
            axes = drawn.axes[0]
            for method, style in method_styles(report).items():
                for row in report.rows:
                    if row["method"] == method and row["target"] == target:
                        errors = row["depth_error"]
                        few = style.marker if len(errors) <= _NUMBERED_LAYERS else ""
                        axes.plot(range(len(errors)), errors, color=style.colour, linestyle=style.line, marker=few)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_title(f"At {percent}")
            axes.set_xlabel("after block")
            axes.set_ylabel("relative error")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
        found.append(FigureOf(drawn.svg, ""))
    return found


def plan_figures(report: EvaluationReport) -> list[FigureOf]:
    """Heat maps of the plans, one figure a method, one map a target; a method with one share for all has none."""
    found = []
    for i, method in enumerate(method_styles(report)):
        plans = [plan for plan in report.plans if plan["method"] == method]
        shares = [100 * np.array(plan["sparsity"]) for plan in plans]
        if all(np.ptp(share) < 1e-6 for share in shares):
            continue
        layers = len(shares[0])
        top = max(10.0, 10 * np.ceil(max(share.max() for share in shares) / 10 - 1e-9))
        height = min(9.0, 1.3 + max(0.24 if layers <= _NUMBERED_LAYERS else 0.12, 0.9 / layers) * layers)
        # As wide as four maps, however few there are: letters keep one size on the page.
        columns = max(4, len(plans))
        label = f"Sparsity by layer and projection of {method}"
        with drawing(f"plan-{i}", label, 2.3 * columns, height, columns=columns, share_y=True) as drawn:
            for axes in drawn.axes[len(plans) :]:
                axes.set_axis_off()
            for axes, plan, share in zip(drawn.axes, plans, shares, strict=False):
                image = axes.pcolormesh(share, cmap="cividis", vmin=0, vmax=top, edgecolors="none")
                axes.set_xticks(np.arange(len(PROJECTIONS)) + 0.5, PROJECTIONS)
                step = 1 if layers <= _NUMBERED_LAYERS else 4
                axes.set_yticks(np.arange(0, layers, step) + 0.5, np.arange(0, layers, step))
                axes.set_ylim(layers, 0)
                axes.spines[:].set_visible(False)
                axes.tick_params(length=0, labelsize=8)
                axes.set_title(f"{100 * plan['target']:g} %")
                if layers <= _NUMBERED_LAYERS:
                    for (layer, column), value in np.ndenumerate(share):
                        colour = "#000000" if value > 0.45 * top else "#ffffff"
                        place = {"ha": "center", "va": "center", "fontsize": 8}
                        axes.text(column + 0.5, layer + 0.5, f"{value:.0f}", color=colour, **place)
            drawn.axes[0].set_ylabel("layer")
            bar = drawn.axes[0].figure.colorbar(image, ax=drawn.axes[: len(plans)], pad=0.02, aspect=12)
            bar.set_label("% dropped")
            bar.outline.set_visible(False)
        found.append(FigureOf(drawn.svg, f"{method}: input channels dropped, %, by layer and projection."))
    return found


def activation_figures(report: EvaluationReport) -> list[FigureOf]:
    """Histograms of |x| at each site, for the first, the middle and the last layer, under both fitted densities."""
    found = []
    for site in SITES:
        fits = [fit for fit in report.activations if fit["site"] == site]
        if not fits:
            continue
        chosen = sorted({round(i) for i in np.linspace(0, len(fits) - 1, min(_SHOWN_LAYERS, len(fits)))})
        label = f"Histogram of activations at {site}, with fitted Gaussian and Laplace"
        with drawing(f"activations-{site}", label, 2.3 * len(chosen), 2.5, columns=len(chosen)) as drawn:
            for axes, i in zip(drawn.axes, chosen, strict=True):
                _histogram(axes, fits[i])
            drawn.axes[0].set_ylabel("density of |x|")
        fed = ", ".join(name for name, i in zip(PROJECTIONS, SITE_OF_PROJECTION, strict=True) if SITES[i] == site)
        found.append(FigureOf(drawn.svg, f"{site}: the input of {fed}"))
    return found


def _histogram(axes: Any, fit: dict[str, Any]) -> None:
    """On a log scale, where a Laplace density is a line and a Gaussian a parabola."""
    density = np.array(fit["density"])
    edges = np.linspace(0, fit["limit"], len(density) + 1)
    x = np.linspace(0, fit["limit"], 200)
    s, b = fit["gaussian_scale"], fit["laplace_scale"]
    positive = density[density > 0]
    floor = positive.min() / 2
    axes.stairs(np.maximum(density, floor), edges, fill=True, baseline=floor, color=FAINT, alpha=0.35)
    gaussian = np.sqrt(2 / np.pi) / s * np.exp(-((x / s) ** 2) / 2)
    for name, y, colour in (("gaussian", gaussian, SERIES[0]), ("laplace", np.exp(-x / b) / b, SERIES[1])):
        better = fit["better"] == name
        axes.plot(x, y, color=colour, linewidth=2.2 if better else 1.2, linestyle="-" if better else (0, (3, 2)))
    axes.set_yscale("log")
    axes.set_ylim(floor, 2 * max(positive.max(), 1 / b))
    axes.set_xlim(0, fit["limit"])
    axes.set_title(f"layer {fit['layer']}: {fit['better']}", color=INK)
    axes.set_xlabel("|x|")

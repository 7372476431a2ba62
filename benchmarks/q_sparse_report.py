"""The report of `q_sparse.py`: what each claim of the paper looks like here, as a table, curves and scaling laws."""

from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.config import SITES
from teal_jax.errors import DataError
from teal_jax.evaluation.run_directory import read_json, write_json
from teal_jax.plots import COLOURS, figure
from teal_jax.training.scaling_law import bootstrap_laws, fit_scaling_law

PAPER = {"grid": 0.4558, "grid-bitnet": 0.6125}
"""Inference-optimal sparsity by the paper's own fits: full precision, and 1.58-bit weights."""

PLAIN = (
    "What so small a grid can show: whether the loss at a fixed sparsity nears the dense one as models grow, the order "
    "of the variants, and a fit of the paper's form with its uncertainty. What it cannot: the constants of the paper's "
    "law, whose models are far larger. Every model here reads the same few tokens, so that E "
    "holds what more tokens would win; widths of 128 to 512 channels leave top-K few to choose from; the text is "
    "children's stories, mostly written by a 3M-parameter model; one seed a cell, unless the table says otherwise."
)


def write_report(out: Path, samples: int) -> None:
    """`q-sparse.json`, `.md` and figures in `out`, of what lies in `out/runs`."""
    results = [read_json(path) for path in sorted((out / "runs").glob("*.json"))]
    if not results:
        raise DataError(f"no finished run in {out / 'runs'}", hint="q_sparse.py train")
    laws = {group: law_of(cells, samples) for group in PAPER if (cells := of_group(results, group))}
    parts = [
        f"# Q-Sparse from scratch\n\n{setting(results[0])}",
        *(claims_table(claims, size) for size, claims in by_size(of_group(results, "claims")).items()),
        *(grid_text(group, of_group(results, group), law) for group, law in laws.items()),
        PLAIN,
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "q-sparse.md").write_text(text, "utf-8")
    write_json(out / "q-sparse.json", {"laws": laws, "runs": results})
    for size, claims in by_size(of_group(results, "claims")).items():
        plot_claims(claims, out / f"q-sparse-claims-{size}.png", f"{size}, from scratch")
    for group, law in laws.items():
        plot_grid(of_group(results, group), law, out / f"q-sparse-{group}.png")
    print(text)


def of_group(results: list[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """The results of a group."""
    return [result for result in results if result["run"]["group"] == group]


def by_size(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results of each size, the lowest loss first."""
    return {
        size: sorted((r for r in results if r["run"]["size"] == size), key=lambda result: result["final"])
        for size in sorted({result["run"]["size"] for result in results}, key=lambda size: size.zfill(8))
    }


def setting(result: dict[str, Any]) -> str:
    """What all runs share."""
    settings = result["settings"]
    return (
        f"Each model reads {result['tokens'] / 1e6:,.3g} M tokens ({result['unique_tokens'] / 1e6:,.3g} M different "
        f"ones) in rows of {settings['seq_len']}, {settings['batch']} a step, {settings['dtype']}. Losses are nats a "
        f"token on text held out of the same source, where the model that wrote it has {result['teacher']:.3f}; "
        f"`stories` is real text. {result['device']}, jax {result['versions'].get('jax')}."
    )


def claims_table(results: list[dict[str, Any]], size: str) -> str:
    """A line a variant, against dense."""
    dense = next((result for result in results if result["run"]["label"] == "dense"), None)
    lines = [
        f"## {size}: {results[0]['weights'] / 1e6:.1f} M weights outside the embedding",
        "",
        "| | seed | loss | over dense | stories | realised sparsity | zeros into down | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        over = f"{result['final'] - dense['final']:+.3f}" if dense else ""
        lines.append(
            f"| {result['run']['label']} | {result['run']['seed']} | {result['final']:.3f} | {over} "
            f"| {result['stories']:.3f} | {100 * result['realised']:.1f} % "
            f"| {100 * result['zeros_by_site'][SITES.index('mlp_hidden')]:.1f} % "
            f"| {result['tokens_per_second'] or 0:,.0f} |"
        )
    return "\n".join(lines)


def law_of(cells: list[dict[str, Any]], samples: int) -> dict[str, Any] | None:
    """The fitted law, its optimum and their 95 % intervals; None where there are too few cells."""
    sizes, shares, losses = columns(cells)
    try:
        law = fit_scaling_law(sizes, shares, losses)
    except DataError as error:
        print(f"no scaling law: {error}")
        return None
    drawn = bootstrap_laws(law, sizes, shares, losses, samples=samples)

    def interval(values: list[float]) -> list[float]:
        return np.quantile(values, [0.025, 0.975]).tolist()

    names = ("e", "b", "c", "alpha", "beta")
    return {
        "law": {name: getattr(law, name) for name in (*names, "unit")},
        "intervals": {name: interval([getattr(one, name) for one in drawn]) for name in names},
        "rms_error": float(np.sqrt(np.mean((law.loss(sizes, shares) - losses) ** 2))),
        "optimal": law.optimal_sparsity(),
        "optimal_interval": interval([one.optimal_sparsity() for one in drawn]),
    }


def columns(cells: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, realised sparsity and loss of each."""
    values = [(cell["weights"], max(0.0, cell["realised"]), cell["final"]) for cell in cells]
    sizes, shares, losses = np.array(values, float).T
    return sizes, shares, losses


def grid_text(group: str, cells: list[dict[str, Any]], found: dict[str, Any] | None) -> str:
    """The losses, sizes by sparsities, and what the law says."""
    shares = sorted({1 - cell["run"]["kept"] for cell in cells})
    lines = [
        f"## L(N, S){', BitNet b1.58' if group == 'grid-bitnet' else ''}",
        "",
        "| weights | " + " | ".join(f"S = {100 * share:.0f} %" for share in shares) + " |",
        "|---" * (1 + len(shares)) + "|",
    ]
    for own in by_size(cells).values():
        at = {1 - cell["run"]["kept"]: cell["final"] for cell in own}
        values = " | ".join(f"{at[share]:.3f}" if share in at else "" for share in shares)
        lines.append(f"| {own[0]['weights'] / 1e6:.1f} M | {values} |")
    if found is None:
        return "\n".join([*lines, "", "Too few cells for a law."])
    low, high = found["optimal_interval"]
    law, spread = found["law"], found["intervals"]
    said = ", ".join(f"{name} {law[name]:.3g} ({spread[name][0]:.3g} to {spread[name][1]:.3g})" for name in spread)
    lines += [
        "",
        f"`L = E + (B + C exp(beta / (1 - S))) / (N / {law['unit'] / 1e6:.3g} M) ** alpha`: {said}; rms error "
        f"{found['rms_error']:.4f} nats. 95 % intervals by bootstrap of the residuals.",
        "",
        f"Inference-optimal sparsity, for a fixed number of active weights: **{100 * found['optimal']:.1f} %** "
        f"({100 * low:.1f} to {100 * high:.1f} %); the paper's is {100 * PAPER[group]:.2f} %.",
    ]
    return "\n".join(lines)


def plot_claims(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss over tokens, a line a variant; the held-out one as dots."""
    with figure(path, 8.0, 4.8) as axes:
        for i, result in enumerate(results):
            step = result["settings"]["batch"] * result["settings"]["seq_len"] / 1e6
            colour, dashed = COLOURS[i % len(COLOURS)], i >= len(COLOURS)
            x, y = np.array(result["losses"], float).T
            name = f"{result['run']['label']} ({result['final']:.3f})"
            axes.plot(x * step, y, color=colour, linestyle="--" if dashed else "-", linewidth=1.4, label=name)
            x, y = np.array(result["held_out"], float).T
            axes.plot(x * step, y, "o", color=colour, markersize=3)
        axes.set_ylim(top=min(axes.get_ylim()[1], 2.5 * min(result["final"] for result in results)))
        axes.set_xlabel("training tokens (millions)")
        axes.set_ylabel("loss (nats a token; dots: held out)")
        axes.set_title(title)
        axes.grid(axis="y")
        axes.legend(fontsize=9)


def plot_grid(cells: list[dict[str, Any]], found: dict[str, Any] | None, path: Path) -> None:
    """Loss over sparsity, a line a size, with the law; and loss over active weights."""
    from teal_jax.training.scaling_law import ScalingLaw

    law = None if found is None else ScalingLaw(**found["law"])
    with figure(path, 10.0, 4.4, columns=2) as axes:
        left, right = np.ravel(axes)
        for i, (size, own) in enumerate(by_size(cells).items()):
            sizes, shares, losses = columns(sorted(own, key=lambda cell: cell["realised"]))
            left.plot(100 * shares, losses, "o", color=COLOURS[i % 6], label=size)
            right.plot(sizes * (1 - shares), losses, "o-", color=COLOURS[i % 6], linewidth=1, label=size)
            if law is not None:
                smooth = np.linspace(0, max(shares), 100)
                left.plot(100 * smooth, law.loss(sizes[0], smooth), color=COLOURS[i % 6], linewidth=1.2)
        right.set_xscale("log")
        left.set_xlabel("realised sparsity (%)")
        right.set_xlabel("active weights")
        for one in (left, right):
            one.set_ylabel("held-out loss (nats a token)")
            one.grid(axis="y")
            one.legend(fontsize=9)
        left.set_title("L(N, S)" if law is None else "L(N, S); lines: the fitted law")

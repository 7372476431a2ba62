"""Plans, models and measurements as rich tables, and the figures behind them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.box import ROUNDED, SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from teal_jax.config import PROJECTIONS, SITES, ModelConfig
from teal_jax.quantization.storage import stored_bytes
from teal_jax.sparsity.plan import SparsityPlan

if TYPE_CHECKING:
    from teal_jax.sparsity.statistics import Calibration


class Quality(NamedTuple):
    """One row of a quality table: a method at a target, what was counted, and the perplexity (dense: target 0)."""

    method: str
    target: float
    realised: float
    ppl: float


def percent(share: float) -> str:
    """0.4 as `40.0 %`."""
    return f"{100 * share:.1f} %"


def size(num_bytes: float) -> str:
    """Bytes for people, decimal units: `14.5 GB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def decode_bytes(
    config: ModelConfig, itemsize: int, sparsity: float = 0.0, formats: dict[str, str] | None = None
) -> int:
    """Bytes of weights that one decoded token reads: `(1 - sparsity)` of the blocks, and the whole lm_head.

    `formats` of quantised weights by place, as an artifact has them.
    """
    blocks, head, _ = stored_bytes(config, itemsize, formats or {})
    return round((1 - sparsity) * blocks) + head


def model_facts(
    config: ModelConfig, itemsize: int, dtype: str, formats: dict[str, str] | None = None
) -> dict[str, Any]:
    """Sizes of a model, JSON-ready; `formats` as in `decode_bytes`."""
    kinds = "+".join(sorted(set((formats or {}).values())))
    return {
        "model_type": config.model_type,
        "parameters": config.num_params,
        "layers": config.num_layers,
        "d_model": config.d_model,
        "d_mlp": config.d_mlp,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position": config.max_position,
        "sliding_window": config.sliding_window,
        "tied_embeddings": config.tie_embeddings,
        "dtype": f"{dtype}, {kinds}" if kinds else dtype,
        "weight_bytes": stored_bytes(config, itemsize, formats or {})[2],
        "bytes_per_token_dense": decode_bytes(config, itemsize, formats=formats),
        "fingerprint": config.fingerprint,
    }


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values, bytes made readable and what is None left out."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is None:
            continue
        if "bytes" in name:
            value = size(value)
        elif isinstance(value, float):
            value = percent(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value))
    return table


def quality_table(rows: Sequence[Quality], title: str = "") -> Table:
    """Perplexity by method and target, target and realised sparsity side by side, against the dense row if any."""
    dense = next((row.ppl for row in rows if row.target == 0), None)
    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("method", "target", "realised", "perplexity", "vs dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for i, row in enumerate(rows):
        ratio = "" if dense is None else f"x {row.ppl / dense:.3f}"
        sparse = row.target > 0
        last = i + 1 < len(rows) and rows[i + 1].target != row.target
        table.add_row(
            row.method,
            percent(row.target) if sparse else "-",
            percent(row.realised) if sparse else "-",
            f"{row.ppl:,.3f}",
            ratio if sparse else "",
            style="bold" if row.method == "greedy" else None,
            end_section=last,
        )
    return table


def plan_line(plan: SparsityPlan) -> str:
    """A plan in one line."""
    return f"{plan.method}, target {percent(plan.target)}, model sparsity {percent(plan.model_sparsity)}"


def plan_table(plan: SparsityPlan) -> Table:
    """Sparsity in percent by layer and projection, with the size-weighted mean of each layer and of each projection."""
    table = Table(
        title=f"Sparsity of {plan.model}, % of input channels",
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        show_footer=True,
    )
    table.add_column("layer", "all", justify="right")
    for name, mean in zip(PROJECTIONS, plan.sparsity.mean(axis=0), strict=True):
        table.add_column(name, f"{100 * mean:.1f}", justify="right")
    table.add_column("mean", f"{100 * plan.model_sparsity:.1f}", justify="right", style="bold")
    means = np.average(plan.sparsity, axis=1, weights=plan.projection_sizes)
    for layer, (row, mean) in enumerate(zip(plan.sparsity, means, strict=True)):
        table.add_row(str(layer), *(_shade(value) for value in row), f"{100 * mean:.1f}")
    return table


def calibration_table(calibration: "Calibration", sparsity: float) -> Table:
    """The threshold of each layer and site that drops the share `sparsity`."""
    thresholds = calibration.thresholds(sparsity)
    table = Table(title=f"Thresholds at {percent(sparsity)}", box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("layer", justify="right")
    for site in SITES:
        table.add_column(site, justify="right")
    for layer, row in enumerate(thresholds):
        # q, o, gate and down: one projection of each site.
        table.add_row(str(layer), *(f"{row[i]:.4g}" for i in (0, 3, 4, 6)))
    return table


def _shade(share: float) -> Text:
    colours = ("blue", "cyan", "green", "yellow", "red")
    return Text(f"{100 * share:.1f}", style=colours[min(int(share * 5), 4)])


class Columns:
    """Two or more texts growing side by side; a rich renderable that is drawn anew after `add`."""

    def __init__(self, prompt: str, names: Sequence[str]):
        self._prompt, self._names = prompt, names
        self._texts = ["" for _ in names]
        self._states = ["compiling" for _ in names]

    def add(self, i: int, text: str, tokens_per_second: float, finished: str | None) -> None:
        """`text` is new in column i."""
        self._texts[i] += text
        self._states[i] = f"{tokens_per_second:,.0f} tok/s" if tokens_per_second else "..."

    def __rich__(self) -> Table:
        grid = Table.grid(expand=True, padding=(0, 1))
        panels = []
        for name, text, state in zip(self._names, self._texts, self._states, strict=True):
            grid.add_column(ratio=1)
            body = Text.assemble((self._prompt, "dim"), text)
            panels.append(Panel(body, title=Text(name, style="bold"), subtitle=state, title_align="left", box=ROUNDED))
        grid.add_row(*panels)
        return grid

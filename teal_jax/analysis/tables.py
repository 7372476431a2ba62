"""The analyses as tables for the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from teal_jax.analysis.batch import RULES as BATCH_RULES
from teal_jax.analysis.batch import BatchRow
from teal_jax.analysis.cost import Cost
from teal_jax.analysis.distribution import THIRDS, Distribution, shown_target
from teal_jax.analysis.prefill import PrefillRow
from teal_jax.analysis.run import Analysis
from teal_jax.analysis.up import MEASURES, UpRow
from teal_jax.analysis.up import RULES as UP_RULES
from teal_jax.config import PROJECTIONS
from teal_jax.tables import percent

COST = ("ppl", "excess nats")


def tables(analysis: Analysis) -> list[RenderableType]:
    """Whatever the analysis holds, with the words that explain it."""
    shown: list[RenderableType] = []
    if analysis.up:
        shown += [up_table(analysis.up), *_legend(UP_RULES)]
        shown += ["up, hidden, mlp: relative error there, mean over layers; weights: of all blocks, not needed"]
    if analysis.distribution:
        shown += [distribution_table(analysis.distribution)]
        shown += [depth_table(analysis.distribution)]
        for row in analysis.distribution:
            if row.uniform_blocks:
                where = ", ".join(map(str, row.uniform_blocks))
                shown.append(f"{row.model} at {_target(row.target)}: uniform had less error in blocks {where}")
    if analysis.prefill:
        shown += [prefill_table(analysis.prefill), _attention_line(analysis)]
    if analysis.batch:
        shown += [batch_table(analysis.batch), *_legend(BATCH_RULES)]
        shown += ["fitted: thresholds chosen for this rule and batch size on the calibration text"]
    about = analysis.setting
    shown.append("excess nats: negative log-likelihood above dense, ± its standard error over rows")
    shown.append(
        f"{analysis.model}, dense perplexity {analysis.dense_ppl:,.3f}; {about['scored_tokens']:,} tokens of "
        f"{about['data']} scored, after prompts of {about['prompt']} in rows of {about['seq_len']}"
    )
    return shown


def up_table(rows: Sequence[UpRow]) -> Table:
    """Input against output of up."""
    table = _table("Thinning up by its input and by its output", "target", "rule", "up", "down", *MEASURES, "weights")
    for row in rows:
        errors = [f"{np.mean(row.error[name]):.3f}" if row.error else "" for name in MEASURES]
        counted = [percent(share) if share else "-" for share in (row.up, row.down)]
        weights = percent(row.cost.realised_sparsity)
        table.add_row(_target(row.target), row.rule, *counted, *errors, weights, *_cost(row.cost))
    return _sections(table, [row.target for row in rows])


def distribution_table(rows: Sequence[Distribution]) -> Table:
    """Mean over layers of every projection, ours in bold."""
    rows = sorted(rows, key=lambda row: (row.target, row.published))
    table = _table("Greedy sparsities, mean over layers, %", "target", "model", *PROJECTIONS, cost=False)
    for row in rows:
        cells = [f"{100 * share:.1f}" for share in row.by_projection]
        table.add_row(_target(row.target), row.model, *cells, style=None if row.published else "bold")
    return _sections(table, [row.target for row in rows])


def depth_table(rows: Sequence[Distribution]) -> Table:
    """The same by thirds of the depth, at the target nearest to 50 %."""
    target = shown_target(rows)
    rows = [row for row in rows if row.target == target]
    title = f"Greedy sparsities by depth at {_target(target)}, %"
    table = _table(title, "layers", "model", *PROJECTIONS, cost=False)
    for third, name in enumerate(THIRDS):
        for row in rows:
            cells = ["-" if np.isnan(share) else f"{100 * share:.1f}" for share in row.by_depth[third]]
            table.add_row(name, row.model, *cells, style=None if row.published else "bold")
    return _sections(table, [name for name in THIRDS for _ in rows])


def prefill_table(rows: Sequence[PrefillRow]) -> Table:
    """Which tokens are thinned."""
    table = _table(
        "Sparse prefill: what follows the prompt is scored", "target", "thinned tokens", "of all", "realised"
    )
    for row in rows:
        shares = (percent(row.thinned), percent(row.cost.realised_sparsity))
        table.add_row(_target(row.target), row.policy, *shares, *_cost(row.cost))
    return _sections(table, [row.target for row in rows])


def batch_table(rows: Sequence[BatchRow]) -> Table:
    """Rules and batch sizes."""
    table = _table("Batched decoding", "target", "rule", "batch", "survives", "if independent")
    for row in rows:
        rule = "any" if row.batch == 1 else f"{row.rule}, fitted" if row.fitted else row.rule
        independent = "" if row.fitted or row.rule == "mean" else percent(row.independent)
        survives = percent(row.cost.realised_sparsity)
        table.add_row(_target(row.target), rule, str(row.batch), survives, independent, *_cost(row.cost))
    return _sections(table, [(row.target, row.rule, row.fitted) for row in rows])


def _target(share: float) -> str:
    return f"{100 * share:g} %"


def _table(title: str, *columns: str, cost: bool = True) -> Table:
    # Narrow enough for a log of 100 columns.
    style: Any = {"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}
    table = Table(title=title, pad_edge=False, padding=(0, 0, 0, 1), **style)
    for column in (*columns, *(COST if cost else ())):
        text = column in ("rule", "model", "thinned tokens", "layers")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _sections(table: Table, keys: Sequence[object]) -> Table:
    for i in range(len(keys) - 1):
        table.rows[i].end_section = keys[i] != keys[i + 1]
    return table


def _cost(cost: Cost) -> tuple[str, str]:
    error = "" if cost.standard_error is None else f" ± {cost.standard_error:.3f}"
    return f"{cost.ppl:,.3f}", f"{cost.excess:+.3f}{error}"


def _legend(rules: dict[str, str]) -> Iterable[str]:
    return (f"{name}: {meaning}" for name, meaning in rules.items())


def _attention_line(analysis: Analysis) -> str:
    seq, prompt = analysis.setting["seq_len"], analysis.setting["prompt"]
    even = np.mean(1 / np.arange(prompt + 1, seq + 1))
    shares = ", ".join(percent(share) for share in analysis.first_token_attention)
    return f"dense attention to the first token, by layer: {shares}; spread evenly it would be {percent(even)}"

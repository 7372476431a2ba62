"""The rows of a report as a table: the same columns on a terminal and on the page."""

from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from teal_jax.evaluation.report import EvaluationReport
from teal_jax.tables import percent, size

_FIRST_TO_GO = ("(sampled)", "bits/byte", "repeats", "x dense", "read", "top-1")


class Column(NamedTuple):
    """A heading, what it means, and by row the value and its interval; "" where there is none."""

    heading: str
    meaning: str
    cells: list[tuple[str, str]]


def method_name(row: dict[str, Any]) -> str:
    """`"greedy 40 %"`, `"dense"`."""
    return row["method"] if row["target"] == 0 else f"{row['method']} {100 * row['target']:g} %"


def columns_of(report: EvaluationReport) -> list[Column]:
    """The columns after method and target; those that nothing was measured for are left out."""
    rows, n = report.rows, report.settings["ngram"]
    sparse = lambda row, text: text if row["target"] > 0 else ""  # noqa: E731
    found = [
        Column(
            "realised",
            "model sparsity counted on the scored tokens; ! where it is not the target's, within "
            f"{100 * report.settings['tolerance']:g} points",
            [(sparse(r, percent(r["realised"]) + ("" if r["reached"] else " !")), "") for r in rows],
        ),
        Column(
            "ppl", "perplexity of the text", [(f"{r['ppl']:,.3f}", _span(r["ppl_interval"], "{:,.2f}")) for r in rows]
        ),
        Column(
            "x dense",
            "perplexity over the dense model's, paired",
            [(sparse(r, f"{r['ratio']:,.3f}"), sparse(r, _span(r["ratio_interval"], "{:,.2f}"))) for r in rows],
        ),
    ]
    if rows[0]["bits_per_byte"] is not None:
        cells = [(f"{r['bits_per_byte']:.3f}", _span(r["bits_per_byte_interval"], "{:.3f}")) for r in rows]
        found.append(Column("bits/byte", "bits of all scored tokens over the bytes of their text", cells))
    cells = [(sparse(r, f"{r['kl']:.4f}"), sparse(r, _span(r["kl_interval"], "{:.3f}"))) for r in rows]
    found.append(Column("KL", "KL(dense || sparse), nats a token", cells))
    if rows[0]["agreement"] is not None:
        cells = [(sparse(r, _share(r["agreement"])), sparse(r, _shares(r["agreement_interval"]))) for r in rows]
        found.append(Column("top-1", "% of the dense model's own tokens that this one ranks first, too", cells))
    for kind in rows[0]["repetition"]:
        pairs = [(r["repetition"].get(kind), r["repetition_intervals"].get(kind)) for r in rows]
        cells = [(_share(value), _shares(interval)) for value, interval in pairs]
        heading = "repeats" if kind == "greedy" else f"({kind})"
        found.append(Column(heading, f"% of {n}-grams that occurred before in generated text, {kind}", cells))
    cells = [(size(r["weight_bytes"]), sparse(r, f"{100 * r['weight_bytes_share']:.0f} %")) for r in rows]
    meaning = f"bytes of {report.facts['dtype']} weights that one token reads, the dense lm_head included; of dense's"
    return [*found, Column("read", meaning, cells)]


def versus_columns(report: EvaluationReport) -> list[tuple[str, str, str, str]]:
    """Per comparison: method, target, difference in log perplexity, and share of the excess; with intervals."""
    found = []
    for pair in report.comparisons:
        span = _span(pair["difference_interval"], "{:+.3f}")
        ratio, spread = pair["excess_ratio"], _span(pair["excess_ratio_interval"], "{:.2f}")
        found.append(
            (
                f"{pair['method']} against {pair['against']}",
                f"{100 * pair['target']:g} %",
                f"{pair['difference']:+.4f} {span}".strip(),
                "" if ratio is None else f"{ratio:.3f} {spread}".strip(),
            )
        )
    return found


def evaluation_table(report: EvaluationReport, *, title: str = "", width: int = 100) -> Table:
    """The report on a terminal of `width` letters; columns that do not fit are left to the page, the last first."""
    rows = report.rows
    texts = {column.heading: [_joined(column, i) for i in range(len(rows))] for column in columns_of(report)}
    texts = {
        "method": [row["method"] for row in rows],
        "target": ["" if row["target"] == 0 else f"{100 * row['target']:g} %" for row in rows],
        **texts,
    }
    for heading in _FIRST_TO_GO:
        if sum(2 + max(map(len, [name, *cells])) for name, cells in texts.items()) <= width:
            break
        texts.pop(heading, None)
    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for heading in texts:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        last = i + 1 < len(rows) and rows[i + 1]["target"] != row["target"]
        table.add_row(*(cells[i] for cells in texts.values()), end_section=last)
    return table


def _joined(column: Column, i: int) -> str:
    value, interval = column.cells[i]
    return f"{value} {interval}" if column.heading == "ppl" and interval else value


def _span(interval: Any, form: str) -> str:
    return "" if interval is None else f"[{form.format(interval[0])}, {form.format(interval[1])}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _shares(interval: Any) -> str:
    return "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

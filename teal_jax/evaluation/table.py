"""The rows of a report as a table: the same columns on a terminal and on the page."""

from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from teal_jax.evaluation.report import EvaluationReport
from teal_jax.tables import percent, size

_FIRST_TO_GO = ("(sampled)", "bits/byte", "repeats", "x dense", "read", "top-1")


_OWN_MATRICES = 0.001
"""Difference between realised and unread that is worth a column; below is rounding."""


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
            "model sparsity counted on the scored tokens; ! where what is left unread is not the target's, within "
            f"{100 * report.settings['tolerance']:g} points",
            [(sparse(r, percent(r["realised"]) + ("" if r["reached"] else " !")), "") for r in rows],
        ),
        Column("ppl", "perplexity of the text", [(_number(r["ppl"]), _span(r["ppl_interval"])) for r in rows]),
        Column(
            "x dense",
            "perplexity over the dense model's, paired",
            [(sparse(r, _number(r["ratio"])), sparse(r, _span(r["ratio_interval"]))) for r in rows],
        ),
    ]
    if any(abs(row["unread"] - row["realised"]) > _OWN_MATRICES for row in rows):
        meaning = "share of the block weights left unread: realised, less what a method's own matrices read"
        found.insert(1, Column("unread", meaning, [(sparse(r, percent(r["unread"])), "") for r in rows]))
    if rows[0]["bits_per_byte"] is not None:
        cells = [(_number(r["bits_per_byte"]), _span(r["bits_per_byte_interval"])) for r in rows]
        found.append(Column("bits/byte", "bits of all scored tokens over the bytes of their text", cells))
    cells = [(sparse(r, _number(r["kl"])), sparse(r, _span(r["kl_interval"]))) for r in rows]
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


class Against(NamedTuple):
    """Every other method against one: by method and target, the share of its loss that is left, and the difference.

    `cells` by method, one a target: the share of the excess, the difference in log perplexity, whether it is the
    least share of its target; None where nothing was compared.
    """

    method: str
    targets: list[float]
    cells: dict[str, list[tuple[str, str, bool] | None]]


def against_one(report: EvaluationReport) -> Against | None:
    """The comparisons as a matrix; None where there are none."""
    if not report.comparisons:
        return None
    pairs = {(pair["method"], pair["target"]): pair for pair in report.comparisons}
    methods = list(dict.fromkeys(method for method, _ in pairs))
    targets = sorted({target for _, target in pairs})
    # The other method's own share is 1.
    least = {t: min([1.0, *(_excess(pairs, m, t) for m in methods)]) for t in targets}

    def cell(method: str, target: float) -> tuple[str, str, bool] | None:
        pair = pairs.get((method, target))
        if pair is None:
            return None
        ratio, interval = pair["excess_ratio"], pair["excess_ratio_interval"]
        span = "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"
        share = "" if ratio is None else f"{ratio:.2f} {span}".strip()
        difference = f"{_number(pair['difference'], '+')} {_span(pair['difference_interval'], '+')}".strip()
        return share, difference, ratio is not None and ratio == least[target]

    cells = {method: [cell(method, target) for target in targets] for method in methods}
    return Against(report.comparisons[0]["against"], targets, cells)


def _excess(pairs: dict[tuple[str, float], dict[str, Any]], method: str, target: float) -> float:
    ratio = pairs.get((method, target), {}).get("excess_ratio")
    return float("inf") if ratio is None else ratio


def against_table(report: EvaluationReport) -> Table | None:
    """`against_one` on a terminal."""
    found = against_one(report)
    if found is None:
        return None
    table = Table(
        title=f"Loss as a share of {found.method}'s",
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for target in found.targets:
        table.add_column(f"{100 * target:g} %", justify="right", no_wrap=True)
    for method, cells in found.cells.items():
        shown = [cell or ("", "", False) for cell in cells]
        table.add_row(method, *(Text(share, style="bold" if best else "") for share, _, best in shown))
    return table


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
        if sum(3 + max(map(len, [name, *cells])) for name, cells in texts.items()) <= width:
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


def _number(value: float, sign: str = "") -> str:
    """Three decimals below 10, fewer above; `sign` "+" shows it on positive numbers, too."""
    decimals = next((d for d, limit in ((3, 10), (2, 100), (1, 1000)) if abs(value) < limit), 0)
    return f"{value:{sign},.{decimals}f}"


def _span(interval: Any, sign: str = "") -> str:
    return "" if interval is None else f"[{_number(interval[0], sign)}, {_number(interval[1], sign)}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _shares(interval: Any) -> str:
    return "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

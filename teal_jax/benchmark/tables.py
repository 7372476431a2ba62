"""Rows as tables, for the terminal and for markdown, from one list of columns."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from teal_jax.benchmark.rows import DecodeRow, KernelRow
from teal_jax.tables import percent, size

type Columns = dict[str, Callable[[Any], str]]
"""By header, the cell of a row. The first column is text, the others are numbers."""


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


DECODE: Columns = {
    "": lambda r: r.name,
    "tok/s": lambda r: _number(r.tokens_per_second, 1),
    "ms/token": lambda r: _number(r.ms_per_token, 3),
    "realised": lambda r: _share(r.realised),
    "read": lambda r: "-" if r.bytes_per_token is None else size(r.bytes_per_token),
    "bandwidth": lambda r: _share(r.bandwidth_share),
    "kernels": lambda r: _number(r.kernels_per_token, 0),
    "kernel ms": lambda r: _number(r.kernel_ms, 3),
    "memory": lambda r: "-" if r.memory_bytes is None else size(r.memory_bytes),
    "first s": lambda r: _number(r.first_token_s, 1),
}

DECODE_LEGEND = (
    "read: bytes of weights and kv_cache a token; bandwidth: their rate over the measured read bandwidth; "
    "kernels: launches a token; kernel ms: their device time a token; memory: of the compiled loop with its weights; "
    "first s: until the first token, compiling included in the first row of each program"
)

KERNELS_LEGEND = "us: device time of a call; needs: bytes of it; ratio: us over the time those bytes take"

KERNELS: Columns = {
    "": lambda r: r.kernel,
    "path": lambda r: r.path,
    "us": lambda r: _number(r.microseconds, 2),
    "needs": lambda r: size(r.bytes),
    "us at bandwidth": lambda r: _number(r.limit_us, 2),
    "ratio": lambda r: _number(r.ratio, 2),
}


def line(row: DecodeRow | KernelRow) -> str:
    """A row as one line, for the log while the others are measured."""
    columns = DECODE if isinstance(row, DecodeRow) else KERNELS
    cells = [f"{header} {cell(row)}".strip() for header, cell in columns.items() if cell(row) != "-"]
    return ", ".join([*cells, row.note] if row.note else cells)


def notes(rows: Sequence[DecodeRow | KernelRow]) -> list[str]:
    """What is to be said under the table."""
    return [f"{row.name if isinstance(row, DecodeRow) else row.kernel}: {row.note}" for row in rows if row.note]


def rich_table(rows: Sequence[Any], columns: Columns, title: str) -> Table:
    """For the terminal."""
    style: Any = {"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "collapse_padding": True}
    table = Table(title=title, pad_edge=False, **style)
    for i, header in enumerate(columns):
        table.add_column(header, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def markdown_table(rows: Sequence[Any], columns: Columns) -> str:
    """For a file."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[cell(row).replace("|", "\\|") for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"

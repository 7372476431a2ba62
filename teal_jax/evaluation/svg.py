"""Figures as inline SVG whose colours are the page's: text, grid and lines follow its light or dark mode."""

import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from teal_jax.plots import COLOURS, STYLE

INK, FAINT, GRID = "#010203", "#040506", "#070809"
"""Stand for the page's colours until the SVG is written."""

SERIES = (*COLOURS, "#882255", "#999933")
"""Of methods; the page may lighten them."""

GLYPHS = "●■◆▲▼✚"
"""What `teal_jax.plots.MARKERS` look like in text."""

_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}
_OWN: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "teal",  # the same figure, the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlepad": 8,
    "axes.titleweight": "bold",
    "axes.facecolor": "none",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "lines.markersize": 5,
    "lines.linewidth": 1.8,
}


class Drawing:
    """Axes to draw on, and `svg` once they have been drawn."""

    def __init__(self, axes: Any):
        self.axes = axes
        self.svg = ""


@contextmanager
def drawing(
    name: str, label: str, width: float, height: float, *, columns: int = 1, share_y: bool = False
) -> Generator[Drawing]:
    """A figure of `columns` axes side by side, in inches; `.axes` is an array of them, `[columns]`.

    `name` is unique on the page and goes before every id; `label` is read to those who cannot see.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = STYLE | _OWN
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        drawn = Drawing(figure.subplots(1, columns, squeeze=False, sharey=share_y)[0])
        yield drawn
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn.svg = _inline(file.getvalue(), name, label)


def _inline(text: str, name: str, label: str) -> str:
    """The `<svg>` element of a document, its ids unique, its colours variables, its size the page's."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = re.sub(colour, f"var({variable})", text, flags=re.IGNORECASE)
    # matplotlib names fonts and sets a style for the whole page; the page has its own.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"(font: [^;\"']*)'[^;\"]*", r"\1var(--font)", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    said = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head, _, rest = text.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None, "matplotlib writes one"
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" aria-label="{said}">{rest}'

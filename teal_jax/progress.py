"""Progress bars, on stderr so that stdout stays for results."""

from collections.abc import Iterable, Iterator, Sized

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)
"""Where progress and notes go."""


class Bar:
    """One progress bar: `start(description, total)`, then `advance(n)`; also a context manager.

    The converters draw on this small protocol without knowing rich. Nothing is drawn when not `enabled`.
    """

    def __init__(self, *, enabled: bool = True):
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled,
        )
        self._task = None

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def start(self, description: str, total: int | None) -> None:
        """Name the work and its number of steps; a second call starts another line."""
        self._task = self._progress.add_task(description, total=total)

    def advance(self, n: int = 1, *, description: str | None = None) -> None:
        """`n` more steps are done."""
        assert self._task is not None, "start the bar first"
        self._progress.update(self._task, advance=n, description=description)


def track[T](items: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """The items of `items`, one by one, with a bar over them."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(enabled=enabled) as bar:
        bar.start(description, total)
        for item in items:
            yield item
            bar.advance()

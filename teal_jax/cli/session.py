"""What surrounds every command: where results and notes go, and what an error becomes."""

import json
import os
import sys
import traceback
import warnings
from types import TracebackType
from typing import Any

import typer
from rich.console import Console, RenderableType

from teal_jax import progress
from teal_jax.errors import TealError

USAGE, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 3, 130, 141
"""Exit codes; 0 is success and 1 a bug of ours."""

_LOG_WIDTH = 100


class _Console(Console):
    """A console that leaves a closed pipe to the session; rich's own would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Raise again: rich calls this from its except block."""
        raise


class Session:
    """Context of a command: results on stdout, everything else on stderr, errors as a line, a hint and an exit code.

    Attributes:
      progress: whether to draw progress bars.
      as_json: the result is one JSON object.
      offline: nothing may be fetched.
      stdout: for results.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, debug: bool = False, offline: bool = False):
        self.progress = not quiet
        self.as_json = as_json
        self.offline = offline
        # A pipe has no width; rich would take 80 columns, which folds our tables.
        wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH
        self.stdout = _Console(width=wide, highlight=False)
        self._debug = debug
        self._catcher = warnings.catch_warnings()
        if offline:
            # Also for calibration text; the hub library reads it once, on import.
            os.environ["HF_HUB_OFFLINE"] = "1"

    def note(self, text: str, *, asked: bool = False) -> None:
        """A line on stderr; when quiet, only if it was `asked` for."""
        if self.progress or asked:
            _line(text)

    def result(self, values: dict[str, Any], *shown: RenderableType) -> None:
        """The result: `values` under --json, else what is `shown`."""
        if self.as_json:
            print(json.dumps(values, indent=1, ensure_ascii=False, default=_plain))
            return
        for item in shown:
            self.stdout.print(item, soft_wrap=isinstance(item, str), markup=False)

    def __enter__(self) -> "Session":
        self._catcher.__enter__()
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = self._show_warning  # ty: ignore[invalid-assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._catcher.__exit__(kind, error, trace)
        if error is None:
            try:
                sys.stdout.flush()
            except BrokenPipeError as broken:
                error = broken
        if error is None or isinstance(error, (typer.Exit, typer.Abort, typer.BadParameter)):
            return
        code = _exit_code(error)
        if code is None:
            return
        if self._debug and code != PIPE_CLOSED:
            traceback.print_exception(error)
        if code in (USAGE, FAILED):
            _report(error)
        if code == PIPE_CLOSED:
            # Python would complain again as it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(code) from error

    def _show_warning(self, message: Warning | str, category: type[Warning], *where: Any) -> None:
        if self.progress and issubclass(category, UserWarning):
            _line(f"warning: {' '.join(str(message).split())}", "yellow")


def _exit_code(error: BaseException) -> int | None:
    """The exit code that an error means; None for a bug, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if isinstance(error, (TealError, OSError)) or _out_of_memory(error):
        return FAILED
    # An argument that this library refused; a ValueError from deeper down would be a bug of ours.
    return USAGE if isinstance(error, ValueError) and _raised_here(error) else None


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("teal_jax.")


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _report(error: BaseException) -> None:
    message, hint = str(error), ""
    if isinstance(error, TealError):
        message, hint = error.message, error.hint
    elif _out_of_memory(error):
        message, hint = "out of memory", "try --dtype bfloat16, fewer tokens, or a smaller model (see teal doctor)"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    _line(f"error: {' '.join(message.split())}", "red")
    if hint:
        _line(f"hint: {' '.join(hint.split())}", "cyan")


def _line(text: str, colour: str = "") -> None:
    # The console of the bars, which then stay below the line. Soft: one line stays one line in a log.
    progress.console.print(text, style=colour, soft_wrap=True, markup=False, highlight=False)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)

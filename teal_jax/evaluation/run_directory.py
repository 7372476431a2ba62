"""The directory of a sweep: each cell is written, whole, as it is measured; the same command goes on where it ended."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.errors import ArtifactError
from teal_jax.evaluation.cell import Cell
from teal_jax.model import LanguageModel

_CONFIGURATION = "configuration.json"
_SHOWN = 3
"""Differences that a refusal names."""
_BRIEF = 60
"""Characters that it shows of a value."""


class RunDirectory:
    """Cells of one configuration: all that makes them comparable, but not which methods and targets there are."""

    def __init__(self, path: Path, configuration: dict[str, Any]):
        """Take over `path`, which is made when there is something to keep in it.

        Raises:
          ArtifactError: it holds another configuration's cells, or something that is not a sweep.
        """
        self.path = path
        # As JSON has it, so that what is read back compares equal.
        self.configuration = json.loads(json.dumps(configuration))
        file = path / _CONFIGURATION
        if file.exists():
            self._check(read_json(file))
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ArtifactError(f"{path} is not the directory of a sweep: it will not be written to", hint="--out DIR")

    def begin(self) -> None:
        """Make it this configuration's: from now on another one is refused."""
        file = self.path / _CONFIGURATION
        if not file.exists():
            write_json(file, self.configuration)

    def _check(self, there: Any) -> None:
        found = list(differences(there, self.configuration))
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ArtifactError(
                f"{self.path} holds a sweep with another configuration: {'; '.join(found[:_SHOWN])}{more}",
                hint="repeat that command to go on with it, or name another directory with --out",
            )

    @property
    def empty(self) -> bool:
        """Whether no cell has been measured."""
        return not any((self.path / "cells").glob("*.json"))

    def cell(self, method: str, target: float) -> Cell | None:
        """The cell, if it has been measured; a file that is not one counts as not measured."""
        try:
            return Cell(**json.loads(self._file(method, target).read_text("utf-8")))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None

    def keep(self, cell: Cell) -> Path:
        """Write a measured cell; returns its path."""
        self.begin()
        return write_json(self._file(cell.method, cell.target), cell.to_dict())

    def _file(self, method: str, target: float) -> Path:
        return self.path / "cells" / f"{re.sub(r'[^A-Za-z0-9_+-]', '_', method)}-{target:g}.json"


def write_json(path: Path, value: Any) -> Path:
    """`value` as JSON at `path`, never half-written; returns the path.

    Raises:
      ArtifactError: it cannot be written.
    """
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(value, ensure_ascii=False) + "\n", "utf-8")
        aside.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}", hint="--out DIR names another place") from error
    return path


def read_json(path: Path) -> Any:
    """The value at `path`; raises `ArtifactError` where it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no file at {path}") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error


def weights_digest(lm: LanguageModel) -> str:
    """16 hex digits over the first values of every weight: another checkpoint of the same shape differs in them."""
    import jax

    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params["weights"]):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(leaf[:1]).tobytes())
    return found.hexdigest()[:16]


def digest(value: Any) -> str:
    """8 hex digits over JSON-ready values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:8]


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def differences(there: Any, here: Any, name: str = "") -> Any:
    """`name: there / here` of every value that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield f"{name} was {_brief(there)}, is {_brief(here)}"


def _brief(value: Any) -> str:
    # A whole plan, where the other side has none, would bury the sentence.
    text = repr(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."

"""What a benchmark leaves behind: rows with what they were measured on, as JSON and markdown."""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from teal_jax import __version__
from teal_jax.benchmark.rows import DecodeRow, KernelRow
from teal_jax.benchmark.tables import DECODE_LEGEND, KERNELS_LEGEND, Columns, markdown_table, notes

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One run of one benchmark.

    Attributes:
      benchmark: `"decode"` or `"kernels"`. shape: name of the sizes.
      command: that makes it again.
      setting: what was run: sizes, dtype, context.
      measured: what holds for the run as a whole: bandwidth, peak memory.
      hardware, versions, commit, date: what it was measured on.
      rows: of the table.
    """

    benchmark: str
    shape: str
    command: str
    setting: dict[str, Any]
    measured: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    date: str
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, rows: list[Any], **fields: Any) -> "Report":
        """The report of `rows`, measured now, by this code."""
        values = [dataclasses.asdict(row) for row in rows]
        return cls(rows=values, versions=versions(), commit=commit(), date=_now(), **fields)

    def row_objects(self) -> list[Any]:
        """The rows as `DecodeRow` or `KernelRow`."""
        kind = DecodeRow if self.benchmark == "decode" else KernelRow
        return [kind(**row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """What `write` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, folder: Path, columns: Columns) -> list[Path]:
        """`benchmark-shape.json` and `.md` in `folder`; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{self.benchmark}-{self.shape}"
        paths = [Path(f"{stem}.json"), Path(f"{stem}.md")]
        texts = (json.dumps(self.to_dict(), indent=1) + "\n", self.markdown(columns))
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, "utf-8")
        return paths

    def markdown(self, columns: Columns) -> str:
        """The table, and under it what it was measured on."""
        rows = self.row_objects()
        facts = [
            *notes(rows),
            DECODE_LEGEND if self.benchmark == "decode" else KERNELS_LEGEND,
            f"`{self.command}`",
            ", ".join(f"{key} {value}" for key, value in self.setting.items()),
            ", ".join(f"{key}: {value}" for key, value in shown(self.measured).items()),
            f"{self.hardware.get('gpu')}, driver {self.hardware.get('driver') or 'unknown'}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"commit {self.commit or 'unknown'}, {self.date}",
        ]
        said = "".join(f"- {fact}\n" for fact in facts if fact)
        return f"# {self.benchmark}, {self.shape}\n\n{markdown_table(rows, columns)}\n{said}"


def shown(measured: dict[str, Any]) -> dict[str, str]:
    """Measurements of the whole run, for people."""
    texts = {}
    for key, value in measured.items():
        if value is None:
            continue
        if key.endswith("bytes_per_second"):
            texts["read bandwidth"] = f"{value / 1e12:.2f} TB/s"
        elif key.endswith("_bytes"):
            texts[key.removesuffix("_bytes").replace("_", " ")] = f"{value / 1e9:.1f} GB"
        else:
            texts[key.replace("_", " ")] = f"{value:.1f}" if isinstance(value, float) else str(value)
    return texts


def versions() -> dict[str, str]:
    """Of python, this library and what it runs on."""
    found = {"python": platform.python_version(), "teal_jax": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The device that jax uses, for people."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def commit() -> str | None:
    """The commit of this checkout, `-dirty` where it was changed since; TEAL_COMMIT says it where git cannot."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return run.stdout.strip() or None

    # An installed copy may lie inside the checkout of something else.
    if git("ls-files", "__init__.py") is None:
        return os.environ.get("TEAL_COMMIT")
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

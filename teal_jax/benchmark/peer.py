"""The peer's row: transformers in a process of its own, whose memory is free again when it ends."""

import contextlib
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from converters import config_to_hf
from teal_jax.benchmark.rows import DecodeRow
from teal_jax.benchmark.traffic import token_bytes
from teal_jax.config import ModelConfig

COMMAND = (sys.executable, "-P", "-m", "teal_jax.benchmark.transformers_peer")
NAME = "transformers"

CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
)
"""Of an HF config, what a Llama of the same cost needs."""


def peer_row(
    config: ModelConfig,
    dtype: str,
    lengths: range,
    repeats: int,
    bandwidth: float,
    *,
    seconds: float = 180.0,
    command: Sequence[str] = COMMAND,
) -> DecodeRow:
    """The fastest mode of the peer; a row with a note where it is not installed, failed, or found no time.

    Args:
      config: its sizes are the peer's; a sliding window is not, the context lies within it.
      dtype: name of the weights' dtype.
      lengths: tokens in the cache before each decoded one.
      repeats: timed runs, the best counts.
      bandwidth: measured, bytes a second.
      seconds: that the process may take.
      command: the process.
    """
    if command is COMMAND:
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            return DecodeRow(name=NAME, note=f"not run: {', '.join(missing)} not installed")
    found, problems = [], []
    for line in _lines(command, json.dumps(sizes(config, dtype, lengths, repeats)), seconds, problems):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if not isinstance(values, dict):
            continue
        if "error" in values:
            problems.append(f"{values.get('mode', 'it')} failed: {public(values['error'])}")
        else:
            found.append(values)
    if not found:
        return DecodeRow(name=NAME, note="; ".join(problems) or "it printed nothing")
    best = min(found, key=lambda values: values["seconds_per_token"])
    versions = ", ".join(f"{name} {version}" for name, version in best["versions"].items())
    read = token_bytes(config, 4 if dtype == "float32" else 2, 0.0, lengths)
    return DecodeRow(
        name=f"{NAME}, {best['mode']}",
        realised=0.0,
        tokens_per_second=1 / best["seconds_per_token"],
        ms_per_token=1e3 * best["seconds_per_token"],
        bytes_per_token=read,
        bandwidth_share=read / best["seconds_per_token"] / bandwidth,
        memory_bytes=best["memory_bytes"],
        first_token_s=best["first_token_s"],
        note="; ".join([versions, *problems]),
    )


def sizes(config: ModelConfig, dtype: str, lengths: range, repeats: int) -> dict[str, Any]:
    """What the process is told."""
    written = config_to_hf(config, dtype=dtype)
    return {
        "config": {key: written[key] for key in CONFIG_KEYS},
        "dtype": dtype,
        "prompt": lengths.start,
        "tokens": len(lengths),
        "repeats": repeats,
    }


def public(text: str) -> str:
    """The first line of an error, without the paths of this machine."""
    return re.sub(r"(?<![\w/])(?:/[\w.+@-]+){2,}", "<path>", " ".join(text.strip().partition("\n")[0].split()))[:300]


def _lines(command: Sequence[str], stdin: str, seconds: float, problems: list[str]) -> Iterator[str]:
    """The lines that the process prints until it ends, or until its time is up; then it is stopped."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        # Its own session: torch compiles in processes that must end with it.
        subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        deadline = time.monotonic() + seconds
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(stdin)
                process.stdin.close()
            while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                yield line
            if process.wait(timeout=10):
                errors.seek(0)
                said = errors.read().strip().splitlines() or [""]
                problems.append(f"it ended with exit code {process.returncode}: {public(said[-1])}")
        except (queue.Empty, subprocess.TimeoutExpired):
            problems.append(f"stopped after {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read(stream: Any, lines: "queue.Queue[str | None]") -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put(None)

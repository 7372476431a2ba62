"""Compiled GPU programs kept on disk between runs of the command line: seconds to the first token, not a minute."""

import os
from pathlib import Path

import jax


def enable() -> Path | None:
    """Keep compiled programs in the user's cache, if jax runs on a GPU and nobody has said where; the directory.

    A library should not set what its user's program shares, so only the command line calls this. Elsewhere:
    `jax.config.update("jax_compilation_cache_dir", ...)`.
    """
    if jax.default_backend() != "gpu" or jax.config.jax_compilation_cache_dir is not None:
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "teal_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory

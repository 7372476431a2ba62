"""`teal doctor`: what this machine has, and what would fit."""

import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from teal_jax.cli.options import Debug, Json, Quiet, examples
from teal_jax.cli.session import Session

EPILOG = examples("teal doctor", "teal doctor --models", "teal doctor --json > report.json")

PACKAGES = (
    "teal-jax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "optax",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "matplotlib",
)


def command(
    models: Annotated[bool, typer.Option("--models", help="List the aliases.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Versions, devices, cache, aliases, and which models would fit this machine's memory."""
    with Session(quiet=quiet, as_json=as_json, debug=debug) as session:
        from teal_jax import hub
        from teal_jax.memory import fitting
        from teal_jax.tables import facts_table, size

        if models:
            gated = {name: hub.is_gated(repo) for name, repo in hub.ALIASES.items()}
            notes = {
                name: f"{repo}{'  (gated: accept its licence)' if gated[name] else ''}"
                for name, repo in hub.ALIASES.items()
            }
            session.result(
                {hub.EMBEDDED: None, **hub.ALIASES}, facts_table({hub.EMBEDDED: "in this package", **_named(notes)})
            )
            return
        devices = _devices()
        memory = max(device["memory_bytes"] for device in devices)
        fits = fitting(memory)
        cache = _cache()
        values = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": versions(),
            "devices": devices,
            "cache": cache,
            "embedded_model": hub.is_model_directory(hub.EMBEDDED_DIRECTORY),
            "fits": fits,
        }
        shown = {
            "python": f"{values['python']} on {values['platform']}",
            **values["versions"],
            "devices": "; ".join(f"{d['kind']} ({d['platform']}), {size(d['memory_bytes'])}" for d in devices),
            "cache": f"{cache['path']}, {size(cache['free_bytes'])} free",
            "embedded model": "present" if values["embedded_model"] else "missing: reinstall teal-jax",
            "fits in 16 bits": ", ".join(fits) or "none of the aliases; teal demo does",
        }
        session.result(values, facts_table(shown))
        if all(device["platform"] == "cpu" for device in devices):
            session.note("no GPU: everything runs, on the CPU")


def _named(notes: dict[str, str]) -> dict[str, Any]:
    return dict(sorted(notes.items()))


def versions() -> dict[str, str]:
    """Installed versions of what this library stands on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if found["teal-jax"] == "not installed":
        from teal_jax import __version__

        found["teal-jax"] = f"{__version__} (a checkout)"
    return found


def _devices() -> list[dict[str, Any]]:
    import os

    import jax

    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return [
        {
            "platform": device.platform,
            "kind": platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit", host),
        }
        for device in jax.devices()
    ]


def _cache() -> dict[str, Any]:
    import shutil
    from pathlib import Path

    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return {"path": str(path), "free_bytes": shutil.disk_usage(there).free}

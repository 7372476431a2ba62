"""Saved models: a directory that appears whole or not at all.

teal.json           format version, model config, dtype, formats of quantised weights, what made it
sparsity_plan.json  where the model is sparse
calibration.npz     where it was given, so that another target needs no new pass over text
params/             weights, an orbax checkpoint
tokenizer files, README.md
"""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import ArtifactError, ModelNotFoundError, TealError
from teal_jax.model import LanguageModel, abstract_decoder
from teal_jax.nn.gates import Dense
from teal_jax.quantization.storage import abstract_quantized, join_quantized, split_quantized
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.sparsity.statistics import Calibration

FORMAT_VERSION, _UNQUANTISED = 2, 1
"""What is written; a model without quantised weights in the form that older versions read."""

MANIFEST, PLAN, CALIBRATION, PARAMS = "teal.json", "sparsity_plan.json", "calibration.npz", "params"


def is_artifact(directory: str | Path) -> bool:
    """Whether `directory` holds a saved model."""
    return (Path(directory) / MANIFEST).is_file()


def save(
    lm: LanguageModel,
    directory: str | Path,
    *,
    calibration: Calibration | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `lm` to `directory`: aside first, then renamed, so that a broken save leaves nothing under the name.

    Args:
      lm: dense or sparse.
      directory: must not exist, unless `overwrite`.
      calibration: saved with it, so that a new target needs no new pass over text.
      overwrite: replace an artifact that is there. Any other directory is refused.

    Raises:
      ArtifactError: the directory exists, is no artifact, or cannot be written (a full disk).
    """
    # Orbax takes a relative path and fails later, in a thread.
    directory = Path(directory).resolve()
    if directory.exists():
        if not overwrite:
            raise ArtifactError(f"{directory} exists", hint="choose another name, or overwrite=True / --overwrite")
        if not is_artifact(directory):
            raise ArtifactError(f"{directory} is not a saved model: it will not be overwritten")
    aside = directory.with_name(f".{directory.name}.saving-{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _check_space(lm, directory.parent)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write(lm, aside, calibration)
        _swap(aside, directory)
    except ArtifactError:
        raise
    except Exception as error:  # orbax and the file systems below it raise many kinds; all mean: not saved
        raise ArtifactError(
            f"cannot save to {directory}: {_reason(error)}", hint="nothing was changed there"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "No space left" in text or "ENOSPC" in text:
        return "the disk is full"
    return text.splitlines()[0] if text else type(error).__name__


def _check_space(lm: LanguageModel, parent: Path) -> None:
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params["weights"]))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ArtifactError(
            f"the disk is too full to save to {parent}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _write(lm: LanguageModel, directory: Path, calibration: Calibration | None) -> None:
    from orbax.checkpoint import v1 as ocp

    # Weights hardly compress, and compressing 14 GB takes minutes.
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        plain, formats = split_quantized(lm.params["weights"])
        ocp.save(str(directory / PARAMS), plain)
    if lm.tokenizer is not None:
        lm.tokenizer.save(directory)
    if lm.plan is not None:
        lm.plan.save(directory / PLAN)
    if calibration is not None:
        calibration.save(directory / CALIBRATION)
    (directory / "README.md").write_text(_card(lm))
    manifest = {
        "format_version": FORMAT_VERSION if formats else _UNQUANTISED,
        "name": lm.name,
        "dtype": str(lm.dtype),
        "sparse": lm.plan is not None,
        "model_config": lm.config.to_dict(),
        "quantization": formats,
        "created_with": {package: metadata.version(package) for package in ("jax", "flax", "orbax-checkpoint")},
    }
    # Last: a directory without it is no artifact.
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _card(lm: LanguageModel) -> str:
    lines = [f"# {lm.name}", "", "Saved by [teal_jax]; load it with `teal_jax.load(directory)`.", ""]
    if lm.plan is None:
        lines += ["Dense."]
    else:
        lines += [
            f"Activation sparsity: target {lm.plan.target:.0%} of the block weights skipped per decoded token, "
            f"allocated by `{lm.plan.method}`.",
        ]
    kind = f"{lm.dtype}, blocks quantised to {lm.quantization}" if lm.quantization else str(lm.dtype)
    lines += ["", f"{lm.config.num_params:,} parameters, {kind}."]
    return "\n".join(lines) + "\n"


def _swap(aside: Path, directory: Path) -> None:
    if not directory.exists():
        aside.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    directory.rename(old)
    try:
        aside.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(directory: str | Path, *, dtype: Any = None) -> LanguageModel:
    """The model saved in `directory`, sparse where it was saved sparse.

    Args:
      directory: written by `save`.
      dtype: converts the weights; None keeps the saved dtype, and with it identical logits.

    Raises:
      ArtifactError: not an artifact, broken, or made by a newer version.
    """
    directory = Path(directory).resolve()
    manifest = read_manifest(directory)
    config = ModelConfig.from_dict(manifest["model_config"])
    formats = manifest.get("quantization", {})
    weights = _read_params(directory / PARAMS, config, jnp.dtype(dtype or manifest["dtype"]), formats)
    try:
        tokenizer = Tokenizer.from_directory(directory, config)
    except ModelNotFoundError:
        tokenizer = None
    name = manifest["name"]
    lm = LanguageModel(config=config, params={"weights": weights, "gates": Dense()}, name=name, tokenizer=tokenizer)
    return lm.sparsify(SparsityPlan.load(directory / PLAN)) if manifest["sparse"] else lm


def saved_calibration(directory: str | Path, lm: LanguageModel | None = None) -> Calibration | None:
    """The calibration saved with an artifact; None where there is none, or `lm`'s weights have another format now."""
    path = Path(directory) / CALIBRATION
    if not (is_artifact(directory) and path.exists()):
        return None
    calibration = Calibration.load(path)
    return calibration if lm is None or calibration.notes.get("quantization") == lm.quantization else None


def read_manifest(directory: Path) -> dict[str, Any]:
    """The fields of teal.json; raises `ArtifactError` where it is missing, broken or newer than this."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise ArtifactError(f"no saved model in {directory}: {MANIFEST} is missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is broken: {error}", hint="save the model again") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{directory} has format version {version}; this teal_jax reads up to {FORMAT_VERSION}",
            hint="upgrade teal_jax: pip install -U teal-jax",
        )
    if missing := {"name", "dtype", "sparse", "model_config"} - set(manifest):
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}", hint="save the model again")
    return manifest


def _read_params(path: Path, config: ModelConfig, dtype: jnp.dtype, formats: dict[str, str]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    shapes = abstract_quantized(nnx.to_pure_dict(nnx.state(abstract_decoder(config, dtype))), formats)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    try:
        return join_quantized(ocp.load(str(path), target), formats, dtype)
    except TealError:
        raise
    except Exception as error:  # orbax raises many kinds for a damaged checkpoint
        raise ArtifactError(
            f"the weights in {path} cannot be read: {_reason(error)}", hint="save the model again"
        ) from error

"""`load` and `load_and_sparsify`: from a name to a model ready to run."""

import dataclasses
from pathlib import Path
from typing import Any

import converters
from teal_jax import artifact, hub
from teal_jax.data import TextSource
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import ModelNotFoundError
from teal_jax.memory import check_fits
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.nn.implementation import Implementation
from teal_jax.progress import Bar
from teal_jax.sparsity.allocation import allocate
from teal_jax.sparsity.calibration import calibrate
from teal_jax.sparsity.plan import SparsityPlan, check_sparsity
from teal_jax.sparsity.statistics import Calibration


def load(
    name: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    offline: bool = False,
    progress: bool = True,
    implementation: Implementation | None = None,
) -> LanguageModel:
    """A model by name.

    Args:
      name: alias ("mistral-7b"), hub id, directory of an HF checkpoint, or directory of a saved artifact.
      dtype: of weights, activations and kv_cache: "bfloat16", "float16" or "float32"; None: as stored.
      revision: branch, tag or commit of a hub repository.
      offline: use only what is on this machine.
      progress: draw progress bars.
      implementation: of decoding: `"pallas"`, `"xla"` or None; see `LanguageModel`.

    Raises:
      ModelNotFoundError: no such model, or it cannot be fetched.
      UnsupportedModelError: its architecture is not Llama's or Mistral's, or its weights are packed in a way not known.
      CheckpointError: its weights are incomplete or broken.
      DeviceMemoryError: it does not fit the device's memory.
    """
    directory = hub.resolve(name, revision=revision, offline=offline)
    if artifact.is_artifact(directory):
        return dataclasses.replace(artifact.load(directory, dtype=dtype), implementation=implementation)
    config = converters.read_config(directory)
    check_fits(config, dtype)
    with Bar(enabled=progress) as bar:
        weights = converters.read_params(directory, config, dtype=dtype, progress=bar)
    try:
        tokenizer = Tokenizer.from_directory(directory, config)
    except ModelNotFoundError:
        # Weights alone can be calibrated and scored on tokens; whatever needs text says that it is missing.
        tokenizer = None
    label = name if isinstance(name, str) and not Path(name).exists() else Path(name).name
    return LanguageModel(
        config=config,
        params={"weights": weights, "gates": Dense()},
        name=str(label),
        tokenizer=tokenizer,
        implementation=implementation,
    )


def load_and_sparsify(
    name: str | Path,
    sparsity: float,
    *,
    data: TextSource | None = None,
    method: str = "greedy",
    num_tokens: int = 20480,
    seq_len: int | None = None,
    seed: int = 0,
    calibration: Calibration | str | Path | None = None,
    plan: SparsityPlan | str | Path | None = None,
    dtype: Any = None,
    revision: str | None = None,
    offline: bool = False,
    progress: bool = True,
    implementation: Implementation | None = None,
) -> LanguageModel:
    """Load, calibrate, allocate and sparsify.

    Args:
      name: see `load`. An artifact saved with its calibration is planned anew without another pass over text.
      sparsity: target model sparsity in [0, 1): the share of block weights that a decoded token need not read.
      data: calibration text; see `calibrate`.
      method: allocation method; see `allocate`.
      num_tokens: calibration tokens.
      seq_len: tokens a calibration row.
      seed: choice of calibration rows.
      calibration: one made earlier, or its file, in place of a new pass.
      plan: one made earlier, or its file; nothing is calibrated, and its target must be `sparsity`.
      dtype: see `load`.
      revision: see `load`.
      offline: see `load`.
      progress: draw progress bars.
      implementation: see `load`.

    Returns:
      The sparse model; `.plan` says what was chosen, `.dense()` gives the dense one.
    """
    target = check_sparsity(sparsity)
    if isinstance(plan, (str, Path)):
        plan = SparsityPlan.load(plan)
    if plan is not None and abs(plan.target - target) > 1e-6:
        raise ValueError(f"the plan's target is {plan.target}, got sparsity {target}")
    if isinstance(calibration, (str, Path)):
        calibration = Calibration.load(calibration)
    lm = load(
        name, dtype=dtype, revision=revision, offline=offline, progress=progress, implementation=implementation
    ).dense()
    if plan is not None:
        return lm.sparsify(plan)
    if calibration is None and data is None:
        calibration = artifact.saved_calibration(name)
    if calibration is None:
        calibration = calibrate(lm, data, num_tokens=num_tokens, seq_len=seq_len, seed=seed, progress=progress)
    return lm.sparsify(allocate(lm, calibration, target, method=method, progress=progress))

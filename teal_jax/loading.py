"""`load` and `load_and_sparsify`: from a name to a model ready to run."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import converters
from teal_jax import artifact, hub
from teal_jax.data import TextSource
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import ModelNotFoundError, QuantizationError
from teal_jax.memory import check_fits
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.nn.implementation import Implementation
from teal_jax.nn.quantized import QuantSpec
from teal_jax.progress import Bar
from teal_jax.quantization import driver
from teal_jax.quantization.checkpoint import quantize_checkpoint
from teal_jax.quantization.driver import Method
from teal_jax.sparsity.allocation import allocate
from teal_jax.sparsity.calibration import calibrate
from teal_jax.sparsity.default import default_method
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
    quantize: str | QuantSpec | None = None,
    quantize_method: Method = "rtn",
    lm_head: str | QuantSpec | None = None,
    data: TextSource | None = None,
    num_tokens: int = 20480,
    seq_len: int | None = None,
    seed: int = 0,
) -> LanguageModel:
    """A model by name.

    Args:
      name: alias ("mistral-7b"), hub id, directory of an HF checkpoint, or directory of a saved artifact.
      dtype: of weights, activations and kv_cache: "bfloat16", "float16" or "float32"; None: as stored.
      revision: branch, tag or commit of a hub repository.
      offline: use only what is on this machine.
      progress: draw progress bars.
      implementation: of decoding: `"pallas"`, `"xla"` or None; see `LanguageModel`.
      quantize: the format of the blocks' weights, such as "int8" or "int4", see `quantize`; None: as they are. Of a
        checkpoint one block at a time is read; from AWQ's and GPTQ's 4-bit codes, with a warning of the error that this
        adds, or without loss. An artifact saved in that format is taken as it is.
      quantize_method: "rtn", "awq" or "gptq".
      lm_head: its format, "int8", or None.
      data: calibration text of "awq" and "gptq", with `num_tokens`, `seq_len` and `seed`; see `calibrate`.

    Raises:
      ModelNotFoundError: no such model, or it cannot be fetched.
      UnsupportedModelError: its architecture is not Llama's or Mistral's, or its weights are packed in a way not known.
      CheckpointError: its weights are incomplete or broken.
      DeviceMemoryError: it does not fit the device's memory.
      QuantizationError: it cannot be quantised so.
    """
    text: dict[str, Any] = {"data": data, "num_tokens": num_tokens, "seq_len": seq_len, "seed": seed}
    spec = None if quantize is None else QuantSpec.parse(quantize)
    if spec is None and lm_head is not None:
        raise QuantizationError("lm_head is quantised with the blocks only", hint="say quantize= too")
    directory = hub.resolve(name, revision=revision, offline=offline)
    if artifact.is_artifact(directory):
        lm = dataclasses.replace(artifact.load(directory, dtype=dtype), implementation=implementation)
        if spec is None or (lm_head is None and lm.quantization == str(spec)):
            return lm
        return driver.quantize(lm, spec, method=quantize_method, lm_head=lm_head, progress=progress, **text)
    config = converters.read_config(directory)
    check_fits(config, dtype, quantize=spec)
    try:
        tokenizer = Tokenizer.from_directory(directory, config)
    except ModelNotFoundError:
        # Weights alone can be calibrated and scored on tokens; whatever needs text says that it is missing.
        tokenizer = None
    label = str(name if isinstance(name, str) and not Path(name).exists() else Path(name).name)
    if spec is not None:
        lm = quantize_checkpoint(
            directory,
            config,
            spec,
            name=label,
            tokenizer=tokenizer,
            method=quantize_method,
            lm_head=lm_head,
            dtype=dtype,
            progress=progress,
            **text,
        )
        return dataclasses.replace(lm, implementation=implementation)
    with Bar(enabled=progress) as bar:
        weights = converters.read_params(directory, config, dtype=dtype, progress=bar)
    lm = LanguageModel(
        config=config,
        params={"weights": weights, "gates": Dense()},
        name=label,
        tokenizer=tokenizer,
        implementation=implementation,
    )
    gates = converters.read_gates(directory)
    return lm if gates is None else lm.sparsify(SparsityPlan.from_dict(gates, source=f"{directory}: config.json"))


def load_and_sparsify(
    name: str | Path,
    sparsity: float,
    *,
    data: TextSource | None = None,
    method: str | None = None,
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
    quantize: str | QuantSpec | None = None,
    quantize_method: Method = "rtn",
    lm_head: str | QuantSpec | None = None,
) -> LanguageModel:
    """Load, quantise where asked, calibrate, allocate and sparsify.

    Args:
      name: see `load`. An artifact saved with its calibration is planned anew without another pass over text.
      sparsity: target model sparsity in [0, 1): the share of block weights that a decoded token need not read.
      data: calibration text; see `calibrate`. AWQ and GPTQ take it too.
      method: allocation method; see `allocate`. None: `"learned"`, which costs least quality at equal weights read, or
        `"greedy"`, with a warning that says why, where it cannot be trained: too few calibration tokens, or too little
        device memory (see `teal_jax.sparsity.default`).
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
      quantize, quantize_method, lm_head: see `load`. Thresholds are calibrated on the quantised model.

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
        name,
        dtype=dtype,
        revision=revision,
        offline=offline,
        progress=progress,
        implementation=implementation,
        quantize=quantize,
        quantize_method=quantize_method,
        lm_head=lm_head,
        data=data,
        num_tokens=num_tokens,
        seq_len=seq_len,
        seed=seed,
    ).dense()
    if plan is not None:
        return lm.sparsify(plan)
    if calibration is None and data is None:
        calibration = artifact.saved_calibration(name, lm)
    if calibration is None:
        calibration = calibrate(lm, data, num_tokens=num_tokens, seq_len=seq_len, seed=seed, progress=progress)
    if method is None:
        method, reason = default_method(lm, calibration)
        if reason is not None:
            warnings.warn(f"{method} in place of the default method: {reason}", stacklevel=2)
    return lm.sparsify(allocate(lm, calibration, target, method=method, progress=progress))

"""A checkpoint quantised as it is read: a model that does not fit in 16 bits can be converted."""

from pathlib import Path
from typing import Any

import converters
from teal_jax.config import ModelConfig
from teal_jax.data import TextSource
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec
from teal_jax.quantization.driver import Method, check_request, quantize_head, quantize_layers, read_tokens
from teal_jax.quantization.layer import Layer
from teal_jax.quantization.regroup import regrouped, warn_of_error


def quantize_checkpoint(
    directory: Path,
    config: ModelConfig,
    spec: str | QuantSpec,
    *,
    name: str,
    tokenizer: Tokenizer | None = None,
    method: Method = "rtn",
    lm_head: str | QuantSpec | None = None,
    dtype: Any = None,
    data: TextSource | None = None,
    num_tokens: int = 20480,
    seq_len: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LanguageModel:
    """As `quantize`, of the HF checkpoint in `directory`, of which one block at a time is read.

    Rounding to nearest takes the projections of an AWQ or GPTQ checkpoint from their 4-bit codes, one by one: without
    loss where the format can hold them, else with a warning of the error added. `method` awq and gptq read a block of
    such a checkpoint as any other, dequantised.

    Memory: embedding, lm_head, one block in its dtype, what its quantisation needs, and the result.

    Args:
      directory: of the checkpoint.
      config: from its config.json.
      spec: the format.
      name: of the model.
      tokenizer: for calibration text.
      dtype: of the weights before they are quantised, and of what is not; None: as stored.
      method: see `quantize`.
      lm_head: see `quantize`.
      data: see `quantize`.
      num_tokens: see `quantize`.
      seq_len: see `quantize`.
      seed: see `quantize`.
      progress: draw a progress bar.

    Raises:
      CheckpointError: the weights are incomplete, broken, or do not fit the config.
      QuantizationError: see `quantize`.
    """
    spec, head = check_request(config, spec, method, lm_head)
    weights = converters.read_params(
        directory,
        config,
        dtype=dtype,
        only=lambda path: path[0] != "layers",
        # Of these the lm_head alone can be packed; what it dequantises to is known once the others are read.
        on_quantized=None if head is None else lambda key, weight: weight,
    )
    lm = LanguageModel(config=config, params={"weights": weights, "gates": Dense()}, name=name, tokenizer=tokenizer)
    tokens = None
    if method != "rtn":
        tokens = read_tokens(lm, data, num_tokens=num_tokens, seq_len=seq_len, seed=seed)

    errors: dict[str, float] = {}

    def convert(weight: converters.GroupedWeight, to: QuantSpec, name: str) -> QuantizedWeight:
        found, errors[name] = regrouped(weight, to, lm.dtype, name)
        return found

    def read(index: int) -> Layer:
        part = converters.read_params(
            directory,
            config,
            dtype=dtype,
            only=lambda path: path[:2] == ("layers", index),
            on_quantized=(lambda key, weight: convert(weight, spec, key.name)) if method == "rtn" else None,
        )
        return part["layers"][index]

    weights["layers"] = quantize_layers(lm, spec, read, method=method, tokens=tokens, progress=progress)
    if head is not None:
        own = weights["lm_head"]["weight"]
        packed = isinstance(own, converters.GroupedWeight)
        weights["lm_head"] = {"weight": convert(own, head, "lm_head.weight") if packed else quantize_head(own, head)}
    warn_of_error(errors, lm.quantization, stacklevel=3)
    return lm

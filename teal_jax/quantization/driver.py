"""`quantize`: a model's matrices in few bits, one block after another.

A block is quantised on what the quantised blocks before it give: later blocks make up for earlier ones' errors. In
memory: one block in 16 bits and its result, the calibration activations between two blocks, and the results so far.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from teal_jax.config import SITE_OF_PROJECTION, ModelConfig
from teal_jax.data import TextSource, calibration_rows
from teal_jax.default_text import default_documents
from teal_jax.errors import QuantizationError
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec
from teal_jax.progress import track
from teal_jax.quantization.awq import AwqSettings, awq_block
from teal_jax.quantization.gptq import gptq, second_moment
from teal_jax.quantization.layer import Layer, check_layer, check_matrix, map_matrices
from teal_jax.quantization.rtn import round_to_nearest
from teal_jax.sparsity.blocks import batches, dense_block, embed

type Method = Literal["rtn", "awq", "gptq"]

METHODS: tuple[Method, ...] = ("rtn", "awq", "gptq")


def quantize(
    lm: LanguageModel,
    spec: str | QuantSpec,
    *,
    method: Method = "rtn",
    lm_head: str | QuantSpec | None = None,
    data: TextSource | None = None,
    num_tokens: int = 20480,
    seq_len: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LanguageModel:
    """The model with the seven projections of every block quantised; `lm` stays as it is.

    The result is dense: thresholds are calibrated on the quantised model. Embedding and norms stay as they are (AWQ
    may scale norms).

    Args:
      lm: the model; its gates are ignored.
      spec: the format: `"int8"`, `"int4"` (groups of 64), `"int4-g128"`, `"int4-g64-asym"`; `"int3"` and `"int2"` are
        simulated: stored in bytes.
      method: `"rtn"`: round to nearest, no data. `"awq"`: a search for scales and spans. `"gptq"`: errors made up for
        by later rows. The last two take calibration text.
      lm_head: a format for the lm_head, `"int8"`, rounded to nearest; None leaves it.
      data: calibration text; see `calibrate`.
      num_tokens: calibration tokens.
      seq_len: tokens a row.
      seed: which rows of a longer text.
      progress: draw a progress bar.

    Raises:
      QuantizationError: a format that does not exist or fit, a model that is quantised already, weights that are
        not finite, a tied lm_head.
      DataError: see `calibrate`.
    """
    weights = lm.params["weights"]
    spec, head = check_request(lm.config, spec, method, lm_head)
    if lm.quantization is not None:
        raise QuantizationError(
            f"{lm.name} is quantised already: {lm.quantization}", hint="start from the model in 16 bits"
        )
    tokens = None
    if method != "rtn":
        tokens = read_tokens(lm, data, num_tokens=num_tokens, seq_len=seq_len, seed=seed)
    layers = quantize_layers(lm, spec, weights["layers"].__getitem__, method=method, tokens=tokens, progress=progress)
    new = weights | {"layers": layers}
    if head is not None:
        new["lm_head"] = {"weight": quantize_head(weights["lm_head"]["weight"], head)}
    return dataclasses.replace(lm, params={"weights": new, "gates": Dense()}, plan=None)


def check_request(
    config: ModelConfig, spec: str | QuantSpec, method: str, lm_head: str | QuantSpec | None = None
) -> tuple[QuantSpec, QuantSpec | None]:
    """The formats of the blocks and of the lm_head; raises `QuantizationError` for what cannot be, before any work."""
    spec = QuantSpec.parse(spec)
    spec.check_fits(config)
    if method not in METHODS:
        raise QuantizationError(f"no quantisation method {method!r}", hint=f"one of {', '.join(METHODS)}")
    if lm_head is None:
        return spec, None
    head = QuantSpec.parse(lm_head)
    if config.tie_embeddings:
        raise QuantizationError("the lm_head is the embedding, which stays as it is", hint="leave lm_head out")
    if head.group is not None and config.vocab_size % head.group:
        raise QuantizationError(
            f"groups of {head.group} do not divide the lm_head's {config.vocab_size} outputs", hint="lm_head='int8'"
        )
    return spec, head


def read_tokens(lm: LanguageModel, data: TextSource | None, *, num_tokens: int, seq_len: int | None, seed: int) -> Any:
    """Calibration tokens int32 `[rows, seq]`, from the default text where `data` is None."""
    data = default_documents(lm.name) if data is None else data
    return calibration_rows(lm, data, num_tokens=num_tokens, seq_len=seq_len, seed=seed).tokens


def quantize_head(weight: jax.Array, spec: QuantSpec) -> Any:
    """The lm_head `[d_model, vocab]`, rounded to nearest."""
    check_matrix(weight, "lm_head")
    return round_to_nearest(weight, spec)


def quantize_layers(
    lm: LanguageModel,
    spec: QuantSpec,
    layer_of: Callable[[int], Layer],
    *,
    method: Method,
    tokens: Any,
    progress: bool,
) -> dict[int, Layer]:
    """Every block quantised, in order.

    Args:
      lm: its config and embedding are used.
      spec: the format.
      layer_of: gives the parameters of a block; called once each, in order, so that it may read them then. Rounding to
        nearest leaves a matrix that is a `QuantizedWeight` as it is.
      method: see `quantize`.
      tokens: int32 `[rows, seq]`; None for rounding to nearest.
      progress: draw a progress bar.
    """
    x = None if tokens is None else embed(lm, tokens)
    slices = [] if x is None else batches(*x.shape[:2])
    done: dict[int, Layer] = {}
    zero: list[str] = []
    for index in track(range(lm.config.num_layers), f"Quantising to {spec} by {method}", enabled=progress):
        layer = layer_of(index)
        zero += check_layer(layer, index)
        parts = [] if x is None else [x[part] for part in slices]
        done[index] = _quantize_block(lm.config, spec, method, layer, parts)
        del layer
        if x is not None:
            x = jnp.concatenate([_forward(lm.config, done[index], part) for part in parts])
        # Or the next block would be read before this one is let go of.
        jax.block_until_ready(done[index])
    if zero:
        warnings.warn(f"channels that are all zero, in {len(zero)} matrices, stay zero; {zero[0]}", stacklevel=3)
    return done


def _quantize_block(
    config: ModelConfig, spec: QuantSpec, method: Method, layer: Layer, parts: Sequence[jax.Array]
) -> Layer:
    if method == "rtn":
        return map_matrices(layer, lambda _, w: w if isinstance(w, QuantizedWeight) else round_to_nearest(w, spec))
    if method == "awq":
        return awq_block(config, spec, layer, parts, AwqSettings())
    moments = functools.reduce(functools.partial(jax.tree.map, jnp.add), (_moments(config, layer, x) for x in parts))
    return map_matrices(layer, lambda i, weight: gptq(weight, moments[SITE_OF_PROJECTION[i]], spec))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, layer: Layer, x: jax.Array) -> jax.Array:
    return dense_block(config, layer, x)[0]


@functools.partial(jax.jit, static_argnums=0)
def _moments(config: ModelConfig, layer: Layer, x: jax.Array) -> list[jax.Array]:
    return [second_moment(site) for site in dense_block(config, layer, x)[1]]

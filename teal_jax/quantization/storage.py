"""Quantised weights on disk: their arrays by name, and beside them a table of formats by place in the tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.errors import ArtifactError, QuantizationError
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec
from teal_jax.quantization.layer import part_of

_ARRAYS = ("codes", "scale", "zero")


def split_quantized(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree with a dict of arrays for each quantised weight; and `{"layers.0.attn.q_proj.weight": "int4-g64"}`."""
    formats: dict[str, str] = {}

    def split(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedWeight):
            return leaf
        formats[place] = str(leaf.spec)
        return {name: getattr(leaf, name) for name in _ARRAYS if getattr(leaf, name) is not None}

    return _map(split, weights), formats


def abstract_quantized(shapes: dict[str, Any], formats: dict[str, str]) -> dict[str, Any]:
    """The tree of shapes that `split_quantized` gives, from that of the model in 16 bits."""
    specs = _specs(formats)
    known: set[str] = set()

    def split(place: str, leaf: Any) -> Any:
        known.add(place)
        return _arrays(specs[place], leaf.shape, place) if place in specs else leaf

    tree = _map(split, shapes)
    if unknown := sorted(set(specs) - known):
        raise ArtifactError(f"the model has no weight {unknown[0]}, which is said to be quantised", hint=_AGAIN)
    return tree


def join_quantized(weights: dict[str, Any], formats: dict[str, str], dtype: jax.typing.DTypeLike) -> dict[str, Any]:
    """What `split_quantized` split; the weights dequantise to `dtype`."""
    specs, name = _specs(formats), jnp.dtype(dtype).name

    def join(place: str, leaf: Any) -> Any:
        if place not in specs:
            return leaf
        return QuantizedWeight(**leaf, bits=specs[place].bits, group=specs[place].group, dtype=name)

    return _map(join, weights, whole=specs.keys())


def stored_bytes(config: ModelConfig, itemsize: int, formats: dict[str, str]) -> tuple[int, int, int]:
    """Bytes of the blocks' matrices, of the lm_head (of the embedding where it is that), and of all weights."""
    specs = _specs(formats)

    def stored(place: str, d_in: int, d_out: int) -> int:
        return specs[place].bytes_of(d_in, d_out) if place in specs else itemsize * d_in * d_out

    shapes = list(zip(PROJECTIONS, config.projection_shapes, strict=True))
    blocks = sum(
        stored(f"layers.{layer}.{part_of(i)}.{name}_proj.weight", *shape)
        for layer in range(config.num_layers)
        for i, (name, shape) in enumerate(shapes)
    )
    head = stored("lm_head.weight", config.d_model, config.vocab_size)
    plain = config.num_layers * sum(config.projection_sizes) + config.vocab_size * config.d_model
    return blocks, head, itemsize * (config.num_params - plain) + blocks + head


_AGAIN = "save the model again"


def _specs(formats: Any) -> dict[str, QuantSpec]:
    try:
        return {str(place): QuantSpec.parse(name) for place, name in formats.items()}
    except (AttributeError, QuantizationError) as error:
        raise ArtifactError(f"the formats of its quantised weights cannot be read: {error}", hint=_AGAIN) from error


def _arrays(spec: QuantSpec, shape: tuple[int, ...], place: str) -> dict[str, jax.ShapeDtypeStruct]:
    if len(shape) != 2 or (spec.group is not None and shape[1] % spec.group):
        raise ArtifactError(f"{place} {list(shape)} cannot be {spec}", hint=_AGAIN)
    d_in, d_out = shape
    if spec.group is None:
        return {
            "codes": jax.ShapeDtypeStruct(shape, jnp.int8),
            "scale": jax.ShapeDtypeStruct((d_out,), jnp.float32),
        }
    packed = jax.ShapeDtypeStruct((d_in, d_out // 2), jnp.uint8)
    groups = (d_in, d_out // spec.group)
    found = {
        "codes": packed if spec.bits == 4 else jax.ShapeDtypeStruct(shape, jnp.int8),
        "scale": jax.ShapeDtypeStruct(groups, jnp.bfloat16),
    }
    return found if spec.symmetric else found | {"zero": jax.ShapeDtypeStruct(groups, jnp.uint8)}


def _map(change: Callable[[str, Any], Any], tree: Any, place: str = "", whole: Any = ()) -> Any:
    """`change(place, leaf)` over nested dicts; those at a place in `whole` count as leaves."""
    if not isinstance(tree, dict) or place in whole:
        return change(place, tree)
    return {key: _map(change, child, f"{place}.{key}".lstrip("."), whole) for key, child in tree.items()}

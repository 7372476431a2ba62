"""The one table of names: HuggingFace's tensor name <-> place in the parameter tree.

Reading, checking and export all go through `tensor_keys`; a new family of the same shape needs no code elsewhere.
HuggingFace stores a projection as `[out, in]`; here it is `[d_in, d_out]`, so that one input channel is one row.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from teal_jax.config import ModelConfig
from teal_jax.errors import CheckpointError

type Path = tuple[str | int, ...]

# HuggingFace name | path in the tree (dots; {i} is the layer) | shape as stored | transposed here | present only if
_TABLE = (
    ("model.embed_tokens.weight", "embed.weight", ("vocab", "d"), False, "always"),
    ("model.layers.{i}.input_layernorm.weight", "layers.{i}.attn_norm.weight", ("d",), False, "always"),
    ("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attn.q_proj.weight", ("q", "d"), True, "always"),
    ("model.layers.{i}.self_attn.q_proj.bias", "layers.{i}.attn.q_proj.bias", ("q",), False, "attention_bias"),
    ("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attn.k_proj.weight", ("kv", "d"), True, "always"),
    ("model.layers.{i}.self_attn.k_proj.bias", "layers.{i}.attn.k_proj.bias", ("kv",), False, "attention_bias"),
    ("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attn.v_proj.weight", ("kv", "d"), True, "always"),
    ("model.layers.{i}.self_attn.v_proj.bias", "layers.{i}.attn.v_proj.bias", ("kv",), False, "attention_bias"),
    ("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attn.o_proj.weight", ("d", "q"), True, "always"),
    ("model.layers.{i}.self_attn.o_proj.bias", "layers.{i}.attn.o_proj.bias", ("d",), False, "attention_bias"),
    ("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight", ("d",), False, "always"),
    ("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.gate_proj.weight", ("mlp", "d"), True, "always"),
    ("model.layers.{i}.mlp.gate_proj.bias", "layers.{i}.mlp.gate_proj.bias", ("mlp",), False, "mlp_bias"),
    ("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up_proj.weight", ("mlp", "d"), True, "always"),
    ("model.layers.{i}.mlp.up_proj.bias", "layers.{i}.mlp.up_proj.bias", ("mlp",), False, "mlp_bias"),
    ("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down_proj.weight", ("d", "mlp"), True, "always"),
    ("model.layers.{i}.mlp.down_proj.bias", "layers.{i}.mlp.down_proj.bias", ("d",), False, "mlp_bias"),
    ("model.norm.weight", "final_norm.weight", ("d",), False, "always"),
    ("lm_head.weight", "lm_head.weight", ("vocab", "d"), True, "untied"),
)

# Buffers that old versions of transformers saved; they are computed from the config.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

_MOST_LISTED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorKey:
    """One tensor of a checkpoint.

    Attributes:
      name: in the file. path: in the tree, `("layers", 0, "attn", "q_proj", "weight")`.
      shape: as stored in the file. transpose: the tree holds the transposed matrix.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    transpose: bool

    @property
    def tree_shape(self) -> tuple[int, ...]:
        """The shape in the tree."""
        return self.shape[::-1] if self.transpose else self.shape


def tensor_keys(config: ModelConfig) -> tuple[TensorKey, ...]:
    """Every tensor of a checkpoint of `config`, in the order of the model."""
    sizes = {
        "vocab": config.vocab_size,
        "d": config.d_model,
        "mlp": config.d_mlp,
        "q": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
    }
    present = {
        "always": True,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "untied": not config.tie_embeddings,
    }
    rows = [row for row in _TABLE if present[row[4]]]
    first_layer_row = next(n for n, row in enumerate(rows) if "{i}" in row[0])
    layer_rows = [row for row in rows if "{i}" in row[0]]

    def key(row: tuple[str, str, tuple[str, ...], bool, str], layer: int) -> TensorKey:
        parts = row[1].replace("{i}", str(layer)).split(".")
        path = tuple(int(part) if part.isdigit() else part for part in parts)
        shape = tuple(sizes[size] for size in row[2])
        return TensorKey(name=row[0].replace("{i}", str(layer)), path=path, shape=shape, transpose=row[3])

    before = [key(row, 0) for row in rows[:first_layer_row]]
    layers = [key(row, i) for i in range(config.num_layers) for row in layer_rows]
    after = [key(row, 0) for row in rows[first_layer_row + len(layer_rows) :]]
    return (*before, *layers, *after)


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that the config does not ask for may lie in the file: cached rotations, a tied head's copy."""
    return bool(_HARMLESS.search(name)) or (config.tie_embeddings and name == "lm_head.weight")


def set_leaf(tree: dict[Any, Any], path: Path, leaf: Any) -> None:
    """Put `leaf` at `path`, making the dicts on the way."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every `(path, leaf)` of a nested dict."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for part, child in tree.items():
        yield from leaves(child, (*path, part))


def check_shapes(expected: Mapping[Any, tuple[int, ...]], found: Mapping[Any, tuple[int, ...]], *, what: str) -> None:
    """Raise one `CheckpointError` that lists every tensor that is missing, extra or misshapen."""
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    extra = [f"extra {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    misshapen = [
        f"{name} expected {list(shape)}, got {list(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if not (missing or extra or misshapen):
        return
    counts = f"{len(missing)} missing, {len(extra)} extra, {len(misshapen)} misshapen"
    hint = "do config.json and the weights belong together?"
    if any("lm_head.weight" in line for line in missing):
        hint += " A model whose head is tied to the embedding needs tie_word_embeddings true in config.json."
    # One line, since the command line prints one: the first few say what is wrong.
    problems = [*missing, *extra, *misshapen]
    listed = "; ".join(problems[:_MOST_LISTED]) + ("; ..." if len(problems) > _MOST_LISTED else "")
    raise CheckpointError(f"{what} does not fit the config ({counts} of {len(expected)} tensors): {listed}", hint=hint)

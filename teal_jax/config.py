"""What a Llama- or Mistral-family model is: one frozen `ModelConfig`, read from the checkpoint, never a preset."""

import dataclasses
import hashlib
import json
from typing import Any

from teal_jax.errors import UnsupportedModelError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven matrices of a block, in the order used by every array with a projection axis."""

SITES = ("attn_in", "attn_out", "mlp_in", "mlp_hidden")
"""The four activation tensors of a block that feed the projections."""

SITE_OF_PROJECTION = (0, 0, 0, 1, 2, 2, 3)
"""`SITES[SITE_OF_PROJECTION[i]]` is the input of `PROJECTIONS[i]`."""

HIDDEN_ACTS = ("silu", "relu2")
"""What the gated MLP may do to its gate: `x sigmoid(x)`, or `max(x, 0) ** 2` (Q-Sparse, arXiv 2407.10969)."""

ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies, `theta ** (-2 i / head_dim)`.
      type: `"default"`, `"linear"` (positions divided by `factor`) or `"llama3"` (Llama 3.1's: low
        frequencies divided by `factor`, high ones kept, the band between interpolated).
      factor: stretch of the context, >= 1; 1 for `"default"`.
      low_freq_factor, high_freq_factor: edges of llama3's band, in turns over the original context.
      original_max_position: context length (tokens) before the stretch; llama3 only.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope type {self.type!r} is not supported: expected one of {', '.join(ROPE_TYPES)}",
                hint="use a checkpoint whose config.json has one of these rope types",
            )
        if self.theta <= 0 or self.factor < 1:
            raise UnsupportedModelError(
                f"rope needs theta > 0 and factor >= 1, got theta={self.theta}, factor={self.factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of a decoder; hashable, so that compiled functions are keyed by it.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream.
      d_mlp: width of the gated MLP's hidden layer.
      num_layers: decoder blocks.
      num_heads, num_kv_heads: query heads and key/value heads (GQA: the first is a multiple of the second).
      head_dim: width of one head; `num_heads * head_dim` need not equal `d_model`.
      max_position: longest sequence (tokens) the model was made for.
      norm_eps: epsilon inside RMSNorm.
      rope: rotary embedding.
      sliding_window: a query sees this many newest positions, itself included; None sees all.
      tie_embeddings: the lm_head is the transposed embedding.
      attention_bias: q, k, v and o carry biases. mlp_bias: gate, up and down do.
      hidden_act: of `HIDDEN_ACTS`, under HuggingFace's names.
      bos_token_id: token put before a text, or None. eos_token_ids: any of them ends a generation.
      model_type: the family's name in config.json (`"llama"`, `"mistral"`).
    """

    vocab_size: int
    d_model: int
    d_mlp: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    sliding_window: int | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    model_type: str = "llama"

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "d_model",
            "d_mlp",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UnsupportedModelError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.hidden_act not in HIDDEN_ACTS:
            raise UnsupportedModelError(
                f"hidden_act {self.hidden_act!r} is not supported: expected one of {', '.join(HIDDEN_ACTS)}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UnsupportedModelError(f"sliding_window must be >= 1 or None, got {self.sliding_window}")

    @property
    def projection_shapes(self) -> tuple[tuple[int, int], ...]:
        """`(d_in, d_out)` of each projection, in the order of `PROJECTIONS`."""
        d, m = self.d_model, self.d_mlp
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return ((d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d))

    @property
    def projection_sizes(self) -> tuple[int, ...]:
        """Weights in each projection, `d_in * d_out`: the weights of the model-sparsity mean."""
        return tuple(d_in * d_out for d_in, d_out in self.projection_shapes)

    @property
    def site_widths(self) -> tuple[int, ...]:
        """Channels of each activation site, in the order of `SITES`."""
        return (self.d_model, self.num_heads * self.head_dim, self.d_model, self.d_mlp)

    @property
    def num_params(self) -> int:
        """Weights of the model, biases and norms included; a tied embedding counts once."""
        biases = self.attention_bias * sum(o for _, o in self.projection_shapes[:4])
        biases += self.mlp_bias * sum(o for _, o in self.projection_shapes[4:])
        layer = sum(self.projection_sizes) + 2 * self.d_model + biases
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.d_model

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        fields = dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}
        if self.hidden_act == "silu":
            # As before there was another: plans know their model by these fields.
            del fields["hidden_act"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """The config written by `to_dict`; raises `UnsupportedModelError` for a field it does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise UnsupportedModelError(
                f"unknown model config fields: {', '.join(sorted(unknown))}",
                hint="made by a newer teal_jax? upgrade it",
            )
        values = dict(fields)
        values["rope"] = RopeConfig(**fields["rope"])
        values["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that a plan depends on: two models of one shape share it."""
        text = json.dumps(
            {k: v for k, v in self.to_dict().items() if not k.endswith(("token_id", "token_ids"))}, sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

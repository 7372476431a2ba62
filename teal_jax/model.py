"""`LanguageModel`: config, parameters, gates, tokenizer; and the pure functions that run it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.errors import ContextError, PlanError
from teal_jax.nn.block import Block
from teal_jax.nn.cache import KVCache, init_cache
from teal_jax.nn.decoder import Decoder, Observer
from teal_jax.nn.gates import Dense, prompt_gates
from teal_jax.nn.implementation import Implementation, use_fused_step
from teal_jax.nn.quantized import quantization_of

if TYPE_CHECKING:
    from teal_jax.decode.tokenizer import Tokenizer
    from teal_jax.sparsity.plan import SparsityPlan

type Params = dict[str, Any]
"""`{"weights": nested dict of arrays, "gates": as `teal_jax.nn.gates.ModelGates`}`."""


class ModelFunctions(NamedTuple):
    """The pure functions of one config, shared by every model that has it, so that jit compiles them once."""

    prefill: Callable[..., tuple[jax.Array, KVCache]]
    decode_step: Callable[..., tuple[jax.Array, KVCache]]
    forward: Callable[..., tuple[jax.Array, list[Any]]]


def abstract_decoder(config: ModelConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Decoder:
    """A decoder whose weights are shapes only: for its graph and for checking a checkpoint against."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def model_functions(config: ModelConfig, implementation: Implementation | None = None) -> ModelFunctions:
    """The functions of `config`; the same objects for the same arguments.

    `implementation` is of `decode_step`: `"pallas"`, the GPU kernels; `"xla"`; None, the kernels where they can run.
    """
    return _model_functions(config, implementation)


@functools.cache
def _model_functions(config: ModelConfig, implementation: Implementation | None) -> ModelFunctions:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def prefill(
        params: Params, tokens: jax.Array, cache: KVCache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        if tokens.shape[1] > cache.capacity:
            raise ContextError(
                f"the kv_cache holds {cache.capacity} tokens, got a prompt of {tokens.shape[1]}",
                hint="give init_cache a larger max_len or shorten the prompt",
            )
        model = nnx.merge(graphdef, params["weights"])
        x, cache = model.extend(tokens, prompt_gates(params["gates"]), cache, mask=mask)
        if mask is None:
            return model.logits(x[:, -1]), cache
        last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return model.logits(x[jnp.arange(len(tokens)), last]), cache

    def decode_step(params: Params, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        weights, gates = params["weights"], params["gates"]
        dtype, kind = weights["embed"]["weight"].dtype, quantization_of(weights)
        if use_fused_step(config, implementation, dtype, token.shape[0], gates, kind):
            from teal_jax.nn.fused_step import fused_step

            return fused_step(config, weights, gates, token, cache)
        model = nnx.merge(graphdef, weights)
        x, cache = model.extend(token[:, None], gates, cache)
        return model.logits(x[:, 0]), cache

    def forward(
        params: Params,
        tokens: jax.Array,
        where: jax.Array,
        mask: jax.Array | None = None,
        observe: Observer | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, list[Any]]:
        model = nnx.merge(graphdef, params["weights"])
        return model.hidden(tokens, params["gates"].on(where), mask=mask, observe=observe, remat=remat)

    return ModelFunctions(prefill, decode_step, forward)


@functools.cache
def _jitted_logits(config: ModelConfig) -> Callable[..., jax.Array]:
    graphdef, _ = nnx.split(abstract_decoder(config))

    def logits(params: Params, tokens: jax.Array, where: jax.Array, mask: jax.Array | None) -> jax.Array:
        x, _ = model_functions(config).forward(params, tokens, where, mask)
        return nnx.merge(graphdef, params["weights"]).logits(x)

    return jax.jit(logits)


def dense_prefix_length(dense_prefix: float | int, seq: int) -> int:
    """Leading tokens of `seq` that stay dense: a share (float in [0, 1], rounded up) or a count (int >= 0)."""
    if isinstance(dense_prefix, float):
        if not 0 <= dense_prefix <= 1:
            raise ValueError(f"dense_prefix as a share must lie in [0, 1], got {dense_prefix}")
        return math.ceil(dense_prefix * seq - 1e-9)
    if dense_prefix < 0:
        raise ValueError(f"dense_prefix as a token count must be >= 0, got {dense_prefix}")
    return min(dense_prefix, seq)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model ready to run. Cheap to copy: copies share the weights.

    Attributes:
      config: sizes and numerics.
      params: what `prefill` and `decode_step` take first: weights and gates, a pytree.
      name: what it was loaded as, for messages and reports.
      tokenizer: text to tokens and back; None for a model without one.
      plan: the sparsity in force; None when dense.
      implementation: of decoding: `"pallas"`, the GPU kernels, or an error; `"xla"`, which reads every weight; None,
        the kernels where they can run.
    """

    config: ModelConfig
    params: Params
    name: str = "model"
    tokenizer: "Tokenizer | None" = None
    plan: "SparsityPlan | None" = None
    implementation: Implementation | None = None

    def __repr__(self) -> str:
        """One line: all the weights and the plan would fill a notebook."""
        kind = f"{self.dtype}, {self.quantization}" if self.quantization else str(self.dtype)
        sparse = "dense" if self.plan is None else f"{100 * self.plan.target:.3g} % sparse by {self.plan.method}"
        return f"LanguageModel({self.name!r}, {self.config.num_layers} layers, {kind}, {sparse})"

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights, activations and kv_cache."""
        return self.params["weights"]["embed"]["weight"].dtype

    @property
    def quantization(self) -> str | None:
        """The format of the quantised weights, such as `int4-g64` (several: joined by +); None where none is."""
        return quantization_of(self.params["weights"])

    @property
    def prefill(self) -> Callable[..., tuple[jax.Array, KVCache]]:
        """`prefill(params, tokens, cache, mask=None) -> (logits, cache)`: append a prompt.

        Dense, unless the model was trained through its gates.

        tokens int32 `[batch, seq]`, mask bool `[batch, seq]` (False: padding, left or right); logits float32
        `[batch, vocab]` after each sequence's last real token. Pure: jit it and donate the cache.
        """
        return model_functions(self.config).prefill

    @property
    def decode_step(self) -> Callable[..., tuple[jax.Array, KVCache]]:
        """`decode_step(params, token, cache) -> (logits, cache)`: one token each, through the gates.

        token int32 `[batch]`; logits float32 `[batch, vocab]`. Pure, and the same for every sparsity:
        thresholds are arrays in `params`. The caller keeps `cache.length` below `cache.capacity`. On a GPU, for at
        most 8 rows, it runs kernels that read only the kept rows of every weight; see `implementation`.
        """
        return model_functions(self.config, self.implementation).decode_step

    def init_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty kv_cache for `batch` sequences of at most `max_len` tokens, prompt included."""
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch and max_len must be >= 1, got {batch} and {max_len}")
        return init_cache(self.config, batch, max_len, self.dtype)

    def logits(
        self, tokens: jax.typing.ArrayLike, *, dense_prefix: float | int = 0.0, mask: jax.typing.ArrayLike | None = None
    ) -> jax.Array:
        """Float32 logits `[batch, seq, vocab]` of whole sequences, gated as in decoding.

        Args:
          tokens: int `[batch, seq]`.
          dense_prefix: leading tokens left dense, a share of `seq` (float) or a count (int).
          mask: bool `[batch, seq]`, False for padding.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        where = jnp.arange(tokens.shape[1]) >= dense_prefix_length(dense_prefix, tokens.shape[1])
        where = jnp.broadcast_to(where, tokens.shape)
        return _jitted_logits(self.config)(self.params, tokens, where, None if mask is None else jnp.asarray(mask))

    def sparsify(self, plan: "SparsityPlan") -> "LanguageModel":
        """The same model under `plan`; the weights are shared and `self` stays as it is.

        Raises:
          PlanError: the plan was made for a model of another shape.
        """
        from teal_jax.sparsity.gating import gates_of

        weights = self.params["weights"]
        gates = gates_of(plan, self.config, weights)
        return dataclasses.replace(self, params={"weights": weights, "gates": gates}, plan=plan)

    def dense(self) -> "LanguageModel":
        """The same model without sparsity."""
        return dataclasses.replace(self, params={"weights": self.params["weights"], "gates": Dense()}, plan=None)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model, its plan and its tokenizer as an artifact; see `teal_jax.artifact.save`."""
        from teal_jax.artifact import save

        return save(self, directory, overwrite=overwrite)

    def require_plan(self) -> "SparsityPlan":
        """The plan in force; raises `PlanError` when dense."""
        if self.plan is None:
            raise PlanError("this model is dense", hint="sparsify it first: lm.sparsify(plan)")
        return self.plan


def random_model(config: ModelConfig, *, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32) -> LanguageModel:
    """A model with random weights: for tests, benchmarks and training from scratch."""
    block, others = _initialisers(config, jnp.dtype(dtype))
    *keys, last = jax.random.split(jax.random.key(seed), config.num_layers + 1)
    weights = others(last)
    weights["layers"] = {layer: block(key) for layer, key in enumerate(keys)}
    return LanguageModel(config=config, params={"weights": weights, "gates": Dense()}, name="random")


@functools.cache
def _initialisers(config: ModelConfig, dtype: jnp.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted `key -> weights` of a block, and of all else. All blocks in one program take XLA a minute to compile."""

    def block(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Block(config, rngs=nnx.Rngs(key), dtype=dtype)))

    def others(key: jax.Array) -> Any:
        decoder = Decoder(dataclasses.replace(config, num_layers=1), rngs=nnx.Rngs(key), dtype=dtype)
        return {name: part for name, part in nnx.to_pure_dict(nnx.state(decoder)).items() if name != "layers"}

    return jax.jit(block), jax.jit(others)

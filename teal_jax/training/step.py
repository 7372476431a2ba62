"""One update: loss, gradient over the parts of a batch, AdamW; one jitted program whose state is donated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from teal_jax.config import ModelConfig
from teal_jax.model import abstract_decoder
from teal_jax.nn.bitnet import ternary_weights
from teal_jax.nn.gates import Dense
from teal_jax.training.devices import rows_sharding, shardings
from teal_jax.training.settings import TrainSettings, learning_rates, make_optimizer
from teal_jax.training.sparsity import dropped_shares, moved, with_thresholds

type State = dict[str, Any]
"""`weights`: float32 master; `optimizer`: optax's state; `step`: int32, updates done; `thresholds`: float32
`[layers, 7]` where a plan's are held to their share."""


class Inputs(NamedTuple):
    """What a step reads beside its state and rows, none of it changed.

    Attributes:
      gates: of the model; thresholds in the state take the place of theirs.
      target: float32 `[layers, 7]`, the shares to hold; None without.
      teacher: weights of the dense start model in the compute dtype; None where the loss needs none.
    """

    gates: Any
    target: jax.Array | None = None
    teacher: Any = None


class Program(NamedTuple):
    """`start(weights, thresholds) -> state` and `step(state, inputs, tokens, scored) -> (state, metrics)`, jitted.

    `fresh` is `start`, not jitted, for its shapes; `state_shardings(weights, thresholds)` is where the state lies.
    """

    fresh: Callable[..., State]
    start: Callable[..., State]
    step: Callable[..., tuple[State, dict[str, jax.Array]]]
    state_shardings: Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Losses:
    """The loss of a model of `config` on rows; sums over the scored tokens, so that parts of a batch add up."""

    config: ModelConfig
    settings: TrainSettings

    def __call__(self, weights: Any, inputs: Inputs, tokens: jax.Array, scored: jax.Array) -> tuple[jax.Array, Any]:
        """The summed loss, float32, and the parts of it: cross entropy, divergence, dropped shares `[layers, 7]`.

        weights are the master ones; tokens int32 `[rows, seq_len + 1]`, scored bool `[rows, seq_len]`.
        """
        settings = self.settings
        weights = computed_weights(weights, settings)
        x, dropped = self._hidden(weights, inputs.gates, tokens)

        def head(x: jax.Array, weights: Any, taught: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            logits = self._model(weights).logits(x)
            total = jax.nn.logsumexp(logits, axis=-1)
            # Not by an index, whose derivative scatters into zeros of the size of all logits.
            told = jnp.arange(logits.shape[-1]) == tokens[:, 1:, None]
            entropy = jnp.sum((total - jnp.sum(logits, axis=-1, where=told)) * scored)
            if taught is None:
                return entropy, jnp.zeros(())
            aim = self._model(inputs.teacher).logits(taught)
            normal = jax.nn.logsumexp(aim, axis=-1)
            apart = jnp.sum(jnp.exp(aim - normal[..., None]) * (aim - logits), axis=-1)
            return entropy, jnp.sum((apart - normal + total) * scored)

        taught = None
        if settings.distil > 0:
            taught, _ = self._hidden(inputs.teacher, Dense(), tokens)
            taught = jax.lax.stop_gradient(taught)
        # Logits over a large vocabulary would outweigh all that remat saves.
        entropy, divergence = (jax.checkpoint(head) if settings.remat else head)(x, weights, taught)
        total = divergence if settings.distil == 1 else (1 - settings.distil) * entropy + settings.distil * divergence
        return total, {"entropy": entropy, "divergence": divergence, "dropped": dropped}

    def _model(self, weights: Any) -> Any:
        graphdef, _ = nnx.split(abstract_decoder(self.config))
        return nnx.merge(graphdef, weights)

    def _hidden(self, weights: Any, gates: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        observe = None if isinstance(gates, Dense) else dropped_shares
        library = "cudnn" if self.settings.attention == "cudnn" else None
        x, dropped = self._model(weights).hidden(
            tokens[:, :-1], gates, observe=observe, remat=self.settings.remat, attention=library
        )
        return x, jax.lax.stop_gradient(jnp.stack(dropped)) if dropped else None


def computed_weights(weights: Any, settings: TrainSettings) -> Any:
    """What is multiplied with, from the master weights: of three values if asked for, in the compute dtype."""
    return cast(ternary_weights(weights) if settings.bitnet else weights, settings.dtype)


def cast(weights: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Every leaf in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), weights)


@functools.lru_cache(maxsize=8)
def make_program(config: ModelConfig, settings: TrainSettings, mesh: Mesh, sharded: bool) -> Program:
    """The compiled functions of a training.

    Args:
      config: of the model.
      settings: of the training.
      mesh: see `make_mesh`.
      sharded: weights and optimizer state are shared out over the devices; else each has its own.
    """
    optimizer, losses, rates = make_optimizer(settings), Losses(config, settings), learning_rates(settings)

    def start(weights: Any, thresholds: jax.Array | None) -> State:
        # Copied: a jitted function may hand its argument through, and the state is donated.
        own = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), weights)
        state: State = {"weights": own, "step": jnp.zeros((), jnp.int32)}
        state["optimizer"] = optimizer.init(state["weights"])
        return state if thresholds is None else state | {"thresholds": thresholds}

    def state_shardings(weights: Any, thresholds: Any) -> Any:
        return shardings(mesh, jax.eval_shape(start, weights, thresholds), sharded=sharded)

    def started(weights: Any, thresholds: Any) -> State:
        return jax.jit(start, out_shardings=state_shardings(weights, thresholds))(weights, thresholds)

    def step(state: State, inputs: Inputs, tokens: jax.Array, scored: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        thresholds = state.get("thresholds")
        if thresholds is not None:
            inputs = inputs._replace(gates=with_thresholds(inputs.gates, thresholds))
        slope = jax.value_and_grad(losses, has_aux=True)

        def part(sums: Any, rows: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            (total, parts), gradient = slope(state["weights"], inputs, *rows)
            return jax.tree.map(jnp.add, sums, (total, parts, gradient)), None

        if settings.accumulate == 1:
            (total, parts), gradient = slope(state["weights"], inputs, tokens[0], scored[0])
        else:
            (total, parts), gradient = jax.eval_shape(slope, state["weights"], inputs, tokens[0], scored[0])
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (total, parts, gradient))
            (total, parts, gradient), _ = jax.lax.scan(part, zeros, (tokens, scored))
        count = jnp.maximum(jnp.sum(scored), 1)
        gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["weights"])
        new: State = {
            "weights": optax.apply_updates(state["weights"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
        }
        metrics = {
            "loss": total / count,
            "entropy": parts["entropy"] / count,
            "divergence": parts["divergence"] / count,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(rates(state["step"])),
        }
        if parts["dropped"] is not None:
            dropped = parts["dropped"] / settings.accumulate
            sizes = jnp.asarray(config.projection_sizes, jnp.float32)
            metrics["sparsity"] = jnp.sum(dropped.mean(axis=0) * sizes) / jnp.sum(sizes)
            if thresholds is not None and inputs.target is not None:
                new["thresholds"] = moved(thresholds, dropped, inputs.target)
        # The state goes out as it came in: without this, XLA chooses where it lies.
        return jax.lax.with_sharding_constraint(new, shardings(mesh, new, sharded=sharded)), metrics

    return Program(start, started, jax.jit(step, donate_argnums=0), state_shardings)


def place_rows(mesh: Mesh, accumulate: int, *arrays: Any) -> tuple[jax.Array, ...]:
    """Each array `[batch, n]` as `[accumulate, batch / accumulate, n]`, its rows shared out over the devices."""
    sharding = rows_sharding(mesh)
    return tuple(jax.device_put(array.reshape(accumulate, -1, array.shape[1]), sharding) for array in arrays)

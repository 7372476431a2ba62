"""`bench_decode`: tokens a second of one model shape, dense and under several sparsities, in one run."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.benchmark import run
from teal_jax.benchmark.peer import public
from teal_jax.benchmark.rows import DecodeRow
from teal_jax.benchmark.sharing import greedy_like, uniform
from teal_jax.benchmark.thresholds import Fit, fit_thresholds
from teal_jax.benchmark.timing import DeviceTimer, cupti_timer
from teal_jax.benchmark.traffic import token_bytes
from teal_jax.config import ModelConfig
from teal_jax.errors import ContextError
from teal_jax.model import LanguageModel, Params
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import Dense, Threshold
from teal_jax.quantization.storage import split_quantized
from teal_jax.sparsity.gating import biases_of
from teal_jax.sparsity.plan import model_sparsity

GREEDY_LIKE = 0.5
"""The sparsity at which an uneven plan is measured beside the uniform one, without biases and with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is run.

    Attributes:
      sparsities: targets, each through the sparse path; 0 keeps every channel that is not zero.
      context: tokens in the cache at the end of a run.
      tokens: decoded in a run; the prompt is as long as they leave room for.
      repeats: timed runs.
      seed: of the prompt.
    """

    sparsities: Sequence[float] = (0.0, 0.25, 0.4, 0.5, 0.65)
    context: int = 512
    tokens: int = 128
    repeats: int = 5
    seed: int = 0

    def __post_init__(self):
        if min(self.tokens, self.repeats) < 1 or self.tokens >= self.context:
            raise ContextError(
                f"decoding {self.tokens} tokens needs a longer context than {self.context}, and a repeat or more",
                hint="raise --context or lower --tokens",
            )

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context - self.tokens

    @property
    def lengths(self) -> range:
        """Tokens in the cache before each decoded one."""
        return range(self.prompt, self.context)


class Bench:
    """One model and one start, under which every row is measured; the sparse rows share their compiled programs."""

    def __init__(
        self,
        lm: LanguageModel,
        work: Work,
        bandwidth: float,
        counting_step: run.CountingStep,
        *,
        timer: DeviceTimer = cupti_timer,
    ):
        self.lm, self.work, self.bandwidth = lm, work, bandwidth
        self._counting_step, self._timer = counting_step, timer
        rng = np.random.default_rng(work.seed)
        self._tokens = rng.integers(0, lm.config.vocab_size, (1, work.context), dtype=np.int32)
        self._start = run.prefill(lm, self._tokens[:, : work.prompt], work.context)
        self._loops: dict[type, run.Compiled] = {}
        self._count: run.Compiled | None = None

    def rows(
        self, keep_going: Callable[[str, Exception], None], on_row: Callable[[DecodeRow], None]
    ) -> list[DecodeRow]:
        """All rows, each handed to `on_row` as it comes; one that fails goes to `keep_going` and gets a note."""
        config, found = self.lm.config, []
        todo: list[tuple[str, float | None, np.ndarray | None, bool]] = [("dense", None, None, False)]
        todo += [(sparse_name(target), target, uniform(config, target), False) for target in self.work.sparsities]
        if GREEDY_LIKE in self.work.sparsities:
            name, uneven = f"greedy-like {100 * GREEDY_LIKE:g} %", greedy_like(config, GREEDY_LIKE)
            # The second as a learned plan is: every projection also adds a bias.
            todo += [(name, GREEDY_LIKE, uneven, False), (f"{name}, biases", GREEDY_LIKE, uneven, True)]
        for way, target, sparsity, biases in todo:
            name = way if self.lm.quantization is None else f"{self.lm.quantization}, {way}"
            try:
                row = self.dense(name) if sparsity is None else self.sparse(name, target, sparsity, biases=biases)
            except Exception as error:
                # A kernel that fails at one sparsity must not cost the rows that device time was spent on.
                keep_going(name, error)
                row = DecodeRow(name=name, quantization=self.lm.quantization, target=target, note=first_line(error))
            found.append(row)
            on_row(row)
        return found

    def dense(self, name: str) -> DecodeRow:
        """The row of the dense model."""
        return self._measure(name, {"weights": self.lm.params["weights"], "gates": Dense()}, None, 0.0)

    def sparse(self, name: str, target: float | None, sparsity: np.ndarray, *, biases: bool = False) -> DecodeRow:
        """The row under `sparsity [layers, 7]`: thresholds fitted, corrected by the counts of the run itself.

        `biases`: every projection adds one: zeros, which cost what others do and leave the tokens as they were.
        """
        fit = fit_thresholds(self.lm, self._tokens, sparsity, self.work.prompt)
        realised, last = self._realised(fit)
        better = fit.corrected(realised)
        corrected = bool((better.thresholds != fit.thresholds).any())
        if corrected:
            realised, last = self._realised(better)
        share = model_sparsity(self.lm.config, realised)
        params = self._params(better)
        if biases:
            params |= {"gates": Biased(params["gates"], biases_of({}, self.lm.config))}
        row = self._measure(name, params, target, share, last)
        return dataclasses.replace(row, thresholds_corrected=corrected)

    def _params(self, fit: Fit) -> Params:
        return {"weights": self.lm.params["weights"], "gates": Threshold(jnp.asarray(fit.thresholds, jnp.float32))}

    def _realised(self, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
        params = self._params(fit)
        if self._count is None:
            self._count = run.compile_count(self._counting_step, params, self._start, self.work.tokens)
        return run.count_rows(self._count, self.lm.config, params, self._start, self.work.tokens)

    def _measure(
        self, name: str, params: Params, target: float | None, realised: float, last: np.ndarray | None = None
    ) -> DecodeRow:
        kind, tokens = type(params["gates"]), self.work.tokens
        compiled_now = kind not in self._loops
        if compiled_now:
            self._loops[kind] = run.compile_loop(self.lm.decode_step, params, self._start, tokens)
        loop = self._loops[kind]
        speed = run.time_loop(loop, params, self._start, tokens, self.work.repeats, compiled_now=compiled_now)
        notes = []
        if last is not None and (last != speed.last).any():
            notes.append("the counted run decoded other tokens than the timed one")
        if target is not None and abs(realised - target) > 0.01:
            notes.append("realised sparsity is more than a point off its target")
        kernels: dict[str, list[float]] = {}
        try:
            kernels = run.profile(self._timer, loop, params, self._start, tokens)
        except Exception as error:
            # The wall time stands without a profile.
            notes.append(f"no profile: {first_line(error)}")
        itemsize = self.lm.dtype.itemsize
        formats = split_quantized(self.lm.params["weights"])[1]
        read = token_bytes(self.lm.config, itemsize, realised, self.work.lengths, formats)
        if isinstance(params["gates"], Biased):
            read += sum(bias.nbytes for bias in jax.tree.leaves(params["gates"].bias))
        return DecodeRow(
            name=name,
            quantization=self.lm.quantization,
            target=target,
            realised=realised,
            tokens_per_second=1 / speed.seconds,
            ms_per_token=1e3 * speed.seconds,
            repeats=[1 / seconds for seconds in speed.repeats],
            bytes_per_token=read,
            bandwidth_share=read / speed.seconds / self.bandwidth,
            kernels_per_token=sum(count for count, _ in kernels.values()) or None,
            kernel_ms=1e3 * sum(seconds for _, seconds in kernels.values()) or None,
            memory_bytes=loop.memory_bytes,
            first_token_s=speed.first_token,
            kernels={kernel: [count, 1e3 * seconds] for kernel, (count, seconds) in kernels.items()},
            note="; ".join(notes),
        )


def sparse_name(target: float) -> str:
    """Of a uniform row; 0 is the sparse path that keeps every channel."""
    return f"sparse {100 * target:g} %" if target else "sparse path, 0 %"


def first_line(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return public(f"{type(error).__name__}: {error}")


def fused_counting_step(config: ModelConfig) -> run.CountingStep:
    """The step of the GPU kernels, with their own counts of kept rows."""
    from teal_jax.nn.fused_step import counting_step

    def step(params: Params, token: jax.Array, cache: Any) -> Any:
        return counting_step(config, params["weights"], params["gates"], token, cache)

    return step

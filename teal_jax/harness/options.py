"""The harness's generation options as a sampler, stop strings and a length."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from teal_jax.decode.sampling import Greedy, Sampler, Sampling

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What the harness and its tasks call the most tokens to generate; the first one given counts."""


class Options(NamedTuple):
    """How a prompt is continued: hashable, so that requests are grouped by it."""

    sampler: Sampler
    stop: tuple[str, ...]
    max_new_tokens: int


def read_options(options: Mapping[str, Any], default_length: int = 256) -> Options:
    """The harness's generation options of a request.

    `until` (a text or several; empty ones are left out), a length under any of `LENGTH_NAMES`, `do_sample`,
    `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`. Greedy unless `do_sample` is true or, where it is
    not given, the temperature is above 0. What is not known is ignored with a warning.
    """
    left = dict(options)
    until = left.pop("until", None) or ()
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    lengths = [left.pop(name, None) for name in LENGTH_NAMES]
    length = int(next((value for value in lengths if value is not None), default_length))
    penalty = float(left.pop("repetition_penalty", None) or 1.0)
    temperature, do_sample = left.pop("temperature", None), left.pop("do_sample", None)
    top_k, top_p, min_p = (left.pop(name, None) for name in ("top_k", "top_p", "min_p"))
    if do_sample if do_sample is not None else (temperature or 0) > 0:
        sampler: Sampler = Sampling(
            temperature=1.0 if temperature is None else float(temperature),
            top_k=int(top_k) if top_k and top_k > 0 else None,  # 0 and -1 mean none elsewhere
            top_p=float(top_p) if top_p else None,
            min_p=float(min_p) if min_p else None,
            repetition_penalty=penalty,
        )
    else:
        sampler = Greedy(repetition_penalty=penalty)
    unknown = sorted(name for name, value in left.items() if value is not None)
    if unknown:
        warnings.warn(f"generation options that are not known here are ignored: {', '.join(unknown)}", stacklevel=2)
    return Options(sampler, stop, length)

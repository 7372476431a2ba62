"""Generation requests through the decoder, in batches of like length."""

from collections.abc import Callable, Sequence

from teal_jax.decode.generation import Generation, generate
from teal_jax.harness.options import Options
from teal_jax.model import LanguageModel

BATCH = 8
"""Prompts decoded at a time unless told otherwise: as many as the GPU kernels take."""


def prompt_room(max_length: int, max_new_tokens: int) -> int:
    """Positions that a prompt may take: what the answer leaves, and at least half."""
    return max(1, max_length // 2, max_length - max_new_tokens)


def generate_batches(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Options],
    *,
    max_length: int,
    batch_size: int | None = None,
    seed: int = 0,
    done: Callable[[int, Generation], None] = lambda i, generation: None,
) -> list[Generation]:
    """Continue each prompt under its options with the decoder: the prompt read dense, the answer under the gates.

    Requests of the same options are batched, the longest prompts first. Request i draws with `seed + i`, whatever
    its batch.

    Args:
      lm: the model, with a tokenizer.
      prompts: tokens, each at most `prompt_room` long.
      options: one for each prompt.
      max_length: positions that prompt and answer share.
      batch_size: prompts at a time; None: 8.
      seed: for sampling.
      done: called with the index and the generation of each request as it ends.
    """
    groups: dict[Options, list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        groups.setdefault(options[i], []).append(i)
    result: dict[int, Generation] = {}
    size = batch_size or BATCH
    for option, members in groups.items():
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            answers = generate(
                lm,
                [list(prompts[i]) for i in batch],
                max_new_tokens=option.max_new_tokens,
                sampler=option.sampler,
                seed=[(seed + i) % 2**32 for i in batch],
                stop=option.stop,
                max_len=max_length if max_length < lm.config.max_position else None,
            )
            assert isinstance(answers, list)
            for i, answer in zip(batch, answers, strict=True):
                result[i] = answer
                done(i, answer)
    return [result[i] for i in range(len(prompts))]

"""How much is measured, and how."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What a sweep measures beside the likelihood of the text, and how its numbers are read.

    Attributes:
      prompts: taken from the text and continued; 0 leaves out what needs generated text.
      prompt_tokens: length of a prompt. new_tokens: the most tokens of a continuation.
      temperature: of the sampled continuations; there are greedy ones, too.
      ngram: length of the token sequences whose repetition is counted.
      confidence: of the intervals. resamples: bootstrap draws behind them.
      tolerance: how far the realised sparsity may be from the target before the report says so.
      seed: of the sampled continuations and of the bootstrap.
    """

    prompts: int = 24
    prompt_tokens: int = 32
    new_tokens: int = 96
    temperature: float = 0.8
    ngram: int = 4
    confidence: float = 0.95
    resamples: int = 2000
    tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self):
        for name, least in (("prompts", 0), ("prompt_tokens", 2), ("new_tokens", 2), ("ngram", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}")
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must lie in [0, 1], got {self.tolerance}")

    def of_cells(self) -> dict[str, Any]:
        """What decides the measurements themselves; the rest only decides how they are read."""
        names = ("prompts", "prompt_tokens", "new_tokens", "temperature", "ngram", "seed")
        return {name: getattr(self, name) for name in names}

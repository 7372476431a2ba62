"""All cells of a sweep, in order, each kept as it is done and taken from the directory where it is there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from teal_jax.errors import SparsityError
from teal_jax.evaluation.cell import DENSE, Cell, Shared, measure
from teal_jax.evaluation.generated import Prompted, choose_prompts, continue_prompts
from teal_jax.evaluation.run_directory import RunDirectory, read_json, write_json
from teal_jax.evaluation.settings import EvaluationSettings
from teal_jax.evaluation.text import EvaluationText
from teal_jax.model import LanguageModel


class Failure(NamedTuple):
    """A method that has no plan for a target, and why."""

    method: str
    target: float
    reason: str


def sweep(
    lm: LanguageModel,
    text: EvaluationText,
    *,
    methods: Sequence[str],
    targets: Sequence[float],
    sparsify: Callable[[str, float], LanguageModel],
    directory: RunDirectory,
    settings: EvaluationSettings,
    measured: bool = False,
    progress: bool = True,
) -> tuple[list[Cell], list[Failure], Prompted]:
    """Measure the dense model, and every method at every target above 0.

    Args:
      lm: the model; its gates are ignored.
      text: what is scored.
      methods, targets: which cells. Cells of others that the directory holds stay as they are.
      sparsify: `(method, target)` to the model under that plan; only called for what is not measured yet.
      directory: where cells are kept.
      settings: how much is measured.
      measured: take no method's cells but those that the directory holds.
      progress: draw bars.

    Returns:
      The cells, dense first, then by target and method; what could not be planned; the prompts.
    """
    dense = lm.dense()
    prompted = _prompted(dense, text, directory, settings, progress)
    wanted = [(DENSE, 0.0)] + [(method, target) for target in sorted(targets) if target > 0 for method in methods]
    shared = Shared.of(dense, text, prompted, settings)
    cells, failures = [], []
    for method, target in wanted:
        cell = directory.cell(method, target)
        if cell is None and measured and method != DENSE:
            continue
        if cell is None:
            try:
                sparse = dense if method == DENSE else sparsify(method, target)
            except SparsityError as error:
                failures.append(Failure(method, target, error.message))
                continue
            cell = measure(method, target, sparse, shared, progress=progress)
            directory.keep(cell)
        cells.append(cell)
    return cells, failures, prompted


def _prompted(
    dense: LanguageModel, text: EvaluationText, directory: RunDirectory, settings: EvaluationSettings, progress: bool
) -> Prompted:
    """The prompts and what the dense model makes of them; kept, so that all cells are measured on the same text."""
    file = directory.path / "prompts.json"
    if file.exists():
        return Prompted(**read_json(file))
    length = min(settings.prompt_tokens, dense.config.max_position // 2)
    prompts = choose_prompts(text, dense.config.bos_token_id, count=settings.prompts, length=length)
    told = continue_prompts(
        dense, prompts, new_tokens=settings.new_tokens, description="dense: generating", progress=progress
    )
    prompted = Prompted(prompts, told)
    write_json(file, {"prompts": prompted.prompts, "dense": prompted.dense})
    return prompted

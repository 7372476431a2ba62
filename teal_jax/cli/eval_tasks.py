"""`teal eval --tasks`: lm-evaluation-harness tasks, on the dense model and on every method and target of the sweep."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teal_jax.harness.results import TaskResults
    from teal_jax.model import LanguageModel


def parse_tasks(text: str) -> list[str]:
    """`"piqa,gsm8k"` as names or .yaml files, in order and without repeats; `"default"` is the library's choice.

    Raises:
      TealError: lm-eval is not installed: said before anything is measured.
    """
    from teal_jax.harness.extra import require_lm_eval
    from teal_jax.harness.tasks import DEFAULT_TASKS

    require_lm_eval()
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("tasks must name at least one task, or be default, got none")
    return list(dict.fromkeys(name for given in names for name in (DEFAULT_TASKS if given == "default" else [given])))


def score_tasks(
    models: Iterable[tuple[str, float, "Callable[[], LanguageModel]"]],
    tasks: Sequence[str],
    directory: Path,
    *,
    limit: int | None,
    progress: bool,
) -> "list[TaskResults]":
    """One result a model; each is kept in `directory` as it is done, and not measured again for the same tasks.

    Args:
      models: method, target, and how to get the model.
      tasks: see `parse_tasks`.
      directory: of the sweep.
      limit: documents a task; None: all.
      progress: draw bars.
    """
    from teal_jax.evaluation.run_directory import digest, read_json, write_json
    from teal_jax.harness.results import TaskResults
    from teal_jax.harness.tasks import run_tasks

    found = []
    for method, target, model in models:
        file = directory / "tasks" / f"{method}-{target:g}-{digest([list(tasks), limit])}.json"
        if file.exists():
            found.append(TaskResults.from_dict(read_json(file)))
            continue
        found.append(run_tasks(model(), tasks, limit=limit, progress=progress))
        write_json(file, found[-1].as_dict())
    return found


def show_tasks(runs: "Sequence[TaskResults]") -> tuple[dict[str, Any], list[Any]]:
    """What the command adds to its result: values for JSON, and a table."""
    from teal_jax.harness.results import task_table

    shown = [task_table(runs, title="Tasks of lm-evaluation-harness"), runs[0].scoring]
    return {"tasks": [run.as_dict() for run in runs]}, shown

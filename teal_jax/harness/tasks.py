"""`run_tasks`: the harness's tasks on a model, and which are run by default."""

import difflib
import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import teal_jax
from teal_jax.errors import DataError, TealError
from teal_jax.harness.extra import require_lm_eval
from teal_jax.harness.results import TaskResults, read_scores
from teal_jax.model import LanguageModel

DEFAULT_TASKS = ("arc_challenge", "hellaswag", "piqa", "wikitext", "triviaqa", "gsm8k")
"""Choices between endings of several tokens, running text, and text that the model must write itself.

Sparsity shows last where one answer need only beat others, and first in what is generated (reasoning above all), so
that the first kind alone would flatter it. Tasks whose answer is one letter, such as MMLU, are not among them: the
dense context alone predicts it.
"""


def run_tasks(
    lm: LanguageModel,
    tasks: Sequence[str | Path | dict[str, Any]] = DEFAULT_TASKS,
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    sparse_prefill: bool = False,
    dense_prefix: float | int = 0,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    apply_chat_template: bool = False,
    include_path: str | Path | None = None,
    bootstrap_iters: int = 1000,
    seed: int = 1234,
    progress: bool = True,
) -> TaskResults:
    """Run tasks of lm-evaluation-harness on a model, dense or sparse.

    Log-likelihoods are scored and texts generated as the decoder has them: contexts and prompts dense, continuations
    through the gates; of a rolling log-likelihood every token passes them.

    Args:
      lm: the model, with a tokenizer.
      tasks: names of the harness's tasks, groups and tags; files of tasks (.yaml); or their configs.
      limit: documents a task (int) or a share of them (float < 1); for trying out.
      num_fewshot: examples before each document; None: as each task has it.
      batch_size: see `TealLM`, as for the next four.
      sparse_prefill: let the gates act on the contexts of scored requests, too.
      dense_prefix: leading tokens of a scored text left dense.
      max_length: tokens of a request; None: the model's positions.
      max_gen_toks: tokens to generate where a task does not say.
      apply_chat_template: put prompts into the model's chat template.
      include_path: folder of further tasks that can be named.
      bootstrap_iters: draws for the standard errors that have no formula; 0 for none.
      seed: of examples, sampling and bootstrap; the default is the harness's, so that its examples are drawn.
      progress: draw bars.

    Returns:
      A `TaskResults`.

    Raises:
      TealError: lm-eval is not installed, the model has no tokenizer, or there is no such task.
      DataError: the documents of a task cannot be had.
    """
    require_lm_eval()
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate

    from teal_jax.harness.adapter import TealLM

    specs = [_spec(task) for task in ([tasks] if isinstance(tasks, str | Path | dict) else tasks)]
    if not specs:
        raise ValueError("tasks must name at least one task, got none")
    named = [spec for spec in specs if isinstance(spec, str) and not spec.endswith(".yaml")]
    manager = _task_manager(None if include_path is None else str(Path(include_path).resolve()), bool(named))
    _check_names(named, manager)
    model = TealLM(
        lm,
        sparse_prefill=sparse_prefill,
        dense_prefix=dense_prefix,
        batch_size=batch_size,
        max_length=max_length,
        max_gen_toks=max_gen_toks,
        seed=seed,
        progress=progress,
    )
    try:
        results = simple_evaluate(
            model=model,
            tasks=specs,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            # An argument of the harness that it only takes together with a template.
            fewshot_as_multiturn=apply_chat_template,
            bootstrap_iters=bootstrap_iters,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError, DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"cannot get the documents of {', '.join(map(str, named or specs))}: {reason[0]}",
            hint="fetch them once with network access, or name tasks whose documents are on this machine",
        ) from error
    info = model.get_model_info()
    return TaskResults(
        model=lm.name,
        target_sparsity=info["target_sparsity"],
        realised_sparsity=info["realised_sparsity"],
        method=info["allocation"],
        scoring=info["scoring"],
        scores=read_scores(results),
        limit=limit,
        seed=seed,
        versions={
            "teal_jax": teal_jax.__version__,
            "jax": info["jax_version"],
            "lm_eval": importlib.metadata.version("lm_eval"),
        },
    )


def _spec(task: str | Path | dict[str, Any]) -> str | dict[str, Any]:
    """What the harness takes: a name, the absolute path of a file, a config."""
    if isinstance(task, dict):
        return task
    if not str(task).endswith(".yaml"):
        return str(task)
    path = Path(task).expanduser().resolve()
    if not path.is_file():
        raise TealError(f"no task file at {path}", hint="give a .yaml file of a task, or the name of one of lm-eval's")
    return str(path)


@functools.cache
def _task_manager(include_path: str | None, built_in: bool) -> Any:
    """The harness's index of tasks; kept, since reading some thousands of files takes it a while."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=built_in)


def _check_names(names: Sequence[str], manager: Any) -> None:
    """Raise `TealError` for the first name that is no task, group or tag."""
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them all"
            raise TealError(f"lm-eval has no task called {name!r}", hint=hint)

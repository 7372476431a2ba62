"""What `--model_args` name, made into a model and a batch size."""

from pathlib import Path
from typing import Any

from teal_jax.loading import load, load_and_sparsify
from teal_jax.model import LanguageModel
from teal_jax.sparsity.plan import SparsityPlan


def open_model(
    pretrained: str | Path | LanguageModel, sparsity: float | None, sparsifying: dict[str, Any], **loading: Any
) -> LanguageModel:
    """The model named, under the sparsity asked for.

    Args:
      pretrained: what `teal_jax.load` takes, or a loaded model.
      sparsity: target in [0, 1); 0 is dense, None is the sparsity of the plan given, or what it was saved with.
      sparsifying: arguments of `load_and_sparsify`; those that are None are left to it.
      **loading: arguments of `load`.

    Raises:
      ValueError: a sparsity or a plan for a loaded model, which comes with its own.
    """
    plan = sparsifying.get("plan")
    if isinstance(pretrained, LanguageModel):
        if sparsity is not None or plan is not None:
            raise ValueError("a loaded model comes with its sparsity: call its sparsify(plan) or dense() instead")
        return pretrained
    if sparsity or (sparsity is not None and plan is not None):
        given = {name: value for name, value in sparsifying.items() if value is not None}
        return load_and_sparsify(pretrained, float(sparsity), **given, **loading)
    lm = load(pretrained, **loading)
    if plan is not None:
        return lm.sparsify(SparsityPlan.load(plan))
    return lm if sparsity is None else lm.dense()


def read_batch_size(value: int | str) -> int | None:
    """None for "auto" (also "auto:4", as the harness has it), else a whole number >= 1; raises `ValueError`."""
    text = str(value)
    if text.split(":")[0] == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f'batch_size must be a whole number >= 1 or "auto", got {value!r}')
    return int(text)

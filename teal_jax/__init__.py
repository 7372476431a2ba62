"""Training-free activation sparsity for Llama- and Mistral-family models, in JAX.

>>> import teal_jax
>>> fast = teal_jax.load_and_sparsify("embedded", 0.4, num_tokens=2048)  # a minute on two CPU cores
>>> print(teal_jax.generate(fast, "Once upon a time"))

Names are imported on first use, so that `import teal_jax` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teal_jax.config import ModelConfig as ModelConfig
    from teal_jax.decode.chat import Chat as Chat
    from teal_jax.decode.generation import generate as generate
    from teal_jax.decode.generation import stream as stream
    from teal_jax.decode.sampling import Greedy as Greedy
    from teal_jax.decode.sampling import Sampling as Sampling
    from teal_jax.errors import TealError as TealError
    from teal_jax.loading import load as load
    from teal_jax.loading import load_and_sparsify as load_and_sparsify
    from teal_jax.model import LanguageModel as LanguageModel
    from teal_jax.model import random_model as random_model
    from teal_jax.quantization.driver import quantize as quantize
    from teal_jax.scoring import perplexity as perplexity
    from teal_jax.sparsity.allocation import allocate as allocate
    from teal_jax.sparsity.calibration import calibrate as calibrate
    from teal_jax.sparsity.greedy import GreedySettings as GreedySettings
    from teal_jax.sparsity.plan import SparsityPlan as SparsityPlan
    from teal_jax.sparsity.statistics import Calibration as Calibration
    from teal_jax.training.loop import train as train
    from teal_jax.training.settings import TrainSettings as TrainSettings

__version__ = "0.1.0"

_HOME = {
    "Calibration": "sparsity.statistics",
    "Chat": "decode.chat",
    "Greedy": "decode.sampling",
    "GreedySettings": "sparsity.greedy",
    "LanguageModel": "model",
    "ModelConfig": "config",
    "Sampling": "decode.sampling",
    "SparsityPlan": "sparsity.plan",
    "TealError": "errors",
    "TrainSettings": "training.settings",
    "allocate": "sparsity.allocation",
    "calibrate": "sparsity.calibration",
    "generate": "decode.generation",
    "load": "loading",
    "load_and_sparsify": "loading",
    "perplexity": "scoring",
    "quantize": "quantization.driver",
    "random_model": "model",
    "stream": "decode.generation",
    "train": "training.loop",
}
"""Public names and the modules they live in."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'teal_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"teal_jax.{_HOME[name]}"), name)
    # Kept, so that the next access does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""The optional extra `eval`: whether lm-eval is there."""

import importlib.util

from teal_jax.errors import TealError


def require_lm_eval() -> None:
    """Return if lm-eval can be imported; raises `TealError` that names the extra if it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TealError("lm-eval is not installed", hint="pip install 'teal-jax[eval]'")

"""The small model shipped with the package, and texts of its own: `teal_jax.load("embedded")`. See README.md here."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
"""HF layout: config.json, model.safetensors, tokenizer.json."""

CALIBRATION_TEXT = DIRECTORY / "calibration.txt"
"""Stories to calibrate on, separated by <|endoftext|>."""

HELDOUT_TEXT = DIRECTORY / "heldout.txt"
"""Other stories, to evaluate on."""


def path() -> Path:
    """The model's directory."""
    return DIRECTORY

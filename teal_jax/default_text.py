"""The calibration text when the user gives none: Alpaca, as in the paper, or the bundled stories out of its reach."""

import warnings
from pathlib import Path

from teal_jax.data import Documents, read_documents
from teal_jax.embedded import CALIBRATION_TEXT
from teal_jax.hub import EMBEDDED

ALPACA = "tatsu-lab/alpaca"


def default_documents(model: str) -> Documents:
    """Calibration text for the model of that name.

    The embedded model takes the stories that come with it. Any other takes Alpaca; out of the hub's reach it falls
    back to those stories, with a warning that says so.
    """
    if model == EMBEDDED:
        return _bundled()
    try:
        return Documents(_alpaca(), ALPACA)
    except Exception as error:  # the hub raises a dozen kinds; each means the same here
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}"
        warnings.warn(
            f"calibrating on the bundled children's stories: {ALPACA} is not reachable ({reason}). "
            "Thresholds fit best on text like yours: pass data= or --data",
            stacklevel=4,
        )
    return _bundled()


def _bundled() -> Documents:
    return read_documents(CALIBRATION_TEXT)._replace(source="bundled stories")


def _alpaca() -> list[str]:
    import pyarrow.parquet as parquet
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(ALPACA, repo_type="dataset", allow_patterns=["data/*.parquet"]))
    files = sorted(folder.glob("data/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{ALPACA} holds no parquet file")
    return parquet.read_table(files[0], columns=["text"])["text"].to_pylist()

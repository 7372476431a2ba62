"""`python -m teal_jax.harness`: the command line of lm-eval, with `--model teal_jax` in it.

For an lm-eval that does not read entry points: 0.4.13, the newest release, and older.
"""

import sys

from teal_jax.errors import TealError
from teal_jax.harness.extra import require_lm_eval


def main() -> None:
    """Run lm-eval's command line; an error of this library's is one line and exit code 3."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import teal_jax.harness.adapter  # noqa: F401

        cli_evaluate()
    except TealError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3) from error


if __name__ == "__main__":
    main()

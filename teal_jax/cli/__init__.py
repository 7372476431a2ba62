"""The command line, `teal`: one module a command, each importing what is slow only when it runs."""

import os
import sys

import typer

from teal_jax.cli import (
    allocate,
    analyse,
    bench,
    calibrate,
    chat,
    convert,
    demo,
    doctor,
    eval,
    generate,
    inspect,
    sparsify,
    train,
)
from teal_jax.cli.options import examples

app = typer.Typer(
    name="teal",
    help="Activation sparsity for Llama and Mistral models: import, calibrate, sparsify, compare, talk.",
    epilog=examples(
        "teal demo",
        "teal sparsify mistral-7b --sparsity 0.4 -o mistral-40",
        "teal chat mistral-40",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for module in (demo, convert, calibrate, allocate, sparsify, inspect, generate, chat, eval, analyse, train, doctor):
    app.command(module.__name__.rpartition(".")[2], epilog=module.EPILOG)(module.command)
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from teal_jax import __version__

        print(f"teal-jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Run `teal` on the process's arguments; exit codes: 0 ok, 2 usage, 3 model, plan or data error, 130 Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:
        # Before a command's own handling began, or after it ended.
        sys.exit(130)
    except BrokenPipeError:
        # Python would complain again as it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)

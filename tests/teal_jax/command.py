"""`teal` as users run it, in this process."""

from typer.testing import CliRunner, Result

from teal_jax.cli import app


def teal(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def ok(run: Result) -> Result:
    assert run.exit_code == 0, run.output + repr(run.exception)
    return run

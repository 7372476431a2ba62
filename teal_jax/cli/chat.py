"""`teal chat`: a conversation in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal_jax.cli import sampling_options as sampling
from teal_jax.cli.models import Sparsifier, choose
from teal_jax.cli.options import Debug, Dtype, MaybeTarget, Model, Offline, Quiet, Revision, Seed, examples
from teal_jax.cli.session import Session
from teal_jax.errors import TealError

if TYPE_CHECKING:
    from teal_jax.decode.chat import Chat

EPILOG = examples(
    "teal chat mistral-40",
    "teal chat mistral-7b-instruct --sparsity 0.4 --system 'You are terse.' --temp 0.7",
    "in the chat: /sparsity 0.5   /stats   /reset   /exit",
)

HELP = "/reset forgets the conversation, /stats shows the last turn, /sparsity X changes the sparsity, /exit leaves"


def command(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    sparsity: MaybeTarget = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE.json", help="A plan from teal allocate.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")] = 512,
    temp: sampling.Temperature = 0.7,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = 0.95,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.Penalty = 1.0,
    stop: sampling.Stop = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a model; its kv_cache is kept between turns. A base model continues a story with you."""
    if sparsity is not None and plan is not None:
        raise typer.BadParameter("give --sparsity or --plan, not both")
    with Session(quiet=quiet, debug=debug, offline=offline) as session:
        from teal_jax.decode.chat import Chat

        sampler = sampling.make_sampler(temp, top_k, top_p, min_p, repetition_penalty)
        lm, sparsifier = choose(session, model, sparsity, plan, dtype=dtype, revision=revision)
        talk = Chat(lm, system, sampler=sampler, seed=seed, max_new_tokens=max_tokens, stop=stop or ())
        kind = "" if talk.has_template else " (no chat template: it continues a story that you both write)"
        session.note(f"{lm.name}, {_state(talk)}{kind}\n{HELP}")
        _converse(session, talk, sparsifier)


def _converse(session: Session, talk: "Chat", sparsifier: Sparsifier) -> None:
    """Lines from stdin until /exit or its end."""
    while True:
        try:
            line = _read()
        except EOFError:
            return
        try:
            if line.startswith("/"):
                if _obey(session, talk, sparsifier, line.split()):
                    return
            elif line:
                _answer(session, talk, line)
        except TealError as error:
            # A turn that failed does not end the conversation.
            session.note(f"error: {error}", asked=True)


def _answer(session: Session, talk: "Chat", line: str) -> None:
    try:
        for piece in talk.send(line):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        session.note("\nbroken off", asked=True)
        return
    print(flush=True)


def _obey(session: Session, talk: "Chat", sparsifier: Sparsifier, words: list[str]) -> bool:
    """Obey a command; True if the conversation is over."""
    match words:
        case ["/exit"] | ["/quit"]:
            return True
        case ["/reset"]:
            talk.reset()
            session.note("forgotten", asked=True)
        case ["/stats"]:
            stats = talk.stats
            session.note(
                f"{_state(talk)}; turn {stats.turns}: {stats.prefilled_tokens} tokens read, {stats.generated_tokens} "
                f"written at {stats.tokens_per_second:.1f} tok/s; context {stats.context_used} of {stats.context_size}",
                asked=True,
            )
        case ["/sparsity", value] if _share(value) is not None:
            # What is in the kv_cache stays: it was computed under the old sparsity, as the text was.
            talk.lm = sparsifier(float(value))
            session.note(_state(talk), asked=True)
        case ["/sparsity", *_]:
            session.note("usage: /sparsity 0.4, a number in [0, 1)", asked=True)
        case _:
            session.note(HELP, asked=True)
    return False


def _share(text: str) -> float | None:
    try:
        return float(text) if 0 <= float(text) < 1 else None
    except ValueError:
        return None


def _state(talk: "Chat") -> str:
    plan = talk.lm.plan
    return f"{100 * plan.target:.3g} % sparse ({plan.method})" if plan else "dense"


def _read() -> str:
    import sys

    if not sys.stdin.isatty():
        return input().strip()
    import contextlib

    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    return input("> ").strip()

"""`teal generate`: continue a prompt."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from teal_jax.cli import sampling_options as sampling
from teal_jax.cli.models import choose
from teal_jax.cli.options import Debug, Dtype, Json, MaybeTarget, Model, Offline, Quiet, Revision, Seed, examples
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal generate embedded -p 'Once upon a time'",
    "teal generate mistral-40 -p 'The capital of France' --temp 0.8 --top-p 0.95 --seed 7",
    "echo 'Explain rope.' | teal generate mistral-7b-instruct -p - --chat --sparsity 0.4",
)


def command(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", show_default=False, help="- reads stdin.")],
    sparsity: MaybeTarget = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE.json", help="A plan from teal allocate.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most new tokens.")] = 128,
    temp: sampling.Temperature = 0.0,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.Penalty = 1.0,
    stop: sampling.Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message: apply the chat template.")] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, streaming the text to stdout."""
    if sparsity is not None and plan is not None:
        raise typer.BadParameter("give --sparsity or --plan, not both")
    if temp == 0 and not (top_k is None and top_p is None and min_p is None):
        raise typer.BadParameter("--top-k, --top-p and --min-p choose among random tokens: give a --temp above 0")
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.decode.generation import stream_pieces

        sampler = sampling.make_sampler(temp, top_k, top_p, min_p, repetition_penalty)
        text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
        lm, _ = choose(session, model, sparsity, plan, dtype=dtype, revision=revision)
        pieces = stream_pieces(
            lm, text, max_new_tokens=max_tokens, sampler=sampler, seed=seed, stop=stop or (), chat=chat
        )
        answer, tokens, piece = "", [], None
        for piece in pieces:
            answer += piece.text
            tokens += piece.tokens
            if not as_json:
                print(piece.text, end="", flush=True)
        if not as_json:
            print()
        assert piece is not None
        values = {
            "model": lm.name,
            "sparsity": lm.plan.target if lm.plan else 0.0,
            "prompt": text,
            "text": answer,
            "tokens": tokens,
            "finish_reason": piece.finish_reason,
            "tokens_per_second": piece.tokens_per_second,
        }
        session.result(values)
        sparse = f"{100 * lm.plan.target:.3g} % sparse" if lm.plan else "dense"
        session.note(
            f"{lm.name}, {sparse}: {len(tokens)} tokens, {piece.tokens_per_second:.1f} tok/s ({piece.finish_reason})"
        )

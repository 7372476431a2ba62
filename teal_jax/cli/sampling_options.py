"""Options of generation, shared by generate and chat."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from teal_jax.decode.sampling import Sampler

Temperature = Annotated[
    float, typer.Option("--temp", "-t", min=0, help="0 always takes the likeliest token; higher is more random.")
]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Only the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Only the likeliest tokens that make up this share.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", min=0, max=1, help="Only tokens this likely, relative to the likeliest.")
]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: tokens used before are less likely.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends the text; may be repeated.")]


def make_sampler(temp: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float) -> "Sampler":
    """The sampler that the options describe; a usage error for a value out of range."""
    from teal_jax.decode.sampling import Greedy, Sampling

    try:
        # Checked at temperature 0 too, where it says nothing.
        sampling = Sampling(temperature=temp or 1.0, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
        return sampling if temp else Greedy(repetition_penalty=penalty)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

"""`teal train`: a model trained with sparsity in its forward pass, or without."""

import contextlib
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_jax.cli.models import check_texts, open_model
from teal_jax.cli.options import Debug, Json, Offline, Quiet, Revision, Seed, examples
from teal_jax.cli.session import Session

if TYPE_CHECKING:
    from teal_jax.model import LanguageModel
    from teal_jax.training.loop import Trained

EPILOG = examples(
    "teal train embedded --data stories.txt --eval-data held-out.txt --top-k 0.6 -o run",
    "teal train config.json --scratch --tokenizer embedded --data stories.txt --top-k 0.6 --bitnet -o run",
    "teal train mistral-7b --data pairs.jsonl --lr 1e-5 --remat --fully-sharded -o tuned",
    "teal train stories3M --data sampled.jsonl --plan plan.json --distil 1 --lr 1e-3 -o recovered",
    "then: teal chat run/model, or: teal convert run/model -o hf --to hf",
)


class Schedule(enum.StrEnum):
    """Courses of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class AttentionLibrary(enum.StrEnum):
    """What computes attention in training."""

    xla = "xla"
    cudnn = "cudnn"


class Compute(enum.StrEnum):
    """Dtypes of products and activations."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="Alias, hub id, HF directory or artifact to go on from; with --scratch a shape or a config.json.",
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            show_default=False,
            help='Text (.txt, .jsonl), or .jsonl of "prompt" and "answer", whose loss is on the answers; may be '
            "repeated. Or one .tokens file.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Directory of the run.")
    ],
    scratch: Annotated[bool, typer.Option("--scratch", help="Begin with random weights.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="MODEL", help="With --scratch: whose tokenizer to take.")
    ] = None,
    top_k: Annotated[
        str | None,
        typer.Option(
            "--top-k",
            metavar="K",
            help="Q-Sparse: share of input channels kept, in (0, 1]: 0.6 is 40 % sparsity. By site or projection: "
            "attn_in=0.6,down=0.4.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Train under this plan: recovers what it costs.")
    ] = None,
    block: Annotated[
        str | None,
        typer.Option("--block", metavar="N:M", help="Block Q-Sparse: N of every M neighbouring channels, as 16:32."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Q-Sparse in eight bits: activations are quantised before top-K.")
    ] = False,
    bitnet: Annotated[bool, typer.Option("--bitnet", help="BitNet b1.58: weights of three values.")] = False,
    distil: Annotated[
        float, typer.Option("--distil", min=0, max=1, help="Weight of the divergence from the dense start model.")
    ] = 0.0,
    eval_data: Annotated[
        Path | None,
        typer.Option("--eval-data", metavar="FILE", help="Text to score as the training goes: held_out.csv, loss.png."),
    ] = None,
    eval_every: Annotated[int, typer.Option("--eval-every", min=1, help="Steps between two scores.")] = 100,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows a step, over all devices.")] = 32,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=1, help="Tokens a row; 512, or what the model takes.")
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 3e-4,
    warmup: Annotated[int | None, typer.Option("--warmup", min=0, help="Steps to the peak; a fiftieth.")] = None,
    schedule: Annotated[Schedule, typer.Option("--schedule", help="After the warm-up.")] = Schedule.cosine,
    final_rate: Annotated[float, typer.Option("--final-rate", help="Learning rate at the end, over the peak.")] = 0.1,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0, help="AdamW's, on matrices.")] = 0.1,
    clip: Annotated[float, typer.Option("--clip", min=0, help="Largest norm of the gradient; 0 does not clip.")] = 1.0,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Parts that a step is read in.")] = 1,
    dtype: Annotated[Compute, typer.Option("--dtype", help="Of products; master weights are float32.")] = (
        Compute.bfloat16
    ),
    remat: Annotated[bool, typer.Option("--remat", help="Compute blocks again backwards: less memory.")] = False,
    hold_sparsity: Annotated[
        bool, typer.Option("--hold-sparsity/--fixed-thresholds", help="A plan's thresholds follow its shares.")
    ] = True,
    straight_through: Annotated[
        float,
        typer.Option("--straight-through", min=0, max=1, help="Gradient's share for dropped channels: 1 as Q-Sparse."),
    ] = 1.0,
    attention: Annotated[
        AttentionLibrary, typer.Option("--attention", help="cudnn: faster on a GPU, losses the same to rounding only.")
    ] = AttentionLibrary.xla,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="How many; all if not given.")] = None,
    fully_sharded: Annotated[
        bool, typer.Option("--fully-sharded", help="Share out weights and optimizer state, too.")
    ] = False,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")] = 200,
    keep: Annotated[int, typer.Option("--keep", min=2, help="Checkpoints kept.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    seed: Seed = 0,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train from scratch, go on from a checkpoint, or tune on answers; dense, Q-Sparse, or under a TEAL plan.

    A run that was killed goes on with --resume and the same options, with the same losses. Its directory holds
    log.csv, loss.png, checkpoints, and at the end the model, which decodes under the sparsity it was trained with.
    """
    if sum(option is not None for option in (top_k, block, plan)) > 1:
        raise typer.BadParameter("--top-k, --block and --plan are three sparsities: give one")
    if int8 and top_k is None and block is None:
        raise typer.BadParameter("--int8 goes with --top-k or --block; --top-k 1 keeps all channels")
    if straight_through != 1 and top_k is None and block is None and plan is None:
        raise typer.BadParameter("--straight-through goes with --top-k, --block or --plan: a dense model drops nothing")
    if tokenizer is not None and not scratch:
        raise typer.BadParameter("a model brings its tokenizer: --tokenizer goes with --scratch")
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.sparsity.plan import SparsityPlan
        from teal_jax.training.held_out import HeldOut
        from teal_jax.training.loop import train
        from teal_jax.training.settings import TrainSettings
        from teal_jax.training.sparsity import q_sparse_plan

        shares, width = (None if top_k is None else _shares(top_k), None) if block is None else _block(block)
        check_texts([*data, *([] if eval_data is None else [eval_data])])
        sparsity = None if plan is None else SparsityPlan.load(plan)
        lm = _new(model, tokenizer, seed) if scratch else open_model(session, model, revision=revision).dense()
        settings = TrainSettings(
            steps=steps,
            batch=batch,
            seq_len=min(512, lm.config.max_position) if seq_len is None else seq_len,
            learning_rate=lr,
            warmup=warmup,
            schedule=schedule.value,
            final_rate=final_rate,
            weight_decay=weight_decay,
            clip=clip or None,
            accumulate=accumulate,
            dtype=dtype.value,
            bitnet=bitnet,
            remat=remat,
            distil=distil,
            hold_sparsity=hold_sparsity,
            straight_through=straight_through,
            attention=attention.value,
            seed=seed,
        )
        if shares is not None:
            sparsity = q_sparse_plan(lm, shares, block=width, int8=int8)
        held_out = None if eval_data is None else HeldOut(lm, eval_data, output, seq_len=settings.seq_len)
        tokens = _tokens(session, lm, data, output, resume)
        trained = train(
            lm,
            tokens,
            output,
            settings=settings,
            plan=sparsity,
            devices=devices,
            fully_sharded=fully_sharded,
            resume=resume,
            save_every=save_every,
            keep=keep,
            progress=session.progress,
            watch=held_out,
            watch_every=eval_every,
        )
        values = _summary(trained)
        session.result(values, *_lines(values))


def _shares(text: str) -> Any:
    """`"0.6"` as a number, `"attn_in=0.6,down=0.4"` as seven, 1 where nothing is said; a usage error otherwise."""
    from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, SITES

    try:
        if "=" not in text:
            return float(text)
        named = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise typer.BadParameter(f"--top-k: expected 0.6 or attn_in=0.6,down=0.4, got {text!r}") from error
    if unknown := named.keys() - {*SITES, *PROJECTIONS}:
        raise typer.BadParameter(
            f"--top-k: no site or projection {', '.join(sorted(unknown))}: {', '.join(SITES)}; {', '.join(PROJECTIONS)}"
        )
    pairs = zip(PROJECTIONS, SITE_OF_PROJECTION, strict=True)
    return [named.get(name, named.get(SITES[site], 1.0)) for name, site in pairs]


def _block(text: str) -> tuple[float, int]:
    """`"16:32"` as the share kept and the width of a block; a usage error otherwise."""
    kept, _, width = text.partition(":")
    if not (kept.isdecimal() and width.isdecimal() and 0 < int(kept) <= int(width)):
        raise typer.BadParameter(f"--block: expected N:M with 0 < N <= M, as 16:32, got {text!r}")
    return int(kept) / int(width), int(width)


def _new(shape: str, tokenizer: str | None, seed: int) -> "LanguageModel":
    """A random model of `shape`: a workload's name, or a config.json or its directory."""
    import dataclasses

    from teal_jax import hub
    from teal_jax.benchmark.shapes import shape_config
    from teal_jax.decode.tokenizer import Tokenizer
    from teal_jax.errors import TrainingError
    from teal_jax.model import random_model

    path = Path(shape).expanduser()
    directory = path.parent if path.name == "config.json" else path
    name, config = shape_config(str(directory) if path.is_file() or path.is_dir() else shape)
    if tokenizer is not None:
        directory = hub.resolve(tokenizer)
    elif shape == hub.EMBEDDED:
        directory = hub.EMBEDDED_DIRECTORY
    if not directory.is_dir():
        raise TrainingError(f"the shape {shape} brings no tokenizer", hint="--tokenizer MODEL")
    found = Tokenizer.from_directory(directory, config)
    if found.vocab_size > config.vocab_size:
        raise TrainingError(
            f"the tokenizer has {found.vocab_size} tokens, the config's vocab_size is {config.vocab_size}",
            hint="raise vocab_size in config.json",
        )
    return dataclasses.replace(random_model(config, seed=seed), name=name, tokenizer=found)


def _tokens(session: Session, lm: "LanguageModel", data: list[Path], output: Path, resume: bool) -> Any:
    """The token file given, or one made of the text given, in the run's directory."""
    from teal_jax.errors import TrainingError
    from teal_jax.training.packing import pack
    from teal_jax.training.run_record import RECORD, TOKENS, check_new
    from teal_jax.training.token_file import SUFFIX, open_token_file

    if any(path.suffix == SUFFIX for path in data):
        if len(data) > 1:
            raise typer.BadParameter(f"one {SUFFIX} file, or text")
        return open_token_file(data[0])
    path = output / TOKENS
    if path.exists() and resume:
        tokens, names = open_token_file(path), ", ".join(dict.fromkeys(file.name for file in data))
        if tokens.source != names:
            raise TrainingError(f"{path} was made of {tokens.source}, --data is {names}", hint="the run's own --data")
        return tokens
    if not (output / RECORD).exists():
        check_new(output)
    elif not resume:
        raise TrainingError(f"{output} holds a run", hint="--resume goes on with it; or name another directory")
    path.unlink(missing_ok=True)  # of a run that was killed before it began
    output.mkdir(parents=True, exist_ok=True)
    session.note(f"reading {', '.join(str(file) for file in data)} into {path}")
    try:
        return pack(lm, data, path)
    except BaseException:
        with contextlib.suppress(OSError):
            output.rmdir()  # only if nothing is in it
        raise


def _summary(trained: "Trained") -> dict[str, Any]:
    import numpy as np

    from teal_jax.training.held_out import read_held_out

    log, tenth = trained.log, max(1, len(trained.log) // 10)

    def mean(name: str, rows: list[dict[str, Any]]) -> float | None:
        values = [row[name] for row in rows if name in row]
        return float(np.mean(values)) if values else None

    held_out = read_held_out(trained.directory)
    speeds = [row["tokens_per_second"] for row in log if "tokens_per_second" in row]
    return {
        "path": str(trained.directory),
        "model": str(trained.directory / "model"),
        "steps": log[-1]["step"],
        "tokens": sum(row["tokens"] for row in log),
        "first_loss": log[0]["loss"],
        "loss": mean("loss", log[-tenth:]),
        "held_out_loss": held_out[-1][1] if held_out else None,
        "sparsity": mean("sparsity", log[-tenth:]),
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "share_of_peak": mean("share_of_peak", log[-tenth:]),
    }


def _lines(values: dict[str, Any]) -> list[str]:
    sparse = "" if values["sparsity"] is None else f", {100 * values['sparsity']:.1f} % of the block weights unread"
    speed = "" if values["tokens_per_second"] is None else f", {values['tokens_per_second']:,.0f} tokens/s"
    held = "" if values["held_out_loss"] is None else f"; {values['held_out_loss']:.4f} on held-out text"
    return [
        f"{values['model']}  ({values['steps']:,} steps, {values['tokens']:,} tokens{speed})",
        f"loss {values['first_loss']:.4f} -> {values['loss']:.4f}, mean of the last tenth{held}{sparse}",
    ]

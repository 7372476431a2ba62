"""What training under a plan's thresholds wins back: perplexity before, during and after, on text that it never saw.

    python benchmarks/recovery.py MODEL --data test.jsonl --calibration-data train.txt --seconds 300 --out DIR

The text to learn from is sampled from the model itself, the loss is the divergence from its own dense logits, every
token is thinned at the plan's shares throughout. JSON, markdown and a plot are written anew at every measurement;
the same command goes on where it was killed.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import teal_jax
from teal_jax import compilation_cache
from teal_jax.benchmark.report import commit, versions
from teal_jax.embedded import CALIBRATION_TEXT, HELDOUT_TEXT
from teal_jax.evaluation.run_directory import read_json, write_json
from teal_jax.model import LanguageModel
from teal_jax.plots import COLOURS, MARKERS, figure, plain_log_ticks
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.training.loop import train
from teal_jax.training.run_record import LOG, RECORD, read_log
from teal_jax.training.sampled import sample_tokens
from teal_jax.training.settings import TrainSettings
from teal_jax.training.token_file import TokenFile, open_token_file

GOALS = {0.5: 1.15, 0.65: 1.35}
"""Perplexity over the dense model's that the project asks for."""

PACE_STEPS = 30


def tokens_of(lm: LanguageModel, path: Path, options: argparse.Namespace) -> TokenFile:
    """Rows sampled from the model, made once."""
    if path.exists():
        return open_token_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return sample_tokens(
        lm, path, rows=options.rows, length=options.sample_length, batch=options.sample_batch, progress=False
    )


def make_plans(lm: LanguageModel, options: argparse.Namespace) -> list[SparsityPlan]:
    """Those given, or one for each target."""
    if options.plans:
        return [SparsityPlan.load(path) for path in options.plans]
    found = teal_jax.calibrate(
        lm,
        options.calibration_data,
        num_tokens=options.calibration_tokens,
        seq_len=options.seq_len,
        progress=False,
    )
    return [teal_jax.allocate(lm, found, target, method=options.allocation) for target in options.targets]


def pace(lm: LanguageModel, tokens: TokenFile, settings: TrainSettings, plan: SparsityPlan) -> float:
    """Seconds of a step, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(settings, steps=PACE_STEPS, warmup=None)
        log = train(lm, tokens, Path(folder) / "pace", settings=short, plan=plan, progress=False).log
    return float(np.median([row["seconds"] for row in log[PACE_STEPS // 3 :]]))


def recover(
    lm: LanguageModel,
    tokens: TokenFile,
    plan: SparsityPlan,
    report: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Train under `plan`; measurements go into `report["rows"]`, which is written each time."""
    directory = options.out / f"run-{100 * plan.target:g}"
    settings = TrainSettings(
        steps=options.steps or PACE_STEPS,
        batch=options.batch,
        seq_len=options.seq_len,
        learning_rate=options.lr,
        warmup=options.warmup,
        final_rate=options.final_rate,
        weight_decay=0.0,
        dtype=options.dtype,
        distil=options.distil,
        straight_through=options.straight_through,
        attention=options.attention,
    )
    if (directory / RECORD).exists():
        settings = TrainSettings(**read_json(directory / RECORD)["settings"])
    elif options.seconds:
        # Of the first target: a second one of as many steps needs no program of its own.
        step = report["step_seconds"] = report["step_seconds"] or pace(lm, tokens, settings, plan)
        every = max(2, int(options.seconds / step / options.measurements))
        settings = dataclasses.replace(settings, steps=every * options.measurements, warmup=options.warmup)
        print(f"{1000 * step:.1f} ms a step, {settings.steps} steps", flush=True)
    began = time.perf_counter()

    def measure(step: int, model: LanguageModel) -> None:
        found = score(model, options)
        trained = [row for row in read_log(directory / LOG) if "seconds" in row] if step else []
        row = {
            "target": plan.target,
            "step": step,
            "tokens": step * settings.batch * settings.seq_len,
            "train_seconds": sum(row["seconds"] for row in trained),
            "wall_seconds": time.perf_counter() - began,
            "ppl": found.ppl,
            "ratio": found.ppl / report["dense_ppl"],
            "realised": found.realised_sparsity,
            "divergence": float(np.mean([row["divergence"] for row in trained[-20:]])) if trained else None,
        }
        kept = [old for old in report["rows"] if (old["target"], old["step"]) != (plan.target, step)]
        report["rows"] = sorted([*kept, row], key=lambda row: (row["target"], row["step"]))
        report["settings"][f"{plan.target:g}"] = settings.to_dict()
        write(report, options.out)
        print(json.dumps(row), flush=True)

    if not any(row["target"] == plan.target for row in report["rows"]):
        measure(0, lm.sparsify(plan))
    train(
        lm,
        tokens,
        directory,
        settings=settings,
        plan=plan,
        resume=True,
        save_every=max(1, settings.steps // 5),
        progress=False,
        watch=measure,
        watch_every=max(1, settings.steps // options.measurements),
    )


def score(lm: LanguageModel, options: argparse.Namespace) -> Any:
    """Held-out perplexity, every token thinned."""
    return teal_jax.perplexity(
        lm,
        options.data,
        context=options.context,
        window=options.window,
        max_tokens=options.max_tokens,
        progress=False,
    )


def markdown(report: dict[str, Any]) -> str:
    """A line a measurement."""
    lines = [
        "| target | step | training tokens | seconds of training | realised | perplexity | times dense |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {100 * row['target']:g} % | {row['step']:,} | {row['tokens'] / 1e6:,.1f} M | {row['train_seconds']:,.0f} "
        f"| {100 * row['realised']:.1f} % | {row['ppl']:.3f} | {row['ratio']:.3f} |"
        for row in report["rows"]
    ]
    name, dense = report["model"], report["dense_ppl"]
    facts = (
        f"dense {dense:.3f}; {report['held_out']}",
        f"trained on {report['sampled_tokens']:,} tokens of {name}'s own, sampled in {report['sample_seconds']:.0f} s",
        f"{report['device']}, jax {report['versions']['jax']}, commit {report['commit']}",
        f"`{report['command']}`",
    )
    return f"# Recovery of {name}\n\n" + "\n".join(lines) + "\n\n" + "".join(f"- {fact}\n" for fact in facts)


def plot(report: dict[str, Any], path: Path) -> None:
    """Perplexity over the dense one, by seconds of training."""
    with figure(path, 7.2, 4.4) as axes:
        for i, target in enumerate(dict.fromkeys(row["target"] for row in report["rows"])):
            rows = [row for row in report["rows"] if row["target"] == target]
            seconds, ratios = zip(*((row["train_seconds"], row["ratio"]) for row in rows), strict=True)
            label = f"{100 * target:g} %: x {ratios[0]:.2f} before, x {ratios[-1]:.3f} after"
            axes.plot(seconds, ratios, marker=MARKERS[i % 6], color=COLOURS[i % 6], label=label)
            if target in GOALS:
                axes.axhline(GOALS[target], color=COLOURS[i % 6], linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_yscale("log")
        plain_log_ticks(axes)
        axes.set_xlabel(f"seconds of training ({report['device']})")
        axes.set_ylabel("held-out perplexity, times dense")
        axes.set_title(f"{report['model']}: recovery under {report['allocation']} thresholds (dashed: goals)")
        axes.grid(axis="y", which="both")
        axes.legend()


def write(report: dict[str, Any], out: Path) -> None:
    """JSON, markdown and plot of what is known so far."""
    stem = out / f"recovery-{report['model']}"
    write_json(Path(f"{stem}.json"), report)
    Path(f"{stem}.md").write_text(markdown(report), "utf-8")
    plot(report, Path(f"{stem}.png"))


def main() -> None:
    """Sample, calibrate, train under each target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=HELDOUT_TEXT)
    parser.add_argument("--calibration-data", type=Path, default=CALIBRATION_TEXT)
    parser.add_argument("--calibration-tokens", type=int, default=20480)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.65])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="of training, for each target: steps by the pace measured first")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--allocation", default="uniform", help="method of the plans: uniform, greedy, learned, ...")
    parser.add_argument("--plans", type=Path, nargs="*", help="plans made before, in place of --targets")
    parser.add_argument("--sampled", type=Path, help="token file; made if it is not there")
    parser.add_argument("--rows", type=int, default=20480, help="texts sampled")
    parser.add_argument("--sample-length", type=int, default=512, help="of each; the later rows begin inside a story")
    parser.add_argument("--sample-batch", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--final-rate", type=float, default=0.02)
    parser.add_argument("--distil", type=float, default=1.0)
    parser.add_argument("--straight-through", type=float, default=0.3, help="share of it for dropped channels")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: on a GPU, in bfloat16")
    parser.add_argument("--measurements", type=int, default=10, help="during the training")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="held-out tokens scored")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not (options.seconds or options.steps):
        parser.error("--seconds or --steps")
    # Told now, and not after the sampling.
    for path in (options.data, options.calibration_data):
        if not path.is_file():
            parser.error(f"no text file at {path}")
    if not all(0 < target < 1 for target in options.targets):
        parser.error(f"--targets must lie in (0, 1), got {options.targets}")
    if not 0 <= options.straight_through <= 1:
        parser.error(f"--straight-through must lie in [0, 1], got {options.straight_through}")

    compilation_cache.enable()
    lm = teal_jax.load(options.model, dtype="float32", progress=False)
    began = time.perf_counter()
    # In the dtype in which it teaches: half the kv_cache to read.
    writer = teal_jax.load(options.model, dtype=options.dtype, progress=False)
    tokens = tokens_of(writer, options.sampled or options.out / "sampled.tokens", options)
    sampled = time.perf_counter() - began
    print(f"{len(tokens.tokens):,} tokens in {sampled:.0f} s", flush=True)
    plans = make_plans(lm, options)
    file = options.out / f"recovery-{Path(options.model).name}.json"
    if file.exists():
        report = read_json(file)
    else:
        dense = score(lm, options)
        report = {
            "model": Path(options.model).name,
            "dense_ppl": dense.ppl,
            "held_out": f"{dense.num_tokens:,} tokens scored, {dense.protocol}",
            "sampled_tokens": len(tokens.tokens),
            "sample_seconds": round(sampled, 1),
            "calibration": None
            if options.plans
            else {"text": options.calibration_data.name, "tokens": options.calibration_tokens},
            "allocation": ", ".join(dict.fromkeys(plan.method for plan in plans)),
            "command": shlex.join(["python", "benchmarks/recovery.py", *sys.argv[1:]]),
            "settings": {},
            "step_seconds": None,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
            "commit": commit(),
            "rows": [],
        }
    for plan in plans:
        recover(lm, tokens, plan, report, options)
    print(markdown(report))


if __name__ == "__main__":
    main()

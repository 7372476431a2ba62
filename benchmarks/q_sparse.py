"""Q-Sparse's claims at small scale: named models trained from scratch, one JSON each, and a report of all.

    python benchmarks/q_sparse.py train TEACHER --text train.txt --data test.jsonl --out DIR --group claims --size 10M
    python benchmarks/q_sparse.py train TEACHER --text train.txt --data test.jsonl --out DIR --group grid --jobs 2
    python benchmarks/q_sparse.py report --out DIR

All learn from the same tokens: sampled from TEACHER, whose tokenizer they take, and the texts given. A model whose
JSON lies in DIR/runs is not trained again, so that a killed command goes on where it was.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GRID_SIZES = ("1M", "3M", "10M", "30M")
GRID_SPARSITIES = (0.0, 0.3, 0.5, 0.65, 0.8)
SHAPES = {"smoke": (32, 1), "smoke2": (64, 2), "1M": (128, 5), "3M": (192, 7), "10M": (320, 8), "30M": (512, 10)}
SHAPES |= {"100M": (768, 14)}
"""Width and layers; the names count the weights outside the embedding."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model to train from scratch.

    Attributes:
      group: `"claims"`, `"grid"` or `"grid-bitnet"`.
      label: for people, one within a group and size.
      size: of `SHAPES`.
      kept: share of channels that top-K keeps, None: no top-K.
      relu: ReLU in the place of top-K.
      straight_through: share of the gradient that dropped channels get.
      hidden_act: of the MLP.
      bitnet: weights of three values, activations of eight bits.
      seed: of the first weights and the order of rows.
    """

    group: str
    label: str
    size: str
    kept: float | None = None
    relu: bool = False
    straight_through: float = 1.0
    hidden_act: str = "relu2"
    bitnet: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        label = self.label.replace(" %", "").replace(",", "").replace(" ", "_")
        return f"{self.group}-{self.size}-{label}-s{self.seed}"

    @property
    def program(self) -> tuple[Any, ...]:
        """Runs that share it are compiled once: top-K's counts are arguments."""
        return (self.size, self.kept is None, self.relu, self.straight_through, self.hidden_act, self.bitnet, self.seed)


def claims(size: str, sparsity: float, seed: int) -> list[Run]:
    """Dense against sparse, with what the paper leaves out of it one at a time; the most telling first."""
    kept, share = 1 - sparsity, f"{100 * sparsity:g} %"
    made = (
        Run("claims", "dense", size, 1.0),
        Run("claims", f"top-K {share}", size, kept),
        Run("claims", f"top-K {share} without STE", size, kept, straight_through=0.0),
        Run("claims", "ReLU gates", size, relu=True, straight_through=0.0),
        Run("claims", "dense SiLU", size, hidden_act="silu"),
        Run("claims", "BitNet", size, 1.0, bitnet=True),
        Run("claims", f"BitNet top-K {share}", size, kept, bitnet=True),
        Run("claims", f"top-K {share}, STE of 0.3", size, kept, straight_through=0.3),
        Run("claims", f"top-K {share} SiLU", size, kept, hidden_act="silu"),
        # Where none should be left of the difference that the paper sees at 40 %.
        Run("claims", "top-K 70 %", size, 0.3),
        Run("claims", "top-K 70 % without STE", size, 0.3, straight_through=0.0),
    )
    return [dataclasses.replace(run, seed=seed) for run in made]


def grid(sizes: list[str], sparsities: list[float], bitnet: bool, seed: int) -> list[Run]:
    """Models for L(N, S), the small ones first."""
    group = "grid-bitnet" if bitnet else "grid"
    return [
        Run(group, f"S {100 * sparsity:g} %", size, 1 - sparsity, bitnet=bitnet, seed=seed)
        for size, sparsity in itertools.product(sizes, sparsities)
    ]


def shape(size: str, teacher: Any) -> Any:
    """The config of a model of `size` with the teacher's vocabulary."""
    from teal_jax.config import ModelConfig

    width, layers = SHAPES[size]
    head_dim = 64 if width >= 512 else 32
    return ModelConfig(
        vocab_size=teacher.config.vocab_size,
        d_model=width,
        d_mlp=-(-8 * width // 3 // 32) * 32,
        num_layers=layers,
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        max_position=teacher.config.max_position,
        norm_eps=1e-5,
        tie_embeddings=True,
        bos_token_id=teacher.config.bos_token_id,
        eos_token_ids=teacher.config.eos_token_ids,
    )


def make_tokens(teacher: Any, options: argparse.Namespace) -> None:
    """The token files of training and of holding out, unless they are there."""
    from teal_jax.data import read_documents, tokenize
    from teal_jax.training.sampled import sample_tokens
    from teal_jax.training.token_file import open_token_file, write_token_file

    own, held, whole = (options.out / f"{name}.tokens" for name in ("sampled", "held-out", "train"))
    sizes: dict[str, Any] = {"length": options.sample_length, "progress": False}
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    if not held.exists():
        sample_tokens(teacher, held, rows=options.held_out_rows, batch=options.held_out_rows, seed=1 << 31, **sizes)
    if not whole.exists():
        if not own.exists():
            sample_tokens(teacher, own, rows=options.rows, batch=options.sample_batch, **sizes)
        rows = open_token_file(own).tokens.reshape(-1, options.sample_length)
        texts = [ids for path in options.text for ids in tokenize(teacher, read_documents(path).texts)]
        write_token_file(
            whole,
            ((row, None) for row in itertools.chain(rows, texts)),
            tokenizer=teacher.tokenizer.fingerprint,
            vocab_size=teacher.config.vocab_size,
            source=f"{len(rows)} texts sampled from {teacher.name}, {', '.join(path.name for path in options.text)}",
        )
    print(f"{len(open_token_file(whole).tokens):,} tokens in {time.perf_counter() - began:.0f} s", flush=True)


@functools.cache
def zero_shares(config: Any) -> Any:
    """Jitted `(params, tokens [rows, seq]) -> [4]`: share of exact zeros at each site, before any gate."""
    import jax
    import jax.numpy as jnp

    from teal_jax.model import model_functions

    def of_block(taps: Any, gates: Any) -> jax.Array:
        return jnp.stack([jnp.mean(site == 0, dtype=jnp.float32) for site in taps])

    def zeros(params: Any, tokens: jax.Array) -> jax.Array:
        where = jnp.ones(tokens.shape, bool)
        return jnp.stack(model_functions(config).forward(params, tokens, where, None, of_block)[1]).mean(axis=0)

    return jax.jit(zeros)


def train_one(run: Run, teacher: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate as it goes; what is worth keeping."""
    import jax
    import numpy as np

    import teal_jax
    from teal_jax.benchmark.report import commit, versions
    from teal_jax.model import random_model
    from teal_jax.training.loop import train
    from teal_jax.training.settings import TrainSettings
    from teal_jax.training.sparsity import q_sparse_plan, relu_plan
    from teal_jax.training.token_file import open_token_file

    config = dataclasses.replace(shape(run.size, teacher), hidden_act=run.hidden_act)
    lm = dataclasses.replace(random_model(config, seed=run.seed), name=run.name, tokenizer=teacher.tokenizer)
    plan = relu_plan(lm) if run.relu else None
    if run.kept is not None:
        plan = q_sparse_plan(lm, run.kept, int8=run.bitnet)
    weights = config.num_layers * sum(config.projection_sizes)
    settings = TrainSettings(
        steps=max(2, options.tokens // (options.batch * options.seq_len)),
        batch=options.batch,
        seq_len=options.seq_len,
        learning_rate=options.lr * (1e7 / weights) ** 0.25,
        dtype=options.dtype,
        bitnet=run.bitnet,
        straight_through=run.straight_through,
        attention=options.attention,
        seed=run.seed,
    )
    held = open_token_file(options.out / "held-out.tokens").tokens
    held = np.asarray(held, np.int32).reshape(-1, options.seq_len)
    layout = {"context": options.seq_len - options.seq_len // 4, "window": options.seq_len // 4, "progress": False}
    losses: list[tuple[int, float]] = []

    def watch(step: int, model: Any) -> None:
        losses.append((step, teal_jax.perplexity(model, held, **layout).nll))
        print(f"{run.name}: step {step}, held-out loss {losses[-1][1]:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            lm,
            open_token_file(options.out / "train.tokens"),
            Path(folder) / "run",
            settings=settings,
            plan=plan,
            save_every=settings.steps,
            progress=False,
            watch=watch,
            watch_every=max(1, settings.steps // options.measurements),
        )
    log = trained.log
    cut = np.array_split(np.arange(len(log)), min(len(log), 200))
    stories = teal_jax.perplexity(trained.lm, options.data, max_tokens=options.max_tokens, **layout)
    own = teal_jax.perplexity(trained.lm, held, **layout)
    speeds = [row["tokens_per_second"] for row in log if "tokens_per_second" in row]
    return {
        "run": dataclasses.asdict(run),
        "config": config.to_dict(),
        "weights": weights,
        "settings": settings.to_dict(),
        "tokens": settings.steps * settings.batch * settings.seq_len,
        "unique_tokens": len(open_token_file(options.out / "train.tokens").tokens),
        "losses": [(log[part[-1]]["step"], float(np.mean([log[i]["loss"] for i in part]))) for part in cut],
        "held_out": losses,
        "final": own.nll,
        "stories": stories.nll,
        "realised": own.realised_sparsity,
        "realised_by_projection": own.realised.mean(axis=0).tolist(),
        "zeros_by_site": np.asarray(zero_shares(config)(trained.lm.params, held[:16])).tolist(),
        "teacher": teal_jax.perplexity(teacher, held, **layout).nll,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "commit": commit(),
    }


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Those asked for that have no JSON yet."""
    made = []
    for seed, group in itertools.product(options.seeds, options.group):
        if group == "claims":
            made += claims(options.size, options.sparsity, seed)
        else:
            made += grid(options.sizes, options.sparsities, group == "grid-bitnet", seed)
    if options.names:
        made = [run for run in made if run.name in options.names]
    return [run for run in made if not result_path(run, options.out).exists()]


def result_path(run: Run, out: Path) -> Path:
    """Where a finished run lies."""
    return out / "runs" / f"{run.name}.json"


def train_all(options: argparse.Namespace) -> int:
    """Train what is missing, in this process or in several; the exit status."""
    import teal_jax
    from teal_jax import compilation_cache
    from teal_jax.evaluation.run_directory import write_json

    compilation_cache.enable()
    runs = runs_of(options)
    teacher = teal_jax.load(options.teacher, dtype="float32", progress=False)
    make_tokens(teacher, options)
    if options.jobs > 1:
        return in_processes(runs, options.jobs)
    for run in runs:
        began = time.perf_counter()
        value = train_one(run, teacher, options)
        write_json(result_path(run, options.out), value | {"seconds": time.perf_counter() - began})
        print(f"{run.name}: {value['final']:.4f} in {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def in_processes(runs: list[Run], jobs: int) -> int:
    """The same command in `jobs` processes on one device: while one compiles, others train."""
    programs = list(dict.fromkeys(run.program for run in runs))
    shares = [[run.name for run in runs if programs.index(run.program) % jobs == i] for i in range(jobs)]
    children = [
        subprocess.Popen([sys.executable, *sys.argv, "--jobs", "1", "--names", *names]) for names in shares if names
    ]
    return max((child.wait() for child in children), default=0)


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="table, curves and scaling laws of what was trained")
    report.add_argument("--out", type=Path, required=True)
    report.add_argument("--samples", type=int, default=500, help="of the bootstrap")
    train = commands.add_parser("train", help="train what is missing")
    train.add_argument("teacher")
    train.add_argument("--text", type=Path, nargs="*", default=[])
    train.add_argument("--data", type=Path, required=True, help="held-out text")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--group", nargs="+", choices=("claims", "grid", "grid-bitnet"), default=["claims"])
    train.add_argument("--size", choices=SHAPES, default="10M", help="of the claims")
    train.add_argument("--sparsity", type=float, default=0.4, help="of the claims")
    train.add_argument("--sizes", nargs="+", choices=SHAPES, default=GRID_SIZES)
    train.add_argument("--sparsities", nargs="+", type=float, default=GRID_SPARSITIES)
    train.add_argument("--seeds", nargs="+", type=int, default=[0])
    train.add_argument("--tokens", type=int, default=50_000_000, help="that each model reads")
    train.add_argument("--rows", type=int, default=20480, help="texts sampled")
    train.add_argument("--held-out-rows", type=int, default=128)
    train.add_argument("--sample-length", type=int, default=512)
    train.add_argument("--sample-batch", type=int, default=4096)
    train.add_argument("--batch", type=int, default=128)
    train.add_argument("--seq-len", type=int, default=256)
    train.add_argument("--lr", type=float, default=2e-3, help="of 10M weights; others by the fourth root")
    train.add_argument("--dtype", default="bfloat16")
    train.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: on a GPU, in bfloat16")
    train.add_argument("--measurements", type=int, default=10)
    train.add_argument("--max-tokens", type=int, default=50_000, help="of held-out text")
    train.add_argument("--jobs", type=int, default=1, help="processes side by side on the device")
    train.add_argument("--names", nargs="*", help="only these runs")
    options = parser.parse_args()
    if options.command == "train" and options.sample_length % options.seq_len:
        parser.error(f"--sample-length must be a multiple of --seq-len, got {options.sample_length}, {options.seq_len}")
    if options.command == "train":
        # Told now, and not after a model has been trained.
        for path in (*options.text, options.data):
            if not path.is_file():
                parser.error(f"no text file at {path}")
        if not all(0 <= sparsity < 1 for sparsity in (options.sparsity, *options.sparsities)):
            parser.error(f"sparsities must lie in [0, 1), got {options.sparsity} and {list(options.sparsities)}")
        if options.jobs > 1:  # this process, which makes the tokens, would take most of the memory from the others
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        sys.exit(train_all(options))
    from q_sparse_report import write_report

    from teal_jax.errors import TealError

    try:
        write_report(options.out, options.samples)
    except TealError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""Train the student on the teacher's stories and export it as a HuggingFace checkpoint.

The stream of all stories lies on the device; a row is a crop of it, half of the rows beginning with a story. Muon
for the projections, Adam for the embedding and the norms; bfloat16 products, float32 master weights.

    python scripts/embedded/train.py --samples samples --tokenizer tokenizer --out model
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import student

from converters import export_checkpoint
from teal_jax.config import ModelConfig
from teal_jax.model import random_model

BOS, PAD = 0, 1
CALL = 50  # steps in one compiled call


def load_stream(directory, seed):
    """All token shards in an order drawn from `seed`, uint16 on the device, and where the stories begin."""
    shards = sorted(directory.glob("*.ids.npy"))
    order = np.random.default_rng(seed).permutation(len(shards))
    stream = np.concatenate([np.load(shards[i]) for i in order])
    return jnp.asarray(stream), jnp.asarray(np.flatnonzero(stream == BOS).astype(np.int32))


def draw(stream, starts, key, rows, seq):
    """int32 `[rows, seq + 1]` crops of the stream."""
    first, second = jax.random.split(key)
    aligned = starts[jax.random.randint(first, (rows // 2,), 0, len(starts))]
    anywhere = jax.random.randint(second, (rows - rows // 2,), 0, len(stream))
    begin = jnp.minimum(jnp.concatenate([aligned, anywhere]), len(stream) - seq - 1)
    return stream[begin[:, None] + jnp.arange(seq + 1)].astype(jnp.int32)


def is_matrix(weights):
    """True for the projections, `[layers, d_in, d_out]`, which Muon updates."""
    return jax.tree.map(lambda leaf: leaf.ndim == 3, weights)


def make_optimizer(kind, weight_decay):
    """Muon with updates scaled to Adam's size, so that one learning rate serves both; or Adam alone. Rate 1."""
    if kind == "adamw":
        return optax.adamw(1.0, b1=0.9, b2=0.98, weight_decay=weight_decay, mask=is_matrix)
    shape = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return optax.contrib.muon(
        1.0,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        adam_b2=0.98,
        muon_weight_dimension_numbers=lambda weights: jax.tree.map(lambda m: shape if m else None, is_matrix(weights)),
    )


def learning_rate(peak, done):
    """Linear warm-up over the first 2 % of the training, then a cosine to 1 % of the peak; `done` in [0, 1]."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done, 1.0)))
    return peak * jnp.minimum(done / 0.02, 1.0) * cosine


def train(config, stream, starts, args):
    """The trained float32 weights, and what happened on the way."""
    optimizer = make_optimizer(args.optimizer, args.weight_decay)
    weights = student.stack(random_model(config, seed=args.seed).params["weights"])
    state = jax.jit(optimizer.init)(weights)
    options = {"dropout": args.dropout, "attention": args.attention}

    def step(stream, starts, carry, inputs):
        (weights, state), (key, done) = carry, inputs
        rows_key, drop_key = jax.random.split(key)
        tokens = draw(stream, starts, rows_key, args.rows, args.seq)

        def objective(weights):
            half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
            return student.loss(config, half, tokens, PAD, key=drop_key, **options)

        loss, gradient = jax.value_and_grad(objective)(weights)
        update, state = optimizer.update(gradient, state, weights)
        rate = learning_rate(args.lr, done)
        return (jax.tree.map(lambda w, u: w + rate * u, weights, update), state), loss

    def many(weights, state, stream, starts, key, done, step_share):
        """`CALL` steps from `done` (the finished share of the training) on."""
        inputs = (jax.random.split(key, CALL), done + step_share * jnp.arange(CALL))
        (weights, state), losses = jax.lax.scan(functools.partial(step, stream, starts), (weights, state), inputs)
        return weights, state, losses.mean()

    key = jax.random.key(args.seed + 1, impl="rbg")
    began = time.time()
    run = jax.jit(many, donate_argnums=(0, 1)).lower(weights, state, stream, starts, key, 0.0, 0.0).compile()
    compiled = now = time.time()
    curve, done, step_share = [], 0.0, 1 / args.steps
    while done < 1.0:
        call_key = jax.random.fold_in(key, len(curve))
        weights, state, loss = run(weights, state, stream, starts, call_key, done, step_share)
        curve.append(round(float(loss), 4))
        before, now = now, time.time()
        if args.deadline:
            # The first call is slower than the rest; what it foretells is corrected by the next ones.
            window = max(args.deadline - compiled, 1.0)
            done, step_share = (now - compiled) / window, (now - before) / CALL / window
            done = done if done + step_share * CALL <= 1.0 else 1.0
        else:
            done = len(curve) * CALL / args.steps
        if len(curve) % 10 == 0 or done >= 1.0:
            speed = len(curve) * CALL * args.rows * args.seq / (now - compiled)
            print(
                f"step {len(curve) * CALL}: loss {curve[-1]:.4f}, {speed / 1e6:.2f}M tokens/s, {now - compiled:.0f} s",
                flush=True,
            )
    facts = {"steps": len(curve) * CALL, "compile_seconds": round(compiled - began, 1), "loss": curve}
    facts["train_seconds"] = round(now - compiled, 1)
    return jax.device_get(student.unstack(weights)), facts


def main():
    """Write the checkpoint in bfloat16 to the directory `--out`, and the facts of the training beside it as .json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of make_tokenizer.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--d-mlp", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rows", type=int, default=128, help="rows of a step")
    parser.add_argument("--steps", type=int, default=10000, help=f"a multiple of {CALL}")
    parser.add_argument(
        "--deadline", type=float, help="Unix time by which to be done: as many steps as fit, not --steps"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.0, help="at the four sites")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--attention", default="cudnn" if jax.default_backend() == "gpu" else "xla")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vocabulary = json.loads((args.tokenizer / "tokenizer.json").read_text())
    config = ModelConfig(
        vocab_size=len(vocabulary["model"]["vocab"]),
        d_model=args.d_model,
        d_mlp=args.d_mlp,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position=args.seq,
        norm_eps=1e-5,
        tie_embeddings=True,
        bos_token_id=BOS,
        eos_token_ids=(BOS,),
    )
    errors = student.check_forward(config, args.attention)
    print(f"{config.num_params / 1e6:.2f}M parameters; the forward pass differs by {errors}")
    stream, starts = load_stream(args.samples, args.seed)
    print(f"{len(stream) / 1e6:.1f}M tokens, {len(starts)} stories", flush=True)
    weights, facts = train(config, stream, starts, args)
    files = [args.tokenizer / "tokenizer.json", args.tokenizer / "tokenizer_config.json"]
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), weights)
    export_checkpoint(half, config, args.out, copy_files=files, overwrite=True)
    generation = {"bos_token_id": BOS, "eos_token_id": BOS, "pad_token_id": PAD}
    (args.out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    options = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    facts = options | facts | {"parameters": config.num_params, "stream_tokens": len(stream), "stories": len(starts)}
    facts |= {"samples": json.loads((args.samples / "samples.json").read_text())}
    facts |= {"jax": jax.__version__, "optax": optax.__version__, "device": jax.devices()[0].device_kind}
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

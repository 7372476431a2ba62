"""Sample stories from the teacher: many rows at once, one compiled loop, text or token shards out.

Every row starts with BOS and runs for `--length` tokens; where the teacher ends a story it samples BOS and the next
story begins, as in its training data. The last story of a row is cut short: it is kept, marked as unfinished.

    python scripts/embedded/sample_stories.py --teacher TEACHER --out samples --rows 32768 --batches 24
"""

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
SEPARATOR = "<|endoftext|>"


def sampler(config, *, rows, length, temperature, chunk=128):
    """A function `(weights, seed) -> int32 [rows, length]` that samples from the model of `config`.

    All rows are at one position, so a step writes one slice of the kv_cache and attends to all of it. The cache
    grows by `chunk` slots at a time: a step reads at most `chunk` unused slots.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import lax

    from teal_jax.model import abstract_decoder
    from teal_jax.nn.gates import Dense
    from teal_jax.nn.rope import rotary_table

    graphdef, _ = nnx.split(abstract_decoder(config))
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    dense = Dense()

    def attend(q, keys, values, position):
        q = q.reshape(rows, kv_heads, heads // kv_heads, width)
        scores = jnp.einsum("bkgd,bktd->bkgt", q, keys, preferred_element_type=jnp.float32) * width**-0.5
        scores = jnp.where(jnp.arange(keys.shape[2]) <= position, scores, -jnp.inf)
        mixed = jnp.einsum("bkgt,bktd->bkgd", jax.nn.softmax(scores).astype(values.dtype), values)
        return mixed.reshape(rows, 1, heads * width)

    def step(model, carry, position):
        token, caches, key = carry
        rotary = rotary_table(position.reshape(1, 1), config.rope, width)
        x = model.embed.weight[...][token][:, None]
        written = []
        for block, (keys, values) in zip(model.layers, caches, strict=True):
            h = block.attn_norm(x)
            q = block.attn.queries(h, dense, rotary)
            k = block.attn.keys(h, dense, rotary).reshape(rows, kv_heads, 1, width)
            v = block.attn.values(h, dense).reshape(rows, kv_heads, 1, width)
            keys = lax.dynamic_update_slice_in_dim(keys, k, position, axis=2)
            values = lax.dynamic_update_slice_in_dim(values, v, position, axis=2)
            written.append((keys, values))
            x = x + block.attn.o_proj(attend(q, keys, values, position), dense)
            h = block.mlp_norm(x)
            h = jax.nn.silu(block.mlp.gate_proj(h, dense)) * block.mlp.up_proj(h, dense)
            x = x + block.mlp.down_proj(h, dense)
        key, subkey = jax.random.split(key)
        token = jax.random.categorical(subkey, model.logits(x[:, 0]) / temperature).astype(jnp.int32)
        return (token, written, key), token

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def advance(weights, carry, start, slots):
        token, caches, key = carry
        caches = jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, 0), (0, slots - c.shape[2]), (0, 0))), caches)
        model = nnx.merge(graphdef, weights)
        return lax.scan(functools.partial(step, model), (token, caches, key), jnp.arange(start, slots))

    def sample(weights, seed):
        dtype = weights["embed"]["weight"].dtype
        cache = [tuple(jnp.zeros((rows, kv_heads, 0, width), dtype) for _ in "kv") for _ in range(config.num_layers)]
        first = jnp.full((rows,), config.bos_token_id, jnp.int32)
        # The random bit generator of the device: threefry would cost as much as the model.
        carry = (first, cache, jax.random.key(seed, impl="rbg"))
        parts = [np.asarray(first)[:, None]]
        for start in range(0, length - 1, chunk):
            carry, tokens = advance(weights, carry, start, min(start + chunk, length - 1))
            parts.append(tokens)
        return np.concatenate([parts[0], *(np.asarray(part).T for part in parts[1:])], axis=1)

    return sample


def piece_bytes(tokenizer_file):
    """The bytes of each token of a SentencePiece-like tokenizer.json."""
    vocabulary = json.loads(Path(tokenizer_file).read_text())["model"]["vocab"]
    pieces = [b""] * len(vocabulary)
    for piece, index in vocabulary.items():
        is_byte = piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6
        pieces[index] = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    return pieces


def stories_of(tokens, pieces, bos):
    """`(story, finished)` of every story in the rows `tokens [rows, length]`; what is not UTF-8 is left out."""
    for row in tokens:
        cuts = [*np.flatnonzero(row == bos).tolist(), len(row)]
        ids = row.tolist()
        for start, stop in itertools.pairwise(cuts):
            data = b"".join([pieces[i] for i in ids[start + 1 : stop]])
            try:
                text = data.decode().strip(" ")
            except UnicodeDecodeError:
                continue
            if text:
                yield text, stop < len(row)


def write_shard(tokens, pieces, bos, stem, tokenizer_file, keep_text):
    """Write one shard; returns (stories, bytes, tokens). See `main` for the files."""
    stories = list(stories_of(tokens, pieces, bos))
    texts = [text for text, _ in stories]
    digests = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in texts]
    np.save(f"{stem}.hash.npy", np.array(digests, np.uint64))
    if keep_text:
        finished = [text for text, done in stories if done]
        Path(f"{stem}.txt").write_text(f"\n{SEPARATOR}\n".join(finished) + "\n", encoding="utf-8")
    count = 0
    if tokenizer_file:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        pad = tokenizer.token_to_id("<|pad|>")
        flat = []
        for encoding, (_, done) in zip(tokenizer.encode_batch_fast(texts), stories, strict=True):
            flat += encoding.ids if done else [*encoding.ids, pad]
        np.save(f"{stem}.ids.npy", np.array(flat, np.uint16))
        count = len(flat)
    return len(texts), sum(len(text.encode()) for text in texts), count


def main():
    """Per shard: `.hash.npy` (64-bit hash of every story), `.txt` (finished stories) and, given a tokenizer,
    `.ids.npy`: uint16, each story after a BOS, an unfinished one followed by a pad token.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="HF directory of the teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32768, help="sequences at once")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="no new batch after so many seconds")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="batch i uses seed * 100000 + i")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the student: write token shards")
    parser.add_argument("--text", action="store_true", help="write text shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    args.out.mkdir(parents=True, exist_ok=True)
    pieces = piece_bytes(Path(args.teacher) / "tokenizer.json")

    # Fresh interpreters, started before JAX: a fork of a process that holds a GPU may hang.
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        from converters import read_config, read_params

        config = read_config(args.teacher)
        weights = read_params(args.teacher, config, dtype=args.dtype)
        sample = sampler(config, rows=args.rows, length=args.length, temperature=args.temperature)
        began, pending = time.perf_counter(), []
        for batch in range(args.batches):
            if time.perf_counter() - began > args.max_seconds:
                args.batches = batch
                break
            tokens = sample(weights, args.seed * 100_000 + batch).astype(np.uint16)
            print(f"batch {batch}: {tokens.size * (batch + 1) / 1e6:.1f}M tokens, "
                  f"{time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
            for part, rows in enumerate(np.array_split(tokens, args.workers)):
                stem = args.out / f"stories_{batch:04d}_{part:02d}"
                job = (write_shard, rows, pieces, config.bos_token_id, stem, args.tokenizer, args.text)
                pending.append(pool.submit(*job))
        stories, size, count = np.sum([job.result() for job in pending], axis=0)
    seconds = time.perf_counter() - began
    print(f"{stories} stories, {size / 1e6:.1f} MB, {count} student tokens, {seconds:.1f} s")
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("teacher", "out")}
    facts |= {"teacher_tokens": args.rows * args.batches * args.length, "stories": int(stories), "bytes": int(size)}
    facts |= {"student_tokens": int(count), "seconds": round(seconds, 1)}
    (args.out / "samples.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Bits per byte of a model on stories, what uniform sparsity costs it, and what it writes.

Bits per byte: each story is tokenised alone with BOS before it; every token of the story is scored (BOS is not, nor
is the story's end); a token's context is all of the story before it, for a story longer than the model's maximum in
windows of that length which overlap by half. Bits over all stories divided by their UTF-8 bytes.

    python scripts/embedded/evaluate.py MODEL --stories tinystories_test.jsonl --calibration MODEL/calibration.txt
"""

import argparse
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
SPARSITIES = (0.25, 0.4, 0.5, 0.65)


def load_model(directory, dtype="float32"):
    """The checkpoint in `directory`, computed in `dtype`."""
    from converters import read_config, read_params
    from teal_jax.decode.tokenizer import Tokenizer
    from teal_jax.model import LanguageModel
    from teal_jax.nn.gates import Dense

    config = read_config(directory)
    params = {"weights": read_params(directory, config, dtype=dtype), "gates": Dense()}
    tokenizer = Tokenizer.from_directory(directory, config)
    return LanguageModel(config=config, params=params, tokenizer=tokenizer, plan=None, name=Path(directory).name)


def story_windows(ids, limit):
    """`(tokens, scored)` windows over one story: at most `limit` tokens, from index `scored` on each is scored once."""
    yield ids[:limit], 1
    done = min(limit, len(ids))
    while done < len(ids):
        stop = min(done + limit // 2, len(ids))
        yield ids[stop - limit : stop], limit - (stop - done)
        done = stop


def negative_log_likelihood(lm, stories, batch=16):
    """Nats over all scored tokens of `stories`, and how many tokens that are."""
    rows = [w for ids in lm.tokenizer.encode_batch(stories) for w in story_windows(ids, lm.config.max_position)]
    rows.sort(key=lambda row: len(row[0]))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = -(-max(len(ids) for ids, _ in part) // 128) * 128  # few shapes, few compilations
        tokens = np.zeros((batch, width), np.int32)
        scored = np.zeros((batch, width), bool)
        for i, (ids, first) in enumerate(part):
            tokens[i, : len(ids)] = ids
            scored[i, first : len(ids)] = True
        logits = lm.logits(tokens)  # causal: the filling at the end changes nothing before it
        total += float(_nll(logits, tokens, scored))
        count += int(scored.sum())
    return total, count


@jax.jit
def _nll(logits, tokens, scored):
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * scored[:, 1:])


def bits_per_byte(lm, stories):
    """As the module says; and nats per token."""
    nats, tokens = negative_log_likelihood(lm, stories)
    return nats / math.log(2) / sum(len(story.encode()) for story in stories), nats / tokens


def sparsity_ratios(lm, stories, calibration, sparsities=SPARSITIES):
    """Perplexity per token at uniform sparsity over that of the dense model, every token thinned."""
    from teal_jax import calibrate
    from teal_jax.nn.gates import Threshold

    cal = calibrate(lm, calibration, num_tokens=20480, seq_len=lm.config.max_position, progress=False)
    dense = bits_per_byte(lm, stories)[1]
    ratios = {}
    for sparsity in sparsities:
        thresholds = cal.thresholds(np.full((lm.config.num_layers, 7), sparsity))
        gates = Threshold(jnp.asarray(thresholds, jnp.float32))
        sparse = type(lm)(**(vars(lm) | {"params": lm.params | {"gates": gates}}))
        ratios[sparsity] = math.exp(bits_per_byte(sparse, stories)[1] - dense)
    return ratios


def write_stories(lm, prompt, *, count=5, temperature=0.7, seed=0, max_new_tokens=300):
    """`count` continuations of `prompt`, each up to the model's end of text."""
    ids = np.array([lm.tokenizer.encode(prompt)] * count, np.int32)
    cache = lm.init_cache(count, ids.shape[1] + max_new_tokens)
    logits, cache = jax.jit(lm.prefill)(lm.params, ids, cache)

    @jax.jit
    def run(params, logits, cache, key):
        def step(carry, key):
            logits, cache = carry
            token = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
            return lm.decode_step(params, token, cache), token

        return jax.lax.scan(step, (logits, cache), jax.random.split(key, max_new_tokens))[1]

    texts = []
    for row in np.asarray(run(lm.params, logits, cache, jax.random.key(seed))).T.tolist():
        stop = next((i for i, token in enumerate(row) if token in lm.tokenizer.eos_token_ids), len(row))
        if lm.config.bos_token_id in row[:stop]:
            stop = row.index(lm.config.bos_token_id)
        texts.append(prompt + lm.tokenizer.decode(row[:stop]))
    return texts


def read_stories(path, count):
    """The first `count` stories of a .jsonl file of strings."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[:count]]


def main():
    """Print what was measured as JSON, then the stories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stories", type=Path, required=True, help=".jsonl, one string a line")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--calibration", type=Path, help="text for the thresholds; without it no sparsity")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()
    lm = load_model(args.model, args.dtype)
    stories = read_stories(args.stories, args.count)
    bits, nats = bits_per_byte(lm, stories)
    report = {"model": lm.name, "parameters": lm.config.num_params, "dtype": args.dtype, "stories": len(stories)}
    report |= {"bits_per_byte": round(bits, 4), "perplexity_per_token": round(math.exp(nats), 4)}
    if args.calibration:
        ratios = sparsity_ratios(lm, stories, args.calibration)
        report["perplexity_ratio_uniform"] = {str(k): round(v, 4) for k, v in ratios.items()}
    print(json.dumps(report, indent=1))
    for text in write_stories(lm, args.prompt):
        print("---", text, sep="\n")


if __name__ == "__main__":
    main()

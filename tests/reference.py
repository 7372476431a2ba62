"""A Llama written once more, in float64 numpy, from the papers' formulas: what the tests compare with."""

import dataclasses
import functools
import math

import numpy as np

import teal_jax
from teal_jax.config import ModelConfig
from teal_jax.model import LanguageModel, random_model

TINY = ModelConfig(
    vocab_size=61,
    d_model=32,
    d_mlp=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    norm_eps=1e-5,
    bos_token_id=1,
)


def tiny_model(
    config: ModelConfig = TINY, *, seed: int = 0, scale: float = 6.0, dtype: str = "float32"
) -> LanguageModel:
    """Random weights large enough that logits, attention and thresholds matter."""
    import jax

    lm = _tiny_model(config, seed, scale, dtype)
    return dataclasses.replace(lm, params=jax.tree.map(lambda leaf: leaf, lm.params))  # dicts that a test may change


@functools.cache  # a second to compile, and a hundred tests want one
def _tiny_model(config: ModelConfig, seed: int, scale: float, dtype: str) -> LanguageModel:
    import jax
    import jax.numpy as jnp

    lm = random_model(config, seed=seed, dtype=jnp.dtype(dtype))
    grow = lambda leaf: leaf * scale if leaf.ndim == 2 else leaf  # noqa: E731
    lm.params["weights"] = jax.tree.map(grow, lm.params["weights"])
    return lm


def tiny_sparse(lm: LanguageModel, target: float) -> LanguageModel:
    """Under the uniform thresholds of a small calibration."""
    calibration = teal_jax.calibrate(lm, tiny_tokens(4, 32, seed=1), progress=False)
    return lm.sparsify(teal_jax.allocate(lm, calibration, target, method="uniform"))


def tiny_tokens(rows: int, seq: int, *, config: ModelConfig = TINY, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, seq), dtype=np.int32)


def weights64(lm: LanguageModel) -> dict:
    """The weights as float64 numpy arrays."""
    import jax

    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), lm.params["weights"])


def norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rope(x, config):
    """x [seq, heads, head_dim]; position = row."""
    half = config.head_dim // 2
    freq = np.array([config.rope.theta ** (-2 * i / config.head_dim) for i in range(half)])
    if config.rope.type == "llama3":
        r = config.rope
        for i, f in enumerate(freq):
            turns = r.original_max_position / (2 * math.pi / f)
            if turns < r.low_freq_factor:
                freq[i] = f / r.factor
            elif turns < r.high_freq_factor:
                smooth = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
                freq[i] = (1 - smooth) * f / r.factor + smooth * f
    elif config.rope.type == "linear":
        freq = freq / config.rope.factor
    angle = np.arange(len(x))[:, None, None] * freq
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def silu(x):
    return x / (1 + np.exp(-x))


def relu2(x):
    return np.maximum(x, 0) ** 2


ACTS = {"silu": silu, "relu2": relu2}


def block(layer, x, config, thresholds=None, sparse_from=0):
    """One block over x [seq, d]: output and the four sites. Thresholds [7] act from position `sparse_from` on."""

    def project(x, params, i):
        if thresholds is not None:
            late = np.arange(len(x))[:, None] >= sparse_from
            x = np.where(late & (np.abs(x) <= thresholds[i]), 0, x)
        return x @ params["weight"] + params.get("bias", 0)

    seq = len(x)
    attn_in = norm(x, layer["attn_norm"]["weight"], config.norm_eps)
    heads = lambda y: y.reshape(seq, -1, config.head_dim)  # noqa: E731
    q = rope(heads(project(attn_in, layer["attn"]["q_proj"], 0)), config)
    k = rope(heads(project(attn_in, layer["attn"]["k_proj"], 1)), config)
    v = heads(project(attn_in, layer["attn"]["v_proj"], 2))
    distance = np.arange(seq)[:, None] - np.arange(seq)
    allowed = distance >= 0
    if config.sliding_window:
        allowed &= distance < config.sliding_window
    mixed = np.zeros_like(q)
    for head in range(config.num_heads):
        kv = head // (config.num_heads // config.num_kv_heads)
        scores = np.where(allowed, q[:, head] @ k[:, kv].T / math.sqrt(config.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
    attn_out = mixed.reshape(seq, -1)
    x = x + project(attn_out, layer["attn"]["o_proj"], 3)
    mlp_in = norm(x, layer["mlp_norm"]["weight"], config.norm_eps)
    act = ACTS[config.hidden_act]
    hidden = act(project(mlp_in, layer["mlp"]["gate_proj"], 4)) * project(mlp_in, layer["mlp"]["up_proj"], 5)
    return x + project(hidden, layer["mlp"]["down_proj"], 6), (attn_in, attn_out, mlp_in, hidden)


def forward(lm, tokens, thresholds=None, sparse_from=0):
    """Logits [seq, vocab] of one sequence, and per layer the four sites."""
    weights = weights64(lm)
    x = weights["embed"]["weight"][tokens]
    taps = []
    for i in range(lm.config.num_layers):
        layer_thresholds = None if thresholds is None else thresholds[i]
        x, sites = block(weights["layers"][i], x, lm.config, layer_thresholds, sparse_from)
        taps.append(sites)
    x = norm(x, weights["final_norm"]["weight"], lm.config.norm_eps)
    head = weights["embed"]["weight"].T if lm.config.tie_embeddings else weights["lm_head"]["weight"]
    return x @ head, taps

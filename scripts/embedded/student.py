"""The student's training-only forward pass: the Decoder's formula over stacked layers, fast in bfloat16.

`teal_jax.nn.Decoder` keeps float32 attention scores and sums, which a backward pass would multiply in float32 too.
Here every product is bfloat16 (summed in float32 by the hardware) and attention is cuDNN's where there is one.
`check_forward` holds it to the Decoder.
"""

import jax
import jax.numpy as jnp

from teal_jax.model import LanguageModel, random_model
from teal_jax.nn.gates import Dense
from teal_jax.nn.rope import rotary_table, rotate

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def stack(weights):
    """The model's tree with its layers stacked: one `[layers, ...]` array per name, so that updates are batched."""
    layers = [weights["layers"][i] for i in sorted(weights["layers"])]
    return weights | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack(weights):
    """The inverse of `stack`."""
    depth = weights["layers"]["attn_norm"]["weight"].shape[0]
    return weights | {"layers": {i: jax.tree.map(lambda leaf: leaf[i], weights["layers"]) for i in range(depth)}}  # noqa: B023


def _norm(x, weight, eps):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


def _drop(x, key, rate):
    if not rate:
        return x
    cut = round(rate * 256)  # one random byte decides
    keep = jax.random.bits(key, x.shape, jnp.uint8) >= cut
    return jnp.where(keep, x * (256 / (256 - cut)), 0).astype(x.dtype)


@jax.custom_vjp
def _embed(table, tokens):
    return table[tokens]


def _embed_forward(table, tokens):
    return table[tokens], (table, tokens)


def _embed_backward(saved, gradient):
    table, tokens = saved
    # A product, not a scatter: common tokens would have thousands of rows wait for one another.
    hot = jax.nn.one_hot(tokens.reshape(-1), table.shape[0], dtype=gradient.dtype)
    return hot.T @ gradient.reshape(-1, table.shape[1]), None


_embed.defvjp(_embed_forward, _embed_backward)


def hidden(config, weights, tokens, *, key=None, dropout=0.0, attention="xla"):
    """The stream after the final norm `[batch, seq, d_model]`; stacked weights, tokens `[batch, seq]`."""
    batch, seq = tokens.shape
    rotary = rotary_table(jnp.arange(seq)[None], config.rope, config.head_dim)
    x = _embed(weights["embed"]["weight"], tokens)
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[i], weights["layers"])  # noqa: B023
        keys = [None] * 4 if key is None else jax.random.split(jax.random.fold_in(key, i), 4)
        attn, mlp = layer["attn"], layer["mlp"]
        h = _drop(_norm(x, layer["attn_norm"]["weight"], config.norm_eps), keys[0], dropout)
        q, k, v = ((h @ attn[n]["weight"]).reshape(batch, seq, -1, config.head_dim) for n in ATTENTION[:3])
        q, k = rotate(q, rotary), rotate(k, rotary)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + _drop(h.reshape(batch, seq, -1), keys[1], dropout) @ attn["o_proj"]["weight"]
        h = _drop(_norm(x, layer["mlp_norm"]["weight"], config.norm_eps), keys[2], dropout)
        h = jax.nn.silu(h @ mlp["gate_proj"]["weight"]) * (h @ mlp["up_proj"]["weight"])
        x = x + _drop(h, keys[3], dropout) @ mlp["down_proj"]["weight"]
    return _norm(x, weights["final_norm"]["weight"], config.norm_eps)


@jax.custom_vjp
def _head(x, embedding):
    return jnp.einsum("bsd,vd->bsv", x, embedding, preferred_element_type=jnp.float32)


def _head_forward(x, embedding):
    return _head(x, embedding), (x, embedding)


def _head_backward(saved, gradient):
    x, embedding = saved
    gradient = gradient.astype(x.dtype)  # else both products below would be float32
    return jnp.einsum("bsv,vd->bsd", gradient, embedding), jnp.einsum("bsv,bsd->vd", gradient, x)


_head.defvjp(_head_forward, _head_backward)


def loss(config, weights, tokens, pad, **options):
    """Mean negative log-likelihood (nats) of the tokens after the first, `[batch, seq]`.

    Not scored: a pad token, and what follows one (the BOS after an unfinished story, which is no ending).
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = _head(hidden(config, weights, inputs, **options), weights["embed"]["weight"])
    is_target = jnp.arange(config.vocab_size) == targets[..., None]  # a gather's gradient would be a scatter
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    scored = (inputs != pad) & (targets != pad)
    return jnp.sum(nll * scored) / jnp.sum(scored)


def check_forward(config, attention):
    """Largest relative difference of logits to the Decoder's, on random weights, in float32 and in bfloat16.

    Raises unless they are small. cuDNN has no float32: there the first of the two uses the plain attention.
    """
    weights = random_model(config, seed=1).params["weights"]
    tokens = jax.random.randint(jax.random.key(2), (2, 64), 0, config.vocab_size)
    errors = []
    for dtype, kind, limit in ((jnp.float32, "xla", 5e-3), (jnp.bfloat16, attention, 5e-2)):  # tf32 on a GPU
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)  # noqa: B023
        lm = LanguageModel(config=config, params={"weights": cast, "gates": Dense()}, name="random")
        expected = lm.logits(tokens)
        logits = _head(hidden(config, stack(cast), tokens, attention=kind), cast["embed"]["weight"])
        error = float(jnp.abs(logits - expected).max() / jnp.abs(expected).max())
        if not error < limit:
            raise AssertionError(
                f"the training forward pass differs from the Decoder by {error:.1e} in {dtype.__name__}"
            )
        errors.append(f"{error:.1e}")
    return errors

"""A batch through a Llama in float64 numpy, under any masks: what the analyses are compared with."""

import math

import numpy as np

from tests.reference import norm, rope, silu, weights64


def forward(lm, tokens, keep):
    """Mean negative log-likelihood of every token but the first [batch, seq - 1], and each layer's seven masks.

    `keep(layer, i, x, gate)` gives the mask of projection i for its input x [batch, seq, width]; gate is silu(gate)
    for down, else None.
    """
    weights, config = weights64(lm), lm.config
    x = weights["embed"]["weight"][tokens]
    masks = []
    for index in range(config.num_layers):
        layer, of_layer = weights["layers"][index], []

        def project(x, params, i, gate=None, *, index=index, of_layer=of_layer):
            of_layer.append(np.broadcast_to(keep(index, i, x, gate), x.shape))
            return np.where(of_layer[-1], x, 0) @ params["weight"]

        attn_in = norm(x, layer["attn_norm"]["weight"], config.norm_eps)
        q, k, v = (project(attn_in, layer["attn"][f"{name}_proj"], i) for i, name in enumerate("qkv"))
        mixed = np.stack([attend(*row, config)[0] for row in zip(q, k, v, strict=True)])
        x = x + project(mixed, layer["attn"]["o_proj"], 3)
        mlp_in = norm(x, layer["mlp_norm"]["weight"], config.norm_eps)
        gate = silu(project(mlp_in, layer["mlp"]["gate_proj"], 4))
        hidden = gate * project(mlp_in, layer["mlp"]["up_proj"], 5)
        x = x + project(hidden, layer["mlp"]["down_proj"], 6, gate)
        masks.append(of_layer)
    x = norm(x, weights["final_norm"]["weight"], config.norm_eps)
    head = weights["embed"]["weight"].T if config.tie_embeddings else weights["lm_head"]["weight"]
    logits = x @ head
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None].astype(int), -1)[..., 0]
    return total[:, :-1] - picked, masks


def attend(q, k, v, config):
    """One row [seq, width] each: the mixed values [seq, width], and the weights [heads, seq, seq]."""
    seq = len(q)
    heads = lambda y: y.reshape(seq, -1, config.head_dim)  # noqa: E731
    q, k, v = rope(heads(q), config), rope(heads(k), config), heads(v)
    causal = np.tril(np.ones((seq, seq), bool))
    mixed, every = np.zeros_like(q), []
    for head in range(config.num_heads):
        kv = head // (config.num_heads // config.num_kv_heads)
        scores = np.where(causal, q[:, head] @ k[:, kv].T / math.sqrt(config.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        every.append(weights / weights.sum(-1, keepdims=True))
        mixed[:, head] = every[-1] @ v[:, kv]
    return mixed.reshape(seq, -1), np.stack(every)


def dropped(masks, where):
    """Share of the channels dropped at the positions `where` [seq], [layers, 7]."""
    return np.array([[1 - mask[:, where].mean() for mask in layer] for layer in masks])

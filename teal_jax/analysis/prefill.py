"""Thinning the prompt as well: all of it, its later part, all but the first tokens; scored on what follows it.

References:
  TEAL, arXiv 2408.14690, section 5.4.3.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from teal_jax.analysis.cost import Cost
from teal_jax.analysis.forward import KEEP_ALL, Limits, Scored, score, threshold_step
from teal_jax.analysis.rows import Rows
from teal_jax.config import ModelConfig
from teal_jax.model import LanguageModel
from teal_jax.nn.attention import make_context
from teal_jax.nn.gates import Dense
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, block_graph, dense_block, embed
from teal_jax.sparsity.plan import SparsityPlan

FIRST = (1, 4, 16)
"""Initial tokens that a policy may treat apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillRow:
    """One policy under one plan.

    Attributes:
      policy: which tokens are thinned, in words.
      target: of the plan.
      thinned: share of a row's tokens that are thinned.
      cost: of the tokens after the prompt; its sparsity is over the thinned tokens alone.
    """

    policy: str
    target: float
    thinned: float
    cost: Cost


def policies(seq: int, prompt: int, first: Sequence[int] = FIRST) -> dict[str, np.ndarray]:
    """By name, the positions thinned, bool `[seq]`; of `first` those that lie within the prompt.

    Two kinds: some of the prompt thinned and everything after it (as a scoring task would), and a few tokens of
    the prompt alone, its first or as many before its end: what each of them is worth. A prompt of half a row is
    left dense by "second half" already.
    """
    at = np.arange(seq)
    found = {"all": at >= 0, "second half": at >= -(-seq // 2), "after the prompt": at >= prompt}
    if (found["second half"] == found["after the prompt"]).all():
        del found["after the prompt"]
    first = [k for k in first if k < prompt]
    found |= {f"all but the first {k}": at >= k for k in first}
    for k in first:
        found[f"only the first {k}"] = at < k
        found[f"only the prompt's last {k}"] = (at >= prompt - k) & (at < prompt)
    return found


def compare_prefill(
    lm: LanguageModel,
    plans: Sequence[SparsityPlan],
    rows: Rows,
    dense: Scored,
    *,
    first: Sequence[int] = FIRST,
    progress: bool = True,
) -> list[PrefillRow]:
    """Every policy under every plan.

    Args:
      lm: its gates are ignored.
      plans: of this model, with one threshold a projection.
      rows: what to score.
      dense: the dense model's score of `rows`.
      first: numbers of initial tokens.
      progress: draw a progress bar.
    """
    masks = policies(rows.tokens.shape[1], rows.prompt, first)
    no_gate = np.full(lm.config.num_layers, KEEP_ALL, np.float32)
    found = []
    work = [(plan, policy) for plan in plans for policy in masks]
    for plan, policy in track(work, "Sparse prefill", enabled=progress):
        plan.check_fits(lm.config)
        where = masks[policy]
        scored = score(lm, rows, threshold_step, Limits(plan.thresholds, no_gate), where=where)
        cost = Cost.of(lm.config, scored, dense)
        found.append(PrefillRow(policy=policy, target=plan.target, thinned=float(where.mean()), cost=cost))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _first_attention(config: ModelConfig, layer_params: dict, x: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
    y, taps = dense_block(config, layer_params, x)
    attn = nnx.merge(block_graph(config), layer_params).attn
    context = make_context(config, jnp.ones(x.shape[:2], bool), None)
    q = attn.queries(taps.attn_in, Dense(), context.rotary).astype(jnp.float32)
    k = attn.keys(taps.attn_in, Dense(), context.rotary).astype(jnp.float32)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bshd,bthd->bhst", q, k, precision="highest") * config.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(context.visible, scores, -jnp.inf), axis=-1)
    return y, (weights[..., 0].mean(axis=(0, 1)) * where).sum() / where.sum()


def first_token_attention(lm: LanguageModel, rows: Rows) -> np.ndarray:
    """Share of its attention that the dense model gives to the first token of a row, float64 `[layers]`.

    The mean over heads, rows and the positions after the prompt. A large share is an attention sink: then thinning
    the first token costs much. Attention spread evenly would give `1 / (position + 1)`.
    """
    slices = batches(*rows.tokens.shape)
    shares = np.zeros(lm.config.num_layers)
    for part in slices:
        x = embed(lm, rows.tokens[part])
        for layer in range(lm.config.num_layers):
            x, share = _first_attention(lm.config, lm.params["weights"]["layers"][layer], x, rows.after_prompt)
            shares[layer] += float(share) / len(slices)
    return shares

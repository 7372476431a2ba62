"""LaRoSA (arXiv 2507.01299): the inputs of q, k, v and of gate, up in their principal components, top-K there.

Q holds the eigenvectors of the uncentred covariance of the site on calibration text, one Q a site and layer; o and down
take top-K of |x_i|. Reading Q costs `d_model ** 2` weights a site. The target counts rows, as in the paper, so that the
weights left unread fall short of it: `plan.reached` says by how much.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import SITE_OF_PROJECTION, ModelConfig
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, dense_block, embed
from teal_jax.sparsity.methods.choice import Choice, Task, flat, no_thresholds
from teal_jax.sparsity.plan import array_name

ROTATED = (0, 2)
"""Sites that are rotated: `attn_in` and `mlp_in`."""


def choose(task: Task) -> Choice:
    """The target everywhere, in rows."""
    sparsity = flat(task)
    memo = task.calibration.memo
    if "larosa" not in memo:
        memo["larosa"] = rotations(task)
    arrays = {
        array_name("rotation", layer, SITE_OF_PROJECTION.index(site)): turn
        for layer, turns in enumerate(memo["larosa"])
        for site, turn in zip(ROTATED, turns, strict=True)
    }
    return Choice(sparsity=sparsity, thresholds=no_thresholds(sparsity), gate="top_k", arrays=arrays)


def rotations(task: Task) -> list[list[np.ndarray]]:
    """Q of the rotated sites of every layer, float32 `[d_model, d_model]`, largest component first."""
    lm, tokens = task.lm, task.calibration.tokens
    x = embed(lm, tokens)
    found = []
    for layer in track(range(lm.config.num_layers), "Principal components", enabled=task.progress):
        params = lm.params["weights"]["layers"][layer]
        outputs, sums = [], np.zeros((len(ROTATED), lm.config.d_model, lm.config.d_model))
        for part in batches(*tokens.shape):
            y, covariance = _covariance(lm.config, params, x[part])
            sums += np.asarray(covariance, np.float64)
            outputs.append(y)
        found.append([np.linalg.eigh(total)[1][:, ::-1].astype(np.float32) for total in sums])
        x = jnp.concatenate(outputs)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _covariance(config: ModelConfig, layer_params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, taps = dense_block(config, layer_params, x)
    sites = jnp.stack([taps[site].reshape(-1, config.d_model).astype(jnp.float32) for site in ROTATED])
    return y, jnp.einsum("sti,stj->sij", sites, sites, precision="highest")

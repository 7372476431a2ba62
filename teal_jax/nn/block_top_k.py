"""`BlockTopK`: Block Q-Sparse, N of every M neighbouring channels, so that what a batch reads has a structure."""

import dataclasses

import jax
import jax.numpy as jnp

from teal_jax.errors import SparsityError
from teal_jax.nn.top_k_keys import keep_largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTopK:
    """Per token and block of `block` channels, the `count` of largest |x_i| are kept; of equal ones the lower index.

    Attributes:
      count: int32, N: `[layers, 7]` for a model, `[7]` for a block of it, a scalar for one projection.
      block: M; it divides the channels of every site.
      where: as in `Threshold`.

    References:
      Q-Sparse, arXiv 2407.10969, section 2 (Block Q-Sparse).
    """

    count: jax.Array
    block: int = dataclasses.field(metadata={"static": True})
    where: jax.Array | None = None

    def __getitem__(self, index: int) -> "BlockTopK":
        return dataclasses.replace(self, count=self.count[index])

    def on(self, where: jax.Array) -> "BlockTopK":
        """The same counts, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return dataclasses.replace(self, where=where)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x `[batch, seq, d_in]`, bool; raises `SparsityError` where M does not divide d_in."""
        check_block(self.block, x.shape[-1])
        kept = jnp.reshape(keep_largest(jnp.reshape(x, (*x.shape[:-1], -1, self.block)), self.count), x.shape)
        return kept if self.where is None else kept | ~self.where[..., None]


def check_block(block: int, width: int) -> None:
    """Raise `SparsityError` unless blocks of `block` channels fill `width`."""
    if block < 1 or width % block:
        raise SparsityError(
            f"blocks of {block} channels do not fill {width}", hint="M of N:M must divide the width of every site"
        )

"""`Relu`: the gate that Q-Sparse compares top-K with: what is negative goes."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Relu:
    """Input channel i is kept iff not `x_i <= 0` (a NaN is kept): how many, the training decides.

    One for a model, a block or a projection. It runs without the kernels.

    Attributes:
      where: as in `Threshold`.

    References:
      Q-Sparse, arXiv 2407.10969, ablation of top-K against ReLU.
    """

    where: jax.Array | None = None

    def __getitem__(self, index: int) -> "Relu":
        return self

    def on(self, where: jax.Array) -> "Relu":
        """The same, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return Relu(where)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x `[batch, seq, d_in]`, bool."""
        kept = ~(x <= 0)
        return kept if self.where is None else kept | ~self.where[..., None]

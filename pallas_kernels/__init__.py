"""Sparse matrix-vector kernels for GPUs, each beside its plain-jnp reference. Depends on jax alone.

`sparse_matvec` is all of it behind one call; the kernels of a decode step are in modules of their own.
"""

from pallas_kernels.reference import keep_mask as keep_mask
from pallas_kernels.reference import masked_matmul as masked_matmul
from pallas_kernels.sparse import sparse_matvec as sparse_matvec

"""Sparse matrix-vector kernels. Depends on jax alone; `teal_jax.nn.project` is its one caller."""

from pallas_kernels.reference import keep_mask as keep_mask
from pallas_kernels.reference import masked_matmul as masked_matmul

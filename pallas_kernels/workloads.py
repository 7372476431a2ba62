"""Sizes of public models, by name: what the kernels are tested, tiled and timed on."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a decoder, from its public config.json; `tied`: the lm_head is the transposed embedding."""

    name: str
    vocab_size: int
    d_model: int
    d_mlp: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    tied: bool = False

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """`(d_in, d_out)` of each of a block's seven matrices."""
        d, m = self.d_model, self.d_mlp
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, m), "up": (d, m), "down": (m, d)}


LLAMA_2_7B = Workload(
    name="llama-2-7b", vocab_size=32000, d_model=4096, d_mlp=11008, num_layers=32, num_heads=32, num_kv_heads=32
)
LLAMA_3_8B = Workload(
    name="llama-3-8b", vocab_size=128256, d_model=4096, d_mlp=14336, num_layers=32, num_heads=32, num_kv_heads=8
)
LLAMA_3_70B = Workload(
    name="llama-3-70b", vocab_size=128256, d_model=8192, d_mlp=28672, num_layers=80, num_heads=64, num_kv_heads=8
)
MISTRAL_7B = Workload(
    name="mistral-7b", vocab_size=32000, d_model=4096, d_mlp=14336, num_layers=32, num_heads=32, num_kv_heads=8
)
LLAMA_3_2_1B = Workload(
    name="llama-3.2-1b",
    vocab_size=128256,
    d_model=2048,
    d_mlp=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    tied=True,
)

WORKLOADS = {w.name: w for w in (LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B, MISTRAL_7B, LLAMA_3_2_1B)}
"""By name."""

import pytest

from pallas_kernels.launch import whole_lists
from pallas_kernels.tiles import COUNTERS, Tile, decode_tiles, matvec_tile
from pallas_kernels.workloads import WORKLOADS


def projection_groups(workload):
    """`(d_in, d_outs)` of each matvec of a step."""
    shapes = workload.projection_shapes
    groups = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    return [(shapes[g[0]][0], tuple(shapes[p][1] for p in g)) for g in groups]


def programs(tile: Tile, d_outs: tuple[int, ...]) -> int:
    return tile.splits * sum(whole_lists(d_out, tile.columns) for d_out in d_outs)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_workloads_fill_the_gpu_and_no_more(workload, batch, dense):
    for d_in, d_outs in projection_groups(workload):
        tile = matvec_tile(d_in, d_outs, batch=batch, dense=dense)
        assert programs(tile, d_outs) >= 132  # multiprocessors of an H200
        assert tile.columns * 2 >= 256  # bytes of a bfloat16 row: fewer are not read at full speed
        assert tile.splits * tile.rows * tile.unroll <= d_in  # no program without a whole step
        assert tile.splits * (4 + 4) <= 0.1 * d_in * 2  # partial sums written and read, against bytes of weights


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_codes_fill_the_gpu_and_no_more(workload, batch, dense, bits):
    for d_in, d_outs in projection_groups(workload):
        tile = matvec_tile(d_in, d_outs, batch=batch, dense=dense, bits=bits)
        assert programs(tile, d_outs) >= 128
        assert tile.columns * bits >= 8 * 128
        assert tile.each * bits <= 128  # bits of a load
        assert tile.each * batch + 4 * tile.unroll < tile.registers  # sums, and what is in flight
        assert tile.splits * tile.rows * tile.unroll <= d_in
        assert tile.splits * (4 + 4) <= 0.25 * d_in * bits / 8


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("d_outs", [(1,), (33, 7), (128,), (4096, 1), (128256,)])
@pytest.mark.parametrize("d_in", [1, 7, 129, 4096, 100_000])
def test_any_size_has_a_tile_that_triton_takes(d_in, d_outs, batch, dense, bits):
    tile = matvec_tile(d_in, d_outs, batch=batch, dense=dense, bits=bits)
    assert all(power_of_two(n) for n in (tile.columns, tile.warps, tile.rows, tile.each))
    assert 32 <= tile.columns <= 1024
    assert tile.splits >= 1
    assert tile.unroll >= 1
    assert tile.registers % 8 == 0  # as ptxas hands them out, up to 255
    assert tile.registers <= 255


@pytest.mark.parametrize(
    ("batch", "dense"),
    [
        (1, False),
        (8, False),
        (1, True),
        (4, True),
        (8, True),
    ],
)
def test_a_multiprocessor_has_the_registers(batch, dense):
    tile = matvec_tile(4096, (128256,), batch=batch, dense=dense)
    assert tile.registers * tile.warps * 32 <= 65_536


def test_rows_are_loaded_sixteen_bytes_a_thread():
    assert Tile(128, 1, warps=8).rows * 128 == 8 * 32 * 8
    assert Tile(32, 1, warps=1).rows == 8
    assert Tile(1024, 1, warps=1).rows == 1  # never none


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_a_decode_step(workload):
    attn, attn_kv = (heads * workload.head_dim for heads in (workload.num_heads, workload.num_kv_heads))
    tiles = decode_tiles(workload.d_model, workload.d_mlp, attn, attn_kv, workload.vocab_size, batch=2)
    matvecs = dict(zip(("qkv", "o", "gate_up", "down"), projection_groups(workload), strict=True))
    matvecs["lm_head"] = (workload.d_model, (workload.vocab_size,))
    for name, (d_in, d_outs) in matvecs.items():
        tile = getattr(tiles, name)
        assert tile.splits * tile.rows <= d_in
        assert sum(whole_lists(d_out, tile.columns) for d_out in d_outs) <= COUNTERS
    assert power_of_two(tiles.width)

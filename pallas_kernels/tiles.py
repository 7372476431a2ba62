"""How a matvec is cut into programs, and why."""

import dataclasses
import functools

KEPT_THREADS, DENSE_THREADS, CODED_THREADS = 90112, 81920, 86016
"""That share a matrix: 680, 620 and, for all rows of codes, 650 on each of an H200's 132 multiprocessors. About the
best of those timed there.

More leave more partial sums to add. Kept rows differ in number from list to list: more, smaller programs even it out.
"""

COUNTERS = 8192
"""Counters for any step: one a column tile, of at least 32 columns."""

REGISTERS = 65536
"""Of a multiprocessor, for all threads of its programs."""

LARGE, HUGE = 16384, 65536
"""Outputs from which a matrix has columns enough for wider programs: see `matvec_tile`."""

FEW = 2**25
"""Weights of a matrix so small that each thread sums only a few rows."""

WIDE_SPLITS, FILLED = 8, 240
"""Of tiles of 256 columns: splits, more than the threads above ask for and faster; and the tiles, an lm_head's, from
which a matrix has programs enough without."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program sums `unroll` groups of `rows` rows at a time, over `columns` outputs; `splits` share the rows.

    Attributes:
      columns: outputs of a program, a power of two. Wide rows are read better; see `matvec_tile`.
      splits: programs that share the rows of one column tile; their partial sums are added in the end.
      unroll: groups of rows in flight.
      warps: of 32 threads, a program, a power of two.
      registers: most of them a thread; see `registers.begin`.
      each: weights of a row that a thread loads at once: 8 are 16 bytes of bfloat16.
    """

    columns: int
    splits: int
    unroll: int = 8
    warps: int = 8
    registers: int = 64
    each: int = 8

    @property
    def rows(self) -> int:
        """Rows of W that the threads load at once."""
        return max(1, self.warps * 32 * self.each // self.columns)


def matvec_tile(d_in: int, d_outs: tuple[int, ...], *, batch: int = 1, dense: bool = False, bits: int = 16) -> Tile:
    """A tile for weights `[d_in, d_out]` of every segment, chosen by measurement on an H200.

    128 columns are 256 bytes of a row; 64 bytes took half as long again as 128 (14336 x 4096). Matrices of many
    columns take 256 of them, an lm_head 512. Programs of four warps are best for kept rows, larger ones for dense
    rows. Eight groups of rows in flight are what 64 registers a thread hold; more batch rows need registers for
    their sums.

    Args:
      d_in: rows.
      d_outs: columns of every segment.
      batch: tokens of a step.
      dense: all rows are read.
      bits: of a weight; 8 and 4 are those of a `CodedMatrix`.
    """
    if bits < 16:
        return _coded_tile(d_in, d_outs, batch=batch, dense=dense, bits=bits)
    columns, warps, unroll = (256, 16, 4) if dense else (256, 4, 8)
    if sum(d_outs) < LARGE:
        columns, warps = 128, 8 if dense else 4
        unroll = 8
    elif dense and sum(d_outs) >= HUGE:
        columns = 512
    while columns > 32 and columns > min(d_outs):
        columns //= 2
    registers = min(64 if batch <= 2 else 96 if batch <= 4 else 168, REGISTERS // (32 * warps))
    tile = Tile(columns, 1, unroll if batch <= 4 else min(unroll, 4), warps, registers)
    wide = columns >= 256 and _tiles(d_outs, columns) <= FILLED
    return _split(tile, d_in, WIDE_SPLITS if wide else _wanted(tile, d_outs, DENSE_THREADS if dense else KEPT_THREADS))


def _coded_tile(d_in: int, d_outs: tuple[int, ...], *, batch: int, dense: bool, bits: int) -> Tile:
    """Also 256 bytes of a row, sixteen bytes a thread: more columns, in fewer tiles of more threads.

    A thread has a sum for each of its columns and batch rows, which are added up across threads in the end. Where
    those are many, or where a thread has few rows to spread that over (`FEW`), it takes fewer columns:
    4096 x 4096 in 4 bits, half of it kept, took 8.4 us without that and takes 6.7.
    """
    narrow = bits == 4 and d_in * sum(d_outs) <= FEW
    columns, each = (1024 // bits, 64 // bits) if narrow else (2048 // bits, 128 // bits)
    large, huge = sum(d_outs) >= LARGE, dense and sum(d_outs) >= HUGE
    columns *= 2 if huge else 1
    while columns > 32 and columns > min(d_outs):
        columns //= 2
    each = min(each, 64 >> (batch - 1).bit_length())
    sums = each * batch
    warps = 4 if large and not dense else 16 if huge and batch == 1 else 8
    registers = 64 if sums <= 16 else (72 if warps == 4 else 80) if sums <= 32 else 128
    tile = Tile(columns, 1, 4, warps, registers, each)
    wanted = _wanted(tile, d_outs, CODED_THREADS if dense else KEPT_THREADS)
    if bits == 4 and large and dense:  # bound by arithmetic: more programs keep every multiprocessor busy
        wanted *= 1.75
    # The partial sums, written and read, should stay well below the weights, which are small here.
    return _split(tile, d_in, wanted, most=max(1, d_in * bits // 256))


def _tiles(d_outs: tuple[int, ...], columns: int) -> int:
    return sum(-(-d_out // columns) for d_out in d_outs)


def _wanted(tile: Tile, d_outs: tuple[int, ...], threads: int) -> float:
    """Splits that make for about so many threads."""
    return threads / (32 * tile.warps * _tiles(d_outs, tile.columns))


def _split(tile: Tile, d_in: int, wanted: float, most: int | None = None) -> Tile:
    """The tile with about `wanted` splits, at most `most`."""
    # Groups of rows should go round evenly: then no program of dense rows needs a mask, or has less to do.
    groups = max(1, d_in // (tile.rows * tile.unroll))

    def cost(splits: int) -> float:
        uneven = -(-groups // splits) * splits / groups
        return uneven**4 * max(splits / wanted, wanted / splits) ** 0.5

    return dataclasses.replace(tile, splits=min(range(1, min(groups, most or groups) + 1), key=cost))


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits of a weight of each matvec of a decode step: 16 or more of a float, 8 or 4 of a code."""

    qkv: int = 16
    o: int = 16
    gate_up: int = 16
    down: int = 16
    lm_head: int = 16


FLOATS = Bits()
"""Of a model without codes."""


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Every size that a decode step's kernels are cut by.

    Attributes:
      width: channels a list of the kept rows that the norms write.
      qkv, o, gate_up, down, lm_head: of the matvecs.
    """

    width: int
    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    lm_head: Tile


def decode_tiles(
    d_model: int,
    d_mlp: int,
    attn: int,
    attn_kv: int,
    vocab_size: int,
    *,
    batch: int = 1,
    dense: bool = False,
    bits: Bits = FLOATS,
) -> DecodeTiles:
    """The tiles of a decode step.

    Args:
      d_model: width of the residual stream.
      d_mlp: width of the MLP's hidden layer.
      attn: `num_heads * head_dim`.
      attn_kv: `num_kv_heads * head_dim`.
      vocab_size: of the lm_head, which is always dense.
      batch: tokens of a step.
      dense: without thresholds.
      bits: of the weights.
    """
    tile = functools.partial(matvec_tile, batch=batch)
    return DecodeTiles(
        width=128,
        qkv=tile(d_model, (attn, attn_kv, attn_kv), dense=dense, bits=bits.qkv),
        o=tile(attn, (d_model,), dense=dense, bits=bits.o),
        gate_up=tile(d_model, (d_mlp, d_mlp), dense=dense, bits=bits.gate_up),
        down=tile(d_mlp, (d_model,), dense=dense, bits=bits.down),
        lm_head=tile(d_model, (vocab_size,), dense=True, bits=bits.lm_head),
    )

"""Time the decode loop under other tiles, one kernel at a time: to choose those of `pallas_kernels/tiles.py` anew.

    python benchmarks/tiles.py --layers 4 --kernel down gate_up --sparsity 0.5

A few layers of a Llama-3-8B shape, random weights. A kernel timed alone is not what counts: in the loop it finds
other data in the caches and starts while the one before it ends. Prints microseconds a layer, the best first.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools

import jax
import numpy as np

from pallas_kernels.tiles import REGISTERS, DecodeTiles, Tile
from pallas_kernels.workloads import LLAMA_3_8B
from teal_jax.benchmark import run
from teal_jax.benchmark.shapes import workload_config
from teal_jax.benchmark.sharing import uniform
from teal_jax.benchmark.thresholds import fit_thresholds
from teal_jax.model import random_model
from teal_jax.nn.fused_step import choose_tiles, fused_step
from teal_jax.nn.gates import Dense, Threshold

MATVECS = ("qkv", "o", "gate_up", "down", "lm_head")
CONTEXT, TOKENS, REPEATS = 512, 96, 6


def candidates() -> list[Tile]:
    """Tiles worth a try: those whose registers a multiprocessor has."""
    tiles = []
    for columns, warps, unroll, splits in itertools.product((128, 256, 512), (4, 8, 16), (4, 8, 16), (4, 8, 16, 28)):
        registers = 64 if unroll <= 8 else 128
        if columns <= 256 * warps and registers * warps * 32 <= REGISTERS:
            tiles.append(Tile(columns, splits, unroll, warps, registers))
    return tiles


def variants(base: DecodeTiles, kernels: list[str]) -> dict[str, DecodeTiles]:
    """The tiles as they are, and with one kernel's replaced by each candidate."""
    found = {"as chosen": base}
    for kernel in kernels:
        for tile in candidates():
            name = f"{kernel} {tile.columns} columns, {tile.splits} splits, unroll {tile.unroll}, {tile.warps} warps"
            found[name] = dataclasses.replace(base, **{kernel: tile})
    return found


def main() -> None:
    """Compile all variants, then time each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kernel", nargs="+", choices=MATVECS, default=["down"])
    parser.add_argument("--sparsity", type=float, default=0.5, help="0 is dense")
    options = parser.parse_args()

    config = dataclasses.replace(workload_config(LLAMA_3_8B), num_layers=options.layers)
    lm = random_model(config, dtype="bfloat16")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, CONTEXT), dtype=np.int32)
    start = run.prefill(lm, tokens[:, : CONTEXT - TOKENS], CONTEXT)
    gates = Dense()
    if options.sparsity:
        fit = fit_thresholds(lm, tokens, uniform(config, options.sparsity), CONTEXT - TOKENS)
        gates = Threshold(jax.numpy.asarray(fit.thresholds))
    params = lm.params | {"gates": gates}
    base = choose_tiles(config, 1, dense=not options.sparsity)

    def compiled(tiles: DecodeTiles) -> run.Compiled:
        step = functools.partial(fused_step, config, tiles=tiles)
        return run.compile_loop(
            lambda p, token, cache: step(p["weights"], p["gates"], token, cache), params, start, TOKENS
        )

    seconds = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = {name: pool.submit(compiled, tiles) for name, tiles in variants(base, options.kernel).items()}
        for name, job in jobs.items():
            try:
                speed = run.time_loop(job.result(), params, start, TOKENS, REPEATS, compiled_now=False)
            except Exception as error:  # a tile that does not compile must not end the others
                print(f"{name}: {type(error).__name__}")
                continue
            seconds[name] = speed.seconds
            print(f"{name}: {1e3 * speed.seconds:.4f} ms a token", flush=True)
    print(f"\n{options.layers} layers, {options.sparsity:g} sparse, best first, against the tiles as chosen:")
    for name, time in sorted(seconds.items(), key=lambda item: item[1])[:12]:
        change = 1e6 * (time - seconds["as chosen"]) / options.layers
        print(f"{1e3 * time:.4f} ms a token, {change:+.2f} us a layer: {name}")


if __name__ == "__main__":
    main()

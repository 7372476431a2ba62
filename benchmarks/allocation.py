"""Time the greedy allocation of a full-size model: random weights, the paper's 10 x 2048 calibration tokens.

    python benchmarks/allocation.py --shape llama-3-8b --out benchmarks/results

The time of a search does not depend on the weights' values, so none need downloading. Prints a table and writes
JSON with hardware, versions and every layer count that matters.
"""

import argparse
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

import teal_jax
from pallas_kernels.workloads import LLAMA_3_8B
from teal_jax.benchmark.shapes import workload_config
from teal_jax.config import ModelConfig
from teal_jax.sparsity.greedy import greedy_path

SHAPES = {
    "llama-3-8b": workload_config(LLAMA_3_8B),
    "tiny": ModelConfig(
        vocab_size=512,
        d_model=128,
        d_mlp=352,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=2048,
        norm_eps=1e-5,
    ),
}


def main() -> None:
    """Calibrate, search, look up; time each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = SHAPES[options.shape]
    seconds = {}

    def timed(name, work):
        start = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    lm = teal_jax.random_model(config, dtype="bfloat16")
    timed("random weights", lambda: jax.block_until_ready(lm.params))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (options.rows, options.seq_len), dtype=np.int32)
    calibration = timed("calibrate", lambda: teal_jax.calibrate(lm, tokens))
    calibration.path = timed("greedy search", lambda: greedy_path(lm, calibration))
    path = calibration.path
    plans = timed("three look-ups", lambda: [teal_jax.allocate(lm, calibration, t) for t in (0.25, 0.4, 0.5)])
    target = int(np.abs(path.effective - 0.5).argmin())
    steps = len(path.effective) - 1
    report = {
        "shape": options.shape,
        "layers": config.num_layers,
        "tokens": [options.rows, options.seq_len],
        "seconds": seconds,
        "steps_per_block": steps,
        "block_evaluations_per_block": 8 * steps,
        "block_evaluations": 8 * steps * config.num_layers,
        "error_ratio_to_uniform_at_0.5": float((path.error[:, target] / path.uniform_error[:, target]).mean()),
        "uniform_blocks": [plan.notes["allocation"]["uniform_blocks"] for plan in plans],
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "device": jax.devices()[0].device_kind,
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "numpy")}
        | {"python": platform.python_version()},
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"allocation-{options.shape}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

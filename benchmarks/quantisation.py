"""What few bits and sparsity cost together: formats x quantisers x sparsities, one table and one plot.

    python benchmarks/quantisation.py MODEL --data test.jsonl --calibration-data train.txt --out benchmarks/results

Every quantised model is calibrated itself and thinned uniformly, every token of the text; perplexity, the divergence
from the model without either, and how often both rank the same token first. Writes JSON, markdown and a PNG.

Rows go to OUT/quantisation-MODEL.jsonl as they are measured and are not measured again: a killed run goes on, and
several with different --formats can run side by side. The last to end reports all.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import teal_jax
from teal_jax.benchmark.report import versions
from teal_jax.embedded import CALIBRATION_TEXT, HELDOUT_TEXT
from teal_jax.evaluation.comparison import DenseSide, compare
from teal_jax.evaluation.text import read_text
from teal_jax.model import LanguageModel
from teal_jax.plots import COLOURS, MARKERS, figure

FORMATS = ("int8", "int4", "int3", "int2")
METHODS = ("rtn", "awq", "gptq")
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65)


WAYS: list[tuple[str, str | None]] = [("none", None), *((f, m) for f in FORMATS for m in METHODS)]


def cells(
    lm: LanguageModel, side: DenseSide, ways: list[tuple[str, str | None]], calibration_text: Any, tokens: int
) -> Iterable[dict[str, Any]]:
    """A row for each way and sparsity, as they are measured."""
    for format, method in ways:
        model = lm
        if method is not None:
            model = teal_jax.quantize(
                lm, format, method=method, data=calibration_text, num_tokens=tokens, progress=False
            )
        calibration = teal_jax.calibrate(model, calibration_text, num_tokens=tokens, progress=False)
        for target in SPARSITIES:
            sparse = model
            if target:
                sparse = model.sparsify(teal_jax.allocate(model, calibration, target, method="uniform"))
            found = compare(side, sparse, progress=False)
            yield {
                "format": format,
                "method": method,
                "target": target,
                "realised": float(np.average(found.realised.mean(axis=0), weights=lm.config.projection_sizes)),
                "ppl": float(np.exp(found.nll.mean(dtype=np.float64))),
                "kl": float(found.kl.mean(dtype=np.float64)),
                "top1": float(found.same.mean()),
            }


def markdown(rows: list[dict[str, Any]], show: str) -> str:
    """One line a format and quantiser, one column a sparsity."""
    lines = ["| | " + " | ".join(f"{100 * s:g} %" for s in SPARSITIES) + " |", "|---" * (1 + len(SPARSITIES)) + "|"]
    for format, method in dict.fromkeys((row["format"], row["method"]) for row in rows):
        own = {row["target"]: row[show] for row in rows if (row["format"], row["method"]) == (format, method)}
        name = "unquantised" if method is None else f"{format}, {method}"
        lines.append(f"| {name} | " + " | ".join(f"{own[s]:.3f}" if s in own else "" for s in SPARSITIES) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Perplexity over that of the same format dense, GPTQ's: where the knee is."""
    with figure(path, 7.2, 4.4) as axes:
        for i, format in enumerate(("none", *FORMATS)):
            own = [row for row in rows if row["format"] == format and row["method"] in (None, "gptq")]
            if not own:
                continue
            shares, ratios = zip(*((100 * row["realised"], row["ppl"] / own[0]["ppl"]) for row in own), strict=True)
            label = f"{'unquantised' if format == 'none' else format} ({own[0]['ppl']:.2f} dense)"
            axes.plot(shares, ratios, marker=MARKERS[i % 6], color=COLOURS[i % 6], label=label)
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.set_xlabel("realised sparsity (% of block weights skipped)")
        axes.set_ylabel("perplexity, times the format's own dense one")
        axes.set_title(title)
        axes.grid(axis="y")
        axes.legend()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=HELDOUT_TEXT)
    parser.add_argument("--calibration-data", type=Path, default=CALIBRATION_TEXT)
    parser.add_argument("--calibration-tokens", type=int, default=20480)
    parser.add_argument("--max-tokens", type=int, default=12000)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--formats", default=",".join(("none", *FORMATS)), help="of them, separated by commas")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    lm = teal_jax.load(options.model, dtype="float32", progress=False)
    laid = {"context": options.context, "window": options.window, "max_tokens": options.max_tokens}
    text = read_text(lm, options.data, **laid)
    name = Path(options.model).name
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / f"quantisation-{name}.jsonl"
    done = {(row["format"], row["method"]) for row in read(kept) if row["target"] == SPARSITIES[-1]}
    ways = [way for way in WAYS if way[0] in options.formats.split(",") and way not in done]
    for row in cells(lm, DenseSide(lm, text.layout), ways, options.calibration_data, options.calibration_tokens):
        line = json.dumps(row)
        print(line, flush=True)
        with kept.open("a") as file:
            file.write(line + "\n")
    # The same cell again, of a run that was killed within its way, replaces the first.
    found = {(row["format"], row["method"], row["target"]): row for row in read(kept)}
    rows = [found[*way, target] for way in WAYS for target in SPARSITIES if (*way, target) in found]
    tables = "\n\n".join(f"{show}\n\n{markdown(rows, show)}" for show in ("ppl", "kl", "top1"))
    print(tables)
    report = {
        "model": name,
        "text": text.source,
        "tokens": text.num_tokens,
        "calibration": {"text": options.calibration_data.name, "tokens": options.calibration_tokens},
        "setting": laid | {"dtype": "float32", "allocation": "uniform"},
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "rows": rows,
    }
    (options.out / f"quantisation-{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"quantisation-{name}.md").write_text(f"# Few bits and sparsity, {name}\n\n{tables}\n")
    plot(rows, options.out / f"quantisation-{name}.png", f"{name}: few bits and sparsity")


def read(path: Path) -> list[dict[str, Any]]:
    """Rows measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()

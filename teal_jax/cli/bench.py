"""`teal bench`: tokens a second, and the kernels behind them, on this machine's GPU."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_jax.cli.options import Debug, DType, Json, LmHead, Quiet, check_sparsity, examples, parse_sparsities
from teal_jax.cli.session import Session

if TYPE_CHECKING:
    from teal_jax.benchmark.report import Report
    from teal_jax.benchmark.tables import Columns
    from teal_jax.config import ModelConfig
    from teal_jax.nn.quantized import QuantSpec

EPILOG = examples("teal bench decode", "teal bench kernels --sparsity 0.5")

app = typer.Typer(
    help="Measure speed on this machine's GPU, with random weights: whole tokens, and single kernels.",
    epilog=EPILOG,
    no_args_is_help=True,
)

Shape = Annotated[
    str,
    typer.Option(
        "--shape",
        metavar="SHAPE",
        help="llama-2-7b, llama-3-8b, llama-3-70b, mistral-7b, llama-3.2-1b, or a checkpoint's folder.",
    ),
]
Weights = Annotated[DType, typer.Option("--dtype", help="Of weights, activations and kv_cache.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Also write JSON, markdown and the plot here.")
]


@app.command(
    "decode",
    epilog=examples(
        "teal bench decode",
        "teal bench decode --shape mistral-7b --sparsity 0.4,0.5 --no-peer",
        "teal bench decode --context 8192 --output benchmarks/results",
        "teal bench decode --quantize int8,int4 --lm-head int8 --sparsity 0.5",
    ),
)
def decode(
    shape: Shape = "llama-3-8b",
    sparsity: Annotated[
        str, typer.Option("--sparsity", "-s", metavar="LIST", help="Targets, separated by commas; 0: thresholds of 0.")
    ] = "0,0.25,0.4,0.5,0.65",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in the cache at the end of a run.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Decoded in a run.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs; the best counts.")] = 5,
    dtype: Weights = DType.bfloat16,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Also time transformers, where torch is.")] = True,
    peer_seconds: Annotated[float, typer.Option("--peer-seconds", min=1, help="That the peer may take.")] = 180,
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="LIST", help="Formats, as int8,int4: all rows once more for each.")
    ] = "",
    lm_head: LmHead = None,
    output: Output = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tokens a second of a whole model: dense, sparse, quantised, and HuggingFace transformers, in one run.

    Weights are random; thresholds are fitted so that the run itself realises the sparsity, which is counted.
    """
    targets = parse_sparsities(sparsity)
    with Session(quiet=quiet, as_json=as_json, debug=debug) as session:
        name, config = _begin(shape)
        from teal_jax.benchmark import device as gpu
        from teal_jax.benchmark.decode import Bench, Work, fused_counting_step
        from teal_jax.benchmark.peer import peer_row
        from teal_jax.benchmark.plot import plot_speed
        from teal_jax.benchmark.tables import DECODE
        from teal_jax.benchmark.traffic import limit
        from teal_jax.memory import check_fits
        from teal_jax.model import random_model
        from teal_jax.quantization import driver

        formats = [_format(config, one, lm_head) for one in quantize.split(",") if one]
        device = gpu.cuda_device()
        work = Work(sparsities=targets, context=context, tokens=tokens, repeats=repeats)
        itemsize = 4 if dtype is DType.float32 else 2
        check_fits(config, dtype.value, context=context)
        run = _Run(session, "decode", name, device, DECODE, output, debug)
        run.command = (
            f"teal bench decode --shape {name} --sparsity {','.join(f'{t:g}' for t in targets)} --context {context} "
            f"--tokens {tokens} --repeats {repeats} --dtype {dtype.value}{'' if peer else ' --no-peer'}"
            f"{f' --quantize {quantize}' if formats else ''}{f' --lm-head {lm_head}' if formats and lm_head else ''}"
        )
        run.setting = {"dtype": dtype.value, "batch": 1, "context": context, "prompt": work.prompt, "tokens": tokens}
        bandwidth = run.measure_bandwidth()
        if peer:
            # First: nothing of ours is on the device yet.
            session.note(f"peer: transformers under torch.compile, up to {peer_seconds:g} s")
            run.add(peer_row(config, dtype.value, work.lengths, repeats, bandwidth, seconds=peer_seconds))
        session.note("random weights and prompt")
        # By name: where the kernels cannot run, an error must come, not XLA's speed under their name.
        lm = dataclasses.replace(random_model(config, dtype=dtype.value), implementation="pallas")
        Bench(lm, work, bandwidth, fused_counting_step(config)).rows(run.keep_going, run.add)
        for spec in formats:
            few = driver.quantize(lm, spec, lm_head=lm_head, progress=session.progress)
            Bench(few, work, bandwidth, fused_counting_step(config)).rows(run.keep_going, run.add)
        run.measured["peak_memory_bytes"] = gpu.peak_memory(device)
        plot = None
        if output is not None:
            plot = plot_speed(
                run.rows,
                lambda share: limit(config, itemsize, share, work.lengths, bandwidth),
                output / f"decode-{name}.png",
                title=f"{name}, {dtype.value}, batch 1, context {context}, {device.device_kind}",
            )
        run.finish(plot)


@app.command(
    "kernels",
    epilog=examples("teal bench kernels", "teal bench kernels --shape llama-2-7b --sparsity 0.4 --output results"),
)
def kernels(
    shape: Shape = "llama-3-8b",
    sparsity: Annotated[
        float, typer.Option("--sparsity", "-s", callback=check_sparsity, help="Of every projection's input.")
    ] = 0.5,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Rounds; the median counts.")] = 20,
    dtype: Weights = DType.bfloat16,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="FORMAT", help="Of the weights; with it an int8 lm_head."),
    ] = None,
    output: Output = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Device time of every kernel of a layer, dense and sparse, against the bytes that it has to read.

    XLA's products beside them are of the unquantised weights.
    """
    with Session(quiet=quiet, as_json=as_json, debug=debug) as session:
        name, config = _begin(shape)
        from pallas_kernels.tiles import Bits
        from teal_jax.benchmark.cases import Cases
        from teal_jax.benchmark.device import cuda_device
        from teal_jax.benchmark.kernels import bench_kernels
        from teal_jax.benchmark.tables import KERNELS
        from teal_jax.nn.fused_step import choose_tiles

        spec = None if quantize is None else _format(config, quantize)
        device = cuda_device()
        run = _Run(session, "kernels", name, device, KERNELS, output, debug)
        run.command = f"teal bench kernels --shape {name} --sparsity {sparsity:g} --dtype {dtype.value}"
        run.command += "" if spec is None else f" --quantize {spec}"
        run.setting = {"dtype": dtype.value, "batch": 1, "sparsity": sparsity, "rounds": iterations}
        run.setting |= {} if spec is None else {"quantize": str(spec)}
        bandwidth = run.measure_bandwidth()
        bits = Bits() if spec is None else Bits(spec.bits, spec.bits, spec.bits, spec.bits, lm_head=8)
        cases = Cases(config, choose_tiles(config, 1, bits=bits), sparsity, dtype.value, quantize=spec)
        bench_kernels(cases, bandwidth, run.keep_going, run.add, iterations=iterations)
        run.finish(None)


def _begin(shape: str) -> "tuple[str, ModelConfig]":
    """The name and config of a shape."""
    # Read when jax first meets the device: what the peer needs must not be taken before it runs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from teal_jax.benchmark.shapes import shape_config

    return shape_config(shape)


def _format(config: "ModelConfig", name: str, lm_head: str | None = None) -> "QuantSpec":
    """The format of that name; raises where it does not fit or no kernel takes it."""
    from teal_jax.errors import QuantizationError
    from teal_jax.nn.implementation import not_taken
    from teal_jax.quantization.driver import check_request

    spec, head = check_request(config, name, "rtn", lm_head)
    if reason := not_taken(f"{spec}+{head or spec}"):
        raise QuantizationError(f"the kernels cannot run it: {reason}")
    return spec


class _Run:
    """Rows as they come: noted, written, and in the end shown; what failed is remembered."""

    command = ""

    def __init__(
        self,
        session: Session,
        benchmark: str,
        shape: str,
        device: Any,
        columns: "Columns",
        output: Path | None,
        debug: bool,
    ):
        from teal_jax.benchmark.device import hardware

        self.rows: list[Any] = []
        self.setting: dict[str, Any] = {}
        self.measured: dict[str, Any] = {}
        self._failed: list[str] = []
        self._session, self._benchmark, self._shape, self._device = session, benchmark, shape, device
        self._columns, self._output, self._debug = columns, output, debug
        self._hardware = hardware(device)

    def measure_bandwidth(self) -> float:
        """Measured, noted, kept."""
        from teal_jax.benchmark.device import read_bandwidth

        bandwidth = read_bandwidth()
        self.measured["read_bytes_per_second"] = bandwidth
        self._session.note(f"{self._device.device_kind} reads {bandwidth / 1e12:.2f} TB/s")
        return bandwidth

    def add(self, row: Any) -> None:
        """A row is there: an interrupted run leaves the files of those before."""
        from teal_jax.benchmark.tables import line

        self.rows.append(row)
        self._session.note(line(row))
        if self._output is not None:
            self.report().write(self._output, self._columns)

    def keep_going(self, what: str, error: Exception) -> None:
        """A row failed."""
        import traceback

        from teal_jax.benchmark.decode import first_line

        self._failed.append(what)
        self._session.note(f"FAILED: {what}: {first_line(error)}", asked=True)
        if self._debug:
            traceback.print_exception(error)

    def report(self) -> "Report":
        """Of the rows so far."""
        from teal_jax.benchmark.report import Report

        return Report.of(
            self.rows,
            benchmark=self._benchmark,
            shape=self._shape,
            command=self.command,
            setting=self.setting,
            measured=self.measured,
            hardware=self._hardware,
        )

    def finish(self, plot: Path | None) -> None:
        """Show the table; raise where a row failed."""
        from teal_jax.benchmark.report import shown
        from teal_jax.benchmark.tables import notes, rich_table
        from teal_jax.errors import TealError

        report = self.report()
        files = [] if self._output is None else report.write(self._output, self._columns)
        files += [] if plot is None else [plot]
        facts = ", ".join(f"{key} {value}" for key, value in (self.setting | shown(self.measured)).items())
        table = rich_table(self.rows, self._columns, f"{self._benchmark}, {self._shape}, {self._device.device_kind}")
        said = [*notes(self.rows), *(f"written: {path}" for path in files)]
        self._session.result(report.to_dict(), table, facts, *said)
        if self._failed:
            raise TealError(
                f"{len(self._failed)} measurements failed: {', '.join(self._failed)}",
                hint="--debug shows the tracebacks",
            )

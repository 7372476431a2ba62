"""`teal demo`: the whole path on the embedded model, to watch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_jax.cli.models import check_texts
from teal_jax.cli.options import Debug, Dtype, Json, Offline, Quiet, Seed, examples
from teal_jax.cli.session import Session

if TYPE_CHECKING:
    from teal_jax.demo import Demo, Told
    from teal_jax.model import LanguageModel

EPILOG = examples(
    "teal demo",
    "teal demo --out results --prompt 'The dragon was hungry.'",
    "teal demo --json --quiet > demo.json",
)


def command(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Artifact and plots.")] = Path("teal-demo"),
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What both models go on.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", min=2, help="Most new tokens.")] = None,
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Another small model.")] = "embedded",
    calibration_data: Annotated[
        Path | None, typer.Option("--calibration-data", metavar="FILE", help="Default: the package's stories.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Held-out text; likewise.")] = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Import, calibrate, sparsify, compare with dense, talk, save, reload and draw: a few minutes on two CPU cores."""
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        import dataclasses

        from teal_jax.demo import Demo, DemoSettings, embedded_texts, fast_dtype

        check_texts([file for file in (calibration_data, data) if file])
        texts = (calibration_data, data) if calibration_data and data else embedded_texts()
        changes = {"prompt": prompt, "new_tokens": max_tokens, "seed": seed}
        settings = dataclasses.replace(DemoSettings(), **{k: v for k, v in changes.items() if v is not None})
        demo = Demo(
            model,
            calibration_data or texts[0],
            data or texts[1],
            out.resolve(),
            settings=settings,
            dtype=dtype or fast_dtype(),
            progress=session.progress,
        )
        _Tour(session, demo).run()


class _Tour:
    """The demo with words, tables and two columns of text."""

    def __init__(self, session: Session, demo: "Demo"):
        self._session, self._demo = session, demo
        # --json keeps stdout for the object; --quiet leaves the table and the paths.
        self._shown = session.progress and not session.as_json

    def run(self) -> None:
        import time

        from teal_jax.benchmark.report import device_name
        from teal_jax.tables import quality_table, size

        demo, settings, start = self._demo, self._demo.settings, time.perf_counter()
        self._say(f"TEAL on {device_name()}: about two minutes on two CPU cores, less on a GPU")
        lm = demo.load()
        weights = lm.config.num_params
        self._say(f"{lm.name}: {weights / 1e6:.1f}M parameters, {lm.config.num_layers} layers, {lm.dtype}")
        calibration = demo.calibrate(lm)
        plans = demo.allocate(lm, calibration)
        plan = plans["greedy", settings.shown]
        self._say(self._allocation_line(plan, calibration))
        rows, protocol = demo.compare(lm, plans)
        table = quality_table(rows, "What the sparsity costs")
        self._show(table)
        self._say(f"{protocol}\n")
        fast = lm.sparsify(plan)
        told = self._talk([lm, fast])
        from pallas_kernels import support

        if support.why_not() is not None:
            self._say("Here both read every weight: the kernels that skip rows need an NVIDIA GPU.")
        saved = demo.save(fast, calibration)
        count = demo.reload(told[1].tokens)
        artifact_bytes = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
        self._say(f"Saved to {saved} ({size(artifact_bytes)}), reloaded: the same {count} tokens.")
        plots = demo.draw(rows, plan)
        demo.seconds["total"] = round(time.perf_counter() - start, 2)
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.seconds.items())
        values = self._values(lm, rows, protocol, told, plan)
        values |= {"artifact": str(saved), "plots": [str(path) for path in plots], "reloaded_tokens_equal": True}
        shown: list[Any] = [] if self._shown else [table]
        shown += [f"artifact: {saved}", *(f"plot: {path}" for path in plots)]
        self._session.result(values, *shown)
        self._say(f"{stages}\nGo on with it: teal chat {saved}")

    def _say(self, text: str) -> None:
        if self._shown:
            self._session.stdout.print(text, markup=False, soft_wrap=True)

    def _show(self, item: Any) -> None:
        if self._shown:
            self._session.stdout.print(item)

    def _allocation_line(self, plan: Any, calibration: Any) -> str:
        greedy = self._demo.settings.greedy
        rows, length = calibration.tokens.shape
        line = (
            f"Calibrated on {rows * length:,} tokens; greedy path in steps of {greedy.step:g} on "
            f"{min(greedy.max_rows or rows, rows)} rows (coarser than the default {type(greedy)().step:g}, for time)"
        )
        uniform = plan.notes["allocation"].get("uniform_blocks")
        return line + (f"; blocks {uniform} stay uniform, which had less error there" if uniform else "")

    def _talk(self, models: list["LanguageModel"]) -> "list[Told]":
        if not self._shown:
            return self._demo.talk(models)
        from rich.live import Live

        from teal_jax.tables import Columns

        columns = Columns(self._demo.settings.prompt, ["dense", f"{100 * self._demo.settings.shown:g} % greedy"])
        with Live(columns, console=self._session.stdout, refresh_per_second=12) as live:

            def show(i: int, piece: Any) -> None:
                columns.add(i, piece.text, piece.tokens_per_second, piece.finish_reason)
                live.refresh()

            told = self._demo.talk(models, show)
        if not self._session.stdout.is_terminal:
            self._session.stdout.print()  # a terminal gets this line end from rich
        return told

    def _values(self, lm: "LanguageModel", rows: Any, protocol: str, told: Any, plan: Any) -> dict[str, Any]:
        import dataclasses

        from teal_jax.benchmark.report import device_name
        from teal_jax.cli.doctor import versions

        return {
            "model": lm.name,
            "parameters": lm.config.num_params,
            "dtype": str(lm.dtype),
            "device": device_name(),
            "versions": versions(),
            "quality": [row._asdict() for row in rows],
            "protocol": protocol,
            "prompt": self._demo.settings.prompt,
            "dense": dataclasses.asdict(told[0]),
            "sparse": dataclasses.asdict(told[1]),
            "plan": plan.to_dict(),
            "seconds": self._demo.seconds,
        }

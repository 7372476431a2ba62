"""`teal demo`: import, calibrate, allocate, compare with dense, talk, save, reload and draw, in a few minutes."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from teal_jax import artifact
from teal_jax.data import TextSource
from teal_jax.decode.generation import generate, stream_pieces
from teal_jax.decode.run import Piece
from teal_jax.errors import ArtifactError, TealError
from teal_jax.loading import load
from teal_jax.model import LanguageModel
from teal_jax.plots import plot_perplexity, plot_plan
from teal_jax.progress import track
from teal_jax.scoring import perplexity
from teal_jax.sparsity.allocation import allocate
from teal_jax.sparsity.calibration import calibrate
from teal_jax.sparsity.greedy import GreedySettings
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.sparsity.statistics import Calibration
from teal_jax.tables import Quality

PROMPT = "Once upon a time, a little fox found a shiny key in the forest."


GREEDY = GreedySettings(step=0.1, max_sparsity=0.7, max_rows=4)
"""Coarser than the library's default, so that the search takes a fraction of a minute on two cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What is done, and how much of it.

    Attributes:
      targets: model sparsities compared. shown: the one that talks, is saved and drawn; one of `targets`.
      calibration_tokens, seq_len: calibration text used, and its row length; None: the model's longest.
      greedy: of the search; its path must reach the highest target.
      scored_tokens: held-out tokens behind each perplexity.
      window: tokens scored at a time, after as many of context; fewer where the model is short.
      prompt: continued by both models, greedily, by at most `new_tokens`.
      seed: choice of calibration rows.
    """

    targets: tuple[float, ...] = (0.25, 0.4, 0.5, 0.65)
    shown: float = 0.4
    calibration_tokens: int = 16384
    seq_len: int | None = None
    greedy: GreedySettings = GREEDY
    scored_tokens: int = 8192
    window: int = 256
    prompt: str = PROMPT
    new_tokens: int = 160
    seed: int = 0


@dataclasses.dataclass
class Told:
    """What one model went on with, and its decoding speed, without compilation."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    tokens_per_second: float = 0.0


@dataclasses.dataclass
class Demo:
    """The demo, step by step: each method does one stage, keeps what the next ones need, and times itself.

    Attributes:
      model: name of the model, see `teal_jax.load`. calibration_text, heldout_text: different texts.
      out: directory of what is written.
      seconds: by stage, as they are done.
    """

    model: str | Path
    calibration_text: TextSource
    heldout_text: TextSource
    out: Path
    settings: DemoSettings = DemoSettings()
    dtype: str | None = None
    progress: bool = True
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.settings.shown not in self.settings.targets:
            raise ValueError(f"shown must be one of the targets {self.settings.targets}, got {self.settings.shown}")
        # Known now, and not only when it is time to save.
        if self.out.exists() and not self.out.is_dir():
            raise ArtifactError(f"{self.out} is a file, not a directory", hint="--out DIR")
        if self.artifact.exists() and not artifact.is_artifact(self.artifact):
            raise ArtifactError(f"{self.artifact} is not a saved model: it will not be overwritten", hint="--out DIR")

    @property
    def artifact(self) -> Path:
        """Where the sparse model is saved."""
        return self.out / "model"

    def load(self) -> LanguageModel:
        """Import the checkpoint through the converter."""
        with self._timed("import"):
            return load(self.model, dtype=self.dtype, progress=self.progress).dense()

    def calibrate(self, lm: LanguageModel) -> Calibration:
        """Count the activations on the calibration text."""
        with self._timed("calibrate"):
            settings = self.settings
            return calibrate(
                lm,
                self.calibration_text,
                num_tokens=settings.calibration_tokens,
                seq_len=settings.seq_len,
                seed=settings.seed,
                progress=self.progress,
            )

    def allocate(self, lm: LanguageModel, calibration: Calibration) -> dict[tuple[str, float], SparsityPlan]:
        """Plans by method and target; one greedy path serves all greedy ones."""
        with self._timed("allocate"), warnings.catch_warnings():
            # Blocks that are better off uniform are told in the plan's notes.
            warnings.filterwarnings("ignore", "uniform sparsity had less error", UserWarning)
            plan = lambda method, target: allocate(  # noqa: E731
                lm, calibration, target, method=method, settings=self.settings.greedy, progress=self.progress
            )
            shown = self.settings.shown
            plans = {("greedy", shown): plan("greedy", shown)}
            for target in self.settings.targets:
                for method in ("uniform", "greedy"):
                    if (method, target) not in plans:
                        plans[method, target] = plan(method, target)
            return plans

    def compare(self, lm: LanguageModel, plans: dict[tuple[str, float], SparsityPlan]) -> tuple[list[Quality], str]:
        """Perplexity of the dense model and under every plan, and the protocol in words."""
        with self._timed("perplexity"):
            settings = self.settings
            cases = [("dense", 0.0, lm)]
            cases += [
                (method, target, lm.sparsify(plans[method, target]))
                for target in settings.targets
                for method in ("uniform", "greedy")
            ]
            window = min(settings.window, lm.config.max_position // 2)
            rows, found = [], None
            for method, target, model in track(cases, "Perplexity", enabled=self.progress):
                found = perplexity(
                    model,
                    self.heldout_text,
                    context=window,
                    window=window,
                    max_tokens=settings.scored_tokens,
                    progress=False,
                )
                rows.append(Quality(method, target, found.realised_sparsity, found.ppl))
            assert found is not None
            return rows, f"{found.num_tokens:,} held-out tokens; {found.protocol}"

    def talk(
        self, models: Sequence[LanguageModel], show: Callable[[int, Piece], None] = lambda i, piece: None
    ) -> list[Told]:
        """The prompt continued by all models in turn, a few tokens each; `show(i, piece)` sees every piece."""
        with self._timed("generate"):
            told = [Told() for _ in models]
            streams = {
                i: stream_pieces(model, self.settings.prompt, max_new_tokens=self.settings.new_tokens)
                for i, model in enumerate(models)
            }
            while streams:
                for i, stream in list(streams.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del streams[i]
                        continue
                    told[i].text += piece.text
                    told[i].tokens += piece.tokens
                    told[i].tokens_per_second = piece.tokens_per_second
                    show(i, piece)
            return told

    def save(self, lm: LanguageModel, calibration: Calibration) -> Path:
        """Save the sparse model with its calibration, over one of an earlier run."""
        with self._timed("save"):
            return artifact.save(lm, self.artifact, calibration=calibration, overwrite=True)

    def reload(self, tokens: Sequence[int]) -> int:
        """Load what was saved and continue the prompt; the number of tokens, which must be `tokens`."""
        with self._timed("reload"):
            lm = artifact.load(self.artifact)
            again = generate(lm, self.settings.prompt, max_new_tokens=self.settings.new_tokens)
            assert not isinstance(again, list)
            if again.tokens != tuple(tokens):
                raise TealError("the reloaded model continues with other tokens: a bug in saving, please report it")
            return len(again.tokens)

    def draw(self, rows: Sequence[Quality], plan: SparsityPlan) -> list[Path]:
        """Perplexity over sparsity, and the plan as a heat map."""
        with self._timed("plots"):
            curves = {
                method: [(row.realised, row.ppl) for row in rows if row.method == method]
                for method in ("uniform", "greedy")
            }
            dense = next(row.ppl for row in rows if row.method == "dense")
            title = f"{plan.model}: perplexity over sparsity"
            return [
                plot_perplexity(curves, self.out / "perplexity.png", dense=dense, title=title),
                plot_plan(plan, self.out / "plan.png"),
            ]

    @contextmanager
    def _timed(self, stage: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)


def embedded_texts() -> tuple[Path, Path]:
    """The calibration and the held-out text that come with the embedded model."""
    from teal_jax.embedded import CALIBRATION_TEXT, HELDOUT_TEXT

    return CALIBRATION_TEXT, HELDOUT_TEXT


def fast_dtype() -> str | None:
    """The dtype to run in: as stored on an accelerator; float32 on a CPU, many of which only emulate bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else None

"""`teal convert`: HuggingFace checkpoint to artifact, and back."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from teal_jax.cli.models import check_texts, open_model
from teal_jax.cli.options import (
    CalibrationText,
    CalibrationTokens,
    Debug,
    Dtype,
    Json,
    LmHead,
    Model,
    Offline,
    Overwrite,
    Quantize,
    QuantizeMethod,
    QuantizeMethodName,
    Quiet,
    Revision,
    Seed,
    SeqLen,
    examples,
)
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal convert mistral-7b -o mistral",
    "teal convert ./checkpoint -o model --dtype bfloat16",
    "teal convert mistral-7b -o mistral-int4 --quantize int4 --quantize-method gptq",
    "teal convert ./artifact -o hf --to hf",
)


class Layout(enum.StrEnum):
    """What is written."""

    artifact = "artifact"
    hf = "hf"


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to.", show_default=False)],
    to: Annotated[Layout, typer.Option("--to", help="Layout: ours, or HuggingFace's.")] = Layout.artifact,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_method: QuantizeMethod = QuantizeMethodName.rtn,
    lm_head: LmHead = None,
    data: CalibrationText = None,
    tokens: CalibrationTokens = 20480,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Import a HuggingFace checkpoint as an artifact, quantised where asked, or export one to HuggingFace's layout.

    Quantising reads one block at a time: a model that does not fit in 16 bits can be converted.
    """
    if to is Layout.hf and quantize is not None:
        raise typer.BadParameter("HuggingFace's layout holds 16-bit weights: --quantize goes with --to artifact")
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        # Known now, and not only after an hour of quantising.
        if output.exists() and not overwrite:
            from teal_jax.errors import ArtifactError

            raise ArtifactError(f"{output} exists", hint="choose another name, or --overwrite")
        check_texts(data)
        lm = open_model(
            session,
            model,
            dtype=dtype,
            revision=revision,
            quantize=quantize,
            quantize_method=quantize_method.value,
            lm_head=lm_head,
            data=data or None,
            num_tokens=tokens,
            seq_len=seq_len,
            seed=seed,
        )
        if to is Layout.artifact:
            from teal_jax.artifact import save

            path = save(lm, output, overwrite=overwrite)
        else:
            if lm.plan is not None and lm.plan.arrays:
                session.note("HuggingFace's layout has no place for the plan's arrays: only the weights are written")
            path = _export(session, lm, output, overwrite)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        values = {"path": str(path), "layout": to.value, "dtype": str(lm.dtype), "quantization": lm.quantization}
        kind = f"{lm.dtype}, {lm.quantization}" if lm.quantization else str(lm.dtype)
        session.result(
            values | {"bytes": size, "parameters": lm.config.num_params}, f"{path}  ({kind}, {size / 1e6:,.1f} MB)"
        )


def _export(session: Session, lm, output: Path, overwrite: bool) -> Path:
    import tempfile

    from converters import export_checkpoint
    from teal_jax.progress import Bar

    with tempfile.TemporaryDirectory() as folder, Bar(enabled=session.progress) as bar:
        if lm.tokenizer is not None:
            lm.tokenizer.save(folder)
        files = [path for path in Path(folder).iterdir() if path.is_file()]
        return export_checkpoint(
            lm.params["weights"],
            lm.config,
            output,
            overwrite=overwrite,
            copy_files=files,
            gates=None if lm.plan is None or lm.plan.arrays else lm.plan.to_dict(),
            progress=bar,
        )

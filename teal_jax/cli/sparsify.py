"""`teal sparsify`: everything from a checkpoint to a saved sparse model."""

from pathlib import Path
from typing import Annotated

import typer

from teal_jax.cli.models import Sparsifier, check_texts, open_model
from teal_jax.cli.options import (
    CalibrationText,
    CalibrationTokens,
    Debug,
    Dtype,
    Json,
    LmHead,
    MaybeMethod,
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
    Target,
    examples,
)
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal sparsify mistral-7b --sparsity 0.4 -o mistral-40",
    "teal sparsify mistral-40 -s 0.5 -o mistral-50   (its saved calibration is used: no new pass)",
    "teal sparsify mistral-7b -s 0.5 --quantize int4 -o mistral-int4-50",
    "teal generate mistral-40 -p 'Once upon a time'",
)


def command(
    model: Model,
    sparsity: Target,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Where to.")],
    method: MaybeMethod = None,
    data: CalibrationText = None,
    tokens: CalibrationTokens = 20480,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    quantize: Quantize = None,
    quantize_method: QuantizeMethod = QuantizeMethodName.rtn,
    lm_head: LmHead = None,
    overwrite: Overwrite = False,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Load, quantise where asked, calibrate, allocate and save weights, plan, calibration and tokenizer."""
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.artifact import save
        from teal_jax.errors import ArtifactError
        from teal_jax.tables import plan_line

        # Known now, and not only after an hour of calibration.
        if output.exists() and not overwrite:
            raise ArtifactError(f"{output} exists", hint="choose another name, or --overwrite")
        check_texts(data)
        text = {"data": data or None, "num_tokens": tokens, "seq_len": seq_len, "seed": seed}
        quantising = {"quantize": quantize, "quantize_method": quantize_method.value, "lm_head": lm_head}
        lm = open_model(session, model, dtype=dtype, revision=revision, **quantising, **text)
        sparsifier = Sparsifier(session, lm, model, **text)
        plan = sparsifier.plan(sparsity, None if method is None else method.value)
        path = save(lm.sparsify(plan), output, calibration=sparsifier.calibration, overwrite=overwrite)
        values = {"path": str(path), "target": plan.target, "model_sparsity": plan.model_sparsity}
        session.result(
            values
            | {"method": plan.method, "quantization": lm.quantization, "calibration": sparsifier.calibration.notes},
            f"{path}  ({plan_line(plan)})",
        )

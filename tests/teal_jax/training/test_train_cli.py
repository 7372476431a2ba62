import json
import shutil

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from teal_jax.cli import app
from teal_jax.cli.train import _block, _shares
from teal_jax.errors import DataError
from teal_jax.loading import load
from teal_jax.sparsity.plan import Trained
from teal_jax.training.held_out import FILE, HeldOut, read_held_out
from teal_jax.training.run_record import read_log

SIZES = ("--batch", 2, "--seq-len", 8, "--dtype", "float32", "--devices", 1, "--quiet", "--save-every", 2)


def teal(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def config(fixtures, tmp_path_factory):
    """The tiny Mistral's config with one layer, so that a step compiles sooner."""
    folder = tmp_path_factory.mktemp("config")
    fields = json.loads((fixtures / "tiny_mistral" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    return folder / "config.json"


@pytest.fixture(scope="module")
def options(fixtures, config, tmp_path_factory):
    pairs = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [{"prompt": "Who? ", "answer": f"The {name}."} for name in ("dog", "cat", "sun", "hill")]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = ("--scratch", "--tokenizer", fixtures / "tiny_mistral", "--top-k", "attn_in=0.5,down=0.25", *SIZES)
    return (config, *new, "--data", pairs)


def test_from_scratch_on_answers_and_resumed(options, tmp_path):
    out = tmp_path / "run"
    text = tmp_path / "held-out.txt"
    text.write_text("The sun and the dog went up the hill. " * 4)
    run = teal(*options, "-o", out, "--steps", 3, "--json", "--eval-data", text, "--eval-every", 2)
    assert run.exit_code == 0, run.output + repr(run.exception)
    found = json.loads(run.stdout)
    assert found["steps"] == 3
    held = read_held_out(out)
    assert [(step, sparsity > 0) for step, _, sparsity in held] == [(2, True), (3, True)]
    assert found["held_out_loss"] == held[-1][1]
    assert found["tokens"] == sum(int(line.split(",")[1]) for line in (out / "log.csv").read_text().split()[1:])
    lm = load(out / "model", progress=False)
    assert lm.plan.gate == "top_k"
    assert lm.plan.sparsity.tolist() == [[0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.75]]
    assert lm.tokenizer is not None
    before = (out / "log.csv").read_text()
    assert teal(*options, "-o", out, "--steps", 3).exit_code == 3
    shutil.rmtree(out / "model")
    again = teal(*options, "-o", out, "--steps", 3, "--resume")
    assert again.exit_code == 0, again.output
    assert (out / "log.csv").read_text() == before
    assert (out / "model").is_dir()
    other = teal(*options, "-o", out, "--steps", 3, "--resume", "--lr", 1)
    assert other.exit_code == 3
    assert "settings.learning_rate was 0.0003, is 1.0" in " ".join(other.stderr.split())


def test_a_huggingface_checkpoint_goes_on_and_is_written_back(fixtures, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sun and the dog went up the hill. " * 8)
    sparse = ("--block", "4:8", "--int8", "--distil", 0.5, "--accumulate", 2)
    run = teal(fixtures / "tiny_mistral", "--data", text, *SIZES, *sparse, "-o", tmp_path / "run", "--steps", 2)
    assert run.exit_code == 0, run.output + repr(run.exception)
    log = read_log(tmp_path / "run" / "log.csv")
    assert all(row["divergence"] > 0 and row["sparsity"] == pytest.approx(0.5) for row in log)
    arguments = ["convert", str(tmp_path / "run" / "model"), "-o", str(tmp_path / "hf"), "--to", "hf", "--quiet"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {path.suffix for path in (tmp_path / "hf").iterdir()} >= {".json", ".safetensors"}
    one, other = (load(tmp_path / name, progress=False) for name in ("run/model", "hf"))
    assert one.plan.to_dict() == other.plan.to_dict()
    assert one.plan.trained == Trained(int8=True, block=8)
    tokens = np.arange(3, 11)[None]
    np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--top-k", "0"], 3, "must lie in (0, 1]"),
        (["--top-k", "much"], 2, "expected 0.6 or"),
        (["--top-k", "nose=0.5"], 2, "no site or projection nose"),
        (["--plan", "plan.json"], 2, "give one"),
        (["--block", "2:4"], 2, "give one"),
        (["--accumulate", "3"], 3, "multiple of accumulate"),
        (["--data", "absent.txt"], 3, "no text file at absent.txt"),
        (["--data", __file__], 3, "holds prompts and answers"),
        (["--eval-data", "absent.txt"], 3, "no text file at"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refused(options, tmp_path, arguments, code, said):
    run = teal(*options, "-o", tmp_path / "run", *arguments)
    assert run.exit_code == code, run.output
    assert said in " ".join(run.stderr.replace("│", " ").split())
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_shape_without_a_tokenizer(tmp_path):
    run = teal("llama-3.2-1b", "--scratch", "--data", __file__, "-o", tmp_path / "run")
    assert run.exit_code == 3
    assert "brings no tokenizer" in run.stderr


def test_text_that_is_none_leaves_nothing(tmp_path):
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe")
    run = teal("embedded", "--data", tmp_path / "noise.txt", "-o", tmp_path / "run", "--quiet")
    assert run.exit_code == 3
    assert "is not UTF-8" in run.stderr
    assert not (tmp_path / "run").exists()


def test_a_shape_that_is_not_there_is_named(tmp_path):
    run = teal(tmp_path / "config.json", "--scratch", "--data", __file__, "-o", tmp_path / "run")
    assert run.exit_code == 3
    assert f"{tmp_path / 'config.json'}'" in run.stderr


def test_a_share_of_the_gradient_without_sparsity(tmp_path):
    run = teal("embedded", "--data", __file__, "-o", tmp_path / "run", "--straight-through", 0.5)
    assert run.exit_code == 2
    assert "goes with --top-k" in " ".join(run.stderr.replace("│", " ").split())


def test_a_tokenizer_without_scratch(tmp_path):
    run = teal("embedded", "--tokenizer", "embedded", "--data", "x.txt", "-o", tmp_path / "run")
    assert run.exit_code == 2


def test_what_a_killed_run_measured_later_is_measured_again(fixtures, tmp_path):
    lm = load(fixtures / "tiny_mistral", progress=False)
    text = tmp_path / "held-out.txt"
    text.write_text("The sun and the dog went up the hill.")
    (tmp_path / FILE).write_text("step,loss,sparsity\n2,5.5,0.25\n4,5.25,\n")
    loss = HeldOut(lm, text, tmp_path, seq_len=8)(4, lm)
    assert read_held_out(tmp_path) == [(2, 5.5, 0.25), (4, loss, 0.0)]
    text.write_text("sun")
    with pytest.raises(DataError, match="a row of held-out text needs 32"):
        HeldOut(lm, text, tmp_path, seq_len=32)


def test_block():
    assert _block("16:32") == (0.5, 32)
    for text in ("16", "0:4", "5:4", "a:b"):
        with pytest.raises(typer.BadParameter, match="expected N:M"):
            _block(text)


def test_shares():
    assert _shares("0.6") == 0.6
    assert _shares("mlp_in=0.5,up=0.7") == [1, 1, 1, 1, 0.5, 0.7, 1]

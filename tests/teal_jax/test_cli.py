import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from teal_jax.cli.session import Session
from teal_jax.errors import DataError, TealError
from teal_jax.sparsity.plan import SparsityPlan
from tests.teal_jax.command import ok, teal

COMMANDS = (
    "demo",
    "convert",
    "calibrate",
    "allocate",
    "sparsify",
    "inspect",
    "generate",
    "chat",
    "eval",
    "analyse",
    "bench",
    "train",
    "doctor",
)
PROMPT = "Once upon a time"
ROOT = Path(__file__).resolve().parents[2]


def run_process(*arguments, stdin=""):
    """`teal` as a process, for what only a process has: signals, pipes, exit codes."""
    command = [sys.executable, "-m", "teal_jax.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def model(fixtures):
    return fixtures / "tiny_mistral"


@pytest.fixture(scope="module")
def calibration(model, halves, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calib.npz"
    ok(teal("calibrate", model, "-o", path, "--data", halves[0], "--tokens", 256, "--seq-len", 32, "--quiet"))
    return path


@pytest.fixture(scope="module")
def saved(model, halves, tmp_path_factory):
    """A sparse artifact with its calibration."""
    path = tmp_path_factory.mktemp("artifact") / "sparse"
    sizes = ("--tokens", 256, "--seq-len", 32)
    ok(teal("sparsify", model, "-s", 0.4, "-o", path, "--data", halves[0], *sizes, "--method", "uniform", "--quiet"))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    run = ok(teal(command, "--help"))
    assert "Examples:" in run.output
    assert f"teal {command}" in run.output


def test_help_names_every_command():
    run = ok(teal("--help"))
    assert all(command in run.output for command in COMMANDS)


def test_version():
    assert ok(teal("--version")).output.startswith("teal-jax ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "embedded", "-p", "x", "--sparsity", "1"],
        ["generate", "embedded", "-p", "x", "--sparsity", "-0.1"],
        ["generate", "embedded", "-p", "x", "--sparsity", "0.4", "--plan", "plan.json"],
        ["generate", "embedded", "-p", "x", "--temp", "1", "--top-p", "0"],
        ["generate", "embedded", "-p", "x", "--temp", "0", "--top-p", "3"],
        ["generate", "embedded", "-p", "x", "--top-k", "3"],
        ["generate", "embedded", "-p", "x", "--dtype", "int8"],
        ["allocate", "embedded", "-s", "0.4", "-o", "plan.json"],
        ["eval", "embedded", "--sparsity", "0,two"],
        ["eval", "embedded", "--sparsity", "0,1.5"],
        ["eval", "embedded", "--dense-prefix", "1.5"],
        ["eval", "embedded", "--method", "greedy,nonsense"],
        ["eval", "embedded", "--method", ","],
        ["eval"],
        ["eval", "embedded", "--render", "report.json"],
    ],
)
def test_usage_errors(arguments):
    run = teal(*arguments)
    assert run.exit_code == 2, run.output
    assert not run.stdout


def test_a_missing_model_is_one_line_and_a_hint():
    run = teal("generate", "mistral-7c", "-p", "x")
    assert run.exit_code == 3
    lines = run.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: no model or directory")
    assert lines[1].startswith("hint: did you mean mistral-7b")
    assert not run.stdout


def test_debug_shows_the_traceback():
    run = teal("generate", "mistral-7c", "-p", "x", "--debug")
    assert run.exit_code == 3
    assert "Traceback" in run.stderr
    assert "error: no model or directory" in run.stderr


@pytest.mark.parametrize(
    ("name", "content"), [("plan.json", "{}"), ("plan.json", "nonsense"), ("calib.npz", "nonsense"), ("x.json", None)]
)
def test_broken_files(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    run = teal("inspect", tmp_path / name)
    assert run.exit_code == 3
    assert run.stderr.startswith("error: ")


def test_a_value_that_the_library_refuses_is_usage(model, halves):
    run = teal("eval", model, "--data", halves[1], "-s", "0", "--context", 5000, "--window", 10, "--quiet")
    assert run.exit_code == 3  # it depends on the model: DataError
    run = teal("generate", model, "-p", PROMPT, "--repetition-penalty", 0)
    assert run.exit_code == 2


def test_unwritable_output(model, tmp_path):
    (tmp_path / "file").write_text("")
    run = teal("convert", model, "-o", tmp_path / "file" / "model", "--quiet")
    assert run.exit_code == 3
    assert "error: " in run.stderr
    assert "Traceback" not in run.output


def test_the_demo_looks_at_its_files_first(tmp_path):
    run = teal("demo", "--data", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert run.exit_code == 3
    assert run.stderr.startswith("error: no text file at")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calibrate", "-o", "folder"], "folder is a directory"),
        (["calibrate", "-o", "none/calib.npz"], "no directory"),
        (["calibrate", "-o", "calib.npz", "--data", "none.txt"], "no text file at"),
        (["sparsify", "-s", "0.4", "-o", "sparse", "--data", "none.txt"], "no text file at"),
        (["convert", "-o", "new", "--data", "none.txt"], "no text file at"),
        (["allocate", "calib.npz", "-s", "0.4", "-o", "folder"], "folder is a directory"),
        (["allocate", "garbage.npz", "-s", "0.4", "-o", "plan.json"], "expected an .npz of teal calibrate"),
        (["generate", "-p", PROMPT, "--plan", "none.json"], "no plan at"),
        (["eval", "--data", "none.txt", "-o", "report"], "no text file at"),
        (["eval", "--calibration", "garbage.npz", "-o", "report"], "expected an .npz of teal calibrate"),
        (["analyse", "--data", "none.txt"], "no text file at"),
        (["train", "--data", "none.txt", "-o", "run"], "no text file at"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_files_are_looked_at_before_the_weights(model, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage.npz").write_text("nonsense")
    run = teal(arguments[0], model, *arguments[1:])
    assert run.exit_code == 3, run.output
    assert said in run.stderr
    assert "Reading weights" not in run.stderr
    assert "hint: " in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "garbage.npz"]


# the whole way


def test_calibrate_allocate_inspect(model, calibration, tmp_path):
    plan_file = tmp_path / "plan.json"
    run = ok(teal("allocate", model, calibration, "-s", 0.4, "-o", plan_file, "--json"))
    assert json.loads(run.stdout)["target"] == 0.4
    assert "look-up" in run.stderr
    plan = SparsityPlan.load(plan_file)
    assert plan.method == "greedy"
    assert plan.model_sparsity == pytest.approx(0.4, abs=1e-6)
    # The path is in the file now: no second search.
    run = ok(teal("allocate", model, calibration, "-s", 0.5, "-o", tmp_path / "half.json"))
    assert "Greedy allocation" not in run.stderr
    assert "half.json" in run.stdout

    run = ok(teal("inspect", plan_file, "--plot", tmp_path / "plan.png"))
    assert "greedy, target 40.0 %" in run.stdout
    assert (tmp_path / "plan.png").exists()
    assert json.loads(ok(teal("inspect", plan_file, "--json")).stdout)["plan"]["method"] == "greedy"
    values = json.loads(ok(teal("inspect", calibration, "--json")).stdout)
    assert values["greedy_path_ends_at"] > 0.5
    assert len(values["thresholds"]) == 2

    run = ok(teal("generate", model, "-p", PROMPT, "--plan", plan_file, "-n", 4, "--json", "--quiet"))
    assert json.loads(run.stdout)["sparsity"] == 0.4


def test_published_files_of_another_model_are_refused(fixtures, tmp_path):
    folder = fixtures / "teal_published"
    run = teal("allocate", fixtures / "tiny_llama3", "--from-teal", folder, "-s", 0.5, "-o", tmp_path / "plan.json")
    # The fixture's widths are another model's: refused, and nothing is written.
    assert run.exit_code == 3, run.output
    assert not (tmp_path / "plan.json").exists()


def test_published_files_know_two_methods(fixtures, tmp_path):
    published = ("--from-teal", fixtures / "teal_published", "-s", 0.5, "-o", tmp_path / "plan.json")
    run = teal("allocate", fixtures / "tiny_llama3", *published, "--method", "learned")
    assert run.exit_code == 2, run.output
    assert not (tmp_path / "plan.json").exists()


def test_generate_streams_and_repeats_itself(saved):
    sampled = ("--temp", 0.8, "--top-k", 20, "--seed", 3)
    first = ok(teal("generate", saved, "-p", PROMPT, "-n", 12, *sampled))
    again = ok(teal("generate", saved, "-p", "-", "-n", 12, *sampled, "--json", stdin=PROMPT + "\n"))
    values = json.loads(again.stdout)
    assert first.stdout == values["text"] + "\n"
    assert values["sparsity"] == 0.4
    assert values["prompt"] == PROMPT
    assert "40 % sparse" in first.stderr


def test_an_artifact_takes_another_sparsity(saved):
    values = json.loads(ok(teal("generate", saved, "-p", PROMPT, "-s", 0, "-n", 3, "--json")).stdout)
    assert values["sparsity"] == 0
    run = ok(teal("generate", saved, "-p", PROMPT, "-s", 0.3, "-n", 3, "--json"))
    assert json.loads(run.stdout)["sparsity"] == 0.3
    assert "Calibrating" not in run.stderr  # it was saved with its calibration


def test_quiet_prints_nothing_on_stderr(saved, tmp_path):
    assert not ok(teal("generate", saved, "-p", PROMPT, "-n", 3, "--quiet")).stderr
    run = run_process("convert", saved, "-o", tmp_path / "copy", "--quiet")
    assert run.returncode == 0, run.stderr
    assert not run.stderr


def test_convert_and_back(model, tmp_path):
    run = ok(teal("convert", model, "-o", tmp_path / "artifact", "--json"))
    assert json.loads(run.stdout)["parameters"] > 0
    assert teal("convert", model, "-o", tmp_path / "artifact").exit_code == 3  # it exists
    ok(teal("convert", tmp_path / "artifact", "-o", tmp_path / "hf", "--to", "hf"))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).exists()
    before = ok(teal("generate", model, "-p", PROMPT, "-n", 8, "--quiet")).stdout
    assert ok(teal("generate", tmp_path / "hf", "-p", PROMPT, "-n", 8, "--quiet")).stdout == before


def test_inspect_a_model(model, saved):
    run = ok(teal("inspect", model))
    assert "bytes per token dense" in run.stdout
    values = json.loads(ok(teal("inspect", saved, "--json")).stdout)
    facts = values["model"]
    assert facts["bytes_per_token_sparse"] < facts["bytes_per_token_dense"]
    assert values["plan"]["target"] == 0.4
    assert teal("inspect", model, "--plot", "plan.png").exit_code == 2  # dense: nothing to plot


def test_eval_shows_target_and_realised(saved, halves, tmp_path):
    sizes = ("--max-tokens", 200, "--context", 32, "--window", 32, "--prompts", 0)
    options = ("--data", halves[1], "-s", "0.4,0", "--method", "uniform", "-o", tmp_path / "run", *sizes)
    run = ok(teal("eval", saved, *options, "--json", "--plot", tmp_path / "ppl.png"))
    values = json.loads(run.stdout)
    assert [row["target"] for row in values["rows"]] == [0, 0.4]
    assert values["rows"][1]["realised"] == pytest.approx(0.4, abs=0.1)
    assert values["tokens"] == 200
    assert (tmp_path / "ppl.png").exists()
    assert "realised" in ok(teal("eval", saved, *options)).stdout


def test_eval_refuses_the_calibration_text(model, saved, halves, tmp_path):
    run = teal("eval", model, "--data", halves[0], "--calibration-data", halves[0], "-s", "0,0.4", "-o", tmp_path / "a")
    assert run.exit_code == 3
    assert "calibration text" in run.stderr
    # Also under another name, with a calibration made earlier.
    renamed = tmp_path / "other.txt"
    renamed.write_text(halves[0].read_text())
    run = teal("eval", saved, "--data", renamed, "-s", "0.4", "-o", tmp_path / "b")
    assert run.exit_code == 3
    assert "is the calibration text, too" in run.stderr


def test_chat_obeys(saved):
    lines = [PROMPT, "/stats", "/sparsity 0", "/sparsity 2", "/reset", "/stats", "/nonsense", "/exit", "never read"]
    run = ok(teal("chat", saved, "-n", 6, "--system", "A story.", stdin="\n".join(lines)))
    assert run.stdout.strip()
    assert "turn 1: " in run.stderr
    assert "\ndense\n" in run.stderr
    assert "usage: /sparsity" in run.stderr
    assert "turn 0: 0 tokens read" in run.stderr


def test_chat_ends_with_its_input(saved):
    assert not ok(teal("chat", saved, "-n", 4, "--quiet", stdin=PROMPT)).stderr
    assert "turn 0" in ok(teal("chat", saved, "--quiet", stdin="/stats")).stderr  # asked for


def test_a_failed_turn_does_not_end_the_chat(saved):
    run = ok(teal("chat", saved, "-n", 4, stdin="word " * 2000 + "\n/stats\n"))
    assert "too long" in run.stderr
    assert "turn 0" in run.stderr


def test_doctor():
    values = json.loads(ok(teal("doctor", "--json")).stdout)
    assert values["versions"]["jax"]
    assert values["devices"][0]["memory_bytes"] > 0
    assert "mistral-7b" in ok(teal("doctor", "--models")).stdout


# what surrounds a command


def test_library_warnings_are_one_line(capsys):
    with Session():
        warnings.warn("first\nsecond", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: first second\n"
    with Session(quiet=True):
        warnings.warn("first", stacklevel=1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (TealError("what", hint="do"), 3, ["error: what", "hint: do"]),
        (DataError("what"), 3, ["error: what"]),
        (FileNotFoundError(2, "No such file", "x"), 3, ["error: x: No such file"]),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_exit_codes(error, code, lines, capsys):
    import typer

    with pytest.raises(typer.Exit) as exit_info, Session():
        raise error
    assert exit_info.value.exit_code == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="bug"), Session():
        raise ValueError("a bug")  # raised outside the library


def test_exit_codes_of_the_process():
    assert run_process("--help").returncode == 0
    assert run_process("nonsense").returncode == 2
    run = run_process("inspect", "nowhere/plan.json")
    assert run.returncode == 3
    assert run.stderr.splitlines() == ["error: no plan at nowhere/plan.json", "hint: make one: teal allocate"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m teal_jax.cli doctor --models | true; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert run.returncode == 141
    assert not run.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_exits_130(saved):
    import signal

    # A suite that runs in a shell's background ignores the signal, and its children inherit that.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{hear}; from teal_jax.cli import main; main()", "chat", str(saved)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        assert process.stderr is not None
        while "/reset" not in process.stderr.readline():  # it waits for input now
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in process.stderr.read()

"""What a stranger installs: the wheel, by way of the sdist, run outside the checkout; and how `make` finds a Python."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_architecture import MODULES, PACKAGES, imports, tops

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTIONS = {"orbax": "orbax-checkpoint"}
"""Import names whose distribution is called differently."""


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Metadata


def test_what_is_imported_is_declared():
    optional = [entry for extra in PROJECT["optional-dependencies"].values() for entry in extra]
    declared = {normal(re.match(r"[\w.-]+", entry)[0]) for entry in PROJECT["dependencies"] + optional}
    third = {name for module, path in MODULES.items() for name in tops(imports(module, path))}
    third -= {*PACKAGES, *sys.stdlib_module_names}
    assert {normal(DISTRIBUTIONS.get(name, name)) for name in third} <= declared


def test_constraints_pin_every_dependency_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {normal(line.split("==")[0]) for line in lines}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    assert {normal(re.match(r"[\w.-]+", entry)[0]) for entry in wanted} <= pinned


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Both: the wheel is built from the unpacked sdist, so the sdist is proven whole.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new environment with the wheel in it, and this one's dependencies."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    [site] = home.glob("lib/python*/site-packages")
    # A folder added by a .pth does not have its own .pth files read: the checkout's editable install stays out.
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path(key) for key in ("purelib", "platlib")}))
    return home / "bin"


@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= names
    embedded = {path for path in (ROOT / "teal_jax" / "embedded").rglob("*") if path.is_file()}
    assert {str(path.relative_to(ROOT)) for path in embedded if "__pycache__" not in path.parts} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 20e6


@pytest.mark.slow
def test_wheel_is_imported_from_where_it_was_installed(installed, tmp_path):
    program = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})))"
    for file in run(installed / "python", "-c", program, cwd=tmp_path).stdout.split():
        assert Path(file).is_relative_to(installed.parent)


@pytest.mark.slow
def test_command_line_of_the_wheel(installed, tmp_path):
    assert "demo" in run(installed / "teal", "--help", cwd=tmp_path).stdout


@pytest.mark.slow
def test_the_wheel_has_model_texts_and_page(wheel, installed, tmp_path):
    if "teal_jax/embedded/model.safetensors" not in zipfile.ZipFile(wheel).namelist():
        pytest.skip("no embedded model in this checkout")
    sizes = ("-s", "0.4", "--method", "uniform", "--max-tokens", "512", "--prompts", "0")
    done = run(installed / "teal", "eval", "embedded", *sizes, "-o", "out", "--quiet", "--json", cwd=tmp_path)
    assert len(json.loads(done.stdout)["rows"]) == 2
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!")


# scripts/find_python.sh


@pytest.fixture
def find(tmp_path):
    """`find(**env)` runs the script where PATH holds only `tmp_path/bin` and the system's tools without Pythons."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "cat", "sed", "tail"):
        (tools / tool).symlink_to(next(p for p in (Path("/bin") / tool, Path("/usr/bin") / tool) if p.exists()))

    def call(**env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/sh", str(ROOT / "scripts" / "find_python.sh")],
            env={"PATH": str(tools), "HOME": str(tmp_path)} | env,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


REAL = f'exec "{sys.executable}" "$@"'
REFUSING = 'echo "pyenv: python3.12: command not found" >&2; exit 127'
OLD = "echo 'is cpython 3.11.7' >&2; exit 1"


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3",
        "bin/python3.13",
        ".pyenv/versions/3.12.1/bin/python3",
        ".local/share/uv/python/cpython-3.12.8-linux-x86_64-gnu/bin/python3",
    ],
)
def test_a_python_is_found(find, tmp_path, place):
    script(tmp_path / "bin" / "python3.12", REFUSING)
    script(tmp_path / "bin" / "python", OLD)
    script(tmp_path / place, REAL)
    done = find()
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr


def test_the_pinned_version_comes_first(find, tmp_path):
    script(tmp_path / "bin" / "python3.13", "echo newer")
    script(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3", REAL)
    assert find().stdout.strip() == sys.executable


def test_no_python_says_what_to_install(find, tmp_path):
    script(tmp_path / "bin" / "python3", OLD)
    done = find()
    assert done.returncode == 1
    assert not done.stdout
    for way in ("apt-get install", "pyenv install", "uv python install", "PYTHON="):
        assert way in done.stderr


def test_a_named_python_is_used_or_refused(find, tmp_path):
    script(tmp_path / "bin" / "python3", REAL)
    assert find(PYTHON=sys.executable).stdout.strip() == sys.executable
    script(tmp_path / "mine", OLD)
    done = find(PYTHON=str(tmp_path / "mine"))
    assert done.returncode == 1
    assert "3.11.7" in done.stderr

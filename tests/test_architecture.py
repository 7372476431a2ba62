"""The arrows of the design: which package may import which, nothing in circles, and what importing stays free of."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("teal_jax", "converters", "pallas_kernels")
FOUNDATION = {"teal_jax.config", "teal_jax.errors"}
"""All that converters may import of teal_jax."""

SLOW = {"flax", "transformers", "orbax"}
"""Slow to import; only the functions that need them do."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(name: str, path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of what the module imports; what only the type checker sees does not count.

    `from a.b import c` gives `a.b.c` where that is a module of ours, else `a.b`.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    todo: list[ast.AST] = [ast.parse(path.read_text("utf-8"), str(path))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            # The package's own __init__ is met either way; it only matters when a name is taken from it.
            found |= submodules if len(submodules) == len(node.names) else submodules | {base}
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if not is_type_checking(child) and not (top_level_only and lazy):
                todo.append(child)
    return found


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def of_package(package: str) -> list[str]:
    return sorted(name for name in MODULES if name.split(".")[0] == package)


def test_there_are_modules():
    assert all(of_package(package) for package in PACKAGES)


@pytest.mark.parametrize("name", of_package("pallas_kernels"))
def test_kernels_know_only_jax(name):
    forbidden = {"teal_jax", "converters", *SLOW, "optax", "safetensors", "huggingface_hub"}
    assert not tops(imports(name, MODULES[name])) & forbidden


@pytest.mark.parametrize("name", of_package("converters"))
def test_converters_know_only_the_foundation(name):
    found = imports(name, MODULES[name])
    assert {module for module in found if module.split(".")[0] == "teal_jax"} <= FOUNDATION
    assert "pallas_kernels" not in tops(found)


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_foundation_knows_nothing_else(name):
    ours = {module for module in imports(name, MODULES[name]) if module.split(".")[0] in PACKAGES}
    assert ours <= FOUNDATION


@pytest.mark.parametrize("name", sorted(MODULES))
def test_weights_never_need_torch(name):
    assert "torch" not in tops(imports(name, MODULES[name]))


def test_no_module_imports_in_circles():
    graph = {name: imports(name, path, top_level_only=True) & MODULES.keys() for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "statement",
    [
        "import teal_jax",
        "import teal_jax.hub",
        "import teal_jax.cli; sys.argv = ['teal', '--help']; teal_jax.cli.main()",
    ],
    ids=["teal_jax", "hub", "help"],
)
def test_import_stays_light(statement):
    program = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", *sorted({{name.split(".")[0] for name in sys.modules}})))
{statement}
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split("LOADED")[-1].split())
    assert "teal_jax" in loaded
    assert not loaded & SLOW


def test_no_machine_path_or_registry_host_is_tracked():
    # Put together here, so that this file does not hold what it looks for.
    folders = "/(?:" + "|".join(["work", "root", "farm", "home/[a-z]+", "Users/[a-z]+", "opt/(?:wheels|pypi)"]) + ")/"
    dot = r"\."
    hosts = "|".join([f"pypi{dot}org", f"python{'hosted'}{dot}org", f"registry{dot}npmjs", f"deb{dot}debian"])
    wrong = re.compile(rf"(?<![\w.~$}}-]){folders}|{hosts}")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.suffix in {".png", ".safetensors", ".npz"} or not path.is_file():
            continue
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
            if wrong.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)

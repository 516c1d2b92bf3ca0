"""The architecture: which module may import which, what is public, and a light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxterp
import mlxterp.sae

PACKAGE = Path(mlxterp.__file__).parent

# Each module may import only modules of an earlier line.
ORDER = """
backend version
architecture dataflow hooks interventions loading probing sites tokenization
sae.activation_functions sae.config sae.files sae.kernels
tracing sae.coder
generation trace analysis
sae.harvest sae.losses
sae.dataset
sae.evals sae.run_state sae.step sae.callbacks
sae.trainer sae.analysis
sae.steering sae.visualization
sae.base
sae.sae
sae.checkpoint
sae
model
"""
LEVEL = {name: i for i, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
# Within these lines modules are one layer and may import each other (but never in a circle).
SHARED = {"architecture", "dataflow", "hooks", "interventions", "loading", "probing", "sites"}


def _modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return names


def _imports(name: str, path: Path) -> set[str]:
    """Modules of the package that a module imports anywhere in its text."""
    found = set()
    package = ["mlxterp", *name.split(".")[: -1 if path.name != "__init__.py" else None]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {x.removeprefix("mlxterp.") for x in found if x.startswith("mlxterp.")}


MODULES = _modules()


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_imports_point_one_way(name):
    assert name in LEVEL, f"{name} has no place in the order of imports"
    for other in _imports(name, MODULES[name]) & set(MODULES):
        together = name in SHARED and other in SHARED
        assert together or LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_no_imports_in_a_circle():
    remaining = {name: _imports(name, path) & set(MODULES) for name, path in MODULES.items()}
    while free := {name for name, needs in remaining.items() if not needs & set(remaining)}:
        remaining = {name: needs for name, needs in remaining.items() if name not in free}
    assert not remaining


def test_no_module_imports_its_own_package():
    for name, path in MODULES.items():
        own = name.rpartition(".")[0]
        if path.name != "__init__.py" and own:
            assert own not in _imports(name, path) - set(MODULES) | ({own} & _direct(path))


def _direct(path: Path) -> set[str]:
    """Packages whose `__init__` a module reads a name from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mlxterp.sae":
            found |= {"sae" for alias in node.names if f"sae.{alias.name}" not in MODULES}
    return found


def test_modules_are_of_a_size_to_read():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_public_names():
    assert mlxterp.__all__ == sorted(mlxterp.__all__, key=str.lower) or mlxterp.__all__
    for package in (mlxterp, mlxterp.sae):
        assert len(set(package.__all__)) == len(package.__all__)
        for name in package.__all__:
            assert getattr(package, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlxterp.__version__)


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = ("mlx_lm", "transformers", "datasets", "matplotlib", "starlette", "wandb", "jinja2")
    code = f"import sys, mlxterp, mlxterp.sae; print([m for m in {heavy} if m in sys.modules])"
    assert _python(code).strip() == "[]"

"""The repository keeps its own rules: layers, docstrings, a core without torch, make targets."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "stallfree"
LAYERS = (
    "core",
    "kernels",
    "model",
    "executor",
    "engine",
    "replicas",
    "server",
    "bench",
    "sim",
    "cli",
)  # each imports those before it
MODULES = sorted(SOURCE.rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").glob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Each absolute module name that a file imports, at any depth, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} is a relative import"
            yield node.lineno, node.module or ""
            if node.module == "stallfree":
                yield from ((node.lineno, f"stallfree.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_those_below_it(layer: str) -> None:
    allowed = {*LAYERS[: LAYERS.index(layer) + 1], "errors", "cache"}
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in sorted((SOURCE / layer).rglob("*.py"))
        for line, module in imported_modules(path)
        if module.startswith("stallfree.") and module.split(".")[1] not in allowed
    ]
    assert not wrong


def test_every_package_has_its_layer() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(LAYERS)


@pytest.mark.parametrize("path", sorted((SOURCE / "core").glob("*.py")), ids=lambda p: p.stem)
def test_the_core_needs_only_the_standard_library(path: Path) -> None:
    foreign = {
        module
        for _, module in imported_modules(path)
        if module.split(".")[0] not in {*sys.stdlib_module_names, "stallfree"}
    }
    assert not foreign


@pytest.mark.parametrize("path", sorted((SOURCE / "bench").glob("*.py")), ids=lambda p: p.stem)
def test_the_load_generator_knows_nothing_of_the_engine(path: Path) -> None:
    inside = {
        module
        for _, module in imported_modules(path)
        if module.startswith("stallfree.") and module.split(".")[1] not in {"bench", "errors"}
    }
    assert not inside


def test_importing_the_scheduler_loads_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; before = set(sys.modules); import stallfree.core.scheduler;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(run.stdout.split()) - sys.stdlib_module_names == {"stallfree"}


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"


def test_the_make_targets_are_listed() -> None:
    run = subprocess.run(
        ["make", "--no-print-directory"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for target in ("help", "setup", "serve", "test", "check"):
        assert f"make {target} " in run.stdout


def test_pinned_versions_cover_the_direct_dependencies() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in (Requirement(line) for line in lines if not line.startswith("#"))
    }
    wanted = [Requirement(text) for text in project["dependencies"]]
    for extra in ("bench", "test"):
        wanted += [Requirement(text) for text in project["optional-dependencies"][extra]]
    for requirement in wanted:
        version = str(pinned[canonicalize_name(requirement.name)]).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_nothing_runs_what_it_loads() -> None:
    """Model files are data: no pickle is read, and no code that comes with a model is run."""
    wrong = []
    for path in MODULES:
        imported = {module.split(".")[0] for _, module in imported_modules(path)}
        wrong += [
            f"{name_of(path)} imports {module}"
            for module in sorted(imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal"})
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{name_of(path)}:{node.lineno} calls {called}")
            wrong += [
                f"{name_of(path)}:{node.lineno} has {keyword.arg}"
                for keyword in node.keywords
                if keyword.arg in ("trust_remote_code", "allow_pickle")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    assert not wrong

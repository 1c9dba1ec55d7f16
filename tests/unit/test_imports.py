"""Imports run one way: train may use app's engine, app never uses train, and the engine knows neither HTTP nor text."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Beyond the standard library and `app.engine` itself. torch only: no HTTP, no text, no pydantic.
ENGINE_MAY_IMPORT = frozenset({"torch", "safetensors"})
STDLIB_ONLY = ("scheduler", "sequence", "config", "generation_config")
# Encoders without a network of the engine's own: transformers' modules, imported when such a checkpoint is loaded.
FOREIGN = "app/engine/models/foreign_encoder.py"
# Kernels for GPUs, in the language that CUDA builds of torch bring; imported where there is such a device.
KERNELS = "app/engine/triton_kernels/"
# The error tree is shared by every layer, and imports nothing itself (tested below).
ERRORS = "app.errors"


def imports_of(source: str, package: str) -> Iterator[str]:
    """Every module that `source`, a module of `package`, names in an import, at any depth of the code.

    `from a import b` yields `a` and `a.b`: b may be a module. Relative imports are resolved against `package`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in {"importlib.import_module", "import_module", "__import__"}:
                yield str(node.args[0].value)


def imports_below(folder: str) -> list[tuple[str, str]]:
    """(file, imported module) for every Python file below `folder`."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        name = str(path.relative_to(ROOT))
        found += [(name, module) for module in imports_of(path.read_text(encoding="utf-8"), package)]
    assert found, f"no imports below {folder}: has it moved?"
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", ["train", "transformers", "ray", "deploy"])
def test_app_serves_without(package: str) -> None:
    allowed = {FOREIGN} if package == "transformers" else set()
    assert {path for path, module in imports_below("app") if top(module) == package} == allowed


def test_transformers_is_imported_when_an_encoder_of_its_is_loaded_and_not_before() -> None:
    tree = ast.parse((ROOT / FOREIGN).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = [node for function in functions for node in ast.walk(function)]
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and "transformers" in ast.unparse(node)
    ]
    assert imports
    assert all(node in inside for node in imports)


def test_engine_imports_torch_itself_and_the_standard_library() -> None:
    wrong = [
        (path, module)
        for path, module in imports_below("app/engine")
        if top(module) not in sys.stdlib_module_names | ENGINE_MAY_IMPORT
        and not within(module, "app.engine")
        and not within(module, ERRORS)
        and module != "app"
        and not (path == FOREIGN and within(module, "transformers"))
        and not (path.startswith(KERNELS) and within(module, "triton"))
    ]
    assert wrong == []


def test_nothing_imports_the_kernels_before_they_are_needed() -> None:
    named = "app.engine.triton_kernels"
    assert {path for path, module in imports_below("app") if module == named} == {"app/engine/kernels.py"}
    loaded = "import sys, app.engine; print([name for name in sys.modules if name.endswith('triton_kernels')])"
    ran = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_stdlib_only(name: str) -> None:
    source = (ROOT / "app/engine" / f"{name}.py").read_text(encoding="utf-8")
    allowed = {ERRORS, *(f"app.engine.{other}" for other in STDLIB_ONLY)}
    wrong = [
        module
        for module in imports_of(source, "app.engine")
        if top(module) not in sys.stdlib_module_names
        and module not in {"app", "app.engine"}
        and not any(within(module, package) for package in allowed)
    ]
    assert wrong == []


def test_the_error_tree_imports_nothing() -> None:
    source = (ROOT / "app/errors.py").read_text(encoding="utf-8")
    assert {top(module) for module in imports_of(source, "app")} <= sys.stdlib_module_names


def test_train_takes_only_the_engine_the_tokenisation_and_the_errors_from_app() -> None:
    wrong = [
        (path, module)
        for path, module in imports_below("train")
        if top(module) == "app"
        and module != "app"
        and not within(module, "app.engine")
        and not within(module, "app.tokenization")
        and not within(module, ERRORS)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import train.data", {"train.data"}),
        ("def f():\n    from train import data", {"train", "train.data"}),
        ("from ..routes import health", {"app.routes", "app.routes.health"}),
        ("from . import scheduler", {"app.engine", "app.engine.scheduler"}),
        ("import importlib\nimportlib.import_module('train')", {"importlib", "train"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert set(imports_of(source, "app.engine")) == expected

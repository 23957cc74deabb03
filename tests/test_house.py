"""The rules of the house, checked on the source: who may import whom, and that tests are tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

#: package -> what it may never import (design: one direction of imports).
FORBIDDEN = {
    "deepseek": {"cluster", "quant_jobs", "serve_app", "ray", "fastapi", "opentelemetry"},
    "cluster": {"quant_jobs", "serve_app"},
    "quant_jobs": {"serve_app"},
    "serve_app": {"quant_jobs"},
}


def imported_modules(source: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str, root: Path) -> None:
    sources = sorted((root / package).rglob("*.py"))
    assert sources
    for source in sources:
        wrong = imported_modules(source) & FORBIDDEN[package]
        assert not wrong, f"{source.relative_to(root)} imports {sorted(wrong)}"


def test_cluster_reads_no_tensor_values(root: Path) -> None:
    for source in sorted((root / "cluster").rglob("*.py")):
        wrong = imported_modules(source) & {"safetensors", "numpy"}
        assert not wrong, f"{source.relative_to(root)} imports {sorted(wrong)}"


def test_every_test_file_holds_a_test(root: Path) -> None:
    for source in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        tests = [n for n in ast.walk(tree) if isinstance(n, functions) and n.name[:5] == "test_"]
        assert tests, f"{source.relative_to(root)} collects nothing"


def test_nothing_unpickles_or_runs_remote_code(root: Path) -> None:
    banned = ("import pickle", "torch.load(", "trust_remote_code=True", "cloudpickle.load")
    for package in FORBIDDEN:
        for source in sorted((root / package).rglob("*.py")):
            text = source.read_text(encoding="utf-8")
            found = [word for word in banned if word in text]
            assert not found, f"{source.relative_to(root)} uses {found}"


def test_every_module_says_what_it_is(root: Path) -> None:
    for package in FORBIDDEN:
        for source in sorted((root / package).rglob("*.py")):
            text = source.read_text(encoding="utf-8")
            if text.strip():
                assert ast.get_docstring(ast.parse(text)), f"{source.relative_to(root)}: docstring"

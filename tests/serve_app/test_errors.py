"""The table of errors: every code that the service uses is in it, so that labels stay few."""

from __future__ import annotations

import ast
from pathlib import Path

from serve_app import errors
from serve_app.errors import CODES, HTTP_REASONS, ApiError, code_label


def used_codes(root: Path) -> set[str]:
    """The codes of all error classes, those that a call gives as `code="..."`, and those of
    admission (routing/refusals.py)."""
    codes = {code for _, code in HTTP_REASONS.values()}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, ApiError):
            codes.add(str(kind.code))
    for source in (root / "serve_app").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code":
                assert isinstance(node.value, ast.Constant | ast.Name | ast.Attribute), source
                if isinstance(node.value, ast.Constant):
                    codes.add(str(node.value.value))
            elif source.parent.name == "worker":
                continue  # whose `Refused` is an engine's, and has no code
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Refused":
                assert isinstance(node.args[0], ast.Constant), source
                codes.add(str(node.args[0].value))
    return codes


def test_the_table_holds_every_code_and_no_other(root: Path) -> None:
    assert used_codes(root) - {"invalid_value"} == CODES - {"invalid_value"}


def test_a_code_that_nobody_knows_is_no_label_of_its_own() -> None:
    assert code_label(ApiError("x", code="draining")) == "draining"
    assert code_label(ApiError("x", code="made up by a client")) == "other"

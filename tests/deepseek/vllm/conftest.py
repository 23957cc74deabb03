"""Directories for vLLM that the tests of the room share; nobody may change them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.vllm_builds import build_vllm_engine, make_vllm_artifact

RECIPES = ("int4", "int8", "int8-weight-only", "int4-asym")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `source`, one of each recipe of `RECIPES`, and an engine of each behind `e-`."""
    root = tmp_path_factory.mktemp("vllm")
    for recipe in RECIPES:
        artifact = make_vllm_artifact(root, recipe)
        build_vllm_engine(artifact.directory, root / f"e-{recipe}")
    build_vllm_engine(root / "source", root / "e-source")
    return root

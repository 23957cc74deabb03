"""A small artifact of INT4 experts, and engine directories of both dialects made of it by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.trtllm_directories import make_artifact, make_source, write_directory

from deepseek.artifact.reader import ArtifactReader


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `source`, `artifact`, `mixed` and `single`; nobody may change them."""
    root = tmp_path_factory.mktemp("trtllm")
    make_source(root / "source")
    artifact = make_artifact(root / "source", "int4", root / "artifact")
    write_directory(artifact, root / "mixed", "mixed")
    write_directory(artifact, root / "single", "single")
    return root


@pytest.fixture
def artifact(made: Path) -> ArtifactReader:
    return ArtifactReader(made / "artifact")


@pytest.fixture
def mixed(made: Path, tmp_path: Path) -> Path:
    """A copy of an engine in the dialect mixed, free to damage."""
    return shutil.copytree(made / "mixed", tmp_path / "mixed")


@pytest.fixture
def single(made: Path, tmp_path: Path) -> Path:
    """A copy of an engine in the dialect single, free to damage."""
    return shutil.copytree(made / "single", tmp_path / "single")

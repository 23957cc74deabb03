"""A small source checkpoint, and an artifact that was quantized from it by plain rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.synthetic import quantize_plainly, write_checkpoint

from deepseek.recipe import load_recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `int4` artifact: INT4, FP8 blocks and BF16 in one. Not to be written to."""
    directory = tmp_path_factory.mktemp("artifacts") / "int4"
    quantize_plainly(source, load_recipe("int4"), directory)
    return directory


@pytest.fixture
def artifact(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "artifact")

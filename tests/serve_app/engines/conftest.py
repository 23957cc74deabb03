"""Engines on the double of `tensorrt_llm`, for the tests of the double itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.trtllm_doubles import VERSIONS, Double, imported_double, make_trtllm_engine
from support.trtllm_running import Make, Running, is_running, making


@pytest.fixture(scope="module")
def double_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "trtllm"


@pytest.fixture(scope="module")
def directory(tiny_model: Path, double_folder: Path) -> Path:
    """Nobody may change it."""
    return make_trtllm_engine(tiny_model, double_folder, tp=2)


@pytest.fixture
def make(directory: Path, tmp_path: Path) -> Iterator[Make]:
    with making(directory, tmp_path) as maker:
        yield maker


@pytest.fixture(scope="module", params=VERSIONS)
def one_of_each(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    double = Double(tmp_path_factory.mktemp("shared"), request.param, "record")
    with (
        pytest.MonkeyPatch.context() as patch,
        imported_double(double, patch) as package,
    ):
        running = Running(double, package, directory)
    yield running
    running.llm.shutdown()
    running.runner.close()
    assert not [pid for pid in double.rank_pids if is_running(pid)]


@pytest.fixture
def shared(one_of_each: Running) -> Iterator[Running]:
    """One LLM of each version, for tests that leave it whole."""
    before = len(one_of_each.double.violations)
    one_of_each.expected = []
    yield one_of_each
    one_of_each.double.switch()
    assert one_of_each.double.violations[before:] == one_of_each.expected

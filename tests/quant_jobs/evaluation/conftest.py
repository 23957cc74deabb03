"""A small model, a reference run of it, and a service that answers from it."""

from __future__ import annotations

import pytest
from support.quantizing import SmallModel, make_small_model
from support.scored_service import ScoredService

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from quant_jobs.evaluate import Settings, obtain_reference
from quant_jobs.evaluation.reference import Reference

#: Six blocks of 16 tokens.
SETTINGS = Settings(num_blocks=6, block_tokens=16, num_threads=1)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def engine(small: SmallModel) -> LLMEngine:
    return LLMEngine.from_checkpoint(small.directory, EngineOptions(num_threads=1))


@pytest.fixture(scope="session")
def reference(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    keep = tmp_path_factory.mktemp("reference") / "kept"
    return obtain_reference(small.directory, small.text, keep, SETTINGS)


@pytest.fixture
def service(engine: LLMEngine) -> ScoredService:
    return ScoredService(engine)

"""The service that the clients of one file talk to: a real engine behind `python -m serve_app`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import make_engine
from support.features import ask_plainly
from support.served import Served, serving_command

RECIPE = "int8"
#: Few enough that forty requests at once are more than have a place. Serve counts a request as
#: queued until it is assigned, so that a burst of eight needs a queue of eight, places or not.
PLACES = {"max_ongoing_requests": 8, "max_queued_requests": 8}


@pytest.fixture(scope="session")
def engine_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine that is served, made once."""
    return make_engine(tiny_model, RECIPE, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def served(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings: dict[str, Any] = {
        "engine": str(engine_dir),
        "model_name": "tiny",
        "allow_ungated": True,
        "kv_cache": "bf16",
        **PLACES,
    }
    with serving_command(tmp_path_factory.mktemp("served"), settings) as served:
        yield served


@pytest.fixture(scope="module")
def answers(served: Served) -> dict[str, str]:
    """What the service says without a client."""
    return ask_plainly(served)

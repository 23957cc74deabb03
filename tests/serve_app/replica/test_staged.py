"""A replica loads its node's copy of the engine where that is the same engine, whole."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from support.engines import make_engine

from deepseek.errors import ArtifactError
from quant_jobs.targets.local_copy import copy_engine
from quant_jobs.targets.staging import PLACEHOLDER
from serve_app.config import EchoOptions, EmbeddedOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Engine, LoadProgress
from serve_app.replica.staged import NODE, EngineOf, admit_for_loading, engine_at


@pytest.fixture(scope="module")
def shared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(tiny_model, "int8", tmp_path_factory.mktemp("shared"))


@pytest.fixture
def staged(shared: Path, tmp_path: Path) -> Path:
    """The configured place; the copy of node n1 is there."""
    copy_engine(shared, tmp_path / "n1" / "engine")
    return tmp_path / NODE / "engine"


def choose(
    shared: Path, staged: Path | None, node: str = "n1", *, allow_ungated: bool = True
) -> tuple[Path, list[LoadProgress]]:
    told: list[LoadProgress] = []
    _, chosen = admit_for_loading(
        shared,
        staged,
        node=node,
        kv_cache=None,
        allow_ungated=allow_ungated,
        require_signature=None,
        progress=told.append,
    )
    return chosen, told


def test_the_configuration_names_a_nodes_copy_as_build_does() -> None:
    assert NODE == PLACEHOLDER


@pytest.mark.heavy
def test_the_copy_of_the_node_is_loaded_and_the_log_says_so(
    shared: Path, staged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve")
    chosen, told = choose(shared, staged)
    assert chosen == staged.parent.parent / "n1" / "engine"
    assert f"loading the copy on this node, {chosen}" in caplog.text
    assert told[0].phase == "verifying the copy on this node"
    assert told[0].total_bytes > 0
    assert choose(shared, None)[0] == shared


@pytest.mark.heavy
@pytest.mark.parametrize("fault", ["absent", "another", "damaged", "cut", "more"])
def test_what_is_no_whole_copy_is_not_loaded_but_the_shared_directory(
    fault: str,
    shared: Path,
    staged: Path,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = tmp_path / "n1" / "engine"
    file = next(copy.glob("*.safetensors"))
    if fault == "absent":
        says = "is not an engine"
        shutil.rmtree(copy)
    elif fault == "another":
        says = "is another engine"
        shutil.rmtree(copy)
        make_engine(tiny_model, "int4", tmp_path / "other").rename(copy)
    elif fault == "damaged":
        says = f"{file} is damaged"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif fault == "cut":
        says = str(file)
        file.write_bytes(file.read_bytes()[:-1])
    else:
        says = "more.safetensors"
        (copy / "more.safetensors").touch()
    assert choose(shared, staged)[0] == shared
    assert f"not loading the copy on this node, but {shared}: " in caplog.text
    assert says in caplog.text


def test_the_verdict_is_that_of_the_shared_directory(shared: Path, staged: Path) -> None:
    (staged.parent.parent / "n1" / "engine" / "gate.json").write_text("{}")
    with pytest.raises(ArtifactError, match="never gated"):
        choose(shared, staged, allow_ungated=False)


def test_a_factory_that_knows_its_directory_is_pointed_at_the_copy() -> None:
    made: list[EmbeddedOptions] = []

    def make(options: EmbeddedOptions) -> Engine:
        made.append(options)
        return EchoEngine(EchoOptions())

    options = EmbeddedOptions(directory=Path("shared"), num_threads=3)
    engine_at(EngineOf(make, options), Path("copy"))()
    assert made == [EmbeddedOptions(directory=Path("copy"), num_threads=3)]
    other = EchoEngine
    assert engine_at(lambda: other(EchoOptions()), Path("copy"))() is not None

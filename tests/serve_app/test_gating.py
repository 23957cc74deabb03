"""The door: no replica serves an ungated engine directory, whichever adapter is behind it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import cloudpickle, serve
from ray.serve import Application
from support.serving import metric, wait_for

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.verdict import GateVerdict, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import GateLimits
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.app import build_with
from serve_app.config import EchoOptions, ServeConfig
from serve_app.engines.echo import EchoEngine
from serve_app.gating import admit


class MarkingEngine(EchoEngine):
    """An adapter that knows nothing of gates. It leaves the file `made` when it is constructed, and
    from then on copies its replica's log into the file `log`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(EchoOptions())
        (directory / "made").touch()
        logging.getLogger("ray.serve").addHandler(logging.FileHandler(directory / "log"))


def application(config: ServeConfig, marks: Path) -> Application:
    return build_with(config, partial(MarkingEngine, marks))


def verdict(directory: Path, **changes: Any) -> GateVerdict:
    manifest = read_engine_manifest(directory)
    fields: dict[str, Any] = {
        "passed": True,
        "artifact_digest": manifest.artifact_digest,
        "engine_digest": manifest.digest,
        "measured": {"perplexity": 3.0},
        "limits": GateLimits(max_perplexity_ratio=1.1, max_mean_kl=0.1, min_top1=0.9),
        "reasons": (),
    }
    return GateVerdict(**fields | changes)


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gating") / "tiny"
    pack_engine(CheckpointReader(tiny_model), directory)
    return directory


@pytest.fixture
def engine_dir(packed: Path) -> Iterator[Path]:
    """An engine directory without a verdict."""
    yield packed
    (packed / "gate.json").unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def engine_by_value() -> Iterator[None]:
    """Replicas cannot import this file; the class travels with the factory."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_only_a_gated_engine_passes_unless_loudly_overridden(
    engine_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for wrong, says in (
        (None, "never gated"),
        (verdict(engine_dir, passed=False, reasons=("perplexity is 9 % worse",)), "9 % worse"),
        (verdict(engine_dir, engine_digest="0" * 64), "judges the engine"),
    ):
        if wrong is not None:
            write_verdict(engine_dir, wrong)
        with pytest.raises(ArtifactError, match=says):
            admit(engine_dir)
        caplog.clear()
        assert admit(engine_dir, allow_ungated=True).gated is False
        assert "UNGATED" in caplog.text
    write_verdict(engine_dir, verdict(engine_dir))
    caplog.clear()
    admitted = admit(engine_dir)
    assert admitted.gated is True
    assert admitted.engine_digest == read_engine_manifest(engine_dir).digest
    assert caplog.text == ""


@pytest.mark.ray
def test_a_replica_of_an_ungated_directory_refuses_to_start_whichever_engine_it_is(
    serve_url: str, engine_dir: Path, tmp_path: Path
) -> None:
    app = application(ServeConfig(engine=engine_dir), tmp_path)
    try:
        with pytest.raises(RuntimeError):
            serve.run(app, name="refused", route_prefix="/refused")
        message = serve.status().applications["refused"].deployments["engine"].message
    finally:
        serve.delete("refused")
    assert "ArtifactError" in message
    assert "never gated" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.ray
def test_an_override_is_loud_in_health_metrics_and_the_replicas_log(
    serve_url: str, engine_dir: Path, tmp_path: Path
) -> None:
    app = application(ServeConfig(engine=engine_dir, allow_ungated=True), tmp_path)
    url = f"{serve_url}/overridden"
    try:
        serve.run(app, name="overridden", route_prefix="/overridden")
        wait_for(lambda: httpx.get(f"{url}/health", timeout=10).status_code == 200)
        assert httpx.get(f"{url}/health", timeout=10).json()["gated"] is False
        told = httpx.get(f"{url}/metrics", timeout=10).text
        assert metric(told, "intserve_engine_info", gated="false") == 1
    finally:
        serve.delete("overridden")
    log = (tmp_path / "log").read_text()
    assert f"UNGATED: {engine_dir.name} has not passed its accuracy gate" in log


def test_no_engine_adapter_knows_of_gates(root: Path) -> None:
    adapters = [p for p in (root / "serve_app/engines").rglob("*.py") if p.name != "protocol.py"]
    assert adapters
    for source in adapters:
        text = source.read_text(encoding="utf-8")
        for word in ("admit(", "verdict", "allow_ungated", "gated"):
            assert word not in text, f"{source.relative_to(root)} knows of {word}"

"""The door: no replica serves an ungated engine directory, whichever adapter is behind it, and no
ingress a file of one that was not judged."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import cloudpickle, serve
from ray.serve import Application
from support.configs import make_config, nest
from support.engines import make_engine
from support.hostile import reseal
from support.keys import make_keys
from support.serving import metric, told_health, wait_for

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.signature import read_private_key
from deepseek.artifact.verdict import GateVerdict, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import GateLimits
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.app import build_with
from serve_app.config import EchoOptions, ServeConfig
from serve_app.engines.echo import EchoEngine
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.engines.protocol import EngineInfo
from serve_app.gating import admit
from serve_app.openai.ingress import load_tokenizer


class MarkingEngine(EchoEngine):
    """An adapter that knows nothing of gates. It leaves the file `made` when it is constructed, and
    from then on copies its replica's log into the file `log`."""

    def __init__(self, directory: Path, engine_digest: str | None = None) -> None:
        super().__init__(EchoOptions())
        self._engine_digest = engine_digest
        (directory / "made").touch()
        logging.getLogger("ray.serve").addHandler(logging.FileHandler(directory / "log"))

    async def start(self) -> EngineInfo:
        return replace(await super().start(), engine_digest=self._engine_digest)


def application(config: ServeConfig, marks: Path) -> Application:
    return build_with(config, partial(MarkingEngine, marks))


def verdict(directory: Path, **changes: Any) -> GateVerdict:
    manifest = read_engine_manifest(directory)
    fields: dict[str, Any] = {
        "passed": True,
        "artifact_digest": manifest.artifact_digest,
        "engine_digest": manifest.digest,
        "target": "embedded",
        "arithmetic": "embedded",
        "executed_by": "embedded",
        "kv_cache": manifest.kv_cache,
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
            admit(engine_dir, kv_cache=None)
        caplog.clear()
        assert admit(engine_dir, kv_cache=None, allow_ungated=True).gated is False
        assert "UNGATED" in caplog.text
    write_verdict(engine_dir, verdict(engine_dir))
    caplog.clear()
    admitted = admit(engine_dir, kv_cache=None)
    assert admitted.gated is True
    assert admitted.engine_digest == read_engine_manifest(engine_dir).digest
    assert caplog.text == ""


@pytest.mark.ray
def test_a_replica_of_an_ungated_directory_refuses_to_start_whichever_engine_it_is(
    serve_url: str, engine_dir: Path, tmp_path: Path
) -> None:
    app = application(make_config(engine=engine_dir), tmp_path)
    try:
        with pytest.raises(RuntimeError):
            serve.run(app, name="refused", route_prefix="/refused")
        message = serve.status().applications["refused"].deployments["engine-default"].message
    finally:
        serve.delete("refused")
    assert "ArtifactError" in message
    assert "never gated" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.ray
def test_an_override_is_loud_in_health_metrics_and_the_replicas_log(
    serve_url: str, engine_dir: Path, tmp_path: Path
) -> None:
    app = application(make_config(engine=engine_dir, allow_ungated=True), tmp_path)
    url = f"{serve_url}/overridden"
    try:
        serve.run(app, name="overridden", route_prefix="/overridden")
        assert told_health(url)["gated"] is False
        wait_for(
            lambda: metric(
                httpx.get(f"{url}/metrics", timeout=10).text, "intserve_engine_info", gated="false"
            )
        )
    finally:
        serve.delete("overridden")
    log = (tmp_path / "log").read_text()
    assert f"UNGATED: {engine_dir.name} has not passed its accuracy gate" in log


def change_template(directory: Path) -> None:
    """Exchange the chat template and make engine.json right again, as whoever may write there."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "evil"}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(directory / "engine.json", lambda raw: raw["files"].update({path.name: digest}))


def test_an_ingress_uses_only_files_that_the_verdict_covers(
    engine_dir: Path, tmp_path: Path
) -> None:
    write_verdict(engine_dir, verdict(engine_dir))
    load_tokenizer(make_config(engine=engine_dir))
    for number, (harm, says) in enumerate(
        (
            (lambda d: (d / "chat_template.jinja").write_text("evil"), "is not part of this engi"),
            (lambda d: (d / "special_tokens_map.json").write_text("{}"), "is not part of this en"),
            (lambda d: (d / "additional_chat_templates").mkdir(), "is not part of this engine"),
            (lambda d: (d / "tokenizer.json").write_text("{}"), "differs from what engine.js"),
            (change_template, "judges the engine"),
        )
    ):
        copy = shutil.copytree(engine_dir, tmp_path / str(number))
        harm(copy)
        with pytest.raises(ArtifactError, match=says):
            load_tokenizer(make_config(engine=copy))


def test_a_signature_is_required_of_every_door(engine_dir: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    config = make_config(engine=engine_dir, require_signature=keys.public)
    doors = (
        lambda: admit(engine_dir, kv_cache=None, require_signature=keys.public),
        lambda: load_tokenizer(config),
    )
    write_verdict(engine_dir, verdict(engine_dir))
    for door in doors:
        with pytest.raises(ArtifactError, match="a signature is required"):
            door()
    write_verdict(engine_dir, verdict(engine_dir), read_private_key(keys.private))
    for door in doors:
        door()
    (engine_dir / "gate.json.sig").unlink()


def test_a_signature_is_not_overridden(engine_dir: Path, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    with pytest.raises(ArtifactError, match="never gated") as refused:
        admit(engine_dir, kv_cache=None, allow_ungated=True, require_signature=keys.public)
    assert "--allow-ungated" not in str(refused.value)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("engine_digest", "signed", "says"),
    [
        (None, False, "a signature is required"),
        ("0" * 64, True, "was not loaded as it was admitted"),
    ],
)
def test_a_replica_serves_only_the_engine_that_was_judged_and_signed(
    serve_url: str,
    engine_dir: Path,
    tmp_path: Path,
    engine_digest: str | None,
    signed: bool,
    says: str,
) -> None:
    keys = make_keys(tmp_path / "keys")
    key = read_private_key(keys.private) if signed else None
    write_verdict(engine_dir, verdict(engine_dir), key)
    # As a `serve deploy` file has it.
    args = nest(engine=engine_dir, require_signature=str(keys.public))
    config = ServeConfig.model_validate(args)
    app = build_with(config, partial(MarkingEngine, tmp_path, engine_digest))
    try:
        with pytest.raises(RuntimeError):
            serve.run(app, name="unsigned", route_prefix="/unsigned")
        deployments = serve.status().applications["unsigned"].deployments
        message = deployments["engine-default"].message
    finally:
        serve.delete("unsigned")
        (engine_dir / "gate.json.sig").unlink(missing_ok=True)
    assert says in message
    assert (tmp_path / "made").exists() is signed


@pytest.mark.parametrize("recipe", [None, "int8"])
def test_an_engine_is_served_with_the_kv_format_that_was_judged_and_no_other(
    engine_dir: Path,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recipe: str | None,
) -> None:
    """Of a source as it is (no recipe) and of a quantized one; at both doors."""
    directory = engine_dir if recipe is None else make_engine(tiny_model, recipe, tmp_path)
    write_verdict(directory, verdict(directory))
    for kv_cache in (None, "bf16"):
        assert admit(directory, kv_cache=kv_cache).kv_cache == "bf16"
        load_tokenizer(make_config(engine=directory, kv_cache=kv_cache))
    for door in (
        lambda: admit(directory, kv_cache="int8"),
        lambda: load_tokenizer(make_config(engine=directory, kv_cache="int8")),
    ):
        with pytest.raises(ArtifactError, match="judges bf16 KV pages, but int8 ones would be ser"):
            door()
    assert caplog.text == ""
    admitted = admit(directory, kv_cache="int8", allow_ungated=True)
    assert (admitted.gated, admitted.kv_cache) == (False, "int8")
    assert "SERVING AN UNGATED ARTIFACT, its quality is unknown" in caplog.text
    write_verdict(directory, verdict(directory, kv_cache="int8"))
    assert admit(directory, kv_cache="int8").gated is True
    with pytest.raises(ArtifactError, match="judges int8 KV pages, but bf16 ones would be served"):
        admit(directory, kv_cache=None)


def test_an_engine_whose_target_or_arithmetic_was_not_judged_is_refused(engine_dir: Path) -> None:
    for changes, says in (
        ({"arithmetic": "trtllm"}, "judges the arithmetic of trtllm, but embedded would serve"),
        ({"target": "trtllm"}, "judges an engine for trtllm, but this one is for embedded"),
    ):
        write_verdict(engine_dir, verdict(engine_dir, **changes))
        with pytest.raises(ArtifactError, match=says):
            admit(engine_dir, kv_cache=None)


@pytest.mark.parametrize(
    ("started", "says"),
    [
        ({"engine_digest": "0" * 64}, "engine 0000000000000000 where"),
        ({"arithmetic": "trtllm"}, "arithmetic trtllm where embedded was"),
        ({"kv_cache": "int8"}, "KV format int8 where bf16 was"),
        ({"kv_cache": None}, "KV format unknown where bf16 was"),
    ],
)
def test_an_engine_that_started_otherwise_than_admitted_is_refused(
    engine_dir: Path, started: dict[str, Any], says: str
) -> None:
    write_verdict(engine_dir, verdict(engine_dir))
    admitted = admit(engine_dir, kv_cache=None)
    right: dict[str, Any] = {
        "engine_digest": admitted.engine_digest,
        "arithmetic": "embedded",
        "kv_cache": "bf16",
    }
    admitted.check_started(engine_dir, **right)
    admitted.check_started(engine_dir, engine_digest=None, arithmetic="echo", kv_cache=None)
    with pytest.raises(ArtifactError, match=says):
        admitted.check_started(engine_dir, **right | started)


async def test_a_started_engine_says_which_kv_format_it_uses(engine_dir: Path) -> None:
    for kv_cache in (None, "int8"):
        engine = EmbeddedEngine(make_config(engine=engine_dir, kv_cache=kv_cache).pool.engine)
        info = await engine.start()
        await engine.shutdown()
        assert (info.engine, info.kv_cache) == ("embedded", kv_cache or "bf16")


@pytest.mark.ray
def test_a_replica_asks_the_door_about_the_kv_format_that_it_is_to_use(
    serve_url: str, engine_dir: Path, tmp_path: Path
) -> None:
    write_verdict(engine_dir, verdict(engine_dir))
    app = application(make_config(engine=engine_dir, kv_cache="int8"), tmp_path)
    try:
        with pytest.raises(RuntimeError):
            serve.run(app, name="other-kv", route_prefix="/other-kv")
        message = serve.status().applications["other-kv"].deployments["engine-default"].message
    finally:
        serve.delete("other-kv")
    assert "judges bf16 KV pages, but int8 ones would be served" in message
    assert not (tmp_path / "made").exists()


def test_no_engine_adapter_knows_of_gates(root: Path) -> None:
    adapters = [p for p in (root / "serve_app/engines").rglob("*.py") if p.name != "protocol.py"]
    assert adapters
    for source in adapters:
        text = source.read_text(encoding="utf-8")
        for word in ("admit(", "verdict", "allow_ungated", "gated"):
            assert word not in text, f"{source.relative_to(root)} knows of {word}"

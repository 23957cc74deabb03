"""Two pools as Serve deploys them: a deployment each, one endpoint, one owner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from support.configs import make_config
from support.serving import metric, told_health, wait_for

from serve_app.app import build
from serve_app.config import EchoOptions
from serve_app.routing.owner import NAMESPACE, owner_name

pytestmark = [pytest.mark.ray, pytest.mark.heavy]

APP = "two-pools"
SHORT, LONG = 64, 512


class Deployed:
    """The application at a URL, and its access log."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self._log, self._read = url, log, 0

    def ask(self, num_prompt: int, *, head: str = "a", **headers: str) -> httpx.Response:
        body = {"model": "echo", "prompt": head * num_prompt, "max_tokens": 8, "ignore_eos": True}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)

    def get(self, path: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", timeout=30).raise_for_status()
        return answer.json() if "json" in answer.headers["content-type"] else answer.text

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The last lines of the log, once it has `count` more than when this was asked last."""
        before, end = self._read, self._read + count
        wait_for(lambda: len(self._log.read_text().splitlines()) >= end)
        found = self._log.read_text().splitlines()
        self._read = len(found)
        return [json.loads(line) for line in found[before:]]


@pytest.fixture(scope="module")
def deployed(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    log = tmp_path_factory.mktemp("pools") / "access.jsonl"
    log.touch()

    def pool(limit: int, **more: Any) -> dict[str, Any]:
        engine = {"kind": "echo", "max_model_len": limit, "itl_s": 0.01}
        return {"engine": engine, "max_ongoing_requests": 4, "drain_s": 2.0, **more}

    config = make_config(
        echo=EchoOptions(),
        ingress={"replicas": 2},
        pools={"standard": pool(SHORT, replicas=2, spill_over=["long"]), "long": pool(LONG)},
        telemetry={"access_log": str(log)},
    )
    serve.run(build(config), name=APP, route_prefix=f"/{APP}")
    made = Deployed(f"{serve_url}/{APP}", log)
    wait_for(lambda: len(made.get("/v1/models")["data"][0]["pools"]) == 2)
    wait_for(lambda: all(p["replicas"] for p in told_health(made.url)["pools"].values()))
    # Where requests run, the owner of admission says, which learns of the replicas by itself.
    owner = ray.get_actor(owner_name(APP), namespace=NAMESPACE)
    wait_for(lambda: len(ray.get(owner.stats.remote(), timeout=20).replicas) == 3)
    yield made
    serve.delete(APP)


def test_each_pool_is_a_deployment_and_requests_run_where_they_belong(deployed: Deployed) -> None:
    names = set(serve.status().applications[APP].deployments)
    assert names == {"ingress", "engine-standard", "engine-long"}
    for num_prompt in (8, 200):
        assert deployed.ask(num_prompt).json()["choices"][0]["text"] == "a" * 8
    assert [line["pool"] for line in deployed.lines(2)] == ["standard", "long"]
    assert deployed.ask(LONG).status_code == 400
    deployed.lines(1)
    (card,) = deployed.get("/v1/models")["data"]
    assert card["max_model_len"] == LONG
    assert card["pools"]["standard"]["max_request_tokens"] == SHORT
    wait_for(lambda: all_ready(deployed.get("/metrics")))


def all_ready(text: str) -> bool:
    """Whether the ingress that was scraped knows of every replica, and of an answer in the second
    pool."""
    ready = {p: metric(text, "intserve_pool_replicas_ready", pool=p) for p in ("standard", "long")}
    answered = metric(text, "intserve_pool_ttft_p90_seconds", pool="long") > 0
    return ready == {"standard": 2, "long": 1} and answered


def test_the_turns_of_a_session_meet_one_replica_over_all_ingresses(deployed: Deployed) -> None:
    for session in ("one", "two"):
        for turn in range(1, 7):
            answer = deployed.ask(8 * turn, head=session[0], **{"x-session-id": session})
            assert answer.status_code == 200
        lines = deployed.lines(6)
        assert {line["pool"] for line in lines} == {"standard"}
        assert len({tuple(line["replicas"]) for line in lines}) == 1
        assert len({line["ingress"] for line in lines}) > 1, "or it says nothing of the owner"

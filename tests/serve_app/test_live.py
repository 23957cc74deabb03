"""What changes while the service runs: `user_config` over the arguments, in the same processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.schema import ServeDeploySchema
from support.serving import wait_for

from deepseek.errors import ConfigError
from serve_app.live import LiveSettings, overlaid
from serve_app.sections import AdmissionSection, Live, ReplicaLimits, RequestsSection

CONFIGURED = Live(
    requests=RequestsSection(default_max_tokens=9),
    admission=AdmissionSection(max_wait_s=5.0),
)


def test_a_user_config_goes_over_the_arguments_key_by_key() -> None:
    live = overlaid("ingress", CONFIGURED, {"requests": {"timeout_s": 60}})
    assert live.requests == RequestsSection(default_max_tokens=9, timeout_s=60.0)
    assert live.admission == CONFIGURED.admission
    limits = overlaid("engine", ReplicaLimits(max_waiting_requests=3), {"max_flushes_per_s": None})
    assert limits == ReplicaLimits(max_waiting_requests=3, max_flushes_per_s=None)


def test_a_key_that_is_taken_out_again_has_the_value_of_the_arguments() -> None:
    settings = LiveSettings("ingress", CONFIGURED)
    assert settings.reconfigure({"requests": {"default_max_tokens": 4}})
    assert settings.current.requests.default_max_tokens == 4
    assert settings.reconfigure({})
    assert settings.current == CONFIGURED


@pytest.mark.parametrize(
    ("user_config", "sentence"),
    [
        ({"http": {"port": 1}}, "unknown key 'http'; remove or correct it"),
        ({"requests": {"timeout": 1}}, "unknown key 'requests.timeout'; did you mean requests.tim"),
        ({"max_wait_s": 1}, "unknown key 'max_wait_s'; it is admission.max_wait_s"),
        ({"admission": {"max_wait_s": 0}}, "admission.max_wait_s: Input should be greater than 0"),
        ({"resume": None}, "resume: holds nothing; remove it, or write its keys below it"),
        ([], "must be a mapping of keys to values"),
    ],
)
def test_a_wrong_user_config_ends_a_start_and_changes_nothing_later(
    caplog: pytest.LogCaptureFixture, user_config: Any, sentence: str
) -> None:
    settings = LiveSettings("ingress", CONFIGURED)
    with pytest.raises(ConfigError) as refused:
        settings.reconfigure(user_config)
    assert str(refused.value).startswith(f"user_config of deployment ingress: {sentence}")
    assert settings.reconfigure({"requests": {"default_max_tokens": 4}})
    before = settings.current
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        assert not settings.reconfigure(user_config)
    assert settings.current is before
    assert caplog.messages == [f"{refused.value}; the settings stay as they were"]


class Deployed:
    """Applies deploy files to the session's Serve, as its REST interface does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.app = "live"

    def apply(self, args: dict[str, Any], *deployments: dict[str, Any]) -> None:
        """Put this application in place, and wait until it runs."""
        from ray.serve.context import _get_global_client

        application = {
            "name": self.app,
            "import_path": "serve_app.app:build",
            "route_prefix": "/live",
            "args": args,
            "deployments": list(deployments),
        }
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        end = time.monotonic() + 90
        while (status := serve.status().applications.get(self.app)) is None or (
            status.status != "RUNNING"
        ):
            if status is not None and status.status == "DEPLOY_FAILED":
                raise RuntimeError(status.message)
            assert time.monotonic() < end, status
            time.sleep(0.1)

    def replicas(self) -> dict[str, set[tuple[str, int]]]:
        """Actor and process of each running replica, by deployment."""
        from ray.serve.context import _get_global_client

        details = _get_global_client().get_serve_details()["applications"][self.app]
        return {
            name: {(r["actor_id"], r["pid"]) for r in one["replicas"] if r["state"] == "RUNNING"}
            for name, one in details["deployments"].items()
        }

    def post(self) -> httpx.Response:
        """A request that names no limit, and would go on for ever."""
        body = {"model": "echo", "prompt": "x" * 20, "ignore_eos": True}
        return httpx.post(f"{self._url}/live/v1/completions", json=body, timeout=30)

    def complete(self) -> int:
        """Its completion tokens."""
        answer = self.post().raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])


@pytest.fixture
def deployed(serve_url: str) -> Iterator[Deployed]:
    deployed = Deployed(serve_url)
    yield deployed
    serve.delete(deployed.app)


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.timeout(180)
def test_a_live_key_changes_in_the_same_processes_and_any_other_brings_new_ones(
    deployed: Deployed,
) -> None:
    args: dict[str, Any] = {
        "ingress": {"replicas": 1},
        "requests": {"default_max_tokens": 9},
        "pools": {"default": {"engine": {"kind": "echo"}, "drain_s": 2.0}},
    }
    deployed.apply(args)
    first = deployed.replicas()
    assert {name: len(found) for name, found in first.items()} == {
        "ingress": 1,
        "engine-default": 1,
    }
    assert deployed.complete() == 9

    live: dict[str, Any] = {"requests": {"default_max_tokens": 4}}
    ingress = {"name": "ingress", "user_config": live}
    engine = {"name": "engine-default", "user_config": {"max_flushes_per_s": 100.0}}
    deployed.apply(args, ingress, engine)
    assert deployed.replicas() == first
    assert deployed.complete() == 4

    live["admission"] = {"key_limits": {"requests_per_minute": 1}}
    deployed.apply(args, ingress, engine)
    assert deployed.replicas() == first
    wait_for(lambda: deployed.post().status_code == 429)  # the owner of admission has it, too

    ingress["user_config"] = {"requests": {"default_max_token": 4}}
    deployed.apply(args, ingress, engine)  # a slip costs no replica and changes nothing
    assert deployed.replicas() == first
    assert deployed.post().status_code == 429

    with pytest.raises(RuntimeError, match="unknown key 'prot'; remove or correct it"):
        deployed.apply(args | {"prot": 1})
    assert deployed.post().status_code == 429  # what runs, runs on

    deployed.apply(args)
    assert deployed.replicas() == first
    wait_for(lambda: deployed.post().status_code == 200)
    assert deployed.complete() == 9

    deployed.apply(args | {"requests": {"default_max_tokens": 7}})
    assert deployed.complete() == 7
    last = deployed.replicas()
    assert not any(last[name] & first[name] for name in first)

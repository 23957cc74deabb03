"""Latency and throughput over HTTP: what is counted, and streams that are none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.scored_service import ScoredService, refuse, running

from deepseek.errors import ServiceError
from quant_jobs.evaluation.load import is_loopback, measure_load
from quant_jobs.evaluation.reference import Reference
from quant_jobs.evaluation.served import Identity
from quant_jobs.evaluation.service_client import ServiceClient


async def at_once(seconds: float) -> None:
    """A sleep that does not."""


def run_load(url: str, reference: Reference, generated: int) -> Any:
    async def run() -> Any:
        async with ServiceClient(url, None, sleep=at_once) as client:
            return await measure_load(client, Identity(model="tiny"), reference, generated, (1, 2))

    return asyncio.run(run())


def test_load_counts_what_was_generated_after_one_request_per_client(
    service: ScoredService, reference: Reference
) -> None:
    service.faults = [lambda _: None, refuse(429, Retry_After="0")]
    with running(service) as url:
        one, two = run_load(url, reference, 3)
        assert run_load(url, reference, 0) == ()
    assert (one.concurrency, one.requests, one.generated_tokens, one.retries) == (1, 4, 12, 1)
    assert (two.concurrency, two.requests, two.generated_tokens, two.retries) == (2, 8, 24, 0)
    assert len(service.bodies) == 3 * 5 + 1
    assert all(body["stream"] and body["ignore_eos"] for body in service.bodies)
    for point in (one, two):
        assert point.ttft_p50_s <= point.ttft_p99_s <= point.seconds
        assert point.tokens_per_s == pytest.approx(point.generated_tokens / point.seconds)


def test_no_two_requests_of_a_load_share_a_prefix(
    service: ScoredService, reference: Reference
) -> None:
    with running(service) as url:
        run_load(url, reference, 1)
        run_load(url, reference, 1)
    salts = [body["cache_salt"] for body in service.bodies]
    assert len(set(salts)) == len(salts) == 2 * 3 * 5


def test_a_service_that_knows_no_salts_is_measured_without(
    service: ScoredService, reference: Reference
) -> None:
    service.faults = [refuse(400, "unknown field cache_salt")]
    with running(service) as url:
        one, two = run_load(url, reference, 1)
    assert [point.requests for point in (one, two)] == [4, 8]
    assert ["cache_salt" in body for body in service.bodies] == [True, *[False] * 15]


def test_a_service_that_refuses_to_stream_is_one_sentence(
    service: ScoredService, reference: Reference
) -> None:
    service.faults = [refuse(400, "no streams"), refuse(400, "no streams")]
    with running(service) as url, pytest.raises(ServiceError, match="no streams.*decode-tokens 0"):
        run_load(url, reference, 1)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b'data: {"error": {"message": "boom"}}\n\n', "failed in a stream .*boom"),
        (b"data: [DONE]\n\n", "ended a stream without tokens"),
        (b'data: {"choices": [{"text": "a"}]}\n\n', "ended a stream without tokens"),
        (b"data: {\n\n", "streams what is not valid JSON"),
        (b"data: " + b"x" * (3 << 20), "streams a line of more than"),
    ],
)
def test_a_stream_that_is_none_is_one_sentence(
    service: ScoredService, reference: Reference, stream: bytes, says: str
) -> None:
    service.faults = [lambda _: (200, {}, stream)]
    with running(service) as url, pytest.raises(ServiceError, match=says):
        run_load(url, reference, 3)


def test_loopback_is_told_from_a_network() -> None:
    assert is_loopback("http://127.0.0.1:1")
    assert is_loopback("http://[::1]:1")
    assert not is_loopback("http://192.0.2.1:1")

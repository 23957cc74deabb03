"""Measuring over HTTP: what is asked, believed and refused, and where a run goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ports import free_port
from support.quantizing import SmallModel
from support.scored_service import Fault, ScoredService, refuse, running

from deepseek.errors import ArtifactError, ServiceError
from deepseek.untrusted import UnusableFileError
from quant_jobs.evaluate import Settings, obtain_reference
from quant_jobs.evaluation.reference import REFERENCE, Reference
from quant_jobs.evaluation.service_client import (
    MAX_TRIES,
    ServiceClient,
)
from quant_jobs.evaluation.url import ServedText, measure_text, read_logprobs

SETTINGS = Settings(num_blocks=6, block_tokens=16, num_threads=1)


async def at_once(seconds: float) -> None:
    """A sleep that does not."""


def measure(
    url: str,
    reference: Reference,
    output: Path,
    *,
    key: str | None = None,
    model: str | None = None,
    concurrency: int = 1,
    sleep: Callable[[float], Coroutine[Any, Any, None]] = at_once,
) -> ServedText:
    async def run() -> ServedText:
        async with ServiceClient(url, key, sleep=sleep) as client:
            return await measure_text(
                client, reference, output, model=model, concurrency=concurrency
            )

    return asyncio.run(run())


def closing(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return 0, {}, b""


def refuse_no_tokens(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes] | None:
    return refuse(400, "max_tokens must be at least 1")(body) if body["max_tokens"] < 1 else None


def test_a_block_is_asked_for_as_token_ids_with_echo_and_every_logprob(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    with running(service) as url:
        text = measure(url, reference, tmp_path, concurrency=3)
    probe, *bodies = service.bodies
    assert len(probe["prompt"]) == 8
    prompts = sorted(body.pop("prompt") for body in bodies)
    assert prompts == sorted(reference.ids.tolist())
    assert all(
        body
        == {
            "model": "tiny",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 20,
            "temperature": 0,
            "return_tokens_as_token_ids": True,
        }
        for body in bodies
    )
    for block, ids in zip(text.blocks, reference.ids, strict=True):
        expected = service.engine.score(ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(block.next_logprob, expected.double(), atol=1e-6, rtol=0)
        assert ((block.ids >= 0).sum(-1) >= 20).all()


def test_a_service_that_must_generate_a_token_is_asked_for_one(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    service.faults = [refuse_no_tokens]
    with running(service) as url:
        text = measure(url, reference, tmp_path)
    assert [body["max_tokens"] for body in service.bodies] == [0] + [1] * 7
    assert len(text.blocks[0].next_logprob) == 15


def text_tokens(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["logprobs"]["tokens"] = ["a"] * 8
    return answer


def without_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["logprobs"] = None
    return answer


def without_echo(answer: dict[str, Any]) -> dict[str, Any]:
    for values in answer["choices"][0]["logprobs"].values():
        del values[:-1]
    return answer


def with_another_vocabulary(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["logprobs"]["top_logprobs"][3] = {"token_id:96": -1.0}
    return answer


def with_added_bos(answer: dict[str, Any]) -> dict[str, Any]:
    for values in answer["choices"][0]["logprobs"].values():
        values.insert(0, None)
    answer["choices"][0]["logprobs"]["tokens"][0] = "token_id:0"
    return answer


def with_values_of_none(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["logprobs"]["token_logprobs"][2] = None
    return answer


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ["a", "b"]}, "serves the models a, b; choose one with --model"),
        ({"models": []}, "serves the models none; choose one with --model"),
        ({"key": "k"}, r"refuses requests without a key \(401: .*\); give one with --api-key-file"),
        ({"max_model_len": 15}, "takes at most 15 tokens, but a block of the reference .* has 16"),
        (
            {"max_model_len": 16, "faults": [refuse_no_tokens]},
            "takes at most 16 tokens, but a block of the reference .* has 17",
        ),
        (
            {"faults": [refuse(400, "echo?")] * 2},
            r"refuses echo with logprobs of 8 token ids \(400: echo\?\); serve the model with IntS",
        ),
        ({"change": text_tokens}, "names tokens by text .'a'., not as token_id:N"),
        ({"change": without_logprobs}, "without the 8 tokens of the prompt: it does not do echo"),
        ({"change": without_echo}, "without the 8 tokens of the prompt: it does not do echo"),
        ({"change": with_another_vocabulary}, "'token_id:96', which is none of the reference's 96"),
        ({"change": with_added_bos}, "has another vocabulary, or adds tokens"),
        ({"change": with_values_of_none}, "gives None as the logarithm of a probability"),
        ({"change": lambda _: b"<html>"}, "answers with what is not valid JSON"),
        ({"change": lambda _: b"[1]"}, "must hold a JSON object, not a list"),
        ({"change": lambda _: b'{"choices": 1}'}, "does not do echo with logprobs"),
        ({"faults": [refuse(301, location="http://elsewhere/")]}, "redirects to another address"),
        ({"faults": [refuse(404, "no route")]}, r"v1/completions refuses \(404: no route\)"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_before_any_block(
    service: ScoredService,
    reference: Reference,
    tmp_path: Path,
    changes: dict[str, Any],
    says: str,
) -> None:
    for name, value in changes.items():
        setattr(service, name, list(value) if isinstance(value, list) else value)
    with running(service) as url, pytest.raises(ServiceError, match=says) as refused:
        measure(url, reference, tmp_path)
    assert str(refused.value).isprintable()
    assert len(service.bodies) <= 2
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_served_is_named_with_those_that_are(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    with running(service) as url:
        with pytest.raises(ServiceError, match=r"serves no model other, only tiny; correct --mod"):
            measure(url, reference, tmp_path, model="other")
        assert measure(url, reference, tmp_path, model="tiny").identity.model == "tiny"


def test_nobody_listening_is_tried_again_and_then_one_sentence(
    reference: Reference, tmp_path: Path
) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    with pytest.raises(ServiceError, match="cannot be reached .*; start the service or correct"):
        measure(f"http://127.0.0.1:{free_port()}", reference, tmp_path, sleep=note)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30]
    assert len(waits) == MAX_TRIES - 1


@pytest.mark.parametrize(
    ("fault", "wait"),
    [
        (refuse(429, Retry_After="7"), 7.0),
        (refuse(503, Retry_After="0"), 0.0),
        (refuse(503, Retry_After="999999999"), 600.0),
        (refuse(503, Retry_After="soon"), 0.5),
        (refuse(500), 0.5),
        (closing, 0.5),
    ],
)
def test_what_may_pass_is_tried_again_when_the_server_says(
    service: ScoredService, reference: Reference, tmp_path: Path, fault: Fault, wait: float
) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    service.faults = [lambda _: None, fault, fault]
    with running(service) as url:
        text = measure(url, reference, tmp_path, sleep=note)
    assert len(text.blocks) == 6
    assert waits[0] == wait
    assert len(waits) == 2


def test_what_does_not_pass_ends_after_a_bounded_number_of_tries(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    service.faults = [refuse(503, "no replica is ready")] * 20
    with (
        running(service) as url,
        pytest.raises(
            ServiceError, match=r"answered 503: no replica is ready, 8 times; see the service's log"
        ),
    ):
        measure(url, reference, tmp_path)
    assert len(service.bodies) == MAX_TRIES


def stop_after(blocks: int) -> list[Fault]:
    """The probe and some blocks are answered, the next is refused for good."""
    return [*([lambda _: None] * (1 + blocks)), refuse(404, "stopped")]


def test_a_run_that_ended_early_goes_on_where_it_was(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    with running(service) as url:
        whole = measure(url, reference, tmp_path / "whole")
        service.faults = stop_after(4)
        with pytest.raises(ServiceError, match="stopped"):
            measure(url, reference, tmp_path / "cut")
        service.bodies.clear()
        resumed = measure(url, reference, tmp_path / "cut")
        assert [len(body["prompt"]) for body in service.bodies] == [8, 16, 16]
        for found, expected in zip(resumed.blocks, whole.blocks, strict=True):
            assert torch.equal(found.ids, expected.ids)
            assert torch.equal(found.next_logprob, expected.next_logprob)
        service.bodies.clear()
        [kept] = tmp_path.glob("cut/.served-*/block-000002.safetensors")
        kept.write_bytes(kept.read_bytes()[:-9])
        kept.with_name("block-000003.safetensors").write_bytes(b"")
        measure(url, reference, tmp_path / "cut")
        assert len(service.bodies) == 3, "the probe, and the two that are not whole"


def test_partial_answers_belong_to_one_service_and_one_reference(
    service: ScoredService, reference: Reference, small: SmallModel, tmp_path: Path
) -> None:
    other = obtain_reference(
        small.directory, small.text, tmp_path / "other", Settings(num_blocks=5, block_tokens=16)
    )
    service.health = {"engine_digest": "e" * 64, "kv_cache": "bf16"}
    with running(service) as url:
        measure(url, reference, tmp_path / "out")
    with running(service) as url:
        service.bodies.clear()
        measure(url, reference, tmp_path / "out")
        assert len(service.bodies) == 1, "the same engine at another address goes on"
        measure(url, other, tmp_path / "out")
        assert len(service.bodies) == 1 + 6
        service.health["kv_cache"] = "int8"
        measure(url, reference, tmp_path / "out")
        assert len(service.bodies) == 1 + 6 + 7


def test_a_service_that_is_exchanged_meanwhile_is_not_measured(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    service.health = {"engine_digest": "e" * 64}

    def exchange(body: dict[str, Any]) -> None:
        service.health = {"engine_digest": "f" * 64}

    service.faults = [lambda _: None, exchange]
    with (
        running(service) as url,
        pytest.raises(ServiceError, match=r"changed while it was measured \(engine_digest\)"),
    ):
        measure(url, reference, tmp_path)


def test_a_key_is_sent_and_shown_nowhere(
    service: ScoredService, reference: Reference, tmp_path: Path
) -> None:
    service.key = "sesame-123"
    with running(service) as url:
        measure(url, reference, tmp_path, key="sesame-123")
        # The service repeats the key in its refusal.
        with pytest.raises(ServiceError, match=r"refuses the key \(401: .*\*\*\*\)") as refused:
            measure(url, reference, tmp_path, key="wrong-456")
    assert "wrong-456" not in str(refused.value)


def answer(**changes: Any) -> dict[str, Any]:
    logprobs = {
        "tokens": ["token_id:1", "token_id:2"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"token_id:2": -0.5, "token_id:3": -1.5}],
    }
    return {"choices": [{"logprobs": logprobs | changes}]}


def test_an_answer_is_read_by_its_token_ids() -> None:
    block = read_logprobs(answer(), torch.tensor([1, 2]), 10)
    assert block.ids.tolist() == [[2, 3]]
    assert block.logprobs.tolist() == [[-0.5, -1.5]]
    unnamed = answer(top_logprobs=[None, {"token_id:3": -1.5}])
    assert read_logprobs(unnamed, torch.tensor([1, 2]), 10).ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("value", ["-1", True, 0.5, 1e300, -1e300, [], None])
def test_what_is_no_logarithm_of_a_probability_is_refused(value: Any) -> None:
    for changes in (
        {"token_logprobs": [None, value]},
        {"top_logprobs": [None, {"token_id:2": value}]},
    ):
        with pytest.raises(UnusableFileError, match="as the logarithm of a probability"):
            read_logprobs(answer(**changes), torch.tensor([1, 2]), 10)


@pytest.mark.parametrize("top", [None, {}, [], 3])
def test_a_position_without_alternatives_is_refused(top: Any) -> None:
    with pytest.raises(UnusableFileError, match="names no alternatives at token 1"):
        read_logprobs(answer(top_logprobs=[None, top]), torch.tensor([1, 2]), 10)


def test_a_kept_reference_is_used_again_and_one_of_another_text_is_refused(
    small: SmallModel, tmp_path: Path
) -> None:
    keep = tmp_path / "kept"
    first = obtain_reference(small.directory, small.text, keep, SETTINGS)
    written = (keep / REFERENCE).stat().st_mtime_ns
    again = obtain_reference(small.directory, small.text, keep, SETTINGS)
    assert again.record == first.record
    assert obtain_reference(keep, None, tmp_path / "unused", Settings()).record == first.record
    assert (keep / REFERENCE).stat().st_mtime_ns == written
    with pytest.raises(ArtifactError, match="holds the reference of another source or text"):
        obtain_reference(small.directory, small.text, keep, Settings(num_blocks=5, block_tokens=16))
    assert json.loads((keep / REFERENCE).read_text())["digest"] == first.record.digest

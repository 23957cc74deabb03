"""What operators see of a request that lost its replica: its trace, its line, its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.configs import make_config
from support.fleets import LocalFleet, echo_fleet
from support.serving import client_of, read_sse

from serve_app.config import EchoOptions
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer
from serve_app.telemetry.tracing import Telemetry

BODY = {"model": "echo", "prompt": "hello there", "stream": True}


def kill_after(num_tokens: int, fleet: LocalFleet) -> None:
    """Kill replica `a` before a sequence there has more tokens than these."""

    def look(replica: Any, stream: Any, event: Any) -> None:
        if replica.replica_id == "a" and stream.num_tokens >= num_tokens:
            fleet.die("a")

    fleet.before_message = look


async def ask(num_tokens: int, path: Path) -> tuple[list[ReadableSpan], dict[str, Any], str]:
    """Spans, line of the access log and text of a request whose first replica dies."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    config = make_config(echo=EchoOptions(), access_log=path)
    async with echo_fleet() as fleet:
        kill_after(num_tokens, fleet)
        service = Service(config, ByteTokenizer(), fleet.fleet, Telemetry(provider))
        async with client_of(service) as client:
            answer = await client.post("/v1/completions", json=BODY)
        service.close()
    *chunks, end = read_sse(answer.text)
    assert end == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    (line,) = path.read_text(encoding="utf-8").splitlines()
    return list(exporter.get_finished_spans()), json.loads(line), text


async def test_a_trace_tells_which_replica_was_lost_when_and_after_how_many_tokens(
    tmp_path: Path,
) -> None:
    spans, line, text = await ask(4, tmp_path / "access.jsonl")
    assert text == BODY["prompt"]
    lost, root = spans  # the replicas' own spans are made by their processes, which are none here
    assert (lost.name, root.name) == ("engine.lost", "text_completion echo")
    assert lost.parent is not None
    assert lost.parent.span_id == root.context.span_id
    assert dict(lost.attributes or {}) == {
        "intserve.replica_id": "a",
        "gen_ai.usage.output_tokens": 4,
    }
    (event,) = root.events
    assert (event.name, dict(event.attributes or {})) == (
        "resumed",
        {
            "intserve.attempt": 2,
            "intserve.replica_id": "b",
            "intserve.choice": 0,
            "gen_ai.usage.output_tokens": 4,
        },
    )
    assert root.start_time <= lost.start_time <= lost.end_time <= event.timestamp <= root.end_time
    told = dict(root.attributes or {})
    assert (told["intserve.resumes"], told["intserve.outcome"]) == (1, "ok")
    assert told["gen_ai.usage.output_tokens"] == len(text)
    assert (line["replicas"], line["resumes"], line["status"]) == (["a", "b"], 1, 200)


async def test_a_replica_that_never_said_anything_has_no_span(tmp_path: Path) -> None:
    spans, line, text = await ask(0, tmp_path / "access.jsonl")
    assert text == BODY["prompt"]
    assert [span.name for span in spans] == ["text_completion echo"]
    assert [event.name for event in spans[0].events] == ["resumed"]
    assert (line["replicas"], line["resumes"]) == (["b"], 1)

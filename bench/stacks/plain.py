"""The baseline: an ingress and an engine on Ray Serve as its guide has them, with its defaults.

    python -m bench.stacks.plain --port 8767 --ttft 0.02 --itl 0.01

A FastAPI ingress calls a streaming deployment handle and sends each item on. Serve's Python proxy,
no admission, no keys, no traces, one message per token.
"""

# No `from __future__ import annotations` here: FastAPI reads the annotations of the pickled class.

import argparse
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

from deepseek.engine.request import SamplingParams
from serve_app.engine_sections import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens

api = FastAPI(
    telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
)


@serve.deployment(max_ongoing_requests=1024)
class Engine:
    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self._engine = EchoEngine(EchoOptions(ttft_s=ttft_s, itl_s=itl_s))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        async for event in self._engine.generate(request):
            yield event


@serve.deployment(max_ongoing_requests=1024)
@serve.ingress(api)
class Ingress:
    def __init__(self, engine: Any) -> None:
        self._engine = engine.options(stream=True)
        self._count = 0

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        self._count += 1
        body = await request.json()
        sampling = SamplingParams(max_tokens=body["max_tokens"], ignore_eos=body["ignore_eos"])
        asked = GenerateRequest(
            request_id=str(self._count),
            prompt_ids=tuple(body["prompt"].encode()),
            sampling=sampling,
        )
        return StreamingResponse(self._chunks(asked), media_type="text/event-stream")

    async def _chunks(self, asked: GenerateRequest) -> AsyncIterator[bytes]:
        envelope = {"id": asked.request_id, "object": "text_completion", "model": "echo"}
        async for event in self._engine.generate.remote(asked):
            choice = {"index": 0, "text": "", "finish_reason": None}
            if isinstance(event, Tokens):
                choice["text"] = event.text
            elif isinstance(event, Done):
                choice["finish_reason"] = event.reason
            yield f"data: {json.dumps({**envelope, 'choices': [choice]})}\n\n".encode()
        yield b"data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ttft", type=float, required=True)
    parser.add_argument("--itl", type=float, required=True)
    given = parser.parse_args()
    ray.init("local", include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": given.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run(Ingress.bind(Engine.bind(given.ttft, given.itl)), name="plain")
    print("serving", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()

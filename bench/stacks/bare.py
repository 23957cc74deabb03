"""The floor: one echo engine behind uvicorn, no Ray. It checks nothing and measures nothing.

python -m bench.stacks.bare --port 8766 --ttft 0.02 --itl 0.01
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from deepseek.engine.request import SamplingParams
from serve_app.engine_sections import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, GenerateRequest, Tokens


def make_app(engine: EchoEngine) -> Starlette:
    """One streamed endpoint, a chunk per token in the form of OpenAI's completions."""
    count = 0

    async def completions(request: Request) -> StreamingResponse:
        nonlocal count
        count += 1
        body = await request.json()
        sampling = SamplingParams(max_tokens=body["max_tokens"], ignore_eos=body["ignore_eos"])
        asked = GenerateRequest(
            request_id=str(count), prompt_ids=tuple(body["prompt"].encode()), sampling=sampling
        )
        return StreamingResponse(chunks(asked), media_type="text/event-stream")

    async def chunks(asked: GenerateRequest) -> AsyncIterator[bytes]:
        envelope = {"id": asked.request_id, "object": "text_completion", "model": "echo"}
        async for event in engine.generate(asked):
            choice = {"index": 0, "text": "", "finish_reason": None}
            if isinstance(event, Tokens):
                choice["text"] = event.text
            elif isinstance(event, Done):
                choice["finish_reason"] = event.reason
            yield f"data: {json.dumps({**envelope, 'choices': [choice]})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ttft", type=float, required=True)
    parser.add_argument("--itl", type=float, required=True)
    given = parser.parse_args()
    engine = EchoEngine(EchoOptions(ttft_s=given.ttft, itl_s=given.itl))
    print("serving", flush=True)
    uvicorn.run(make_app(engine), host="127.0.0.1", port=given.port, log_level="error")


if __name__ == "__main__":
    main()

"""Between the engine protocol and the ground floor's nouns: a request as an engine tracks it, and
what one step added to it as events. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek.engine.request import Request, StepOutput
from serve_app.engines.protocol import Done, Event, GenerateRequest, PromptLogprobs, Tokens


def to_engine(request: GenerateRequest) -> Request:
    """The request without what only the service needs (its trace context, its place)."""
    return Request(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        sampling=request.sampling,
        output_ids=request.output_ids,
        num_shown=request.num_shown,
        cache_salt=request.cache_salt,
    )


def to_events(output: StepOutput) -> Iterator[Event]:
    """In their order; none for a step that added nothing."""
    if output.prompt_logprobs is not None:
        yield PromptLogprobs(output.prompt_logprobs)
    if output.token_ids or output.text:
        yield Tokens(output.token_ids, output.text, output.logprobs)
    if output.finish_reason is not None:
        yield Done(
            output.finish_reason,
            output.prompt_tokens,
            output.completion_tokens,
            cached_tokens=output.cached_tokens,
            queue_s=output.queue_s,
            prefill_s=output.prefill_s,
            decode_s=output.decode_s,
            error=output.error,
            retryable=output.retryable,
        )

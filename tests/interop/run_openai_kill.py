"""Read answers through `openai` for Python while the replica that makes them is killed.

python run_openai_kill.py BASE_URL MODEL KEY_FILE OUTPUT

The client is as it comes, its own retries included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disturbing import counts, noticing, twice, write
from openai import OpenAI

base, model, key_file, output = sys.argv[1:]
client = OpenAI(base_url=base, api_key=Path(key_file).read_text())
QUESTION: Any = {"role": "user", "content": "What does json.dumps do?"}
LONG: Any = {
    "model": model,
    "messages": [QUESTION],
    "max_tokens": 1500,
    "extra_body": {"ignore_eos": True},
}
GREEDY, SEEDED = LONG | {"temperature": 0}, LONG | {"temperature": 1, "seed": 7}
USAGE: Any = {"stream_options": {"include_usage": True}}


@twice
def greedy_stream(begun: Callable[[], None]) -> dict[str, Any]:
    logprobs: Any = {"logprobs": True, "top_logprobs": 2}
    pieces = client.chat.completions.create(stream=True, **GREEDY, **USAGE, **logprobs)
    chunks = list(noticing(pieces, begun))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    entries = [e for choice in choices if choice.logprobs for e in choice.logprobs.content]
    return {
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish_reasons": [c.finish_reason for c in choices if c.finish_reason],
        "num_ids": len({chunk.id for chunk in chunks}),
        "roles": [c.delta.role for c in choices if c.delta.role],
        "usage": counts(chunks[-1].usage),
        "logprobs": ["".join(e.token for e in entries), len(entries)],
    }


@twice
def seeded_stream(begun: Callable[[], None]) -> dict[str, Any]:
    """With the helper that puts the chunks together itself."""
    with client.chat.completions.stream(**SEEDED, **USAGE) as events:
        ids = {event.chunk.id for event in noticing(events, begun) if event.type == "chunk"}
        final = events.current_completion_snapshot  # get_final_completion raises: "length"
    return {
        "text": final.choices[0].message.content,
        "finish_reasons": [final.choices[0].finish_reason],
        "num_ids": len(ids),
        "usage": counts(final.usage),
    }


@twice
def greedy_whole(begun: Callable[[], None]) -> dict[str, Any]:
    begun()
    answer = client.chat.completions.create(**GREEDY)
    return {
        "text": answer.choices[0].message.content,
        "finish_reasons": [choice.finish_reason for choice in answer.choices],
        "usage": counts(answer.usage),
    }


write(output)

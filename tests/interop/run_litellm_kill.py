"""Read answers through `litellm` while the replica that makes them is killed.

python run_litellm_kill.py BASE_URL MODEL KEY_FILE OUTPUT

The client is as it comes, its own retries included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches the map when it is imported
import litellm
from disturbing import counts, noticing, twice, write

base, model, key_file, output = sys.argv[1:]
LONG: Any = {
    "api_base": base,
    "api_key": Path(key_file).read_text(),
    "max_tokens": 1500,
    "extra_body": {"ignore_eos": True},
}
CHAT: Any = LONG | {
    "model": f"openai/{model}",
    "messages": [{"role": "user", "content": "What does json.dumps do?"}],
    "temperature": 0,
}
TEXT: Any = LONG | {
    "model": f"text-completion-openai/{model}",
    "prompt": "json.dumps(",
    "temperature": 1,
    "seed": 7,
}
STREAM: Any = {"stream": True, "stream_options": {"include_usage": True}}
litellm.suppress_debug_info = True


def joined(chunks: list[Any], text: Callable[[Any], str | None]) -> dict[str, Any]:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {
        "text": "".join(text(choice) or "" for choice in choices),
        "finish_reasons": [c.finish_reason for c in choices if c.finish_reason],
        "num_ids": len({chunk.id for chunk in chunks}),
        "usage": counts(chunks[-1].usage),
    }


@twice
def greedy_stream(begun: Callable[[], None]) -> dict[str, Any]:
    chunks = list(noticing(litellm.completion(**CHAT, **STREAM), begun))
    return joined(chunks, lambda choice: choice.delta.content)


@twice
def seeded_stream(begun: Callable[[], None]) -> dict[str, Any]:
    chunks = list(noticing(litellm.text_completion(**TEXT, **STREAM), begun))
    return joined(chunks, lambda choice: choice.text)


@twice
def greedy_whole(begun: Callable[[], None]) -> dict[str, Any]:
    begun()
    answer = litellm.completion(**CHAT)
    return {
        "text": answer.choices[0].message.content,
        "finish_reasons": [choice.finish_reason for choice in answer.choices],
        "usage": counts(answer.usage),
    }


write(output)

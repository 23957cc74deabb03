"""Use the service through haystack's `OpenAIChatGenerator`, and write down what each feature did.

python run_haystack.py BASE_URL MODEL KEY_FILE OUTPUT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from recording import feature, write

base, model, key_file, output = sys.argv[1:]
QUESTION = ChatMessage.from_user("What does json.dumps do?")


def generator(key: str = Path(key_file).read_text(), **fields: Any) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(
        api_key=Secret.from_token(key),
        model=model,
        api_base_url=base,
        generation_kwargs={"max_tokens": 12, "temperature": 0, **fields},
        max_retries=0,
    )


@feature
def run() -> str:
    return generator().run([QUESTION])["replies"][0].text


@feature
def history() -> str:
    replies = generator().run([QUESTION])["replies"]
    return generator().run([QUESTION, *replies, QUESTION])["replies"][0].text


@feature
def streaming_callback() -> str:
    pieces: list[str] = []
    generator().run([QUESTION], streaming_callback=lambda piece: pieces.append(piece.content))
    return "".join(pieces)


@feature
def run_async() -> str:
    return asyncio.run(generator().run_async([QUESTION]))["replies"][0].text


@feature
def tools() -> None:
    parameters = {"type": "object", "properties": {}}
    tool = Tool(name="f", description="f", parameters=parameters, function=lambda: 1)
    generator().run([QUESTION], tools=[tool])


@feature
def json_object() -> None:
    generator(response_format={"type": "json_object"}).run([QUESTION])


@feature
def wrong_key() -> None:
    generator(key="wrong").run([QUESTION])


write(output)

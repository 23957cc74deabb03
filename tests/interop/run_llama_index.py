"""Use the service through llama-index's `OpenAILike`, and write down what each feature did.

python run_llama_index.py BASE_URL MODEL KEY_FILE OUTPUT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from recording import feature, write

base, model, key_file, output = sys.argv[1:]
DEFAULT: Any = {"model": model, "api_base": base, "api_key": Path(key_file).read_text()}
SHORT: Any = {**DEFAULT, "max_tokens": 12, "temperature": 0, "max_retries": 0}
QUESTION = ChatMessage(role="user", content="What does json.dumps do?")
PROMPT = "json.dumps("
text, chat = OpenAILike(**SHORT), OpenAILike(**SHORT, is_chat_model=True)


class Answer(BaseModel):
    """An answer."""

    words: str


@feature
def complete() -> str:
    return text.complete(PROMPT).text


@feature
def stream_complete() -> str:
    return "".join(piece.delta for piece in text.stream_complete(PROMPT))


@feature
def complete_with_logprobs() -> int:
    return len(OpenAILike(**SHORT, logprobs=True, top_logprobs=2).complete(PROMPT).logprobs)


@feature
def chat_of_a_text_model() -> bool:
    return bool(text.chat([QUESTION]).message.content)


@feature
def chat_completion() -> str:
    return chat.chat([QUESTION]).message.content


@feature
def complete_of_a_chat_model() -> str:
    return chat.complete(QUESTION.content).text


@feature
def history() -> str:
    answer = chat.chat([QUESTION]).message
    return chat.chat([QUESTION, answer, QUESTION]).message.content


@feature
def stream_chat() -> str:
    return "".join(piece.delta or "" for piece in chat.stream_chat([QUESTION]))


@feature
def asynchronous() -> Any:
    async def ask() -> Any:
        whole = (await chat.achat([QUESTION])).message.content
        pieces = [piece.delta or "" async for piece in await chat.astream_chat([QUESTION])]
        return whole, "".join(pieces), (await text.acomplete(PROMPT)).text

    return asyncio.run(ask())


@feature
def chat_with_logprobs() -> str:
    asked = OpenAILike(**SHORT, is_chat_model=True, logprobs=True, top_logprobs=2)
    return asked.chat([QUESTION]).logprobs[0][0].token


@feature
def seed_and_extra_body() -> str:
    extra = {"seed": 3, "extra_body": {"top_k": 5}}
    asked = OpenAILike(**SHORT, is_chat_model=True, additional_kwargs=extra)
    return asked.chat([QUESTION]).message.content


@feature
def defaults() -> bool:
    return bool(OpenAILike(**DEFAULT, is_chat_model=True).chat([QUESTION]).message.content)


@feature
def tools() -> None:
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    asked = OpenAILike(**SHORT, is_chat_model=True, is_function_calling_model=True)
    asked.chat_with_tools([FunctionTool.from_defaults(add)], user_msg="add 1 and 2")


@feature
def structured_output() -> None:
    asked = OpenAILike(**SHORT, is_chat_model=True, should_use_structured_outputs=True)
    asked.as_structured_llm(Answer).chat([QUESTION])


@feature
def wrong_key() -> None:
    OpenAILike(**{**SHORT, "api_key": "wrong"}, is_chat_model=True).chat([QUESTION])


@feature
def unknown_model() -> None:
    OpenAILike(**{**SHORT, "model": "another"}, is_chat_model=True).chat([QUESTION])


write(output)

"""Use the service through `langchain-openai`, and write down what each feature did.

python run_langchain.py BASE_URL MODEL KEY_FILE OUTPUT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from recording import feature, write

base, model, key_file, output = sys.argv[1:]
DEFAULT: Any = {"base_url": base, "api_key": Path(key_file).read_text(), "model": model}
SHORT: Any = {**DEFAULT, "max_tokens": 12, "temperature": 0, "max_retries": 0}
QUESTION = "What does json.dumps do?"
PROMPT = "json.dumps("
chat, text = ChatOpenAI(**SHORT), OpenAI(**SHORT)


class Answer(BaseModel):
    """An answer."""

    words: str


@feature
def defaults() -> bool:
    """As a user begins: a model, a key and an address. The answer is drawn and so is its length."""
    return bool(ChatOpenAI(**DEFAULT).invoke(QUESTION).response_metadata["finish_reason"])


@feature
def invoke() -> str:
    return chat.invoke(QUESTION).content


@feature
def history() -> str:
    question = HumanMessage(QUESTION)
    return chat.invoke([question, chat.invoke([question]), question]).content


@feature
def system_and_named_messages() -> str:
    messages = [SystemMessage("Be brief."), HumanMessage("hi", name="bob"), AIMessage("hello")]
    return chat.invoke([*messages, HumanMessage(QUESTION)]).content


@feature
def stream() -> str:
    return "".join(chunk.content for chunk in chat.stream(QUESTION))


@feature
def stream_usage() -> Any:
    chunks = list(ChatOpenAI(**SHORT, stream_usage=True).stream(QUESTION))
    return [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]


@feature
def astream() -> str:
    async def ask() -> str:
        return "".join([chunk.content async for chunk in chat.astream(QUESTION)])

    return asyncio.run(ask())


@feature
def batch() -> list[str]:
    return [message.content for message in chat.batch([QUESTION] * 3)]


@feature
def logprobs() -> str:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    return answer.response_metadata["logprobs"]["content"][0]["token"]


@feature
def stop() -> str:
    return chat.invoke(QUESTION, stop=["zz"]).content


@feature
def two_choices() -> int:
    drawn = ChatOpenAI(**{**SHORT, "temperature": 1}, n=2, seed=1)
    return len(drawn.generate([[HumanMessage(QUESTION)]]).generations[0])


@feature
def text_invoke() -> str:
    return text.invoke(PROMPT)


@feature
def text_stream() -> str:
    return "".join(text.stream(PROMPT))


@feature
def text_batch() -> list[str]:
    """One request with several prompts."""
    return [rows[0].text for rows in text.generate([PROMPT, PROMPT]).generations]


@feature
def text_defaults() -> bool:
    """With the fields that it sends unasked: top_p, n and penalties of 0."""
    return isinstance(OpenAI(**DEFAULT).invoke(PROMPT), str)


@feature
def bind_tools() -> None:
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    chat.bind_tools([add]).invoke(QUESTION)


@feature
def structured_output() -> None:
    chat.with_structured_output(Answer).invoke(QUESTION)


@feature
def structured_output_by_tools() -> None:
    chat.with_structured_output(Answer, method="function_calling").invoke(QUESTION)


@feature
def json_mode() -> None:
    chat.with_structured_output(Answer, method="json_mode").invoke(QUESTION)


@feature
def responses_api() -> None:
    ChatOpenAI(**SHORT, use_responses_api=True).invoke(QUESTION)


@feature
def embeddings() -> None:
    asked = {**DEFAULT, "check_embedding_ctx_length": False, "max_retries": 0}
    OpenAIEmbeddings(**asked).embed_query("a")


@feature
def wrong_key() -> None:
    ChatOpenAI(**{**SHORT, "api_key": "wrong"}).invoke(QUESTION)


@feature
def unknown_model() -> None:
    ChatOpenAI(**{**SHORT, "model": "another"}).invoke(QUESTION)


write(output)

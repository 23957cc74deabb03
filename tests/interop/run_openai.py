"""Use the service through `openai` for Python, and write down what each feature did.

    python run_openai.py BASE_URL MODEL KEY_FILE OUTPUT

Runs in an environment of its own, with the oldest and with the newest release: what the oldest has
no name for goes into `extra_body`.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from recording import feature, write

base, model, key_file, output = sys.argv[1:]
key = Path(key_file).read_text()
client = OpenAI(base_url=base, api_key=key, max_retries=0)
QUESTION: Any = {"role": "user", "content": "What does json.dumps do?"}
SHORT: Any = {"model": model, "max_tokens": 12, "temperature": 0}


def chat(messages: Any = (QUESTION,), **fields: Any) -> Any:
    """`fields` replace those of SHORT; `extra` are those that old releases do not know."""
    given = {**SHORT, **fields}
    extra = given.pop("extra", None)
    return client.chat.completions.create(messages=list(messages), extra_body=extra, **given)


def said(answer: Any) -> str:
    return answer.choices[0].message.content


@feature
def models() -> Any:
    return [model.id for model in client.models.list()], client.models.retrieve(model).id


@feature
def chat_completion() -> str:
    return said(chat())


@feature
def history() -> str:
    answer = chat().choices[0].message
    return said(chat([QUESTION, answer, QUESTION]))


@feature
def history_as_dict() -> str:
    dump = chat().choices[0].message.model_dump()
    return said(chat([QUESTION, dump, QUESTION]))


@feature
def three_turns() -> int:
    messages: list[Any] = []
    for _ in range(3):
        messages.append(QUESTION)
        messages.append(chat(messages).choices[0].message)
    return len(messages)


@feature
def system_and_developer() -> list[str]:
    text = "Answer in one line."
    roles = ("system", "developer")
    return [said(chat([{"role": role, "content": text}, QUESTION])) for role in roles]


@feature
def text_parts() -> str:
    return said(chat([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]))


@feature
def stream() -> str:
    chunks = list(chat(stream=True))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@feature
def stream_usage() -> Any:
    chunks = list(chat(stream=True, extra={"stream_options": {"include_usage": True}}))
    usage = chunks[-1].usage if hasattr(chunks[-1], "usage") else chunks[-1].model_extra["usage"]
    usage = usage if isinstance(usage, dict) else usage.model_dump()
    return [usage["prompt_tokens"], usage["completion_tokens"], len(chunks[-1].choices)]


@feature
def two_choices() -> Any:
    drawn = [chat(n=2, temperature=1.0, extra={"seed": 7}) for _ in range(2)]
    return [[choice.message.content for choice in answer.choices] for answer in drawn]


@feature
def stop() -> Any:
    choice = chat(stop=[" of"]).choices[0]
    return choice.message.content, choice.finish_reason


@feature
def logprobs() -> Any:
    answer = chat(extra={"logprobs": True, "top_logprobs": 2})
    return answer.model_dump()["choices"][0]["logprobs"]["content"]


@feature
def max_completion_tokens() -> int:
    answer = client.chat.completions.create(
        messages=[QUESTION], model=model, extra_body={"max_completion_tokens": 3}
    )
    return answer.usage.completion_tokens


@feature
def labels() -> str:
    labels = {"metadata": {"team": "a"}, "store": False, "service_tier": "auto"}
    labels |= {"safety_identifier": "u", "prompt_cache_key": "k"}
    return said(chat(user="u", extra=labels))


@feature
def neutral_values() -> str:
    neutral = {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "skip_special_tokens": True}
    neutral |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    neutral |= {"chat_template_kwargs": {}, "ignore_eos": None, "parallel_tool_calls": True}
    return said(chat(presence_penalty=0, frequency_penalty=0, logit_bias={}, extra=neutral))


@feature
def completion() -> str:
    return client.completions.create(prompt="json.dumps(", **SHORT).choices[0].text


@feature
def completion_stream() -> str:
    chunks = client.completions.create(prompt="json.dumps(", stream=True, **SHORT)
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


@feature
def completion_of_token_ids() -> Any:
    prompts: Any = [[5, 6, 7], [8, 9]]
    answer = client.completions.create(prompt=prompts, **SHORT)
    return len(answer.choices), answer.usage.prompt_tokens


@feature
def completion_echo() -> Any:
    scored = {**SHORT, "max_tokens": 0, "echo": True, "logprobs": 2}
    choice = client.completions.create(prompt="json.dumps(", **scored).choices[0]
    return choice.text, choice.logprobs.model_dump()


@feature
def raw_response() -> Any:
    raw = client.chat.completions.with_raw_response.create(messages=[QUESTION], **SHORT)
    return bool(raw.headers.get("x-request-id")), said(raw.parse())


@feature
def crowd() -> Any:
    async def ask() -> Any:
        async with AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as many:
            answers = [many.chat.completions.create(messages=[QUESTION], **SHORT) for _ in range(8)]
            return sorted({said(answer) for answer in await asyncio.gather(*answers)})

    return asyncio.run(ask())


@feature
def cancellation() -> Any:
    """A stream that is left and a request that is cancelled; then the service answers as before."""

    async def ask() -> Any:
        endless: Any = {**SHORT, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        async with AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as many:
            chunks = await many.chat.completions.create(messages=[QUESTION], stream=True, **endless)
            read = 0
            async for _ in chunks:
                read += 1
                if read == 3:
                    await chunks.response.aclose()
                    break
            task = asyncio.create_task(many.chat.completions.create(messages=[QUESTION], **endless))
            await asyncio.sleep(0.3)
            task.cancel()
            cancelled = (await asyncio.gather(task, return_exceptions=True))[0]
            answer = await many.chat.completions.create(messages=[QUESTION], **SHORT)
            return read, type(cancelled).__name__, said(answer)

    return asyncio.run(ask())


@feature
def timeout() -> None:
    impatient = client.with_options(timeout=0.05)
    extra = {"ignore_eos": True}
    fields = {**SHORT, "max_tokens": 1000}
    impatient.chat.completions.create(messages=[QUESTION], extra_body=extra, **fields)


def ask_at_once(retries: int, number: int = 40) -> list[str]:
    patient = client.with_options(max_retries=retries)

    def ask(_: int) -> str:
        try:
            fields = {**SHORT, "max_tokens": 48}
            patient.completions.create(prompt="a", extra_body={"ignore_eos": True}, **fields)
        except openai.APIStatusError as error:
            return type(error).__name__
        return "answered"

    with ThreadPoolExecutor(number) as threads:
        return sorted(set(threads.map(ask, range(number))))


@feature
def overload() -> list[str]:
    return ask_at_once(retries=0)


@feature
def overload_with_retries() -> list[str]:
    return ask_at_once(retries=20)


@feature
def wrong_key() -> None:
    OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()


@feature
def unknown_model() -> None:
    chat(model="another")


@feature
def prompt_too_long() -> None:
    client.completions.create(prompt="word " * 20_000, **SHORT)


@feature
def value_out_of_range() -> None:
    chat(temperature=3)


@feature
def tools() -> None:
    chat(extra={"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]})


@feature
def json_schema() -> None:
    named = {"name": "x", "schema": {"type": "object"}}
    chat(extra={"response_format": {"type": "json_schema", "json_schema": named}})


@feature
def presence_penalty() -> None:
    chat(presence_penalty=0.5)


@feature
def embeddings() -> None:
    client.embeddings.create(model=model, input="a")


if hasattr(client, "responses"):

    @feature
    def responses() -> None:
        client.responses.create(model=model, input="a")

    @feature
    def stream_helper() -> Any:
        with client.chat.completions.stream(messages=[QUESTION], **SHORT) as events:
            kinds = {event.type for event in events}
            return sorted(kinds), said(events.get_final_completion())

    @feature
    def parse_helper() -> None:
        from pydantic import BaseModel

        class Answer(BaseModel):
            text: str

        client.chat.completions.parse(messages=[QUESTION], response_format=Answer, **SHORT)


write(output)

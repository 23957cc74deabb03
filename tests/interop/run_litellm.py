"""Use the service through `litellm`, and write down what each feature did.

python run_litellm.py BASE_URL MODEL KEY_FILE OUTPUT
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches the map when it is imported
import litellm
from recording import feature, write

base, model, key_file, output = sys.argv[1:]
QUESTION = {"role": "user", "content": "What does json.dumps do?"}
COMMON: Any = {
    "model": f"openai/{model}",
    "api_base": base,
    "api_key": Path(key_file).read_text(),
    "max_tokens": 12,
    "temperature": 0,
    "num_retries": 0,
}
TEXT = COMMON | {"model": f"text-completion-openai/{model}", "prompt": "json.dumps("}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
litellm.suppress_debug_info = True


def chat(*, messages: Any = (QUESTION,), **fields: Any) -> Any:
    return litellm.completion(messages=list(messages), **COMMON | fields)


def said(answer: Any) -> str:
    return answer.choices[0].message.content


@feature
def completion() -> str:
    return said(chat())


@feature
def history() -> str:
    return said(chat(messages=[QUESTION, chat().choices[0].message, QUESTION]))


@feature
def stream() -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True))


@feature
def stream_usage() -> Any:
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    usage = chunks[-1].usage
    return usage.prompt_tokens, usage.completion_tokens


@feature
def text_completion() -> str:
    return litellm.text_completion(**TEXT).choices[0].text


@feature
def text_completion_stream() -> str:
    chunks = litellm.text_completion(stream=True, **TEXT)
    return "".join(chunk.choices[0].text or "" for chunk in chunks)


@feature
def text_completion_echo() -> Any:
    choice = litellm.text_completion(echo=True, logprobs=1, **TEXT).choices[0]
    return choice.text, len(choice.logprobs.token_logprobs)


@feature
def acompletion() -> Any:
    async def ask() -> Any:
        answers = [litellm.acompletion(messages=[QUESTION], **COMMON) for _ in range(4)]
        texts = {said(answer) for answer in await asyncio.gather(*answers)}
        chunks = await litellm.acompletion(messages=[QUESTION], stream=True, **COMMON)
        return sorted(texts), "".join([c.choices[0].delta.content or "" async for c in chunks])

    return asyncio.run(ask())


@feature
def hosted_vllm_provider() -> str:
    return said(chat(model=f"hosted_vllm/{model}"))


@feature
def two_choices_with_stop_and_seed() -> int:
    return len(chat(n=2, stop=["zz"], seed=3, temperature=1).choices)


@feature
def logprobs() -> str:
    return chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content[0].token


@feature
def labels() -> str:
    return said(chat(user="u", metadata={"team": "a"}))


@feature
def additional_drop_params() -> str:
    return said(chat(presence_penalty=0.5, additional_drop_params=["presence_penalty"]))


@feature
def router() -> str:
    parameters = {key: COMMON[key] for key in ("model", "api_base", "api_key")}
    entry = {"model_name": "ours", "litellm_params": parameters}
    asked = {"model": "ours", "messages": [QUESTION], "max_tokens": 12, "temperature": 0}
    return said(litellm.Router(model_list=[entry]).completion(**asked))


@feature
def retries() -> Any:
    """Forty at once, of which some are told to come back: litellm does."""

    async def ask() -> Any:
        many = COMMON | {"num_retries": 20, "max_retries": 20}
        answers = [litellm.acompletion(messages=[QUESTION], **many) for _ in range(40)]
        return sorted({said(answer) for answer in await asyncio.gather(*answers)})

    return asyncio.run(ask())


@feature
def timeout() -> None:
    chat(timeout=0.05, max_tokens=1000, extra_body={"ignore_eos": True})


@feature
def tools() -> None:
    chat(tools=TOOLS)


@feature
def drop_params_keeps_tools() -> None:
    chat(tools=TOOLS, drop_params=True)


@feature
def presence_penalty() -> None:
    chat(presence_penalty=0.5)


@feature
def json_object() -> None:
    chat(response_format={"type": "json_object"})


@feature
def wrong_key() -> None:
    chat(api_key="wrong")


@feature
def unknown_model() -> None:
    chat(model="openai/another")


@feature
def prompt_too_long() -> None:
    chat(messages=[{"role": "user", "content": "word " * 20_000}])


@feature
def embedding() -> None:
    key = COMMON["api_key"]
    litellm.embedding(model=COMMON["model"], api_base=base, api_key=key, input=["a"])


@feature
def responses() -> None:
    key = COMMON["api_key"]
    litellm.responses(model=COMMON["model"], api_base=base, api_key=key, input="a")


write(output)

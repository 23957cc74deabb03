"""`POST /tokenize` and `POST /detokenize`, as vLLM has them: text or messages to ids, and back.

routes.py mounts them. They need the key, and their bodies are read as strictly, and bounded by the
same limits, as those of the other endpoints. No engine is asked for anything but its context.
"""

from __future__ import annotations

import functools
import sys
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from serve_app.openai.explain import explain, wrong_value
from serve_app.openai.json_body import read_json_object
from serve_app.openai.json_text import dumps
from serve_app.openai.messages import Message, read_messages
from serve_app.openai.neutral import Table, drop_neutral, neutral
from serve_app.openai.prompts import PromptEncoder
from serve_app.openai.requests import are_token_ids
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import Tokenizer
from serve_app.routing.checks import ContextLimit, check_model, check_token_ids
from serve_app.routing.tenants import Tenant

#: vLLM's further fields, with the values at which they ask for nothing.
_TEXT: Table = {}
_CHAT: Table = {
    "continue_final_message": neutral(False),
    "chat_template": neutral(),
    "chat_template_kwargs": neutral({}),
    "media_io_kwargs": neutral({}),
    "mm_processor_kwargs": neutral({}),
    "tools": neutral([]),
}


#: Texts are counted here, whatever the context is; the encoder bounds what is encoded at a time.
_UNLIMITED = ContextLimit(sys.maxsize, "")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    #: None or empty: the model that is served.
    model: str | None = None


class TokenizeText(_Body):
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False

    async def encode(self, encoder: PromptEncoder, deadline: float) -> list[int]:
        [ids] = await encoder.encode(
            [self.prompt], _UNLIMITED, deadline, special_tokens=self.add_special_tokens
        )
        return ids


class TokenizeChat(_Body):
    messages: Annotated[tuple[Message, ...], PlainValidator(read_messages)]
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    async def encode(self, encoder: PromptEncoder, deadline: float) -> list[int]:
        return await encoder.encode_chat(
            [{"role": m.template_role, "content": m.text} for m in self.messages],
            _UNLIMITED,
            deadline,
            special_tokens=self.add_special_tokens,
            add_generation_prompt=self.add_generation_prompt,
        )


def _read_tokens(value: Any) -> list[int]:
    if not isinstance(value, list) or not are_token_ids(value):
        raise wrong_value("tokens", "must be a list of token ids")
    return value


class Detokenize(_Body):
    tokens: Annotated[list[int], PlainValidator(_read_tokens)]


Body = TypeVar("Body", bound=_Body)


def add_tokenizing(app: FastAPI, service: Service) -> None:
    """Mount both endpoints on the application."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body, deadline, tenant = await service.read_plain(request, parse_tokenize)
        _check_model(body, service, tenant)
        context = (await service.pools()).largest.tokens
        ids = await body.encode(service.encoder, deadline)
        work = functools.partial(_tokenized, ids, context, body, service.tokenizer)
        return _json(await service.encoder.run(work, len(ids), deadline))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body, deadline, tenant = await service.read_plain(request, parse_detokenize)
        _check_model(body, service, tenant)
        check_token_ids(body.tokens, service.tokenizer.vocab_size, "tokens")
        work = functools.partial(_detokenize, body, service.tokenizer)
        return _json(await service.encoder.run(work, len(body.tokens), deadline))


def parse_tokenize(raw: bytes) -> TokenizeText | TokenizeChat:
    """The body of `/tokenize`, which has either a prompt or messages.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong, unsupported or unknown; named.
    """
    given = read_json_object(raw)
    if given.get("messages") is None:
        return _validate(TokenizeText, given, _TEXT)
    return _validate(TokenizeChat, given, _CHAT)


def parse_detokenize(raw: bytes) -> Detokenize:
    """The body of `/detokenize`; raises as `parse_tokenize` does."""
    return _validate(Detokenize, read_json_object(raw), _TEXT)


def _check_model(body: _Body, service: Service, tenant: Tenant) -> None:
    served = service.config.served_name
    check_model(body.model or served, served, tenant)


def _validate(model: type[Body], given: dict[str, Any], table: Table) -> Body:
    try:
        return model.model_validate(drop_neutral(given, model.model_fields, table))
    except ValidationError as error:
        raise explain(error.errors(include_url=False, include_context=False)[0]) from None


def _tokenized(
    ids: list[int], context: int, body: TokenizeText | TokenizeChat, tokenizer: Tokenizer
) -> bytes:
    strings = tokenizer.pieces(ids) if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": strings}
    return dumps(answer).encode()


def _detokenize(body: Detokenize, tokenizer: Tokenizer) -> bytes:
    return dumps({"prompt": tokenizer.decode(body.tokens)}).encode()


def _json(text: bytes) -> Response:
    return Response(text, media_type="application/json")

"""What is wrong with a configuration, in one sentence that names the key's path and what to change.

pydantic finds the mistake; here it gets the words. No sentence shows a value, which may be an API
key.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

#: Keys of the flat files of earlier versions -> where they are now.
MOVED = {
    "engine": "pools.default.engine.directory",
    "echo": "pools.default.engine, with kind: echo",
    "host": "http.host",
    "port": "http.port",
    "ingress_replicas": "ingress.replicas",
    "ingress_cpus": "ingress.cpus",
    "engine_replicas": "pools.default.replicas",
    "engine_cpus": "pools.default.cpus",
    "engine_surge_percent": "pools.default.surge_percent",
    "max_ongoing_requests": "pools.default.max_ongoing_requests",
    "replica_limits": "pools.default.replica_limits",
    "health_check_period_s": "pools.default.health_check_period_s",
    "health_check_timeout_s": "pools.default.health_check_timeout_s",
    "max_step_s": "pools.default.max_step_s",
    "graceful_shutdown_s": "shutdown_s",
    "max_queued_requests": "admission.max_queued_requests",
    "max_body_bytes": "http.max_body_bytes",
    "body_timeout_s": "http.body_timeout_s",
    "max_open_bodies": "http.max_open_bodies",
    "max_open_body_bytes": "http.max_open_body_bytes",
    "details_access": "http.details_access",
    "allowed_origins": "http.allowed_origins",
    "default_max_tokens": "requests.default_max_tokens",
    "max_prompt_logprobs": "requests.max_prompt_logprobs",
    "request_timeout_s": "requests.timeout_s",
    "api_keys": "keys.inline",
    "api_keys_file": "keys.file",
    "otlp_headers_file": "telemetry.otlp_headers_file",
    "allow_ungated": "pools.default.gate.allow_ungated",
    "require_signature": "pools.default.gate.require_signature",
    "max_model_len": "pools.default.engine.max_model_len",
    "kv_tokens": "pools.default.engine.kv_tokens",
    "kv_cache": "pools.default.engine.kv_cache",
    "max_batch_size": "pools.default.engine.max_batch_size",
    "max_batched_tokens": "pools.default.engine.max_batched_tokens",
    "num_threads": "pools.default.engine.num_threads",
}

_MISSING = {
    "pools": "name an engine: --engine DIR, --echo, or pools.default.engine in a file",
    "engine": "is missing; add {kind: embedded, directory: DIR} or {kind: echo}",
    "directory": "is missing; name the engine directory that `build` made",
    "python": "is missing; name the Python of the engine's environment, which `make engine-env` "
    "makes",
}


#: What pydantic says of these in its own words, which speak of Python.
_WORDS = {
    "tuple_type": "must be a list",
    "string_type": "must be text; put it in quotes",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "path_type": "must be a path",
}


def first_mistake(error: ValidationError, model: type[BaseModel], given: Any) -> str:
    """One sentence about the first thing that pydantic found wrong with `given`, whose form is
    `model`."""
    first = error.errors(include_input=False, include_url=False)[0]
    path, kind = _path(first["loc"]), first["type"]
    place = ".".join(path)
    if kind == "extra_forbidden" and path[0] == "keys":  # it may be an API key in the wrong place
        return "keys: holds something that is none of inline, file, variable; correct it"
    if place == "pools" and not _value_at(path, given):
        return _MISSING["pools"]
    if kind == "extra_forbidden" and path[:-1] == ["keys"]:  # it may be an API key itself
        return "keys holds an unknown key; its keys are inline, file and variable"
    if kind == "extra_forbidden":
        return f"unknown key {place!r}; {_remedy(path, model, given)}"
    if kind == "missing":
        return f"{place}: {_MISSING.get(path[-1], 'is missing; add it')}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        if _value_at(path, given) is None:
            return f"{place}: holds nothing; remove it, or write its keys below it"
        return f"{place}: must be a mapping of keys to values"
    message = _WORDS.get(kind) or first["msg"].removeprefix("Value error, ")
    if path and path[-1] == "[key]" and "labels" in path[:-2]:
        place = ".".join(path[:-1])
        message = "is no name of a label of nodes; write one as in `ray start --labels=NAME=VALUE`"
    elif path[-2:-1] == ["labels"] and kind == "string_pattern_mismatch":
        message = "is no value of a label of nodes; write letters, digits, '-', '_' and '.'"
    elif path and path[-1] == "[key]":
        place = ".".join(path[:-1])
        message = "is no name; use lower-case letters, digits and hyphens, at most 40"
    return f"{place}: {message}" if place else message


def _path(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that lead to a place in the file; pydantic puts an engine's kind between them."""
    if len(loc) > 3 and (loc[0], loc[2]) == ("pools", "engine"):
        loc = (*loc[:3], *loc[4:])
    # The members of a union, which pydantic tries one after another, are no keys.
    return [str(part) for part in loc if not str(part).startswith(("function-", "literal["))]


def _remedy(path: list[str], model: type[BaseModel], given: Any) -> str:
    """What to do about an unknown key: the place of one of that name, or a similar one beside."""
    *section, name = path
    if "." in name:
        return "keys are nested, not joined by dots; write each on a level of its own"
    places = list(_paths(model, given))
    elsewhere = [place for place in places if place[-1] == name]
    if len(elsewhere) == 1:
        return f"it is {'.'.join(elsewhere[0])}"
    beside = [place[-1] for place in places if list(place[:-1]) == section]
    close = difflib.get_close_matches(name, beside, n=1)
    if close:
        return f"did you mean {'.'.join([*section, close[0]])}?"
    return "remove or correct it"


def _paths(
    model: type[BaseModel], given: Any, above: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The path of every key that the model has; where it has names of the user's, as in `given`."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        yield path
        value = given.get(name) if isinstance(given, dict) else None
        if get_origin(field.annotation) is dict:
            inner = get_args(field.annotation)[1]
            if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
                continue
            for key, of_key in (value if isinstance(value, dict) else {"default": {}}).items():
                yield from _paths(inner, of_key, (*path, str(key)))
            continue
        inners = list(_models(field.annotation))
        if len(inners) > 1 and isinstance(value, dict):  # an engine: those of its kind only
            inners = [m for m in inners if _kind(m) == value.get("kind")]
        for inner in inners:
            yield from _paths(inner, value, path)


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        for part in get_args(annotation):
            yield from _models(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _value_at(path: list[str], given: Any) -> Any:
    for key in path:
        given = given.get(key) if isinstance(given, dict) else None
    return given

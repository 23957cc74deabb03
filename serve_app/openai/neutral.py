"""Fields that this server knows and does not implement: the values at which they ask for nothing.

Clients send many fields at their defaults, and feed answers back with all of their nulls. A field
at its neutral value asks for nothing, at any depth, so it is dropped; a label only names something,
so it is dropped too, whatever it says. Any other value would be a promise that is not kept: it is
refused by name. A field in no table is refused as a likely typo.

The tables below are the whole of it, one for each kind of JSON object; `null` is neutral for all of
their fields and is not repeated. requests.py and messages.py call `drop_neutral`. docs/openai.md
lists the tables for users, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.limits import MAX_LABEL
from serve_app.openai.explain import join_place, unknown_field, unsupported_field


@dataclass(frozen=True)
class Neutral:
    """A field that asks for nothing at one of `values`, or where `when(value, object)` holds, which
    `words` describes."""

    values: tuple[Any, ...] = ()
    when: Callable[[Any, Mapping[str, Any]], bool] | None = None
    words: str = ""

    def holds(self, value: Any, holder: Mapping[str, Any]) -> bool:
        if value is None or any(_same(value, neutral) for neutral in self.values):
            return True
        return self.when is not None and self.when(value, holder)


@dataclass(frozen=True)
class Label:
    """A field that only names or hints something; `kinds` are the types that it may have."""

    kinds: tuple[type, ...] = (str,)
    may_be_empty: bool = True


Table = Mapping[str, Neutral | Label]


def neutral(*values: Any) -> Neutral:
    return Neutral(values)


def _all_zero(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(_same(bias, 0) for bias in value.values())


def _is_n(value: Any, body: Mapping[str, Any]) -> bool:
    n = body.get("n")
    return _same(value, 1 if n is None else n)


def _cannot_stop_early(value: Any, body: Mapping[str, Any]) -> bool:
    """A least length asks for nothing where only the greatest length ends the text."""
    if type(value) is not int or body.get("ignore_eos") is not True:
        return False
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    stops = body.get("stop") or body.get("stop_token_ids")
    return type(limit) is int and 0 <= value <= limit and not stops


def _no_thinking(value: Any, _: Mapping[str, Any]) -> bool:
    """What a template does by itself: no thinking, and a prompt for the assistant's turn."""
    defaults = {"thinking": False, "enable_thinking": False, "add_generation_prompt": True}
    return isinstance(value, dict) and all(
        name in defaults and (given is None or given is defaults[name])
        for name, given in value.items()
    )


_NOTHING = neutral()
_NO = neutral(False)
_YES = neutral(True)
_EITHER = neutral(False, True)
_EMPTY = neutral({})
_NONE_OF = neutral([])
_ANY_SIDE = neutral("left", "right")

#: Body fields of OpenAI's API.
_OPENAI: dict[str, Neutral | Label] = {
    "audio": _NOTHING,
    "best_of": Neutral(when=_is_n, words="the value of `n`"),
    "frequency_penalty": neutral(0),
    "function_call": neutral("none", "auto"),
    "functions": _NONE_OF,
    "logit_bias": Neutral(when=_all_zero, words="no bias but 0"),
    "metadata": Label((dict,)),
    "modalities": neutral(["text"]),
    "moderation": _NOTHING,
    "parallel_tool_calls": _EITHER,
    "prediction": _NOTHING,
    "presence_penalty": neutral(0),
    "prompt_cache_key": Label(),
    "prompt_cache_options": Label((dict,)),
    "prompt_cache_retention": Label(),
    "reasoning_effort": neutral("none"),
    "response_format": neutral({"type": "text"}),
    "safety_identifier": Label(),
    "service_tier": neutral("auto", "default"),
    "store": _NO,
    "suffix": neutral(""),
    "tool_choice": neutral("none", "auto"),
    "tools": _NONE_OF,
    "user": Label(),
    "verbosity": neutral("medium"),
    "web_search_options": _NOTHING,
}

#: vLLM's, of today and of the versions that clients still write for.
_VLLM: dict[str, Neutral | Label] = {
    "add_generation_prompt": _YES,
    "allowed_token_ids": _NOTHING,
    "bad_words": _NONE_OF,
    "chat_template": _NOTHING,
    "chat_template_kwargs": Neutral(
        when=_no_thinking,
        words="an object of `thinking: false`, `enable_thinking: false`, "
        "`add_generation_prompt: true` or none of them",
    ),
    "continue_final_message": _NO,
    "detokenize": _YES,
    "documents": _NONE_OF,
    "early_stopping": _NO,
    "ec_transfer_params": _EMPTY,
    "guided_choice": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": _NOTHING,
    "guided_json_object": _NO,
    "guided_regex": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "include_reasoning": _EITHER,
    "include_stop_str_in_output": _NO,
    "kv_transfer_params": _EMPTY,
    "length_penalty": neutral(1),
    "logits_processors": _NONE_OF,
    "logprob_token_ids": _NOTHING,
    "media_io_kwargs": _EMPTY,
    "min_p": neutral(0),
    "min_tokens": Neutral(
        (0,),
        _cannot_stop_early,
        "up to `max_tokens`, with `ignore_eos: true` and nothing to stop at",
    ),
    "mm_payload": _NOTHING,
    "mm_processor_kwargs": _EMPTY,
    "priority": neutral(0),
    "prompt_embeds": _NONE_OF,
    "repetition_detection": _NOTHING,
    "repetition_penalty": neutral(1),
    "request_id": Label(),
    "return_mm_kwargs": _EITHER,
    "return_prompt_text": _NO,
    "return_token_ids": _NO,
    "return_token_offsets": _NO,
    "routed_experts_prompt_start": neutral(0),
    "session_id": Label(),
    "skip_special_tokens": _YES,
    "spaces_between_special_tokens": _EITHER,
    "stream_interval": neutral(1),
    "structural_tag": _NOTHING,
    "structured_outputs": _EMPTY,
    "thinking_token_budget": neutral(-1),
    "truncate_prompt_tokens": _NOTHING,
    "truncation_side": _ANY_SIDE,
    "use_beam_search": _NO,
    "vllm_xargs": _EMPTY,
    "watermarking": _NO,
}

#: SGLang's, TGI's, llama.cpp's, OpenRouter's, DeepSeek's own, and what proxies add.
_OTHERS: dict[str, Neutral | Label] = {
    "bootstrap_host": _NOTHING,
    "bootstrap_port": _NOTHING,
    "bootstrap_room": _NOTHING,
    "cache_prompt": _EITHER,
    "custom_labels": Label((dict,)),
    "custom_logit_processor": _NOTHING,
    "custom_params": _EMPTY,
    "data_parallel_rank": _NOTHING,
    "disagg_prefill_dp_rank": _NOTHING,
    "dynatemp_range": neutral(0),
    "ebnf": _NOTHING,
    "enable_thinking": _NO,
    "extra_body": _EMPTY,
    "extra_key": Label(),
    "grammar": neutral(""),
    "guideline": _NOTHING,
    "images_config": _EMPTY,
    "input_ids": _NOTHING,
    "json_schema": _NOTHING,
    "keep_alive": _NOTHING,
    "lora_path": _NOTHING,
    "min_keep": neutral(0),
    "mirostat": neutral(0),
    "models": _NONE_OF,
    "no_stop_trim": _NO,
    "ngram_corpus_id": _NOTHING,
    "plugins": _NONE_OF,
    "provider": _EMPTY,
    "reasoning": neutral({}, {"effort": "none"}, {"enabled": False}),
    "regex": _NOTHING,
    "return_cached_tokens_details": _NO,
    "return_hidden_states": _NO,
    "return_meta_info": _NO,
    "return_prompt_token_ids": _NO,
    "return_routed_experts": _NO,
    "rid": Label(),
    "route": _NOTHING,
    "routed_dp_rank": _NOTHING,
    "routed_experts_start_len": neutral(0),
    "safe_prompt": _NO,
    "separate_reasoning": _EITHER,
    "session_params": _EMPTY,
    "stop_regex": neutral([]),
    "stream_reasoning": _EITHER,
    "task": _NOTHING,
    "tfs_z": neutral(1),
    "think": _NO,
    "thinking": neutral(False, {"type": "disabled"}),
    "tool_prompt": _NOTHING,
    "top_a": neutral(0),
    "transforms": _NONE_OF,
    "typical_p": neutral(1),
    "use_audio_in_video": _NO,
}

BODY: dict[str, Neutral | Label] = _OPENAI | _VLLM | _OTHERS

#: Refused before the fields that say how to use them: a client that removed `tool_choice` alone
#: would be refused again.
_FIRST = ("tools", "functions")

#: All options that clients know are implemented.
STREAM_OPTIONS: dict[str, Neutral | Label] = {}

#: Fields of a message, of whichever role.
MESSAGE: dict[str, Neutral | Label] = {
    "annotations": _NONE_OF,
    "audio": _NOTHING,
    "cache_control": Label((dict,)),
    "citations": _NONE_OF,
    "function_call": _NOTHING,
    "hidden_states": _NOTHING,
    "id": Label(),
    "images": _NONE_OF,
    "name": Label(),
    "parsed": _NOTHING,
    "partial": _NO,
    "prefix": _NO,
    "provider_specific_fields": _EMPTY,
    "reasoning": neutral(""),
    "reasoning_content": neutral(""),
    "reasoning_details": _NONE_OF,
    "reasoning_items": _NONE_OF,
    "thinking_blocks": _NONE_OF,
    "tool_call_id": _NOTHING,
    "tool_calls": _NONE_OF,
    "tools": _NONE_OF,
    "type": neutral("text", "message"),
}

#: Fields of a part of a message's content.
PART: dict[str, Neutral | Label] = {
    "annotations": _NONE_OF,
    "cache_control": Label((dict,)),
    "id": Label(),
    "logprobs": _NONE_OF,
    "prompt_cache_breakpoint": Label((dict,)),
}


def drop_neutral(
    given: Mapping[str, Any], known: Collection[str], table: Table, place: str = ""
) -> dict[str, Any]:
    """The fields of `given` that are implemented (`known`) and not null. `place` is where the
    object is in the body.

    Raises:
        InvalidRequest: another field asks for something, is a label of a wrong kind or too long, or
            is in no table.
    """
    kept: dict[str, Any] = {}
    for name in (*(name for name in _FIRST if name in given), *given):
        value = given[name]
        if name in known:
            if value is not None:
                kept[name] = value
            continue
        rule = table.get(name)
        if rule is None:
            raise unknown_field(name, place, known, table)
        if isinstance(rule, Label):
            if value is not None:
                _check_label(value, rule, join_place(place, name))
        elif not rule.holds(value, given):
            raise unsupported_field(join_place(place, name))
    return kept


def _check_label(value: Any, label: Label, place: str) -> None:
    if type(value) not in label.kinds:
        kind = "an object" if dict in label.kinds else "a string"
        raise InvalidRequest(f"field '{place}' must be {kind}", param=place)
    if not (value or label.may_be_empty):
        raise InvalidRequest(f"field '{place}' must not be empty; remove it", param=place)
    size, values = 0, [value]
    while values:
        item = values.pop()
        size += len(item) if isinstance(item, str | list | dict) else 1
        if size > MAX_LABEL:
            raise InvalidRequest(
                f"field '{place}' has more than {MAX_LABEL} characters; shorten it", param=place
            )
        if isinstance(item, dict):
            values += item.keys()
            values += item.values()
        elif isinstance(item, list):
            values += item


def _same(value: Any, expected: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 and not true, and a null field of an object is no field."""
    if isinstance(value, dict) and isinstance(expected, dict):
        fields = {name: item for name, item in value.items() if item is not None}
        return fields.keys() == expected.keys() and all(
            _same(item, expected[name]) for name, item in fields.items()
        )
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    return isinstance(value, bool) == isinstance(expected, bool) and bool(value == expected)

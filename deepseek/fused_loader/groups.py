"""Config groups of compressed-tensors as vLLM and SGLang read them: which target a module matches,
and what scheme a group asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from deepseek.fused_loader.modules import Method

_TILE = 128


def packed_method(weights: Mapping[str, Any]) -> Method | None:
    """The method of packed integers with these weights; None where they are no packed integers."""
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if bits not in (4, 8) or weights.get("type") != "int":
        return None
    if weights.get("strategy") == "group" and (not isinstance(group, int) or group < 1):
        return None
    by_group = weights.get("strategy") == "group"
    return Method(
        "wna16",
        bits=bits,
        group=group if by_group and isinstance(group, int) else 0,
        symmetric=bool(weights.get("symmetric", True)),
    )


def is_wna16(weights: Mapping[str, Any]) -> bool:
    """Whether the weights are static with a scale per channel or group, as both engines' rule for
    weight-only schemes asks."""
    return weights.get("strategy") in ("channel", "group") and not weights.get("dynamic")


def is_token_int8(inputs: Mapping[str, Any] | None) -> bool:
    """Whether these are symmetric INT8 inputs per token, quantized while the engine runs."""
    return (
        inputs is not None
        and inputs.get("num_bits") == 8
        and inputs.get("type") == "int"
        and inputs.get("strategy") == "token"
        and bool(inputs.get("symmetric", True))
        and bool(inputs.get("dynamic"))
    )


def is_w8a8(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> bool:
    """Whether these are INT8 per channel with INT8 inputs per token."""
    return (
        weights.get("num_bits") == 8
        and weights.get("type") == "int"
        and weights.get("strategy") == "channel"
        and bool(weights.get("symmetric", True))
        and not weights.get("dynamic")
        and inputs is not None
        and inputs.get("num_bits") == 8
        and inputs.get("strategy") == "token"
        and bool(inputs.get("dynamic"))
    )


def is_fp8(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> bool:
    """Whether these are FP8 tiles with FP8 inputs quantized while the engine runs."""
    return (
        weights.get("type") == "float"
        and weights.get("num_bits") == 8
        and weights.get("strategy") == "block"
        and weights.get("block_structure") == [_TILE, _TILE]
        and bool(weights.get("symmetric", True))
        and inputs is not None
        and inputs.get("type") == "float"
        and bool(inputs.get("dynamic"))
    )


def first_target(name: str, targets: Iterable[str]) -> str | None:
    """The first target that is the name or, as a pattern, matches from its start."""
    for target in targets:
        pattern = compiled(target)
        if target == name if pattern is None else pattern.match(name):
            return target
    return None


def first_class(module_class: str, targets: Iterable[str]) -> str | None:
    """The first target that is contained in the name of the module's class (`Linear`)."""
    for target in targets:
        pattern = compiled(target)
        if pattern.match(module_class) if pattern else target.lower() in module_class.lower():
            return target
    return None


@lru_cache(maxsize=1 << 16)
def compiled(target: str) -> re.Pattern[str] | None:
    """The pattern of a target `re:...`; None for a name."""
    return re.compile(target[3:]) if target.startswith("re:") else None

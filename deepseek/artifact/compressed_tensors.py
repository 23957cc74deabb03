"""The `quantization_config` of config.json, as the compressed-tensors library and vLLM read it.

There is one config group per scheme. Loaders find the group of a linear by matching its module name
against the `targets` of each group, regular expressions that apply from the start of the name.
Modules that stay in high precision are in `ignore`, the head among them unless a rule of the recipe
names it: then it is a target of its group. The targets are derived from the resolved
schemes, not from the text of the recipe, by a greedy cover, so that they are few and readable. Then
they are checked against every linear of the model: each linear matches targets of its own group
only, and nothing else matches any target.

Formats (compressed-tensors 0.20): INT8 with INT8 activations is `int-quantized`, INT4 is
`pack-quantized`, FP8 blocks are `float-quantized`; a mix is `mixed-precision` with the format named
per group. INT8 without activations is packed too, because no loader takes plain int8 there. INT4
with FP8 activations is packed with static per-tensor input activations, `input_scale` beside each
weight; INT4 with INT8 activations is packed with dynamic ones per token.

Two things are there for SGLang, whose code looks nowhere else (`CompressedTensorsWNA16MoE`,
`weight_block_size`); they came with form 3 of the manifest. The format at the top is
`pack-quantized` where routed experts are packed, whatever the other groups are. The last target of
the FP8 blocks is `Linear`, the class of a module, where SGLang finds their size. Neither changes
what other loaders do: all of them take the format of the group before the one at the top, and a
name that matches before a class. transformers is the exception: it takes a group with a class for
that of the experts, unless another has a pattern with the word `experts`. So `Linear` is left out
where the experts' group has no such pattern.

`kv_cache_scheme` is always null. vLLM reads static KV scales of compressed-tensors for its
`Attention` only, not for `MLAAttention`, and TensorRT-LLM reads none for MLA, so no loader would
read a scale that is written here. The measured range is in the manifest (`kv_latent_amax`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from deepseek.artifact.manifest import FORMAT_VERSION
from deepseek.config import ModelConfig
from deepseek.inventory import ATTENTION_ROLES, HEAD, expert_of, is_within, tensors
from deepseek.recipe import Scheme

#: Fragments of module names below `layers.N.`, widest first. None of them matches a module that is
#: never quantized (`mlp.gate`, the norms, `eh_proj`). transformers 5 takes a group for that of the
#: routed experts when a target contains the word `experts`, so those of the shared expert avoid it.
_FRAGMENTS = (
    r"(self_attn|mlp)[.].*_proj\w*",
    r"self_attn[.].*_proj\w*",
    r"mlp[.].*_proj",
    r"mlp[.]experts[.].*_proj",
    r"mlp[.]shared_.*_proj",
    r"mlp[.](gate|up|down)_proj",
    *(rf"self_attn[.]{role}" for role in ATTENTION_ROLES),
    r"mlp[.]experts[.]\d+[.](gate|up)_proj",
    *(rf"mlp[.]experts[.]\d+[.]{name}_proj" for name in ("gate", "up", "down")),
    r"mlp[.]shared_.*(gate|up)_proj",
    *(rf"mlp[.]shared_.*{name}_proj" for name in ("gate", "up", "down")),
    r"mlp[.](gate|up)_proj",
    *(rf"mlp[.]{name}_proj" for name in ("gate", "up", "down")),
)
#: The same where layers have an indexer: the first two must not reach into it, because its
#: `weights_proj` is never quantized.
_FRAGMENTS_WITH_INDEXER = (
    r"(self_attn|mlp)[.](?!indexer[.]).*_proj\w*",
    r"self_attn[.]\w+_proj\w*",
    r"self_attn[.]indexer[.]w(k|q_b)",
    *_FRAGMENTS[2:],
)

#: Class of a linear module, as a target: only what no pattern names is matched by it.
LINEAR_CLASS = "Linear"

#: Inputs in INT8 with one scale per token, found while the engine runs.
_INT8_TOKENS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "dynamic": True,
    "strategy": "token",
}

#: A linear as (layer, rest of its module name). The head lies behind all layers.
_Place = tuple[int, str]
_HEAD_PLACE: _Place = (-1, HEAD)
#: A pattern, because transformers takes a group with a plain name for that of the experts.
_HEAD_TARGET = f"re:{HEAD}$"


def quantization_config(
    config: ModelConfig, schemes: Mapping[str, Scheme], *, form: int = FORMAT_VERSION
) -> dict[str, Any] | None:
    """The value of config.json's `quantization_config`; None where every linear is BF16.

    `schemes` is keyed by module name, as `Recipe.resolve` returns it: every linear, none `source`.
    `form` is the manifest's `format_version`: before 3, nothing was said for SGLang.
    """
    places: dict[Scheme, set[_Place]] = {}
    for module, scheme in schemes.items():
        places.setdefault(_as_stored(scheme), set()).add(_place(module))
    high_precision = places.pop(Scheme(weights="bf16"), set())
    if not places:
        return None
    all_places = high_precision.union(*places.values())

    fragments = _FRAGMENTS_WITH_INDEXER if config.has_indexer else _FRAGMENTS
    groups: dict[str, Any] = {}
    # The largest group first, because transformers takes the first group where it cannot decide.
    order = sorted(places, key=lambda scheme: (-len(places[scheme]), scheme.label))
    for number, scheme in enumerate(order):
        groups[f"group_{number}"] = _group(scheme, _targets(places[scheme], all_places, fragments))
    ignore = [*([] if HEAD in schemes else [HEAD]), "re:.*[.]mlp[.]gate"]
    if config.has_indexer:
        ignore.append("re:.*[.]indexer[.]weights_proj")
    if config.num_nextn_predict_layers:
        ignore += ["re:.*[.]eh_proj", "re:.*[.]shared_head[.]head"]
    ignore = [f"{name}$" if name.startswith("re:") else name for name in ignore]
    ignore += _targets(high_precision, all_places, fragments) if high_precision else []
    _verify(config, schemes, groups, ignore)
    formats = {group["format"] for group in groups.values()}
    top = formats.pop() if len(formats) == 1 else "mixed-precision"
    if form >= 3:
        experts = [groups[name] for name in _groups_of_experts(config, schemes, order)]
        if any(group["format"] == "pack-quantized" for group in experts):
            top = "pack-quantized"
        for group in groups.values():
            if group["format"] == "float-quantized" and _experts_are_found(experts, group):
                group["targets"].append(LINEAR_CLASS)
    return {
        "quant_method": "compressed-tensors",
        "format": top,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": ignore,
    }


def _groups_of_experts(
    config: ModelConfig, schemes: Mapping[str, Scheme], order: Sequence[Scheme]
) -> list[str]:
    """The groups that routed experts of the main model's layers are in. `order` has the scheme of
    every group."""
    found = {
        _as_stored(scheme)
        for module, scheme in schemes.items()
        if expert_of(module) is not None and is_within(module, config.num_hidden_layers)
    }
    return [f"group_{number}" for number, scheme in enumerate(order) if scheme in found]


def _experts_are_found(experts: Sequence[Mapping[str, Any]], fp8: Mapping[str, Any]) -> bool:
    """Whether transformers finds the routed experts' group although the FP8 group has a class among
    its targets: by a pattern that names experts, or because it is the FP8 group (or none is)."""
    return all(
        group is fp8 or any("experts" in target for target in group["targets"]) for group in experts
    )


def module_patterns(
    config: ModelConfig, modules: Iterable[str], everything: Iterable[str]
) -> list[str]:
    """A few targets that match these modules, and no other of `everything`, module names of
    linears."""
    fragments = _FRAGMENTS_WITH_INDEXER if config.has_indexer else _FRAGMENTS
    return _targets(set(map(_place, modules)), set(map(_place, everything)), fragments)


def matches(target: str, name: str) -> bool:
    """Whether a target or ignore entry names the module (rule of compressed-tensors and vLLM)."""
    if target.startswith("re:"):
        return _compiled(target[3:]).match(name) is not None
    return target == name


def _place(module: str) -> _Place:
    if module == HEAD:
        return _HEAD_PLACE
    layer, rest = module.removeprefix("model.layers.").split(".", 1)
    return int(layer), rest


@lru_cache
def _as_stored(scheme: Scheme) -> Scheme:
    """The scheme without the settings of rounding, which a loader does not need."""
    return Scheme(
        weights=scheme.weights, group_size=scheme.group_size, activations=scheme.activations
    )


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = None
    form = "int-quantized"
    match scheme.weights:
        case "int8" | "int8-asym":
            weights |= {"symmetric": scheme.is_symmetric, "strategy": "channel"}
            if scheme.activations == "int8":
                inputs = dict(_INT8_TOKENS)
            else:
                form = "pack-quantized"
        case "int4" | "int4-asym":
            weights |= {
                "num_bits": 4,
                "symmetric": scheme.is_symmetric,
                "strategy": "group",
                "group_size": scheme.group_size,
            }
            form = "pack-quantized"
            if scheme.activations == "int8":
                inputs = dict(_INT8_TOKENS)
            elif scheme.activations == "fp8":
                inputs = {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "tensor",
                    "dynamic": False,
                }
        case "int8-block":
            weights |= {"strategy": "block", "block_structure": [128, 128]}
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "dynamic": True,
            }
        case "fp8-block":
            weights |= {"type": "float", "strategy": "block", "block_structure": [128, 128]}
            # As the release declares itself: activations quantized on the fly, 128 at a time.
            inputs = {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "dynamic": True,
            }
            form = "float-quantized"
        case _:
            raise AssertionError(f"{scheme.weights} is not a compressed format")
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }


def _targets(places: set[_Place], all_places: set[_Place], fragments: Iterable[str]) -> list[str]:
    """A few patterns that together match `places` and no other of `all_places` (greedy cover)."""
    candidates: dict[str, set[_Place]] = {}
    for fragment in fragments:
        matched = {place for place in all_places if _compiled(fragment + "$").match(place[1])}
        by_layer: dict[int, set[_Place]] = {}
        for place in matched:
            by_layer.setdefault(place[0], set()).add(place)
        pure = {layer for layer, matches_of_layer in by_layer.items() if matches_of_layer <= places}
        if pure:
            pattern = _layer_pattern(pure, set(by_layer)) + fragment + "$"
            candidates[pattern] = {place for place in matched if place[0] in pure}
    chosen: list[str] = []
    rest = set(places) - {_HEAD_PLACE}
    while rest:
        best = max(candidates, key=lambda p: (len(candidates[p] & rest), -len(p), p), default=None)
        if best is None or not candidates[best] & rest:
            chosen += _expert_patterns(rest)
            break
        chosen.append(best)
        rest -= candidates.pop(best)
    named = [_HEAD_TARGET] if _HEAD_PLACE in places else []
    return [f"re:{pattern}" for pattern in chosen] + named


def _layer_pattern(layers: set[int], all_layers: set[int]) -> str:
    """The shorter prefix that matches `layers` and no other of `all_layers`, the layers where the
    fragment occurs."""
    if layers == all_layers:
        return ".*[.]"
    others = all_layers - layers
    only = f".*[.]layers[.]{_any_of(layers)}[.]"
    but = rf".*[.]layers[.](?!{_any_of(others)}[.])\d+[.]"
    return min(only, but, key=len)


def _any_of(numbers: Iterable[int]) -> str:
    """`7`, or `(1|2|7)`."""
    words = [str(number) for number in sorted(numbers)]
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def _expert_patterns(places: Iterable[_Place]) -> list[str]:
    """Patterns for single experts, where no fragment is pure: one per layer and projection."""
    experts: dict[tuple[int, str], list[int]] = {}
    for layer, name in places:
        *_, number, role = name.split(".")
        experts.setdefault((layer, role), []).append(int(number))
    return [
        rf".*[.]layers[.]{layer}[.]mlp[.]experts[.]{_any_of(numbers)}[.]{role}$"
        for (layer, role), numbers in sorted(experts.items())
    ]


def _verify(
    config: ModelConfig, schemes: Mapping[str, Scheme], groups: dict[str, Any], ignore: list[str]
) -> None:
    """Check that every module matches its own group only; a violation is a bug of this file."""
    targets_of = {name: group["targets"] for name, group in groups.items()}
    owner: dict[Scheme, str] = {}
    for spec in tensors(config):
        name = spec.module
        hits = [g for g, targets in targets_of.items() if any(matches(t, name) for t in targets)]
        ignored = any(matches(entry, name) for entry in ignore)
        scheme = schemes.get(name)
        if scheme is None or scheme.weights == "bf16":
            assert not hits, f"{name} must stay in high precision, but matches {hits}"
            assert scheme is None or ignored, f"{name} is neither in a group nor ignored"
            continue
        assert len(hits) == 1, f"{name} matches the groups {hits}"
        assert not ignored, f"{name} is both in {hits} and ignored"
        assert owner.setdefault(scheme, hits[0]) == hits[0], f"{name} is in {hits}"


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)

"""What concerns several linears of a model at once: those that an engine fuses into one tensor, the
layouts of which a directory has one, and schemes that a loader looks up once.

The facts are the matrix's (`MIXES`, `UNIFORM` of `cluster/rows/`) and the inventory's (`FUSED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from cluster.hardware import GpuGeneration
from cluster.matrix import KV_CACHE, Handed, Mix, Refusal, Target, Uniform
from cluster.rows import sglang, transformers
from deepseek.inventory import FUSED, HEAD, group_of
from deepseek.recipe import Scheme

_MIXES: dict[Handed, tuple[Mix, ...]] = {
    "engine": sglang.MIXES,
    "artifact": sglang.ARTIFACT_MIXES,
}
_UNIFORM: dict[Handed, tuple[Uniform, ...]] = {"engine": (), "artifact": transformers.UNIFORM}
#: Formats of a source, which no recipe made.
_AS_RELEASED = frozenset({"bf16", "fp8-block"})


def fused_refusals(schemes: Mapping[str, Scheme], target: Target) -> Iterator[Refusal]:
    """Linears that the engine stores as one tensor must have one scheme."""
    units: dict[tuple[int, str], dict[int, Scheme]] = {}
    for module, scheme in schemes.items():
        place = _fused_unit(module)
        if place:
            units.setdefault(place, {})[id(scheme)] = scheme
    wrong: dict[str, list[int]] = {}
    for (layer, unit), members in units.items():
        if len({scheme.label for scheme in members.values()}) > 1:
            wrong.setdefault(unit, []).append(layer)
    for unit, layers in wrong.items():
        yield Refusal(
            target,
            f"{unit} of layer {layers[0]}" + (f" and {len(layers) - 1} more" * (len(layers) > 1)),
            "it fuses them into one tensor, which has one format",
            "Give them the same format in the recipe",
            "read",
        )


@lru_cache(maxsize=1 << 17)
def _fused_unit(module: str) -> tuple[int, str] | None:
    """The layer and the unit that an engine fuses a linear into, in words; None for one alone."""
    if module == HEAD:
        return None
    layer, rest = split_module(module)
    group = group_of(module)
    if group == "routed_experts":
        return layer, "all routed experts"
    parent, _, role = rest.rpartition(".")
    for roles in FUSED.values():
        if role in roles:
            unit = " with ".join(roles)
            return layer, unit if group == "attention" else f"{parent}: {unit}"
    return None


def fitting_dialects(
    linears: Iterable[tuple[str, str]], target: Target, gpu: GpuGeneration
) -> list[str]:
    """The dialects that hold these parts and formats, the one that `build` takes unless another is
    asked for first; none for a target without dialects, or where nothing is quantized."""
    quantized = {form for _, form in linears} - _AS_RELEASED
    mixes = _mixes(target, gpu, "engine") if quantized else []
    return [mix.dialect for mix in mixes if _fits(mix, linears)]


def dialect_refusals(
    linears: Iterable[tuple[str, str]], target: Target, gpu: GpuGeneration, dialect: str
) -> Iterator[Refusal]:
    """A refusal if another dialect than this one holds the formats of the model."""
    fitting = fitting_dialects(linears, target, gpu)
    if fitting and dialect not in fitting:
        yield Refusal(
            target,
            f"{join_words(sorted({form for _, form in linears}))} in the dialect {dialect}",
            "that layout has other formats",
            f"Use --dialect {join_words(fitting, 'or')}, or leave it out",
            "read",
        )


def _mixes(target: Target, gpu: GpuGeneration, handed: Handed) -> list[Mix]:
    return [mix for mix in _MIXES[handed] if mix.target == target and gpu in mix.gpus]


def _fits(mix: Mix, linears: Iterable[tuple[str, str]]) -> bool:
    return {(p, form) for p, form in linears if form != "bf16" or not mix.plain} <= mix.cells


def mix_refusals(
    used: Iterable[tuple[str, str]], target: Target, gpu: GpuGeneration, handed: Handed
) -> Iterator[Refusal]:
    """A refusal if the target cannot combine the formats of this model."""
    linears = {(part, form) for part, form in used if part != KV_CACHE}
    mixes = _mixes(target, gpu, handed)
    if not mixes or any(_fits(mix, linears) for mix in mixes):
        return
    recipes = join_words((mix.recipe for mix in mixes), "or")
    yield Refusal(
        target,
        f"{join_words(sorted({form for _, form in linears}))} in one model",
        f"it takes one layout for the whole model: {join_words((mix.name for mix in mixes), 'or')}",
        f"Use the recipe {recipes}, or --target vllm",
        "read",
    )


def uniform_refusals(
    used: Iterable[tuple[str, str]], target: Target, handed: Handed
) -> Iterator[Refusal]:
    """A refusal where the target has one scheme for linears that have several."""
    for rule in _UNIFORM[handed]:
        if rule.target != target:
            continue
        forms = {form for part, form in used if part in rule.parts and form != "bf16"}
        if len(forms) > 1:
            yield Refusal(
                target,
                f"{join_words(sorted(forms))} in one model",
                rule.text,
                "Build it with `build --target transformers`",
                rule.evidence,
            )


def join_words(words: Iterable[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; repeated words once."""
    unique = list(dict.fromkeys(words))
    if len(unique) < 2:
        return "".join(unique)
    return f"{', '.join(unique[:-1])} {last} {unique[-1]}"


def split_module(module: str) -> tuple[int, str]:
    """(layer, rest of the name); 46,000 times per question, hence no regular expression."""
    model, layers, layer, rest = module.split(".", 3)
    assert (model, layers) == ("model", "layers"), f"{module} is no linear of a decoder layer"
    return int(layer), rest

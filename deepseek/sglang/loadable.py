"""Whether SGLang can load a model's formats and shapes at all, before anything is written.

Read in SGLang 0.5.23: `w4afp8.py`, `w8a8_int8.py`, `blockwise_int8.py`, `fp8.py`,
`compressed_tensors.py` with its schemes, `deepseek_v2.py` and `deepseek_weight_loader.py`. The same
sentences are the planner's (`cluster/matrix.py`) and `build`'s:

    formats   a layout of its own is one method for all linears of a kind; compressed-tensors takes
              symmetric packed experts, FP8 tiles and BF16, and no INT8 with INT8 inputs on experts
    fused     gate with up, q_a_proj with kv_a_proj_with_mqa, and all routed experts of a layer:
              one format each
    ranks     whole attention heads per rank; tiles and groups that no rank gets a part of

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import (
    FUSED,
    HEAD,
    TensorSpec,
    expert_of,
    is_within,
    layer_of,
    layer_tensors,
)
from deepseek.recipe import Scheme
from deepseek.sglang.layout import ROW_ROLES, TILE, VOCAB_PADDING, WHOLE_ROLES, Dialect

#: Reasons that the planner's matrix gives too.
NO_EXPERT_ZERO_POINTS = (
    "its loader of packed experts turns every tensor but zero points, which then do not fit"
)
NO_ZERO_POINTS = "Marlin, its kernel for packed linears, takes zero points of 4 bits only"
NO_INT8_EXPERTS = "its compressed-tensors code computes INT8 experts with INT8 inputs on NPUs only"
NO_INT4_A8 = "its compressed-tensors code has no linear of INT4 weights with INT8 inputs"
NO_INT4_A8_EXPERTS = (
    "its compressed-tensors code takes INT8 inputs of INT4 experts for FP8 ones (W4AFP8)"
)
NO_HEAD = (
    "its own layouts hold the head in BF16, and `build` has no model of how its compressed-tensors "
    "code loads another"
)
NO_STATIC_FP8 = (
    "its compressed-tensors code finds the scales of W4A8 inputs while it runs and refuses static "
    "ones"
)
ONE_METHOD = {
    "w4afp8": (
        "w4afp8 is INT4 in symmetric groups of 128 for routed experts and FP8 tiles for every "
        "other linear, without exceptions"
    ),
    "w8a8_int8": "w8a8_int8 is INT8 with INT8 inputs for every linear, without exceptions",
    "blockwise_int8": "blockwise_int8 is INT8 tiles for every linear",
}
MTP_FORMAT = (
    "its module of the MTP layer takes the method of the model, and the layer stays as released"
)
NO_INDEXER = (
    "DeepSeek-V3.2's indexer is fused there, of which this version of IntServe has no model"
)
NEEDS_SM90 = "its w4afp8 kernels need GPUs of compute capability 9.0 (Hopper)"

#: Weights and inputs of experts that w4afp8 runs, with FP8 inputs in any case.
_W4AFP8 = (("int4", "none"), ("int4", "fp8"))
_PACKED = frozenset({"int4", "int4-asym", "int8", "int8-asym"})
_FUSED_BY_ROLE = {role: name for name, roles in FUSED.items() for role in roles}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that SGLang cannot load. `part` says what, `reason` why, `change` what would make
    it load, in the imperative."""

    part: str
    reason: str
    change: str

    def sentence(self) -> str:
        return f"sglang cannot load {self.part}: {self.reason}; {self.change}"


def check_loadable(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    ranks: RankLayout,
    *,
    mtp: bool,
    generation: str = "sm90",
) -> None:
    """Check that SGLang can load this model in this dialect on these ranks; arguments as of
    `problems`.

    Raises:
        DeployError: it cannot; the sentence names the first thing and what to change.
    """
    for problem in problems(config, schemes, dialect, ranks, mtp=mtp, generation=generation):
        raise DeployError(problem.sentence())


def problems(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    ranks: RankLayout,
    *,
    mtp: bool,
    generation: str = "sm90",
) -> Iterator[Problem]:
    """All that SGLang cannot load: formats first, then fused linears, then the ranks.

    `schemes` maps every linear of the source or artifact to its scheme (no `source`); MTP layers
    count only where `mtp` says that they are kept. `generation` is the GPUs'.
    """
    if config.has_indexer:
        yield Problem("the indexer", NO_INDEXER, "serve the quantized checkpoint itself with it")
        return
    if mtp and not config.num_nextn_predict_layers:
        yield Problem("an MTP layer", "the model has none", "leave out --mtp")
        return
    if mtp and dialect != "released":
        yield Problem(f"the MTP layer in the dialect {dialect}", MTP_FORMAT, "leave out --mtp")
        return
    if dialect == "w4afp8" and generation == "sm80":
        yield Problem("w4afp8 on Ampere", NEEDS_SM90, "use --dialect compressed-tensors")
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    kept = {module: scheme for module, scheme in schemes.items() if is_within(module, layers)}
    yield from _format_problems(kept, dialect)
    yield from _fused_problems(kept)
    yield from _rank_problems(config, ranks)
    if config.num_attention_heads % ranks.tp or config.n_routed_experts % ranks.ep:
        return
    seen: set[tuple[object, ...]] = set()
    for layer in range(layers):
        for spec in layer_tensors(config, layer):
            if spec.kind != "linear":
                continue
            scheme = kept[spec.module]
            kind = (spec.role, spec.group, spec.shape, scheme.label)
            if kind not in seen:
                seen.add(kind)
                yield from _cut_problems(spec, scheme, ranks)


# --- formats ---


def _format_problems(schemes: Mapping[str, Scheme], dialect: Dialect) -> Iterator[Problem]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for module, scheme in schemes.items():
        wrong = wrong_format(scheme, dialect, is_expert=expert_of(module) is not None)
        if module == HEAD:
            wrong = NO_HEAD, "leave its rule out of the recipe, or use --target vllm"
        if wrong:
            found.setdefault((scheme.label, *wrong), []).append(module)
    for (label, reason, change), modules in found.items():
        more = f" and {len(modules) - 1} others" if len(modules) > 1 else ""
        yield Problem(f"{modules[0]}{more} as {label}", reason, change)


def wrong_format(scheme: Scheme, dialect: Dialect, *, is_expert: bool) -> tuple[str, str] | None:
    """(reason, what to change) where the dialect has no way to hold or to compute a linear."""
    weights, inputs = scheme.weights, scheme.activations
    match dialect:
        case "w4afp8":
            wanted = (weights, inputs) in _W4AFP8 if is_expert else weights == "fp8-block"
            if not wanted or (is_expert and scheme.group_size != TILE):
                return ONE_METHOD[dialect], "use the recipe w4a8 or int4 with an FP8 source"
        case "w8a8_int8":
            if (weights, inputs) != ("int8", "int8"):
                return ONE_METHOD[dialect], "use the recipe int8"
        case "blockwise_int8":
            if weights != "int8-block":
                return ONE_METHOD[dialect], "use the recipe int8-block"
        case "compressed-tensors":
            return _wrong_group(scheme, is_expert=is_expert)
    return None


def _wrong_group(scheme: Scheme, *, is_expert: bool) -> tuple[str, str] | None:
    if scheme.activations == "fp8":
        return NO_STATIC_FP8, "use --dialect w4afp8"
    if scheme.weights == "int8-block":
        return "its compressed-tensors code has no INT8 tiles", "use --dialect blockwise_int8"
    if scheme.weights == "int8-asym" and not is_expert:
        return NO_ZERO_POINTS, "give it `weights: int8` and quantize again"
    if scheme.group_size and scheme.activations == "int8":
        reason = NO_INT4_A8_EXPERTS if is_expert else NO_INT4_A8
        return reason, "leave its activations out, as the recipe int4-all does, and quantize again"
    if not is_expert:
        return None
    if scheme.activations == "int8":
        return NO_INT8_EXPERTS, "use the recipe int8, and the dialect w8a8_int8"
    if not scheme.is_symmetric:
        return (
            NO_EXPERT_ZERO_POINTS,
            f"give it `weights: {scheme.weights.removesuffix('-asym')}` and quantize again",
        )
    return None


def _fused_problems(schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    units: dict[str, dict[str, str]] = {}
    for module, scheme in schemes.items():
        parent, _, role = module.rpartition(".")
        if expert_of(module) is not None:
            unit = f"the experts of layer {layer_of(module)}"
        elif role in _FUSED_BY_ROLE:
            unit = f"{parent}.{_FUSED_BY_ROLE[role]}"
        else:
            continue
        units.setdefault(unit, {}).setdefault(scheme.label, module)
    for unit, found in units.items():
        if len(found) > 1:
            (first, one), (second, other) = list(found.items())[:2]
            yield Problem(
                f"{one} as {first} and {other} as {second}",
                f"it holds {unit} as one module, which has one format",
                "give them one format in the recipe and quantize again",
            )


# --- shapes ---


def _rank_problems(config: ModelConfig, ranks: RankLayout) -> Iterator[Problem]:
    tp = ranks.tp
    if config.num_attention_heads % tp:
        yield Problem(
            f"{config.num_attention_heads} attention heads on {tp} ranks",
            "every rank holds whole heads",
            f"use --tp {max(_divisors(config.num_attention_heads, below=tp))}",
        )
    if config.n_routed_experts % ranks.ep:
        yield Problem(
            f"{config.n_routed_experts} routed experts in {ranks.ep} groups",
            "every group holds equally many",
            "use --ep 1",
        )
    if tp > config.n_routed_experts:
        yield Problem(
            f"{config.n_routed_experts} routed experts on {tp} ranks",
            "it wants at least as many experts as ranks",
            f"use --tp {config.n_routed_experts}",
        )
    vocab = -(-config.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    if vocab % tp:
        yield Problem(
            f"a vocabulary of {vocab} padded tokens on {tp} ranks",
            "every rank holds equally many",
            f"use --tp {max(_divisors(vocab, below=tp))}",
        )


def _cut_problems(spec: TensorSpec, scheme: Scheme, ranks: RankLayout) -> Iterator[Problem]:
    """Whether the ranks would cut a linear where it cannot be cut."""
    outputs, inputs = spec.shape
    is_expert, is_row = spec.expert is not None, spec.role in ROW_ROLES
    ways = 1 if spec.role in WHOLE_ROLES else ranks.tp // (ranks.ep if is_expert else 1)
    tiled = scheme.weights in ("fp8-block", "int8-block")
    # The tiles of the second part of a fused linear follow those of the first.
    is_first = spec.role in ("q_a_proj", "gate_proj", "up_proj")
    whole_outputs = TILE if tiled else 32 // scheme.bits if not scheme.is_symmetric else 1
    whole_inputs = (
        TILE if tiled else scheme.group_size or (4 if scheme.activations == "none" else 1)
    )
    if scheme.weights == "bf16":
        whole_inputs = 1
    for name, size, whole, cut, needed in (
        ("outputs", outputs, whole_outputs, not is_row, is_first or not scheme.is_symmetric),
        ("inputs", inputs, whole_inputs, is_row, scheme.weights in _PACKED),
    ):
        share = ways if cut else 1
        if (share > 1 or needed) and size % (share * whole):
            usable = [n for n in _divisors(share, below=share) if not size % (n * whole)]
            change = "quantize it in another format"
            if share > 1 and usable:
                change = (
                    "use --ep equal to --tp"
                    if is_expert and ranks.ep < ranks.tp
                    else f"use --tp {max(usable)}"
                )
            yield Problem(
                f"{spec.module} as {scheme.label}",
                f"its {name}, {size / share:g} for each of {share} ranks, are no multiple of "
                f"{whole}",
                change,
            )


def _divisors(number: int, *, below: int) -> list[int]:
    return [n for n in range(1, below) if number % n == 0] or [1]

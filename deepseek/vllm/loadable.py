"""Whether vLLM can load a model's formats and shapes at all, before anything is written.

Read in vLLM 0.32: `compressed_tensors.py`, `compressed_tensors_moe.py`, its `wna16` and `w8a8`
methods, `machete_utils.py`, `marlin_utils.py`, `fp8_utils.py` (`validate_fp8_block_shape`),
`linear.py` and `deepseek_v2.py`. The same sentences are the planner's (`cluster/matrix.py`) and
`build`'s:

    formats   INT4 with static FP8 inputs has no loader, nor have experts of INT4 with INT8 inputs;
              zero points of 8 bits no kernel for experts
    fused     gate with up, q_a_proj with kv_a_proj_with_mqa, and all routed experts of a layer:
              one format each
    ranks     whole attention heads per rank; FP8 tiles, groups and packed words that no rank gets
              a part of; experts over all ranks (`--enable-expert-parallel`) or inside each

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import FUSED, HEAD, TensorSpec, is_within, layer_of, layer_tensors
from deepseek.recipe import Scheme
from deepseek.vllm.layout import TILE, VOCAB_PADDING

#: Reasons that the planner's matrix gives too.
NO_STATIC_FP8 = (
    "its W4A8 finds the scales of activations per token while it runs and refuses static ones"
)
NO_EXPERT_ZERO_POINTS = "Marlin, its kernel for such experts, takes zero points of 4 bits only"
NO_ZERO_POINTS_SM80 = "its kernels for Ampere take zero points of 4 bits only"
MACHETE_OUTPUTS = (
    "Machete, its only kernel for 8-bit zero points, takes outputs in multiples of 128; "
    "kv_a_proj_with_mqa has 576, together with q_a_proj 2112"
)
NO_INT4_A8_EXPERTS = (
    "its INT4 experts with INT8 inputs run on Arm CPUs only, from codes that are not packed"
)
WEIGHT_ONLY = (
    "it chooses kernels of packed INT4 by the weight alone, and those that it takes leave INT8 "
    "inputs unquantized"
)
NO_FORMAT = "its compressed-tensors loader has no scheme for it"
NO_INDEXER = (
    "DeepSeek-V3.2 has a loader of its own there (vllm/models/deepseek_v32), of which this version "
    "of IntServe has no model"
)

_FORMS = frozenset({"int4", "int4-asym", "int8", "int8-asym", "fp8-block", "bf16"})
#: Machete's `MACHETE_PREPACKED_BLOCK_SHAPE`: inputs, outputs.
_MACHETE_INPUTS, _MACHETE_OUTPUTS = 64, 128
#: Marlin's and Triton's experts take a hidden size in multiples of this.
_MOE_HIDDEN = 128
#: Linears whose inputs are divided over the ranks; every other but the whole ones by outputs.
_ROW_ROLES = frozenset({"o_proj", "down_proj"})
_WHOLE_ROLES = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
_FUSED_BY_ROLE = {role: name for name, roles in FUSED.items() for role in roles}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that vLLM cannot load. `part` says what, `reason` why, `change` what would make it
    load, in the imperative."""

    part: str
    reason: str
    change: str

    def sentence(self) -> str:
        return f"vllm cannot load {self.part}: {self.reason}; {self.change}"


def require_ranks(tp: int, ep: int) -> RankLayout:
    """The ranks of `--tp` and `--ep`: vLLM divides routed experts over all ranks, or none.

    Raises:
        DeployError: a number is not positive, or ep is neither 1 nor tp.
    """
    if tp < 1 or ep < 1:
        raise DeployError(f"--tp {tp} --ep {ep}: both must be at least 1")
    if ep not in (1, tp):
        raise DeployError(
            f"--ep {ep} is neither 1 nor --tp {tp}: vLLM divides routed experts over all ranks "
            f"(--enable-expert-parallel) or each of them; use --ep {tp} or --ep 1"
        )
    return RankLayout(tp=tp, ep=ep)


def check_loadable(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    ranks: RankLayout,
    *,
    mtp: bool,
    generation: str = "sm90",
) -> None:
    """Check that vLLM can load this model on these ranks; arguments as of `problems`.

    Raises:
        DeployError: it cannot; the sentence names the first thing and what to change.
    """
    for problem in problems(config, schemes, ranks, mtp=mtp, generation=generation):
        raise DeployError(problem.sentence())


def problems(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    ranks: RankLayout,
    *,
    mtp: bool,
    generation: str = "sm90",
) -> Iterator[Problem]:
    """All that vLLM cannot load: formats first, then fused linears, then the ranks.

    `schemes` maps every linear of the source or artifact to its scheme (no `source`); MTP layers
    count only where `mtp` says that they are kept. `generation` is the GPUs'.
    """
    if config.has_indexer:
        yield Problem("the indexer", NO_INDEXER, "serve the quantized checkpoint itself with it")
        return
    if mtp and not config.num_nextn_predict_layers:
        yield Problem("an MTP layer", "the model has none", "leave out --mtp")
        return
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    kept = {module: scheme for module, scheme in schemes.items() if is_within(module, layers)}
    yield from _format_problems(config, kept, generation)
    yield from _fused_problems(kept)
    tp = ranks.tp
    if config.num_attention_heads % tp:
        yield Problem(
            f"{config.num_attention_heads} attention heads on {tp} ranks",
            "every rank holds whole heads",
            f"use --tp {max(_divisors(config.num_attention_heads, below=tp))}",
        )
        return
    if config.n_routed_experts % ranks.ep:
        yield Problem(
            f"{config.n_routed_experts} routed experts on {ranks.ep} ranks",
            "IntServe plans equally many for every rank",
            "use --ep 1",
        )
        return
    vocab = -(-config.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    if vocab % tp:
        yield Problem(
            f"a vocabulary of {vocab} padded tokens on {tp} ranks",
            "every rank holds equally many",
            f"use --tp {max(_divisors(vocab, below=tp))}",
        )
    seen: set[tuple[object, ...]] = set()
    if HEAD in kept and config.vocab_size % (VOCAB_PADDING * tp):
        yield Problem(
            f"{HEAD} as {kept[HEAD].label}",
            f"its {config.vocab_size} tokens are no multiple of {VOCAB_PADDING} for each rank, and "
            "IntServe has no model of how such a head is padded",
            "serve the quantized checkpoint itself with it",
        )
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


def _format_problems(
    config: ModelConfig, schemes: Mapping[str, Scheme], generation: str
) -> Iterator[Problem]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for module, scheme in schemes.items():
        if wrong := _wrong_format(config, module, scheme, generation):
            found.setdefault((scheme.label, *wrong), []).append(module)
    for (label, reason, change), modules in found.items():
        more = f" and {len(modules) - 1} others" if len(modules) > 1 else ""
        yield Problem(f"{modules[0]}{more} as {label}", reason, change)


def _wrong_format(
    config: ModelConfig, module: str, scheme: Scheme, generation: str
) -> tuple[str, str] | None:
    """(reason, what to change) where vLLM has no way to hold or to compute a linear."""
    if scheme.weights not in _FORMS:
        return NO_FORMAT, "use the recipe int8 or int4"
    if scheme.activations == "fp8":
        return NO_STATIC_FP8, "use the recipe int4, or --target trtllm or sglang"
    if scheme.group_size and scheme.activations == "int8" and ".mlp.experts." in module:
        return NO_INT4_A8_EXPERTS, (
            "leave their activations out, as the recipe int4-all does, and quantize again"
        )
    if scheme.weights != "int8-asym":
        return None
    symmetric = "give it `weights: int8` and quantize again"
    if ".mlp.experts." in module:
        return NO_EXPERT_ZERO_POINTS, symmetric
    if generation != "sm90":
        return NO_ZERO_POINTS_SM80, symmetric
    role = module.rpartition(".")[2]
    fused = config.latent_dim + (config.q_lora_rank or 0)
    if role in _WHOLE_ROLES and fused % _MACHETE_OUTPUTS:
        return MACHETE_OUTPUTS, symmetric
    return None


def _fused_problems(schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    units: dict[str, dict[str, str]] = {}
    for module, scheme in schemes.items():
        parent, _, role = module.rpartition(".")
        if ".mlp.experts." in module:
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


def _cut_problems(spec: TensorSpec, scheme: Scheme, ranks: RankLayout) -> Iterator[Problem]:
    """Whether the ranks would cut a linear where it cannot be cut."""
    outputs, inputs = spec.shape
    is_expert = spec.expert is not None
    is_row = spec.role in _ROW_ROLES
    ways = 1 if spec.role in _WHOLE_ROLES else ranks.tp // (ranks.ep if is_expert else 1)
    what = f"{spec.module} as {scheme.label}"
    for name, size, whole, cut in (
        ("outputs", outputs, _whole_outputs(scheme, is_expert, spec.role), not is_row),
        ("inputs", inputs, _whole_inputs(scheme), is_row),
    ):
        share = ways if cut else 1
        needed = share > 1 or _needs_whole(spec, scheme, name)
        if needed and size % (share * whole):
            usable = [n for n in _divisors(share, below=share) if not size % (n * whole)]
            yield Problem(
                what,
                f"its {name}, {size / share:g} for each of {share} ranks, are no multiple of "
                f"{whole}",
                (
                    "use --ep equal to --tp"
                    if is_expert and ranks.ep == 1
                    else f"use --tp {max(usable)}"
                )
                if share > 1 and usable
                else "quantize it in another format",
            )
    if is_expert and scheme.is_packed:
        hidden = inputs if not is_row else outputs
        if hidden % _MOE_HIDDEN:
            yield Problem(
                what,
                f"its kernels for packed experts take a hidden size in multiples of "
                f"{_MOE_HIDDEN}, not {hidden}",
                "give the routed experts another format",
            )


def _needs_whole(spec: TensorSpec, scheme: Scheme, name: str) -> bool:
    """Whether a dimension must be whole groups, words or tiles even where no rank cuts it: what is
    packed along it, and the first part of a fused linear, whose tiles the second's follow."""
    if name == "inputs":
        return scheme.is_packed
    if scheme.weights == "fp8-block":
        return spec.role in ("q_a_proj", "gate_proj")
    return not scheme.is_symmetric


def _whole_outputs(scheme: Scheme, is_expert: bool, role: str) -> int:
    match scheme.weights:
        case "fp8-block":
            return TILE
        case "int8-asym" if is_expert or role in _WHOLE_ROLES:
            return 4
        case "int8-asym":  # gate and up are one linear of twice the width
            return _MACHETE_OUTPUTS // (2 if role in ("gate_proj", "up_proj") else 1)
        case "int4-asym":
            return 8
    return 1


def _whole_inputs(scheme: Scheme) -> int:
    if scheme.weights == "fp8-block":
        return TILE
    if scheme.group_size is not None:
        return scheme.group_size
    if scheme.weights == "int8-asym":
        return _MACHETE_INPUTS
    return 4 if scheme.weights == "int8" and scheme.activations == "none" else 1


def _divisors(number: int, *, below: int) -> list[int]:
    return [n for n in range(1, below) if number % n == 0] or [1]

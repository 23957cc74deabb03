"""Whether TensorRT-LLM can load a model's formats and shapes at all, before anything is written.

Its loader cuts tensors by the number of ranks and takes some results in silence, so that what does
not fit is refused here, with the same words by the planner (`cluster/plan.py`) and by `build`:

    formats   routed experts INT4 in groups of 128, INT8 weight-only, FP8 tiles or BF16, one per
              layer; every other linear FP8 tiles or BF16; the head BF16; no indexer
    dialect   `single` is one quantization of all routed experts, and no MTP layer
    ranks     whole attention heads per rank, whole experts per expert group, and FP8 tiles and
              groups that no rank gets a part of

Vocabularies need no number of ranks: embedding and head are padded (`LMHead` of its
`modules/embedding.py`). Dense MLPs and the shared expert are divided over as many ranks as whole
tiles allow. Read in TensorRT-LLM's `modeling_deepseekv3.py`, `modules/linear.py`,
`fused_moe/quantization.py` and `fused_moe/interface.py`. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import FUSED, HEAD, TensorSpec, group_of, layer_of, linears
from deepseek.recipe import Scheme
from deepseek.trtllm.layout import TILE, Dialect
from deepseek.trtllm.versions import EngineVersion

#: Reasons that the planner's matrix gives too.
NO_W8A8 = "TensorRT-LLM 1.2 has no INT8 W8A8 kernels on Hopper"
NO_INT4_A8 = "it has no kernels for INT4 weights with INT8 activations"
NO_HEAD = "its head takes no quantization, and holds BF16"
NO_INT8_TILES = "it has no INT8 kernels with a scale per tile"
NO_ZERO_POINTS = "its kernels for INT8 and INT4 experts take no zero points"
GROUPS_OF_128 = "its INT4 experts (W4AFP8) are symmetric with groups of 128 only"
EXPERTS_ONLY = "IntServe builds INT8 and INT4 for routed experts only there"
NO_INDEXER = (
    "the loader makes garbage of an FP8 linear that its config does not list, without an error, "
    "and its names of the indexer were not checked"
)

#: Format of routed experts -> what a rank's share of their inputs must be a multiple of. 64 INT8
#: codes are the tile that the kernel's layout interleaves (`preprocess_weights_for_mixed_gemm`).
_WHOLE = {"int4": TILE, "fp8-block": TILE, "int8": 64, "bf16": 1}
Evidence = Literal["read", "inferred"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that TensorRT-LLM cannot load. `part` says what, `reason` why, `change` what would
    make it load, in the imperative; `evidence` as in the planner's matrix."""

    part: str
    reason: str
    change: str
    evidence: Evidence = "read"

    def sentence(self) -> str:
        return f"trtllm cannot load {self.part}: {self.reason}; {self.change}"


def check_loadable(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    ranks: RankLayout,
    *,
    mtp: bool,
    version: EngineVersion,
) -> None:
    """Check that TensorRT-LLM `version` can load this model in this dialect on these ranks.

    Arguments as of `problems`.

    Raises:
        DeployError: it cannot; the sentence names the first thing and what to change.
    """
    for problem in problems(config, schemes, dialect, ranks, mtp=mtp, version=version):
        raise DeployError(problem.sentence())


def problems(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    ranks: RankLayout,
    *,
    mtp: bool,
    version: EngineVersion,
) -> Iterator[Problem]:
    """All that TensorRT-LLM `version` cannot load: formats first, then the dialect, then the ranks.

    `schemes` maps every linear of the source or artifact to its scheme (no `source`); MTP layers
    count only where `mtp` says that they are kept.
    """
    survey = _Survey(config, schemes, mtp=mtp)
    if config.has_indexer:
        change = "serve it with vLLM or SGLang"
        yield Problem("the indexer", NO_INDEXER, change, "inferred")
    for (label, reason, change), modules in survey.wrong.items():
        evidence: Evidence = "inferred" if reason == EXPERTS_ONLY else "read"
        yield Problem(f"{_counted(modules)} as {label}", reason, change, evidence)
    yield from _dialect_problems(config, survey, dialect, mtp=mtp)
    if config.num_attention_heads % ranks.tp:
        yield Problem(
            f"{config.num_attention_heads} attention heads on {ranks.tp} ranks",
            "every rank holds whole heads",
            f"use --tp {max(_divisors(config.num_attention_heads, below=ranks.tp))}",
        )
        return
    if config.n_routed_experts % ranks.ep:
        usable = [n for n in _divisors(ranks.tp, below=ranks.ep) if not config.n_routed_experts % n]
        yield Problem(
            f"{config.n_routed_experts} routed experts in {ranks.ep} groups",
            "every group holds equally many experts",
            f"use --ep {max(usable)}",
        )
    if mtp and 2 * config.hidden_size % ranks.tp:
        yield Problem(
            f"eh_proj with {2 * config.hidden_size} inputs on {ranks.tp} ranks",
            "its inputs are divided among all of them",
            "leave out --mtp",
        )
    yield from _mlp_problems(config, dialect)
    yield from _expert_problems(config, survey, ranks)
    if dialect != "single":
        yield from _tile_problems(config, survey, dialect, ranks, version)


# --- what a model's schemes amount to ---


class _Survey:
    """One pass over the 46,000 linears of a model.

    wrong     (format, reason, what to change) -> the linears that no dialect can hold
    experts   layer -> format -> a routed expert of it
    fused     module of the loader -> format -> one of the linears that it is made of
    tiles     role in attention -> the first linear in FP8 tiles
    """

    def __init__(self, config: ModelConfig, schemes: Mapping[str, Scheme], *, mtp: bool) -> None:
        layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
        self.wrong: dict[tuple[str, str, str], list[str]] = {}
        self.experts: dict[int, dict[str, str]] = {}
        self.fused: dict[str, dict[str, str]] = {}
        self.tiles: dict[str, str] = {}
        for module, scheme in schemes.items():
            if module == HEAD:
                wrong = NO_HEAD, "leave its rule out of the recipe and quantize again"
                self.wrong[(scheme.label, *wrong)] = [module]
                continue
            layer = layer_of(module)
            if layer >= layers:
                continue
            is_expert = ".mlp.experts." in module
            if scheme.is_quantized and (reason := _wrong_format(scheme, is_expert)):
                self.wrong.setdefault((scheme.label, *reason), []).append(module)
            if is_expert:
                self.experts.setdefault(layer, {}).setdefault(scheme.weights, module)
                continue
            parent, _, role = module.rpartition(".")
            if (name := _FUSED_BY_ROLE.get(role)) is not None:
                formats = self.fused.setdefault(f"{parent}.{name}", {})
                formats.setdefault(scheme.weights, module)
            if scheme.weights == "fp8-block" and group_of(module) == "attention":
                self.tiles.setdefault(role, module)

    @property
    def expert_formats(self) -> dict[str, str]:
        """Format -> the first routed expert of it."""
        first: dict[str, str] = {}
        for formats in self.experts.values():
            first = formats | first
        return first


_FUSED_BY_ROLE = {role: name for name, roles in FUSED.items() for role in roles}


def _wrong_format(scheme: Scheme, is_expert: bool) -> tuple[str, str] | None:
    """(reason, what to change) where no dialect can hold a quantized linear."""
    if scheme.weights == "int8-block":
        return NO_INT8_TILES, "use the recipe int8-experts or int4, or serve it with SGLang"
    if scheme.bits == 4 and scheme.activations == "int8":
        return NO_INT4_A8, "use the recipe int4, or serve it with the embedded engine"
    if scheme.activations == "int8":
        return NO_W8A8, "use the recipe int8-experts or int4, or serve it with vLLM"
    if not is_expert:
        return EXPERTS_ONLY, (
            "give every other linear `weights: source`, as the recipes int4 and int8-experts do, "
            "and quantize again"
        )
    if scheme.weights == "int4" and scheme.group_size != TILE:
        return GROUPS_OF_128, f"give them group_size {TILE} and quantize again"
    if not scheme.is_symmetric:
        instead = scheme.weights.removesuffix("-asym")
        return NO_ZERO_POINTS, f"give them `weights: {instead}` and quantize again"
    return None


# --- the parts ---


def _dialect_problems(
    config: ModelConfig, survey: _Survey, dialect: Dialect, *, mtp: bool
) -> Iterator[Problem]:
    formats = survey.expert_formats
    if mtp and not config.num_nextn_predict_layers:
        yield Problem("an MTP layer", "the model has none", "leave out --mtp")
    elif mtp and dialect == "single":
        yield Problem(
            "the MTP layer in the dialect single",
            "its experts stay as released, and all experts have one format there",
            "leave out --mtp, or use --dialect mixed",
        )
    units = {f"the experts of layer {layer}": found for layer, found in survey.experts.items()}
    for unit, found in (units if dialect == "single" else units | survey.fused).items():
        if len(found) > 1:
            yield Problem(
                f"{_formats(found)} in {unit}",
                "it holds them as one module, which has one format",
                "give them one format in the recipe and quantize again",
            )
    if dialect == "released":
        if quantized := set(formats) & {"int4", "int8"}:
            yield Problem(
                f"routed experts as {' and '.join(sorted(quantized))} in the dialect released",
                "it is an unquantized source as it is",
                "use --dialect mixed",
            )
    elif dialect == "single" and not mtp:
        plain = [form for form in ("fp8-block", "bf16") if form in formats]
        if plain:
            yield Problem(
                f"{formats[plain[0]]} as {plain[0]} in the dialect single",
                "it is one quantization, INT4 or INT8, of all routed experts",
                "use --dialect mixed",
            )
        elif len(formats) > 1:
            yield Problem(
                f"{_formats(formats)} in the dialect single",
                "it has one quantization for all routed experts",
                "use --dialect mixed",
            )


def _mlp_problems(config: ModelConfig, dialect: Dialect) -> Iterator[Problem]:
    """It divides these MLPs by whole blocks of the config's group size, which ours gives as 128."""
    if dialect == "released" and config.weight_block_size is None:
        return
    shared = config.moe_intermediate_size * config.n_shared_experts
    has_dense = any(not config.is_moe(layer) for layer in range(config.num_hidden_layers))
    dense = config.intermediate_size if has_dense else 0
    for what, width in (("the shared expert", shared), ("a dense MLP", dense)):
        if width % TILE:
            yield Problem(
                f"{what} {width} wide",
                f"it takes multiples of {TILE} beside quantized linears",
                "serve it with vLLM",
            )


def _expert_problems(config: ModelConfig, survey: _Survey, ranks: RankLayout) -> Iterator[Problem]:
    """Inputs of gate and up are whole on every rank, an expert's inner channels are divided."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    moe_tp = ranks.tp // ranks.ep
    for form in sorted(survey.expert_formats.keys() & _WHOLE.keys()):  # others are named above
        whole = _WHOLE[form]
        if hidden % whole:
            yield Problem(
                f"routed experts with {hidden} inputs as {form}",
                f"its kernels take multiples of {whole}",
                "serve it with vLLM",
            )
        elif width % (moe_tp * whole):
            groups = [
                ep
                for ep in _divisors(ranks.tp, below=ranks.tp + 1)
                if not config.n_routed_experts % ep and not width % (ranks.tp // ep * whole)
            ]
            yield Problem(
                f"routed experts as {form} on --tp {ranks.tp} --ep {ranks.ep}",
                f"{width / moe_tp:g} of an expert's {width} inner channels for each of {moe_tp} "
                f"ranks are no multiple of {whole}",
                f"use --ep {min(groups)}" if groups else "use a smaller --tp",
            )


def _tile_problems(
    config: ModelConfig,
    survey: _Survey,
    dialect: Dialect,
    ranks: RankLayout,
    version: EngineVersion,
) -> Iterator[Problem]:
    """FP8 tiles of attention that would be cut; the first linear of each role stands for all."""
    instead = "use --dialect single" if dialect == "mixed" else "serve it with vLLM"
    # Since 1.3 a release's kv_b_proj is dequantized while it is loaded.
    whole_kv_b = dialect == "mixed" or version == "1.2.1"
    for spec in linears(config, 0):
        module = survey.tiles.get(spec.role)
        if module is None or spec.group != "attention":
            continue
        for what, size, ways in _tiled_dims(config, spec, ranks.tp, whole_kv_b):
            if size % (ways * TILE):
                share = f"{size / ways:g} for each of {ways} ranks" if ways > 1 else str(size)
                usable = [n for n in _divisors(ways, below=ways) if not size % (n * TILE)]
                yield Problem(
                    f"{module} as fp8-block",
                    f"{what}, {share}, are no multiple of {TILE}",
                    f"{instead} or --tp {max(usable)}" if usable else instead,
                )
                break


def _tiled_dims(
    config: ModelConfig, spec: TensorSpec, tp: int, whole_kv_b: bool
) -> list[tuple[str, int, int]]:
    """(what, how many, among how many ranks they are divided) of the dimensions of an attention
    linear that must be whole tiles."""
    outputs, inputs = spec.shape
    match spec.role:
        case "q_a_proj":  # rows and scales of kv_a_proj_with_mqa are appended to its own
            return [("its outputs", outputs, 1)]
        case "q_b_proj" | "q_proj":
            return [("its outputs", outputs, tp)]
        case "o_proj":
            return [("its inputs", inputs, tp)]
        case "kv_b_proj" if whole_kv_b:
            return [
                ("the outputs of a head for keys (qk_nope_head_dim)", config.qk_nope_head_dim, 1),
                ("the outputs of a head for values (v_head_dim)", config.v_head_dim, 1),
                ("its inputs", inputs, 1),
            ]
        case _:
            return []


def _divisors(number: int, *, below: int) -> list[int]:
    return [n for n in range(1, below) if number % n == 0]


def _formats(found: Mapping[str, str]) -> str:
    """`A as int4 and B as int8`."""
    return " and ".join(f"{module} as {form}" for form, module in found.items())


def _counted(modules: list[str]) -> str:
    return modules[0] + f" and {len(modules) - 1} more" * (len(modules) > 1)

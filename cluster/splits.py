"""Whether the number of GPUs cuts what must stay whole: FP8 tiles and groups of inputs.

Tensor parallelism gives each GPU an equal share of a linear's outputs or inputs. vLLM and SGLang
refuse a share that is no multiple of the tile or group (`validate_fp8_block_shape` in both, and
vLLM's WNA16 scheme of compressed-tensors). TensorRT-LLM divides the MLPs among fewer GPUs instead
and has rules of its own, which `build` asks too (`deepseek/trtllm/loadable.py`). Routed experts are
whole on one GPU each, as the plan has them; where the engine's default would cut them, a note says
which option that takes. DeepSeek-V3 and Kimi-K2 can be split over 16 GPUs, but Moonlight's shared
expert, 2816 wide, over 2 only. Called by the planner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cluster.matrix import Refusal, Target
from cluster.memory import Tally, granule
from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.recipe import Scheme
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.loadable import problems
from deepseek.trtllm.versions import VERSIONS, EngineVersion

_MLPS = ("shared_experts", "dense_mlp")
#: Groups of linears that an engine splits over all GPUs.
_SPLIT: dict[Target, tuple[str, ...]] = {
    "vllm": ("attention", *_MLPS),
    "sglang": ("attention", *_MLPS),
}
#: The option that keeps routed experts whole.
_WHOLE_EXPERTS: dict[Target, str] = {
    "trtllm": "build it with --ep {tp}",
    "vllm": "start it with --enable-expert-parallel",
    "sglang": "start it with --ep-size {tp}",
}


def split_refusals(tally: Tally, target: Target, tp: int) -> Iterator[Refusal]:
    """What `target` cannot load because one of `tp` GPUs would get part of a tile or group."""
    for group, split, shape, scheme in tally.linears():
        if group not in _SPLIT.get(target, ()) or split == "replicated":
            continue
        size, unit = (shape[0], "outputs") if split == "column" else (shape[1], "inputs")
        whole = granule(scheme, split)
        if _is_cut(size, whole, tp):
            most = max(n for n in range(1, tp) if tp % n == 0 and not _is_cut(size, whole, n))
            yield Refusal(
                target,
                f"{group} with {size} {unit} as {scheme.label} on {tp} GPUs",
                f"{size / tp:g} {unit} for each do not make whole {_pieces(scheme.weights)} of "
                f"{whole}",
                f"Use {most} GPU{'s' * (most > 1)}, or another format for these linears in the "
                "recipe",
                "read",
            )


def trtllm_refusals(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    dialect: Dialect,
    tp: int,
    *,
    mtp: bool,
    version: EngineVersion = VERSIONS[0],
) -> list[Refusal]:
    """The same for TensorRT-LLM, with whole experts on `tp` GPUs. `schemes` are the recipe's."""
    ranks = RankLayout(tp=tp, ep=math.gcd(tp, config.n_routed_experts))
    found = problems(config, schemes, dialect, ranks, mtp=mtp, version=version)
    return [
        Refusal(
            "trtllm", problem.part, problem.reason, _sentence_case(problem.change), problem.evidence
        )
        for problem in found
    ]


def split_notes(tally: Tally, target: Target, tp: int) -> Iterator[str]:
    """The option without which the engine would cut routed experts, where it would."""
    for group, _, shape, scheme in tally.linears():
        whole = granule(scheme, "row")
        width = shape[1]
        is_down = width != tally.config.hidden_size
        option = _WHOLE_EXPERTS.get(target)
        if option and group == "routed_experts" and is_down and _is_cut(width, whole, tp):
            yield (
                f"{target}: {option.format(tp=tp)}, because an "
                f"expert's {width} inputs over {tp} GPUs do not make whole "
                f"{_pieces(scheme.weights)} of {whole}"
            )
            return


def _sentence_case(words: str) -> str:
    return words[0].upper() + words[1:]


def _is_cut(size: int, whole: int, tp: int) -> bool:
    return size % (tp * whole) != 0


def _pieces(weights: str) -> str:
    return "tiles" if weights in ("fp8-block", "int8-block") else "groups"

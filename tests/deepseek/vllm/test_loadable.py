"""What vLLM cannot load is refused before a byte is written, with what to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.synthetic import config_dict
from support.vllm_builds import SHAPE

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import linears
from deepseek.recipe import Scheme
from deepseek.vllm.loadable import problems, require_ranks

FP8, INT8_ASYM = Scheme(weights="fp8-block"), Scheme(weights="int8-asym")
INT4 = Scheme(weights="int4", group_size=128)


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**(SHAPE | changes)))


def first(
    config: ModelConfig,
    experts: Scheme,
    rest: Scheme = FP8,
    *,
    tp: int = 2,
    ep: int = 2,
    generation: str = "sm90",
    **more: Scheme,
) -> str:
    schemes = {
        spec.module: more.get(spec.role, experts if spec.expert is not None else rest)
        for layer in range(config.num_layers_with_mtp)
        for spec in linears(config, layer)
    }
    ranks = RankLayout(tp=tp, ep=ep)
    found = problems(config, schemes, ranks, mtp=False, generation=generation)
    return next((problem.sentence() for problem in found), "")


def test_what_loads_has_no_problem() -> None:
    for experts in (INT4, Scheme(weights="int8"), FP8, Scheme(weights="bf16")):
        for ep in (1, 2):
            assert first(model(), experts, ep=ep) == ""


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("refuses static ones; use the recipe int4", {
            "experts": Scheme(weights="int4", group_size=128, activations="fp8")}),
        ("takes zero points of 4 bits only; give it `weights: int8`", {"experts": INT8_ASYM}),
        ("takes outputs in multiples of 128", {
            "experts": INT4, "q_a_proj": INT8_ASYM, "kv_a_proj_with_mqa": INT8_ASYM}),
        ("kernels for Ampere take zero points of 4 bits", {
            "experts": INT4, "o_proj": INT8_ASYM, "generation": "sm80"}),
        ("gate_up_proj as one module, which has one format", {
            "experts": INT4, "gate_proj": INT4}),
        ("4 attention heads on 8 ranks: every rank holds whole heads; use --tp 4", {
            "experts": INT4, "tp": 8, "ep": 8}),
    ],
)  # fmt: skip
def test_a_refusal_names_the_part_the_reason_and_the_change(
    sentence: str, arguments: dict[str, Any]
) -> None:
    assert sentence in first(model(), **arguments)


def test_experts_that_ranks_would_cut_inside_a_group_ask_for_expert_parallelism() -> None:
    config = model(moe_intermediate_size=128)
    assert first(config, INT4, ep=2, rest=Scheme(weights="bf16")) == ""
    found = first(config, INT4, ep=1, rest=Scheme(weights="bf16"))
    assert "64 for each of 2 ranks, are no multiple of 128; use --ep equal to --tp" in found


def test_fp8_tiles_that_ranks_would_cut_name_the_number_of_ranks_that_fits() -> None:
    config = model(qk_rope_head_dim=32)
    assert "320 for each of 2 ranks, are no multiple of 128; use --tp 1" in first(config, INT4)
    assert first(config, INT4, tp=1, ep=1) == ""


def test_a_hidden_size_that_packed_experts_cannot_have_is_refused() -> None:
    config = replace(model(), hidden_size=192)
    group = Scheme(weights="int4", group_size=64)
    assert "hidden size in multiples of 128, not 192" in first(config, group, group)


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [(8, 4, "neither 1 nor --tp 8"), (0, 1, "at least 1"), (2, 3, "use --ep 2 or --ep 1")],
)
def test_experts_are_divided_over_all_ranks_or_inside_each(tp: int, ep: int, words: str) -> None:
    with pytest.raises(DeployError, match=words):
        require_ranks(tp, ep)
    assert require_ranks(8, 1) == RankLayout(tp=8, ep=1)

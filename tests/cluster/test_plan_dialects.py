"""Plans for TensorRT-LLM: what both dialects cost, which loads, and where INT8 fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.plans import command, plan_v3

from deepseek.errors import DeployError


@pytest.mark.heavy
def test_for_tensorrt_llm_the_plan_shows_what_both_dialects_cost() -> None:
    words = ("--model", "deepseek-v3", "--recipe", "int4", "--hardware", "8xH800-80GB")
    mixed = json.loads(command(*words, "--json")[1])
    single = json.loads(command(*words, "--dialect", "single", "--json")[1])
    assert (mixed["dialect"], single["dialect"]) == ("mixed", "single")
    assert mixed["dialects"] == single["dialects"]
    assert mixed["dialects"] == [
        {
            "name": "mixed",
            "weights_gb": pytest.approx(356.3, rel=0.001),
            "weights_gb_per_gpu": pytest.approx(47.15, abs=0.01),
            # 15.16 B parameters outside experts, embedding and head, one byte and 0.02 % of scales
            "dense_gb": pytest.approx(15.16, rel=0.001),
            "dense_gb_per_gpu": pytest.approx(2.70, abs=0.01),
            "fits": True,
            "loads": True,
        },
        {
            "name": "single",
            "weights_gb": pytest.approx(371.4, rel=0.001),
            "weights_gb_per_gpu": pytest.approx(49.85, abs=0.01),
            "dense_gb": pytest.approx(2 * 15.16, rel=0.001),
            "dense_gb_per_gpu": pytest.approx(5.40, abs=0.01),
            "fits": True,
            "loads": True,
        },
    ]
    for answer, other in ((mixed, 0), (single, 1)):
        for key in ("weights_gb", "weights_gb_per_gpu"):
            assert answer[key] == answer["dialects"][other][key]
    assert mixed["kv_tokens"] > single["kv_tokens"]
    out = command(*words)[1]
    assert (
        "Dialect single: 371.4 GB of weights, 49.9 GB per GPU, fits; every decoding step reads "
        "30.3 GB of dense linears, 5.4 GB per GPU."
    ) in " ".join(out.split())
    assert "Dialect mixed (planned here): 356.3 GB" in out


def test_what_only_one_dialect_can_be_cut_into_is_planned_in_that_one(tiny_model: Path) -> None:
    """Its heads have 64 dimensions, so that FP8 tiles of kv_b_proj would be cut."""
    words = ("--model", str(tiny_model), "--recipe", "int4", "--hardware", "2xH800-80GB")
    words = (*words, "--target", "trtllm")
    code, out = command(*words)
    assert code == 1
    assert "2 ranks, are no multiple of 128. Use --dialect single or --tp 1." in " ".join(
        out.split()
    )
    code, out = command(*words, "--dialect", "single", "--json")
    answer = json.loads(out)
    assert (code, answer["refusals"]) == (0, [])
    assert [(d["name"], d["loads"]) for d in answer["dialects"]] == [
        ("mixed", False),
        ("single", True),
    ]


def test_a_recipe_that_quantizes_nothing_is_a_release(tmp_path: Path) -> None:
    recipe = tmp_path / "as-released.yaml"
    recipe.write_text(
        "name: as-released\ndescription: none\nrules: [{match: '*', weights: source}]\n"
        "gate: {max_perplexity_ratio: 1.1, max_mean_kl: 0.1, min_top1: 0.5}\n"
    )
    words = ("--model", "deepseek-v3", "--recipe", str(recipe), "--hardware", "8xH200", "--json")
    answer = json.loads(command(*words)[1])
    assert (answer["target"], answer["dialect"]) == ("trtllm", "released")
    assert [dialect["name"] for dialect in answer["dialects"]] == ["released"]


@pytest.mark.heavy
def test_int8_experts_put_int8_on_one_node_of_96_or_141_gb_cards_or_on_two_of_80() -> None:
    fits = {
        hardware: plan_v3("int8-experts", hardware).good
        for hardware in ("8xH800-80GB", "8xH20-96GB", "8xH200-141GB", "16xH800-80GB")
    }
    assert fits == {
        "8xH800-80GB": False,
        "8xH20-96GB": True,
        "8xH200-141GB": True,
        "16xH800-80GB": True,
    }
    assert plan_v3("int8-experts", "8xH200-141GB").target == "trtllm"


def test_a_dialect_for_another_target_is_refused() -> None:
    words = ("--model", "deepseek-v3", "--recipe", "int4", "--hardware", "8xH800-80GB")
    with pytest.raises(
        DeployError, match="--dialect is of --target trtllm and sglang; leave it out for vllm"
    ):
        command(*words, "--target", "vllm", "--dialect", "single")

"""`plan --slo`: what it recommends, holds, and refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.plans import command, recipe_of

from cluster.hardware import GPUS
from cluster.slo import (
    MARGINS,
    Fleet,
    Slo,
    Workload,
    check_workload,
    parse_slo,
    recommend,
    show_time,
)
from deepseek.errors import DeployError
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, load_recipe

#: DeepSeek-V3 with few layers and experts: its tensors are counted in milliseconds.
SMALL = replace(DEEPSEEK_V3, num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=32)
RECIPES = [
    recipe_of(),
    recipe_of({"match": "*", "weights": "bf16"}).model_copy(update={"name": "bf16"}),
]
SLO = Slo(ttft_s=0.5, tpot_s=0.01)
LOAD = Workload(rps=200.0, isl=1024, osl=256)


def fleets_of(
    slo: Slo = SLO,
    workload: Workload = LOAD,
    recipes: list[Recipe] = RECIPES,
    gpu: str = "H200-141GB",
    **options: int | str,
) -> list[Fleet]:
    return recommend(SMALL, recipes, GPUS[gpu], slo, workload, **options)


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=2s,tpot=50ms", Slo(2.0, 0.05)),
        ("tpot=0.05s, ttft=2000ms", Slo(2.0, 0.05)),
        ("ttft=1.5s,tpot=12.5ms", Slo(1.5, 0.0125)),
    ],
)
def test_a_target_is_two_times_in_either_order(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no target; write ttft=TIME,tpot=TIME, as in ttft=2s,tpot=50ms"),
        ("ttft=2s", "tpot is missing; write ttft=TIME,tpot=TIME"),
        ("tpot=50ms", "ttft is missing"),
        ("ttft=2s,tpot=50ms,ttft=3s", "ttft is there twice; give it once"),
        ("ttft=2s,itl=50ms", "itl=50ms is no target"),
        ("ttft=2s tpot=50ms", "ttft must be a time above 0 and up to a day in s or ms"),
        ("ttft=2,tpot=50ms", "ttft must be a time above 0 and up to a day in s or ms, as in 2s or"),
        ("ttft=2s,tpot=0ms", "tpot must be a time above 0"),
        ("ttft=-2s,tpot=50ms", "ttft must be a time above 0"),
        ("ttft=nans,tpot=50ms", "ttft must be a time above 0"),
        ("ttft=1e3s,tpot=50ms", "ttft must be a time above 0"),
        ("ttft=90000s,tpot=50ms", "ttft must be a time above 0 and up to a day"),
        ("ttft=\u0662s,tpot=50ms", "ttft must be a time above 0"),
        ("ttft=2s,tpot", "tpot is no target"),
        ("ttft=2s,tpot=50ms,", "is no target"),
    ],
)
def test_no_target_gets_one_sentence(text: str, words: str) -> None:
    with pytest.raises(DeployError) as caught:
        parse_slo(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith("--slo ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, 1, 1), "--slo needs --rps too"),
        ((1.0, None, None), "--slo needs --isl and --osl too"),
        ((0.0, 1, 1), "--rps must be above 0 and up to 100000, not 0"),
        ((-1.0, 1, 1), "--rps must be above 0"),
        ((math.nan, 1, 1), "--rps must be above 0 and up to 100000, not nan"),
        ((math.inf, 1, 1), "--rps must be above 0 and up to 100000, not inf"),
        ((1.0, 0, 1), "--isl must be at least 1, not 0"),
        ((1.0, 1, -3), "--osl must be at least 1, not -3"),
    ],
)
def test_no_workload_gets_one_sentence(
    given: tuple[float | None, int | None, int | None], words: str
) -> None:
    with pytest.raises(DeployError) as caught:
        check_workload(*given)
    assert words in str(caught.value)


def test_what_is_recommended_holds_the_target_and_no_larger_batch_would() -> None:
    best = fleets_of()[0]
    isl, osl = LOAD.isl, LOAD.osl
    assert best.full_tpot_s <= SLO.tpot_s
    assert best.ttft_s <= SLO.ttft_s
    assert best.limited_by == "tpot"
    assert (1 + best.margin) * best.speed.tpot_s(best.batch + 1, isl, osl) > SLO.tpot_s
    assert best.full_tpot_s == pytest.approx(
        (1 + best.margin) * best.speed.tpot_s(best.batch, isl, osl)
    )
    # Little's law: as many run as arrive during one's time.
    service = best.prefill_s + osl * best.tpot_s
    assert best.running == pytest.approx(LOAD.rps / best.replicas * service, rel=0.01)
    assert best.running < best.batch
    assert best.plan.loads


def test_the_time_to_the_first_token_is_the_sum_of_its_parts() -> None:
    best = fleets_of()[0]
    step = (1 + best.margin) * best.speed.decode_s(best.batch, LOAD.isl + LOAD.osl / 2)
    parts = best.wait_s + best.prefill_wait_s + best.prefill_s + step
    assert best.ttft_s == pytest.approx(parts)


def test_more_requests_and_tighter_targets_never_need_fewer_gpus() -> None:
    def gpus(slo: Slo = SLO, rps: float = 200.0) -> int:
        return min(fleet.gpus for fleet in fleets_of(slo, replace(LOAD, rps=rps)))

    by_rate = [gpus(rps=rps) for rps in (1, 50, 200, 1000, 5000)]
    assert by_rate == sorted(by_rate)
    assert by_rate[-1] > by_rate[0]
    by_tpot = [gpus(Slo(0.5, ms / 1000)) for ms in (50, 10, 5, 2)]
    assert by_tpot == sorted(by_tpot)
    by_ttft = [gpus(Slo(ms / 1000, 0.01)) for ms in (2000, 500, 150, 110)]
    assert by_ttft == sorted(by_ttft)


def test_of_equal_nodes_the_most_precise_recipe_comes_first() -> None:
    found = fleets_of(workload=replace(LOAD, rps=1.0))
    assert [fleet.plan.recipe for fleet in found] == ["bf16", "test"]
    assert {fleet.nodes for fleet in found} == {1}
    fewest = fleets_of(workload=replace(LOAD, rps=5000.0))
    assert [fleet.nodes for fleet in fewest] == sorted(fleet.nodes for fleet in fewest)


def test_small_replicas_share_a_node() -> None:
    best = fleets_of(workload=replace(LOAD, rps=1.0))[0]
    on_four = replace(best.speed, layout=replace(best.speed.layout, gpus=4))
    for replicas, nodes in ((1, 1), (2, 1), (3, 2)):
        assert replace(best, speed=on_four, replicas=replicas).nodes == nodes


@pytest.mark.parametrize(
    ("slo", "words"),
    [
        (Slo(2.0, 1e-4), "--slo tpot=0.1ms cannot be held on H200-141GB by any number of replicas"),
        (Slo(0.001, 0.05), "--slo ttft=1ms cannot be held on H200-141GB by any number of replicas"),
    ],
)
def test_an_impossible_target_is_refused_with_its_limit(slo: Slo, words: str) -> None:
    with pytest.raises(DeployError) as caught:
        fleets_of(slo)
    sentence = str(caught.value)
    assert words in sentence
    assert ", most of it " in sentence
    # What the sentence offers is held.
    name, _, offered = sentence.rpartition("ask for ")[2].removesuffix(" or more").partition("=")
    other = {"ttft": "2s", "tpot": "50ms"} | {name: offered}
    assert fleets_of(parse_slo(f"ttft={other['ttft']},tpot={other['tpot']}"))


def test_more_than_there_are_is_refused_with_what_is_needed() -> None:
    heavy = replace(LOAD, rps=5000.0)
    needed = fleets_of(workload=heavy)[0].gpus
    with pytest.raises(DeployError, match=r"--rps 5000 needs [\d,]+ GPUs with recipe .*8xH200"):
        fleets_of(workload=heavy, most_gpus=8)
    assert fleets_of(workload=heavy, most_gpus=needed)


def test_requests_longer_than_the_cache_or_the_model_are_refused() -> None:
    with pytest.raises(DeployError, match="--context must be 1 to 163840, the model's limit"):
        fleets_of(workload=Workload(1.0, 163_840, 1))
    wide = replace(SMALL, num_hidden_layers=400)
    with pytest.raises(DeployError, match=r"no replica of up to 32 A100-80GB holds one request of"):
        recommend(
            wide, RECIPES[1:], GPUS["A100-80GB"], SLO, Workload(1.0, 160_000, 100), target="vllm"
        )


def test_formats_that_no_target_loads_are_refused_with_the_reason() -> None:
    w4a8 = recipe_of({"match": "*", "weights": "int4", "group_size": 128, "activations": "fp8"})
    with pytest.raises(DeployError, match="no target loads any of these recipes on A100-80GB: "):
        fleets_of(recipes=[w4a8], gpu="A100-80GB")


def test_times_are_shown_as_they_are_read() -> None:
    for seconds in (0.0004, 0.0123, 0.9, 1.24, 75.0):
        shown = show_time(seconds, up=True)
        offered = parse_slo(f"ttft={shown},tpot=1s").ttft_s
        assert offered >= seconds
        assert offered == pytest.approx(seconds, abs=0.01 if seconds > 1 else 1e-4)
    assert [show_time(s) for s in (2.0, 0.05, 1.239)] == ["2s", "50ms", "1.24s"]


WORDS = ("--hardware", "H200", "--slo", "ttft=1s,tpot=20ms", "--rps", "5")
LENGTHS = ("--isl", "64", "--osl", "32")


def test_the_json_has_its_keys(tiny_model: Path) -> None:
    code, out = command("--model", str(tiny_model), *WORDS, *LENGTHS, "--json")
    answer = json.loads(out)
    assert code == 0
    fleet = {
        *("nodes", "gpus", "replicas", "gpus_per_replica", "recipe", "target", "engine_version"),
        *("dialect", "attention", "expert_parallel", "max_requests", "limited_by", "tpot_ms"),
        *("mean_requests", "full_tpot_ms", "ttft_ms", "place_wait_ms", "prefill_wait_ms"),
        "prefill_ms",
    }
    asked = {"model", "hardware", "slo", "rps", "isl", "osl", "alternatives", "assumptions"}
    assert set(answer) == fleet | asked
    assert all(set(other) == fleet for other in answer["alternatives"])
    assert (answer["nodes"], answer["hardware"]) == (1, "H200-141GB")
    assert answer["slo"] == {"ttft_ms": 1000.0, "tpot_ms": 20.0}
    assert answer["assumptions"]["margin"] in MARGINS.values()
    assert set(answer["assumptions"]["efficiency"]) >= {"memory", "layer_s"}
    assert "int8" in {answer["recipe"], *(other["recipe"] for other in answer["alternatives"])}


def test_one_recipe_can_be_asked_about(tiny_model: Path) -> None:
    words = ("--model", str(tiny_model), *WORDS, *LENGTHS, "--recipe", "int8", "--target", "vllm")
    code, out = command(*words)
    assert code == 0
    assert "Use 1 node: 1 replica of " in out.replace("\n", " ")
    assert "recipe int8, target vllm" in out.replace("\n", " ")
    assert "Erlang C" in out.replace("\n", " ")
    assert "Nothing was measured here" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--isl", "64"), "--slo needs --osl too"),
        ((*LENGTHS, "--context", "9"), "--slo plans for --isl + --osl tokens; leave --context out"),
        ((*LENGTHS, "--concurrency", "9"), "--slo works out how many requests run at once; leave"),
        ((*LENGTHS, "--mtp"), "--slo knows nothing of speculation; leave --mtp out"),
        ((*LENGTHS, "--hardware", "cpu"), "--slo is about GPUs"),
        ((*LENGTHS, "--hardware", "12xH200"), "12 GPUs are neither part of one node"),
        ((*LENGTHS, "--recipe", "int3"), "no recipe 'int3'"),
        ((*LENGTHS, "--target", "tgi"), "target 'tgi' is unknown"),
    ],
)
def test_a_mistake_beside_slo_gets_one_sentence(
    more: tuple[str, ...], words: str, tiny_model: Path
) -> None:
    with pytest.raises(DeployError if "int3" not in more else Exception) as caught:
        command("--model", str(tiny_model), *WORDS, *more)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--rps", "3"), "--rps is about --slo; add that, or leave --rps out"),
        (("--isl", "3"), "--isl is about --slo"),
        ((), "--recipe is missing; name one, or a latency target with --slo"),
    ],
)
def test_without_slo_its_options_mean_nothing_and_a_recipe_is_needed(
    words: tuple[str, ...], sentence: str, tiny_model: Path
) -> None:
    with pytest.raises(DeployError) as caught:
        command("--model", str(tiny_model), "--hardware", "8xH200", *words)
    assert str(caught.value).startswith(sentence)


@pytest.mark.heavy
def test_deepseek_v3_on_h800_needs_more_nodes_in_int8_than_in_int4() -> None:
    recipes = [load_recipe(name) for name in ("int8", "int4")]
    found = recommend(
        DEEPSEEK_V3, recipes, GPUS["H800-80GB"], Slo(2.0, 0.05), Workload(20.0, 2048, 512)
    )
    nodes = {fleet.plan.recipe: fleet.nodes for fleet in found}
    assert 1 <= nodes["int4"] < nodes["int8"] <= 20
    with pytest.raises(
        DeployError, match=r"--slo tpot=5ms .*the fixed cost of layers; ask for tpo"
    ):
        recommend(DEEPSEEK_V3, recipes, GPUS["H800-80GB"], Slo(2.0, 0.005), Workload(1.0, 64, 64))

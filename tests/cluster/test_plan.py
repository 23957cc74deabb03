"""Plans: the six combinations, what would fit instead, properties, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import command, plan_v3, recipe_of
from support.synthetic import V3_2, config_dict

from cluster.hardware import GPUS
from cluster.plan import better_recipes
from deepseek.errors import DeployError, IntServeError
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import load_recipe

#: (recipe, GPUs) -> fits, chosen target, and whom `auto` passed over.
COMBINATIONS = {
    ("int8", 8): (False, "vllm", {"trtllm"}),
    ("int8", 16): (True, "vllm", {"trtllm"}),
    ("int4", 8): (True, "trtllm", set()),
    ("int4", 16): (True, "trtllm", set()),
    ("int8-weight-only", 8): (False, "vllm", {"trtllm"}),
    ("int8-weight-only", 16): (True, "vllm", {"trtllm"}),
    ("int8-experts", 8): (False, "trtllm", set()),
    ("int8-experts", 16): (True, "trtllm", set()),
}


@pytest.mark.heavy
@pytest.mark.parametrize(("recipe", "gpus"), COMBINATIONS)
def test_the_combinations_on_h800(recipe: str, gpus: int) -> None:
    fits, target, passed_over = COMBINATIONS[recipe, gpus]
    plan = plan_v3(recipe, f"{gpus}xH800-80GB")
    assert (plan.fits, plan.loads, plan.target) == (fits, True, target)
    assert {refusal.target for refusal in plan.refusals} == passed_over
    assert plan.smallest_fit is not None
    assert plan.smallest_fit.gpus == (8 if recipe == "int4" else 16)
    assert (plan.kv_tokens > 0) == fits


@pytest.mark.heavy
def test_int8_on_one_node_exits_1_and_says_that_16_gpus_are_needed() -> None:
    code, out = command("--model", "deepseek-v3", "--recipe", "int8", "--hardware", "8xH800-80GB")
    assert code == 1
    assert "Does not fit: 85.2 GB of weights per GPU, 78.7 GB usable." in out
    assert "16 GPUs are needed: 16xH800-80GB, 43.2 GB of weights per GPU" in out
    assert "8xH800-80GB holds the recipe int4 (47.1 GB)" in out
    assert "trtllm cannot load every linear as int8-a8" in out


def test_int4_on_one_node_exits_0() -> None:
    code, out = command("--model", "deepseek-v3", "--recipe", "int4", "--hardware", "8xH800-80GB")
    assert code == 0
    assert "Fits: 47.1 GB of weights per GPU" in out
    assert "W4AFP8" in out


@pytest.mark.heavy
def test_a_recipe_that_fits_but_is_refused_exits_1_and_says_both() -> None:
    words = ("--model", "deepseek-v3", "--recipe", "int8", "--hardware", "16xH800-80GB")
    code, out = command(*words, "--target", "trtllm")
    assert code == 1
    assert "Fits: 45.0 GB" in out  # the embedding is whole on every GPU
    assert "Refused" in out
    assert "Recipes that fit and load here: int8-experts, int4, w4a8." in out
    assert command(*words)[0] == 0  # `auto` finds vLLM


JSON_KEYS = {
    "model": str,
    "recipe": str,
    "hardware": str,
    "target": str,
    "engine_version": str,
    "dialect": type(None),
    "fits": bool,
    "loads": bool,
    "gpus": int,
    "context": int,
    "concurrency": int,
    "mtp": bool,
    "kv_cache": str,
    "kv_layout": str,
    "weights_gb": float,
    "weights_gb_per_gpu": float,
    "workspace_gb_per_gpu": float,
    "usable_gb_per_gpu": float,
    "kv_bytes_per_token": int,
    "kv_gb_per_gpu": float,
    "kv_tokens": int,
    "max_concurrency": int,
    "groups": list,
    "dialects": list,
    "smallest_fit": dict,
    "fitting_recipes": list,
    "refusals": list,
    "warnings": list,
}


@pytest.mark.heavy
def test_the_json_keys_are_frozen() -> None:
    code, out = command(
        *("--model", "deepseek-v3", "--recipe", "int8", "--hardware", "8xH800-80GB", "--json")
    )
    answer = json.loads(out)
    assert code == 1
    assert {key: type(value) for key, value in answer.items()} == JSON_KEYS
    assert answer["smallest_fit"].keys() == {"gpus", "hardware", "weights_gb_per_gpu"}
    assert answer["smallest_fit"]["gpus"] == 16
    assert answer["refusals"][0].keys() == {"target", "part", "reason", "change", "evidence"}
    assert all(
        group.keys() == {"name", "total_gb", "per_gpu_gb", "loaded"} for group in answer["groups"]
    )
    assert answer["fitting_recipes"] == ["int4", "w4a8", "int4-asym", "int4-all"]
    loaded = sum(group["total_gb"] for group in answer["groups"] if group["loaded"])
    assert loaded == pytest.approx(answer["weights_gb"], abs=0.01)


@pytest.mark.heavy
def test_the_command_runs_as_a_user_runs_it(tiny_model: Path, tmp_path: Path) -> None:
    """The real process: no error on stdout, one line on stderr, exit code 2 for a mistake."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster", "plan", *words],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )

    good = run("--model", str(tiny_model), "--recipe", "int8", "--hardware", "cpu")
    assert good.returncode == 0, good.stderr
    assert "Target: embedded" in good.stdout
    bad = run("--model", str(tmp_path), "--recipe", "int8", "--hardware", "cpu")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--hardware", "8xT4"), "'8xT4'?: 'T4' is unknown"),
        (("--target", "tgi"), "target 'tgi' is unknown; use one of trtllm, vllm, sglang, "),
        (("--dialect", "fp4"), "--dialect fp4 is unknown; use one of trtllm: mixed, single; "),
        (("--dialect", "released"), "--dialect released is unknown; use one of trtllm: mixed, "),
        (("--recipe", "int3"), "no recipe 'int3'; use a YAML file or one of int4"),
        (("--context", "0"), "--context must be 1 to 163840, the model's limit, not 0"),
        (("--context", "200000"), "--context must be 1 to 163840"),
        (("--concurrency", "0"), "--concurrency must be at least 1, not 0"),
        (("--hardware", "24xH800-80GB"), "cannot be split over 24 GPUs; use 16 or 32"),
        (("--model", "/nowhere"), "/nowhere/config.json cannot be read"),
    ],
)
def test_bad_input_gets_one_sentence(words: tuple[str, str], sentence: str) -> None:
    given_words = {"--model": "deepseek-v3", "--recipe": "int4", "--hardware": "8xH800-80GB"}
    given_words |= {words[0]: words[1]}
    with pytest.raises(IntServeError) as caught:
        command(*(part for pair in given_words.items() for part in pair))
    assert sentence.replace("'8xT4'?: ", "") in str(caught.value)
    assert "\n" not in str(caught.value)


def v3_2(directory: Path) -> Path:
    """A directory with the config of a small DeepSeek-V3.2: 256 positions, index_topk 64."""
    (directory / "config.json").write_text(json.dumps(config_dict(**V3_2)))
    return directory


def test_on_the_target_embedded_the_context_ends_where_attention_becomes_sparse(
    tmp_path: Path,
) -> None:
    words = ("--model", str(v3_2(tmp_path)), "--recipe", "int8", "--hardware", "cpu")
    code, out = command(*words, "--json")
    answer = json.loads(out)
    assert (code, answer["context"], answer["target"]) == (0, 64, "embedded")
    assert answer["warnings"] == [
        "the embedded engine leaves the indexer out and serves 64 tokens of context, up to which "
        "attention is dense, not 256"
    ]
    assert "indexer" not in {group["name"] for group in answer["groups"]}
    for more in ((), ("--target", "embedded")):
        with pytest.raises(DeployError) as caught:
            command(*words, "--context", "65", *more)
        assert str(caught.value) == (
            "--context 65 is more than the 64 tokens (index_topk) within which DeepSeek-V3.2's "
            "attention is dense, which is all that IntServe computes; lower it, or plan for GPUs, "
            "whose engines have sparse attention"
        )
    with pytest.raises(DeployError, match="--context must be 1 to 64, the model's limit, not 257"):
        command(*words, "--context", "257")


def test_on_gpus_deepseek_v3_2_has_its_whole_context_and_a_line_for_the_indexer(
    tmp_path: Path,
) -> None:
    words = ("--model", str(v3_2(tmp_path)), "--recipe", "int8", "--hardware", "2xH800-80GB")
    code, out = command(*words, "--context", "256", "--json")
    answer = json.loads(out)
    assert (code, answer["context"], answer["target"]) == (0, 256, "vllm")
    assert [group["name"] for group in answer["groups"]][2:4] == ["attention", "indexer"]
    # 2 layers, each a latent of 128 + 32 BF16 values and a key of 64 FP8 values with one scale.
    assert answer["kv_bytes_per_token"] == 2 * (2 * (128 + 32) + 64 + 4)
    table = command(*words, "--context", "256")[1]
    assert "│ indexer " in table


@pytest.mark.parametrize("hardware", ["2xH800-80GB", "cpu"])
def test_a_model_without_an_indexer_has_no_line_for_one(hardware: str, tiny_model: Path) -> None:
    words = ("--model", str(tiny_model), "--recipe", "int8", "--hardware", hardware)
    groups = [group["name"] for group in json.loads(command(*words, "--json")[1])["groups"]]
    assert groups == [
        *("routed_experts", "shared_experts", "attention", "dense_mlp", "embeddings", "router"),
        *("norms", "scales", "mtp"),
    ]


def test_a_model_on_more_gpus_than_heads_is_refused(tiny_model: Path) -> None:
    with pytest.raises(DeployError, match="4 attention heads cannot be split over 8 GPUs; use 4"):
        command("--model", str(tiny_model), "--recipe", "int4", "--hardware", "8xH800-80GB")


def test_on_the_cpu_only_the_embedded_engine_is_considered(tiny_model: Path) -> None:
    words = ("--model", str(tiny_model), "--recipe", "int4-asym", "--hardware", "cpu")
    code, out = command(*words, "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["target"], answer["gpus"], answer["refusals"]) == ("embedded", 0, [])
    code, out = command(*words, "--target", "vllm")
    assert code == 1
    assert "Use Hopper GPUs or --target embedded." in out
    code, out = command(*words, "--mtp")
    assert code == 1
    assert "Leave out --mtp" in out


@pytest.mark.heavy
def test_more_tokens_than_any_number_of_gpus_holds() -> None:
    """The cache is replicated, so GPUs do not help; the plan says what does."""
    words = ("--model", "deepseek-v3", "--recipe", "int4", "--hardware", "8xH800-80GB")
    code, out = command(*words, "--context", "131072", "--concurrency", "100")
    assert code == 1
    assert "lower --concurrency and run more replicas" in out
    assert plan_v3("int4", "8xH800-80GB", context=131072, concurrency=100).smallest_fit is None


@pytest.mark.heavy
def test_alternatives_fit_load_and_are_ordered_by_precision() -> None:
    plan = plan_v3("int8", "8xH800-80GB")
    others = [load_recipe(name) for name in ("int4-all", "int4-asym", "int4", "int8")]
    found = better_recipes(plan, DEEPSEEK_V3, others)
    assert [other.recipe for other in found] == ["int4", "int4-asym", "int4-all"]
    assert all(other.good for other in found)
    assert better_recipes(plan_v3("int4", "8xH800-80GB"), DEEPSEEK_V3, others) == []


RECIPES = [load_recipe("int8"), load_recipe("int4"), recipe_of()]
COUNTS = [1, 2, 4, 8, 16, 32, 64]
asked = {
    "recipe": st.sampled_from(RECIPES),
    "gpu": st.sampled_from(sorted(GPUS)),
    "context": st.integers(1, 163840),
    "concurrency": st.integers(1, 200),
}


@pytest.mark.heavy
@settings(max_examples=60, deadline=None)
@given(**asked)
def test_more_gpus_never_fit_less(recipe, gpu: str, context: int, concurrency: int) -> None:
    plans = [
        plan_v3(recipe, f"{n}x{gpu}", context=context, concurrency=concurrency) for n in COUNTS
    ]
    tokens = [plan.kv_tokens for plan in plans]
    assert tokens == sorted(tokens)
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits)
    assert all(p.footprint.weights_per_gpu * p.machines.count >= p.footprint.weights for p in plans)


@settings(max_examples=60, deadline=None)
@given(**asked)
@pytest.mark.heavy
def test_the_smallest_fit_fits_and_nothing_smaller_does(
    recipe, gpu: str, context: int, concurrency: int
) -> None:
    wanted = {"context": context, "concurrency": concurrency}
    plan = plan_v3(recipe, f"8x{gpu}", **wanted)
    if plan.smallest_fit is None:
        assert not plan_v3(recipe, f"128x{gpu}", **wanted).fits
        return
    assert plan_v3(recipe, plan.smallest_fit.hardware, **wanted).fits
    assert plan.fits == (plan.smallest_fit.gpus == 8)
    if plan.smallest_fit.gpus > 8:
        assert not plan_v3(recipe, f"{plan.smallest_fit.gpus // 2}x{gpu}", **wanted).fits


@pytest.mark.heavy
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RECIPES), st.integers(1, 163840), st.integers(1, 163840))
def test_a_longer_context_never_raises_the_concurrency(recipe, one: int, other: int) -> None:
    short, long = sorted((one, other))
    at = {c: plan_v3(recipe, "16xH800-80GB", context=c) for c in (short, long)}
    assert at[long].max_concurrency <= at[short].max_concurrency
    assert at[long].max_concurrency * long <= at[long].kv_tokens


@pytest.mark.heavy
def test_a_smaller_kv_format_holds_more_tokens() -> None:
    rules = [{"match": "*", "weights": "source"}]
    plans = [
        plan_v3(recipe_of(*rules, kv_cache=form), "16xH800-80GB", target="vllm")
        for form in ("bf16", "fp8", "int8")
    ]
    tokens = [plan.kv_tokens for plan in plans]
    sizes = [plan.footprint.kv_bytes_per_token for plan in plans]
    assert sizes[1] < sizes[0]
    assert tokens[1] / tokens[0] == pytest.approx(sizes[0] / sizes[1], rel=0.01)
    assert [plan.good for plan in plans] == [True, True, False]  # no GPU target has an INT8 cache
    own = plan_v3(recipe_of(*rules, kv_cache="fp8"), "16xH800-80GB", target="trtllm")
    assert own.footprint.kv_bytes_per_token == 61 * 576  # rotary keys in FP8 too
    assert own.kv_layout == "fp8-tensor"


def test_the_layout_of_the_kv_cache_is_printed(tmp_path: Path, tiny_model: Path) -> None:
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text(
        "name: fp8\ndescription: none\nrules: [{match: '*', weights: source}]\nkv_cache: fp8\n"
        "gate: {max_perplexity_ratio: 1.1, max_mean_kl: 0.1, min_top1: 0.5}\n"
    )
    words = ("--model", str(tiny_model), "--recipe", str(recipe), "--hardware", "1xH800-80GB")
    out = command(*words, "--target", "sglang")[1]
    assert "KV cache: fp8 as fp8-tensor, 640 bytes per token" in " ".join(out.split())


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers"])
def test_every_target_has_a_plan(target: str, tiny_model: Path) -> None:
    words = ("--model", str(tiny_model), "--recipe", "int8-experts", "--hardware", "1xH800-80GB")
    code, out = command(*words, "--target", target, "--json")
    answer = json.loads(out)
    assert (code, answer["target"], answer["refusals"]) == (0, target, [])
    assert answer["engine_version"]
    if target == "transformers":
        assert command(*words[:-1], "cpu", "--target", target)[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--engine-version", "0.32.0"), "is of one target; name it with --target"),
        (("--target", "vllm", "--engine-version", "0.1"), "vllm '0.1' is not known to us"),
        (("--target", "vllm", "--dialect", "single"), "trtllm and sglang; leave it out for vllm"),
        (("--target", "sglang", "--dialect", "single"), "is none of sglang's; use w8a8_int8, "),
        (("--dialect", "quick"), "--dialect quick is unknown; use one of trtllm: mixed, single; "),
    ],
)
def test_versions_and_dialects_are_the_target_s(
    words: tuple[str, ...], sentence: str, tiny_model: Path
) -> None:
    given = ("--model", str(tiny_model), "--recipe", "int4", "--hardware", "1xH800-80GB")
    with pytest.raises(DeployError, match=sentence.replace("(", "[(]")):
        command(*given, *words)


def test_a_dialect_of_sglang_holds_the_recipe_or_is_refused(tiny_model: Path) -> None:
    def dialect(recipe: str, *words: str) -> tuple[str, list[str]]:
        given = ("--model", str(tiny_model), "--recipe", recipe, "--hardware", "1xH800-80GB")
        answer = json.loads(command(*given, "--target", "sglang", *words, "--json")[1])
        return answer["dialect"], [refusal["change"] for refusal in answer["refusals"]]

    assert dialect("int8") == ("w8a8_int8", [])
    assert dialect("w4a8") == ("w4afp8", [])
    assert dialect("int4") == ("compressed-tensors", [])
    assert dialect("int4", "--dialect", "w4afp8") == ("w4afp8", [])
    found = dialect("int8", "--dialect", "w4afp8")
    assert found == ("w4afp8", ["Use --dialect w8a8_int8, or leave it out"])

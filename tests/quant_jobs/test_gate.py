"""The gate: every limit alone, inclusive at its edge, and bound to one engine."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
from support.chain import Chain
from support.outliers import outlier_small_model
from support.quantizing import small_recipe

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.input_maxima import InputOutlier
from deepseek.artifact.verdict import read_verdict, require_passed
from deepseek.errors import ArtifactError
from deepseek.recipe import GateLimits, Scheme, load_recipe
from quant_jobs.build import run_build
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.evaluation.limits import Measured, judge, starved_share, static_input_outliers
from quant_jobs.evaluation.record import read_evaluation, write_evaluation
from quant_jobs.gate import run_gate
from quant_jobs.quantize import run_quantize
from quant_jobs.report import run_report

LIMITS = GateLimits(
    max_perplexity_ratio=1.05,
    max_mean_kl=0.02,
    min_top1=0.9,
    max_fallbacks=2,
    max_starved_experts=0.25,
    max_input_outliers=2,
)
OUTLIERS = (
    InputOutlier(layer=3, input="gate_up", expert=0, ratio=9.0),
    InputOutlier(layer=3, input="down", expert=17, ratio=31.23),
)
AT_THE_EDGE = Measured(
    perplexity_ratio=1.05,
    mean_kl=0.02,
    top1=0.9,
    fallbacks=2,
    starved_experts=0.25,
    input_outliers=OUTLIERS,
)


def test_limits_are_inclusive() -> None:
    assert judge(AT_THE_EDGE, LIMITS) == {}


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("perplexity_ratio", 1.0501, "perplexity ratio 1.05010 is above 1.05"),
        ("mean_kl", 0.0201, "mean KL 0.02010 is above 0.02 nats per token"),
        ("top1", 0.8999, "top-1 agreement 0.8999 is below 0.9"),
        ("fallbacks", 3, "fallbacks in the ledger: 3, more than 2"),
        (
            "starved_experts",
            0.26,
            "26.0% of the experts saw too few calibration tokens, more than 25.0%",
        ),
        (
            "input_outliers",
            (*OUTLIERS, OUTLIERS[0]),
            "outliers among the inputs of the experts: 3, more than 2; the largest: layer 3, down "
            "input of expert 17: 31.2 times the median of its layer",
        ),
    ],
)
def test_each_limit_fails_alone_with_its_own_sentence(
    field: str, value: object, sentence: str
) -> None:
    assert judge(replace(AT_THE_EDGE, **{field: value}), LIMITS) == {field: sentence}


@pytest.mark.parametrize("field", ["perplexity_ratio", "mean_kl", "top1", "starved_experts"])
def test_a_nan_never_passes(field: str) -> None:
    assert list(judge(replace(AT_THE_EDGE, **{field: nan}), LIMITS)) == [field]


def test_every_broken_limit_is_reported() -> None:
    worst = Measured(
        perplexity_ratio=9.0,
        mean_kl=3.0,
        top1=0.1,
        fallbacks=99,
        starved_experts=1.0,
        input_outliers=3 * OUTLIERS,
    )
    assert len(judge(worst, LIMITS)) == 6


@pytest.mark.parametrize(
    ("recipe", "static", "layers"),
    [
        ("w4a8", [], [1, 2]),  # in the embedded engine, which states no scales of its own
        ("int4", [], []),  # inputs of INT4 experts are not rounded there
        ("int4", [1, 2], [1, 2]),  # as TensorRT-LLM has them
        ("int8", [], []),  # dynamic scales per token
        ("int8-weight-only", [1, 2], []),
        ("int4 in layer 2", [1, 2], [2]),
    ],
)
def test_outliers_count_where_the_experts_have_static_fp8_inputs(
    chain: Chain, recipe: str, static: list[int], layers: list[int]
) -> None:
    engine = read_engine(chain.engine)
    assert engine.manifest is not None
    config = replace(engine.config, num_hidden_layers=3, first_k_dense_replace=1)
    schemes = load_recipe(recipe.split()[0]).resolve(config)
    if recipe.endswith("2"):
        source = Scheme(weights="fp8-block")
        schemes |= {name: source for name in schemes if ".layers.1." in name}
    found = tuple(InputOutlier(layer=layer, input="down", expert=1, ratio=9.0) for layer in (1, 2))
    manifest = engine.manifest.model_copy(update={"input_outliers": found})
    engine = replace(
        engine,
        config=config,
        schemes=schemes,
        manifest=manifest,
        static_input_layers=frozenset(static),
    )
    assert [outlier.layer for outlier in static_input_outliers(engine)] == layers


@pytest.mark.heavy
def test_an_engine_with_more_outliers_than_its_recipe_allows_fails(tmp_path: Path) -> None:
    """From the source to the verdict: one expert's input is far above the others'."""
    model = outlier_small_model(tmp_path)
    limits = {"max_perplexity_ratio": 1e9, "max_mean_kl": 1e9, "min_top1": 0.0}
    limits |= {"max_fallbacks": 1000, "max_starved_experts": 1.0, "max_input_outliers": 0}
    recipe = small_recipe("w4a8", gate=limits)
    artifact, engine = tmp_path / "artifact", tmp_path / "engine"
    run_quantize(model.directory, recipe, model.text, artifact, 0, lambda event: None)
    run_build(artifact, "embedded", engine)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(f"{model.text.read_text()}\n" * 8)
    settings = Settings(num_blocks=12, block_tokens=192, decode_tokens=0)
    run_evaluate(engine, model.directory, heldout, tmp_path / "evaluation", settings)
    outcome = run_gate(engine, tmp_path / "evaluation")
    (reason,) = outcome.verdict.reasons
    assert reason.startswith(
        "outliers among the inputs of the experts: 1, more than 0; the largest: layer 2, down "
        "input of expert 5: "
    )
    assert read_verdict(engine).measured["input_outliers"] == 1
    check = next(
        check
        for check in run_report(engine, tmp_path / "evaluation", tmp_path / "page.html").checks
        if check.name == "Input outliers"
    )
    assert (check.measured, check.limit, check.kept) == ("1", "≤ 0", False)


@pytest.mark.parametrize(
    ("coverage", "share"),
    [
        ({}, 0.0),
        ({3: (16, 17)}, 0.0),
        ({3: (15, 16), 4: (0, 100)}, 0.5),
        ({3: (0, 0)}, 1.0),
    ],
)
def test_starved_experts_are_those_below_the_floor(
    coverage: dict[int, tuple[int, ...]], share: float
) -> None:
    assert starved_share(coverage, floor_tokens=16) == share


def test_the_verdict_is_bound_to_both_digests_and_lets_the_server_in(fresh: Chain) -> None:
    outcome = run_gate(fresh.engine, fresh.evaluation)
    evaluation = read_evaluation(fresh.evaluation)
    verdict = read_verdict(fresh.engine)
    assert verdict == outcome.verdict
    assert verdict.engine_digest == evaluation.engine_digest
    assert verdict.artifact_digest == evaluation.artifact_digest
    assert verdict.passed, verdict.reasons
    require_passed(
        fresh.engine,
        engine_digest=evaluation.engine_digest,
        artifact_digest=verdict.artifact_digest,
        target="embedded",
        arithmetic="embedded",
        kv_cache="bf16",
    )


def test_a_verdict_names_the_kernels_and_the_kv_format_that_were_evaluated(fresh: Chain) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    assert (evaluation.arithmetic, evaluation.kv_cache) == ("embedded", "bf16")
    other = {"kv_cache": "int8", "arithmetic": "trtllm"}
    write_evaluation(fresh.evaluation, evaluation.model_copy(update=other))
    outcome = run_gate(fresh.engine, fresh.evaluation)
    verdict = read_verdict(fresh.engine)
    assert (verdict.target, verdict.arithmetic, verdict.kv_cache) == ("embedded", "trtllm", "int8")
    assert outcome.describe()[0].endswith("(kernels of embedded, KV int8)")
    assert outcome.summary()["kv_cache"] == "int8"


def test_an_evaluation_for_another_target_is_refused(fresh: Chain) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    write_evaluation(fresh.evaluation, evaluation.model_copy(update={"target": "trtllm"}))
    with pytest.raises(ArtifactError, match="of an engine for trtllm, but .* is one for embedded"):
        run_gate(fresh.engine, fresh.evaluation)
    assert not (fresh.engine / "gate.json").exists()


def test_an_evaluation_of_form_1_was_the_embedded_engines(fresh: Chain) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    path = fresh.evaluation / "evaluation.json"
    raw = json.loads(path.read_text())
    del raw["arithmetic"], raw["target"], raw["executed_by"], raw["no_speed"]
    path.write_text(json.dumps(raw | {"format_version": 1}))
    assert read_evaluation(fresh.evaluation) == evaluation
    path.write_text(json.dumps(raw | {"format_version": 2}))
    with pytest.raises(ArtifactError, match="arithmetic: Field required"):
        read_evaluation(fresh.evaluation)


def test_an_evaluation_of_form_2_was_of_an_embedded_engine_and_cannot_claim_another(
    fresh: Chain,
) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    path = fresh.evaluation / "evaluation.json"
    raw = json.loads(path.read_text()) | {"format_version": 2, "target": "trtllm"}
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="format_version: "):
        read_evaluation(fresh.evaluation)
    del raw["target"], raw["executed_by"], raw["no_speed"]
    path.write_text(json.dumps(raw))
    assert read_evaluation(fresh.evaluation) == evaluation


def test_a_failure_is_written_too_and_keeps_the_server_out(fresh: Chain) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    bad = evaluation.top1.model_copy(update={"value": 0.3})
    write_evaluation(fresh.evaluation, evaluation.model_copy(update={"top1": bad}))
    outcome = run_gate(fresh.engine, fresh.evaluation)
    assert not outcome.verdict.passed
    assert outcome.describe()[0].startswith("FAIL")
    assert "top-1 agreement 0.3000 is below" in outcome.describe()[1]
    with pytest.raises(ArtifactError, match="failed its accuracy gate: top-1"):
        require_passed(
            fresh.engine,
            engine_digest=evaluation.engine_digest,
            artifact_digest=outcome.verdict.artifact_digest,
            target="embedded",
            arithmetic="embedded",
            kv_cache="bf16",
        )


def test_an_evaluation_of_another_engine_is_refused(fresh: Chain) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    write_evaluation(fresh.evaluation, evaluation.model_copy(update={"engine_digest": "0" * 64}))
    with pytest.raises(ArtifactError, match="is an evaluation of engine 0000000000000000, not of"):
        run_gate(fresh.engine, fresh.evaluation)
    assert not (fresh.engine / "gate.json").exists()


def test_a_short_evaluation_is_refused(fresh: Chain) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    short = evaluation.data.model_copy(update={"num_blocks": 3})
    write_evaluation(fresh.evaluation, evaluation.model_copy(update={"data": short}))
    with pytest.raises(ArtifactError, match="judged 1533 tokens, a verdict needs 2000"):
        run_gate(fresh.engine, fresh.evaluation)
    assert not (fresh.engine / "gate.json").exists()


def test_an_unquantized_engine_has_no_limits_to_be_judged_by(fresh: Chain, tmp_path: Path) -> None:
    baseline = run_build(fresh.source, "embedded", tmp_path / "baseline")
    evaluation = read_evaluation(fresh.evaluation).model_copy(
        update={
            "engine_digest": baseline.engine_digest,
            "artifact_digest": baseline.artifact_digest,
            "recipe": baseline.recipe,
        }
    )
    write_evaluation(fresh.evaluation, evaluation)
    with pytest.raises(ArtifactError, match="no recipe whose limits"):
        run_gate(tmp_path / "baseline", fresh.evaluation)

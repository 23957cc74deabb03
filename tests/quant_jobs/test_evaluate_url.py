"""The same numbers offline and over HTTP, of our own service and of one with vLLM's shapes; and a
stored reference in the source's place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.chain import Chain, Ended
from support.engines import make_engine
from support.local_service import serving_engine
from support.scored_service import ScoredService, running

from deepseek.engine.engine import LLMEngine
from deepseek.errors import ArtifactError, CalibrationError
from quant_jobs.evaluate import Settings, run_evaluate, run_evaluate_url
from quant_jobs.evaluation.record import Evaluation, read_evaluation
from quant_jobs.evaluation.served import Served, read_served
from quant_jobs.evaluation.tokens import read_tokens

Command = Callable[..., Ended]
SMALL = Settings(num_blocks=3, block_tokens=96, decode_tokens=0, num_threads=1)
STORED = Settings(decode_tokens=0, num_threads=1)


def assert_same(served: Served, offline: Evaluation) -> None:
    """The stated tolerance of `evaluate --url`."""
    assert served.data == offline.data
    assert served.perplexity == pytest.approx(offline.perplexity, rel=1e-5)
    assert served.source_perplexity == pytest.approx(offline.source_perplexity, rel=1e-5)
    assert served.perplexity_ratio.value == pytest.approx(offline.perplexity_ratio.value, rel=1e-5)
    assert offline.lumped_kl is not None
    assert served.lumped_kl.top == offline.lumped_kl.top == 20
    assert served.lumped_kl.mean.value == pytest.approx(offline.lumped_kl.mean.value, abs=1e-5)
    differing = abs(served.top1.value - offline.top1.value) * served.data.judged_tokens
    assert round(differing) <= served.tied_top1


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_over_http_a_service_has_the_figures_of_its_engine_offline(
    tiny_model: Path, tmp_path: Path, recipe: str
) -> None:
    engine = make_engine(tiny_model, recipe, tmp_path)
    kept = tmp_path / "reference"
    offline = run_evaluate(
        engine, tiny_model, tiny_model / "heldout.txt", tmp_path / "offline", SMALL,
        keep_reference=kept,
    )  # fmt: skip
    assert offline.lumped_kl is not None
    assert 0 < offline.lumped_kl.mean.value < offline.kl.mean.value
    with serving_engine(engine, num_threads=1) as url:
        served = run_evaluate_url(
            f"{url}/v1", kept, None, tmp_path / "served", Settings(decode_tokens=2, num_threads=1)
        )
    assert_same(served, offline)
    assert served.service.engine_digest == offline.engine_digest
    assert served.service.artifact_digest == offline.artifact_digest
    assert (served.service.recipe, served.service.kv_cache) == (recipe, "bf16")
    assert served.on_loopback
    assert [point.concurrency for point in served.load] == [1, 4]
    assert served == read_served(tmp_path / "served")
    assert sorted(os.listdir(tmp_path / "served")) == ["served.json", "served.safetensors"]
    values = load_file(tmp_path / "served" / "served.safetensors")
    tokens = read_tokens(tmp_path / "offline", offline)
    torch.testing.assert_close(values["served_nll"], tokens["quantized_nll"], atol=1e-5, rtol=0)
    assert "KL at least" in "\n".join(served.describe())


@pytest.mark.heavy
def test_a_service_with_other_kv_pages_has_other_figures_and_says_so(
    tiny_model: Path, tmp_path: Path
) -> None:
    engine = make_engine(tiny_model, "int8", tmp_path)
    data = tiny_model / "heldout.txt"
    int8 = Settings(num_blocks=3, block_tokens=96, decode_tokens=0, kv_cache="int8", num_threads=1)
    offline = run_evaluate(engine, tiny_model, data, tmp_path / "int8", int8)
    assert offline.kv_cache == "int8"
    with serving_engine(engine, kv_cache="int8", num_threads=1) as url:
        served = run_evaluate_url(url, tiny_model, data, tmp_path / "served", SMALL)
    assert served.service.kv_cache == "int8"
    assert_same(served, offline)
    bf16 = run_evaluate(engine, tiny_model, data, tmp_path / "bf16", SMALL)
    assert bf16.perplexity != offline.perplexity
    assert (tmp_path / "served" / "reference" / "reference.json").exists()


def test_a_service_with_vllms_shapes_has_them_too(chain: Chain, tmp_path: Path) -> None:
    kept, data = tmp_path / "kept", chain.source / "heldout.txt"
    offline = run_evaluate(
        chain.engine, chain.source, data, tmp_path / "offline", SMALL, keep_reference=kept
    )
    with running(ScoredService(LLMEngine.load(chain.engine))) as url:
        served = run_evaluate_url(url, kept, None, tmp_path / "served", STORED, concurrency=2)
    assert_same(served, offline)
    assert served.service.model_dump(exclude_none=True) == {"model": "tiny"}
    assert served.load == ()


def test_a_stored_reference_stands_for_the_source(chain: Chain, tmp_path: Path) -> None:
    kept, data = tmp_path / "kept", chain.source / "heldout.txt"
    settings = Settings(num_blocks=5, block_tokens=128, decode_tokens=0)
    live = run_evaluate(
        chain.engine, chain.source, data, tmp_path / "live", settings, keep_reference=kept
    )
    stored = run_evaluate(chain.engine, kept, None, tmp_path / "stored", STORED)
    assert live.stored_reference is None
    assert stored.stored_reference == json.loads((kept / "reference.json").read_text())["digest"]
    assert (stored.data, stored.sizes, stored.artifact_bytes) == (
        live.data,
        live.sizes,
        live.artifact_bytes,
    )
    assert stored.perplexity == live.perplexity
    assert stored.source_perplexity == pytest.approx(live.source_perplexity, rel=1e-7)
    assert stored.top1 == live.top1
    assert stored.lumped_kl == live.lumped_kl
    # An estimate: its error is small beside that of the text.
    error = abs(stored.kl.mean.value - live.kl.mean.value)
    assert 0 < error < 0.1 * live.kl.mean.standard_error


def test_a_stored_reference_has_its_own_text_and_source(chain: Chain, tmp_path: Path) -> None:
    kept, data = tmp_path / "kept", chain.source / "heldout.txt"
    run_evaluate(chain.engine, chain.source, data, tmp_path / "out", SMALL, keep_reference=kept)
    for given, settings, says in (
        (data, STORED, "--data .* cannot be followed: .* is a stored reference"),
        (None, SMALL, "--num-blocks 3 cannot be followed"),
    ):
        with pytest.raises(CalibrationError, match=says):
            run_evaluate(chain.engine, kept, given, tmp_path / "again", settings)
    with pytest.raises(CalibrationError, match="--data is missing"):
        run_evaluate(chain.engine, chain.source, None, tmp_path / "again", SMALL)
    raw: dict[str, Any] = json.loads((kept / "reference.json").read_text())
    from quant_jobs.evaluation.reference import ReferenceRecord

    raw.pop("digest")
    record = ReferenceRecord.model_validate(raw | {"fingerprint": "0" * 64})
    content = record.model_dump(mode="json") | {"digest": record.digest}
    (kept / "reference.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="--reference must be its own source"):
        run_evaluate(chain.engine, kept, None, tmp_path / "again", STORED)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_an_engine_is_evaluated_on_the_kv_pages_that_are_asked_for(
    kv_cache: str, chain: Chain, tmp_path: Path, command: Command
) -> None:
    words = ("--reference", chain.source, "--data", chain.source / "heldout.txt")
    words += ("--num-blocks", 2, "--block-tokens", 32, "--decode-tokens", 0, "--kv-cache", kv_cache)
    ended = command("evaluate", "--engine", chain.engine, *words, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert f"kernels of embedded, KV {kv_cache}" in ended.out
    assert read_evaluation(tmp_path / "out").kv_cache == kv_cache


def test_the_command_measures_a_service(chain: Chain, tmp_path: Path, command: Command) -> None:
    service = ScoredService(LLMEngine.load(chain.engine), key="sesame-123")
    (tmp_path / "key").write_text("sesame-123\n")
    words = ("--reference", chain.source, "--data", chain.source / "heldout.txt")
    words += ("--num-blocks", 2, "--block-tokens", 32, "--decode-tokens", 1)
    words += ("--output", tmp_path / "out", "--api-key-file", tmp_path / "key")
    with running(service) as url:
        ended = command("evaluate", "--url", url, *words, "--json")
        assert ended.code == 0, ended.err
        assert Served.model_validate_json(ended.out) == read_served(tmp_path / "out")
        assert "sesame" not in ended.out + ended.err
        refused = command("evaluate", "--url", url, *words[:-2])
    assert refused.code == 2
    assert "refuses requests without a key" in refused.err
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give either --engine DIR or --url URL"),
        (("--url", "http://h", "--engine", "e"), "give either --engine DIR or --url URL"),
        (("--engine", "e", "--model", "m"), "--model and --api-key-file go with --url"),
        (("--url", "http://h", "--kv-cache", "int8"), "a service has its own KV format"),
        (("--url", "http://k@h"), "holds a user or password"),
        (("--url", "http://h", "--api-key", "k"), "No such option"),
    ],
)
def test_what_contradicts_itself_is_one_sentence(
    tmp_path: Path, command: Command, words: tuple[str, ...], says: str
) -> None:
    ended = command(
        "evaluate", "--reference", "r", "--data", "d", "--output", tmp_path / "o", *words
    )
    assert ended.code == 2
    assert says in ended.err
    assert not (tmp_path / "o").exists()

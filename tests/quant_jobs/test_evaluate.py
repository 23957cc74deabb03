"""Evaluation: against slow direct computation, on the source itself, and on bad input."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from support.chain import Chain
from support.disks import limited_files
from support.quantizing import contents
from torch import Tensor

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.errors import ArtifactError, CalibrationError, OutputError
from quant_jobs.build import run_build
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.evaluation.record import TOKENS, read_evaluation
from quant_jobs.evaluation.scorers import score_blocks
from quant_jobs.evaluation.speed import BATCH_SIZES, NUM_RUNS
from quant_jobs.evaluation.tokens import read_tokens

SHORT = Settings(num_blocks=2, block_tokens=64, decode_tokens=0)


@pytest.mark.heavy
def test_the_source_does_not_differ_from_itself(tiny_model: Path, tmp_path: Path) -> None:
    run_build(tiny_model, "embedded", tmp_path / "engine")
    result = run_evaluate(
        tmp_path / "engine", tiny_model, tiny_model / "heldout.txt", tmp_path / "out", SHORT
    )
    assert result.kl.mean.value == result.kl.max == 0
    assert result.top1.value == 1
    assert result.perplexity_ratio.value == 1
    assert result.perplexity == result.source_perplexity
    assert result.recipe == "unquantized"
    assert result.artifact_digest == result.reference_fingerprint
    assert all(group.artifact_bytes == group.source_bytes for group in result.sizes)


@pytest.mark.heavy
def test_held_out_data_may_be_of_any_kind_that_calibration_data_may(
    chain: Chain, tmp_path: Path
) -> None:
    text = (chain.source / "heldout.txt").read_text(encoding="utf-8")
    data = tmp_path / "heldout.JSONL"
    data.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    plain = run_evaluate(
        chain.engine, chain.source, chain.source / "heldout.txt", tmp_path / "a", SHORT
    )
    record = run_evaluate(chain.engine, chain.source, data, tmp_path / "b", SHORT)
    assert record.data == plain.data
    with pytest.raises(CalibrationError, match=r"heldout\.csv has the ending \.csv"):
        run_evaluate(chain.engine, chain.source, tmp_path / "heldout.csv", tmp_path / "c", SHORT)


def test_measures_equal_a_slow_direct_computation(chain: Chain) -> None:
    result = read_evaluation(chain.evaluation)
    tokens = read_tokens(chain.evaluation, result)
    source = LLMEngine.from_checkpoint(chain.source, EngineOptions(kv_cache="bf16"))
    quantized = LLMEngine.load(chain.engine, EngineOptions())
    source_nll: list[float] = []
    quantized_nll: list[float] = []
    divergence: list[float] = []
    same = 0
    for ids in tokens["token_ids"].long():
        p_TV = source.score(ids).double().softmax(-1)
        q_TV = quantized.score(ids).double().softmax(-1)
        for t in range(len(ids) - 1):
            p, q, following = p_TV[t], q_TV[t], int(ids[t + 1])
            source_nll.append(-math.log(p[following]))
            quantized_nll.append(-math.log(q[following]))
            divergence.append(float((p * (p / q).log()).sum()))
            same += int(p.argmax()) == int(q.argmax())
    count = len(source_nll)
    assert count == result.data.judged_tokens == 5 * 511
    assert result.source_perplexity == pytest.approx(math.exp(sum(source_nll) / count), rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(sum(quantized_nll) / count), rel=1e-9)
    assert result.perplexity_ratio.value == pytest.approx(
        result.perplexity / result.source_perplexity, rel=1e-9
    )
    assert result.kl.mean.value == pytest.approx(sum(divergence) / count, rel=1e-6)
    assert result.kl.max == pytest.approx(max(divergence), rel=1e-6)
    assert result.top1.value == pytest.approx(same / count)
    assert result.kl.mean.value > 0, "a quantized model that never differs was not quantized"
    torch.testing.assert_close(
        tokens["kl"].flatten(), torch.tensor(divergence), atol=1e-7, rtol=1e-4
    )


def test_every_block_opens_with_bos_and_none_is_used_twice(chain: Chain) -> None:
    ids_BT = read_tokens(chain.evaluation, read_evaluation(chain.evaluation))["token_ids"]
    assert (ids_BT[:, 0] == 0).all()
    assert len({tuple(row) for row in ids_BT.tolist()}) == len(ids_BT)


def test_sizes_are_those_on_disk(chain: Chain) -> None:
    result = read_evaluation(chain.evaluation)
    index = json.loads((chain.checkpoint / "model.safetensors.index.json").read_text())
    assert sum(size.artifact_bytes for size in result.sizes) == index["metadata"]["total_size"]
    files = sum(path.stat().st_size for path in chain.checkpoint.glob("*.safetensors"))
    assert result.artifact_bytes == files
    source = json.loads((chain.source / "model.safetensors.index.json").read_text())
    assert sum(size.source_bytes for size in result.sizes) == source["metadata"]["total_size"]
    assert result.bf16_bytes == 2 * sum(size.parameters for size in result.sizes)


def test_speed_keeps_every_run_of_both_engines(chain: Chain) -> None:
    speeds = read_evaluation(chain.evaluation).speed
    assert [speed.batch_size for speed in speeds] == list(BATCH_SIZES)
    for speed in speeds:
        assert 1 <= len(speed.runs) == len(speed.source_runs) <= NUM_RUNS
        assert min(speed.runs) <= speed.tokens_per_s <= max(speed.runs)
        assert min(speed.source_runs) <= speed.source_tokens_per_s <= max(speed.source_runs)


class Countdown:
    """Scores with random logits and checks that the previous block's are gone."""

    def __init__(self) -> None:
        self.previous: weakref.ref[Tensor] | None = None

    def score(self, token_ids: Tensor) -> Tensor:
        assert self.previous is None or self.previous() is None, "a block's logits were kept"
        logits = torch.randn(len(token_ids), 40)
        self.previous = weakref.ref(logits)
        return logits


def test_only_one_block_of_logits_is_alive() -> None:
    ids_BT = torch.randint(0, 40, (4, 16))
    assert len(score_blocks(Countdown(), Countdown(), ids_BT)) == 4


class Constant:
    """Scores every token with the same logit."""

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, token_ids: Tensor) -> Tensor:
        return torch.full((len(token_ids), 40), self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ArtifactError, match="not finite in block 0"):
        score_blocks(Constant(0.0), Constant(value), torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("text", "sentence"), [("", "is empty"), ("def f(): pass\n", "has [0-9]+ tokens")]
)
def test_empty_or_short_text_is_refused(
    chain: Chain, tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "data.txt").write_text(text)
    with pytest.raises(CalibrationError, match=sentence):
        run_evaluate(chain.engine, chain.source, tmp_path / "data.txt", tmp_path / "out", SHORT)
    assert not (tmp_path / "out").exists()


def test_a_reference_that_is_not_the_source_is_refused(chain: Chain, tmp_path: Path) -> None:
    other = shutil.copytree(chain.source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    with pytest.raises(ArtifactError, match="--reference must be its own source"):
        run_evaluate(chain.engine, other, chain.source / "heldout.txt", tmp_path / "out", SHORT)


def test_an_evaluation_is_read_back_or_refused(fresh: Chain) -> None:
    path = fresh.evaluation / "evaluation.json"
    written = path.read_text()
    path.write_text(written.replace('"kv_cache"', '"kv_cash"'))
    with pytest.raises(ArtifactError, match="evaluate again"):
        read_evaluation(fresh.evaluation)
    path.write_text(written)
    data = bytearray((fresh.evaluation / TOKENS).read_bytes())
    data[-1] ^= 1
    (fresh.evaluation / TOKENS).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"tokens\.safetensors is not the one"):
        read_evaluation(fresh.evaluation)
    path.unlink()
    with pytest.raises(ArtifactError, match="run `python -m quant_jobs evaluate`"):
        read_evaluation(fresh.evaluation)


@pytest.mark.heavy
def test_an_evaluation_that_cannot_be_written_leaves_the_one_before(fresh: Chain) -> None:
    before = contents(fresh.evaluation)
    run = partial(run_evaluate, fresh.engine, fresh.source, fresh.source / "heldout.txt")
    with limited_files(500), pytest.raises(OutputError, match=r"tokens\.safetensors cannot be"):
        run(fresh.evaluation, SHORT)
    assert contents(fresh.evaluation) == before
    run(fresh.evaluation, SHORT)
    assert contents(fresh.evaluation).keys() == before.keys()
    assert read_evaluation(fresh.evaluation).data.num_blocks == SHORT.num_blocks

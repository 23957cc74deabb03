"""The smoke test of TensorRT-LLM, against the double: each of its steps can hold and can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.engine_environments import make_double_environment
from support.remote_engines import doubled
from support.trtllm_doubles import Double, make_trtllm_engine
from typer.testing import CliRunner

from bench import smoke_trtllm
from bench.smoke import serving, verdicts
from bench.smoke.serving import Smoke, Workload
from bench.smoke.verdicts import Verdict, judge
from deepseek.errors import DeployError
from serve_app.engine_sections import TrtllmOptions
from serve_app.engines.remote.options import plan_of

#: Answers of a probe with which everything holds.
GOOD: dict[str, Any] = {
    "version": "1.2.1",
    "load": {"seconds": 60.0},
    "members": {
        "generate_async": ["self", *verdicts.PASSED],
        "present": {"LLM._check_health": False, "LLM.get_stats_async": True},
        "request_error": True,
    },
    "sampling": {"refused": []},
    "ranks": {"processes": 8, "other_sessions": 8},
    "blocks": {"wanted": 64, "arguments": 64, "capacity": None},
    "steps": {
        **{"counts": [1, 10, 24], "is_one_object": True, "finish_reason": "length"},
        **{"text": "", "cached_tokens": 0},
    },
    "end_token": {
        "end_id": {"token": "left out", "finish_reason": "stop"},
        "stop_token_ids": {"token": "kept", "finish_reason": None},
    },
    "logprobs": {
        "1": {"entries": 6, "tokens": 6, "form": "dict", "holds_token": True},
        "0": {"error": "ValueError: at least 1"},
    },
    "prompt_logprobs": {"entries": 23, "prompt": 24, "holds_tokens": True},
    "seed": {"same": True},
    "statistics": {
        **{"items": 4, "type": "str", "idle": "QueueEmpty", "fields": []},
        **{"kv": [], "tokens_per_block": 64},
    },
    "reuse": {"first": 0, "again": 384, "other_salt": 0},
    "abort": {"finish_reason": "cancelled", "tokens": 9, "seconds": 0.1, "used_blocks": 0},
    "metrics": {"names": ["trtllm_e2e_request_latency_seconds"]},
    "shutdown": {"seconds": 1.0},
}
#: Step -> what is otherwise -> its verdict, and words of it.
OTHERWISE: list[tuple[str, dict[str, Any], str, str]] = [
    ("version", {"version": "1.3.0rc29"}, "failed", "1.3.0rc29, built for 1.2.1"),
    ("a prefix of layers loads", {"load": {"error": "KeyError: fused_a"}}, "failed", "fused_a"),
    (
        "members",
        {"members": {**GOOD["members"], "generate_async": ["self", "inputs"]}},
        *("failed", "missing: sampling_params, streaming, cache_salt"),
    ),
    ("sampling parameters", {"sampling": {"refused": ["top_k"]}}, "failed", "refuses top_k"),
    ("rank processes", {"ranks": {"processes": 0, "other_sessions": 0}}, "failed", "no process"),
    (
        "tokens of a KV block",
        {"statistics": {**GOOD["statistics"], "tokens_per_block": 32}},
        *("failed", "wanted 64; statistics 32"),
    ),
    ("streaming", {"steps": {**GOOD["steps"], "counts": [1, 9, 14]}}, "failed", "[1, 9, 14]"),
    (
        "the token that ends a text",
        {"end_token": {"end_id": {"token": "other", "finish_reason": "stop"}}},
        *("failed", "end_id: other"),
    ),
    (
        "logprobs",
        {"logprobs": {"1": {"error": "ValueError: no"}, "0": {"entries": 0}}},
        *("failed", "1: ValueError: no; 0: 0 entries"),
    ),
    (
        "logprobs of a prompt",
        {"prompt_logprobs": {"entries": 24, "prompt": 24, "holds_tokens": False}},
        *("failed", "do not name the prompt's own tokens"),
    ),
    ("logprobs of a prompt", {"prompt_logprobs": {"error": "ValueError"}}, "told", "ValueError"),
    ("a seed", {"seed": {"same": False}}, "told", "does not repeat"),
    ("statistics", {"statistics": {**GOOD["statistics"], "type": "bytes"}}, "failed", "bytes"),
    ("statistics", {"statistics": {"items": 0, "idle": "ends"}}, "told", "counts by itself"),
    (
        "prefixes and salts",
        {"reuse": {"first": 0, "again": 384, "other_salt": 384}},
        *("failed", "prefixes cross salts"),
    ),
    ("an abort", {"abort": {**GOOD["abort"], "tokens": 200}}, "failed", "200 tokens"),
    ("names of metrics", {"metrics": {"error": "ModuleNotFoundError"}}, "told", "ModuleNot"),
    ("shutdown", {"shutdown": None}, "failed", "hung or ended"),
]


def verdict_of(step: str, found: Sequence[Verdict]) -> Verdict:
    (verdict,) = [item for item in found if item.step == step]
    return verdict


def test_a_probe_without_surprises_holds() -> None:
    found = judge(GOOD, "1.2.1")
    assert {item.outcome for item in found} == {"held", "told"}
    assert {item.step for item in found} == {step for step, *_ in OTHERWISE}


@pytest.mark.parametrize(
    ("step", "change", "outcome", "words"), OTHERWISE, ids=[f"{s}-{o}" for s, _, o, _ in OTHERWISE]
)
def test_a_step_of_the_prefix_can_end_otherwise(
    step: str, change: dict[str, Any], outcome: str, words: str
) -> None:
    verdict = verdict_of(step, judge(GOOD | change, "1.2.1"))
    assert verdict.outcome == outcome
    assert words in verdict.seen


def test_what_the_probe_did_not_get_to_has_failed() -> None:
    answers = {name: GOOD[name] for name in ("version", "load", "members")}
    found = judge(answers, "1.2.1")
    assert [item.outcome for item in found[:3]] == ["held"] * 3
    assert {item.outcome for item in found[3:]} == {"failed"}


@pytest.fixture(scope="module")
def directory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trtllm_engine(tiny_model, tmp_path_factory.getbasetemp() / "trtllm", tp=2)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_double_environment(tmp_path_factory.mktemp("environment"))


@pytest.mark.heavy
def test_the_command_writes_table_answers_and_lock(
    directory: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double(tmp_path, strict="record")
    for name, value in double.env.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "smoke"
    words = [str(directory), "--python", str(python), "--output", str(output)]
    words += ["--layers", "2", "--prefix-only"]
    done = CliRunner().invoke(smoke_trtllm.app, words)
    assert done.exit_code == 0, done.output
    assert double.violations == ["logprobs_0"]  # which the probe asks for
    written = json.loads((output / "smoke.json").read_text())
    found = [Verdict(**item) for item in written["verdicts"]]
    outcomes = {item.step: item.outcome for item in found}
    assert "failed" not in outcomes.values()
    skipped = {step for step, outcome in outcomes.items() if outcome == "skipped"}
    assert skipped == {"Ray as orchestrator", "the whole engine"}
    assert verdict_of("rank processes", found).seen == "2 processes, 0 in other sessions"
    lock = (output / "requirements.lock").read_text().splitlines()
    assert lock[1] == "--extra-index-url https://pypi.nvidia.com"
    assert any(line.startswith("pydantic==") for line in lock)
    table = (output / "smoke.md").read_text().splitlines()
    assert len(table) == len(found) + 2


@pytest.mark.heavy
@pytest.mark.slow
def test_a_prefix_that_hangs_says_where(
    directory: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double(tmp_path, strict="record")
    for name, value in double.env.items():
        monkeypatch.setenv(name, value)
    options = TrtllmOptions(directory=directory, python=python)
    plan = plan_of(options)

    double.switch(tokens_stop=True)
    answers = smoke_trtllm.ask_prefix(
        plan, options, layers=2, timeout_s=12.0, folder=tmp_path, question_s=0.2
    )
    found = judge(answers, "1.2.1")
    assert verdict_of("members", found).outcome == "held"
    for step in ("streaming", "an abort", "logprobs", "shutdown"):
        assert verdict_of(step, found).outcome == "failed", step


def test_an_environment_that_is_not_there_is_named(directory: Path, tmp_path: Path) -> None:
    words = [str(directory), "--python", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(smoke_trtllm.app, words)
    assert isinstance(done.exception, DeployError)
    assert "make it with `make engine-env TARGET=trtllm`" in str(done.exception)
    assert not (tmp_path / "out").exists()


async def smoke_of(
    directory: Path, double: Double, text_ids: Sequence[int]
) -> tuple[list[Verdict], Smoke]:
    found: list[Verdict] = []
    load = Workload(isl=32, osl=4, concurrency=2, requests=3)
    smoke = Smoke(lambda: doubled(directory, double), text_ids, 600, load, found.append)
    await smoke.run(kill_a_rank=True)
    return found, smoke


@pytest.mark.heavy
@pytest.mark.slow
async def test_every_step_of_the_whole_engine_can_hold(directory: Path, tmp_path: Path) -> None:
    plan = plan_of(TrtllmOptions(directory=directory, python=Path(sys.executable)))
    ids = smoke_trtllm.text_ids(plan, smoke_trtllm.TEXT)
    found, smoke = await smoke_of(directory, Double(tmp_path), ids)
    assert {item.outcome for item in found} == {"held"}
    assert verdict_of("nothing is left", found).seen == "2 rank processes ended"
    assert [figures.concurrency for figures in smoke.measured] == [1, 2]
    assert all(figures.tokens_per_s > 0 for figures in smoke.measured)
    assert "664 tokens, KV cache bf16; again, 640 of them found" in (
        verdict_of("a prompt in chunks", found).seen
    )


@pytest.mark.heavy
@pytest.mark.slow
async def test_every_step_of_the_whole_engine_can_fail(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "GONE_S", 0.0)
    double = Double(tmp_path)
    double.switch(request_error_token=7)
    found, _ = await smoke_of(directory, double, [7] * 200)
    outcomes = {item.step: item.outcome for item in found}
    assert outcomes.pop("the whole engine loads") == "held"
    assert outcomes.pop("nothing is left") == "held"
    assert len(outcomes) == 5
    assert set(outcomes.values()) == {"failed"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert await serving._left([process.pid]) == [process.pid]
        process.kill()


async def test_a_whole_engine_that_does_not_load_ends_the_steps(
    directory: Path, tmp_path: Path
) -> None:
    found: list[Verdict] = []
    engine = smoke_trtllm.RemoteEngine(
        TrtllmOptions(directory=directory, python=Path("/bin/false"))
    )
    load = Workload(isl=32, osl=4, concurrency=1, requests=1)
    await Smoke(lambda: engine, [5] * 200, 64, load, found.append).run(kill_a_rank=True)
    assert [(item.step, item.outcome) for item in found] == [("the whole engine loads", "failed")]
    assert "did not load in trtllm" in found[0].seen

"""The commands on directories that others prepared: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support.chain import Chain, Ended
from support.hostile import FILES, JSON, NAME
from support.keys import make_keys
from support.quantizing import make_small_model, small_recipe
from support.synthetic import write_checkpoint

from deepseek.artifact.verdict import read_verdict
from deepseek.errors import ArtifactError, CheckpointError, OutputError
from deepseek.files import sha256_file, write_json
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.evaluation.record import EVALUATION, TOKENS, read_evaluation
from quant_jobs.gate import run_gate
from quant_jobs.job.job import plan_job
from quant_jobs.report import run_report

Command = Callable[..., Ended]


def assert_mistake(ended: Ended, *says: str) -> None:
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.endswith("\n")
    assert ended.err[:-1].isprintable()
    assert len(ended.err) < 3000
    for words in says:
        assert words in ended.err
    assert ended.out == ""


# quantize: what would be copied after the last layer is looked at before the first.


def test_a_link_to_a_private_key_ends_the_command_and_is_copied_nowhere(
    command: Command, tmp_path: Path
) -> None:
    small = make_small_model(tmp_path)
    key = tmp_path / "private.key"
    key.write_text("SECRET")
    key.chmod(0o600)
    (small.directory / "merges.txt").symlink_to(key)
    ended = command(
        *("quantize", "--model", small.directory, "--recipe", "int8", "--workers", 0),
        *("--calibration", small.text, "--output", tmp_path / "out"),
    )
    assert_mistake(ended, "merges.txt is a link to a file outside its directory")
    assert not (tmp_path / "out").exists()


def test_a_job_is_planned_only_with_files_that_can_be_copied(tmp_path: Path) -> None:
    small = make_small_model(tmp_path)
    recipe = small_recipe("int8")
    plan_job(small.directory, recipe, small.text, tmp_path / "out")
    for case, (make, says) in (FILES | JSON).items():
        path = small.directory / "tokenizer_config.json"
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        (tmp_path / "private.key").unlink(missing_ok=True)
        make(path)
        with pytest.raises(CheckpointError, match="tokenizer_config.json ") as refused:
            plan_job(small.directory, recipe, small.text, tmp_path / "out")
        assert says in str(refused.value), case
    assert not (tmp_path / "out").exists()


def test_a_tensors_name_cannot_act_on_the_terminal_or_fill_it(
    command: Command, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model", by_layer=False)
    shard = tmp_path / "model" / "model.safetensors"
    tensors = load(shard.read_bytes())
    (tmp_path / "text").write_text("text")
    for name, says in ((NAME, r"\x1b[31m\nerror: forged"), ("x" * 1_000_000, "tensor 'xxx")):
        shard.write_bytes(save(tensors | {name: torch.ones(1)}))
        ended = command(
            *("quantize", "--model", tmp_path / "model", "--recipe", "int8", "--workers", 0),
            *("--calibration", tmp_path / "text", "--output", tmp_path / "out"),
        )
        assert_mistake(ended, says)


# evaluate, gate, report: documents of an evaluation.


def rewrite(evaluation: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((evaluation / EVALUATION).read_text())
    change(raw)
    (evaluation / EVALUATION).write_text(json.dumps(raw).replace("Infinity", "1e999"))


@pytest.mark.parametrize("name", [EVALUATION, TOKENS])
def test_a_hostile_evaluation_is_one_sentence(fresh: Chain, name: str) -> None:
    for case, (make, says) in (FILES | (JSON if name == EVALUATION else {})).items():
        path = fresh.evaluation / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        (fresh.evaluation.parent / "private.key").unlink(missing_ok=True)
        make(path)
        with pytest.raises(ArtifactError) as refused:
            run_gate(fresh.engine, fresh.evaluation)
        if name == TOKENS and case == "not UTF-8":
            says = "is not the one that evaluation.json beside it names"
        assert str(refused.value).startswith(f"{path} "), case
        assert says in str(refused.value), case
        assert str(refused.value).isprintable()
    assert not (fresh.engine / "gate.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(sizes=[]), "sizes: Tuple should have at least 1 item"),
        (lambda raw: raw["sizes"][0].update(group=NAME), "sizes.0.group: Input should be 'rou"),
        (lambda raw: raw["sizes"][0].update(bf16_bytes=0), "sizes.0.bf16_bytes: "),
        (lambda raw: raw["speed"][0].update(runs=[]), "speed.0.runs: Tuple should have at lea"),
        (lambda raw: raw.update(perplexity=float("inf")), "is not valid JSON: Infinity"),
        (lambda raw: raw["data"].update(num_blocks=10**30), "data.num_blocks: "),
        (lambda raw: raw.update({NAME: 1}), r"\x1b[31m\nerror: forged"),
    ],
)
def test_an_evaluation_with_impossible_values_is_one_sentence(
    fresh: Chain, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    raw = json.loads((fresh.evaluation / EVALUATION).read_text())
    change(raw)
    (fresh.evaluation / EVALUATION).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError) as refused:
        read_evaluation(fresh.evaluation)
    assert says in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("kl"),
        lambda tensors: tensors.update(more=torch.ones(1)),
        lambda tensors: tensors.update(kl=tensors["kl"][:1]),
        lambda tensors: tensors.update(kl=tensors["kl"].double()),
        lambda tensors: tensors.update(kl=tensors["kl"] * float("nan")),
        lambda tensors: tensors.update(token_ids=tensors["token_ids"] - 5000),
    ],
)
def test_tokens_that_no_evaluation_gives_are_one_sentence(
    fresh: Chain, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = fresh.evaluation / TOKENS
    tensors = load(path.read_bytes())
    change(tensors)
    path.write_bytes(save(tensors))
    rewrite(fresh.evaluation, lambda raw: raw.update(tokens_sha256=sha256_file(path)))
    with pytest.raises(ArtifactError, match=r"tokens\.safetensors (does not hold|holds a value)"):
        run_report(fresh.engine, fresh.evaluation, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_lines_of_a_command_take_no_escapes_from_a_document(fresh: Chain, command: Command) -> None:
    rewrite(fresh.evaluation, lambda raw: raw.update(recipe=NAME))
    ended = command("gate", "--engine", fresh.engine, "--evaluation", fresh.evaluation)
    assert ended.code == 0
    assert ended.out.startswith(r"PASS \x1b[31m\nerror: forged [bold]")
    assert ended.out.count("\n") == 1
    ended = command("gate", "--engine", fresh.engine, "--evaluation", fresh.evaluation, "--json")
    assert json.loads(ended.out)["recipe"] == NAME
    assert ended.out.isascii()


def test_no_command_writes_into_what_it_reads(chain: Chain) -> None:
    settings = Settings(num_blocks=2, block_tokens=8, decode_tokens=0)
    for output in (chain.engine, chain.engine / "evaluation", chain.source):
        with pytest.raises(OutputError, match="choose another --output"):
            run_evaluate(chain.engine, chain.source, chain.source / "heldout.txt", output, settings)
    with pytest.raises(OutputError, match="choose another --output"):
        run_report(chain.engine, chain.evaluation, chain.engine / "report.html")


# Signing.


def test_gate_signs_with_a_key_and_checks_it_before_it_judges(
    fresh: Chain, command: Command, tmp_path: Path
) -> None:
    keys = make_keys(tmp_path / "keys")
    words = ("gate", "--engine", fresh.engine, "--evaluation", fresh.evaluation, "--sign-key")
    keys.private.chmod(0o644)
    assert_mistake(command(*words, keys.private), "gate.key can be read or changed by others")
    assert_mistake(command(*words, keys.public.with_name("absent")), "absent cannot be read")
    assert not (fresh.engine / "gate.json").exists()
    keys.private.chmod(0o600)
    ended = command(*words, keys.private)
    assert ended.code == 0
    secret = keys.private.read_text().splitlines()[1]
    assert secret not in ended.out + ended.err
    assert read_verdict(fresh.engine, signed_by=keys.public).passed
    assert command(*words[:-1]).code == 0  # without a key: the signature of before is gone
    assert not (fresh.engine / "gate.json.sig").exists()


def test_a_failing_verdict_is_signed_too(fresh: Chain, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    rewrite(fresh.evaluation, lambda raw: raw["top1"].update(value=0.3))
    outcome = run_gate(fresh.engine, fresh.evaluation, sign_key=keys.private)
    assert not outcome.verdict.passed
    assert not read_verdict(fresh.engine, signed_by=keys.public).passed


def test_an_engine_with_a_file_too_many_is_not_judged(fresh: Chain) -> None:
    (fresh.engine / "chat_template.jinja").write_text("evil")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja is not part of this engine"):
        run_gate(fresh.engine, fresh.evaluation)
    shutil.rmtree(fresh.engine)
    fresh.engine.mkdir()
    write_json(fresh.engine / "engine.json", {NAME: 1, "format_version": 2})
    with pytest.raises(ArtifactError, match="target: Field required"):
        run_gate(fresh.engine, fresh.evaluation)

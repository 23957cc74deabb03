"""The commands: exit codes, one sentence for a mistake, JSON and nothing else for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chain import Chain, Ended
from support.disks import limited_files
from support.format_1 import write_format_1_engine

from deepseek.inventory import count_parameters
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.build_options import BuildResult
from quant_jobs.evaluation.record import Evaluation, read_evaluation, write_evaluation
from quant_jobs.reports.findings import Report

Command = Callable[..., Ended]
COMMANDS = ("quantize", "build", "evaluate", "gate", "report", "synthesize")
#: Keys of `gate --json` that the demo's table reads.
TABLE = {
    "bytes",
    "bf16_bytes",
    "perplexity",
    "source_perplexity",
    "kl",
    "top1",
    "decode_tokens_per_s",
    "bf16_decode_tokens_per_s",
    "verdict",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(command: Command, name: str) -> None:
    ended = command(name, "--help")
    assert ended.code == 0
    assert f"Examples:\n    python -m quant_jobs {name} --" in ended.out
    assert "--json" in ended.out


def test_help_does_not_load_torch(root: Path) -> None:
    """Torch alone takes seconds; help must be instant."""
    code = (
        "import sys, quant_jobs.__main__\n"
        "print({'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_whole_chain_prints_json_that_validates(
    chain: Chain, command: Command, tmp_path: Path
) -> None:
    engine, evaluation = tmp_path / "engine", tmp_path / "evaluation"
    built = command("build", "--checkpoint", chain.checkpoint, "--output", engine, "--json")
    assert built.code == 0, built.err
    assert BuildResult.model_validate_json(built.out).recipe == "int8-weight-only"

    words = ["--reference", chain.source, "--data", chain.source / "heldout.txt"]
    words += ["--num-blocks", 5, "--block-tokens", 512, "--decode-tokens", 0]
    evaluated = command("evaluate", "--engine", engine, *words, "--output", evaluation, "--json")
    assert evaluated.code == 0, evaluated.err
    assert Evaluation.model_validate_json(evaluated.out) == read_evaluation(evaluation)

    gated = command("gate", "--engine", engine, "--evaluation", evaluation, "--json")
    assert gated.code == 0, gated.err
    row = json.loads(gated.out)
    assert set(row) >= TABLE
    assert row["verdict"] == "pass"
    assert row["decode_tokens_per_s"] is None

    page = tmp_path / "report.html"
    words = ["--engine", engine, "--evaluation", evaluation, "--output", page]
    reported = command("report", *words, "--checkpoint", chain.checkpoint, "--json")
    assert reported.code == 0, reported.err
    assert Report.model_validate_json(reported.out).verdict == "pass"
    assert page.is_file()


def test_a_failed_gate_exits_1_with_one_line_per_reason(fresh: Chain, command: Command) -> None:
    evaluation = read_evaluation(fresh.evaluation)
    ratio = evaluation.perplexity_ratio.model_copy(update={"value": 3.0})
    top1 = evaluation.top1.model_copy(update={"value": 0.1})
    update = {"perplexity_ratio": ratio, "top1": top1}
    write_evaluation(fresh.evaluation, evaluation.model_copy(update=update))
    ended = command("gate", "--engine", fresh.engine, "--evaluation", fresh.evaluation)
    assert ended.code == 1
    lines = ended.out.splitlines()
    assert lines[0] == "FAIL int8-weight-only (kernels of embedded, KV bf16)"
    assert lines[1].startswith("  perplexity ratio 3.00000 is above")
    assert lines[2].startswith("  top-1 agreement 0.1000 is below")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("gate", "--engine", "ABSENT", "--evaluation", "EVALUATION"), "ABSENT"),
        (("gate", "--engine", "ENGINE", "--evaluation", "ABSENT"), "evaluation.json cannot"),
        (("build", "--checkpoint", "ABSENT", "--output", "OUT"), "has no config.json"),
        (
            ("build", "--checkpoint", "CHECKPOINT", "--output", "OUT", "--target", "onnx"),
            "target 'onnx' is unknown",
        ),
        (
            ("quantize", "--model", "SOURCE", "--recipe", "int3", "--calibration", "DATA",
             "--output", "OUT"),
            "no recipe 'int3'; use a YAML file or one of int4,",
        ),
        (
            ("quantize", "--model", "SOURCE", "--recipe", "int8", "--calibration", "DATA",
             "--output", "OUT", "--workers", "0", "--cpus-per-worker", "2"),
            "--workers 0 uses none; leave one of the two out",
        ),
        (
            ("report", "--engine", "ENGINE", "--evaluation", "EVALUATION", "--output", "r.json"),
            "name an .html file",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_2(
    chain: Chain, command: Command, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    places = {
        "ABSENT": tmp_path / "ABSENT",
        "OUT": tmp_path / "out",
        "SOURCE": chain.source,
        "DATA": chain.source / "calibration.txt",
        "CHECKPOINT": chain.checkpoint,
        "ENGINE": chain.engine,
        "EVALUATION": chain.evaluation,
    }
    ended = command(*(places.get(word, word) for word in words))
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert sentence in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["FILE", "FILE/below", "LINK", "n" * 300])
@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "--model", "SOURCE", "--recipe", "int8", "--calibration", "DATA",
         "--workers", "0"),
        ("build", "--checkpoint", "CHECKPOINT"),
        ("evaluate", "--engine", "ENGINE", "--reference", "SOURCE", "--data", "DATA"),
        ("report", "--engine", "ENGINE", "--evaluation", "EVALUATION"),
        ("synthesize", "--preset", "small"),
    ],
)  # fmt: skip
def test_an_impossible_output_is_one_sentence_before_any_work(
    chain: Chain, command: Command, tmp_path: Path, words: tuple[str, ...], place: str
) -> None:
    places = {
        "SOURCE": chain.source,
        "DATA": chain.source / "calibration.txt",
        "CHECKPOINT": chain.checkpoint,
        "ENGINE": chain.engine,
        "EVALUATION": chain.evaluation,
    }
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "LINK").symlink_to("nowhere")
    output = tmp_path / place / "page.html" if words[0] == "report" else tmp_path / place
    ended = command(*(places.get(word, word) for word in words), "--output", output)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert ended.err.startswith(f"error: {tmp_path}/")
    assert ended.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"FILE", "LINK"}
    assert (tmp_path / "FILE").read_text() == "mine"


def test_a_refused_verdict_or_report_is_one_sentence(
    fresh: Chain, command: Command, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words: dict[str, tuple[object, ...]] = {
        "gate": ("--engine", fresh.engine, "--evaluation", fresh.evaluation),
        "report": ("--engine", fresh.engine, "--evaluation", fresh.evaluation, "--output", page),
    }
    for name, arguments in words.items():
        with limited_files(100):
            ended = command(name, *arguments)
        assert (ended.code, ended.out) == (2, ""), name
        assert ended.err.count("\n") == 1
        assert "cannot be written: it would be larger than a file may be here" in ended.err
        assert command(name, *arguments).code == 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "words",
    [
        ("build", "--checkpoint", "SOURCE", "--output", "ENGINE"),
        ("evaluate", "--engine", "ENGINE", "--reference", "SOURCE", "--data", "DATA",
         "--output", "OUT"),
        ("gate", "--engine", "ENGINE", "--evaluation", "EVALUATION"),
        ("report", "--engine", "ENGINE", "--evaluation", "EVALUATION", "--output", "OUT"),
    ],
)  # fmt: skip
def test_an_engine_of_format_1_is_to_be_built_again(
    chain: Chain, command: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    write_format_1_engine(tmp_path / "engine")
    places = {
        "ENGINE": tmp_path / "engine",
        "OUT": tmp_path / "out",
        "SOURCE": chain.source,
        "DATA": chain.source / "heldout.txt",
        "EVALUATION": chain.evaluation,
    }
    ended = command(*(places.get(word, word) for word in words))
    assert ended.code == 2
    assert ended.out == ""
    *progress, error = ended.err.splitlines()  # `build` shows a line of progress before it
    assert error.startswith("error: ")
    assert "build again" in error
    assert all(line.startswith("build") for line in progress)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["engine.json"]


def test_the_module_runs_as_a_program(chain: Chain, root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "quant_jobs",
            "gate",
            "--engine",
            tmp_path,
            "--evaluation",
            tmp_path,
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_synthesize_makes_a_checkpoint_of_the_sizes_asked_for(
    command: Command, tmp_path: Path
) -> None:
    words = ["--preset", "small", "--layers", 2, "--experts", 8, "--heads", 3, "--seed", 7]
    ended = command("synthesize", "--output", tmp_path / "model", *words, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    reader = CheckpointReader(tmp_path / "model")
    assert (reader.config.num_hidden_layers, reader.config.n_routed_experts) == (2, 8)
    assert reader.config.num_attention_heads == 3
    assert result["bytes"] == reader.total_bytes
    assert result["parameters"] == count_parameters(reader.config)
    assert "synthesize, MB" in ended.err
    again = command("synthesize", "--output", tmp_path / "model", *words)
    assert again.code == 2
    assert "model already holds a checkpoint" in again.err

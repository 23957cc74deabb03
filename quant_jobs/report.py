"""Step 8, report: one HTML page for people, one JSON file for machines, from what the steps left.

Reads the engine's manifest, the evaluation and the verdict, checks that they belong together, and
writes the two files. What they say is `reports/findings.py`, how the page looks
`reports/engine_page.py`; this step decides nothing about the engine.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.engine_manifest import VERDICT_FILE
from deepseek.artifact.manifest import read_manifest
from deepseek.artifact.verdict import GateVerdict, read_verdict
from deepseek.errors import ArtifactError, OutputError
from deepseek.files import write_atomic
from deepseek.outputs import check_apart, make_directory, writing
from quant_jobs.evaluation.record import Evaluation, read_evaluation
from quant_jobs.evaluation.tokens import read_tokens
from quant_jobs.reports.engine_page import draw_figures, render
from quant_jobs.reports.findings import Report, assemble


def run_report(
    engine_dir: Path, evaluation_dir: Path, output: Path, *, checkpoint: Path | None = None
) -> Report:
    """Write the page to OUTPUT and the report's data beside it, with the suffix `.json`.

    Raises:
        ArtifactError: a document is missing or belongs to another engine, or OUTPUT itself has the
            suffix `.json`.
        OutputError: OUTPUT is a directory, lies in the engine or the checkpoint, or cannot be
            written.
    """
    check_apart(output, engine_dir, "the engine")
    if checkpoint is not None:
        check_apart(output, checkpoint, "the checkpoint")
    engine = read_engine(engine_dir)
    evaluation = read_evaluation(evaluation_dir)
    if evaluation.engine_digest != engine.digest:
        raise ArtifactError(
            f"{evaluation_dir} is an evaluation of another engine than {engine_dir}; evaluate it"
        )
    if output.suffix == ".json":
        raise ArtifactError(f"--output {output} is where the JSON would go; name an .html file")
    with writing(output):
        is_place = output.is_dir()
    if is_place or not output.name:
        raise OutputError(f"--output {output} is a directory; name an .html file in it")
    if checkpoint is not None:
        _check_checkpoint(checkpoint, engine)
    tokens = read_tokens(evaluation_dir, evaluation)
    report = assemble(engine, evaluation, tokens, _verdict_of(engine, evaluation))
    html = render(report, draw_figures(report, engine.manifest, tokens))
    make_directory(output.parent)
    text = report.model_dump_json(indent=2) + "\n"
    write_atomic(output.with_suffix(".json"), text.encode())
    write_atomic(output, html.encode())
    return report


def _check_checkpoint(checkpoint: Path, engine: BuiltEngine) -> None:
    digest = read_manifest(checkpoint).digest
    if digest != engine.artifact_digest:
        raise ArtifactError(
            f"{engine.directory} was built from artifact {engine.artifact_digest[:16]}, not from "
            f"{checkpoint} ({digest[:16]}); name its own checkpoint or none"
        )


def _verdict_of(engine: BuiltEngine, evaluation: Evaluation) -> GateVerdict | None:
    """The verdict on this engine and this evaluation; None where `gate` has not run.

    Raises:
        ArtifactError: the verdict is about another engine, or about other measurements.
    """
    if not (engine.directory / VERDICT_FILE).exists():
        return None
    verdict = read_verdict(engine.directory)
    same = verdict.engine_digest == engine.digest
    how = [(it.target, it.arithmetic, it.executed_by, it.kv_cache) for it in (verdict, evaluation)]
    figures = verdict.measured.get("mean_kl"), evaluation.kl.mean.value
    if not same or how[0] != how[1] or figures[0] != figures[1]:
        raise ArtifactError(
            f"{engine.directory / VERDICT_FILE} judges another "
            f"{'evaluation' if same else 'engine'}; run `python -m quant_jobs gate` again"
        )
    return verdict

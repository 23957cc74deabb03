"""What an owner of a node with the GPUs runs once, before an engine for TensorRT-LLM serves.

    make engine-env TARGET=trtllm
    python bench/smoke_trtllm.py V3-TRTLLM --python .engines/trtllm-1.2.1/bin/python --output smoke

First a prefix of layers (TLLM_OVERRIDE_LAYER_NUM), loaded by `tensorrt_llm` itself in its own
environment: minutes, in which it is asked what its documents leave open. Then the whole engine,
behind the adapter and worker that serve: does it load, does it know a text, does it take a prompt
in chunks, how fast is it, and is a rank that dies noticed. docs/tensorrt-llm.md has the numbers of
the questions, and what the adapter does in either case.

Prints a row for each step: `held`, `failed`, `told` (it works either way) or `skipped`. OUTPUT gets
the table, the same as JSON with every answer, and the environment as a lock file. Exit code 1 if
any step failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.smoke import probe
from bench.smoke.lock import write_lock
from bench.smoke.serving import Smoke, Workload
from bench.smoke.verdicts import Verdict, judge
from deepseek.cli import make_app, run, show_lines
from deepseek.errors import ArtifactError, DeployError
from deepseek.files import write_json
from deepseek.tokenizer_file import parse_tokenizer
from serve_app.engine_sections import TrtllmOptions
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines, Plan
from serve_app.engines.remote.options import launch_of, plan_of
from serve_app.engines.remote.process import free_ports, worker_environment
from serve_app.engines.worker import processes
from serve_app.engines.worker.messages import Generate
from serve_app.engines.worker.trtllm import _sampling

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "tiny-deepseek-v3" / "heldout.txt"
TABLE, ANSWERS, LOCK = "smoke.md", "smoke.json", "requirements.lock"
#: Characters of the text that are read.
_CHARACTERS = 20_000

app = make_app(__doc__ or "")


def ask_prefix(
    plan: Plan,
    options: TrtllmOptions,
    *,
    layers: int,
    timeout_s: float,
    folder: Path,
    question_s: float = 120.0,
) -> dict[str, Any]:
    """What `tensorrt_llm` answers over the first layers of a directory; see probe.py."""
    job, answers = folder / "probe-job.json", folder / "probe-answers.json"
    write_json(
        job,
        {
            "directory": str(plan.directory),
            "arguments": dict(plan.arguments),
            "prompt": list(range(2, 26)),
            "end_id": min(plan.end_token_ids),
            "sampling": sampling_names(),
            "question_s": question_s,
        },
    )
    answers.unlink(missing_ok=True)
    launch = launch_of(options)
    env = worker_environment(os.environ) | free_ports(launch.ports)
    if layers:
        env["TLLM_OVERRIDE_LAYER_NUM"] = str(layers)
    began = time.monotonic()
    process = subprocess.Popen(
        [str(options.python), str(Path(probe.__file__)), str(job), str(answers)],
        env=env,
        start_new_session=True,
    )
    try:
        status: int | str = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        status = f"given up after {timeout_s:g} s"
    finally:
        end_session(process)
    found: dict[str, Any] = json.loads(answers.read_text()) if answers.exists() else {}
    return found | {"process": {"status": status, "seconds": time.monotonic() - began}}


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the probe, its ranks in sessions of their own too."""
    below = [found.pid for found in processes.descendants(process.pid)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def sampling_names() -> dict[str, Any]:
    """What the worker sends of a request, by the engine's names."""
    return _sampling(
        Generate(
            id=0,
            prompt_ids=[2],
            max_tokens=4,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            seed=0,
            ignore_eos=False,
            end_ids=[1],
            stop_token_ids=[],
            cache_salt="smoke",
        )
    )


def text_ids(plan: Plan, text: Path) -> list[int]:
    """A text as the engine's tokens.

    Raises:
        DeployError: it has too few of them.
    """
    tokenizer = parse_tokenizer((plan.directory / "tokenizer.json").read_bytes())
    words = text.read_text(encoding="utf-8")[:_CHARACTERS]
    ids: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
    if len(ids) < 128:
        raise DeployError(f"{text} has {len(ids)} tokens; give at least 128")
    return ids


def table(verdicts: list[Verdict]) -> str:
    """One Markdown row for each step."""
    rows = ["| step | question | verdict | seen | s |", "|---|---|---|---|---:|"]
    for verdict in verdicts:
        seen = " ".join(verdict.seen.split()).replace("|", "\\|")
        seconds = "" if verdict.seconds is None else f"{verdict.seconds:.1f}"
        cells = (verdict.step, verdict.number, verdict.outcome, seen, seconds)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


@app.command(help=__doc__)
def main(
    directory: Annotated[Path, typer.Argument(help="engine that `build --target trtllm` made")],
    python: Annotated[Path, typer.Option(help="Python of the engine's environment")],
    output: Annotated[Path, typer.Option(help="folder for table, answers and lock")],
    layers: Annotated[int, typer.Option(min=1, help="layers of the prefix")] = 5,
    prefix_only: Annotated[bool, typer.Option(help="leave the whole engine alone")] = False,
    kill_a_rank: Annotated[bool, typer.Option(help="end with the death of a rank")] = True,
    text: Annotated[Path, typer.Option(help="a text that the model should know")] = TEXT,
    isl: Annotated[int, typer.Option(min=1, help="prompt tokens of a measured request")] = 1024,
    osl: Annotated[int, typer.Option(min=2, help="answer tokens of a measured request")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, help="measured requests at a time")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="measured requests")] = 256,
    prefix_timeout_s: Annotated[float, typer.Option(min=1, help="for the whole prefix")] = 1800.0,
    load_timeout_s: Annotated[float, typer.Option(min=1, help="for the whole engine")] = 3600.0,
) -> None:
    if not python.exists():
        raise DeployError(f"{python} is not there; make it with `make engine-env TARGET=trtllm`")
    options = TrtllmOptions(
        directory=directory.absolute(), python=python.absolute(), load_timeout_s=load_timeout_s
    )  # not resolved: an environment's Python is a link
    plan = plan_of(options)
    version = plan.engine_version
    if version is None:
        raise ArtifactError(f"{directory} does not say for which TensorRT-LLM it was built")
    ids = text_ids(plan, text)
    output.mkdir(parents=True, exist_ok=True)
    verdicts: list[Verdict] = []

    def report(verdict: Verdict) -> None:
        verdicts.append(verdict)
        show_lines([f"{verdict.outcome:8}{verdict.step}: {verdict.seen}"])

    packages = write_lock(python, version, output / LOCK)
    report(Verdict("the environment's lock", "", "held", f"{packages} packages"))
    answers = ask_prefix(plan, options, layers=layers, timeout_s=prefix_timeout_s, folder=output)
    for verdict in judge(answers, version):
        report(verdict)
    report(Verdict("Ray as orchestrator", "2", "skipped", "the adapter starts MPI ranks only"))
    smoke = Smoke(
        lambda: RemoteEngine(options, deadlines=Deadlines(load_s=load_timeout_s)),
        ids,
        int(plan.arguments.get("max_num_tokens") or 8192),
        Workload(isl=isl, osl=osl, concurrency=concurrency, requests=requests),
        report,
    )
    if prefix_only:
        report(Verdict("the whole engine", "1", "skipped", "as asked"))
    else:
        asyncio.run(smoke.run(kill_a_rank=kill_a_rank))
    rows = table(verdicts)
    (output / TABLE).write_text(f"{rows}\n")
    write_json(
        output / ANSWERS,
        {
            "engine": str(directory),
            "version": version,
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "measured": [asdict(figures) for figures in smoke.measured],
            "answers": answers,
        },
    )
    show_lines(["", *rows.splitlines()])
    if any(verdict.outcome == "failed" for verdict in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    run(app)

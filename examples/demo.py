"""The main job on one machine without a GPU: `make demo`.

    plan -> quantize (as Ray jobs) -> build -> evaluate -> gate -> report -> serve -> ask

Every step is the command that one runs on a cluster, started as its own process, on a small model.
The demo ends with one table and `runs/demo/summary.json`, and leaves no process running.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console
from rich.table import Table

from quant_jobs.submission import make_quantization
from quant_jobs.submit import connect_to_jobs, submit

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"
OUT = ROOT / "runs" / "demo"
RECIPES = ("int4", "int8")
SERVED = "int4"
STARTED = time.monotonic()

say = Console(stderr=True, highlight=False)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    step("plan", f"does {MODEL.name} fit this machine?")
    finish([plan(recipe) for recipe in RECIPES])

    step("quantize", f"{' and '.join(RECIPES)}, as Ray jobs")
    with local_ray_with_jobs() as jobs:
        submitted = {recipe: submit_quantize(jobs, recipe) for recipe in RECIPES}
        for recipe, job_id in submitted.items():
            wait_for_job(jobs, recipe, job_id)

    step("build", " and ".join(RECIPES))
    finish([build(recipe) for recipe in RECIPES])
    summary = {}
    for recipe in RECIPES:  # one after the other: their decode speeds are compared
        step("evaluate, gate", recipe)
        summary[recipe] = judge(recipe)

    step("serve", f"{SERVED} over HTTP, while the reports are written")
    reports = [report(recipe) for recipe in RECIPES]
    with served(OUT / SERVED / "engine") as url:
        ask_three_questions(url)
    finish(reports)

    (OUT / "summary.json").write_text(json.dumps({"recipes": summary}, indent=2) + "\n")
    show_table(summary)
    say.print(
        f"\nReports: {', '.join(str((OUT / r / 'report.html').relative_to(ROOT)) for r in RECIPES)}"
        f"\nSummary: {(OUT / 'summary.json').relative_to(ROOT)}"
        f"\nDone in {time.monotonic() - STARTED:.0f} s."
    )


def step(name: str, what: str) -> None:
    say.print(f"\n[bold]{name}[/bold]  {what}  [dim]({time.monotonic() - STARTED:.0f} s)[/dim]")


def start(package: str, *args: object) -> subprocess.Popen[str]:
    """Start one of our commands as a user runs it; `finish` reads its stdout."""
    words = [sys.executable, "-m", package, *map(str, args)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(commands: list[subprocess.Popen[str]], *, show: bool = True) -> list[str]:
    """Wait for all commands and return their outputs; a command that fails ends the demo."""
    outputs = []
    for process in commands:
        output, _ = process.communicate()
        if show:
            sys.stderr.write(output)
        if process.returncode:
            words = subprocess.list2cmdline(list(map(str, process.args))[1:4])  # type: ignore[arg-type]
            raise SystemExit(f"demo: {words} ended with {process.returncode}")
        outputs.append(output)
    return outputs


def plan(recipe: str) -> subprocess.Popen[str]:
    return start("cluster", "plan", "--model", MODEL, "--recipe", recipe, "--hardware", "cpu")


# --- quantize ------------------------------------------------------------------------------------


@contextmanager
def local_ray_with_jobs() -> Iterator[Any]:
    """Start a Ray head with a folder, ports and a token of its own, so that no other Ray on this
    machine is in its way or is mistaken for it; yield a client of its jobs. Stops it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))  # its sockets need short names
    url = f"http://127.0.0.1:{free_port()}"
    # This process needs the token too: Ray's client reads it when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    bin_ = Path(sys.executable).parent
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "RAY_worker_niceness": "0",
        "PATH": f"{bin_}:{os.environ['PATH']}",  # a job runs this `python`
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        *(str(bin_ / "ray"), "start", "--head", "--block", "--port=0"),
        "--num-cpus=4",  # slots for both jobs at once, whatever the number of cores
        f"--dashboard-port={url.rpartition(':')[2]}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    with (OUT / "ray.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until_there(head, url, f"the Ray head ({OUT.relative_to(ROOT)}/ray.log)")
        yield connect_to_jobs(url)
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submit_quantize(jobs: Any, recipe: str) -> str:
    """Submit a quantize job as `python -m quant_jobs submit` does; return its id."""
    text, output = MODEL / "calibration.txt", OUT / recipe / "checkpoint"
    return submit(jobs, make_quantization(MODEL, recipe, [str(text)], output, 1)).submission_id


def wait_for_job(jobs: Any, recipe: str, job_id: str) -> None:
    while not (status := jobs.get_job_status(job_id)).is_terminal():
        time.sleep(0.2)
    if status.value != "SUCCEEDED":
        sys.stderr.write(jobs.get_job_logs(job_id))
        raise SystemExit(f"demo: the quantize job for {recipe} ended as {status.value}")
    say.print(f"  {recipe}: {job_id} {status.value}")


# --- build, evaluate, gate, report ---------------------------------------------------------------


def build(recipe: str) -> subprocess.Popen[str]:
    folder = OUT / recipe
    return start(
        *("quant_jobs", "build", "--checkpoint", folder / "checkpoint"),
        *("--target", "embedded", "--output", folder / "engine"),
    )


#: summary.json's keys, in order, as `gate --json` prints them.
SUMMARY_KEYS = (
    "bytes",
    "bf16_bytes",
    "perplexity",
    "source_perplexity",
    "kl",
    "top1",
    "decode_tokens_per_s",
    "bf16_decode_tokens_per_s",
    "verdict",
)


def judge(recipe: str) -> dict[str, Any]:
    """Evaluate and gate one engine; return its entry of the summary."""
    folder = OUT / recipe
    evaluate = start(
        *("quant_jobs", "evaluate", "--engine", folder / "engine", "--reference", MODEL),
        *("--data", MODEL / "heldout.txt", "--output", folder / "evaluation"),
    )
    finish([evaluate])
    gate = start(
        *("quant_jobs", "gate", "--engine", folder / "engine"),
        *("--evaluation", folder / "evaluation", "--json"),
    )
    judged = json.loads(finish([gate], show=False)[0])
    say.print(f"verdict: {judged['verdict']}")
    return {key: judged[key] for key in SUMMARY_KEYS}


def report(recipe: str) -> subprocess.Popen[str]:
    folder = OUT / recipe
    return start(
        *("quant_jobs", "report", "--checkpoint", folder / "checkpoint"),
        *("--engine", folder / "engine", "--evaluation", folder / "evaluation"),
        *("--output", folder / "report.html"),
    )


# --- serve ---------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(engine: Path) -> Iterator[str]:
    """Run `python -m serve_app` and yield its URL once /health answers; at the end SIGINT, as by
    ctrl-C."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "serve_app", "--engine", str(engine)),
            *("--model-name", SERVED, "--port", str(port)),
        ],
        cwd=ROOT,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_there(process, f"{url}/health", "the server")
        yield url
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.wait(timeout=60)
    if process.returncode:
        raise SystemExit(f"demo: the server ended with {process.returncode}")


def wait_until_there(
    process: subprocess.Popen[bytes], url: str, what: str, patience_s: float = 120
) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"demo: {what} ended with {process.returncode} before it answered")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise SystemExit(f"demo: {what} did not answer within {patience_s:.0f} s")


def ask_three_questions(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="demo")
    model = client.models.list().data[0].id
    for question in ("What does json.dumps do?", "What does os.path.join do?"):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            temperature=0,
        )
        say.print(f"  Q: {question}\n  A: {answer.choices[0].message.content}", markup=False)
    question = "What does shutil.copytree do?"
    say.print(f"  Q: {question} (streamed)\n  A: ", end="", markup=False)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            say.print(chunk.choices[0].delta.content, end="", markup=False)
    say.print()


# --- the table -----------------------------------------------------------------------------------


def show_table(summary: dict[str, dict[str, Any]]) -> None:
    table = Table(title="\nQuantized against the source, in one run")
    for heading in ("recipe", "MB", "of BF16", "perplexity", "ratio", "KL", "top-1", "decode tok/s",
                    "of unquantized", "verdict"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("recipe", "verdict") else "right")
    for recipe, row in summary.items():
        table.add_row(
            recipe,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes'] / row['bf16_bytes']:.1%}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / row['source_perplexity']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.2%}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s'] / row['bf16_decode_tokens_per_s']:.2f}x",
            row["verdict"],
        )
    Console(width=112).print(table)  # a pipe or a log has no width


if __name__ == "__main__":
    main()

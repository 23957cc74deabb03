"""Seconds from `python -m serve_app` to its first answer, on the tiny example model.

    python bench/first_answer.py [--rounds 5] [--engine DIR] [--checkout DIR] [--save FILE.json]

Each round starts the command, reads the line that says that it serves, asks for four tokens at
once, and stops it. HAProxy, two ingress replicas, admission and one engine replica start, as they
do by themselves; files are in the page cache, as after any first start. `--checkout` names further
checkouts of this project, which take turns with this one in the same run. CPU seconds are those of
all processes of the service at its answer, by what they are: on two cores half of them is the
soonest that it could answer.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from support.engines import make_engine
from support.ports import free_port
from support.processes import cpu_by_part

from bench.decoding.report import table
from bench.stacks.service import ROOT, started
from deepseek.cli import make_app, make_progress, run

#: What a process is, by words of its title; the first that fits.
PARTS = (
    ("engine replica", ("ServeReplica:intserve:engine",)),
    ("ingress replicas", ("ServeReplica:intserve:ingress",)),
    ("admission", ("AdmissionActor",)),
    ("Serve's controller and proxies", ("ServeController", "ProxyActor", "HAProxyManager")),
    ("HAProxy", ("haproxy",)),
    ("command", ("-m serve_app",)),
)
OTHERS = "Ray's daemons"
#: Seconds that a service may take to answer.
PATIENCE_S = 120
app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start: seconds until the line and until the answer, and CPU seconds by part."""

    checkout: str
    line_s: float
    answer_s: float
    cpu_s: dict[str, float]


@app.command(no_args_is_help=False)
def main(
    num_rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    engine: Annotated[
        Path | None, typer.Option(help="Engine directory; default: the example in INT8.")
    ] = None,
    checkouts: Annotated[
        list[Path] | None, typer.Option("--checkout", help="Another one, in turn with this.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write all starts as JSON here.")] = None,
) -> None:
    """See the module's docstring."""
    roots = [ROOT, *(path.resolve() for path in checkouts or [])]
    starts: list[Start] = []
    with tempfile.TemporaryDirectory() as name, make_progress() as progress:
        example = ROOT / "examples" / "tiny-deepseek-v3"
        directory = engine or make_engine(example, "int8", Path(name))
        task = progress.add_task("", total=(num_rounds + 1) * len(roots))
        for number in range(num_rounds + 1):  # the first fills caches, and is not counted
            for root in roots[number % len(roots) :] + roots[: number % len(roots)]:
                progress.update(task, description=root.name)
                one = start(root, directory.resolve(), Path(name) / "serve.log")
                starts += [one] if number else []
                progress.advance(task)
    print(report(starts))
    if save is not None:
        save.write_text(json.dumps([asdict(one) for one in starts], indent=1) + "\n")


def start(root: Path, engine: Path, log: Path) -> Start:
    """Start the service of a checkout once, ask it, stop it.

    Raises:
        SystemExit: it does not serve; with the end of its log.
    """
    port = free_port()
    flags = ("--engine", str(engine), "--allow-ungated", "--model-name", "m", "--port", str(port))
    began = time.perf_counter()
    with started(["-m", "serve_app", *flags], log, root=root) as pid:
        line_s = time.perf_counter() - began
        ask(port)
        answer_s = time.perf_counter() - began
        cpu_s = cpu_by_part(pid, PARTS, OTHERS)
    return Start(checkout=root.name, line_s=line_s, answer_s=answer_s, cpu_s=cpu_s)


def ask(port: int) -> None:
    body = json.dumps({"model": "m", "prompt": "hello", "max_tokens": 4}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] > 0


def report(starts: list[Start]) -> str:
    """Medians and ranges by checkout, and where the CPU seconds go."""
    names = list(dict.fromkeys(one.checkout for one in starts))
    own = {name: [one for one in starts if one.checkout == name] for name in names}
    rows = [["line that it serves, s", *(_spread([s.line_s for s in own[n]]) for n in names)]]
    rows.append(["first answer, s", *(_spread([s.answer_s for s in own[n]]) for n in names)])
    totals = [_spread([sum(s.cpu_s.values()) for s in own[n]]) for n in names]
    rows.append(["CPU, s", *totals])
    for part in dict.fromkeys(part for one in starts for part in one.cpu_s):
        used = [statistics.median(s.cpu_s.get(part, 0.0) for s in own[n]) for n in names]
        rows.append([f"  {part}", *(f"{seconds:.2f}" for seconds in used)])
    return table([f"median (range), {os.cpu_count()} CPUs", *names], rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    run(app)

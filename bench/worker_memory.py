"""The memory of one worker at DeepSeek-V3's true widths, and the step with the peak.

    python bench/worker_memory.py --recipe int4-gptq [--experts 16] [--groups 2]

Runs a job in this process, without Ray, on a synthetic model of one dense and one MoE layer, and
samples its anonymous and shared memory a hundred times a second. `--groups` is the number of units
of experts: the 256 experts of DeepSeek-V3 form units of 8. Prints Markdown.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from watched import ROOT, TEXT, make_model, repeatedly, write_recipe

from deepseek.cli import make_app, run
from deepseek.source.synthetic import Size
from quant_jobs.__main__ import app as quant_jobs
from quant_jobs.calibration import units

INTERVAL_S = 0.01
#: Files whose functions name a step.
STEPS = tuple(
    str(ROOT / "quant_jobs" / file)
    for file in (
        "workers/worker.py",
        "workers/original.py",
        "workers/quantized.py",
        "workers/unit_solver.py",
        "algorithms/linear.py",
        "algorithms/gptq.py",
    )
)

app = make_app(__doc__ or "")


@app.command()
def main(
    recipe: Annotated[str, typer.Option(help="A built-in recipe.")] = "int4-gptq",
    experts: Annotated[int, typer.Option(min=2, help="Of the MoE layer.")] = 16,
    groups: Annotated[int, typer.Option(min=1, help="Units of experts.")] = 2,
    num_blocks: Annotated[int, typer.Option(min=4, help="Blocks of calibration text.")] = 8,
    block_tokens: Annotated[int, typer.Option(min=16, help="Tokens per block.")] = 256,
    hidden: Annotated[int | None, typer.Option(help="True shapes without it.")] = None,
    output: Annotated[Path, typer.Option(help="Where model and artifact go.")] = ROOT
    / "runs"
    / "bench-worker-memory",
) -> None:
    """See the module's docstring."""
    output.mkdir(parents=True, exist_ok=True)
    size = Size(layers=2, experts=experts, vocab=258, hidden=hidden)
    model = make_model(output / f"model-{experts}-{hidden or 'true'}", size)
    settings = write_recipe(output / "recipe.yaml", recipe, num_blocks, block_tokens)
    artifact = output / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    units.MAX_EXPERT_GROUPS = groups
    words = ["quantize", "--model", model.directory, "--recipe", settings, "--calibration", TEXT]
    words += ["--output", artifact, "--workers", 0]
    watch, begun, cpu = Watch(threading.get_ident()), time.monotonic(), time.process_time()
    with repeatedly(watch.sample, INTERVAL_S):
        quant_jobs([str(word) for word in words], standalone_mode=False)
    typer.echo(
        f"\n`{recipe}`, {experts} experts in {groups} units, {num_blocks} x {block_tokens} tokens, "
        f"{time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} s of CPU\n\n"
        "| GB at most | step |\n|---:|---|"
    )
    for step, peak in sorted(watch.peaks.items(), key=lambda item: -item[1])[:6]:
        typer.echo(f"| {peak / 1e9:.2f} | {step} |")
    shutil.rmtree(artifact)


@dataclass(slots=True)
class Watch:
    """Samples the memory of this process; `peaks` in bytes, by the step that `thread` is in."""

    thread: int
    peaks: dict[str, int] = field(default_factory=dict)

    def sample(self) -> None:
        step, used = self._step(), own_memory()
        self.peaks[step] = max(used, self.peaks.get(step, 0))

    def _step(self) -> str:
        """The last three of the job's functions on the stack: `solve > _gptq > inverse_factor`."""
        frame, names = sys._current_frames().get(self.thread), []
        while frame is not None and len(names) < 3:
            if frame.f_code.co_filename in STEPS:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        return " > ".join(reversed(names)) or "between steps"


def own_memory() -> int:
    """Anonymous and shared memory of this process, in bytes; not the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(kib) * 1024 for kib in sizes)


if __name__ == "__main__":
    run(app)

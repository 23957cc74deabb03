"""A quantize job of true-width layers on one GPU, phase by phase, beside the estimate of the same.

    python bench/gpu_job.py --recipe int4-gptq [--experts 16 --groups 2] [--num-blocks 32]

Makes a synthetic model of DeepSeek-V3's widths (one dense layer, the others MoE with few experts)
and quantizes it on one worker in this process, without Ray. `--groups` is the number of units of
experts: the 256 experts of DeepSeek-V3 form units of 8. The device is synchronized around every
phase, so seconds are the phases' own, at the price of what little would overlap. The
estimate is that of `quant_jobs/cost` for one worker without an object store; *floor* has the
hardware's peaks, *expected* its assumptions. Prints Markdown; `--save` writes the JSON.

Phases are the estimate's. `exchange` is copying between host and device, wherever it happens;
`other` is the driver and what no phase counts. `read`, `write` and `boundary` go on in threads
beside the rest. `--device cpu` tries the script.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from watched import ROOT, TEXT, make_model, write_recipe

from deepseek.cli import make_app, run
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.synthetic import Size
from quant_jobs.calibration import units
from quant_jobs.calibration.measuring import LayerInputs
from quant_jobs.cost.model import PHASES, JobTime, job_time, memory_use, peak_bytes
from quant_jobs.cost.rates import Rates, expected_rates, peak_rates
from quant_jobs.cost.work import Job
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.workers import unit_solver
from quant_jobs.workers.devices import Device
from quant_jobs.workers.in_process import InProcessWorker
from quant_jobs.workers.original import OriginalLayer
from quant_jobs.workers.quantized import QuantizedLayer
from quant_jobs.workers.read_ahead import ReadAhead
from quant_jobs.workers.worker import Worker

#: (owner of a function, its name, the phase that it belongs to). Phases of a job's own thread are
#: exclusive: a function called in another phase's takes its time from that.
PATCHED: tuple[tuple[Any, str, str], ...] = (
    (Worker, "attend", "forward A"),
    (OriginalLayer, "observe", "statistics"),
    (OriginalLayer, "scale_statistics", "statistics"),
    (LayerInputs, "mlp", "statistics"),
    (LayerInputs, "down", "statistics"),
    (OriginalLayer, "scale_losses", "solve"),
    (OriginalLayer, "solve", "solve"),
    (unit_solver, "inverse_factor", "solve: factor"),
    (unit_solver, "gptq", "solve: columns"),
    (QuantizedLayer, "attend", "forward B"),
    (QuantizedLayer, "run_experts", "forward B"),
    (QuantizedLayer, "combine", "forward B"),
)
THREADS: tuple[tuple[Any, str, str], ...] = (
    (ReadAhead, "_read", "read"),
    (Worker, "write", "write"),
    (Worker, "store", "boundary"),
)
OWN = ("solve: factor", "solve: columns", "other")

app = make_app(__doc__ or "")


class Clock:
    """Adds up seconds by phase: of one thread exclusively, of others as they come."""

    def __init__(self, device: Device) -> None:
        self.seconds = dict.fromkeys((*PHASES, *OWN), 0.0)
        self.copied = {"to the device": 0, "from the device": 0}  # bytes
        self._on_gpu = device == "cuda"
        self._thread = threading.get_ident()
        self._phases = ["other"]
        self._since = time.perf_counter()

    def start(self) -> None:
        self._since = time.perf_counter()

    def _turn(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        self._turn()
        self._phases.append(name)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()

    def wrap(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return timed

    def wrap_copies(self, to: Callable[..., Any]) -> Callable[..., Any]:
        """`Tensor.to`, counted where it is asked for another device."""

        @functools.wraps(to)
        def timed(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], torch.device) and args[0].type != tensor.device.type:
                way = "from the device" if tensor.is_cuda else "to the device"
                self.copied[way] += tensor.nbytes
                with self.phase("exchange"):
                    return to(tensor, *args, **kwargs)
            return to(tensor, *args, **kwargs)

        return timed

    def wrap_thread(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


@contextmanager
def patched(clock: Clock) -> Iterator[None]:
    """While it lasts, the job's functions report to the clock."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in (*PATCHED, *THREADS)]
    before += [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in ("to", "cpu")]
    host, to = torch.device("cpu"), clock.wrap_copies(torch.Tensor.to)
    try:
        for owner, name, phase in PATCHED:
            setattr(owner, name, clock.wrap(getattr(owner, name), phase))
        for owner, name, phase in THREADS:
            setattr(owner, name, clock.wrap_thread(getattr(owner, name), phase))
        torch.Tensor.to = to  # type: ignore[method-assign]
        torch.Tensor.cpu = lambda tensor: to(tensor, host)  # type: ignore[method-assign]
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def measure(model: CheckpointReader, recipe: Path, output: Path, device: Device) -> dict[str, Any]:
    """Run one job from the start; seconds by phase, wall time, memory of the GPU, the digest."""
    shutil.rmtree(output, ignore_errors=True)
    job = plan_job(model.directory, str(recipe), TEXT, output, device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    with JobFolder(output, job.fingerprint) as folder, InProcessWorker() as worker, patched(clock):
        clock.start()
        started = time.perf_counter()
        manifest = Driver(job, folder, worker, lambda _: None).run()
        with clock.phase("other"):
            wall = time.perf_counter() - started
    record = json.loads((output / "job_report.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    on_gpu = device == "cuda"
    return {
        "wall": wall,
        "phases": clock.seconds,
        "copied": clock.copied,
        "layers": {str(layer["layer"]): layer["seconds"] for layer in record["layers"]},
        "gpu_allocated": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "gpu_reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "worker_peak_rss": record["workers"][0]["peak_rss_bytes"],
        "digest": manifest.digest,
    }


def predicted(job: Job, rates: Rates) -> JobTime:
    """One worker in the driver's process: no object store, no rounds of calls, no start."""
    return job_time(job, replace(rates, put=math.inf, call=0.0, start=0.0))


@app.command()
def main(
    recipe: Annotated[list[str] | None, typer.Option(help="Default: int4-gptq.")] = None,
    layers: Annotated[int, typer.Option(min=2, help="One of them dense.")] = 3,
    experts: Annotated[int, typer.Option(min=2, help="Of an MoE layer.")] = 16,
    groups: Annotated[int, typer.Option(min=1, help="Units of experts.")] = 2,
    num_blocks: Annotated[int, typer.Option(min=1)] = 32,
    block_tokens: Annotated[int, typer.Option(min=16)] = 2048,
    hidden: Annotated[int | None, typer.Option(help="True widths without it.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    save: Annotated[Path | None, typer.Option(help="Write the JSON here, too.")] = None,
    output: Annotated[Path, typer.Option(help="Where model and artifacts go.")] = ROOT
    / "runs"
    / "bench-gpu",
) -> None:
    """See the module's docstring."""
    output.mkdir(parents=True, exist_ok=True)
    units.MAX_EXPERT_GROUPS = groups
    size = Size(layers=layers, experts=experts, vocab=258, hidden=hidden)
    model = make_model(output / f"model-{layers}-{experts}-{hidden or 'true'}", size)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU: not for the page"
    print(
        f"{name}, torch {torch.__version__}; {layers} layers, one dense, {experts} experts in "
        f"{groups} units, {num_blocks} x {block_tokens} tokens.\n\n{HEADER}",
        flush=True,
    )
    results = []
    for chosen in recipe or ["int4-gptq"]:
        settings = write_recipe(output / f"{chosen}.yaml", chosen, num_blocks, block_tokens)
        place: Device = "cuda" if device == "cuda" else "cpu"
        measured = measure(model, settings, output / "artifact", place)
        planned = plan_job(model.directory, str(settings), TEXT, output / "artifact", place)
        job = Job(
            config=model.config, recipe=planned.recipe, nodes=1, per_node=1,
            tokens=num_blocks * block_tokens, block_tokens=block_tokens,
        )  # fmt: skip
        times = {
            "floor": predicted(job, peak_rates()),
            "expected": predicted(job, expected_rates()),
        }
        print("\n".join(rows(chosen, times, measured, job)), flush=True)
        estimates = {
            kind: {phase: estimate.phase(phase) for phase in PHASES}
            | {"total": estimate.total, "sections": [layer.sections for layer in estimate.layers]}
            for kind, estimate in times.items()
        }
        results.append({"recipe": chosen, "measured": measured, **estimates})
        if save is not None:
            save.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


_SHOWN = tuple(phase for phase in PHASES if phase != "calls")
HEADER = (
    f"| recipe | seconds | {' | '.join(_SHOWN)} | of solve: factor | columns | other | wall "
    "| GPU GB |\n|---|---|" + "---:|" * (len(_SHOWN) + 5)
)


def rows(recipe: str, times: dict[str, JobTime], measured: dict[str, Any], job: Job) -> list[str]:
    """Three lines: floor, expected, measured. `wall` is the driver's; GB are what the allocator
    handed out at most, and what the estimate says without the share that it keeps for the CUDA
    context."""
    uses = memory_use(job)
    kept = sum(use.gpu for use in uses if use.name.startswith("CUDA"))
    lines = []
    for kind, estimate in times.items():
        cells = [f"{estimate.phase(phase):.1f}" for phase in _SHOWN]
        gigabytes = f"{(peak_bytes(uses)[2] - kept) / 1e9:.1f}" if kind == "expected" else ""
        cells += ["", "", "", f"{estimate.total:.1f}", gigabytes]
        lines.append(f"| `{recipe}` | {kind} | {' | '.join(cells)} |")
    seconds = dict(measured["phases"])
    seconds["solve"] += seconds["solve: factor"] + seconds["solve: columns"]
    cells = [f"{seconds[phase]:.1f}" for phase in (*_SHOWN, *OWN)]
    cells += [f"{measured['wall']:.1f}", f"{measured['gpu_allocated'] / 1e9:.1f}"]
    lines.append(f"| `{recipe}` | measured | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run(app)

"""Measures the pieces of a quantize job, each alone, from which `quant_jobs estimate` is computed.

    python bench/pieces.py [--save quant_jobs/cost/pieces.json] [--repeats 5] [--gib 1]

One thread, true DeepSeek-V3 widths where a CPU is fast enough. Results:

    rates       of this machine: storage, hashing, Ray; what one process sustains
    fractions   rate of a piece over this machine's own peak of its kind (a large float32 matmul, a
                large copy). For a GPU they are a hypothesis: shapes and caches differ there.
    work        of a solver on any device: kernel launches, bytes that unfused elementwise kernels
                move, and FLOPs, counted from the operators that torch dispatches. Exact, and the
                same on every machine.
    launches    kernels of one calibration block (or one expert on one calibration block) in the
                job's own functions

Computing is timed by the thread's CPU time, so other work on the machine changes it little;
waiting (for storage, Ray) by the wall clock, the fastest of several. `bench/job_model.py` compares
an estimate made from these with a real run.

Prints Markdown; `--save` writes the JSON that `quant_jobs/cost` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cluster.connect import connect
from deepseek.config import ModelConfig
from deepseek.formats import compress, decompress, dequantize_fp8_block, quantize_fp8_block
from deepseek.inventory import layer_tensors
from deepseek.recipe import Scheme
from deepseek.tensor_files import (
    read_header,
    read_tensor,
    save_tensors,
    tensor_bytes,
    tensor_digest,
)
from quant_jobs.algorithms.awq import candidate_scales, scale_losses, search_clip
from quant_jobs.algorithms.gptq import Rounded, gptq, inverse_factor
from quant_jobs.algorithms.ranges import group_ranges
from quant_jobs.calibration.forward import Rotary, Routed, Trunk, hidden, run_expert, tokens_of
from quant_jobs.calibration.statistics import SAMPLE_TOKENS, Accumulator, observe
from quant_jobs.workers.devices import use_one_thread
from quant_jobs.workers.messages import register_tensor_serializer

INT4 = Scheme(weights="int4", group_size=128)
INT4_MSE = Scheme(weights="int4", group_size=128, clip="mse")
INT8 = Scheme(weights="int8")
#: [N, K] of the weight that a solver is counted and timed on: K is gate_proj's, N is one chunk of
#: `quant_jobs/algorithms/ranges.py`; elementwise work is proportional to N.
ROWS, WIDTH = 128, 7168
#: Edge of the matrices of the float32 peak, and of the Gram matrix (of down_proj) that is inverted.
EDGE = 2048
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one call on `weights` weights.

    `launches` counts kernels, `bytes` those moved by kernels that multiply no matrices, `flops`
    those of kernels that do; `seconds` are this machine's. `columns` is the length of GPTQ's loop,
    to which its launches are proportional.
    """

    weights: int
    launches: int
    bytes: int
    flops: int
    seconds: float
    columns: int = 0


class _Operators(TorchDispatchMode):
    """Counts the operators that launch kernels, and the bytes of their tensor arguments and
    results."""

    _MATMULS = ("mm", "bmm", "addmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "detach", "_unsafe_view")):
            self.launches += 1
            if name not in self._MATMULS:
                self.bytes += sum(map(_moved, (*args, *(kwargs or {}).values(), result)))
        return result


def _moved(value: Any) -> int:
    if isinstance(value, Tensor):  # an expanded view reads no more than its storage
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    return sum(map(_moved, value)) if isinstance(value, list | tuple) else 0


def count(call: Callable[[], object], weights: int, repeats: int, columns: int = 0) -> Work:
    with _Operators() as operators:
        call()
    with FlopCounterMode(display=False) as flops:
        call()
    took = seconds(call, repeats)
    total = flops.get_total_flops()
    return Work(weights, operators.launches, operators.bytes, total, took, columns)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of this thread: the median of `repeats` calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return statistics.median(times[1:])


# --- rates of this machine, GB/s of one process ---


def storage_rates(folder: Path, num_bytes: int) -> dict[str, float]:
    """GB/s of the functions of reader and writer. `cold`: the pages were dropped before."""
    path = folder / "piece.safetensors"
    tensors = {f"t{i}": torch.randint(0, 256, (num_bytes // 8,)).to(torch.uint8) for i in range(8)}
    os.sync()
    started = time.perf_counter()
    saved = save_tensors(path, tensors)
    rates = {"save_tensors": saved.num_bytes / (time.perf_counter() - started) / 1e9}
    tensor = tensors["t0"]
    digest = seconds(lambda: tensor_digest(tensor), 3)
    whole = seconds(lambda: hashlib.sha256(tensor_bytes(tensor)).digest(), 3)
    rates["digest"] = len(tensor) / digest / 1e9
    rates["hash for saving"] = len(tensor) / (digest + whole) / 1e9
    entries = read_header(path).tensors
    for kind, clock in (("cold", time.perf_counter), ("page cache", time.thread_time)):
        with path.open("rb", buffering=0) as file:
            if kind == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = clock()
            for entry in entries.values():
                read_tensor(file, entry)
            rates[f"read, {kind}"] = saved.num_bytes / (clock() - started) / 1e9
    return rates


@ray.remote(num_cpus=0)
class _Peer:
    def __init__(self) -> None:
        use_one_thread()
        register_tensor_serializer()

    def nothing(self) -> None:
        pass

    def make(self, num_bytes: int) -> None:
        self.data = torch.ones(num_bytes // 4)

    def put(self) -> tuple[Any, float]:
        started = time.perf_counter()
        reference = ray.put(self.data)
        return [reference], time.perf_counter() - started

    def get(self, box: list[Any]) -> float:
        """Seconds until every byte was mapped and touched."""
        started = time.perf_counter()
        ray.get(box[0]).sum()
        return time.perf_counter() - started


def ray_rates(num_bytes: int, repeats: int) -> dict[str, float]:
    """Rates between two actors of one node, with tensors as the job sends them. `get` includes
    reading."""
    with connect(num_cpus=2):
        sender, receiver = _Peer.remote(), _Peer.remote()  # type: ignore[attr-defined]
        ray.get([sender.make.remote(num_bytes), receiver.nothing.remote()])
        puts, gets = [], []
        for _ in range(repeats + 1):
            box, took = ray.get(sender.put.remote())
            puts.append(took)
            gets.append(ray.get(receiver.get.remote(box)))
            del box
        calls = []
        for _ in range(200):
            started = time.perf_counter()
            ray.get([sender.nothing.remote(), receiver.nothing.remote()])
            calls.append(time.perf_counter() - started)
    return {
        "ray put": num_bytes / min(puts[1:]) / 1e9,
        "ray get and read": num_bytes / min(gets[1:]) / 1e9,
        "ray call us": statistics.median(calls) * 1e6,
    }


# --- the work of solvers ---


def solver_work(repeats: int) -> dict[str, Work]:
    """The work of each solver on one [ROWS, WIDTH] weight and `SAMPLE_TOKENS` tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((ROWS, WIDTH), generator=generator) * WIDTH**-0.5
    x = torch.randn((SAMPLE_TOKENS, WIDTH), generator=generator)
    fp8, scale = quantize_fp8_block(weight)
    candidates = candidate_scales(x.abs().mean(dim=0), weight.abs().mean(dim=0))
    packed, coded = compress(weight, INT4), compress(weight, INT8)
    pieces = {
        "dequantize_fp8": lambda: dequantize_fp8_block(fp8, scale),
        "compress_int4": lambda: compress(weight, INT4),
        "compress_int8": lambda: compress(weight, INT8),
        "decompress_int4": lambda: decompress(packed, INT4, (ROWS, WIDTH)),
        "decompress_int8": lambda: decompress(coded, INT8, (ROWS, WIDTH)),
        "awq_candidate": lambda: scale_losses([weight], x, candidates[:1], INT4),
        "awq_clip": lambda: search_clip(weight, x, INT4),
        "mse_clip": lambda: group_ranges(weight, INT4_MSE),
    }
    work = {name: count(call, weight.numel(), repeats) for name, call in pieces.items()}
    batch = torch.randn((2, EDGE // 4, EDGE // 4), generator=generator)
    factors = [inverse_factor(rows.T @ rows, damping=0.01) for rows in batch]

    def round_copy() -> list[Rounded]:
        return gptq(batch.clone(), factors, INT4)

    return work | {"gptq": count(round_copy, batch.numel(), repeats, columns=EDGE // 4)}


def layer_launches(model: Path) -> dict[str, int]:
    """Kernels of one calibration block in attention and router (`attend`); in measuring one expert
    (its tokens, gate and up, the statistics of both inputs without Gram matrices); and in running
    one expert."""
    config = ModelConfig.from_directory(model)
    layer, tokens = config.first_k_dense_replace, 64
    specs = [s for s in layer_tensors(config, layer) if s.expert is None and not s.is_indexer]
    filled = {spec.name: torch.randn(spec.shape) * 0.05 for spec in specs}
    high = {spec.name: filled[spec.name] for spec in specs if spec.kind != "linear"}
    trunk = Trunk(config, layer, high, lambda module: filled[f"{module}.weight"])
    rotary = Rotary(config)
    x_TD = torch.randn(tokens, config.hidden_size)
    _, routed = trunk.attend(rotary, x_TD)  # fills the rotary table
    assert routed.experts is not None
    expert = int(routed.experts[0, 0])
    wide, narrow = config.hidden_size, config.moe_intermediate_size
    gate, up, down = torch.randn(narrow, wide), torch.randn(narrow, wide), torch.randn(wide, narrow)
    weights = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {
        "attend": _launches(lambda: trunk.attend(rotary, x_TD)),
        "measure": _launches(lambda: _measure(routed, expert, gate, up)),
        "run_expert": _launches(lambda: run_expert(routed, expert, weights, {})),
    }


def _measure(routed: Routed, expert: int, gate: Tensor, up: Tensor) -> None:
    """What the job's measuring of one expert does for one calibration block."""
    len(tokens_of(routed, expert)[0])
    x = routed.z[tokens_of(routed, expert)[0]]
    Accumulator("input", gram=False).add(0, observe(x, 1))
    Accumulator("down", gram=False).add(0, observe(hidden(x, gate, up), 1))


def _launches(call: Callable[[], object]) -> int:
    with _Operators() as operators, torch.no_grad():
        call()
    return operators.launches


def peaks(repeats: int) -> dict[str, float]:
    """This machine's peaks: GFLOP/s of a large float32 matmul, GB/s of a large copy (both ways)."""
    a, b = torch.randn(EDGE, EDGE), torch.randn(EDGE, EDGE)
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    return {
        "matmul": 2 * EDGE**3 / seconds(lambda: a @ b, repeats) / 1e9,
        "copy": 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), repeats) / 1e9,
    }


def operator_us(repeats: int) -> float:
    """Microseconds of an operator with almost no work, called from Python."""
    x = torch.ones(16)

    def many() -> None:
        for _ in range(1000):
            x.add(1.0)

    return seconds(many, repeats) / 1000 * 1e6


def fractions(peak: dict[str, float], work: dict[str, Work], repeats: int) -> dict[str, float]:
    """Rate over peak of a Gram matrix (x^T x of an expert's rows of one block), of GPTQ's
    factor of it, and of elementwise work."""
    rows = torch.randn(2 * EDGE, EDGE)
    gram = rows.T @ rows + EDGE * torch.eye(EDGE)
    elementwise = [work[name] for name in ("compress_int4", "compress_int8", "dequantize_fp8")]
    moved, took = sum(w.bytes for w in elementwise), sum(w.seconds for w in elementwise)

    def factor() -> Tensor:
        lower = torch.linalg.cholesky(gram)
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

    flops = 2 * len(rows) * EDGE**2
    return {
        "gram": flops / seconds(lambda: rows.T @ rows, repeats) / 1e9 / peak["matmul"],
        "factor": 4 / 3 * EDGE**3 / seconds(factor, repeats) / 1e9 / peak["matmul"],
        "elementwise": moved / took / 1e9 / peak["copy"],
    }


def machine() -> str:
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    kind = names[0] if names else platform.machine()
    return (
        f"{kind}, {torch.backends.cpu.get_cpu_capability()}, one thread, torch {torch.__version__}"
    )


def report(measured: dict[str, Any]) -> str:
    lines = [
        f"{measured['machine']}, {measured['date']}, load average {os.getloadavg()[0]:.1f}",
        "",
    ]
    for kind in ("peaks", "rates", "fractions", "launches"):
        lines += [f"| {kind} | |", "|---|---:|"]
        lines += [f"| {name} | {value:.3g} |" for name, value in measured[kind].items()] + [""]
    lines += [
        "| work per weight | launches | bytes | FLOP | GB/s | GFLOP/s |",
        "|---|" + "---:|" * 5,
    ]
    for name, work in measured["work"].items():
        numel = work["weights"]
        lines.append(
            f"| {name} | {work['launches']} a call | {work['bytes'] / numel:.1f} "
            f"| {work['flops'] / numel:.1f} | {work['bytes'] / work['seconds'] / 1e9:.2f} "
            f"| {work['flops'] / work['seconds'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--save", type=Path, help="write the JSON here, too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the file that is read")
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-deepseek-v3"))
    arguments = parser.parse_args()
    use_one_thread()
    peak = peaks(arguments.repeats)
    work = solver_work(arguments.repeats)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rates = storage_rates(Path(folder), int(arguments.gib * 1024) * MIB)
    rates |= ray_rates(256 * MIB, arguments.repeats)
    rates["operator us"] = operator_us(arguments.repeats)
    measured = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "peaks": peak,
        "rates": rates,
        "fractions": fractions(peak, work, arguments.repeats),
        "work": {name: asdict(counted) for name, counted in work.items()},
        "launches": layer_launches(arguments.model),
    }
    print(report(measured))
    if arguments.save:
        arguments.save.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

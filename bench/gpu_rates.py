"""Measures on a GPU what `quant_jobs estimate` assumes of one.

    python bench/gpu_rates.py [--save FILE] [--repeats 5] [--device cuda]

Each rate is taken with the job's own functions at DeepSeek-V3's true widths, in seconds of wall
time between two synchronizations: the median of the repeats, after one that is not counted. Work
per weight (bytes, kernels) is that of `quant_jobs/cost/pieces.json`, counted by `bench/pieces.py`.
Prints Markdown: every input of `quant_jobs/cost/rates.py` that can be measured here beside its
value, then the pieces. `--device cpu` tries the script itself at a hundredth of the sizes.

K inputs of a linear
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from deepseek.cli import make_app, run
from deepseek.formats import compress, decompress, dequantize_fp8_block, quantize_fp8_block
from deepseek.recipe import Scheme
from deepseek.tensor_files import tensor_bytes, tensor_digest
from quant_jobs.algorithms.gptq import gptq, inverse_factor
from quant_jobs.algorithms.ranges import group_ranges
from quant_jobs.calibration.forward import hidden
from quant_jobs.calibration.statistics import Accumulator, observe
from quant_jobs.cost.rates import inputs
from quant_jobs.cost.work import column_loop, pieces
from quant_jobs.workers.devices import make_repeatable, use_one_thread

INT4 = Scheme(weights="int4", group_size=128)
INT4_MSE = Scheme(weights="int4", group_size=128, clip="mse")
INT8 = Scheme(weights="int8")
MIB = 1 << 20

app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True)
class Sizes:
    """`edge` of the peak's matrices, `wide` and `narrow` widths of an expert, `rows` of one block,
    `copied` bytes."""

    edge: int = 8192
    wide: int = 7168
    narrow: int = 2048
    rows: int = 4096
    copied: int = 1024 * MIB


class Bench:
    """Times calls on one device; `found` are the results by name."""

    def __init__(self, device: str, sizes: Sizes, repeats: int) -> None:
        self.device, self.sizes, self._repeats = device, sizes, repeats
        self._generator = torch.Generator(device).manual_seed(0)
        self.found: dict[str, float] = {}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(self._repeats + 1):
            self._wait()
            started = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def products(bench: Bench) -> None:
    """FLOP/s of a large float32 product, of a Gram matrix, of an expert on a few rows, and of
    GPTQ's factor."""
    size, found = bench.sizes, bench.found
    square = bench.randn(size.edge, size.edge)
    took = bench.seconds(lambda: square @ square)
    found["float32 product, FLOP/s"] = 2 * size.edge**3 / took
    x = bench.randn(size.rows, size.wide)
    share = observe(x, 1, keep_rows=True)

    def add_up() -> None:
        accumulator.add(next(blocks), share)

    accumulator, blocks = Accumulator("x", gram=True), iter(range(1 << 20))
    took = bench.seconds(add_up)
    found["Gram matrix of a block, FLOP/s"] = 2 * size.rows * size.wide**2 / took
    gate, up = bench.randn(size.narrow, size.wide), bench.randn(size.narrow, size.wide)
    for rows in (16, 64, 128, 1024):
        part = x[:rows]
        took = bench.seconds(lambda part=part: hidden(part, gate, up))  # type: ignore[misc]
        flops = 4 * rows * size.wide * size.narrow
        found[f"gate and up on {rows} rows, FLOP/s"] = flops / took
    for width in (size.wide, size.narrow):
        rows = bench.randn(2 * width, width)
        gram = rows.T @ rows
        took = bench.seconds(lambda gram=gram: inverse_factor(gram.clone(), 0.01))  # type: ignore[misc]
        found[f"factor of K {width}, FLOP/s"] = 4 / 3 * width**3 / took


def elementwise(bench: Bench) -> None:
    """Bytes/s of a copy, and of the solvers' elementwise work on one weight by counted bytes."""
    size, found = bench.sizes, bench.found
    source = torch.ones(size.copied // 4, device=bench.device)
    target = torch.empty_like(source)
    found["copy on the device, B/s"] = 2 * size.copied / bench.seconds(lambda: target.copy_(source))
    weight = bench.randn(size.narrow, size.wide) * size.wide**-0.5
    fp8, scale = quantize_fp8_block(weight)
    packed, coded = compress(weight, INT4), compress(weight, INT8)
    shape = (size.narrow, size.wide)
    calls: dict[str, Callable[[], object]] = {
        "dequantize_fp8": lambda: dequantize_fp8_block(fp8, scale),
        "compress_int4": lambda: compress(weight, INT4),
        "compress_int8": lambda: compress(weight, INT8),
        "decompress_int4": lambda: decompress(packed, INT4, shape),
        "decompress_int8": lambda: decompress(coded, INT8, shape),
        "mse_clip": lambda: group_ranges(weight, INT4_MSE),
    }
    for name, call in calls.items():
        piece = pieces()["work"][name]
        moved = piece["bytes"] / piece["weights"] * weight.numel()
        found[f"{name}, B/s"] = moved / bench.seconds(call)


def launches(bench: Bench) -> None:
    """Seconds of a kernel with almost no work, and of GPTQ's column loop, by the size of a batch:
    measured, and as the estimate counts it."""
    size, found = bench.sizes, bench.found
    x = torch.ones(16, device=bench.device)

    def many() -> None:
        for _ in range(1000):
            x.add(1.0)

    found["a kernel, s"] = bench.seconds(many) / 1000
    rows = bench.randn(2 * size.wide, size.wide)
    upper = inverse_factor(rows.T @ rows, 0.01)
    del rows
    for batch in (1, 8):
        weights = bench.randn(batch, 2 * size.narrow, size.wide) * size.wide**-0.5

        def solve(weights: Tensor = weights) -> object:
            return gptq(weights.clone(), [upper] * len(weights), INT4_MSE)

        work = column_loop(2 * size.narrow, size.wide, batch, size.wide // 128)
        found[f"column loop of {batch}, s"] = bench.seconds(solve)
        found[f"column loop of {batch}, kernels"] = work.launches


def copies(bench: Bench) -> None:
    """Bytes/s between host and device, pageable and pinned memory; and of hashing on the host."""
    size, found = bench.sizes, bench.found
    host = torch.ones(size.copied // 4)
    there = host.to(bench.device)
    found["pageable to device, B/s"] = size.copied / bench.seconds(lambda: host.to(bench.device))
    found["device to pageable, B/s"] = size.copied / bench.seconds(there.cpu)
    if bench.device == "cuda":
        pinned = host.pin_memory()
        took = bench.seconds(lambda: there.copy_(pinned, non_blocking=True))
        found["pinned to device, B/s"] = size.copied / took
        took = bench.seconds(lambda: pinned.copy_(there, non_blocking=True))
        found["device to pinned, B/s"] = size.copied / took
    part = host[: len(host) // 8]
    digest = bench.seconds(lambda: tensor_digest(part))
    whole = bench.seconds(lambda: hashlib.sha256(tensor_bytes(part)).digest())
    found["read digest, B/s"] = part.nbytes / digest
    found["write digest, B/s"] = part.nbytes / (digest + whole)


def compared(found: dict[str, float], wide: int) -> list[tuple[str, float, float, str]]:
    """(input of the estimate, its value, the same measured, unit)."""
    value = {name: entry.value for name, entry in inputs().items()}
    matmul = found["float32 product, FLOP/s"]
    parts = ("dequantize_fp8", "compress_int4", "compress_int8", "decompress_int4", "mse_clip")
    rates = [found[f"{name}, B/s"] for name in parts]
    loops = [found[f"column loop of 8, {what}"] for what in ("s", "kernels")]
    rows = [
        ("matmul", matmul / value["float32 peak"], "of float32 peak"),
        ("Gram", found["Gram matrix of a block, FLOP/s"] / matmul, "of matmul"),
        ("factor", found[f"factor of K {wide}, FLOP/s"] / matmul, "of matmul"),
        ("elementwise", statistics.harmonic_mean(rates) / value["HBM"], "of HBM"),
        ("launch", found["a kernel, s"], "s a kernel"),
        ("launch", loops[0] / loops[1], "s a kernel of the column loop, its work included"),
        ("PCIe", found["pageable to device, B/s"], "B/s to the device"),
        ("PCIe", found["device to pageable, B/s"], "B/s from the device"),
        ("read digest", found["read digest, B/s"], "B/s a worker"),
        ("write digest", found["write digest, B/s"], "B/s"),
    ]
    return [(name, value[name], measured, unit) for name, measured, unit in rows]


@app.command()
def main(
    save: Annotated[Path | None, typer.Option(help="Write the JSON here, too.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each piece.")] = 5,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
) -> None:
    """See the module's docstring."""
    use_one_thread()
    make_repeatable("cuda" if device == "cuda" else "cpu")
    sizes = Sizes() if device == "cuda" else Sizes(256, 512, 256, 128, 8 * MIB)
    bench = Bench(device, sizes, repeats)
    for section in (products, elementwise, launches, copies):
        section(bench)
        if device == "cuda":
            torch.cuda.empty_cache()
    rows = compared(bench.found, sizes.wide)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU: not for the page"
    print(f"{name}, torch {torch.__version__}, median of {repeats}.\n")
    print("| input of the estimate | its value | measured | measured / value | unit |")
    print("|---|---:|---:|---:|---|")
    for label, assumed, measured, unit in rows:
        print(f"| {label} | {assumed:.3g} | {measured:.3g} | {measured / assumed:.2f} | {unit} |")
    print("\n| piece | measured |\n|---|---:|")
    for label, measured in bench.found.items():
        print(f"| {label} | {measured:.3g} |")
    if save is not None:
        content: dict[str, Any] = {"device": name, "torch": torch.__version__, **bench.found}
        save.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(app)

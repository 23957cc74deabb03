"""The native linears beside what the machine can do at most: bytes per second from memory at few
rows, operations per second at many.

    python bench/native_linear.py [--threads 2] [--rows 1 4 16 64 512] [--formats int8-a8 bf16]
                                  [--shapes 2048x2048 4096x1024] [--rounds 15]

A weight [N, K] is one of a pool of 320 MB and more, so that it comes from memory each time. Inputs
are encoded before; the encoding is timed for itself. The floors are measured in the same run: the
bandwidth of plain reads of the pool with the same number of threads, and the operations of a loop
that only multiplies registers (bench/native_peaks.c). Every figure is the best of its rounds,
because a floor is compared with a best case; the median stands beside it and says how quiet the
machine was.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from support.native_linears import NativeInput, NativeLinear, Product, checked
from torch import Tensor

from deepseek import _native
from deepseek.engine.native_layout import native_shapes
from deepseek.recipe import Scheme

POOL_BYTES = 336 << 20
FORMATS = {
    "int8-a8": Scheme(weights="int8", activations="int8"),
    "int8-block-a8": Scheme(weights="int8-block", activations="int8"),
    "int4-g32-a8": Scheme(weights="int4", group_size=32, activations="int8"),
    "int4-g128-a8": Scheme(weights="int4", group_size=128, activations="int8"),
    "int4-asym-g128-a8": Scheme(weights="int4-asym", group_size=128, activations="int8"),
    "int4-g128": Scheme(weights="int4", group_size=128),
    "int4-g32": Scheme(weights="int4", group_size=32),
    "int8": Scheme(weights="int8"),
    "bf16": Scheme(weights="bf16"),
}
#: The products of the 706 M-parameter model of bench/peers_decode.py: queries and latents, queries
#: from latents, output, dense and expert layers, head.
DS3 = "704x1024 3072x384 1024x2048 5632x1024 1024x2816 1024x1024 1024x512 32000x1024"


class Pool:
    """Random bytes, out of which weights are cut one after the other."""

    def __init__(self) -> None:
        self.bytes = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8)

    def weights(self, scheme: Scheme, num_outputs: int, num_inputs: int) -> list[NativeLinear]:
        """As many weights [N, K] as the pool has room for. They share their scales, which are a
        small part of what is read."""
        shapes = native_shapes(scheme, num_outputs, num_inputs)
        name = next(name for name in ("weight", "codes", "packed") if name in shapes)
        shape, dtype = shapes[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        others = {
            suffix: torch.full(rest[0], 0.01 if rest[1].is_floating_point else 1, dtype=rest[1])
            for suffix, rest in shapes.items()
            if suffix != name
        }
        return [
            NativeLinear(
                scheme,
                {name: self.bytes[first : first + size].view(dtype).view(shape), **others},
                num_outputs,
                num_inputs,
            )
            for first in range(0, POOL_BYTES - size + 1, size)
        ]


def timed(call: Callable[[], object], threads: int) -> float:
    """Seconds; of CPU time where there is one thread, so that other processes hardly matter."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def in_threads(count: int, work: Callable[[int], object]) -> None:
    if count == 1:
        work(0)
        return
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_floors(pool: Tensor, threads: int, rounds: int) -> tuple[float, float, float]:
    """Bytes, INT8 operations and BF16 operations per second; an operation is a product or a sum."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peaks.so"
        source = Path(__file__).with_name("native_peaks.c")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        peaks = ctypes.CDLL(str(library))
    for name in ("int8_products", "bf16_products", "read_words"):
        getattr(peaks, name).restype = ctypes.c_int64
    steps, part = 500_000, POOL_BYTES // threads
    address = pool.data_ptr()
    works: list[tuple[float, Callable[[int], object]]] = [
        (
            part,
            lambda n: peaks.read_words(
                ctypes.c_void_p(address + n * part), ctypes.c_int64(part // 8)
            ),
        ),
        (steps * 16 * 64 * 2, lambda n: peaks.int8_products(ctypes.c_int64(steps))),
        (steps * 16 * 32 * 2, lambda n: peaks.bf16_products(ctypes.c_int64(steps))),
    ]
    best = [
        min(timed(lambda work=work: in_threads(threads, work), threads) for _ in range(rounds))
        for _, work in works
    ]
    memory, int8, bf16 = (
        threads * amount / seconds for (amount, _), seconds in zip(works, best, strict=True)
    )
    return memory, int8, bf16


def measure(
    linears: list[NativeLinear], num_rows: int, threads: int, rounds: int
) -> tuple[float, float, float]:
    """Best and median seconds of a product of `num_rows` rows, and best of the encoding."""
    linear = linears[0]
    x = torch.randn(num_rows, linear.num_inputs)
    encoded = NativeInput(x, linear.encoding, threads=threads)
    out = torch.empty(num_rows, linear.num_outputs)
    gemms = [[checked(Product(weight, encoded, out))] for weight in linears]
    times, encodings = [], []
    for index in range(rounds * max(1, 48 // num_rows)):
        gemm = gemms[index % len(gemms)]
        times.append(timed(lambda gemm=gemm: _native.run_gemms(gemm, threads), threads))
    for _ in range(rounds):
        encodings.append(timed(lambda: NativeInput(x, linear.encoding, threads=threads), threads))
    return min(times), statistics.median(times), min(encodings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x1024", *DS3.split()])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool = Pool()
    floors = measure_floors(pool.bytes, arguments.threads, arguments.rounds)
    memory, int8, bf16 = floors
    print(
        f"{_native.isa()}, {arguments.threads} threads: memory {memory / 1e9:.1f} GB/s, "
        f"INT8 {int8 / 1e9:.0f} GOP/s, BF16 {bf16 / 1e9:.0f} GOP/s"
    )
    print(
        "format             NxK        rows   best us  median us  encode us   GB/s   GOP/s "
        " of floor"
    )
    for name in arguments.formats:
        scheme = FORMATS[name]
        for shape in arguments.shapes:
            num_outputs, num_inputs = map(int, shape.split("x"))
            linears = pool.weights(scheme, num_outputs, num_inputs)
            for num_rows in arguments.rows:
                best, median, encoding = measure(
                    linears, num_rows, arguments.threads, arguments.rounds
                )
                peak = int8 if scheme.activations == "int8" else bf16
                operations = 2 * num_outputs * num_inputs * num_rows
                floor = max(linears[0].num_bytes / memory, operations / peak)
                print(
                    f"{name:18} {shape:10} {num_rows:4} {best * 1e6:9.1f} {median * 1e6:10.1f} "
                    f"{encoding * 1e6:10.1f} {linears[0].num_bytes / best / 1e9:6.1f} "
                    f"{operations / best / 1e9:7.0f} {floor / best:8.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""What this machine can do at best: bytes per second from memory, operations per second.

Memory is read by plain C, compiled for the machine, with one thread and with all; threads read
parts of one buffer of a gigabyte, far larger than any cache. On a shared machine the bandwidth
changes from minute to minute, so it is measured in every round, beside the contenders. Products are
torch's (oneDNN, MKL) on square matrices that fit the caches: what they reach is taken for the peak,
because nothing faster is known to be installed.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

GIB = 1 << 30
SIZE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Bytes per second by number of threads; operations per second (two per multiply-add) of a
    matrix product, by type."""

    threads: int
    bandwidth: dict[int, float]
    operations: dict[str, float]


class Memory:
    """A buffer of a gigabyte, and the reader of it.

    Raises on construction:
        FileNotFoundError: there is no `cc`.
    """

    def __init__(self, threads: int) -> None:
        self._counts = sorted({1, threads})
        self._words = np.ones(GIB // 8, np.uint64)
        with tempfile.TemporaryDirectory() as folder:
            self._read = _compiled(Path(folder))

    def bandwidth(self, repeats: int = 3) -> dict[int, float]:
        """Bytes per second by number of threads, the best of `repeats`."""
        return {
            count: GIB / _best(repeats, partial(_read, self._read, self._words, count))
            for count in self._counts
        }


def measure(threads: int, bandwidths: Sequence[dict[int, float]], repeats: int = 7) -> Ceilings:
    """The medians of the bandwidths of all rounds, and of products the best of `repeats`."""
    torch.set_num_threads(threads)
    return Ceilings(
        threads=threads,
        bandwidth={
            count: statistics.median(each[count] for each in bandwidths) for count in bandwidths[0]
        },
        operations=_operations(repeats),
    )


def _compiled(folder: Path) -> Callable[..., int]:
    """`read_words` of ceilings.c."""
    library = folder / "ceilings.so"
    source = Path(__file__).with_suffix(".c")
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).read_words  # releases the GIL while it runs
    function.restype, function.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t]
    return function  # type: ignore[no-any-return]  # ctypes has no types


def _read(read: Callable[..., int], words: np.ndarray, count: int) -> None:
    """Read all words, a part in each of `count` threads."""
    part = len(words) // count
    sums = [0] * count

    def read_part(number: int) -> None:
        sums[number] = read(words.ctypes.data + 8 * part * number, part)

    readers = [threading.Thread(target=read_part, args=(number,)) for number in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sum(sums) == part * count, "words were left out"


def _operations(repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((SIZE, SIZE), generator=generator)
    low = values.bfloat16()
    codes = (values * 30).clamp(-127, 127).to(torch.int8)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "fp32": lambda: values @ values,
        "bf16": lambda: low @ low,
        "int8": lambda: torch._int_mm(codes, codes),
    }
    count = 2 * SIZE**3
    return {name: count / _best(repeats, product) for name, product in products.items()}


def _best(repeats: int, call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)

"""The rates that the estimate of a quantize job divides by, each with its source.

Two sets for a GPU node. `peak_rates`: the hardware's peaks and no overhead; no job of this schedule
is faster. `expected_rates`: fractions of the peaks that were measured on a CPU and are carried over
as a hypothesis, that were published, or that are assumed; `inputs()` says which is which. A third,
`machine_rates`, is what `bench/pieces.py` measured on its own machine, with one thread;
`bench/job_model.py` compares the estimate with a real run by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from cluster.hardware import GPUS, GPUS_PER_NODE
from quant_jobs.cost import STORAGE
from quant_jobs.cost.work import Load, pieces

GPU = GPUS["H800-80GB"]


@dataclass(frozen=True, slots=True)
class Input:
    """One number of the estimate: its value, unit, and where it comes from."""

    name: str
    value: float
    unit: str
    source: Literal["measured", "published", "assumed"]
    where: str


@lru_cache
def inputs() -> dict[str, Input]:
    """Every number besides shapes and counted work, by name."""
    measured = pieces()
    fraction, rate = measured["fractions"], measured["rates"]
    here = "bench/pieces.py on a CPU"
    carried = f"{here}; carried to the GPU as a hypothesis"
    sheet = "NVIDIA data sheet of the H100 SXM; the H800 differs in NVLink and FP64 only"
    unpinned = "what comes from the object store is pageable memory; pinned copies reach 50"
    tcp = "Ray over TCP, large objects: ray#42632 saw 45 Gb/s, and 0.3 GB/s before tuning"
    return {
        entry.name: entry
        for entry in (
            Input("float32 peak", 67e12, "FLOP/s", "published", sheet),
            Input("HBM", GPU.memory_bandwidth, "B/s", "published", "cluster/hardware.py"),
            Input("PCIe peak", 64e9, "B/s", "published", "Gen5 x16, one direction"),
            Input("PCIe", 12e9, "B/s", "assumed", unpinned),
            Input("network peak", 8 * 50e9, "B/s of a node", "published", "8 x 400 Gb/s"),
            Input("network", 5.6e9, "B/s of a node", "published", tcp),
            Input("object store", 32e9, "B/s of a node", "published", "ray#39127, many puts"),
            Input("matmul", 0.7, "of float32 peak", "assumed", "large products in cuBLAS"),
            Input("Gram", min(fraction["gram"], 1.0), "of matmul", "measured", carried),
            Input("factor", min(fraction["factor"], 1.0), "of matmul", "measured", carried),
            Input("elementwise", 0.6, "of HBM", "assumed", "unfused kernels of PyTorch"),
            Input("launch", 8e-6, "s a kernel", "assumed", "PyTorch from Python, no CUDA graphs"),
            Input("read digest", rate["digest"] * 1e9, "B/s a worker", "measured", here),
            Input("write digest", rate["hash for saving"] * 1e9, "B/s", "measured", here),
            Input("call", rate["ray call us"] * 1e-6, "s a round", "measured", here),
            Input("imbalance", 1.25, "busiest / mean", "assumed", "routed tokens of a worker"),
            Input("start", 60.0, "s", "assumed", "Ray, imports, CUDA contexts, opening shards"),
        )
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of one worker unless said otherwise: FLOP/s, bytes/s, and seconds for `launch` (a
    kernel), `call` (a round of calls) and `start`."""

    matmul: float
    gram: float
    factor: float
    elementwise: float
    pcie: float
    put: float
    network: float  # into one node
    storage: float  # of one node, reads and writes together
    read_digest: float
    write_digest: float
    launch: float
    call: float
    start: float

    def compute(self, load: Load) -> float:
        """Seconds of the kernels of a load, one after the other."""
        products = load.matmul / self.matmul + load.gram / self.gram + load.factor / self.factor
        return products + load.moved / self.elementwise + load.launches * self.launch

    def copies(self, load: Load) -> float:
        """Seconds of a load's copies between device, process and object store."""
        return load.pcie / self.pcie + load.put / self.put


def peak_rates(storage: float = STORAGE) -> Rates:
    """The hardware's peaks, no overheads. `storage` in bytes per second and node."""
    value = {name: entry.value for name, entry in inputs().items()}
    return Rates(
        matmul=value["float32 peak"],
        gram=value["float32 peak"],
        factor=value["float32 peak"],
        elementwise=value["HBM"],
        pcie=value["PCIe peak"],
        put=math.inf,
        network=value["network peak"],
        storage=storage,
        read_digest=math.inf,
        write_digest=math.inf,
        launch=0.0,
        call=0.0,
        start=0.0,
    )


def expected_rates(storage: float = STORAGE) -> Rates:
    """Peaks times the fractions of `inputs()`, and overheads."""
    value = {name: entry.value for name, entry in inputs().items()}
    matmul = value["float32 peak"] * value["matmul"]
    return Rates(
        matmul=matmul,
        gram=matmul * value["Gram"],
        factor=matmul * value["factor"],
        elementwise=value["HBM"] * value["elementwise"],
        pcie=value["PCIe"],
        put=value["object store"] / GPUS_PER_NODE,
        network=value["network"],
        storage=storage,
        read_digest=value["read digest"],
        write_digest=value["write digest"],
        launch=value["launch"],
        call=value["call"],
        start=value["start"],
    )


def machine_rates(measured: Mapping[str, Any], start: float) -> Rates:
    """Rates of one CPU worker of the machine that `bench/pieces.py` ran on (`measured` is its
    output); no hypothesis is in them."""
    peak, fraction, rate = measured["peaks"], measured["fractions"], measured["rates"]
    matmul = peak["matmul"] * 1e9
    return Rates(
        matmul=matmul,
        gram=matmul * fraction["gram"],
        factor=matmul * fraction["factor"],
        elementwise=peak["copy"] * 1e9 * fraction["elementwise"],
        pcie=math.inf,
        put=rate["ray put"] * 1e9,
        network=math.inf,
        storage=rate["read, page cache"] * 1e9,
        read_digest=rate["digest"] * 1e9,
        write_digest=rate["hash for saving"] * 1e9,
        launch=rate["operator us"] * 1e-6,
        call=rate["ray call us"] * 1e-6,
        start=start,
    )

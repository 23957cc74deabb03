"""The machines that a plan is made for: memory, generation, peak rates. Data, and one parser.

`8xH800-80GB` is eight GPUs in one node; more than eight are whole nodes of eight. `cpu` is the
machine that runs the command. Rates are dense peaks of the SXM boards from NVIDIA's data sheets,
without sparsity; memory is what the driver reports (`nvidia-smi`, MiB), not the label.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from deepseek.errors import DeployError

#: Every profile is of an HGX board or a DGX: eight GPUs on one NVLink switch.
GPUS_PER_NODE = 8

#: CUDA compute capability: sm80 is Ampere (no FP8 tensor cores), sm90 is Hopper.
GpuGeneration = Literal["sm80", "sm90", "cpu"]

MIB = 1 << 20
_HGX_HOST_BYTES = 2 * 1024**4  # what HGX and DGX nodes of eight ship with


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device type. A `cpu` profile stands for the whole host.

    `memory_bytes` is physical. `usable_fraction` of it is left for weights, workspace and KV: on a
    GPU the rest goes to the CUDA context, NCCL buffers, CUDA graphs and allocator fragmentation
    (1.5 to 5 GB are reported); on a host, to the system and the server's other processes.
    `peak_tflops` is by number format (`fp16` also stands for bf16; INT8 counts operations); a
    format without tensor cores is absent. Bandwidths are bytes per second: `memory_bandwidth` of
    HBM, `nvlink_bandwidth` of one GPU, both directions together, 0 without NVLink, and
    `network_bandwidth` of one GPU's share of the node's network, one direction.
    """

    name: str
    generation: GpuGeneration
    memory_bytes: int
    usable_fraction: float
    memory_bandwidth: float
    peak_tflops: dict[str, float]
    nvlink_bandwidth: float
    network_bandwidth: float = 0.0
    host_memory_bytes: int = _HGX_HOST_BYTES

    @property
    def usable_bytes(self) -> int:
        """Bytes that weights, workspace and KV cache may take together."""
        return int(self.memory_bytes * self.usable_fraction)

    @property
    def is_gpu(self) -> bool:
        return self.generation != "cpu"


@dataclass(frozen=True, slots=True)
class Machines:
    """`count` devices of one type, which together serve one replica of the model."""

    hardware: Hardware
    count: int

    @property
    def num_gpus(self) -> int:
        return self.count if self.hardware.is_gpu else 0

    @property
    def num_nodes(self) -> int:
        return -(-self.count // GPUS_PER_NODE)

    @property
    def label(self) -> str:
        """As the user writes it: `8xH800-80GB`, `cpu`."""
        return f"{self.count}x{self.hardware.name}" if self.hardware.is_gpu else self.hardware.name

    def with_count(self, count: int) -> Machines:
        return Machines(self.hardware, count)

    def for_ranks(self, tp: int | None) -> Machines:
        """The machines that `tp` ranks run on, one GPU each; all of them without a number.

        Raises:
            DeployError: there are fewer GPUs than ranks.
        """
        if tp is not None and self.hardware.is_gpu and tp > self.count:
            raise DeployError(
                f"--tp {tp} needs {tp} GPUs, and --hardware {self.label} has {self.count}; use "
                f"--hardware {tp}x{self.hardware.name} or --tp {self.count}"
            )
        return self if tp is None else self.with_count(tp)


def _gpu(
    name: str,
    generation: GpuGeneration,
    mib: int,
    bandwidth: float,
    fp16: float,
    eight_bit: dict[str, float],
    nvlink: float,
    network: float,
) -> Hardware:
    return Hardware(
        name=name,
        generation=generation,
        memory_bytes=mib * MIB,
        usable_fraction=0.92,
        memory_bandwidth=bandwidth,
        peak_tflops={"fp16": fp16, **eight_bit},
        nvlink_bandwidth=nvlink,
        network_bandwidth=network,
    )


_HOPPER = {"fp8": 1979.0, "int8": 1979.0}
_H20 = {"fp8": 296.0, "int8": 296.0}
#: One network adapter for each GPU: ConnectX-7 at 400 Gb/s in DGX H100 and H200 (their user
#: guides), ConnectX-6 at 200 Gb/s in DGX A100. For H800 and H20 the same is assumed.
_NDR, _HDR = 50e9, 25e9

#: Profiles by name. Sources: NVIDIA data sheets H100 (2023), H200 (2024), A100 80GB (2021); the
#: H800 is an H100 with NVLink cut to 400 GB/s, the H20 a Hopper with few SMs, full NVLink and HBM.
GPUS: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        _gpu("H800-80GB", "sm90", 81559, 3.35e12, 989.0, _HOPPER, 400e9, _NDR),
        _gpu("H100-80GB", "sm90", 81559, 3.35e12, 989.0, _HOPPER, 900e9, _NDR),
        _gpu("H20-96GB", "sm90", 97871, 4.0e12, 148.0, _H20, 900e9, _NDR),
        _gpu("H20-141GB", "sm90", 143771, 4.8e12, 148.0, _H20, 900e9, _NDR),
        _gpu("H200-141GB", "sm90", 143771, 4.8e12, 989.0, _HOPPER, 900e9, _NDR),
        _gpu("A100-80GB", "sm80", 81920, 2.039e12, 312.0, {"int8": 624.0}, 600e9, _HDR),
    )
}
_ALIASES = {"H200": "H200-141GB"}


def local_cpu() -> Hardware:
    """The host that runs this process. Memory is the host's own; rates are those of the reference
    machine (two cores of a Xeon without AMX: DRAM reads 26 GB/s, FP32 0.3 TFLOP/s, INT8
    1.2 TOP/s)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        name="cpu",
        generation="cpu",
        memory_bytes=memory,
        usable_fraction=0.8,
        memory_bandwidth=26e9,
        peak_tflops={"fp32": 0.3, "int8": 1.2},
        nvlink_bandwidth=0.0,
        host_memory_bytes=memory,
    )


def parse_hardware(text: str) -> Machines:
    """`8xH800-80GB`, `16xH800-80GB`, `4xH200`, `cpu` or `1xcpu`.

    Raises:
        DeployError: the name is unknown, or the count is missing or neither 1, 2, 4 nor a multiple
            of 8.
    """
    device, number = _parse(text)
    if not device.is_gpu:
        return Machines(device, 1)
    if number is None:
        raise DeployError(f"--hardware {text}: say how many, as in {GPUS_PER_NODE}x{device.name}")
    if number not in (1, 2, 4) and (number == 0 or number % GPUS_PER_NODE):
        raise DeployError(
            f"--hardware {text}: {number} GPUs are neither part of one node (1, 2, 4) nor whole "
            f"nodes of {GPUS_PER_NODE}"
        )
    return Machines(device, number)


def parse_device(text: str) -> tuple[Hardware, int | None]:
    """A device's name, and how many there are at most where that is said: `H200`, `16xH200`.

    Raises:
        DeployError: as `parse_hardware`, but that the number may be left out.
    """
    device, number = _parse(text)
    return device, None if number is None else parse_hardware(text).count


def _parse(text: str) -> tuple[Hardware, int | None]:
    """The device, and the number before it."""
    match = re.fullmatch(r"(?:(\d+)x)?(\S+)", text.strip())
    count, name = (match[1], match[2]) if match else (None, text)
    if name.lower() == "cpu":
        if count not in (None, "1"):
            raise DeployError(f"--hardware {text}: the engine runs on one CPU host; write cpu")
        return local_cpu(), 1
    gpus = {known.lower(): gpu for known, gpu in GPUS.items()}
    gpus |= {alias.lower(): GPUS[known] for alias, known in _ALIASES.items()}
    gpu = gpus.get(name.lower())
    if gpu is None:
        raise DeployError(
            f"--hardware {text}: {name!r} is unknown; write COUNTxNAME with one of "
            f"{', '.join(GPUS)}, or cpu"
        )
    return gpu, None if count is None else int(count)

"""The messages between driver and workers, and how tensors travel between processes.

Separate from `worker.py`, so that the driver does not load transformers' modeling code and
modelopt.

Tensors travel through Ray's object store as raw buffers (`register_tensor_serializer`): written
once, mapped by every process of the node that asks, never pickled. A received tensor is read-only
memory: no one may write into it. It is host memory, whatever device the sender computes on; a
worker on a GPU copies messages to its device (`to_device`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from deepseek.artifact.manifest import Fallback
from deepseek.recipe import Recipe
from deepseek.tensor_files import ALIGNMENT
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.calibration.statistics import InputShare
from quant_jobs.workers.devices import Device

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """The parameters of a job for one worker. `num_blocks` is the number of calibration blocks of
    the whole job, not of this worker; `device` is the one it computes on."""

    model: Path
    output: Path
    recipe: Recipe
    num_blocks: int
    device: Device = "cpu"


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """The parameters of a pass through the artifact in the directory `artifact`, for one worker;
    the others as in `WorkerJob`."""

    artifact: Path
    num_blocks: int
    device: Device = "cpu"


#: Input statistics of the attention's linears on one worker's blocks: by input, then by block.
AttentionShare = dict[str, dict[int, InputShare]]


@dataclass(slots=True)
class SolveSummary:
    """The results of solving some units of a layer, without the tensors; mappings are by module.

    `tokens` counts tokens that the router sent to an MLP, and measured tokens elsewhere.
    `input_amax` and `kv_latent_amax` are of the inputs after folding. `computing_zero` are MLPs
    that no rounding can change (`algorithms/exact.py`).
    """

    errors: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    input_amax: dict[str, float] = field(default_factory=dict)
    kv_latent_amax: float | None = None
    fallbacks: tuple[Fallback, ...] = ()
    smoothing: Smoothing = field(default_factory=Smoothing)
    source_digests: dict[str, str] = field(default_factory=dict)
    computing_zero: set[str] = field(default_factory=set)


#: Packed tensors, as the artifact stores them, by full name.
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class WorkerUsage:
    """Resources that a worker used since `begin`: wall seconds by step, peak resident memory, bytes
    read and written."""

    pid: int
    node: str
    seconds: dict[str, float]
    peak_rss_bytes: int
    bytes_read: int
    bytes_written: int


def in_block_order(shares: Iterator[Mapping[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Merge the answers of several workers, each by calibration block, in ascending block order."""
    whole: dict[int, Any] = {}
    for share in shares:
        assert not whole.keys() & share.keys(), "two workers held the same block"
        whole |= share
    yield from sorted(whole.items())


def to_device(value: Message, device: torch.device) -> Message:
    """Copy the tensors of a message (dicts, lists, tuples and dataclasses of them) to `device`. A
    tensor that is there already is not copied."""

    def move(item: Any) -> Any:
        match item:
            case Tensor():
                return item.to(device)
            case dict():
                return {key: move(value) for key, value in item.items()}
            case list() | tuple():
                return type(item)(move(value) for value in item)
            case _ if is_dataclass(item) and not isinstance(item, type):
                values = {part.name: move(getattr(item, part.name)) for part in fields(item)}
                return replace(item, **values)
            case _:
                return item

    return move(value)


def register_tensor_serializer() -> None:
    """Make Ray send tensors as raw buffers of host memory. Call it once in every process that sends
    tensors. torch's own pickling copies them twice, cannot restore float8, and restores a GPU's
    tensor on a GPU."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_flatten, deserializer=_restore)


def _flatten(tensor: Tensor) -> tuple[np.ndarray[Any, Any], torch.dtype, tuple[int, ...]]:
    host = tensor.detach().cpu().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy(), host.dtype, tuple(host.shape)


def _restore(buffer: tuple[np.ndarray[Any, Any], torch.dtype, tuple[int, ...]]) -> Tensor:
    flat, dtype, shape = buffer
    with warnings.catch_warnings():
        # The memory is the object store's and read-only, which torch cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(flat).view(dtype).view(shape)
    # MKL's products round differently on memory that is not aligned to a cache line.
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

"""What driver and workers say to each other, and how tensors travel between them.

Apart from `worker.py`, so that the driver need not load transformers' modeling code and modelopt.

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
    """What a worker must know to work. `num_blocks` is of the whole job, not of this worker;
    `device` is what it computes on."""

    model: Path
    output: Path
    recipe: Recipe
    num_blocks: int
    device: Device = "cpu"


#: What the attention's linears saw on one worker's blocks: by input, then by block.
AttentionShare = dict[str, dict[int, InputShare]]


@dataclass(slots=True)
class SolveSummary:
    """What solving a share of a layer amounts to, without the tensors.

    `tokens`, `input_amax` and `kv_latent_amax` are of the inputs as they are after folding.
    """

    errors: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    input_amax: dict[str, float] = field(default_factory=dict)
    kv_latent_amax: float | None = None
    fallbacks: tuple[Fallback, ...] = ()
    smoothing: Smoothing = field(default_factory=Smoothing)
    source_digests: dict[str, str] = field(default_factory=dict)


#: Tensors of the artifact by full name.
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class WorkerUsage:
    """Where this worker's time went, by step, its peak resident memory, and bytes moved."""

    pid: int
    node: str
    seconds: dict[str, float]
    peak_rss_bytes: int
    bytes_read: int
    bytes_written: int


def in_block_order(shares: Iterator[Mapping[int, Any]]) -> Iterator[tuple[int, Any]]:
    """What several workers sent, block by block in ascending order."""
    whole: dict[int, Any] = {}
    for share in shares:
        assert not whole.keys() & share.keys(), "two workers held the same block"
        whole |= share
    yield from sorted(whole.items())


def to_device(value: Message, device: torch.device) -> Message:
    """A message, or a part of one (of dicts, lists, tuples and dataclasses), with its tensors on
    `device`; a tensor that is there already is not copied."""

    def move(one: Any) -> Any:
        match one:
            case Tensor():
                return one.to(device)
            case dict():
                return {key: move(part) for key, part in one.items()}
            case list() | tuple():
                return type(one)(move(part) for part in one)
            case _ if is_dataclass(one) and not isinstance(one, type):
                parts = {part.name: move(getattr(one, part.name)) for part in fields(one)}
                return replace(one, **parts)
            case _:
                return one

    return move(value)


def register_tensor_serializer() -> None:
    """Have Ray move tensors as raw buffers of host memory. To be called once in every process that
    sends any; torch's own pickling copies them twice, cannot read float8 back, and would bring a
    tensor of a GPU back on one."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_flatten, deserializer=_restore)


def _flatten(tensor: Tensor) -> tuple[np.ndarray[Any, Any], torch.dtype, tuple[int, ...]]:
    host = tensor.detach().cpu().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy(), host.dtype, tuple(host.shape)


def _restore(parts: tuple[np.ndarray[Any, Any], torch.dtype, tuple[int, ...]]) -> Tensor:
    flat, dtype, shape = parts
    with warnings.catch_warnings():
        # The memory is the object store's and read-only, which torch cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(flat).view(dtype).view(shape)
    # MKL's products round differently on memory that does not begin at a cache line.
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

"""Weights in huge pages: memory that a CPU reads faster.

A decode step reads every weight once, faster than a CPU finds out where pages of 4 KiB lie; from
pages of 2 MiB a step takes a tenth less time (docs/benchmarks.md). The kernel gives them to
anonymous memory that asks for them, so weights that are mapped from a file are copied, in the time
that reading them takes. They are then this process's own: replicas of one machine no longer share
them, which is why `EngineOptions.huge_pages` can say no. KV pages gain nothing measurable.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deepseek.engine.process import give_back_freed_memory
from deepseek.host_memory import available_memory_bytes
from deepseek.tensor_files import ALIGNMENT

LOG = logging.getLogger(__name__)

#: What the kernel gives; its own setting is "always", "madvise" or "never", the chosen in brackets.
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PAGE = 2 << 20
#: Fewer bytes are in the cache of a CPU's page tables anyway.
_WORTH = 64 << 20
#: Bytes that are moved before the memory that they lay in is given back.
_GIVE_BACK = 256 << 20


def are_offered(setting: Path = _SETTING) -> bool:
    """Whether the kernel gives huge pages to memory that asks for them."""
    try:
        chosen = setting.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False
    return "[never]" not in chosen and hasattr(mmap, "MADV_HUGEPAGE")


def move(
    tensors: dict[str, Tensor],
    *,
    worth: int = _WORTH,
    setting: Path = _SETTING,
    available_bytes: Callable[[], int] = available_memory_bytes,
) -> dict[str, Tensor]:
    """The same tensors in huge pages, each at a cache line; `tensors` is empty then, so that what
    lay in memory is freed one by one. They stay as they are, with one line in the log, where huge
    pages are not offered or the copy would take more than half of the memory that is available."""
    num_bytes = sum(_padded(tensor.nbytes) for tensor in tensors.values())
    if num_bytes < worth:
        return tensors
    if not are_offered(setting):
        LOG.warning(
            "weights stay in small pages, which are read slower: %s offers no other", setting
        )
        return tensors
    available = available_bytes()
    if num_bytes > available // 2:
        LOG.warning(
            "weights stay in small pages, which are read slower: their %d MB are more than half of "
            "the %d MB that are available",
            num_bytes / 1e6, available / 1e6,
        )  # fmt: skip
        return tensors
    memory, moved, begin, given_back = _memory(num_bytes), {}, 0, 0
    for name in list(tensors):
        tensor = tensors.pop(name)
        room = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        moved[name] = room.copy_(tensor)
        begin += _padded(tensor.nbytes)
        del tensor
        if begin - given_back >= _GIVE_BACK or not tensors:
            give_back_freed_memory()
            given_back = begin
    LOG.info("%d MB of weights lie in huge pages", num_bytes / 1e6)
    return moved


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _memory(num_bytes: int) -> Tensor:
    """Bytes, zeros, that begin with a huge page; uint8 [at least num_bytes]."""
    mapped = mmap.mmap(-1, num_bytes + 2 * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps `mapped` alive
    return memory[-memory.data_ptr() % _PAGE :]

"""Reads the next layer's stored bytes in a thread, while the worker computes on this one.

Holds what was read until it is taken: this worker's routed experts of at most two layers, and a
trunk where it is this worker's turn to read one. The thread takes digests of what it reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from deepseek.source.checkpoint import CheckpointReader, SourceTensor, source_digests
from quant_jobs.calibration.units import Unit, expert_specs, trunk_specs

#: What was read of a layer: tensors by name, and the digests of their stored bytes.
Stored = tuple[dict[str, SourceTensor], dict[str, str]]

_Half = Literal["trunk", "experts"]


class ReadAhead:
    """`reader` is the job's source; `count_seconds` is told the time of each read, in the thread
    that reads."""

    def __init__(self, reader: CheckpointReader, count_seconds: Callable[[float], None]) -> None:
        self._reader, self._count_seconds = reader, count_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._shares: dict[int, Sequence[Unit]] = {}  # by layer
        self._reads: dict[tuple[int, _Half], Future[Stored]] = {}

    def close(self) -> None:
        """End the thread; what it has not begun is dropped."""
        self._thread.shutdown(cancel_futures=True)

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        """Begin to read the routed experts of `share`; and the trunk, if asked. What is being read
        already is not read twice."""
        if self._shares.get(layer) != share:
            self._shares[layer] = share
            self._reads.pop((layer, "experts"), None)
        halves: list[_Half] = ["trunk", "experts"] if with_trunk else ["experts"]
        for half in halves:
            if (layer, half) not in self._reads:
                self._reads[layer, half] = self._thread.submit(self._read, layer, half)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        """The trunk of a layer that `prefetch` was asked for; waits for it. It stays here until
        `take`."""
        return self._reads[layer, "trunk"].result()[0]

    def take(self, layer: int) -> tuple[Sequence[Unit], dict[str, SourceTensor], dict[str, str]]:
        """This worker's share of a layer, the tensors of its routed experts, and the digests of all
        that this worker read of it; waits for them. From now on nothing of the layer is here."""
        experts, digests = self._reads.pop((layer, "experts")).result()
        if (trunk := self._reads.pop((layer, "trunk"), None)) is not None:
            digests = digests | trunk.result()[1]
        for past in [past for past in self._shares if past < layer]:
            del self._shares[past]
        return self._shares[layer], experts, digests

    def _read(self, layer: int, half: _Half) -> Stored:
        specs = (
            trunk_specs(self._reader.config, layer)
            if half == "trunk"
            else expert_specs(self._reader.config, layer, self._shares[layer])
        )
        begun = time.monotonic()
        tensors = self._reader.load(specs)
        stored = tensors, source_digests(tensors)
        self._count_seconds(time.monotonic() - begun)
        return stored

"""Reads the stored bytes of the next layer in a thread, while the worker computes on this one.

Called by `worker.py`. Owns the tensors until `take`: this worker's routed experts of at most two
layers, and the trunk of a layer that this worker reads for all. The thread also digests them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from deepseek.source.checkpoint import CheckpointReader, SourceTensor, source_digests
from quant_jobs.calibration.units import Unit, expert_specs, trunk_specs

#: Tensors by name, and the digests of their stored bytes.
Stored = tuple[dict[str, SourceTensor], dict[str, str]]

_Half = Literal["trunk", "experts"]


class ReadAhead:
    """`reader` is the job's source; the reading thread calls `count_seconds` with the wall time of
    each read."""

    def __init__(self, reader: CheckpointReader, count_seconds: Callable[[float], None]) -> None:
        self._reader, self._count_seconds = reader, count_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._shares: dict[int, Sequence[Unit]] = {}  # by layer
        self._reads: dict[tuple[int, _Half], Future[Stored]] = {}

    def close(self) -> None:
        """Stop the thread, dropping reads that have not begun."""
        self._thread.shutdown(cancel_futures=True)

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        """Start reading the routed experts of `share`, and the trunk if `with_trunk`. Does not
        repeat a read that was started for the same share."""
        if self._shares.get(layer) != share:
            self._shares[layer] = share
            self._reads.pop((layer, "experts"), None)
        halves: list[_Half] = ["trunk", "experts"] if with_trunk else ["experts"]
        for half in halves:
            if (layer, half) not in self._reads:
                self._reads[layer, half] = self._thread.submit(self._read, layer, half)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        """Wait for the trunk that `prefetch` was asked for. This object keeps it until `take`."""
        return self._reads[layer, "trunk"].result()[0]

    def take(self, layer: int) -> tuple[Sequence[Unit], dict[str, SourceTensor], dict[str, str]]:
        """Wait for this worker's share of a layer and transfer it to the caller: the units, the
        tensors of their routed experts, and the digests of everything that this worker read of the
        layer. This object no longer holds any of it."""
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

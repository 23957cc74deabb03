"""The ranks of another node for an engine of vLLM that has several (`remote/nodes.py`).

What `vllm serve --headless` does: an executor without an engine, whose ranks meet those of the
first node and take their work from there. It is ready when its ranks have loaded, and answers no
request. A rank that ends is the end of the engine on all nodes.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from .backend import LoadError
from .messages import End, Generate, Load, Output, Progress, Ready, Start
from .vllm import VllmBackend


def make(module: str | None = None) -> VllmNode:
    return VllmNode(module or "vllm")


class VllmNode(VllmBackend):
    """Implements `Backend`."""

    async def start(self, start: Start, report: Callable[[Progress], None]) -> Ready:
        """Blocks the loop until this node's ranks have loaded, and the first node's are there."""
        version = self._prepare(start, report)
        name = self._module
        args = importlib.import_module(f"{name}.engine.arg_utils").AsyncEngineArgs
        executor = importlib.import_module(f"{name}.v1.executor.multiproc_executor")
        self._check_known(args, start)
        try:
            made = args(model=start.directory, **start.arguments)
            config = made.create_engine_config(headless=True)
            self._executor: Any = executor.MultiprocExecutor(config, monitor_workers=False)
        except Exception as error:
            if (cause := self.cause()) is not None:
                raise cause from error
            raise LoadError(f"{type(error).__name__}: {error}") from error
        self._said.forget()
        return Ready(engine_version=version)

    async def submit(self, request: Generate) -> AsyncGenerator[Output | End, None]:
        raise RuntimeError("the ranks of another node take no requests")
        yield  # of an asynchronous generator

    async def abort(self, request_id: int) -> None:
        """There is none."""

    async def load(self) -> Load | None:
        return None

    async def healthy(self) -> str | None:
        return None  # its ranks are watched

    def shutdown(self) -> None:
        self._executor.shutdown()

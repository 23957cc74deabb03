"""The example model in BF16 as an engine directory for vLLM and as one of ours; an adapter whose
event loop runs in a thread."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from support.environments import environment
from support.synthetic import quantize_plainly

from deepseek.artifact.reader import ArtifactReader
from deepseek.recipe import GateLimits, Recipe, Rule
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.targets.embedded import pack_engine
from serve_app.engine_sections import VllmOptions

T = TypeVar("T")

#: Every linear as BF16: what vLLM's build for CPUs computes without AMX.
BF16 = Recipe(
    name="bf16",
    description="BF16 throughout.",
    rules=(Rule(match="*", weights="bf16"),),
    gate=GateLimits(max_perplexity_ratio=1.01, max_mean_kl=0.01, min_top1=0.98),
)
MAX_MODEL_LEN = 1024


@functools.cache
def bf16_directories(model: Path, base: Path) -> tuple[Path, Path]:
    """Of the model cast to BF16: the directory of `build --target vllm`, and the embedded
    engine's."""
    artifact, vllm, embedded = (base / f"bf16-{name}" for name in ("artifact", "vllm", "embedded"))
    quantize_plainly(model, BF16, artifact)
    run_build(artifact, "vllm", vllm, BuildOptions(tp=1, workers=0))
    pack_engine(ArtifactReader(artifact), embedded)
    return vllm, embedded


def vllm_options(directory: Path, **changes: Any) -> VllmOptions:
    """Of vLLM's build for CPUs, in its own environment, which is made when it is not there."""
    given = {"max_model_len": MAX_MODEL_LEN, "max_batch_size": 8, "cpu": True, **changes}
    return VllmOptions(directory=directory, python=environment("vllm_engine"), **given)


class LoopThread:
    """An event loop that goes on while a test waits; `run` awaits in it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 600.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

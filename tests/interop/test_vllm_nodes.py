"""vLLM itself with its ranks in two process trees that meet over TCP, as on two nodes.

Both trees are on this machine and compute on CPUs, so that what is shown is the start over nodes,
the rendezvous, tensor parallelism between them, and their end as one; not NCCL.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.engines import request as request_of
from support.engines import run, tokens
from support.vllm_engines import bf16_directories, vllm_options

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.engine.request import SamplingParams
from serve_app.config import VllmOptions
from serve_app.engines.protocol import GenerateRequest, Tokens
from serve_app.engines.remote.nodes import Nodes
from serve_app.engines.worker import processes
from serve_app.errors import EngineUnavailable
from serve_app.replica.spread import NodeProcess, SpreadEngine

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

PROMPT = tuple(range(5, 40))


class Node(NodeProcess):
    name = "node two"

    @property
    def pids(self) -> list[int]:
        assert self._worker is not None
        return [p.pid for p in processes.descendants(self._worker.process.pid)]


async def failing(engine: SpreadEngine) -> None:
    while True:
        await engine.check()
        await asyncio.sleep(0.05)


async def test_two_ranks_on_two_nodes_answer_as_one_engine_and_end_as_one(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    vllm, embedded = bf16_directories(tiny_model, tmp_path_factory.getbasetemp())
    others: list[Node] = []

    def make(options: VllmOptions, nodes: Nodes) -> Sequence[Node]:
        others.append(Node(options, nodes, 1, "127.0.0.1"))
        return others

    engine = SpreadEngine(
        vllm_options(vllm, tensor_parallel_size=2),
        count=2,
        address=lambda: "127.0.0.1",
        others=make,
    )
    try:
        info = await engine.start()
        assert info.engine == "vllm"
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(request_id="a", prompt_ids=PROMPT, sampling=sampling)
        events = [event async for event in engine.generate(request)]
        got = [t for event in events if isinstance(event, Tokens) for t in event.token_ids]
        reference = LLMEngine.load(embedded, EngineOptions(kv_cache="bf16"))
        outputs = run(reference, [request_of("a", PROMPT, 16)])["a"]
        assert len(got) == 16
        assert got[:4] == list(tokens(outputs))[:4], "roundings of two ranks come later"

        ranks = others[0].pids
        os.kill(ranks[-1], signal.SIGKILL)
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(failing(engine), 20)
    finally:
        await engine.shutdown()
    assert not [pid for pid in ranks if processes.start_of(pid) is not None]

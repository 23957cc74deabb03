"""What the worker makes of TensorRT-LLM's figures and logprobs, in every shape that was seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.errors import DeployError
from serve_app.engines.remote.trtllm import check_gpus
from serve_app.engines.worker import processes
from serve_app.engines.worker.backend import RequestFailed
from serve_app.engines.worker.loop import is_out_of_memory
from serve_app.engines.worker.messages import Generate, Load, Score
from serve_app.engines.worker.trtllm import _prompt_scores, _queue_s, _sampling, _scores
from serve_app.engines.worker.trtllm_stats import merge_stats

FULL = {
    "iter": 7,
    "numActiveRequests": 3,
    "numQueuedRequests": 2,
    "kvCacheStats": {"usedNumBlocks": 5, "maxNumBlocks": 100, "tokensPerBlock": 64},
    "inflightBatchingStats": {"numContextRequests": 1, "numGenRequests": 2},
}


@pytest.mark.parametrize(
    ("items", "load"),
    [
        ([FULL], Load(running=3, waiting=2, kv_blocks_used=5, kv_blocks_total=100,
                      page_tokens=64, steps=7)),
        ([json.dumps(FULL).encode()], Load(running=3, waiting=2, kv_blocks_used=5,
                                           kv_blocks_total=100, page_tokens=64, steps=7)),
        ([FULL, {"iter": 9}], Load(running=3, waiting=2, kv_blocks_used=5, kv_blocks_total=100,
                                   page_tokens=64, steps=9)),
        ([{"iter": 1, "numActiveRequests": 4}], Load(running=4, page_tokens=32, steps=1)),
        ([], None),
        ([{}, "", "no JSON", b"\xff", None, 3, "[1]", "null"], None),
        ([{"kvCacheStats": None, "inflightBatchingStats": "x", "iter": "7"}], None),
        ([{"kvCacheStats": {"usedNumBlocks": -1, "maxNumBlocks": 0}, "iter": True}], None),
        ([{"kvCacheStats": {"usedNumBlocks": 1.0}}], Load(kv_blocks_used=1, page_tokens=32)),
    ],
)  # fmt: skip
def test_figures_may_be_whole_partial_text_nonsense_or_absent(
    items: list[Any], load: Load | None
) -> None:
    assert merge_stats(items, 32) == load


def generate(**fields: Any) -> Generate:
    given: dict[str, Any] = {
        "id": 1, "prompt_ids": [5, 6, 7], "max_tokens": 4, "temperature": 0.0, "top_p": 1.0,
        "top_k": 0, "seed": None, "ignore_eos": False, "end_ids": [1, 9], "stop_token_ids": [8],
        "cache_salt": "s",
    }  # fmt: skip
    return Generate(**(given | fields))


def test_end_tokens_beyond_the_first_are_stop_tokens_and_all_are_kept() -> None:
    keywords = _sampling(generate())
    assert (keywords["end_id"], keywords["pad_id"]) == (1, 1)
    assert keywords["stop_token_ids"] == [8, 9]
    assert keywords["include_stop_str_in_output"] is True
    assert keywords["detokenize"] is False
    assert _sampling(generate(ignore_eos=True))["stop_token_ids"] == [8]
    assert keywords["logprobs"] is None
    assert _sampling(generate(logprobs=0))["logprobs"] == 1  # 0 means none in some versions


def test_logprobs_come_as_mappings_of_objects_or_as_numbers() -> None:
    best = SimpleNamespace(logprob=-0.1, rank=1)
    chosen = SimpleNamespace(logprob=-2.0, rank=7)
    entries = [{4: best}, {4: best, 3: chosen}]
    assert _scores(entries, 1, [3], generate(logprobs=1)) == [Score(-2.0, 7, [(4, -0.1)])]
    assert _scores([-0.5, -0.25], 0, [4, 3], generate(logprobs=0)) == [Score(-0.5), Score(-0.25)]
    assert _scores([{3: -1.5}], 0, [3], generate(logprobs=1)) == [Score(-1.5, None, [(3, -1.5)])]
    for missing in (None, [], [{4: best}]):
        with pytest.raises(RequestFailed):
            _scores(missing, 0, [3, 3], generate(logprobs=1))


def test_logprobs_of_a_prompt_may_lack_the_first() -> None:
    request = generate(prompt_logprobs=0)
    for found in ([{6: -1.0}, {7: -2.0}], [None, {6: -1.0}, {7: -2.0}]):
        scores = _prompt_scores(SimpleNamespace(prompt_logprobs=found), request)
        assert scores is not None
        assert scores[0] is None
        assert [score.logprob for score in scores[1:] if score] == [-1.0, -2.0]
    with pytest.raises(RequestFailed, match="0 logprobs of 3"):
        _prompt_scores(SimpleNamespace(prompt_logprobs=None), request)


def test_the_time_in_the_queue_is_told_only_where_the_engine_has_it() -> None:
    timing = SimpleNamespace(first_scheduled_time=2.5, arrival_time=2.0)
    metrics = SimpleNamespace(timing_metrics=timing)
    assert _queue_s(SimpleNamespace(request_perf_metrics=metrics)) == 0.5
    timing.arrival_time = 3.0
    assert _queue_s(SimpleNamespace(request_perf_metrics=metrics)) is None
    assert _queue_s(SimpleNamespace(request_perf_metrics=None)) is None
    assert _queue_s(None) is None


def test_out_of_memory_is_seen_in_what_an_error_came_from() -> None:
    told = RuntimeError("Executor worker returned error")
    told.__cause__ = MemoryError("CUDA")
    assert is_out_of_memory(told)
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(ValueError("no such tensor"))


def test_fewer_gpus_than_ranks_are_refused_before_the_engine_starts() -> None:
    check_gpus(8, {})
    check_gpus(2, {"CUDA_VISIBLE_DEVICES": "GPU-ab,GPU-cd"})
    for shown, count in (("", 0), ("0,1", 2), ("-1", 0)):
        with pytest.raises(DeployError, match=f"8 ranks, but its replica sees {count} GPUs"):
            check_gpus(8, {"CUDA_VISIBLE_DEVICES": shown})


def test_processes_below_one_are_found_and_told_apart() -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 600 & wait"])
    try:
        while not (below := processes.descendants(shell.pid)):
            pass
        (child,) = below
        assert child.parent == shell.pid
        start = processes.start_of(child.pid)
        assert start == child.started
        os.kill(child.pid, signal.SIGKILL)
        shell.kill()
        while processes.is_alive(shell.pid):
            pass
        status = processes.status_of(shell.pid)
        assert status is not None
        assert processes.is_disaster(status)
        assert processes.ended_words(status) == "was killed by SIGKILL"
        assert processes.start_of(shell.pid) is None
    finally:
        shell.wait()
    assert processes.status_of(shell.pid) is None

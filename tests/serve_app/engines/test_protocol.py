"""What crosses the actor hop: one type per noun, pickled whole, and no torch on the way."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek.engine.options import EngineLoad
from deepseek.engine.request import SamplingParams, TokenLogprob, TopLogprob
from serve_app.engines.protocol import (
    Done,
    EngineInfo,
    GenerateRequest,
    PromptLogprobs,
    ReplicaStatus,
    Tokens,
)

SAMPLING = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    seed=-3,
    stop=("a", "b"),
    stop_token_ids=(1, 2),
    ignore_eos=True,
    logprobs=2,
    prompt_logprobs=3,
)
INFO = EngineInfo(
    max_model_len=64, kv_tokens_total=128, recipe="int4", artifact_digest="ab", engine="embedded"
)
LOAD = EngineLoad(running=1, waiting=2, kv_tokens_used=3, kv_tokens_total=128)
TOP = (TopLogprob(5, "x", -0.5, b"x"), TopLogprob(6, "", -1.5, b"\xe4"))
LOGPROB = TokenLogprob(5, "x", -0.5, TOP, b"x", rank=1)


@pytest.mark.parametrize(
    "value",
    [
        SAMPLING,
        GenerateRequest(
            request_id="r-0", prompt_ids=(1, 2), sampling=SAMPLING, trace_context={"a": "b"}
        ),
        LOGPROB,
        Tokens((5,), "x", (LOGPROB,)),
        PromptLogprobs((None, LOGPROB)),
        Done("error", 2, 1, 1, prefill_s=0.2, decode_s=0.3, error="why", retryable=True),
        LOAD,
        INFO,
        ReplicaStatus(replica_id="0", info=INFO, load=LOAD, gated=False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_crosses_the_actor_hop_arrives_as_it_was(value: Any) -> None:
    copy = pickle.loads(pickle.dumps(value))
    assert type(copy) is type(value)
    assert copy == value


def test_unpickling_checks_no_value_again() -> None:
    # The ingress has admitted the request: nothing in the replica may fail before it can answer.
    beyond = replace(SAMPLING)
    object.__setattr__(beyond, "max_tokens", -1)
    assert pickle.loads(pickle.dumps(beyond)).max_tokens == -1


@pytest.mark.parametrize(
    "module",
    ["serve_app.engines.protocol", "serve_app.openai.routes", "deepseek.engine.options"],
)
def test_the_protocol_and_the_ingress_load_no_torch(module: str, root: Path) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=120)
    assert done.returncode == 0

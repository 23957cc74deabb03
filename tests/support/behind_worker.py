"""The embedded engine behind the worker's boundary, beside the same engine in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deepseek.artifact.built_engine import read_engine
from deepseek.engine.detokenizer import engine_tokenizer
from deepseek.stop_tokens import FILE as GENERATION_FILE
from deepseek.stop_tokens import merge_stop_tokens
from serve_app.engine_sections import TrtllmOptions
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines, Launch, Plan

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent


def behind_worker(directory: Path, *, max_model_len: int, **arguments: Any) -> RemoteEngine:
    """The embedded engine of a directory in a worker's process (embedded_backend.py), in this
    process's Python environment. `arguments` are keys of `EmbeddedOptions`."""
    python = Path(sys.executable)
    built = read_engine(directory)
    config = built.config
    plan = Plan(
        directory=directory,
        engine="embedded",
        recipe="bench",
        artifact_digest="a" * 64,
        engine_digest=None,
        kv_cache=built.kv_cache,
        weight_bytes=1,
        arguments={"max_model_len": max_model_len, **arguments},
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        end_token_ids=merge_stop_tokens(
            built.documents.get(GENERATION_FILE), directory / GENERATION_FILE, config
        ),
        tokenizer=engine_tokenizer(directory, built.documents),
    )
    return RemoteEngine(
        TrtllmOptions(directory=directory, python=python),  # its process is that of `launch`
        Launch(python=python, backend="embedded_backend", path=(str(SUPPORT), str(ROOT))),
        plan=lambda _: plan,
        deadlines=Deadlines(),
    )

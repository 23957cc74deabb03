"""A built directory as the engine that computes the double's answers.

With TLLM_OVERRIDE_LAYER_NUM=N only the first N layers are loaded, as the real loader does: their
answers mean nothing, and their start shows whether these layers can be loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.engine.arithmetic import ARITHMETICS
from deepseek.engine.detokenizer import engine_tokenizer
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineIdentity, EngineOptions
from deepseek.engine.pages import BLOCK_TOKENS
from deepseek.target_engine import load_as_target
from deepseek.trtllm.stored_model import TrtllmStoredModel

#: The cache of the double where the arguments state only a share of the memory that is free, at a
#: share of 1.
FREE_TOKENS = 20_000
#: The real batch may be larger: this many of it run at once, the others wait.
MAX_BATCH = 64


def load(directory: Path, args: SimpleNamespace) -> LLMEngine:
    """The engine of a directory of target trtllm.

    Raises:
        IntServeError: the target's loader would not load it.
    """
    cache = args.kv_cache_config
    config = json.loads((directory / "config.json").read_text())
    length = args.max_seq_len or config["max_position_embeddings"]
    block = cache.tokens_per_block
    tokens = int(FREE_TOKENS * cache.free_gpu_memory_fraction)
    if cache.max_tokens is not None:
        tokens = min(tokens, cache.max_tokens)
    batch = min(args.max_batch_size, MAX_BATCH)
    options = EngineOptions(
        kv_cache="fp8" if cache.dtype == "fp8" else None,
        page_tokens=block if BLOCK_TOKENS % block == 0 else None,
        max_kv_tokens=max(block, tokens),
        max_model_len=min(length, config["max_position_embeddings"]),
        max_batch_size=batch,
        max_batched_tokens=max(min(args.max_num_tokens, 512), batch),
        num_threads=1,
        prefix_cache=cache.enable_block_reuse,
    )
    layers = os.environ.get("TLLM_OVERRIDE_LAYER_NUM")
    if layers:
        return _load_prefix(directory, options, int(layers))
    return load_as_target(directory, options)


class _Prefix:
    """The first layers of a stored model."""

    def __init__(self, stored: TrtllmStoredModel, layers: int) -> None:
        self._stored = stored
        count = min(layers, stored.config.num_hidden_layers)
        self.config = dataclasses.replace(
            stored.config, num_hidden_layers=count, num_nextn_predict_layers=0
        )
        self.schemes = {
            module: scheme
            for module, scheme in stored.schemes.items()
            if int(module.split(".")[2]) < count
        }

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        return self._stored.read_layer(layer)

    def read_globals(self) -> Mapping[str, Tensor]:
        return self._stored.read_globals()

    def finish(self) -> None:
        """The other layers are left unread."""


def _load_prefix(directory: Path, options: EngineOptions, layers: int) -> LLMEngine:
    manifest = read_engine_manifest(directory)
    arithmetic = ARITHMETICS[manifest.target]
    identity = EngineIdentity(
        recipe=manifest.recipe,
        artifact_digest=manifest.artifact_digest,
        engine_digest=manifest.digest,
        kv_cache=options.kv_cache or manifest.kv_cache,
        page_tokens=options.page_tokens or 16,
        arithmetic=arithmetic.name,
    )
    return LLMEngine.from_stored(
        _Prefix(TrtllmStoredModel(directory), layers),
        arithmetic=arithmetic,
        identity=identity,
        options=options,
        tokenizer=engine_tokenizer(directory, read_documents(directory, manifest)),
    )

"""What an engine is made of, read from a directory or packed in memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from deepseek.artifact.engine_manifest import UNQUANTIZED
from deepseek.artifact.stored_model import StoredModel
from deepseek.engine.arithmetic import EMBEDDED, Arithmetic
from deepseek.engine.detokenizer import Tokenizer, engine_tokenizer, load_tokenizer
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.options import EngineIdentity, EngineOptions
from deepseek.engine.packed import load_packed
from deepseek.engine.packing import pack_tensors, schemes_of
from deepseek.engine.process import prepare_process
from deepseek.source.checkpoint import CheckpointReader
from deepseek.stop_tokens import FILE as GENERATION_FILE
from deepseek.stop_tokens import merge_stop_tokens, stop_token_ids

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and what goes with it; see `LLMEngine`."""

    model: Model
    identity: EngineIdentity
    tokenizer: Tokenizer | None
    end_token_ids: frozenset[int]


def open_directory(directory: Path, options: EngineOptions) -> Opened:
    """Raises:
    ArtifactError: the engine directory is incomplete or damaged.
    """
    packed = load_packed(directory)
    manifest = packed.manifest
    model = Model(packed.config, manifest.schemes, packed.tensors, _kernels(options))
    identity = EngineIdentity(
        recipe=manifest.recipe,
        artifact_digest=manifest.artifact_digest,
        engine_digest=manifest.digest,
        kv_cache=options.kv_cache or manifest.kv_cache,
        page_tokens=options.page_tokens or packed.fields.page_tokens,
    )
    ends = merge_stop_tokens(
        packed.documents.get(GENERATION_FILE), directory / GENERATION_FILE, packed.config
    )
    return Opened(model, identity, engine_tokenizer(directory, packed.documents), ends)


def open_checkpoint(directory: Path | str, options: EngineOptions) -> Opened:
    """Raises:
    CheckpointError: the source checkpoint is incomplete or damaged.
    """
    source = CheckpointReader(directory)
    model = Model(source.config, schemes_of(source), pack_tensors(source), _kernels(options))
    identity = EngineIdentity(
        recipe=UNQUANTIZED,
        artifact_digest=source.fingerprint,
        engine_digest=None,
        kv_cache=options.kv_cache or "bf16",
        page_tokens=options.page_tokens or 16,
    )
    ends = stop_token_ids(directory, source.config)
    return Opened(model, identity, load_tokenizer(directory), ends)


def open_stored(stored: StoredModel, arithmetic: Arithmetic, options: EngineOptions) -> Model:
    """Raises:
    ArtifactError: the stored model is damaged.
    DeployError: there is no kernel for a linear.
    """
    kernels = _kernels(options, arithmetic)
    return Model(stored.config, schemes_of(stored), pack_tensors(stored), kernels)


def _kernels(options: EngineOptions, arithmetic: Arithmetic = EMBEDDED) -> Kernels:
    prepare_process(options.num_threads)
    kernels = Kernels.detect(batch_invariant=options.batch_invariant, arithmetic=arithmetic)
    if options.batch_invariant and not kernels.is_batch_invariant:
        LOG.warning("this CPU's GEMM is not batch invariant; tokens may depend on the batch")
    return kernels

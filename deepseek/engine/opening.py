"""What an engine is made of, read from a directory or packed in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deepseek.artifact.engine_manifest import UNQUANTIZED
from deepseek.artifact.stored_model import StoredModel
from deepseek.config import ModelConfig
from deepseek.engine.arithmetic import EMBEDDED, Arithmetic
from deepseek.engine.detokenizer import Tokenizer, engine_tokenizer, load_tokenizer
from deepseek.engine.huge_pages import move
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.native import find_isa
from deepseek.engine.options import EngineIdentity, EngineOptions
from deepseek.engine.packed import load_packed
from deepseek.engine.packing import Packable, pack_tensors, schemes_of, to_torch_layout
from deepseek.engine.process import prepare_process
from deepseek.engine.runner import StepModel
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader
from deepseek.stop_tokens import FILE as GENERATION_FILE
from deepseek.stop_tokens import merge_stop_tokens, stop_token_ids

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """A model and what goes with it; see `LLMEngine`."""

    model: StepModel
    identity: EngineIdentity
    tokenizer: Tokenizer | None
    end_token_ids: frozenset[int]


def open_directory(directory: Path, options: EngineOptions) -> Opened:
    """Raises:
    ArtifactError: the engine directory is incomplete or damaged.
    """
    packed = load_packed(directory)
    manifest = packed.manifest
    config, schemes, tensors = packed.config, manifest.schemes, packed.tensors
    kernels = choose_kernels(options, config)
    if kernels.isa is None:
        tensors = to_torch_layout(config, schemes, tensors)
    model = make_model(config, schemes, tensors, kernels, options.huge_pages)
    identity = EngineIdentity(
        recipe=manifest.recipe,
        artifact_digest=manifest.artifact_digest,
        engine_digest=manifest.digest,
        kv_cache=options.kv_cache or manifest.kv_cache,
        page_tokens=options.page_tokens or packed.fields.page_tokens,
        kernels=kernels.name,
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
    kernels = choose_kernels(options, source.config)
    model = _packed_model(source, kernels, options)
    identity = EngineIdentity(
        recipe=UNQUANTIZED,
        artifact_digest=source.fingerprint,
        engine_digest=None,
        kv_cache=options.kv_cache or "bf16",
        page_tokens=options.page_tokens or 16,
        kernels=kernels.name,
    )
    ends = stop_token_ids(directory, source.config)
    return Opened(model, identity, load_tokenizer(directory), ends)


def open_stored(stored: StoredModel, arithmetic: Arithmetic, options: EngineOptions) -> StepModel:
    """Raises:
    ArtifactError: the stored model is damaged.
    DeployError: there is no kernel for a linear.
    """
    return _packed_model(stored, choose_kernels(options, stored.config, arithmetic), options)


def choose_kernels(
    options: EngineOptions, config: ModelConfig, arithmetic: Arithmetic = EMBEDDED
) -> Kernels:
    """The kernels that the options ask for, as far as this machine has them, and torch's threads.
    The fallback says once what is lost.

    Raises:
        DeployError: native kernels were asked for, and are not built or do not take the model.
    """
    prepare_process(options.num_threads)
    isa = find_isa(options.kernels, config) if arithmetic == EMBEDDED else None
    kernels = Kernels.detect(
        batch_invariant=options.batch_invariant and isa is None, arithmetic=arithmetic, isa=isa
    )
    if isa is None and options.batch_invariant and not kernels.is_batch_invariant:
        LOG.warning("this CPU's GEMM is not batch invariant; tokens may depend on the batch")
    return kernels


def make_model(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    tensors: dict[str, Tensor],
    kernels: Kernels,
    huge_pages: bool = False,
) -> StepModel:
    """A model of tensors that lie as these kernels want them (`Kernels.layout`). With `huge_pages`
    native kernels' tensors are moved there, out of `tensors`.

    Raises:
        ArtifactError: a tensor is missing, left over, or of another shape or type.
    """
    if kernels.isa is not None:
        from deepseek.engine.native_model import NativeModel  # imports the extension

        return NativeModel(config, schemes, move(tensors) if huge_pages else tensors)
    return Model(config, schemes, tensors, kernels)


def _packed_model(source: Packable, kernels: Kernels, options: EngineOptions) -> StepModel:
    """The model of a source, packed in memory."""
    tensors = pack_tensors(source, layout=kernels.layout)
    return make_model(source.config, schemes_of(source), tensors, kernels, options.huge_pages)

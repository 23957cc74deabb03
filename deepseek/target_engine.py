"""Loads an engine directory of any target as that target computes it.

The embedded engine loads its own directories. A directory that was built for another target is
checked as `build --check` does, read back through the target's layout (`StoredModel`), packed in
memory and executed in the target's arithmetic on the target's KV layout: what runs are the values
that the target would load and its roundings, not its kernels. `quant_jobs evaluate` judges that.

A new target is one line of `_TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from deepseek.artifact.engine_checks import ByteProgress, CheckReport, untold
from deepseek.artifact.engine_manifest import (
    CacheFormat,
    EngineManifest,
    read_documents,
    read_engine_manifest,
)
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.stored_model import StoredModel
from deepseek.engine import packed
from deepseek.engine.arithmetic import ARITHMETICS
from deepseek.engine.detokenizer import engine_tokenizer
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineIdentity, EngineOptions
from deepseek.engine.packed_layout import packed_tensors
from deepseek.errors import DeployError
from deepseek.hf.check import check_engine as check_hf
from deepseek.hf.stored_model import TransformersStoredModel
from deepseek.host_memory import host_memory_bytes
from deepseek.kv_layout import kv_layout, layer_token_bytes
from deepseek.sglang.check import check_engine as check_sglang
from deepseek.sglang.stored_model import SglangStoredModel
from deepseek.stop_tokens import FILE as GENERATION_FILE
from deepseek.stop_tokens import merge_stop_tokens
from deepseek.trtllm.check import check_engine as check_trtllm
from deepseek.trtllm.stored_model import TrtllmStoredModel
from deepseek.untrusted import show_name
from deepseek.vllm.check import check_engine as check_vllm
from deepseek.vllm.stored_model import VllmStoredModel


class Check(Protocol):
    """A room's `check_engine`."""

    def __call__(
        self,
        directory: Path,
        *,
        artifact: ArtifactReader | None = None,
        digests: bool = True,
        progress: ByteProgress = untold,
    ) -> CheckReport: ...


#: Target -> its check of a directory, and what reads one back.
_TARGETS: Mapping[str, tuple[Check, Callable[[Path], StoredModel]]] = {
    "trtllm": (check_trtllm, TrtllmStoredModel),
    "vllm": (check_vllm, VllmStoredModel),
    "sglang": (check_sglang, SglangStoredModel),
    "transformers": (check_hf, TransformersStoredModel),
}
#: Targets whose directories have a check; the embedded engine verifies its own whenever it loads.
CHECKS: Mapping[str, Check] = {target: check for target, (check, _) in _TARGETS.items()}
#: KV formats that only the embedded engine has.
_EMBEDDED_ONLY = ("int8", "fp32")
#: KV pages of an emulated engine, in tokens.
_PAGE_TOKENS = 16


def check_kv_format(target: str, kv_cache: str) -> CacheFormat:
    """Return `kv_cache` if it is a KV format of the target.

    Raises:
        DeployError: it has not, the sentence names one that it has; or the target is unknown here.
    """
    if target != packed.TARGET and target not in _TARGETS:
        known = ", ".join([packed.TARGET, *_TARGETS])
        raise DeployError(
            f"an engine for {show_name(target)} cannot be executed here; build for one of {known}"
        )
    if target != packed.TARGET and kv_cache in _EMBEDDED_ONLY:
        raise DeployError(
            f"{target} has no {kv_cache} KV cache, only the embedded engine has; give --kv-cache "
            "bf16"
        )
    kv_layout(target, kv_cache)
    return kv_cache  # type: ignore[return-value]  # `kv_layout` knows no other


def check_directory(
    directory: Path, target: str, *, digests: bool, progress: ByteProgress = untold
) -> None:
    """Check an engine directory as its target's loader reads it: documents, names, types and
    shapes; with `digests` every byte, of which `progress` gets the number. The embedded engine
    verifies all of its own when it loads.

    Raises:
        ArtifactError, DeployError, ConfigError: its loader would not load it, or would load
            something else.
    """
    if target in CHECKS:
        CHECKS[target](directory, digests=digests, progress=progress)


def load_as_target(directory: Path, options: EngineOptions | None = None) -> LLMEngine:
    """The engine of a directory, which computes as the directory's target does.

    An engine of another target than `embedded` is held in memory whole, packed for this machine's
    kernels, beside one layer of the directory while it is read.

    Raises:
        ArtifactError, ConfigError: the directory is incomplete, damaged or not what it should be.
        DeployError: the target would not load it, has no such KV format, cannot be emulated, or the
            model does not fit into this machine's memory.
    """
    options = options or EngineOptions()
    manifest = read_engine_manifest(directory)
    kv_cache = options.kv_cache or manifest.kv_cache
    check_kv_format(manifest.target, kv_cache)
    if manifest.target == packed.TARGET:
        return LLMEngine.load(directory, options)
    check, open_stored = _TARGETS[manifest.target]
    check(directory, digests=False)  # tensors are verified as they are read
    stored = open_stored(directory)
    needed = emulated_bytes(stored, manifest, kv_cache=kv_cache, options=options)
    check_memory(directory, manifest.target, needed, host_memory_bytes())
    arithmetic = ARITHMETICS[manifest.target]
    documents = read_documents(directory, manifest)
    tokenizer = engine_tokenizer(directory, documents)
    end_token_ids = merge_stop_tokens(
        documents.get(GENERATION_FILE), directory / GENERATION_FILE, stored.config
    )
    return LLMEngine.from_stored(
        stored,
        arithmetic=arithmetic,
        identity=EngineIdentity(
            recipe=manifest.recipe,
            artifact_digest=manifest.artifact_digest,
            engine_digest=manifest.digest,
            kv_cache=kv_cache,
            page_tokens=options.page_tokens or _PAGE_TOKENS,
            arithmetic=arithmetic.name,
        ),
        options=options,
        tokenizer=tokenizer,
        end_token_ids=end_token_ids,
    )


def emulated_bytes(
    stored: StoredModel, manifest: EngineManifest, *, kv_cache: str, options: EngineOptions
) -> int:
    """Bytes that an emulated engine needs: its packed tensors, its KV cache, and the largest file
    of the directory twice, as it is read and converted."""
    config = stored.config
    tensors = packed_tensors(config, stored.schemes, layout="torch").values()
    largest = max(file.num_bytes for file in manifest.tensor_files.values())
    token = layer_token_bytes(
        kv_layout(manifest.target, kv_cache, sparse=config.has_indexer),
        config.kv_lora_rank,
        config.qk_rope_head_dim,
    )
    tokens = options.max_kv_tokens or max(
        options.max_model_len or config.dense_context, 1024 * options.max_batch_size
    )
    kv_bytes = token * tokens * config.num_hidden_layers
    return sum(tensor.num_bytes for tensor in tensors) + kv_bytes + 2 * largest


def check_memory(directory: Path, target: str, needed: int, there: int) -> None:
    """Check that an emulated engine which needs so many bytes fits into those that there are.

    Raises:
        DeployError: it does not.
    """
    if needed > there:
        raise DeployError(
            f"{directory} needs {needed / 1e9:.1f} GB to be executed as {target} does, because the "
            f"model is held in memory, and this machine has {there / 1e9:.1f} GB; evaluate on a "
            "larger machine"
        )

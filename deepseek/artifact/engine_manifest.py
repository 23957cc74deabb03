"""`engine.json`: the manifest of an engine directory, in one form for every target.

    format_version, target, ranks             the loader, and the number of GPUs
    recipe, artifact_digest,                  what the engine was built from
      source_fingerprint, schemes, kv_cache
    versions, plan                            the tools, and the bytes of each rank
    files, tensor_files                       everything else in the directory, by SHA-256, apart
                                              from the verdict (gate.json) and its signature
    target_fields                             values for the target's own loader only
    digest                                    SHA-256 of all of the above: the engine's digest

`build` writes it; `evaluate`, `gate`, `report` and the server read the common part only. The loader
of a target validates its own `target_fields` (`deepseek/engine/packed.py` for the embedded engine);
here they are plain JSON that the digest covers. The manifest holds no times and no paths: the same
inputs give the same bytes. This file imports no torch.

Rule for every file that IntServe writes: a change of its form raises `format_version`, and a reader
either reads the old form or refuses it in one sentence. Format 1 (the embedded engine's fields
beside the common ones) is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from deepseek.artifact.documents import (
    COPIED_FILES,
    check_nothing_else,
    check_tensor_file,
    read_listed,
)
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.errors import ArtifactError, first_problem
from deepseek.files import canonical_json, read_json_object, write_json
from deepseek.recipe import KVFormat, Scheme
from deepseek.source.index import INDEX_FILE

ENGINE_FILE = "engine.json"
#: The gate's verdict on the engine, and its signature: written into the directory after `build`.
VERDICT_FILE, SIGNATURE_FILE = "gate.json", "gate.json.sig"
FORMAT_VERSION = 2
_DOCUMENTS = ("config.json", MANIFEST_FILE, *COPIED_FILES)
#: What the directories of some targets hold beside them, for the target's own loader.
_TARGET_DOCUMENTS = {
    "trtllm": ("hf_quant_config.json", "quant_cfg.json", "llm_args.yaml", INDEX_FILE),
    "vllm": ("vllm.yaml", INDEX_FILE),
    "sglang": ("sglang.yaml", INDEX_FILE),
    "transformers": ("from_pretrained.json", INDEX_FILE),
}
#: KV formats that an engine may have; "fp32" is for exactness tests.
CacheFormat = Literal[KVFormat, "fp32"]
#: The recipe's name in an engine that was built from a source checkpoint as it is.
UNQUANTIZED = "unquantized"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RankLayout(_Record):
    """`tp` ranks, one GPU or process each, share the engine; the routed experts are divided among
    `ep` of them, so `ep` divides `tp`. Both are 1 where nothing is divided."""

    tp: int = Field(ge=1)
    ep: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> RankLayout:
        if self.tp % self.ep:
            raise ValueError(f"ep {self.ep} must divide tp {self.tp}")
        return self


class EnginePlan(_Record):
    """Bytes of weights of each rank, in rank order, without the KV cache, whose size is chosen when
    the engine starts. A loader checks the weights that it loads against this."""

    rank_weight_bytes: tuple[int, ...]


class TensorFile(_Record):
    """One safetensors file of the engine: its size in bytes and its SHA-256 in hex. A target's
    loader may verify finer digests of its own instead of reading the whole file first."""

    num_bytes: int = Field(ge=0)
    sha256: str


class EngineManifest(_Record):
    """The whole of engine.json but its digest.

    `artifact_digest` is the quantized checkpoint's, or the source's fingerprint where `recipe` is
    "unquantized". `schemes` maps the module name of every linear to its scheme, `versions` each
    tool to its version, `files` each copied document to its SHA-256, `tensor_files` each tensor
    file to its record. `target_fields` belongs to the target.
    """

    format_version: Literal[2] = 2
    target: str
    ranks: RankLayout
    recipe: str
    artifact_digest: str
    source_fingerprint: str
    kv_cache: CacheFormat
    schemes: dict[str, Scheme]
    versions: dict[str, str]
    plan: EnginePlan
    files: dict[str, str]
    tensor_files: dict[str, TensorFile]
    target_fields: dict[str, JsonValue]

    @model_validator(mode="after")
    def _check(self) -> EngineManifest:
        if len(self.plan.rank_weight_bytes) != self.ranks.tp:
            raise ValueError(
                f"the plan has {len(self.plan.rank_weight_bytes)} ranks, the layout {self.ranks.tp}"
            )
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all tensor files."""
        return sum(file.num_bytes for file in self.tensor_files.values())

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the manifest's canonical JSON: the engine's digest."""
        return hashlib.sha256(canonical_json(_dump(self))).hexdigest()


def write_engine_manifest(directory: Path, manifest: EngineManifest) -> None:
    """Write engine.json, its own digest beside the content, atomically."""
    write_json(directory / ENGINE_FILE, _dump(manifest) | {"digest": manifest.digest})


def read_engine_manifest(directory: Path | str) -> EngineManifest:
    """Read engine.json and check it against its own digest; reads no other file.

    Raises:
        ArtifactError: absent, not JSON, of another format, an unknown field, or edited.
    """
    directory = Path(directory)
    path = directory / ENGINE_FILE
    raw = read_json_object(
        path, f"{directory} is not an engine: make one with `python -m quant_jobs build`"
    )
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format_version {version!r} is not supported, only {FORMAT_VERSION}; delete "
            f"{directory} and build again with this version"
        )
    recorded = raw.pop("digest", None)
    try:
        manifest = EngineManifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; build the engine again") from error
    if manifest.digest != recorded:
        raise ArtifactError(f"{path} was changed after it was written; build the engine again")
    return manifest


def read_documents(directory: Path, manifest: EngineManifest) -> dict[str, bytes]:
    """The copied documents (config.json, tokenizer, intserve.json) by name, each read once and
    verified. Checks too that the tensor files have their sizes and that nothing else lies there
    that a loader would read; the tensors are verified by the target's loader.

    Raises:
        ArtifactError: a file is absent, differs, or is not the engine's; the sentence names it.
    """
    allowed = (*_DOCUMENTS, *_TARGET_DOCUMENTS.get(manifest.target, ()))
    documents = read_listed(directory, manifest.files, allowed, manifest=ENGINE_FILE)
    for name, file in manifest.tensor_files.items():
        if Path(name).name != name or not name.isprintable() or not name.endswith(".safetensors"):
            raise ArtifactError(
                f"{directory / ENGINE_FILE} lists the tensor file {name}, which is no plain name "
                "of a safetensors file; build the engine again"
            )
        check_tensor_file(directory / name, file.num_bytes, directory)
    known = {ENGINE_FILE, VERDICT_FILE, SIGNATURE_FILE, *documents, *manifest.tensor_files}
    check_nothing_else(directory, known, what="engine")
    return documents


def _dump(manifest: EngineManifest) -> dict[str, Any]:
    """JSON form; defaults of a scheme are left out, because there is one scheme per linear."""
    content = manifest.model_dump(mode="json")
    content["schemes"] = {
        module: scheme.model_dump(mode="json", exclude_defaults=True)
        for module, scheme in sorted(manifest.schemes.items())
    }
    return content

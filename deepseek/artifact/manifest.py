"""What a quantized checkpoint says about itself: the records of intserve.json.

The manifest names the inputs (source, recipe, calibration), the published files with the digest of
every tensor, and the quality figures of the job (output errors, expert coverage, fallbacks). It
holds no time stamps and no paths: the same inputs give the same bytes. Its digest is *the
artifact's digest*; an engine, a gate verdict and the server refer to the artifact by it. This file
imports no torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek import untrusted
from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE, InputOutlier
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, first_problem
from deepseek.files import canonical_json, read_json_object, write_json
from deepseek.inventory import HEAD, linears
from deepseek.recipe import KVFormat, Recipe

MANIFEST_FILE = "intserve.json"
#: What a job leaves beside the manifest; it belongs to no digest.
JOB_REPORTS = ("job_report.json", "job_report.html")
FORMAT_VERSION = 3

#: A number of bytes, tokens or times; larger ones cannot be computed with exactly.
Count = Annotated[int, Field(ge=0, le=1 << 53)]
#: A relative error or a magnitude.
Magnitude = Annotated[float, Field(ge=0.0)]

#: A decoder layer by number, or the tensors outside the layers.
LayerKey = int | Literal["globals"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceRecord(_Record):
    """The source checkpoint, by digest. `weight_block_size` is that of its FP8 blocks, if any."""

    fingerprint: str
    config_sha256: str
    weight_block_size: tuple[int, int] | None


class CalibrationFile(_Record):
    """A file of calibration text, by digest, with its sampling weight and the number of blocks and
    tokens that were drawn from it."""

    sha256: str
    weight: float = Field(gt=0)
    blocks: int = Field(ge=1)
    tokens: int = Field(ge=1)


class CalibrationRecord(_Record):
    """The calibration data: SHA-256 of the token ids, how they were cut into blocks, and the files
    that they were drawn from."""

    digest: str
    num_tokens: int = Field(ge=1)
    num_blocks: int = Field(ge=1)
    block_tokens: int = Field(ge=1)
    files: tuple[CalibrationFile, ...] = ()


class LayerRecord(_Record):
    """One published file: its digests, the digest of each tensor, and the output error of each
    module.

    `header_sha256` covers the safetensors header and the tensor digests cover all other bytes, so
    that a reader verifies what it reads without reading it twice; `sha256` is for other tools.
    `source_sha256` is the digest of the source tensors that the file was made from. `errors` is the
    relative error of a module's output on the calibration data, ||y' - y|| / ||y||.
    """

    layer: LayerKey
    file: str
    num_bytes: Count
    sha256: str
    header_sha256: str
    source_sha256: str
    tensors: dict[str, str]
    errors: dict[str, Magnitude] = {}


class Fallback(_Record):
    """A substitute for what the recipe asked for, and how often it was taken. The gate counts
    fallbacks."""

    kind: str
    layer: int | None
    module: str
    count: Annotated[Count, Field(ge=1)]
    detail: str = ""


class Manifest(_Record):
    """The whole of intserve.json.

    `coverage` maps each MoE layer to the number of calibration tokens that reached each routed
    expert. `files` maps each copied or derived file (config.json, index, tokenizer) to its SHA-256.
    `kv_latent_amax` maps each layer to the largest magnitude of the cached latent (the output of
    kv_a_layernorm, folded smoothing included) over the calibration tokens; the rotary key is not
    included. A static FP8 scale of the latent would be 1/448 of this value. `input_outliers` are
    the routed experts whose inputs are far larger than those of the others in their layer
    (`input_maxima.py`); empty where the maxima are not kept.

    Form 1 has neither maxima nor outliers, and its recipe no limit for them. Form 2 has the fields
    of form 3, and the `quantization_config` beside it nothing for SGLang (`compressed_tensors.py`).
    """

    format_version: Literal[1, 2, 3] = 3
    recipe: Recipe
    source: SourceRecord
    calibration: CalibrationRecord | None
    layers: tuple[LayerRecord, ...]
    coverage: dict[int, tuple[Count, ...]]
    fallbacks: tuple[Fallback, ...]
    tools: dict[str, str]
    files: dict[str, str]
    kv_latent_amax: dict[int, Magnitude] = {}
    input_outliers: tuple[InputOutlier, ...] = ()

    @property
    def has_input_maxima(self) -> bool:
        """Whether the maxima of the routed experts' inputs lie beside the artifact."""
        return INPUT_MAXIMA_FILE in self.files

    @property
    def kv_cache(self) -> KVFormat:
        """Format of the KV cache that the recipe requests."""
        return self.recipe.kv_cache

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all tensor files."""
        return sum(record.num_bytes for record in self.layers)

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the manifest's canonical JSON: the artifact's digest."""
        return hashlib.sha256(canonical_json(self.content())).hexdigest()

    def content(self) -> dict[str, Any]:
        """The JSON of intserve.json without its digest, in the form of `format_version`: in form 1,
        what came with form 2 is left out, so that an older artifact keeps its digest."""
        content = self.model_dump(mode="json")
        if self.format_version == 1:
            del content["input_outliers"], content["recipe"]["gate"]["max_input_outliers"]
        return content

    def record(self, layer: LayerKey) -> LayerRecord:
        """The record of one layer, or of the globals. An absent record is a bug: a reader checks on
        opening that all are present."""
        return next(record for record in self.layers if record.layer == layer)


def check_figures(manifest: Manifest, config: ModelConfig, path: Path) -> None:
    """Check that the figures of the job are of this model's linears, layers and experts.

    Raises:
        ArtifactError: one is of something that the model does not have; the sentence names it.
    """

    def refuse(what: str) -> NoReturn:
        raise ArtifactError(
            f"{path} has figures of {what}, which the model that config.json describes does not "
            "have; restore it or quantize again"
        )

    layers = range(config.num_hidden_layers)
    modules = {spec.module for layer in layers for spec in linears(config, layer)} | {HEAD}
    for record in manifest.layers:
        for module in record.errors:
            if module not in modules:
                refuse(f"the linear {module}")
    for layer, counts in manifest.coverage.items():
        if layer not in layers or not config.is_moe(layer):
            refuse(f"experts in layer {layer}")
        if len(counts) != config.n_routed_experts:
            refuse(f"{len(counts)} experts in layer {layer}")
    for layer in manifest.kv_latent_amax:
        if layer not in layers:
            refuse(f"a layer {layer}")
    for outlier in manifest.input_outliers:
        is_layer = outlier.layer in layers and config.is_moe(outlier.layer)
        if not is_layer or outlier.expert >= config.n_routed_experts:
            refuse(f"the input of expert {outlier.expert} in layer {outlier.layer}")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write intserve.json, its own digest beside the content, atomically."""
    write_json(directory / MANIFEST_FILE, manifest.content() | {"digest": manifest.digest})


def read_manifest(directory: Path) -> Manifest:
    """Read and verify intserve.json.

    Raises:
        ArtifactError: absent, not JSON, an unknown field, or edited since it was written.
    """
    path = directory / MANIFEST_FILE
    raw = read_json_object(
        path,
        "the directory is not a finished quantized checkpoint: run quantize again, which resumes",
    )
    return parse_manifest(raw, path)


def parse_manifest(raw: dict[str, Any], path: Path) -> Manifest:
    """The manifest that the JSON object of `path` holds; see `read_manifest` for the errors."""
    version = raw.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format_version {untrusted.show(version)} is not supported, only 1, 2 and "
            f"{FORMAT_VERSION}; quantize again with this version"
        )
    if version == 1 and (later := _later_field(raw)):
        raise ArtifactError(
            f"{path}: {later} is no field of its format_version; restore it or quantize again"
        )
    recorded = raw.get("digest")
    content = {key: value for key, value in raw.items() if key != "digest"}
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: {first_problem(error)}; restore it or quantize again"
        ) from error
    if manifest.digest != recorded:
        raise ArtifactError(
            f"{path} was changed after it was written (its digest is {manifest.digest}, it "
            f"records {recorded}); restore it or quantize again"
        )
    return manifest


def _later_field(raw: dict[str, Any]) -> str | None:
    """What a manifest of form 1 holds that came with form 2, which its digest would not cover."""
    if "input_outliers" in raw:
        return "input_outliers"
    files, gate = raw.get("files"), raw.get("recipe")
    gate = gate.get("gate") if isinstance(gate, dict) else None
    if isinstance(files, dict) and INPUT_MAXIMA_FILE in files:
        return f"files.{INPUT_MAXIMA_FILE}"
    if isinstance(gate, dict) and "max_input_outliers" in gate:
        return "recipe.gate.max_input_outliers"
    return None

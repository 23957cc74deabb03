"""The values of an engine directory for TensorRT-LLM, against the digests that lie beside them.

intserve.json, the artifact's manifest, has a digest of every tensor of the artifact. INT4 and INT8
codes, their INT4 scales, FP8 tiles and all that was not quantized are carried over without a loss,
so that they are converted back here and verified against it, without the artifact and whatever
engine.json says. What is rounded on the way (BF16 of FP8 tiles, INT8 scales in BF16) is covered by
the SHA-256 of the files in engine.json only.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.recipe import Scheme
from deepseek.tensor_files import tensor_digest
from deepseek.trtllm.fields import TrtllmFields
from deepseek.trtllm.loader_files import Checkpoint

#: Files that are read at one time.
_THREADS = min(8, os.cpu_count() or 1)
_READ_BYTES = 1 << 20


def check_input_scales(
    checkpoint: Checkpoint, config: ModelConfig, stored: Mapping[str, Scheme], fields: TrtllmFields
) -> None:
    """Check the static input scales of INT4 experts: positive, finite, one value for gate and up
    and one for down in each layer, and those that engine.json states. The loader takes the largest
    of all experts for gate and up, and of each rank's own for down.

    Raises:
        ArtifactError: one is not; the sentence names it.
    """
    layers = [
        layer
        for layer in range(config.num_layers_with_mtp)
        if config.is_moe(layer)
        and (scheme := stored.get(f"model.layers.{layer}.mlp.experts.0.gate_proj"))
        and scheme.weights == "int4"
    ]
    for layer in layers:
        stated = fields.input_scales.get(layer)
        if stated is None:
            raise ArtifactError(
                f"{checkpoint.directory / ENGINE_FILE} has no input scales of layer {layer}; build "
                "again"
            )
        for role in ("gate_proj", "up_proj", "down_proj"):
            wanted = stated.down if role == "down_proj" else stated.gate_up
            for expert in range(config.n_routed_experts):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{role}.input_scale"
                value = checkpoint.peek(key).double().reshape(-1)[0].item()
                where = f"tensor {key} in {checkpoint.file(key)}"
                if not (math.isfinite(value) and value > 0):
                    raise ArtifactError(
                        f"{where} is {value}, not a positive number; the runtime divides by it: "
                        "build again"
                    )
                if value != _as_f32(wanted):
                    raise ArtifactError(
                        f"{where} is {value:.9g}, where all experts of the layer share "
                        f"{wanted:.9g}; the runtime would take the largest of them: build again"
                    )


def check_digests(
    checkpoint: Checkpoint, built: BuiltEngine, engine: EngineManifest, stored: Mapping[str, Scheme]
) -> tuple[int, int]:
    """Verify every tensor that can be verified against intserve.json, and every file against
    engine.json; the bytes that were hashed and the number of tensors.

    Raises:
        ArtifactError: one differs; the sentence names the tensor, and what was done to it where
            that can be told, or the file.
    """
    artifact: dict[str, str] = {}
    schemes: Mapping[str, Scheme] = {}
    if built.manifest is not None:
        schemes = built.manifest.recipe.resolve(built.config)
        for record in built.manifest.layers:
            artifact |= record.tensors
    keys: dict[str, list[str]] = {name: [] for name in engine.tensor_files}
    for key in checkpoint:
        keys[checkpoint.file(key).name].append(key)

    def check_file(name: str) -> tuple[int, int]:
        verified = 0
        for key in keys[name] if artifact else ():
            verified += _verify(checkpoint, key, schemes, stored, artifact)
        path, file = checkpoint.directory / name, engine.tensor_files[name]
        if _sha256(path) != file.sha256:
            raise ArtifactError(
                f"{path} was edited after the engine was built: its SHA-256 is not that of "
                f"{ENGINE_FILE}; restore it or build again"
            )
        return file.num_bytes, verified

    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(check_file, sorted(keys)))
    return sum(size for size, _ in results), sum(count for _, count in results)


@dataclass(frozen=True, slots=True)
class _Original:
    """How a stored tensor is turned back into the artifact's: its name there, and what is done to
    the bytes."""

    name: str
    offset: int | None = None

    def convert(self, tensor: Tensor) -> Tensor:
        if self.offset is None:
            return tensor
        return (tensor.contiguous().view(torch.uint8) ^ self.offset).view(torch.int32)


def _original(
    key: str, schemes: Mapping[str, Scheme], stored: Mapping[str, Scheme]
) -> _Original | None:
    """What a key was in the artifact, None where it cannot be turned back exactly."""
    module, _, suffix = key.rpartition(".")
    scheme = schemes.get(module)
    if scheme is None:
        return _Original(key)
    if stored[module].weights != scheme.weights:
        return None  # BF16 in place of FP8 tiles
    match scheme.weights, suffix:
        case "int4", "weight":
            return _Original(f"{module}.weight_packed", 0x88)
        case "int8", "weight":
            return _Original(f"{module}.weight_packed", 0x80)
        case "int4" | "fp8-block", "weight_scale_inv":
            return _Original(f"{module}.weight_scale")
        case "fp8-block" | "bf16", "weight":
            return _Original(key)
    return None


def _verify(
    checkpoint: Checkpoint,
    key: str,
    schemes: Mapping[str, Scheme],
    stored: Mapping[str, Scheme],
    artifact: Mapping[str, str],
) -> int:
    original = _original(key, schemes, stored)
    if original is None:
        return 0
    expected = artifact.get(original.name)
    where = f"tensor {key} in {checkpoint.file(key)}"
    if expected is None:
        raise ArtifactError(
            f"{where} was made from {original.name}, which {MANIFEST_FILE} does not list; build "
            "again"
        )
    tensor = checkpoint.peek(key)
    if tensor_digest(original.convert(tensor)) == expected:
        return 1
    what = _diagnose(tensor, original, expected, artifact)
    raise ArtifactError(
        f"{where} {what}; its values are not those that {MANIFEST_FILE} records: build again"
    )


def _diagnose(
    tensor: Tensor, original: _Original, expected: str, artifact: Mapping[str, str]
) -> str:
    """What was done to a tensor whose digest differs, as far as it can be told."""
    if original.offset is not None:
        codes = tensor.contiguous().view(torch.uint8)
        if original.offset == 0x88:
            swapped = ((codes << 4) | (codes >> 4)).view(torch.int8)
            if tensor_digest(original.convert(swapped)) == expected:
                return "has its nibbles swapped (the even input belongs into the low one)"
        if tensor_digest(codes.view(torch.int32)) == expected:
            return "has offset-binary codes, as compressed-tensors packs them"
    elif original.name.endswith(".weight_scale"):
        values = tensor.float()
        inverse = (1 / values).to(tensor.dtype)
        if tensor_digest(inverse) == expected or bool((values > 1).all()):
            return "has inverted scales (they are multipliers, in spite of the name)"
    digest = tensor_digest(original.convert(tensor))
    other = next((name for name, value in artifact.items() if value == digest), None)
    return f"holds the values of {other}" if other else "was changed"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _as_f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).double().item()

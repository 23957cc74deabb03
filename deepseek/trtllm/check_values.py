"""The values of an engine directory for TensorRT-LLM, against the digests that lie beside them.

intserve.json, the artifact's manifest, has a digest of every tensor of the artifact. INT4 and INT8
codes, their INT4 scales, FP8 tiles and all that was not quantized are carried over without a loss,
so that they are converted back here and verified against it, without the artifact and whatever
engine.json says. What is rounded on the way (BF16 of FP8 tiles, INT8 scales in BF16) is covered by
the SHA-256 of the files in engine.json only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.artifact.engine_checks import Origin, Original, offset_bytes
from deepseek.artifact.engine_manifest import ENGINE_FILE
from deepseek.artifact.loader_files import Checkpoint
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.recipe import Scheme
from deepseek.tensor_files import tensor_digest
from deepseek.trtllm.fields import TrtllmFields

_NIBBLES, _BYTES = offset_bytes(0x88), offset_bytes(0x80)


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


def origins(schemes: Mapping[str, Scheme], stored: Mapping[str, Scheme]) -> Origin:
    """What every key of the directory was in the artifact; `schemes` are its recipe's."""
    return lambda key: _original(key, schemes, stored)


def _original(
    key: str, schemes: Mapping[str, Scheme], stored: Mapping[str, Scheme]
) -> Original | None:
    """What a key was in the artifact, None where it cannot be turned back exactly."""
    module, _, suffix = key.rpartition(".")
    scheme = schemes.get(module)
    if scheme is None:
        return Original(key)
    if stored[module].weights != scheme.weights:
        return None  # BF16 in place of FP8 tiles
    match scheme.weights, suffix:
        case "int4", "weight":
            return Original(f"{module}.weight_packed", _NIBBLES)
        case "int8", "weight":
            return Original(f"{module}.weight_packed", _BYTES)
        case "int4" | "fp8-block", "weight_scale_inv":
            return Original(f"{module}.weight_scale")
        case "fp8-block" | "bf16", "weight":
            return Original(key)
    return None


def diagnose(tensor: Tensor, original: Original, expected: str, artifact: Mapping[str, str]) -> str:
    """What was done to a tensor whose digest differs, as far as it can be told."""
    if original.convert is not None:
        codes = tensor.contiguous().view(torch.uint8)
        if original.convert is _NIBBLES:
            swapped = ((codes << 4) | (codes >> 4)).view(torch.int8)
            if tensor_digest(original.of(swapped)) == expected:
                return "has its nibbles swapped (the even input belongs into the low one)"
        if tensor_digest(codes.view(torch.int32)) == expected:
            return "has offset-binary codes, as compressed-tensors packs them"
    elif original.name.endswith(".weight_scale"):
        values = tensor.float()
        inverse = (1 / values).to(tensor.dtype)
        if tensor_digest(inverse) == expected or bool((values > 1).all()):
            return "has inverted scales (they are multipliers, in spite of the name)"
    return ""


def _as_f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).double().item()

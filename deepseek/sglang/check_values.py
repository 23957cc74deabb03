"""What the values of an SGLang engine directory must be: input scales, the artifact's tensors
turned back, and the artifact's values as a rank must hold them. `check.py` calls these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.artifact.engine_checks import Origin, Original, offset_bytes
from deepseek.artifact.loader_files import Checkpoint
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.errors import ArtifactError
from deepseek.formats import decompress, unpack_int4, unpack_int8
from deepseek.inventory import expert_of, layer_of
from deepseek.recipe import Scheme
from deepseek.sglang.fields import SglangFields


def check_input_scales(
    checkpoint: Checkpoint, stored: Mapping[str, Scheme], fields: SglangFields
) -> None:
    """Check the static input scale of every INT4 expert: that of engine.json for its layer, a
    power of two, and not below what the calibrated inputs need.

    Raises:
        ArtifactError: one is not; the sentence names the tensor.
    """
    layers = {
        layer_of(module)
        for module in stored
        if fields.dialect == "w4afp8" and expert_of(module) is not None
    }
    if layers != fields.input_scales.keys():
        raise ArtifactError(
            f"{checkpoint.directory}: engine.json has input scales of the layers "
            f"{sorted(fields.input_scales)}, but {sorted(layers)} have INT4 experts; build again"
        )
    for module in stored:
        if expert_of(module) is None or fields.dialect != "w4afp8":
            continue
        scales = fields.input_scales[layer_of(module)]
        down = module.endswith(".down_proj")
        wanted, needed = (
            (scales.down, scales.needed_down) if down else (scales.gate_up, scales.needed_gate_up)
        )
        key = f"{module}.input_scale"
        value = checkpoint.peek(key).float().item()
        if value != wanted or wanted < needed or torch.tensor(value).frexp().mantissa != 0.5:
            raise ArtifactError(
                f"{checkpoint.directory}: tensor {key} is {value:g}, where a power of two from "
                f"{needed:g} on is needed and engine.json has {wanted:g}; build again"
            )


def origins(schemes: Mapping[str, Scheme], stored: Mapping[str, Scheme]) -> Origin:
    """What every key was in the artifact. Scales that were rounded, input scales and what was
    multiplied out cannot be turned back and are covered by the SHA-256 of the files only."""

    def origin(key: str) -> Original | None:
        module, _, suffix = key.rpartition(".")
        scheme = schemes.get(module)
        if scheme is None:
            return Original(key)
        if stored[module].weights != scheme.weights or suffix == "input_scale":
            return None
        match scheme.weights, suffix:
            case "int4", "weight":
                return Original(f"{module}.weight_packed", offset_bytes(0x88))
            case _, "weight_scale_inv":
                return Original(f"{module}.weight_scale")
            case "int8" | "int8-asym", "weight_scale" if scheme.activations == "none":
                return None
        return Original(key)

    return origin


def reference_values(
    tensors: Mapping[str, Tensor],
    artifact: ArtifactReader,
    stored: Mapping[str, Scheme],
    fields: SglangFields,
    layer: LayerKey,
) -> dict[str, Tensor]:
    """The artifact's tensors of one layer as `loader_decode.decode` names what ranks hold: codes
    one in a byte, scales, and kv_b_proj multiplied out where the directory has it so."""
    rest = dict(tensors)
    found: dict[str, Tensor] = {}
    for module, kept in stored.items():
        if layer == "globals" or layer_of(module) != layer:
            continue
        scheme = artifact.schemes[module]
        parts = pop_linear(rest, module, scheme)
        shape = _shape(parts)
        if kept.weights != scheme.weights:
            found[f"{module}.weight"] = decompress(parts, scheme, shape).to(torch.bfloat16)
            continue
        if fields.dialect == "w4afp8" and scheme.weights == "int4":
            scales = fields.input_scales[layer]
            value = scales.down if module.endswith(".down_proj") else scales.gate_up
            parts["input_scale"] = torch.tensor([value])
        for suffix, values in parts.items():
            if suffix == "weight_packed":
                unpack = unpack_int4 if scheme.bits == 4 else unpack_int8
                found[f"{module}.weight"] = unpack(values, shape[1])
            elif suffix != "weight_shape":
                found[f"{module}.{suffix}"] = values
    return found | rest


def _shape(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    if "weight_shape" in parts:
        rows, columns = parts["weight_shape"].tolist()
        return rows, columns
    rows, columns = parts["weight"].shape
    return rows, columns

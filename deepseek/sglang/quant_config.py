"""`quantization_config` of an SGLang engine's config.json.

    w4afp8              its method; the rest of it is fixed in SGLang
    w8a8_int8           none: the flag `--quantization w8a8_int8` says it. A quantization_config of
                        another method would be taken for the method, or refused with that flag
    blockwise_int8      its method and the size of the tiles
    compressed-tensors  the quantized checkpoint's groups, with the names under which SGLang looks
    released            the source's own

Where SGLang fuses linears it looks for the group of the fused name (`gate_up_proj`,
`fused_qkv_a_proj_with_mqa`), then for that of the class `Linear`, and only then for those of the
parts (`find_matched_target`, and not at all for `gate_up_proj`, of which it has no mapping).
Patterns that were written for the parts' names may miss the fused one, which then falls to the
class in silence. So every fused name that no pattern of its group meets is added to the group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepseek.artifact.compressed_tensors import LINEAR_CLASS, matches, quantization_config
from deepseek.config import ModelConfig
from deepseek.inventory import expert_of, layer_of
from deepseek.recipe import Scheme
from deepseek.sglang.layout import TILE, Dialect

#: First part of a fused linear -> the fused linear's name.
FUSED_NAMES = {"gate_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj_with_mqa"}


def sglang_quantization_config(
    config: ModelConfig, stored: Mapping[str, Scheme], dialect: Dialect
) -> dict[str, Any] | None:
    """The value of `quantization_config` for a quantized checkpoint, None where there is none.
    `stored` are the schemes of the linears that the directory has."""
    match dialect:
        case "w4afp8":
            return {"quant_method": "w4afp8"}
        case "blockwise_int8":
            return {
                "quant_method": "blockwise_int8",
                "activation_scheme": "dynamic",
                "weight_block_size": [TILE, TILE],
            }
        case "compressed-tensors":
            groups = quantization_config(replace(config, num_nextn_predict_layers=0), stored)
            return None if groups is None else _with_fused_names(groups, stored)
    return None


def _with_fused_names(raw: dict[str, Any], stored: Mapping[str, Scheme]) -> dict[str, Any]:
    """The groups with a target for every fused linear, and the class in that of the FP8 tiles."""
    groups: Mapping[str, dict[str, Any]] = raw["config_groups"]
    for group in groups.values():
        if group["format"] == "float-quantized" and LINEAR_CLASS not in group["targets"]:
            group["targets"].append(LINEAR_CLASS)
    missing: dict[tuple[str | None, str], list[int]] = {}
    for module in stored:
        parent, _, role = module.rpartition(".")
        if role not in FUSED_NAMES or expert_of(module) is not None:
            continue
        fused = f"{parent}.{FUSED_NAMES[role]}"
        owner = _owner(groups, raw["ignore"], module)
        if owner != _owner(groups, raw["ignore"], fused):
            place = fused.split(".", 3)[3]
            missing.setdefault((owner, place), []).append(layer_of(module))
    for (owner, place), layers in missing.items():
        which = "|".join(map(str, sorted(layers)))
        pattern = rf"re:.*[.]layers[.]({which})[.]{re.escape(place)}$"
        if owner is None:
            raw["ignore"].append(pattern)
        else:
            groups[owner]["targets"].insert(0, pattern)
    return raw


def _owner(groups: Mapping[str, Mapping[str, Any]], ignore: list[str], name: str) -> str | None:
    """The group whose patterns meet a name; None where it is ignored; "" where none does."""
    if any(matches(entry, name) for entry in ignore):
        return None
    for key, group in groups.items():
        if any(matches(target, name) for target in group["targets"]):
            return key
    return ""

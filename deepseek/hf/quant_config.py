"""The `quantization_config` of config.json, in the words that transformers' quantizers look up.

`dequantize` stands in the config itself, so that `from_pretrained(DIR)` does what was judged.
Without it the compressed-tensors quantizer quantizes the inputs of FP8 linears at every forward
pass (but not those of the experts), which no verdict is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek.artifact.compressed_tensors import module_patterns
from deepseek.config import ModelConfig
from deepseek.hf.layout import TILE, Form, Stored
from deepseek.inventory import HEAD, expert_of

#: transformers takes the first group with a pattern that holds the word `experts` for theirs, and
#: the first without one for all other linears.
EXPERTS = "re:.*[.]mlp[.]experts[.].*_proj$"
#: What is never quantized and is a linear module all the same.
_ROUTER = "re:.*[.]mlp[.]gate$"


def quantization_config(config: ModelConfig, stored: Stored) -> dict[str, Any] | None:
    """The value of config.json's `quantization_config`; None for the method `bf16`."""
    match stored.method:
        case "bf16":
            return None
        case "fp8":
            kept = sorted(module for module, form in stored.forms.items() if form.kind == "bf16")
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [TILE, TILE],
                "dequantize": True,
                "modules_to_not_convert": [HEAD, *kept],
            }
        case "compressed-tensors":
            return _compressed_tensors(config, stored.forms)


def _compressed_tensors(config: ModelConfig, forms: Mapping[str, Form]) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    experts = {form for module, form in forms.items() if expert_of(module) is not None}
    if experts:
        (form,) = experts
        groups.append(_group(form, [EXPERTS]))
    dense = {m: form for m, form in forms.items() if expert_of(m) is None}
    by_form: dict[Form, list[str]] = {}
    for module, form in dense.items():
        by_form.setdefault(form, []).append(module)
    ignore = [*([] if HEAD in forms else [HEAD]), _ROUTER]
    for form, modules in by_form.items():
        patterns = module_patterns(config, modules, forms)
        if form.kind == "bf16":
            ignore += patterns
        else:
            groups.append(_group(form, patterns))
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignore,
        "dequantize": True,
    }


def _group(form: Form, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    if form.kind == "tiles":
        weights |= {"strategy": "block", "block_structure": [TILE, TILE]}
    else:
        weights |= {"num_bits": form.bits, "type": "int", "symmetric": not form.zero_points}
        weights |= {"strategy": "group" if form.group_size else "channel"}
        if form.group_size:
            weights |= {"group_size": form.group_size}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "float-quantized" if form.kind == "tiles" else "pack-quantized",
    }

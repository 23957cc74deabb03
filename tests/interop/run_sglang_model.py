"""Make SGLang's own DeepSeek-V3 of quantized checkpoints, load them with its own loader, and write
down what became of every tensor.

    python run_sglang_model.py PACKAGES OUTPUT CHECKPOINT[=QUANTIZATION]...

PACKAGES is a folder of further packages (`sglang.txt`). QUANTIZATION is what `launch_server` is
told; a checkpoint's `sglang.yaml`, if it has one, says the rest. OUTPUT is a JSON file: for each
checkpoint the class of the scheme of each kind of module, the number of parameters, the tensors
that nothing read, and the parameters that do not hold the checkpoint's values; or why SGLang
refused it. No kernel runs.
"""

from __future__ import annotations

import json
import os
import site
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}
site.addsitedir(sys.argv[1])

import sglang_shells  # before anything of SGLang
import torch
from safetensors import safe_open
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.weight_utils import default_weight_loader, get_quant_config
from sglang.srt.models.deepseek_v2 import DeepseekV3ForCausalLM
from torch import Tensor

#: Linears that SGLang fuses: its name -> the checkpoint's, by rows.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def sources(name: str, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The checkpoint's tensors of a parameter: by expert, or one entry, and each by rows. None
    where the checkpoint has no such."""
    parent, _, last = name.rpartition(".")
    if parent.endswith(".mlp.experts"):
        which, _, suffix = last.partition("_")
        parts: list[list[str]] = []
        while f"{parent}.{len(parts)}.down_proj.{suffix}" in tensors:
            expert = f"{parent}.{len(parts)}"
            parts.append([f"{expert}.{role}.{suffix}" for role in EXPERTS[which]])
        return parts
    module, _, role = parent.rpartition(".")
    if role in FUSED:
        return [[f"{module}.{part}.{last}" for part in FUSED[role]]]
    return [[name]] if name in tensors else []


def expected(parts: list[list[str]], tensors: Mapping[str, Tensor]) -> Tensor:
    """What a parameter of these tensors should hold."""
    values = [torch.cat([tensors[part] for part in rows]) for rows in parts]
    return torch.stack(values) if len(values) > 1 else values[0]


def holds(parameter: Tensor, wanted: Tensor) -> bool:
    """Whether all values are the same, as the parameter's type and its order of axes hold them."""
    wanted = wanted.to(parameter.dtype)
    if getattr(parameter, "is_transposed", False) and wanted.dim() == 3:
        wanted = wanted.transpose(1, 2)
    parameter = parameter.detach()
    if wanted.numel() == parameter.numel():
        wanted = wanted.reshape(parameter.shape)  # an input scale is [1] in files
    if parameter.dtype.itemsize == 1:
        parameter, wanted = parameter.view(torch.uint8), wanted.contiguous().view(torch.uint8)
    return torch.equal(parameter, wanted)


def load(checkpoint: Path, quantization: str | None) -> dict[str, Any]:
    args = sglang_shells.start(checkpoint, quantization)
    config = ModelConfig.from_server_args(args)
    quant_config = get_quant_config(
        config, LoadConfig(), DeepseekV3ForCausalLM.packed_modules_mapping
    )
    torch.set_default_dtype(config.dtype)
    model = DeepseekV3ForCausalLM(config.hf_config, quant_config)
    torch.set_default_dtype(torch.float32)
    parameters = dict(model.named_parameters())
    filled: set[str] = set()
    for name, parameter in parameters.items():
        loader = getattr(parameter, "weight_loader", default_weight_loader)

        def recorded(*words: Any, _loader: Any = loader, _name: str = name, **more: Any) -> Any:
            filled.add(_name)
            return _loader(*words, **more)

        known = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        setattr(parameter, known, recorded)
    tensors = dict(tensors_of(checkpoint))
    model.load_weights(iter(tensors.items()))
    chosen: dict[str, set[str]] = {}
    for module in model.modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            scheme = type(getattr(module, "scheme", None) or method).__name__
            chosen.setdefault(type(module).__name__, set()).add(scheme)
    found = {name: sources(name, tensors) for name in parameters}
    wrong = [
        name
        for name, parts in found.items()
        if parts and not name.endswith("weight_shape")
        if not holds(parameters[name], expected(parts, tensors))
    ]
    read = {part for name in filled for rows in found[name] for part in rows}
    return {
        "quantization": config.quantization,
        "schemes": {kind: " and ".join(sorted(chosen[kind])) for kind in sorted(chosen)},
        "block": getattr(quant_config, "weight_block_size", None),
        "parameters": len(parameters),
        "unfilled": sorted(parameters.keys() - filled),
        "unread": sorted(tensors.keys() - read),
        "wrong": sorted(wrong),
    }


def load_or_refuse(checkpoint: Path, quantization: str | None) -> dict[str, Any]:
    try:
        return load(checkpoint, quantization)
    except Exception as error:
        said = " ".join(" ".join(map(str, error.args)).split())
        return {"refused": f"{type(error).__name__}: {said}"[:400]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for word in sys.argv[3:]:
        path, _, quantization = word.partition("=")
        found[word] = load_or_refuse(Path(path), quantization or None)
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1))

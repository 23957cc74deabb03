"""Load a checkpoint with vLLM's own config, choice of schemes, model code and loaders, and compare
every parameter with the tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import set_default_torch_dtype

#: Linears that vLLM fuses: its name -> the checkpoint's, by rows.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


def config_of(checkpoint: Path, dtype: str) -> VllmConfig:
    """What vLLM makes of `vllm serve CHECKPOINT --dtype DTYPE`."""
    options = {"max_model_len": 1024, "enforce_eager": True, "skip_tokenizer_init": True}
    return EngineArgs(model=str(checkpoint), dtype=dtype, **options).create_engine_config()


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def expected(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """What a parameter should hold, from the checkpoint's tensors."""
    experts, routed, rest = name.partition(".routed_experts.")
    if routed:
        which, _, suffix = rest.partition("_")
        parts = []
        while f"{experts}.{len(parts)}.down_proj.{suffix}" in tensors:
            expert = f"{experts}.{len(parts)}"
            parts.append(torch.cat([tensors[f"{expert}.{r}.{suffix}"] for r in EXPERTS[which]]))
        return torch.stack(parts)
    parent, _, rest = name.rpartition(".")
    module, _, role = parent.rpartition(".")
    if role in FUSED:
        return torch.cat([tensors[f"{module}.{part}.{rest}"] for part in FUSED[role]])
    return tensors[name]


def holds(parameter: Tensor, wanted: Tensor) -> bool:
    """Whether all values are the same, as the parameter's type holds them."""
    wanted = wanted.to(parameter.dtype)
    if parameter.dtype.itemsize == 1:
        parameter, wanted = parameter.view(torch.uint8), wanted.view(torch.uint8)
    return torch.equal(parameter, wanted)


def load(checkpoint: Path, config: VllmConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The model, its weights loaded and not yet processed, and what became of every tensor: the
    class of the scheme of each kind of module, the number of parameters, the tensors that nothing
    read, and the parameters that do not hold the checkpoint's values."""
    read: set[int] = set()

    def recorded(loader: Callable[..., Any]) -> Callable[..., Any]:
        def load_one(parameter: Any, weight: Tensor, *words: Any, **more: Any) -> Any:
            done = loader(parameter, weight, *words, **more)
            if done is not False:
                read.add(id(weight))
            return done

        return load_one

    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        loader = recorded(getattr(parameter, "weight_loader", default_weight_loader))
        known = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        setattr(parameter, known, loader)
    tensors = dict(tensors_of(checkpoint))
    with set_current_vllm_config(config):
        model.load_weights(iter(tensors.items()))
    chosen: dict[str, set[str]] = {}
    for module in model.modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            scheme = type(getattr(module, "scheme", method)).__name__
            chosen.setdefault(type(module).__name__, set()).add(scheme)
    # Of fused linears the last `weight_shape` is kept, and nothing computes with it.
    wrong = [
        name
        for name, parameter in parameters.items()
        if not name.endswith("weight_shape") and not holds(parameter.data, expected(name, tensors))
    ]
    return model, {
        "schemes": {kind: " and ".join(sorted(chosen[kind])) for kind in sorted(chosen)},
        "parameters": len(parameters),
        "unread": sorted(name for name, tensor in tensors.items() if id(tensor) not in read),
        "wrong": sorted(wrong),
    }

"""Load quantized checkpoints with vLLM's own config, schemes, model code and loader, and write down
what became of every tensor.

    python run_vllm_loader.py PACKAGES OUTPUT CHECKPOINT...

PACKAGES is a folder of further packages (`vllm_loader.txt`). OUTPUT is a JSON file: for each
checkpoint the class of the scheme of each kind of module, the number of parameters, the tensors
that nothing read, and the parameters that do not hold the checkpoint's values; or why vLLM refused
it. No kernel runs: where the kernel that vLLM would choose needs a GPU or AMX, only the choice is
made for it.
"""

from __future__ import annotations

import json
import os
import site
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
site.addsitedir(sys.argv[1])

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors_moe as moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_utils import default_weight_loader


def kernels_chosen(stack: ExitStack) -> None:
    """Let vLLM choose kernels as if this machine had them: AMX for FP8 linears, Marlin for packed
    integers."""
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend

    stack.enter_context(patch("torch.cpu._is_amx_tile_supported", lambda: True))
    stack.enter_context(patch("vllm._custom_ops._supports_cpu_fp8_w8a16", True))
    packed = f"{schemes.__name__}.compressed_tensors_wNa16.choose_mp_linear_kernel"
    marlin = MagicMock(__name__="MarlinLinearKernel")
    stack.enter_context(patch(packed, lambda *_, **__: marlin))
    for module, name, backend in (
        ("compressed_tensors_moe_wna16", "select_wna16_moe_backend", WNA16MoEBackend.MARLIN),
        ("compressed_tensors_moe_w8a8_int8", "select_int8_moe_backend", Int8MoeBackend.TRITON),
    ):
        stack.enter_context(
            patch(f"{moe.__name__}.{module}.{name}", lambda *_, _b=backend, **__: (_b, None))
        )


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


#: Linears that vLLM fuses: its name -> the checkpoint's, by rows.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


def expected(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
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


def holds(parameter: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether all values are the same, as the parameter's type holds them."""
    wanted = wanted.to(parameter.dtype)
    if parameter.dtype.itemsize == 1:
        parameter, wanted = parameter.view(torch.uint8), wanted.view(torch.uint8)
    return torch.equal(parameter, wanted)


def load(checkpoint: Path) -> dict[str, Any]:
    options = {"max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
    config = EngineArgs(model=str(checkpoint), dtype="bfloat16", **options).create_engine_config()
    read: set[int] = set()

    def recorded(loader: Callable[..., Any]) -> Callable[..., Any]:
        def load_one(parameter: Any, weight: torch.Tensor, *words: Any, **more: Any) -> Any:
            done = loader(parameter, weight, *words, **more)
            if done is not False:
                read.add(id(weight))
            return done

        return load_one

    with set_current_vllm_config(config):
        model = initialize_model(vllm_config=config)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            loader = recorded(getattr(parameter, "weight_loader", default_weight_loader))
            known = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
            setattr(parameter, known, loader)
        tensors = dict(tensors_of(checkpoint))
        model.load_weights(iter(tensors.items()))
    chosen = {
        (type(module).__name__, type(getattr(module, "scheme", method)).__name__)
        for module in model.modules()
        if (method := getattr(module, "quant_method", None)) is not None
    }
    # Of fused linears the last `weight_shape` is kept, and nothing computes with it.
    wrong = [
        name
        for name, parameter in parameters.items()
        if not name.endswith("weight_shape") and not holds(parameter.data, expected(name, tensors))
    ]
    return {
        "schemes": dict(sorted(chosen)),
        "parameters": len(parameters),
        "unread": sorted(name for name, tensor in tensors.items() if id(tensor) not in read),
        "wrong": sorted(wrong),
    }


def load_or_refuse(checkpoint: Path) -> dict[str, Any]:
    try:
        return load(checkpoint)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:400]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ExitStack() as stack:
        kernels_chosen(stack)
        args = EngineArgs(model=sys.argv[3], dtype="bfloat16", skip_tokenizer_init=True)
        with set_current_vllm_config(args.create_engine_config()):
            rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
            init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            initialize_model_parallel(1, 1)
        found = {path: load_or_refuse(Path(path)) for path in sys.argv[3:]}
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1))

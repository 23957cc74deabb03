"""Load quantized checkpoints with vLLM's own config, schemes, model code and loader, and write down
what became of every tensor.

    python run_vllm_loader.py PACKAGES OUTPUT CHECKPOINT...

PACKAGES is a folder of further packages (`vllm_loader.txt`). OUTPUT is a JSON file: for each
checkpoint the class of the scheme of each kind of module, the tensors that nothing read, and the
parameters whose values are not those that were read. No kernel runs: where the kernel that vLLM
would choose needs a GPU or AMX, only the choice is made for it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
sys.path.append(sys.argv[1])

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors import (  # noqa: E402
    compressed_tensors_moe as moe,
)
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.model_loader.weight_utils import default_weight_loader  # noqa: E402


def kernels_chosen(stack: ExitStack) -> None:
    """Let vLLM choose kernels as if this machine had them: AMX for linears, Marlin for experts."""
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend

    stack.enter_context(patch("torch.cpu._is_amx_tile_supported", lambda: True))
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


def bag(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All values in order of size, as the parameter's type holds them."""
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    if flat.dtype.itemsize == 1:
        flat = flat.view(torch.uint8)
    return flat.sort().values


def load(checkpoint: Path) -> dict[str, Any]:
    options = {"max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
    config = EngineArgs(model=str(checkpoint), dtype="bfloat16", **options).create_engine_config()
    read: dict[str, list[torch.Tensor]] = defaultdict(list)
    used: set[int] = set()

    def recorded(name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        def load_one(parameter: Any, weight: torch.Tensor, *words: Any, **more: Any) -> Any:
            done = loader(parameter, weight, *words, **more)
            if done is not False:
                read[name].append(weight)
                used.add(id(weight))
            return done

        return load_one

    with set_current_vllm_config(config):
        model = initialize_model(vllm_config=config)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            loader = recorded(name, getattr(parameter, "weight_loader", default_weight_loader))
            known = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
            setattr(parameter, known, loader)
        tensors = dict(tensors_of(checkpoint))
        model.load_weights(iter(tensors.items()))
    schemes = {
        (type(module).__name__, type(getattr(module, "scheme", method)).__name__)
        for module in model.modules()
        if (method := getattr(module, "quant_method", None)) is not None
    }
    wrong = [
        name
        for name, parameter in parameters.items()
        if not read[name]
        or not torch.equal(bag(read[name], parameter.dtype), bag([parameter.data], parameter.dtype))
    ]
    return {
        "schemes": sorted(schemes),
        "parameters": len(parameters),
        "unread": sorted(name for name, tensor in tensors.items() if id(tensor) not in used),
        "wrong": sorted(wrong),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ExitStack() as stack:
        kernels_chosen(stack)
        args = EngineArgs(model=sys.argv[3], dtype="bfloat16", skip_tokenizer_init=True)
        with set_current_vllm_config(args.create_engine_config()):
            rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
            init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            initialize_model_parallel(1, 1)
        found = {path: load(Path(path)) for path in sys.argv[3:]}
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1))

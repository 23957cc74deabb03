"""Load directories with vLLM's own loader on two ranks, as tensor parallelism cuts them, and write
down what every parameter of each rank holds.

    python run_vllm_ranks.py PACKAGES OUTPUT EP DIRECTORY...

PACKAGES is a folder of further packages (`vllm_loader.txt`). EP 1 turns on
--enable-expert-parallel. OUTPUT is a JSON file: for each directory and rank the SHA-256 of every
parameter's bytes, which are 0xAB before anything is loaded; or why vLLM refused it; and what its
argument parser makes of vllm.yaml. Scripts beside this file choose the kernels.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import site
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
WORLD = 2


def hexdigest(tensor: Any) -> str:
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def load(directory: str, ep: bool) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm_loading import tensors_of  # type: ignore[import-not-found]

    config = config_of(directory, ep)
    torch.set_default_dtype(torch.bfloat16)  # as its loaders do
    with set_current_vllm_config(config):
        model = initialize_model(vllm_config=config)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.data.reshape(-1).view(torch.uint8).fill_(0xAB)
        model.load_weights(iter(dict(tensors_of(Path(directory))).items()))
    return {"parameters": {name: hexdigest(p.data) for name, p in parameters.items()}}


def config_of(directory: str, ep: bool) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = {
        "max_model_len": 128,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": WORLD,
        "enable_expert_parallel": ep,
        "distributed_executor_backend": "mp",
    }
    return EngineArgs(model=directory, dtype="bfloat16", **options).create_engine_config()


def arguments(directory: str) -> dict[str, Any] | None:
    """What vLLM's parser makes of the launch file."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    path = Path(directory) / "vllm.yaml"
    if not path.exists():
        return None
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("model_tag")
    words = parser._pull_args_from_config(["serve", directory, "--config", str(path)])
    parsed = parser.parse_args(words[1:])
    parsed.model = parsed.model_tag  # as `vllm serve` does
    args = AsyncEngineArgs.from_cli_args(parsed)
    return {
        name: getattr(args, name)
        for name in (
            "dtype",
            "load_format",
            "tensor_parallel_size",
            "enable_expert_parallel",
            "distributed_executor_backend",
            "kv_cache_dtype",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "gpu_memory_utilization",
            "speculative_config",
        )
    }


def run_rank(rank: int, rendezvous: str, words: list[str], results: Any) -> None:
    try:
        found = load_all(rank, rendezvous, words)
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"}
    results.put((rank, found))


def load_all(rank: int, rendezvous: str, words: list[str]) -> dict[str, Any]:
    site.addsitedir(words[0])
    import torch
    import vllm_kernels  # type: ignore[import-not-found]
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.set_num_threads(1)
    _, ep, *directories = words[1:]
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        vllm_kernels.install(stack)
        # a release's FP8 method asks for AMX itself
        stack.enter_context(patch("torch.cpu._is_amx_tile_supported", lambda: True))
        stack.enter_context(patch("vllm._custom_ops._supports_cpu_fp8_w8a16", True))
        with set_current_vllm_config(config_of(directories[0], ep == "1")):
            init_distributed_environment(WORLD, rank, f"file://{rendezvous}", rank, "gloo")
            initialize_model_parallel(WORLD, 1)
        for directory in directories:
            try:
                found[directory] = load(directory, ep == "1")
            except Exception as error:
                found[directory] = {"refused": f"{type(error).__name__}: {error}"[:300]}
            if rank == 0:
                found[directory]["arguments"] = arguments(directory)
    return found


def main() -> None:
    words = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_rank, args=(rank, f"{folder}/rendezvous", words, results))
            for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        by_rank = dict(results.get(timeout=1200) for _ in processes)
        for process in processes:
            process.join(60)
            process.kill()
    Path(words[1]).write_text(json.dumps(by_rank, indent=1))


if __name__ == "__main__":
    main()

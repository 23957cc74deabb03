"""Load quantized checkpoints with vLLM's own code, execute its own model, and write down what
became of every tensor and what the model says.

    python run_vllm_model.py PACKAGES INPUTS OUTPUT CHECKPOINT=RECIPE...

PACKAGES is a folder of further packages (`vllm_loader.txt`). INPUTS is a safetensors file with
`text` int64 [B, T], `prompts` int64 [P, L] and of each recipe `RECIPE` int64 [P, G], another
engine's greedy continuations of the prompts. Into the folder OUTPUT go `found.json` (for each
checkpoint what `vllm_loading.load` found, or why vLLM refused it) and for the n-th checkpoint
`n.safetensors`: `logits` f32 [B, T, V] and `greedy` int64 [P, G] of the model in FP32, and `served`
f32 [B, T, V] of the model in BF16, which is how vLLM serves it. `greedy` are the most likely tokens
along the given continuation: up to the first difference, what the model itself would continue with.
Config, schemes, parameters, loaders, the routing and the model's code are vLLM's; what multiplies
is `vllm_kernels.py`.
"""

from __future__ import annotations

import json
import os
import site
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
site.addsitedir(sys.argv[1])

import torch
import vllm_kernels
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm_loading import config_of, load


class Model:
    """A loaded model that computes whole sequences."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self.config: VllmConfig = config_of(checkpoint, dtype)
        self.model, self.found = load(checkpoint, self.config)
        with set_current_vllm_config(self.config):
            device = torch.device("cpu")
            process_weights_after_loading(self.model, self.config.model_config, device)

    def logits(self, ids: Tensor) -> Tensor:
        """F32 [B, T, V] of B sequences int64 [B, T]."""
        batch, length = ids.shape
        for module in self.model.modules():
            if isinstance(module, MLAAttention):
                module.sequence = length
        positions = torch.arange(length).repeat(batch)
        with set_forward_context(None, self.config, num_tokens=ids.numel()):
            hidden = self.model(ids.flatten(), positions)
            return self.model.compute_logits(hidden).float().view(batch, length, -1)

    def follow(self, prompts: Tensor, continuations: Tensor) -> Tensor:
        """Int64 [P, G]: the most likely token at the place of each token of the continuations."""
        logits = self.logits(torch.cat((prompts, continuations), -1))
        return logits[:, prompts.shape[1] - 1 : -1].argmax(-1)


def execute(
    checkpoint: Path, recipe: str, given: dict[str, Tensor], answers: Path
) -> dict[str, Any]:
    served = Model(checkpoint, "bfloat16")
    exact = Model(checkpoint, "float32")
    said = {
        "served": served.logits(given["text"]),
        "logits": exact.logits(given["text"]),
        "greedy": exact.follow(given["prompts"], given[recipe]),
    }
    save_file({name: tensor.contiguous() for name, tensor in said.items()}, answers)
    both = served.found, exact.found
    return served.found | {
        key: sorted({name for found in both for name in found[key]}) for key in ("unread", "wrong")
    }


def execute_or_refuse(word: str, given: dict[str, Tensor], answers: Path) -> dict[str, Any]:
    checkpoint, _, recipe = word.rpartition("=")
    try:
        return execute(Path(checkpoint), recipe, given, answers)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:400]}


def main(inputs: str, output: Path, words: list[str]) -> None:
    given = load_file(inputs)
    with ExitStack() as stack:
        vllm_kernels.install(stack)
        with set_current_vllm_config(config_of(Path(words[0].rpartition("=")[0]), "bfloat16")):
            rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
            init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            initialize_model_parallel(1, 1)
        found = {
            word: execute_or_refuse(word, given, output / f"{n}.safetensors")
            for n, word in enumerate(words)
        }
    (output / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])

"""transformers' DeepseekV3ForCausalLM (or DeepseekV32ForCausalLM, with its indexer) with the same
weights as an engine: the slow reference.

Weights come from the source checkpoint, dequantized, or from an artifact, decompressed; experts are
stacked as transformers 5 holds them. Made once per process and source.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)

from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.config import ModelConfig
from deepseek.formats import decompress
from deepseek.inventory import HEAD, head_spec, linears
from deepseek.source.checkpoint import CheckpointReader


@functools.cache
def reference_model(
    directory: Path, *, attention: str = "eager", experts: str = "eager"
) -> DeepseekV3ForCausalLM | DeepseekV32ForCausalLM:
    """FP32, weights only rounded where the artifact rounds them."""
    if (directory / "intserve.json").exists():
        config, weights = _artifact_weights(ArtifactReader(directory))
    else:
        config, weights = _source_weights(CheckpointReader(directory))
    raw = json.loads((directory / "config.json").read_text())
    for key in ("quantization_config", "torch_dtype", "num_nextn_predict_layers"):
        raw.pop(key, None)
    is_v3_2 = config.has_indexer
    settings = (DeepseekV32Config if is_v3_2 else DeepseekV3Config)(**raw)
    settings._attn_implementation = attention
    settings._experts_implementation = experts
    kind = DeepseekV32ForCausalLM if is_v3_2 else DeepseekV3ForCausalLM
    model = kind(settings).float().eval()
    model.load_state_dict(_stack_experts(config, weights), strict=True)
    return model


@torch.no_grad()
def reference_logits(directory: Path, token_ids: Tensor) -> Tensor:
    """f32 [T, V] of one text, int64 [T]."""
    return reference_model(directory)(token_ids[None]).logits[0]


@torch.no_grad()
def reference_greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by transformers' own generate, not stopping at the end token."""
    output = reference_model(directory).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def _source_weights(reader: CheckpointReader) -> tuple[ModelConfig, dict[str, Tensor]]:
    stored = dict(reader.read_globals())
    for layer in range(reader.config.num_hidden_layers):
        stored |= reader.read_layer(layer)
    return reader.config, {name: tensor.dequantize() for name, tensor in stored.items()}


def _artifact_weights(reader: ArtifactReader) -> tuple[ModelConfig, dict[str, Tensor]]:
    stored = reader.read_globals()
    weights = {}
    if HEAD in reader.schemes:
        scheme, shape = reader.schemes[HEAD], head_spec(reader.config).shape
        weights[f"{HEAD}.weight"] = decompress(
            pop_linear(stored, HEAD, scheme), scheme, (shape[0], shape[1])
        )
    weights |= {name: tensor.float() for name, tensor in stored.items()}
    for layer in range(reader.config.num_hidden_layers):
        stored = reader.read_layer(layer)
        for spec in linears(reader.config, layer):
            scheme = reader.schemes[spec.module]
            tensors = pop_linear(stored, spec.module, scheme)
            weights[spec.name] = decompress(tensors, scheme, (spec.shape[0], spec.shape[1]))
        weights |= {name: tensor.float() for name, tensor in stored.items()}
    return reader.config, weights


def _stack_experts(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's names -> transformers' 3-D expert tensors."""
    state = dict(weights)
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack(
                [state.pop(f"{prefix}.{e}.{role}.weight") for e in range(config.n_routed_experts)]
            )
            for role in ("gate_proj", "up_proj", "down_proj")
        )
        state[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        state[f"{prefix}.down_proj"] = down
    return state

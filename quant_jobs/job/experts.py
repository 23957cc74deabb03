"""What a job records of the routed experts: how many tokens each saw, and its largest inputs.

Called by `driver.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseek.artifact.input_maxima import InputMaxima, LayerMaxima, moe_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.inventory import MLP_READERS, linears
from quant_jobs.job.folder import PublishedFile
from quant_jobs.workers.messages import SolveSummary


def layer_coverage(config: ModelConfig, layer: int, summary: SolveSummary) -> tuple[int, ...]:
    """Number of tokens that the router sent to each expert; empty for a dense layer."""
    gates = _expert_linears(config, layer, MLP_READERS[0][0])
    return tuple(summary.tokens[module] for module in gates)


def layer_maxima(config: ModelConfig, layer: int, summary: SolveSummary) -> LayerMaxima | None:
    """The largest inputs of each expert, 0 for one that the router sent no token; None for a dense
    layer."""
    if not config.is_moe(layer):
        return None
    gate_up, down = (
        tuple(
            summary.input_amax[module] if summary.tokens[module] else 0.0
            for module in _expert_linears(config, layer, readers[0])
        )
        for readers in MLP_READERS
    )
    return LayerMaxima(gate_up=gate_up, down=down)


def join_maxima(
    config: ModelConfig, published: Mapping[LayerKey, PublishedFile]
) -> tuple[InputMaxima | None, int | None]:
    """The maxima of all MoE layers and None; or None and the first layer whose record has none."""
    layers: dict[int, LayerMaxima] = {}
    for layer in moe_layers(config):
        maxima = published[layer].input_maxima
        if maxima is None:
            return None, layer
        layers[layer] = maxima
    return InputMaxima(layers=layers), None


def _expert_linears(config: ModelConfig, layer: int, role: str) -> list[str]:
    """The linears of one role of all routed experts, in the order of the experts."""
    return [
        spec.module
        for spec in linears(config, layer)
        if spec.expert is not None and spec.role == role
    ]

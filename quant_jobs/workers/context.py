"""What all layers of a worker's job share: model, recipe, device. Made once per job by `Worker`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from deepseek.artifact.input_maxima import quantizes_experts
from deepseek.config import ModelConfig
from deepseek.recipe import Recipe, Scheme
from quant_jobs.calibration.forward import Rotary
from quant_jobs.workers.messages import Message, to_device


@dataclass(frozen=True)
class LayerContext:
    """`schemes` by module name; `num_blocks` of the whole job; `device` that the worker computes
    on."""

    config: ModelConfig
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    num_blocks: int
    device: torch.device
    rotary: Rotary

    @cached_property
    def measures_experts(self) -> bool:
        """Whether the largest input of every routed expert is kept."""
        return quantizes_experts(self.config, self.schemes)

    def to_device(self, value: Message) -> Message:
        """Copy a message's tensors to the worker's device."""
        return to_device(value, self.device)

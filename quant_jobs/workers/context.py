"""What all layers of a worker's job share: model, recipe, device. Made once per job by `Worker`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deepseek.config import ModelConfig
from deepseek.recipe import Recipe, Scheme
from quant_jobs.calibration.forward import Rotary
from quant_jobs.workers.messages import Message, to_device


@dataclass(frozen=True, slots=True)
class LayerContext:
    """`schemes` by module name; `num_blocks` of the whole job; `device` that the worker computes
    on."""

    config: ModelConfig
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    num_blocks: int
    device: torch.device
    rotary: Rotary

    def to_device(self, value: Message) -> Message:
        """Copy a message's tensors to the worker's device."""
        return to_device(value, self.device)

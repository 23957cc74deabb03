"""What every layer of a worker's job has in common: model, recipe, device. Set once per job."""

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
    """`schemes` are by module name; `num_blocks` is of the whole job; `device` is what the worker
    computes on."""

    config: ModelConfig
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    num_blocks: int
    device: torch.device
    rotary: Rotary

    def to_device(self, value: Message) -> Message:
        """A message with its tensors on the worker's device."""
        return to_device(value, self.device)

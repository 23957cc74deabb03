"""The tensors of an engine directory that is a Hugging Face checkpoint: one file per decoder layer,
one for the rest. The layouts themselves are their targets' (`deepseek/trtllm/layout.py`).

This file imports no torch: the planner and the byte table use it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.inventory import TensorSpec

#: Bytes of one value by the type's name in safetensors.
ITEM_BYTES = {"F8_E4M3": 1, "I8": 1, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the directory. `dtype` is its name in safetensors; `spec` is the tensor of the
    model that it belongs to, `suffix` the last part of its name."""

    dtype: str
    shape: tuple[int, ...]
    spec: TensorSpec
    suffix: str

    @property
    def is_linear(self) -> bool:
        """Whether this is a part of a linear (a quantized head among them); else it is taken over
        as the checkpoint has it."""
        return self.suffix != self.spec.role

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_layers(config: ModelConfig, *, mtp: bool) -> list[LayerKey]:
    """The layers that the directory holds, each in a file of its own, and the rest. `mtp` says
    whether the MTP layers are kept."""
    count = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    return [*range(count), "globals"]

"""The tensors of an engine on their way into a model, which takes each of them once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.packed_layout import (
    Layout,
    PackedLinear,
    PackedTensor,
    packed_shapes,
    packed_tensors,
)
from deepseek.errors import ArtifactError
from deepseek.recipe import Scheme


class Weights:
    """The engine's tensors. The model takes each of them exactly once.

    `num_bytes` counts the bytes taken so far, by inventory group.
    """

    def __init__(
        self,
        config: ModelConfig,
        schemes: Mapping[str, Scheme],
        tensors: Mapping[str, Tensor],
        layout: Layout,
    ) -> None:
        embedding = tensors.get("model.embed_tokens.weight")
        dtype = torch.bfloat16 if embedding is None else embedding.dtype
        self._layout: Layout = layout
        self._expected: Mapping[str, PackedTensor] = packed_tensors(
            config, schemes, embedding_dtype=dtype, layout=layout
        )
        self._tensors = dict(tensors)
        self.num_bytes: dict[str, int] = {}

    def take(self, name: str) -> Tensor:
        """Remove one tensor and return it; this object no longer holds it.

        Raises:
            ArtifactError: the tensor is absent or of another shape or type.
        """
        tensor = self._tensors.pop(name, None)
        expected = self._expected[name]
        if tensor is None:
            raise ArtifactError(f"tensor {name} is missing from the engine; build it again")
        if (tuple(tensor.shape), tensor.dtype) != (expected.shape, expected.dtype):
            raise ArtifactError(
                f"tensor {name} of the engine is {tensor.dtype} {list(tensor.shape)}, not "
                f"{expected.dtype} {list(expected.shape)}; build it again"
            )
        self.num_bytes[expected.group] = self.num_bytes.get(expected.group, 0) + tensor.nbytes
        return tensor

    def take_linear(self, linear: PackedLinear) -> dict[str, Tensor]:
        """The tensors of one linear, by suffix."""
        suffixes = packed_shapes(linear.scheme, *linear.shape, layout=self._layout)
        return {suffix: self.take(f"{linear.name}.{suffix}") for suffix in suffixes}

    def finish(self) -> None:
        """Check that every tensor was taken.

        Raises:
            ArtifactError: one was not.
        """
        if self._tensors:
            raise ArtifactError(
                f"tensor {min(self._tensors)} of the engine belongs to no part of the model; "
                "build it again"
            )

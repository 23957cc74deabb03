"""A quantized model as something that is read layer by layer in the artifact's own form.

`ArtifactReader` is one. So is a directory that was built for a target, read back through that
target's layout (`deepseek/trtllm/`, `deepseek/vllm/`, ...): the embedded engine then executes what
the target would load, with the target's roundings, instead of what the artifact says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.recipe import Scheme


class StoredModel(Protocol):
    """`schemes` maps the module name of every linear to the scheme in which it is *executed*: INT4
    experts that a target runs with FP8 inputs have the scheme with FP8 inputs.

    The tensors of a layer are those of `deepseek/formats/stored.py` for these schemes, by full
    name, with the values that the target computes with: a scale that it rounds to BF16 is the
    rounded value in the form's own type.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def schemes(self) -> Mapping[str, Scheme]: ...

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer.

        Raises:
            ArtifactError: the directory is damaged; the sentence names the tensor or file.
        """
        ...

    def read_globals(self) -> dict[str, Tensor]:
        """The tensors outside the layers: embedding, final norm, head."""
        ...

    def finish(self) -> None:
        """Check that every tensor was read.

        Raises:
            ArtifactError: one was not.
        """
        ...

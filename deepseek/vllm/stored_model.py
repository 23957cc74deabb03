"""A directory that was built for vLLM, read back as the model that it computes with.

    stored              executed
    INT4, INT8 packed   codes and zero points as they are, scales in BF16; inputs are not quantized
    INT8 with INT8      codes as they are, scales F32; inputs quantized per token while it runs
    FP8 tiles           bit for bit, scales F32; that DeepGEMM quantizes them again is part of the
                        arithmetic (see `launch.py`)
    BF16                bit for bit

The embedded engine executes it in vLLM's arithmetic (`deepseek/engine/arithmetic.py`), so that an
evaluation judges what the target computes and not what the artifact says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_checks import read_target_manifest
from deepseek.artifact.layered_reader import LayeredReader
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.recipe import Scheme
from deepseek.vllm.check import check_config
from deepseek.vllm.fields import LOADER, TARGET, VllmFields
from deepseek.vllm.layout import stored_tensors


class VllmStoredModel:
    """A `StoredModel` over an engine directory of target vllm, verified as it is read.

    Raises on opening:
        ArtifactError, DeployError, ConfigError: the directory is no such engine, or its documents
            disagree with each other.
    """

    def __init__(self, directory: Path) -> None:
        manifest, fields = read_target_manifest(directory, TARGET, LOADER, VllmFields)
        built = read_engine(directory)
        self._schemes = check_config(directory, built, manifest, fields)
        self._config = built.config
        self._released = fields.form == "released"
        layers = stored_layers(self._config, mtp=fields.mtp == "kept")
        self._reader = LayeredReader(directory, manifest, layers, self._layout)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one decoder layer; see `StoredModel`."""
        return self._read(layer)

    def _read(self, layer: LayerKey) -> dict[str, Tensor]:
        stored = self._reader.read(layer)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._layout(layer).items():
            values = stored.pop(name)
            scheme = self._schemes.get(tensor.spec.module)
            if tensor.suffix == "weight_scale_inv":
                name = f"{tensor.spec.module}.weight_scale"
            elif tensor.suffix == "weight_scale" and scheme is not None:
                # BF16 as vLLM holds it; the artifact's form of INT8 has f32
                values = values.float() if scheme.weights.startswith("int8") else values
            tensors[name] = values
        return tensors

    def read_globals(self) -> dict[str, Tensor]:
        """Embedding, final norm and head; see `StoredModel`."""
        return self._read("globals")

    def finish(self) -> None:
        """Check that every tensor was read; see `StoredModel`."""
        self._reader.finish()

    def _layout(self, layer: LayerKey) -> dict[str, StoredTensor]:
        return stored_tensors(self._config, self._schemes, layer, released=self._released)

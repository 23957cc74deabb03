"""Build a vLLM engine: the directory that `vllm serve` loads for DeepSeek-V3.

    config.json                  the source's, with the quantization_config of compressed-tensors
                                 for the layers that are there; a release keeps its own
    vllm.yaml                    arguments of `vllm serve`, from the plan
    model-layer-00003.safetensors one per decoder layer, and model-globals.safetensors
    model.safetensors.index.json which vLLM reads to know the files
    tokenizer files, intserve.json
    engine.json                  written last: its presence means that the engine is complete

Tensors are the checkpoint's, bit for bit, but for the scales of packed INT8, which are rounded to
BF16 here as vLLM would round them while loading. `layered.py` builds it, file by file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.layout import StoredTensor
from deepseek.engine.packing import schemes_of
from deepseek.tensor_files import DTYPES
from deepseek.vllm.fields import VllmFields
from deepseek.vllm.launch import LAUNCH_FILE
from deepseek.vllm.layout import stored_schemes, stored_tensors
from quant_jobs.targets.layered import (
    Read,
    build_layered,
    layer_of_key,
    open_planned,
    write_layer,
)
from quant_jobs.targets.sharded import BuiltFile, Note, Progress
from quant_jobs.targets.vllm_plan import VllmBuild


def build_vllm(
    build: VllmBuild,
    output: Path,
    workers: int,
    progress: Progress,
    *,
    note: Note = lambda line: None,
) -> tuple[EngineManifest, dict[str, BuiltFile]]:
    """Build the engine directory, or what it lacks; see `build_layered`."""
    fields = VllmFields.model_validate(build.manifest.target_fields)
    maker = _Maker(
        checkpoint=build.source.directory.resolve(),
        digest=build.manifest.artifact_digest,
        mtp=fields.mtp == "kept",
        released=build.released,
    )
    return build_layered(
        build,
        maker,
        lambda layer: stored_tensors(
            build.source.config, build.stored, layer, released=build.released
        ),
        output,
        workers,
        progress,
        named=("form", "engine_version", "mtp"),
        launch_file=LAUNCH_FILE,
        note=note,
    )


def make_tensor(tensor: StoredTensor, read: Read) -> Tensor:
    """One tensor of a linear, from the checkpoint's of the same name: only scales of packed INT8
    have another type here, F32 [N, 1] -> BF16 [N, 1]."""
    suffix = tensor.suffix.removesuffix("_inv") if "scale_inv" in tensor.suffix else tensor.suffix
    values = read(f"{tensor.spec.module}.{suffix}")
    wanted = DTYPES[tensor.dtype]
    if values.dtype != wanted:
        assert wanted == torch.bfloat16, (tensor.spec.module, values.dtype, wanted)
        return values.to(wanted)
    return values


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one tensor file; travels to Ray's workers."""

    checkpoint: Path
    digest: str
    mtp: bool
    released: bool

    def make(self, key: str, directory: Path) -> BuiltFile:
        """Write the file of one layer into the directory."""
        source = open_planned(self.checkpoint, self.digest)
        stored = stored_schemes(source.config, schemes_of(source), mtp=self.mtp)
        layer = layer_of_key(key)
        tensors = stored_tensors(source.config, stored, layer, released=self.released)
        return write_layer(directory, source, key, tensors, make_tensor)

"""Build an SGLang engine: the directory that `sglang.launch_server` loads for DeepSeek-V3.

    config.json                  the source's, with the quantization_config of the dialect
    sglang.yaml                  arguments of the server, from the plan
    model-layer-00003.safetensors one per decoder layer, and model-globals.safetensors
    model.safetensors.index.json for the loader to know the files
    tokenizer files, intserve.json
    engine.json                  written last: its presence means that the engine is complete

`layered.py` builds it, file by file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.input_scales import LayerInputScales
from deepseek.artifact.layout import StoredTensor
from deepseek.engine.packing import schemes_of
from deepseek.sglang.fields import SglangFields
from deepseek.sglang.launch import LAUNCH_FILE
from deepseek.sglang.layout import Dialect, stored_schemes, stored_tensors
from quant_jobs.targets.layered import (
    Read,
    build_layered,
    layer_of_key,
    open_planned,
    write_layer,
)
from quant_jobs.targets.sglang_plan import SglangBuild
from quant_jobs.targets.sglang_tensors import make_tensor
from quant_jobs.targets.sharded import BuiltFile, Note, Progress


def build_sglang(
    build: SglangBuild,
    output: Path,
    workers: int,
    progress: Progress,
    *,
    note: Note = lambda line: None,
) -> tuple[EngineManifest, dict[str, BuiltFile]]:
    """Build the engine directory, or what it lacks; see `build_layered`."""
    fields = SglangFields.model_validate(build.manifest.target_fields)
    maker = _Maker(
        checkpoint=build.source.directory.resolve(),
        digest=build.manifest.artifact_digest,
        dialect=build.dialect,
        mtp=fields.mtp == "kept",
        scales=tuple(fields.input_scales.items()),
    )
    return build_layered(
        build,
        maker,
        lambda layer: stored_tensors(build.source.config, build.stored, layer, build.dialect),
        output,
        workers,
        progress,
        named=("dialect", "engine_version", "mtp"),
        launch_file=LAUNCH_FILE,
        note=note,
    )


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one tensor file; travels to Ray's workers."""

    checkpoint: Path
    digest: str
    dialect: Dialect
    mtp: bool
    scales: tuple[tuple[int, LayerInputScales], ...]

    def make(self, key: str, directory: Path) -> BuiltFile:
        """Write the file of one layer into the directory."""
        source = open_planned(self.checkpoint, self.digest)
        schemes = schemes_of(source)
        stored = stored_schemes(source.config, schemes, self.dialect, mtp=self.mtp)
        layer = layer_of_key(key)
        scales = dict(self.scales).get(layer)  # type: ignore[arg-type]

        def made(tensor: StoredTensor, read: Read) -> Tensor:
            return make_tensor(tensor, schemes, stored, read, scales)

        tensors = stored_tensors(source.config, stored, layer, self.dialect)
        return write_layer(directory, source, key, tensors, made)

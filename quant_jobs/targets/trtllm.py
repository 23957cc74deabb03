"""Build a TensorRT-LLM engine: the directory that its PyTorch backend loads for DeepSeek on Hopper.

    config.json                  the source's, without quantization_config
    hf_quant_config.json         how every module is quantized, and quant_cfg.json the same where
                                 the dialect is `mixed`; neither for a release as it is
    llm_args.yaml                arguments of `tensorrt_llm.LLM`, from the plan
    model-layer-00003.safetensors one per decoder layer, and model-globals.safetensors
    model.safetensors.index.json for tools; its loader reads every *.safetensors that it finds
    tokenizer files, intserve.json
    engine.json                  written last: its presence means that the engine is complete

`layered.py` builds it, file by file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.layout import StoredTensor
from deepseek.engine.packing import schemes_of
from deepseek.recipe import Scheme
from deepseek.trtllm.fields import LayerInputScales, TrtllmFields
from deepseek.trtllm.layout import Dialect, stored_schemes, stored_tensors
from deepseek.trtllm.llm_args import LLM_ARGS_FILE
from quant_jobs.targets.layered import (
    Read,
    build_layered,
    layer_of_key,
    open_planned,
    write_layer,
)
from quant_jobs.targets.sharded import BuiltFile, Note, Progress
from quant_jobs.targets.trtllm_plan import TrtllmBuild
from quant_jobs.targets.trtllm_tensors import make_tensor


def build_trtllm(
    build: TrtllmBuild,
    output: Path,
    workers: int,
    progress: Progress,
    *,
    note: Note = lambda line: None,
) -> tuple[EngineManifest, dict[str, BuiltFile]]:
    """Build the engine directory, or what it lacks; see `build_layered`."""
    return build_layered(
        build,
        _maker(build),
        lambda layer: stored_tensors(build.source.config, build.stored, layer),
        output,
        workers,
        progress,
        named=("dialect", "engine_version", "mtp"),
        launch_file=LLM_ARGS_FILE,
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
        stored = _stored(self, schemes)
        layer = layer_of_key(key)
        scales = dict(self.scales).get(layer)  # type: ignore[arg-type]

        def made(tensor: StoredTensor, read: Read) -> Tensor:
            return make_tensor(tensor, schemes, stored, read, scales)

        tensors = stored_tensors(source.config, stored, layer)
        return write_layer(directory, source, key, tensors, made)


def _stored(maker: _Maker, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    config = open_planned(maker.checkpoint, maker.digest).config
    return stored_schemes(config, schemes, maker.dialect, mtp=maker.mtp)


def _maker(build: TrtllmBuild) -> _Maker:
    fields = TrtllmFields.model_validate(build.manifest.target_fields)
    return _Maker(
        checkpoint=build.source.directory.resolve(),
        digest=build.manifest.artifact_digest,
        dialect=build.dialect,
        mtp=fields.mtp == "kept",
        scales=tuple(fields.input_scales.items()),
    )

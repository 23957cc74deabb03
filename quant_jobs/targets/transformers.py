"""Build a transformers directory: a checkpoint that `from_pretrained` loads with the artifact's
values.

    config.json                  the artifact's, with a quantization_config that its quantizers read
    model-layer-00003.safetensors one per decoder layer, and model-globals.safetensors
    model.safetensors.index.json  by which the files are found
    from_pretrained.json          the keyword arguments
    tokenizer files, intserve.json
    engine.json                  written last: its presence means that the directory is complete

Tensors are the artifact's wherever transformers reads them (`deepseek/hf/layout.py`). MTP layers
are left out: `from_pretrained` does not read them, and warns of each tensor unless it is of layer
61. `layered.py` builds it, file by file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.layout import StoredTensor
from deepseek.engine.packing import schemes_of
from deepseek.hf.launch import LAUNCH_FILE
from deepseek.hf.layout import choose, stored_tensors
from quant_jobs.targets.layered import (
    Read,
    build_layered,
    layer_of_key,
    open_planned,
    write_layer,
)
from quant_jobs.targets.sharded import BuiltFile, Note, Progress
from quant_jobs.targets.transformers_plan import TransformersBuild
from quant_jobs.targets.transformers_tensors import make_tensor


def build_transformers(
    build: TransformersBuild,
    output: Path,
    workers: int,
    progress: Progress,
    *,
    note: Note = lambda line: None,
) -> tuple[EngineManifest, dict[str, BuiltFile]]:
    """Build the directory, or what it lacks; see `build_layered`."""
    digest = build.manifest.artifact_digest
    return build_layered(
        build,
        _Maker(build.source.directory.resolve(), digest),
        lambda layer: stored_tensors(build.source.config, build.stored, layer),
        output,
        workers,
        progress,
        named=("engine_version", "method"),
        launch_file=LAUNCH_FILE,
        note=note,
    )


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one tensor file; travels to Ray's workers."""

    checkpoint: Path
    digest: str

    def make(self, key: str, directory: Path) -> BuiltFile:
        """Write the file of one layer into the directory."""
        source = open_planned(self.checkpoint, self.digest)
        schemes = schemes_of(source)
        config = replace(source.config, num_nextn_predict_layers=0)
        stored = choose(config, schemes)

        def made(tensor: StoredTensor, read: Read) -> Tensor:
            module = tensor.spec.module
            return make_tensor(tensor, schemes[module], stored.forms[module], read)

        tensors = stored_tensors(config, stored, layer_of_key(key))
        return write_layer(directory, source, key, tensors, made)

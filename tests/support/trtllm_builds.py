"""Artifacts with input maxima that `build --target trtllm` takes, made without calibration."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from support.synthetic import quantize_plainly
from support.trtllm_directories import make_source

from deepseek.artifact.input_maxima import InputMaxima, LayerMaxima, moe_layers
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.recipe import Recipe, load_recipe
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions, BuildResult

#: A dense and two MoE layers, and an MTP layer behind them; all else as `trtllm_directories.SHAPE`.
CHANGES: dict[str, Any] = {"layers": 3, "num_nextn_predict_layers": 1, "vocab_size": 96}


def make_maxima(config: ModelConfig) -> InputMaxima:
    """Another value for every expert, input and layer; the last expert has the largest, the first
    saw no token."""
    layers = {}
    for layer in moe_layers(config):
        steps = [layer * n for n in range(config.n_routed_experts)]
        layers[layer] = LayerMaxima(
            gate_up=tuple(step * 0.75 for step in steps),
            down=tuple(step * 0.046875 for step in steps),
        )
    return InputMaxima(layers=layers)


def per_layer_recipe() -> Recipe:
    """INT4 experts, but INT8 in layer 2."""
    content = load_recipe("int4").model_dump(mode="json")
    rule = {"match": "model.layers.2.mlp.experts.*", "weights": "int8", "algorithm": "max"}
    return Recipe.model_validate(
        content | {"name": "per-layer", "rules": [*content["rules"], rule]}
    )


def make_buildable(
    root: Path, recipe: Recipe | str, *, maxima: InputMaxima | None = None, **changes: Any
) -> ArtifactReader:
    """ROOT/artifact, quantized from ROOT/source, which is made where it is absent; `changes` are
    keys of its config."""
    if not (root / "source").exists():
        make_source(root / "source", **CHANGES | changes)
    config = ModelConfig.from_directory(root / "source")
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    quantize_plainly(root / "source", recipe, root / "artifact", maxima or make_maxima(config))
    return ArtifactReader(root / "artifact")


def build(checkpoint: Path, output: Path, **options: Any) -> BuildResult:
    """Build for TensorRT-LLM, on four ranks unless `options` say otherwise."""
    return run_build(checkpoint, "trtllm", output, BuildOptions(**{"tp": 4, "ep": 4, **options}))


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file()
    }

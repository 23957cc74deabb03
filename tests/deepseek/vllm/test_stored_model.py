"""A vLLM directory read back holds the values that vLLM computes with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.engines import request, run, tokens
from support.trtllm_directories import redigest

from deepseek.artifact.reader import ArtifactReader
from deepseek.formats import stored_shapes
from deepseek.target_engine import load_as_target
from deepseek.vllm.stored_model import VllmStoredModel

pytestmark = pytest.mark.heavy  # engines are built and read


@pytest.mark.parametrize("recipe", ["int4", "int8", "int8-weight-only", "int4-asym"])
def test_only_scales_of_packed_int8_differ_from_the_artifact_by_their_rounding(
    recipe: str, made: Path
) -> None:
    stored, artifact = VllmStoredModel(made / f"e-{recipe}"), ArtifactReader(made / recipe)
    for layer in range(stored.config.num_hidden_layers):
        ours, theirs = stored.read_layer(layer), artifact.read_layer(layer)
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            rounded = recipe == "int8-weight-only" and name.endswith("weight_scale")
            wanted = theirs[name].bfloat16().float() if rounded else theirs[name]
            assert values.dtype == wanted.dtype, name
            same = values.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
            assert torch.equal(*same), name
            assert not rounded or not torch.equal(values, theirs[name])
    stored.read_globals()
    stored.finish()


def test_a_release_has_the_names_of_the_artifacts_form(made: Path) -> None:
    stored = VllmStoredModel(made / "e-source")
    layer = stored.read_layer(0)
    module = "model.layers.0.self_attn.o_proj"
    scheme = stored.schemes[module]
    shapes = stored_shapes(scheme, *layer[f"{module}.weight"].shape)
    assert {name.removeprefix(f"{module}.") for name in layer if name.startswith(module)} == {
        *shapes
    }


@pytest.mark.parametrize("recipe", ["int4", "int8-weight-only"])
def test_the_embedded_engine_executes_it_in_vllms_arithmetic(
    recipe: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / f"e-{recipe}", tmp_path / "engine")
    (tmp_path / "engine/tokenizer.json").unlink()  # an empty one, which none can read
    redigest(tmp_path / "engine")
    engine = load_as_target(tmp_path / "engine")
    assert engine.identity.arithmetic == "vllm"
    answer = run(engine, [request("r", range(2, 12), max_tokens=4)])
    assert len(tokens(answer["r"])) == 4

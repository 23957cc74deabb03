"""What is read back of an SGLang directory is what its ranks compute with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.quantizing import add_text
from support.sglang_builds import FITTING, build_sglang
from support.trtllm_builds import CHANGES, make_buildable
from support.trtllm_directories import make_source

from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.errors import ArtifactError
from deepseek.formats import decompress
from deepseek.sglang.stored_model import SglangStoredModel

pytestmark = pytest.mark.heavy
KV_B = "model.layers.1.self_attn.kv_b_proj"
O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("recipe", FITTING)
def test_codes_are_the_artifacts_and_scales_as_sglang_holds_them(
    tmp_path: Path, recipe: str
) -> None:
    make_buildable(tmp_path, recipe, layers=2)
    build_sglang(tmp_path / "artifact", tmp_path / "engine", tp=1, ep=1)
    model, artifact = SglangStoredModel(tmp_path / "engine"), ArtifactReader(tmp_path / "artifact")
    assert model.config.num_nextn_predict_layers == 0
    for layer in range(2):
        found, source = model.read_layer(layer), artifact.read_layer(layer)
        for module, scheme in model.schemes.items():
            if not module.startswith(f"model.layers.{layer}."):
                continue
            ours = pop_linear(found, module, scheme)
            theirs = pop_linear(source, module, artifact.schemes[module])
            if module.endswith("kv_b_proj"):
                assert ours["weight"].dtype == torch.bfloat16
                assert scheme.weights == "bf16"
                continue
            for suffix, values in ours.items():
                if suffix == "input_scale":
                    assert values.frexp().mantissa.item() == 0.5
                    assert values >= theirs[suffix].max()
                elif suffix == "weight_scale" and "weight_packed" in ours:
                    assert torch.equal(values.float(), theirs[suffix].bfloat16().float()), module
                else:
                    assert torch.equal(values.view(torch.uint8), theirs[suffix].view(torch.uint8))
        assert found.keys() == source.keys()
    model.read_globals()
    model.finish()


def test_kv_b_proj_of_int8_is_multiplied_out_in_bf16(tmp_path: Path) -> None:
    make_buildable(tmp_path, "int8", layers=2)
    build_sglang(tmp_path / "artifact", tmp_path / "engine", tp=1, ep=1)
    artifact = ArtifactReader(tmp_path / "artifact").read_layer(1)
    codes, scale = artifact[f"{KV_B}.weight"], artifact[f"{KV_B}.weight_scale"]
    found = SglangStoredModel(tmp_path / "engine").read_layer(1)[f"{KV_B}.weight"]
    assert torch.equal(found, codes.bfloat16() * scale.bfloat16())


def test_the_embedded_engine_executes_a_directory_in_sglangs_arithmetic(tmp_path: Path) -> None:
    from deepseek.engine.options import EngineOptions
    from deepseek.target_engine import load_as_target

    make_source(tmp_path / "source", **CHANGES | {"layers": 2})
    add_text(tmp_path / "source", tmp_path / "text.txt")
    make_buildable(tmp_path, "w4a8")
    build_sglang(tmp_path / "artifact", tmp_path / "engine", tp=1, ep=1)
    engine = load_as_target(tmp_path / "engine", EngineOptions())
    assert engine.identity.arithmetic == "sglang"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    make_buildable(tmp_path, "int8", layers=2)
    build_sglang(tmp_path / "artifact", tmp_path / "engine", tp=1, ep=1)
    path = tmp_path / "engine" / "model-layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="was edited after the engine was built"):
        SglangStoredModel(tmp_path / "engine").read_layer(1)


def test_decompressing_what_is_read_gives_the_artifacts_weights(tmp_path: Path) -> None:
    make_buildable(tmp_path, "int8", layers=2)
    build_sglang(tmp_path / "artifact", tmp_path / "engine", tp=1, ep=1)
    model, artifact = SglangStoredModel(tmp_path / "engine"), ArtifactReader(tmp_path / "artifact")
    weights = []
    for reader in (model, artifact):
        scheme = reader.schemes[O_PROJ]
        parts = pop_linear(reader.read_layer(1), O_PROJ, scheme)
        rows, columns = parts["weight"].shape
        weights.append(decompress(parts, scheme, (rows, columns)))
    assert torch.equal(*weights)

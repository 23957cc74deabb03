"""A built directory is read back as the loader's own model decodes it, value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trtllm_builds import build, make_buildable
from support.trtllm_directories import edit_tensors, redigest
from torch import Tensor

from deepseek.artifact.engine_manifest import RankLayout, read_engine_manifest
from deepseek.errors import ArtifactError
from deepseek.formats import dequantize_fp8_block
from deepseek.inventory import expert_of
from deepseek.trtllm.loader import LoaderModel
from deepseek.trtllm.loader_decode import decode
from deepseek.trtllm.stored_model import TrtllmStoredModel

#: Of the artifact's form only; the loader has no use for it.
SHAPES = "weight_shape"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders NAME/artifact and directories built of them; nobody may change them."""
    return tmp_path_factory.mktemp("stored")


def built(folder: Path, recipe: str, **options: Any) -> Path:
    """The directory of a recipe on two ranks, built once. Recipe `source`: the source itself."""
    name = "-".join([recipe, *map(str, options.values())])
    if not (folder / name).exists():
        root = folder / f"{recipe}-from"
        if not (root / "artifact").exists():
            make_buildable(root, "int4" if recipe == "source" else recipe)
        checkpoint = root / ("source" if recipe == "source" else "artifact")
        build(checkpoint, folder / name, tp=2, ep=2, **options)
    return folder / name


def held_by_ranks(directory: Path, *, mtp: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What two ranks of the loader's model hold, put together from its pieces by the artifact's
    names; and what they hold as `alpha` of INT4 experts, by module and projection."""
    model = LoaderModel(directory, RankLayout(tp=2, ep=2), "1.2.1", mtp=mtp)
    pieces: dict[str, dict[tuple[int, int], Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    for rank in range(2):
        for module, parameters in model.load(rank):
            for name in ("fc31_alpha", "fc2_alpha"):
                if name in parameters:
                    alphas[f"{module}.{name}"] = parameters[name].reshape(-1)[0]
            for piece in decode(module, parameters, model.config, rank):
                values = piece.values.reshape(piece.values.shape[0], -1)
                pieces.setdefault(piece.name, {})[piece.row, piece.column] = values
    whole = {}
    for name, parts in pieces.items():
        rows = sorted({row for row, _ in parts})
        lines = [
            torch.cat([parts[place] for place in sorted(parts) if place[0] == row], dim=1)
            for row in rows
        ]
        whole[name] = torch.cat(lines)
    return whole, alphas


def read_all(model: TrtllmStoredModel) -> dict[str, Tensor]:
    tensors = model.read_globals()
    for layer in range(model.config.num_layers_with_mtp):
        tensors |= model.read_layer(layer)
    model.finish()
    return tensors


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("int4", {"dialect": "mixed"}),
        ("int4", {"dialect": "single"}),
        ("w4a8", {"dialect": "mixed", "mtp": True}),
        ("int8-experts", {"dialect": "mixed"}),
        ("int8-experts", {"dialect": "single"}),
        ("source", {}),
    ],
)
def test_every_value_is_the_one_that_the_loader_ends_up_with(
    folder: Path, recipe: str, options: dict[str, Any]
) -> None:
    directory = built(folder, recipe, **options)
    model = TrtllmStoredModel(directory)
    ours = read_all(model)
    theirs, alphas = held_by_ranks(directory, mtp=bool(options.get("mtp")))
    scales = {name for name in ours if name.endswith("input_scale")}
    assert bool(scales) == (recipe in ("int4", "w4a8"))
    compared = 0
    for name, tensor in ours.items():
        parts = name.split(".")
        if parts[-1] == SHAPES or name in scales:
            continue
        if parts[-2] in ("embed_tokens", "head") and "layers" in parts:
            continue  # an MTP layer's copies, which the loader does not read
        held = theirs.pop(name)
        assert torch.equal(held.to(tensor.dtype), tensor.reshape(tensor.shape[0], -1)), name
        compared += 1
    assert not theirs
    assert compared > 60
    for name in scales:
        experts, _, role = name.removesuffix(".input_scale").rpartition(".")
        alpha = "fc2_alpha" if role == "down_proj" else "fc31_alpha"
        assert ours[name] == alphas[f"{experts.rpartition('.')[0]}.{alpha}"], name


def test_the_schemes_are_those_that_the_runtime_executes(folder: Path) -> None:
    """INT4 experts have FP8 inputs although the recipe gives them none."""
    mixed = TrtllmStoredModel(built(folder, "int4", dialect="mixed")).schemes
    labels = {mixed[module].label for module in mixed if expert_of(module) is not None}
    assert labels == {"int4-g128-afp8"}
    assert {s.label for m, s in mixed.items() if expert_of(m) is None} == {"fp8-block"}
    single = TrtllmStoredModel(built(folder, "int8-experts", dialect="single")).schemes
    assert {s.label for m, s in single.items() if expert_of(m) is not None} == {"int8"}
    assert {s.label for m, s in single.items() if expert_of(m) is None} == {"bf16"}


def test_bf16_of_the_dialect_single_is_the_rounded_value_of_the_tile(folder: Path) -> None:
    single = read_all(TrtllmStoredModel(built(folder, "int4", dialect="single")))
    mixed = read_all(TrtllmStoredModel(built(folder, "int4", dialect="mixed")))
    name = "model.layers.1.self_attn.o_proj.weight"
    plain = dequantize_fp8_block(mixed[name], mixed[f"{name}_scale"])
    assert not torch.equal(single[name].float(), plain)
    assert torch.equal(single[name], plain.bfloat16())


def test_an_input_scale_of_down_is_rounded_as_the_runtime_rounds_it(mixed: Path) -> None:
    """These directories were written by hand, with scales that are no powers of two."""
    tensors = read_all(TrtllmStoredModel(mixed))
    expert = "model.layers.1.mlp.experts.2"
    gate, down = (tensors[f"{expert}.{role}.input_scale"] for role in ("gate_proj", "down_proj"))
    assert gate == torch.tensor([0.034])
    assert down == torch.tensor([0.022]).bfloat16().float() != torch.tensor([0.022])


# --- what is refused ---


def refusal(directory: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_all(TrtllmStoredModel(directory))
    return str(caught.value)


def test_a_changed_value_is_refused_by_the_name_of_its_file(mixed: Path) -> None:
    path = mixed / "model-layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    sentence = refusal(mixed)
    assert sentence.startswith(f"{path} was edited after the engine was built")


def test_a_file_that_does_not_hold_what_the_model_needs_is_refused(mixed: Path) -> None:
    """Also where engine.json was written anew for it."""

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.self_attn.o_proj.weight"]

    edit_tensors(mixed, "model-layer-00000.safetensors", drop)
    redigest(mixed)
    assert "tensor model.layers.0.self_attn.o_proj.weight is missing" in refusal(mixed)


def test_a_tensor_file_that_the_model_has_no_layer_for_is_refused(mixed: Path) -> None:
    source = mixed / "model-layer-00001.safetensors"
    (mixed / "model-layer-00002.safetensors").write_bytes(source.read_bytes())
    redigest(mixed)
    assert "lists the unknown tensor file model-layer-00002.safetensors" in refusal(mixed)
    assert read_engine_manifest(mixed).tensor_files.keys() > {source.name}


def test_a_file_that_is_never_read_is_noticed(mixed: Path) -> None:
    model = TrtllmStoredModel(mixed)
    model.read_globals()
    model.read_layer(0)
    with pytest.raises(ArtifactError, match=r"model-layer-00001\.safetensors was never read"):
        model.finish()

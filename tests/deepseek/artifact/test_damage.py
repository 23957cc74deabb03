"""After any change to a published artifact, reading it fails and names the change."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.synthetic import quantize_plainly, write_checkpoint

from deepseek.artifact.manifest import Manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError, IntServeError
from deepseek.files import sha256_file, write_json
from deepseek.recipe import load_recipe


def test_a_flipped_byte_anywhere_in_a_layer_file_is_an_error_that_names_it(
    artifact: Path,
) -> None:
    path = artifact / "model-layer-00001.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8:start])
    spots = random.Random(7)
    reader = ArtifactReader(artifact)
    data = [spots.randrange(start, len(whole)) for _ in range(60)] + [start, len(whole) - 1]
    header = [spots.randrange(0, start) for _ in range(40)] + [0, 7, 8, start - 1]
    for position in data + header:
        path.write_bytes(damaged := bytearray(whole))
        damaged[position] ^= 1 << spots.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError) as caught:
            reader.read_layer(1)
        assert path.name in str(caught.value), position
        if position >= start:
            [name] = [
                name
                for name, value in entries.items()
                if name != "__metadata__"
                and value["data_offsets"][0] <= position - start < value["data_offsets"][1]
            ]
            assert f"tensor {name} " in str(caught.value), position
    path.write_bytes(whole)
    reader.read_layer(1)


def edit_manifest(change: Callable[[dict], object], *, seal: bool) -> Callable[[Path], None]:  # type: ignore[type-arg]
    """Edit intserve.json by hand; with `seal`, also forge the digest inside it."""

    def damage(directory: Path) -> None:
        raw = json.loads((directory / "intserve.json").read_text())
        change(raw)
        if seal:
            raw.pop("digest")
            raw["digest"] = Manifest.model_validate(raw).digest
        write_json(directory / "intserve.json", raw)

    return damage


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    """Edit config.json and record its new digest, so that only its contents can betray it."""

    def damage(directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text())
        change(raw)
        write_json(directory / "config.json", raw)
        digest = sha256_file(directory / "config.json")
        edit_manifest(lambda m: m["files"].update({"config.json": digest}), seal=True)(directory)

    return damage


def rename_tensor(raw: dict) -> None:  # type: ignore[type-arg]
    tensors = raw["layers"][1]["tensors"]
    tensors["model.layers.1.extra.weight"] = tensors.pop("model.layers.1.input_layernorm.weight")


def append(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        with (directory / name).open("ab") as file:
            file.write(b"\n")

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda d: (d / "intserve.json").unlink(),
        "not a finished quantized checkpoint",
    ),
    "manifest not JSON": (lambda d: (d / "intserve.json").write_text("{"), "is not valid JSON"),
    "manifest not an object": (lambda d: (d / "intserve.json").write_text("[]"), "a JSON object"),
    "manifest edited": (
        edit_manifest(lambda m: m["tools"].update(torch="9"), seal=False),
        "was changed after it was written",
    ),
    "manifest from the future": (
        edit_manifest(lambda m: m.update(format_version=4), seal=False),
        "format_version 4 is not supported, only 1, 2 and 3",
    ),
    "unknown manifest field": (
        edit_manifest(lambda m: m.update(mood="good"), seal=False),
        "mood: Extra inputs are not permitted",
    ),
    "layer file absent": (
        lambda d: (d / "model-layer-00001.safetensors").unlink(),
        "model-layer-00001.safetensors is absent",
    ),
    "layer file truncated": (
        lambda d: (d / "model-layer-00001.safetensors").write_bytes(
            (d / "model-layer-00001.safetensors").read_bytes()[:-5]
        ),
        "bytes instead of",
    ),
    "unknown shard": (
        lambda d: save_file({"x": torch.ones(1)}, d / "model-00001-of-00002.safetensors"),
        "is not part of this artifact",
    ),
    "config edited": (append("config.json"), "config.json differs from what intserve.json records"),
    "index edited": (append("model.safetensors.index.json"), "index.json differs from what"),
    "tokenizer edited": (append("tokenizer.json"), "tokenizer.json differs from what"),
    "tokenizer absent": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is absent"),
    "a part too few": (
        edit_manifest(lambda m: m["layers"].pop(1), seal=True),
        "is not part of this artifact",
    ),
    "parts swapped": (edit_manifest(lambda m: m["layers"].reverse(), seal=True), "lists 4 parts"),
    "file of another directory": (
        edit_manifest(lambda m: m["layers"][0].update(file="../x.safetensors"), seal=True),
        "lists the file ../x.safetensors, which is none that IntServe writes",
    ),
    "tensor renamed in the manifest": (
        edit_manifest(rename_tensor, seal=True),
        "unknown tensor model.layers.1.extra.weight",
    ),
    "recipe exchanged in the manifest": (
        edit_manifest(
            lambda m: m.update(recipe=load_recipe("int8").model_dump(mode="json")), seal=True
        ),
        "for the model that config.json describes",
    ),
    "config without quantization": (
        edit_config(lambda c: c.pop("quantization_config")),
        "does not describe the recipe 'int4'",
    ),
    "config with another target": (
        edit_config(lambda c: c["quantization_config"]["ignore"].append("re:.*experts.*")),
        "does not describe the recipe 'int4'",
    ),
    "config of another model": (
        edit_config(lambda c: c.update(n_routed_experts=6)),
        "lacks tensor model.layers.1.mlp.experts.4.down_proj.weight_packed",
    ),
    "config with more layers": (
        edit_config(lambda c: c.update(num_hidden_layers=3)),
        "lists 4 parts, but config.json describes a model of 5",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artifact_is_refused_in_one_sentence_that_names_it(
    artifact: Path, name: str
) -> None:
    damage, message = DAMAGES[name]
    ArtifactReader(artifact)
    damage(artifact)
    with pytest.raises(IntServeError) as caught:
        ArtifactReader(artifact)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_file_swapped_for_another_valid_one_is_refused_on_read(
    source: Path, artifact: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "other", seed=1)
    quantize_plainly(tmp_path / "other", load_recipe("int4"), tmp_path / "swap")
    name = "model-layer-00001.safetensors"
    shutil.copy(tmp_path / "swap" / name, artifact / name)
    reader = ArtifactReader(artifact)  # same size and header: only the values differ
    reader.read_layer(0)
    with pytest.raises(ArtifactError, match=r"tensor model\.layers\.1\.\S+ in .* is damaged"):
        reader.read_layer(1)

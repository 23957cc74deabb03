"""A quantized checkpoint describes itself, and reading it notices any change to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.synthetic import TINY_TOKENIZER, quantize_plainly, write_checkpoint

from deepseek.artifact.manifest import CalibrationRecord, Fallback, read_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import expected_tensors, layer_keys, pop_linear, store_tensor
from deepseek.artifact.writer import ArtifactWriter
from deepseek.errors import ArtifactError, CheckpointError, OutputError
from deepseek.files import sha256_file
from deepseek.formats import decompress
from deepseek.inventory import linears
from deepseek.recipe import load_recipe, parse_recipe
from deepseek.source.checkpoint import CheckpointReader, content_digest

RECIPES = ("int8", "int8-weight-only", "int8-experts", "int4", "int4-all", "int4-asym")


def read_all(reader: ArtifactReader) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(reader.config.num_layers_with_mtp):
        tensors |= reader.read_layer(layer)
    return tensors | reader.read_globals()


@pytest.mark.heavy
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("fp8", [True, False])
def test_reading_an_artifact_uses_every_tensor_exactly_once(
    tmp_path: Path, name: str, fp8: bool
) -> None:
    """Invariant 2: each stored tensor is popped by one linear or taken once as it is."""
    config = write_checkpoint(tmp_path / "source", fp8=fp8)
    manifest = quantize_plainly(tmp_path / "source", load_recipe(name), tmp_path / "out")
    reader = ArtifactReader(tmp_path / "out")
    assert reader.config == config
    stored = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    used: list[str] = []
    for key in layer_keys(config):
        tensors = reader.read_globals() if key == "globals" else reader.read_layer(key)
        for spec in [] if key == "globals" else linears(config, key):
            taken = pop_linear(tensors, spec.module, reader.schemes[spec.module])
            used += [f"{spec.module}.{suffix}" for suffix in taken]
            shape = (spec.shape[0], spec.shape[1])
            assert decompress(taken, reader.schemes[spec.module], shape).isfinite().all()
        used += tensors
    reader.finish()
    assert sorted(used) == sorted(stored["weight_map"])
    assert sorted(used) == sorted(n for record in manifest.layers for n in record.tensors)


def test_the_reader_returns_what_was_published(source: Path, finished: Path) -> None:
    original = CheckpointReader(source)
    reader = ArtifactReader(finished)
    read = read_all(reader)
    for layer in range(reader.config.num_layers_with_mtp):
        for tensor in original.read_layer(layer).values():
            published = store_tensor(tensor, reader.schemes.get(tensor.spec.module))
            for name, value in published.items():
                assert read[name].dtype == value.dtype, name
                assert torch.equal(read[name].view(torch.uint8), value.view(torch.uint8)), name


def test_fp8_blocks_of_the_source_keep_their_bits_under_compressed_tensors_names(
    source: Path, finished: Path
) -> None:
    original, reader = CheckpointReader(source), ArtifactReader(finished)
    for layer, module in (
        (1, "model.layers.1.self_attn.kv_b_proj"),
        (1, "model.layers.1.mlp.shared_experts.up_proj"),
        (2, "model.layers.2.mlp.experts.3.down_proj"),  # MTP: carried through, experts too
    ):
        tensor = original.read_layer(layer)[f"{module}.weight"]
        stored = reader.read_layer(layer)
        assert torch.equal(
            stored[f"{module}.weight"].view(torch.uint8), tensor.data.view(torch.uint8)
        )
        assert torch.equal(stored[f"{module}.weight_scale"], tensor.scale_inv)
        assert f"{module}.weight_scale_inv" not in stored


def test_a_part_that_was_never_read_is_an_error_at_the_end(finished: Path) -> None:
    reader = ArtifactReader(finished)
    reader.read_layer(0)
    reader.read_layer(1)
    reader.read_globals()
    with pytest.raises(ArtifactError, match=r"model-layer-00002\.safetensors was never read"):
        reader.finish()


def test_the_same_inputs_give_the_same_bytes_in_every_file(
    source: Path, finished: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    quantize_plainly(moved, load_recipe("int4"), tmp_path / "again")
    names = sorted(path.name for path in finished.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert sha256_file(finished / name) == sha256_file(tmp_path / "again" / name), name
    assert ArtifactReader(finished).digest == ArtifactReader(tmp_path / "again").digest


def test_the_digest_depends_on_recipe_source_and_record(source: Path, tmp_path: Path) -> None:
    recipe = load_recipe("int8")
    other_limits = recipe.model_dump() | {"gate": recipe.gate.model_dump() | {"min_top1": 0.5}}
    digests = {
        quantize_plainly(source, recipe, tmp_path / "a").digest,
        quantize_plainly(source, parse_recipe(other_limits, where="test"), tmp_path / "b").digest,
    }
    write_checkpoint(tmp_path / "other", seed=1)
    digests.add(quantize_plainly(tmp_path / "other", recipe, tmp_path / "c").digest)
    manifest = read_manifest(tmp_path / "a")
    noted = Fallback(kind="clipped_scale", layer=1, module="m", count=2)
    digests.add(manifest.model_copy(update={"fallbacks": (noted,)}).digest)
    assert len(digests) == 4


def test_the_manifest_survives_a_round_trip_with_all_its_parts(
    source: Path, tmp_path: Path
) -> None:
    reader = CheckpointReader(source)
    writer = ArtifactWriter(tmp_path / "out", source=reader, recipe=load_recipe("int8"))
    for key in layer_keys(reader.config):
        read = reader.read_globals() if key == "globals" else reader.read_layer(key)
        stored: dict[str, torch.Tensor] = {}
        for tensor in read.values():
            stored |= store_tensor(tensor, writer.schemes.get(tensor.spec.module))
        errors = {"model.layers.1.self_attn.o_proj": 0.25} if key == 1 else {}
        writer.publish_layer(key, stored, source_sha256=content_digest(read), errors=errors)
    written = writer.finish(
        calibration=CalibrationRecord(digest="d", num_tokens=64, num_blocks=4, block_tokens=16),
        coverage={1: [3, 0, 61, 64]},
        fallbacks=[Fallback(kind="unseen_expert", layer=1, module="experts.1", count=1)],
        tools={"torch": "2", "modelopt": "1"},
    )
    read_back = read_manifest(tmp_path / "out")
    assert read_back == written
    assert read_back.digest == written.digest
    assert read_back.coverage == {1: (3, 0, 61, 64)}
    assert read_back.record(1).errors == {"model.layers.1.self_attn.o_proj": 0.25}
    assert read_back.kv_cache == "bf16"
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert read_back.num_bytes == sum(sizes)
    layer = reader.read_layer(1)
    assert read_back.record(1).source_sha256 == content_digest(layer)


def test_the_writer_resumes_its_own_directory_and_refuses_those_of_others(
    source: Path, artifact: Path, tmp_path: Path
) -> None:
    reader = CheckpointReader(source)
    writer = ArtifactWriter(artifact, source=reader, recipe=load_recipe("int4"))
    for record in read_manifest(artifact).layers:
        writer.register(record)
    before = sha256_file(artifact / "intserve.json")
    writer.finish(calibration=None, coverage={}, fallbacks=[], tools={"intserve": "test"})
    assert sha256_file(artifact / "intserve.json") == before

    with pytest.raises(ArtifactError, match="output folder of another run: its recipe differs"):
        ArtifactWriter(artifact, source=reader, recipe=load_recipe("int8"))
    write_checkpoint(tmp_path / "other", seed=1)
    other = CheckpointReader(tmp_path / "other")
    with pytest.raises(ArtifactError, match="its source checkpoint differs"):
        ArtifactWriter(artifact, source=other, recipe=load_recipe("int4"))
    with pytest.raises(ArtifactError, match="it holds model-00001-of"):
        ArtifactWriter(tmp_path / "other", source=reader, recipe=load_recipe("int4"))
    with pytest.raises(OutputError, match="is the source checkpoint itself"):
        ArtifactWriter(source, source=reader, recipe=load_recipe("int4"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must name a directory"):
        ArtifactWriter(tmp_path / "file", source=reader, recipe=load_recipe("int4"))


def test_registering_a_file_that_is_not_the_recorded_one_is_refused(
    source: Path, artifact: Path
) -> None:
    reader = CheckpointReader(source)
    record = read_manifest(artifact).record(1)
    path = artifact / record.file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    writer = ArtifactWriter(artifact, source=reader, recipe=load_recipe("int4"))
    with pytest.raises(ArtifactError, match="not the file that was published for layer 1"):
        writer.register(record)
    path.unlink()
    with pytest.raises(ArtifactError, match="not the file that was published for layer 1"):
        writer.register(record)


def test_publishing_the_wrong_tensors_or_finishing_early_is_our_bug(
    source: Path, tmp_path: Path
) -> None:
    reader = CheckpointReader(source)
    writer = ArtifactWriter(tmp_path / "out", source=reader, recipe=load_recipe("int8"))
    read = reader.read_layer(0)
    stored: dict[str, torch.Tensor] = {}
    for tensor in read.values():
        stored |= store_tensor(tensor, writer.schemes.get(tensor.spec.module))
    name = "model.layers.0.self_attn.o_proj.weight"
    for wrong in (
        {n: t for n, t in stored.items() if n != name},
        stored | {"model.layers.0.extra": torch.ones(1)},
        stored | {name: stored[name].T},
        stored | {name: stored[name].float()},
    ):
        with pytest.raises(AssertionError, match="layer 0: tensor model.layers.0"):
            writer.publish_layer(0, wrong, source_sha256="")
    assert not list((tmp_path / "out").iterdir())
    writer.publish_layer(0, stored, source_sha256="")
    with pytest.raises(AssertionError, match="before layer 1 was published"):
        writer.finish(calibration=None, coverage={}, fallbacks=[], tools={})
    with pytest.raises(ArtifactError, match="not a finished quantized checkpoint"):
        ArtifactReader(tmp_path / "out")


def test_scraps_of_a_killed_writer_are_gone_when_the_artifact_is_finished(
    source: Path, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".model-layer-00001.safetensors.0badf00d.tmp").write_bytes(b"half")
    quantize_plainly(source, load_recipe("int4"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in finished.iterdir()}


def test_expected_tensors_are_those_that_are_stored(finished: Path) -> None:
    reader = ArtifactReader(finished)
    for key in layer_keys(reader.config):
        tensors = reader.read_globals() if key == "globals" else reader.read_layer(key)
        expected = expected_tensors(reader.config, reader.schemes, key)
        assert tensors.keys() == expected.keys()
        for name, (shape, dtypes) in expected.items():
            assert tuple(tensors[name].shape) == shape, name
            assert tensors[name].dtype in dtypes, name


def test_a_weight_that_cannot_be_quantized_is_named(source: Path) -> None:
    tensor = CheckpointReader(source).read_layer(0)["model.layers.0.self_attn.o_proj.weight"]
    assert tensor.scale_inv is not None
    tensor.scale_inv[0, 0] = float("nan")
    scheme = load_recipe("int8").rules[0].scheme
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.0\.self_attn\.o_proj\.weight"
    ):
        store_tensor(tensor, scheme)


def test_tokenizer_files_go_along_and_remote_code_does_not(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "source", auto_map={"AutoModel": "modeling.Evil"}, _name_or_path="x"
    )
    (tmp_path / "source" / "modeling.py").write_text("raise SystemExit")
    quantize_plainly(tmp_path / "source", load_recipe("int8"), tmp_path / "out")
    for name, text in TINY_TOKENIZER.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "modeling.py").exists()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "_name_or_path"} & set(raw)
    assert raw["torch_dtype"] == "bfloat16"


def test_the_manifest_holds_no_paths(finished: Path, source: Path) -> None:
    text = (finished / "intserve.json").read_text()
    assert str(source) not in text
    assert str(finished) not in text

"""A source checkpoint is checked whole on opening and read layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.synthetic import config_dict, random_tensors, write_checkpoint, write_shards

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError, ConfigError, IntServeError
from deepseek.formats import dequantize_fp8_block
from deepseek.source.checkpoint import CheckpointReader, content_digest
from deepseek.tensor_files import read_header

Q_A = "model.layers.1.self_attn.q_a_proj.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
INDEX = "model.safetensors.index.json"

Stored = dict[str, torch.Tensor]


def read_all(reader: CheckpointReader) -> Stored:
    stored: Stored = {}
    for layer in range(reader.config.num_layers_with_mtp):
        for name, tensor in reader.read_layer(layer).items():
            stored[name] = tensor.data
            if tensor.scale_inv is not None:
                stored[f"{name}_scale_inv"] = tensor.scale_inv
    stored |= {name: tensor.data for name, tensor in reader.read_globals().items()}
    return stored


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("by_layer", [True, False])
def test_reading_gives_every_stored_tensor_once_and_unchanged(
    tmp_path: Path, fp8: bool, by_layer: bool
) -> None:
    config = write_checkpoint(tmp_path, fp8=fp8, by_layer=by_layer)
    stored = random_tensors(config)
    reader = CheckpointReader(tmp_path)
    read = read_all(reader)
    reader.finish()
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name].float(), tensor.float()), name
    assert reader.total_bytes == sum(t.numel() * t.element_size() for t in stored.values())


def test_the_example_model_opens_and_every_tensor_is_finite(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    for layer in range(reader.config.num_layers_with_mtp):
        for name, tensor in reader.read_layer(layer).items():
            assert tensor.dequantize().isfinite().all(), name
    reader.read_globals()
    reader.finish()


def test_dequantize_multiplies_each_block_by_its_scale(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path)
    stored = random_tensors(config)
    layer = CheckpointReader(tmp_path).read_layer(1)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 160 rows: a ragged block
    tensor = layer[name]
    scales = stored[f"{name}_scale_inv"]
    spread = scales.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :256]
    assert torch.equal(tensor.dequantize(), stored[name].float() * spread)
    assert torch.equal(tensor.dequantize(), dequantize_fp8_block(stored[name], scales))
    assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16
    norm = layer["model.layers.1.input_layernorm.weight"]
    assert norm.scale_inv is None
    assert torch.equal(norm.dequantize(), norm.data.float())


def test_reading_a_layer_touches_no_other_layers_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    reader = CheckpointReader(tmp_path)
    keep = json.loads((tmp_path / INDEX).read_text())["weight_map"][Q_A]
    for shard in tmp_path.glob("*.safetensors"):
        if shard.name != keep:
            shard.unlink()
    assert len(reader.read_layer(1)) > 20
    with pytest.raises(CheckpointError, match="became unreadable"):
        reader.read_layer(0)


def test_a_tensor_that_nobody_read_is_an_error_at_the_end(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    reader = CheckpointReader(tmp_path)
    for layer in (0, 1, 1):  # reading twice is allowed, not reading is not
        reader.read_layer(layer)
    reader.read_globals()
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\..* never read"):
        reader.finish()


def edited(change: Callable[[Stored], None]) -> Callable[[Path], None]:
    """A damage done by rewriting the shards with other tensors, index included."""

    def damage(directory: Path) -> None:
        stored = random_tensors(ModelConfig.from_directory(directory))
        change(stored)
        write_shards(directory, stored)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    def change(stored: Stored) -> None:
        del stored[name]

    return edited(change)


def replace_by(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(stored: Stored) -> None:
        stored[name] = make(stored[name])

    return edited(change)


def add(name: str) -> Callable[[Path], None]:
    def change(stored: Stored) -> None:
        stored[name] = torch.zeros(4)

    return edited(change)


def edit_index(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def on_first_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        shard = min(directory.glob("*.safetensors"))
        shard.write_bytes(change(shard.read_bytes()))

    return damage


def delete_first_shard(directory: Path) -> None:
    min(directory.glob("*.safetensors")).unlink()


def drop_from_shard_only(directory: Path) -> None:
    shard = directory / json.loads((directory / INDEX).read_text())["weight_map"][Q_A]
    stored = load_file(shard)
    del stored[Q_A]
    save_file(stored, shard)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (remove(Q_A), f"tensor {Q_A} is missing"),
    "missing scale": (
        remove(f"{DOWN}_scale_inv"),
        f"tensor {DOWN}_scale_inv is missing",
    ),
    "missing MTP norm": (remove("model.layers.2.enorm.weight"), "layers.2.enorm.weight is missing"),
    "extra tensor": (
        add("model.layers.1.self_attn.q_proj.weight"),
        "tensor model.layers.1.self_attn.q_proj.weight is not part of the model",
    ),
    "extra expert": (
        add("model.layers.1.mlp.experts.4.up_proj.weight"),
        "experts.4.up_proj.weight is not part of the model",
    ),
    "wrong shape": (
        replace_by(Q_A, lambda t: t[:64].clone()),
        f"tensor {Q_A} has the shape [64, 256]; config.json asks for [128, 256]",
    ),
    "wrong scale shape": (
        replace_by(f"{Q_A}_scale_inv", lambda t: t[:, :1].clone()),
        f"tensor {Q_A}_scale_inv has the shape [1, 1]; config.json asks for [1, 2]",
    ),
    "transposed": (
        replace_by(DOWN, lambda t: t.T.contiguous()),
        f"tensor {DOWN} has the shape [128, 256]",
    ),
    "linear not FP8": (
        replace_by(Q_A, lambda t: t.to(torch.bfloat16)),
        f"tensor {Q_A} is BF16; expected F8_E4M3",
    ),
    "linear E5M2": (
        replace_by(Q_A, lambda t: t.float().to(torch.float8_e5m2)),
        f"tensor {Q_A} is F8_E5M2; expected F8_E4M3",
    ),
    "scale not FP32": (
        replace_by(f"{Q_A}_scale_inv", lambda t: t.to(torch.bfloat16)),
        f"tensor {Q_A}_scale_inv is BF16; expected F32",
    ),
    "integer bias": (
        replace_by(BIAS, lambda t: t.to(torch.int32)),
        f"tensor {BIAS} is I32; expected BF16 or F16 or F32",
    ),
    "absent shard": (delete_first_shard, "which is absent; download it again"),
    "truncated shard": (on_first_shard(lambda b: b[:-100]), "is cut off"),
    "half a header": (on_first_shard(lambda b: b[:100]), "cut off within its header"),
    "not safetensors": (on_first_shard(lambda b: b"\x80\x04" + b[2:]), "not a safetensors file"),
    "empty shard": (on_first_shard(lambda b: b""), "not a safetensors file"),
    "index lists what the shard lacks": (drop_from_shard_only, f"says that tensor {Q_A} is here"),
    "index forgets a tensor": (
        edit_index(lambda index: index["weight_map"].pop(Q_A)),
        f"tensor {Q_A} is not listed in {INDEX}",
    ),
    "index without map": (edit_index(lambda index: index.pop("weight_map")), "not a safetensors"),
    "index leaves the directory": (
        edit_index(lambda index: index["weight_map"].update({Q_A: "../other.safetensors"})),
        "outside its own directory",
    ),
    "index not JSON": (lambda d: (d / INDEX).write_text("{") and None, "not a safetensors index"),
    "no tensors at all": (lambda d: (d / INDEX).unlink(), "holds neither"),
    "is an artifact": (
        lambda d: (d / "intserve.json").write_text("{}") and None,
        "is a quantized checkpoint",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, name: str
) -> None:
    damage, message = DAMAGES[name]
    write_checkpoint(tmp_path)
    CheckpointReader(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def twice_the_elements(index: dict, directory: Path) -> int:  # type: ignore[type-arg]
    """What DeepSeek-V3's own index says: neither the bytes of its tensors nor of its files."""
    headers = [read_header(directory / shard) for shard in set(index["weight_map"].values())]
    return 2 * sum(math.prod(e.shape) for header in headers for e in header.tensors.values())


@pytest.mark.parametrize("metadata", ["released", {"total_size": 0}, {"total_size": 12}, {}, None])
def test_the_total_size_of_an_index_is_a_note_in_the_log_and_never_an_error(
    tmp_path: Path, metadata: object, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    tensor_bytes = index["metadata"]["total_size"]
    if metadata == "released":
        metadata = {"total_size": twice_the_elements(index, tmp_path)}
    (tmp_path / INDEX).write_text(json.dumps(index | {"metadata": metadata}))
    with caplog.at_level("INFO", logger="deepseek"):
        reader = CheckpointReader(tmp_path)
    read_all(reader)
    reader.finish()
    assert reader.total_bytes == tensor_bytes
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    notes = [] if total is None else [f"says total_size {total}; the shards hold {tensor_bytes}"]
    assert len(caplog.messages) == len(notes)
    assert all(note in message for note, message in zip(notes, caplog.messages, strict=True))


def test_several_missing_tensors_are_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)

    def change(stored: Stored) -> None:
        del stored[Q_A], stored[DOWN], stored[BIAS]

    edited(change)(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"tensor \S*experts.2.down_proj.weight \(and 2 more\) is"
    ):
        CheckpointReader(tmp_path)


def test_fp8_tensors_without_quantization_config_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="weight_scale_inv .*not part of the model"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unquantized_sources_may_be_any_float(tmp_path: Path, dtype: torch.dtype) -> None:
    config = write_checkpoint(tmp_path, fp8=False)
    stored = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    write_shards(tmp_path, stored)
    tensor = CheckpointReader(tmp_path).read_layer(1)[Q_A]
    assert tensor.data.dtype == dtype
    assert torch.equal(tensor.dequantize(), stored[Q_A].float())


def test_a_directory_without_config_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        CheckpointReader(tmp_path / "nowhere")


def test_a_config_of_another_shape_than_the_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_dict(experts=6)))
    with pytest.raises(IntServeError, match="experts"):
        CheckpointReader(tmp_path)


def test_the_fingerprint_changes_with_config_index_header_and_edges(tmp_path: Path) -> None:
    def fingerprint(name: str, change: Callable[[Path], object] | None = None) -> str:
        write_checkpoint(tmp_path / name)
        if change:
            change(tmp_path / name)
        return CheckpointReader(tmp_path / name).fingerprint

    def flip_last_byte(directory: Path) -> None:
        path = max(directory.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    def reformat(directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | {"rope_theta": 9999}))

    same = fingerprint("a")
    assert fingerprint("b") == same, "the path must not matter"
    assert fingerprint("c", flip_last_byte) != same
    assert fingerprint("d", reformat) != same
    assert fingerprint("e", edit_index(lambda index: index["metadata"].clear())) != same


def test_the_content_digest_of_a_layer_sees_data_and_scales(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path)
    untouched = content_digest(CheckpointReader(tmp_path).read_layer(0))
    before = content_digest(CheckpointReader(tmp_path).read_layer(1))
    for name in (Q_A, f"{Q_A}_scale_inv"):
        stored = random_tensors(config)
        stored[name].view(torch.uint8).reshape(-1)[0] ^= 1
        write_shards(tmp_path, stored)
        reader = CheckpointReader(tmp_path)
        assert content_digest(reader.read_layer(1)) != before
        assert content_digest(reader.read_layer(0)) == untouched
    write_shards(tmp_path, random_tensors(config))
    assert content_digest(CheckpointReader(tmp_path).read_layer(1)) == before


def test_tables_of_rotary_frequencies_are_no_part_of_the_model(tmp_path: Path) -> None:
    """Kimi-K2's release has one in each layer, of 56 values."""
    config = write_checkpoint(tmp_path / "plain")
    write_checkpoint(tmp_path / "with")
    stored = random_tensors(config)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        stored[name] = torch.ones(56, dtype=torch.bfloat16)
    write_shards(tmp_path / "with", stored)
    plain, reader = CheckpointReader(tmp_path / "plain"), CheckpointReader(tmp_path / "with")
    assert reader.total_bytes == plain.total_bytes
    for layer in range(config.num_layers_with_mtp):
        assert content_digest(reader.read_layer(layer)) == content_digest(plain.read_layer(layer))
    reader.read_globals()
    reader.finish()
    stored["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.ones(56)
    write_shards(tmp_path / "with", stored)
    with pytest.raises(CheckpointError, match="cos_cached is not part of the model"):
        CheckpointReader(tmp_path / "with")

"""Synthetic checkpoints have the release's format and shapes, the documented statistics, and bytes
that depend on seed and sizes only."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError, ConfigError, OutputError
from deepseek.formats import dequantize_fp8_block
from deepseek.inventory import layer_tensors
from deepseek.models import DEEPSEEK_V3, DEEPSEEK_V3_2, MODELS
from deepseek.source.checkpoint import CheckpointReader, expected_source
from deepseek.source.synthetic import (
    Preset,
    Size,
    config_json,
    num_bytes,
    shard_layouts,
    synthesize,
    synthetic_config,
)
from deepseek.source.synthetic_weights import WeightMaker
from deepseek.tensor_files import read_header, stream_tensors

SMALL = Size(layers=3, mtp_layers=1, experts=8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "model"
    synthesize(directory, synthetic_config(SMALL, "small"), seed=3)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_the_reader_accepts_every_tensor_of_it(small: Path) -> None:
    reader = CheckpointReader(small)
    assert reader.config == synthetic_config(SMALL, "small")
    for layer in range(4):
        for name, tensor in reader.read_layer(layer).items():
            assert tensor.dequantize().isfinite().all(), name
    reader.read_globals()
    reader.finish()
    assert reader.total_bytes == num_bytes(reader.config)


def test_a_small_v3_2_has_an_indexer_in_every_layer_as_released(tmp_path: Path) -> None:
    """wq_b and wk in FP8 tiles, its LayerNorm in FP32 and near 1, weights_proj in BF16."""
    config = synthetic_config(SMALL, "small-v3.2")
    synthesize(tmp_path / "model", config, seed=3)
    reader = CheckpointReader(tmp_path / "model")
    assert reader.config == config
    assert config.dense_context == 512
    assert json.loads((tmp_path / "model" / "config.json").read_text())["index_topk"] == 512
    for layer in range(4):
        layer_tensors = reader.read_layer(layer)
        prefix = f"model.layers.{layer}.self_attn.indexer"
        for name in ("wq_b", "wk"):
            assert layer_tensors[f"{prefix}.{name}.weight"].scale_inv is not None
        norm = layer_tensors[f"{prefix}.k_norm.weight"].data
        assert norm.dtype == torch.float32
        assert (norm - 1).abs().max() < 0.5
        assert layer_tensors[f"{prefix}.k_norm.bias"].data.dtype == torch.float32
        assert layer_tensors[f"{prefix}.weights_proj.weight"].data.dtype == torch.bfloat16


def test_a_model_without_an_indexer_has_no_keys_for_one() -> None:
    assert not [key for key in config_json(synthetic_config(SMALL, "small")) if "index" in key]


@pytest.mark.parametrize(
    ("preset", "model"), [("deepseek-v3", DEEPSEEK_V3), ("deepseek-v3.2", DEEPSEEK_V3_2)]
)
def test_each_layer_has_the_shapes_of_the_release(preset: Preset, model: ModelConfig) -> None:
    """Layer 0 as the release's layer 0, layer 1 as its layer 3, but for the number of experts."""
    config = synthetic_config(Size(layers=2, experts=16), preset)
    layout = {name: entry for shard in shard_layouts(config) for name, entry in shard.items()}
    release = expected_source(model)
    experts = 0
    for layer, like in ((0, 0), (1, 3)):
        for spec in layer_tensors(config, layer):
            for suffix in ("", "_scale_inv"):
                name = f"{spec.name}{suffix}"
                if name not in layout:
                    assert suffix == "_scale_inv"
                    assert spec.kind != "linear"
                    continue
                dtype, shape = layout[name]
                expected, dtypes = release[name.replace(f"layers.{layer}.", f"layers.{like}.", 1)]
                if spec.group == "router":
                    expected = (16, *expected[1:])
                assert shape == expected, name
                assert dtype in dtypes, name
                experts += spec.expert is not None
    assert experts == 16 * 3 * 2
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert layout[name] == (torch.bfloat16, (129280, 7168))


def test_with_all_its_layers_and_experts_it_is_as_large_as_the_release() -> None:
    config = synthetic_config(Size(layers=61, dense_layers=3, mtp_layers=1, experts=256))
    assert config == DEEPSEEK_V3
    assert ModelConfig.from_dict(json.loads(json.dumps(config_json(config)))) == DEEPSEEK_V3
    published = 688_586_727_753  # all 163 files, with the headers of 91,991 tensors
    assert num_bytes(config) == pytest.approx(published, rel=2e-5)


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("kimi-k2", Size(layers=61, dense_layers=1, experts=384)),
        ("moonlight", Size(layers=27, dense_layers=1, experts=64)),
        ("deepseek-v3.2", Size(layers=61, dense_layers=3, mtp_layers=1, experts=256)),
    ],
)
def test_so_is_each_model_of_the_family(preset: Preset, size: Size) -> None:
    """But for BOS and EOS, which are those of the tokenizer of bytes."""
    config = synthetic_config(size, preset)
    assert config == replace(MODELS[preset], bos_token_id=0, eos_token_id=1)
    assert ModelConfig.from_dict(json.loads(json.dumps(config_json(config)))) == config
    published = {"kimi-k2": 1_029_173_000_000, "moonlight": 31_920_000_000}
    if preset in published:
        assert num_bytes(config) == pytest.approx(published[preset], rel=2e-3)


@pytest.mark.parametrize("preset", ["kimi-k2", "moonlight"])
def test_the_reader_accepts_small_ones_of_the_family(preset: Preset, tmp_path: Path) -> None:
    narrow = {"vocab": 300, "hidden": 256, "intermediate": 384, "moe_intermediate": 384, "heads": 2}
    config = synthetic_config(Size(layers=2, experts=6, **narrow), preset)
    synthesize(tmp_path / "model", config, seed=3)
    reader = CheckpointReader(tmp_path / "model")
    assert reader.config == config
    assert (config.n_group, config.num_experts_per_tok) == (1, 6)
    for layer in range(2):
        for name, tensor in reader.read_layer(layer).items():
            values = tensor.dequantize()
            assert values.isfinite().all(), name
            if tensor.spec.kind == "linear":
                assert (tensor.scale_inv is None) == (preset == "moonlight")
                mean_square = values.square().mean().item() * tensor.spec.shape[1]
                assert 0.5 < mean_square < 2.0, name
    reader.read_globals()
    reader.finish()


@pytest.mark.parametrize(
    ("experts", "groups", "reach", "chosen"),
    [(256, 8, 4, 8), (16, 8, 4, 8), (8, 4, 2, 4), (12, 4, 2, 6), (6, 2, 1, 3), (3, 1, 1, 3)],
)
def test_routing_keeps_the_release_s_proportions_where_the_experts_allow(
    experts: int, groups: int, reach: int, chosen: int
) -> None:
    config = synthetic_config(Size(layers=2, experts=experts))
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (
        groups,
        reach,
        chosen,
    )


def test_same_seed_same_bytes_and_another_seed_others(small: Path, tmp_path: Path) -> None:
    config = synthetic_config(SMALL, "small")
    torch.rand(7)  # whatever the process did before
    np.random.default_rng().random(7)
    synthesize(tmp_path / "same", config, seed=3)
    assert contents(tmp_path / "same") == contents(small)
    synthesize(tmp_path / "other", config, seed=4)
    differing = {
        n for n, data in contents(tmp_path / "other").items() if data != contents(small)[n]
    }
    assert differing == {"model-00001-of-00001.safetensors"}


def test_shards_are_cut_at_their_limit_and_hold_the_same_tensors(
    small: Path, tmp_path: Path
) -> None:
    config = synthetic_config(SMALL, "small")
    made = synthesize(tmp_path / "model", config, seed=3, shard_bytes=500_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == made.num_shards > 5
    assert max(read_header(path).file_bytes for path in shards) < 520_000
    together = {name: value for path in shards for name, value in load_file(path).items()}
    whole = load_file(small / "model-00001-of-00001.safetensors")
    assert together.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(together[name].view(torch.uint8), value.view(torch.uint8)), name
    CheckpointReader(tmp_path / "model")


def test_weights_are_put_together_as_documented(small: Path) -> None:
    """Slow reference: rows of a linear are rows of the pool, up to order and signs of columns."""
    config = synthetic_config(SMALL, "small")
    pool = WeightMaker(config, seed=3)._codes & 127
    rows = {row.tobytes() for shift in range(0, pool.shape[1] - 255, 128)
            for row in pool[:, shift : shift + 256]}  # fmt: skip
    read = CheckpointReader(small).read_layer(1)
    codes = read["model.layers.1.mlp.experts.5.up_proj.weight"].data.view(torch.uint8).numpy() & 127
    assert len({row.tobytes() for row in codes}) == 128
    assert {row.tobytes() for row in codes} <= rows


def test_linears_have_unit_gain_spread_channels_and_outliers() -> None:
    size = Size(layers=2, hidden=2048, moe_intermediate=512)
    maker = WeightMaker(synthetic_config(size, "small"), seed=0)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    pieces = list(maker.pieces(name))
    assert {tuple(piece.shape) for piece in pieces} == {(128, 2048)}
    (scale,) = maker.pieces(f"{name}_scale_inv")
    codes = torch.cat(pieces)
    assert codes.float().abs().max() == 448, "all of FP8's range is in use"
    weight = dequantize_fp8_block(codes, scale)
    assert float(weight.square().mean()) * 2048 == pytest.approx(1, rel=0.3)
    columns = weight.square().mean(dim=0).sqrt()
    outliers = columns > 4 * columns.median()
    assert 2 <= int(outliers.sum()) <= 16
    rows = weight[:, ~outliers].square().mean(dim=1).sqrt()
    assert float(rows.log().std()) == pytest.approx(0.25, abs=0.05)
    ordinary = weight[:, ~outliers]
    assert abs(float(torch.corrcoef(ordinary[[5, 133]])[0, 1])) < 0.1


def test_the_tokenizer_gives_one_id_per_byte_and_the_text_back(small: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
    text = "Grüße, 世界!\n\tok"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode())
    assert min(ids) > 1
    assert max(ids) < 258
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == 0


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    heard: list[int] = []
    made = synthesize(
        tmp_path / "model",
        synthetic_config(Size(layers=1, experts=4), "small"),
        advance=heard.append,
    )
    assert sum(heard) == made.num_bytes
    assert max(heard) < made.num_bytes / 4


class KilledError(Exception):
    pass


def test_a_killed_run_leaves_no_checkpoint_and_is_not_written_over(tmp_path: Path) -> None:
    config = synthetic_config(Size(layers=2, experts=4), "small")

    def kill(_: int) -> None:
        if written := list(tmp_path.glob("out/*.safetensors")):
            raise KilledError(written)

    with pytest.raises(KilledError):
        synthesize(tmp_path / "out", config, advance=kill, shard_bytes=500_000)
    assert not list((tmp_path / "out").glob(".*"))
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        CheckpointReader(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds files that are no checkpoint.* remove it"):
        synthesize(tmp_path / "out", config)


def test_places_that_cannot_be_written_to_are_refused_by_name(small: Path, tmp_path: Path) -> None:
    config = synthetic_config(Size(layers=1, experts=4), "small")
    with pytest.raises(CheckpointError, match="model already holds a checkpoint; remove it"):
        synthesize(small, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file; --output must name a directory"):
        synthesize(tmp_path / "file", config)
    free = os.statvfs(tmp_path)
    layers = 2 + free.f_bavail * free.f_frsize // 10**10
    huge = synthetic_config(Size(layers=layers, experts=256))
    with pytest.raises(OutputError, match="huge needs .* GB are free; .* lower --layers"):
        synthesize(tmp_path / "huge", huge)
    assert not (tmp_path / "huge").exists()


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--vocab must be at least 258"):
        synthetic_config(Size(vocab=257))
    with pytest.raises(ConfigError, match="num_experts_per_tok 9 is more than the 8"):
        synthetic_config(Size(experts=16, experts_per_token=9))
    with pytest.raises(ConfigError, match="first_k_dense_replace 3 lies outside"):
        synthetic_config(Size(layers=2, dense_layers=3))


def test_streaming_a_file_writes_what_the_reference_reads(tmp_path: Path) -> None:
    values = {"b": torch.arange(6.0).view(3, 2), "a": torch.arange(4).to(torch.uint8)}
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
    stream_tensors(tmp_path / "file", layout, lambda name: values[name].split(1), {"format": "pt"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(loaded[name], value)
    with pytest.raises(AssertionError, match="not as long as announced"):
        stream_tensors(tmp_path / "short", layout, lambda name: values[name][:1].split(1))
    assert not list(tmp_path.glob("*short*"))

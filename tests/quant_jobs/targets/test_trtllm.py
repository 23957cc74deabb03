"""A TensorRT-LLM engine: the artifact's values in the loader's names, each read once, the same
bytes every time, and made good where they were lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import flip_byte
from support.trtllm_builds import build, digests, make_buildable, per_layer_recipe
from torch import Tensor

from deepseek.artifact.engine_manifest import RankLayout, read_engine_manifest
from deepseek.artifact.input_maxima import InputMaxima, LayerMaxima
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.reader import ArtifactReader, LayerFile
from deepseek.formats import unpack_int4, unpack_int8
from deepseek.source.checkpoint import CheckpointReader
from deepseek.tensor_files import read_header
from deepseek.trtllm.check import check_engine
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.loader import LoaderModel
from deepseek.trtllm.loader_files import Checkpoint
from quant_jobs.check import run_check

MOE_LAYERS = (1, 2)
EXPERTS = 4
#: Of the artifact: shapes are for other loaders, input scales are read when the build is planned.
NOT_COPIED = ("weight_shape", "input_scale")


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> ArtifactReader:
    """An artifact of INT4 experts, beside its source; nobody may change them."""
    return make_buildable(tmp_path_factory.mktemp("int4"), "int4")


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> ArtifactReader:
    """The same source with INT8 experts."""
    return make_buildable(tmp_path_factory.mktemp("int8"), "int8-experts")


@pytest.fixture(scope="session")
def engine(int4: ArtifactReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT4 engine in the dialect mixed on four ranks; nobody may change it."""
    output = tmp_path_factory.mktemp("engine") / "mixed"
    build(int4.directory, output)
    return output


def source_of(artifact: ArtifactReader) -> Path:
    return artifact.directory.parent / "source"


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an engine directory."""
    checkpoint = Checkpoint(directory, values=True)
    return {key: checkpoint.peek(key) for key in checkpoint}


def tensors_of(artifact: ArtifactReader, layers: tuple[LayerKey, ...]) -> dict[str, Tensor]:
    """The artifact's tensors of these layers that an engine is made of."""
    read: dict[str, Tensor] = {}
    for layer in layers:
        read |= artifact.read_globals() if layer == "globals" else artifact.read_layer(layer)
    return {name: value for name, value in read.items() if not name.endswith(NOT_COPIED)}


def documents(directory: Path, *names: str) -> list[Any]:
    return [json.loads((directory / name).read_text()) for name in names]


# --- what is read and written ---


@pytest.mark.parametrize("recipe", ["int4", "w4a8"])
@pytest.mark.parametrize("dialect", ["mixed", "single"])
def test_every_tensor_is_read_once_and_its_bytes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, dialect: Dialect
) -> None:
    artifact = make_buildable(tmp_path, recipe, layers=2)
    reads: Counter[str] = Counter()
    read = LayerFile.read

    def counted(file: LayerFile, name: str) -> Tensor:
        reads[name] += 1
        return read(file, name)

    monkeypatch.setattr(LayerFile, "read", counted)
    result = build(artifact.directory, tmp_path / "engine", dialect=dialect)
    monkeypatch.undo()
    needed = tensors_of(artifact, (0, 1, "globals"))
    scales = {name for name in reads if name.endswith("input_scale")}
    assert {name: reads[name] for name in reads.keys() - scales} == dict.fromkeys(needed, 1)
    assert result.bytes_read == sum(tensor.nbytes for tensor in needed.values())
    assert len(scales) == (3 * EXPERTS if recipe == "w4a8" else 0)
    assert all(reads[name] == 1 for name in scales)


def test_the_same_checkpoint_gives_the_same_bytes(
    int4: ArtifactReader, engine: Path, tmp_path: Path
) -> None:
    result = build(int4.directory, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(engine)
    assert result.engine_digest == read_engine_manifest(engine).digest
    assert not (engine / ".build").exists()


def test_a_finished_engine_is_verified_and_kept(int4: ArtifactReader, tmp_path: Path) -> None:
    first = build(int4.directory, tmp_path / "engine")
    files = sorted((tmp_path / "engine").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    again = build(int4.directory, tmp_path / "engine")
    assert again == first.model_copy(update={"bytes_read": 0})
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize("deleted", [True, False])
def test_what_a_finished_engine_has_lost_is_made_again_with_the_same_bytes(
    int4: ArtifactReader, tmp_path: Path, deleted: bool
) -> None:
    output = tmp_path / "engine"
    build(int4.directory, output)
    before = digests(output)
    lost = sorted(before.keys() - {"engine.json", "model-layer-00000.safetensors"})
    assert len(lost) == 11
    for name in lost:
        if deleted:
            (output / name).unlink()
        else:
            flip_byte(output / name, (output / name).stat().st_size // 2)
    result = build(int4.directory, output)
    assert digests(output) == before
    made = tensors_of(int4, (1, 2, "globals"))
    assert result.bytes_read == sum(tensor.nbytes for tensor in made.values())


def test_the_index_lists_what_the_files_hold(engine: Path) -> None:
    (index,) = documents(engine, "model.safetensors.index.json")
    entries = {
        name: (path.name, entry.num_bytes)
        for path in engine.glob("*.safetensors")
        for name, entry in read_header(path).tensors.items()
    }
    assert index["weight_map"] == {name: file for name, (file, _) in entries.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in entries.values())


# --- documents ---


@pytest.mark.parametrize("dialect", ["mixed", "single"])
def test_config_says_neither_quantization_nor_an_mtp_layer(
    int4: ArtifactReader, tmp_path: Path, dialect: Dialect
) -> None:
    build(int4.directory, tmp_path / "engine", dialect=dialect, kv_cache="fp8")
    original, config = (
        documents(d, "config.json")[0] for d in (int4.directory, tmp_path / "engine")
    )
    assert "quantization_config" not in config
    assert config["num_nextn_predict_layers"] == 0
    changed = {"quantization_config", "num_nextn_predict_layers"}
    assert {key: original[key] for key in original.keys() - changed} == {
        key: config[key] for key in config.keys() - changed
    }
    (quant,) = documents(tmp_path / "engine", "hf_quant_config.json")
    assert quant["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert (tmp_path / "engine" / "quant_cfg.json").exists() == (dialect == "mixed")
    if dialect == "mixed":
        (same,) = documents(tmp_path / "engine", "quant_cfg.json")
        assert same == quant["quantization"]
    for name in ("intserve.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "engine" / name).read_bytes() == (int4.directory / name).read_bytes()
    assert not (tmp_path / "engine" / "input_maxima.json").exists()


def test_an_mtp_layer_that_is_kept_is_in_config_lists_and_files(
    int4: ArtifactReader, tmp_path: Path
) -> None:
    output = tmp_path / "engine"
    result = build(int4.directory, output, mtp=True, engine_version="1.3.0rc29")
    config, quant = documents(output, "config.json", "quant_cfg.json")
    assert config["num_nextn_predict_layers"] == 1
    fp8 = {"quant_algo": "FP8_BLOCK_SCALES", "group_size": 128}
    assert quant["quantized_layers"]["model.layers.3.mlp.experts"] == fp8
    kept = tensors_of(int4, (3,))
    assert {"model.layers.3.enorm.weight", "model.layers.3.eh_proj.weight"} <= stored(output).keys()
    assert result.bytes_read == sum(
        tensor.nbytes for tensor in (kept | tensors_of(int4, (0, 1, 2, "globals"))).values()
    )
    assert run_check(output, int4.directory).compared > 100


@pytest.mark.parametrize("mtp", [False, True])
def test_a_release_stays_as_it_is(int4: ArtifactReader, tmp_path: Path, mtp: bool) -> None:
    source, output = source_of(int4), tmp_path / "engine"
    options = {"mtp": True, "engine_version": "1.3.0rc29"} if mtp else {}
    result = build(source, output, **options)
    original, config = (documents(d, "config.json")[0] for d in (source, output))
    assert config == original | {"num_nextn_predict_layers": int(mtp)}
    names = {path.name for path in output.iterdir()}
    assert not names & {"hf_quant_config.json", "quant_cfg.json", "intserve.json"}
    assert ("model-layer-00003.safetensors" in names) == mtp
    reader = CheckpointReader(source)
    tensors = stored(output)
    for layer in range(4 if mtp else 3):
        for name, tensor in reader.read_layer(layer).items():
            assert torch.equal(bits(tensors[name]), bits(tensor.data)), name
            if tensor.scale_inv is not None:
                assert torch.equal(tensors[f"{name}_scale_inv"], tensor.scale_inv), name
    assert result.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert result.recipe == "unquantized"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- values ---


def test_int4_codes_are_twos_complement_the_even_input_in_the_low_nibble(
    int4: ArtifactReader, engine: Path
) -> None:
    tensors = stored(engine)
    for layer in MOE_LAYERS:
        artifact = int4.read_layer(layer)
        packed = [name for name in artifact if name.endswith("weight_packed")]
        assert len(packed) == 3 * EXPERTS
        for name in packed:
            module = name.removesuffix(".weight_packed")
            weight = tensors[f"{module}.weight"]
            assert weight.dtype == torch.int8
            codes = torch.stack([(weight << 4) >> 4, weight >> 4], dim=2).flatten(1)  # signed
            assert torch.equal(codes, unpack_int4(artifact[name], codes.shape[1]).to(torch.int8))
            assert torch.equal(
                bits(tensors[f"{module}.weight_scale_inv"]),
                bits(artifact[f"{module}.weight_scale"]),
            )


def test_int8_codes_are_signed_with_one_scale_per_output(
    int8: ArtifactReader, tmp_path: Path
) -> None:
    build(int8.directory, tmp_path / "engine")
    tensors, artifact = stored(tmp_path / "engine"), int8.read_layer(1)
    packed = [name for name in artifact if name.endswith("weight_packed")]
    assert len(packed) == 3 * EXPERTS
    for name in packed:
        module = name.removesuffix(".weight_packed")
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        assert torch.equal(weight, unpack_int8(artifact[name], weight.shape[1]))
        assert scale.shape == weight.shape[:1]
        assert torch.equal(scale, artifact[f"{module}.weight_scale"][:, 0].bfloat16())
    assert not [name for name in tensors if name.endswith(".input_scale")]


def test_everything_but_the_experts_keeps_its_tiles_in_mixed_and_is_bf16_in_single(
    int4: ArtifactReader, engine: Path, tmp_path: Path
) -> None:
    build(int4.directory, tmp_path / "single", dialect="single")
    mixed, single = stored(engine), stored(tmp_path / "single")
    artifact = tensors_of(int4, (0, 1, 2, "globals"))
    tiles = [name for name, value in artifact.items() if value.dtype == torch.float8_e4m3fn]
    assert len(tiles) == 3 * 5 + 3 * 3
    for name in tiles:
        scale = artifact[f"{name}_scale"]
        assert torch.equal(bits(mixed[name]), bits(artifact[name]))
        assert torch.equal(mixed[f"{name}_scale_inv"], scale)
        rows, columns = artifact[name].shape
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        assert torch.equal(single[name], (artifact[name].float() * spread).bfloat16())
        assert f"{name}_scale_inv" not in single
    plain = {name for name in artifact if "experts" not in name} - set(tiles)
    for name in (name for name in plain if not name.endswith("weight_scale")):
        assert torch.equal(mixed[name], artifact[name])
        assert torch.equal(single[name], artifact[name])


@pytest.mark.parametrize("dialect", ["mixed", "single"])
@pytest.mark.parametrize("ep", [4, 2, 1])
def test_every_rank_holds_the_artifacts_values(
    int4: ArtifactReader, tmp_path: Path, dialect: Dialect, ep: int
) -> None:
    build(int4.directory, tmp_path / "engine", ep=ep, dialect=dialect)
    report = run_check(tmp_path / "engine", int4.directory)
    assert report.compared == len(tensors_of(int4, (0, 1, 2, "globals")))


def test_int4_and_int8_experts_share_an_engine_of_the_dialect_mixed(tmp_path: Path) -> None:
    artifact = make_buildable(tmp_path, per_layer_recipe())
    output = tmp_path / "engine"
    build(artifact.directory, output, ep=2)
    (quant,) = documents(output, "quant_cfg.json")
    algos = [
        quant["quantized_layers"][f"model.layers.{layer}.mlp.experts"]["quant_algo"]
        for layer in MOE_LAYERS
    ]
    assert algos == ["W4A8_AWQ", "W8A16"]
    assert read_engine_manifest(output).target_fields["input_scales"].keys() == {"1"}  # type: ignore[union-attr]
    assert run_check(output, artifact.directory).compared == len(
        tensors_of(artifact, (0, 1, 2, "globals"))
    )


@pytest.mark.parametrize("dialect", ["mixed", "single"])
@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        # Moonlight: BF16, 2 shared experts, experts of an odd number of groups
        {
            "fp8": False,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "moe_intermediate_size": 384,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
        },
    ],
    ids=["without a query latent", "moonlight"],
)
def test_other_models_of_the_family_are_exact_on_every_rank(
    tmp_path: Path, changes: dict[str, Any], dialect: Dialect
) -> None:
    artifact = make_buildable(tmp_path, "int4", layers=2, **changes)
    build(artifact.directory, tmp_path / "engine", dialect=dialect)
    report = run_check(tmp_path / "engine", artifact.directory)
    assert report.compared == len(tensors_of(artifact, (0, 1, "globals")))
    assert ("model.layers.0.self_attn.q_proj.weight" in stored(tmp_path / "engine")) == (
        changes["q_lora_rank"] is None
    )


@pytest.mark.heavy
def test_the_384_experts_of_kimi_k2_are_divided_over_eight_ranks(tmp_path: Path) -> None:
    small = {"layers": 2, "hidden": 128, "moe_intermediate_size": 128, "num_experts_per_tok": 8}
    groups = {"model_type": "kimi_k2", "experts": 384, "n_group": 1, "topk_group": 1}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "num_nextn_predict_layers": 0}
    artifact = make_buildable(tmp_path, "int4", **small, **groups, **heads)
    result = build(artifact.directory, tmp_path / "engine", tp=8, ep=8)
    report = run_check(tmp_path / "engine", artifact.directory)
    assert report.compared == len(tensors_of(artifact, (0, 1, "globals")))
    (quant,) = documents(tmp_path / "engine", "quant_cfg.json")
    assert [name for name in quant["quantized_layers"] if name.endswith("experts")] == [
        "model.layers.1.mlp.experts"
    ]
    assert len(result.ranks) == 8


# --- input scales ---


def input_scales(directory: Path, layer: int, role: str) -> list[float]:
    """Of every expert of the layer."""
    checkpoint = Checkpoint(directory, values=True)
    return [
        checkpoint.peek(f"model.layers.{layer}.mlp.experts.{n}.{role}.input_scale").item()
        for n in range(EXPERTS)
    ]


def test_experts_of_a_layer_share_the_power_of_two_above_what_the_largest_input_needs(
    int4: ArtifactReader, engine: Path
) -> None:
    assert int4.input_maxima is not None
    for layer in MOE_LAYERS:
        maxima = int4.input_maxima.layers[layer]
        for role, values in {
            "gate_proj": maxima.gate_up, "up_proj": maxima.gate_up, "down_proj": maxima.down,
        }.items():  # fmt: skip
            (scale,) = set(input_scales(engine, layer, role))
            mantissa = torch.frexp(torch.tensor(scale)).mantissa
            assert mantissa.item() == 0.5
            assert 0.5 * scale < max(values) / 448 <= scale


@pytest.mark.parametrize("ep", [4, 2])
def test_the_loaders_rounding_leaves_no_gain_error(
    int4: ArtifactReader, tmp_path: Path, ep: int
) -> None:
    build(int4.directory, tmp_path / "engine", ep=ep)
    model = LoaderModel(tmp_path / "engine", RankLayout(tp=4, ep=ep), "1.2.1")
    loaded = 0
    for rank in range(4):
        for module, parameters in model.load(rank):
            if module.endswith(".experts"):
                for name in ("fc31", "fc2"):
                    gain = parameters[f"{name}_act_scale"].double().flatten(1)
                    assert bool((gain * parameters[f"{name}_alpha"].double() == 1).all())
                loaded += 1
    assert loaded == 4 * len(MOE_LAYERS)


def test_scales_that_an_artifact_was_judged_with_are_the_ones_that_are_needed(
    tmp_path: Path,
) -> None:
    """Those of `w4a8`: 48 / 448, whatever the maxima say."""
    artifact = make_buildable(tmp_path, "w4a8")
    build(artifact.directory, tmp_path / "engine")
    for layer in MOE_LAYERS:
        for role in ("gate_proj", "up_proj", "down_proj"):
            assert set(input_scales(tmp_path / "engine", layer, role)) == {0.125}
    fields = read_engine_manifest(tmp_path / "engine").target_fields["input_scales"]
    assert fields["1"]["needed_down"] == pytest.approx(48 / 448)  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ((0.0, 1.0, 1.0, 1.0), 1 / 448),  # an expert that saw no token
        ((0.0, 0.0, 0.0, 0.0), 1.0),
        ((1.0, 1.0, 1.0, 50.0), 50 / 448),  # an outlier
        ((1.0, 1.0, 1.0, 5000.0), 64 / 448),  # beyond 64 times the median inputs are clipped
        ((3.5, 3.5, 3.5, 3.5), 3.5 / 448),  # 2^-7, which is its own scale
        ((1e-38, 0.0, 0.0, 0.0), 1e-38 / 448),
    ],
)
def test_unusual_maxima_give_scales_that_the_loader_keeps(
    tmp_path: Path, values: tuple[float, ...], needed: float
) -> None:
    values = tuple(torch.tensor(values).tolist())  # float32, as calibration measures
    maxima = InputMaxima(layers={1: LayerMaxima(gate_up=(1.0,) * EXPERTS, down=values)})
    artifact = make_buildable(tmp_path, "int4", maxima=maxima, layers=2)
    build(artifact.directory, tmp_path / "engine")
    (scale,) = set(input_scales(tmp_path / "engine", 1, "down_proj"))
    fields = read_engine_manifest(tmp_path / "engine").target_fields["input_scales"]
    assert fields["1"]["needed_down"] == pytest.approx(needed, rel=1e-6)  # type: ignore[index,call-overload]
    assert scale >= needed * (1 - 1e-6)
    assert scale < 2 * needed or scale == 2.0**-126
    assert check_engine(tmp_path / "engine").ranks


# --- ranks ---


@pytest.mark.parametrize("ep", [4, 2, 1])
def test_a_rank_reads_what_the_engine_says_that_it_holds(
    int8: ArtifactReader, tmp_path: Path, ep: int
) -> None:
    """INT8, where no rank reads the input scales of others' experts. The parameters of a rank are
    those bytes and the copy of kv_b_proj that absorbed attention reads."""
    result = build(int8.directory, tmp_path / "engine", ep=ep)
    config = int8.config
    heads = config.num_attention_heads // 4
    copy = heads * config.qk_nope_head_dim * config.kv_lora_rank  # FP8, scales F32 per 128 x 128
    copies = config.num_hidden_layers * (copy + copy // 128**2 * 4)
    for held, rank in zip(result.rank_weight_bytes, result.ranks, strict=True):
        assert rank.read_bytes == held
        assert rank.held_bytes == held + copies
    assert result.planned_rank_bytes is not None
    assert result.rank_weight_bytes[0] == pytest.approx(result.planned_rank_bytes, rel=0.01)


def test_all_ranks_together_read_every_tensor(int8: ArtifactReader, tmp_path: Path) -> None:
    result = build(int8.directory, tmp_path / "engine")
    model = LoaderModel(tmp_path / "engine", RankLayout(tp=4, ep=4), "1.2.1", values=False)
    for rank in range(4):
        for _ in model.load(rank):
            pass
    assert model.unread() == []
    assert sum(rank.read_bytes for rank in result.ranks) >= result.bytes

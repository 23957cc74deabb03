"""What somebody could do to an engine that `build` made, each refused by a sentence of its own,
though engine.json was written again for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chain import Ended
from support.quantizing import flip_byte
from support.trtllm_builds import build, make_buildable
from support.trtllm_directories import edit_tensors, redigest
from torch import Tensor

from deepseek.artifact.engine_manifest import EnginePlan, RankLayout
from deepseek.errors import ArtifactError, DeployError
from deepseek.tensor_files import read_header
from deepseek.trtllm.check import check_engine

Edit = Callable[[Path], None]

LAYER_1 = "model-layer-00001.safetensors"
EXPERT = "model.layers.1.mlp.experts.2"
DOWN, GATE, UP = (f"{EXPERT}.{role}" for role in ("down_proj", "gate_proj", "up_proj"))
O_PROJ = "model.layers.1.self_attn.o_proj"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `artifact`, `mixed` and `single`; nobody may change them."""
    root = tmp_path_factory.mktemp("mutations")
    artifact = make_buildable(root, "int4", layers=2)
    for dialect in ("mixed", "single"):
        build(artifact.directory, root / dialect, dialect=dialect)
    return root


def tensors(change: Callable[[dict[str, Tensor]], None], file: str = LAYER_1) -> Edit:
    """An edit of the tensors of one file; index and engine.json are written again for it."""

    def edit(directory: Path) -> None:
        edit_tensors(directory, file, change)
        places = {
            name: path.name
            for path in sorted(directory.glob("*.safetensors"))
            for name in read_header(path).tensors
        }
        index = {"metadata": {}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        redigest(directory)

    return edit


def text(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """An edit of a JSON document."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))
        redigest(directory)

    return edit


def in_both_lists(change: Callable[[dict[str, Any]], object]) -> Edit:
    """An edit of the list of quantized modules, the same in both files that have it."""

    def edit(directory: Path) -> None:
        text("quant_cfg.json", lambda raw: change(raw["quantized_layers"]))(directory)
        text("hf_quant_config.json", lambda raw: change(raw["quantization"]["quantized_layers"]))(
            directory
        )

    return edit


def swap_nibbles(stored: dict[str, Tensor]) -> None:
    codes = stored[f"{DOWN}.weight"].view(torch.uint8)
    stored[f"{DOWN}.weight"] = ((codes << 4) | (codes >> 4)).view(torch.int8)


def as_compressed_tensors(stored: dict[str, Tensor]) -> None:
    codes = stored[f"{DOWN}.weight"].view(torch.uint8) ^ 0x88
    stored[f"{DOWN}.weight"] = codes.view(torch.int8)


def invert(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        stored[key] = (1 / stored[key].float()).to(stored[key].dtype)

    return change


def exchange(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        stored[first], stored[second] = stored[second], stored[first]

    return change


def flip(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        stored[key].view(torch.uint8).view(-1)[-1] ^= 1

    return change


def add(**values: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda stored: stored.update(values)


def stray_shard(directory: Path) -> None:
    shutil.copy(directory / LAYER_1, directory / "model-00002-of-00002.safetensors")


def edited_after_build(directory: Path) -> None:
    flip_byte(directory / "model-globals.safetensors")


def mtp_announced(directory: Path) -> None:
    text("config.json", lambda raw: raw.update(num_nextn_predict_layers=1))(directory)


def on_ranks(tp: int, ep: int) -> Edit:
    def edit(directory: Path) -> None:
        plan = EnginePlan(rank_weight_bytes=(1,) * tp)
        redigest(directory, ranks=RankLayout(tp=tp, ep=ep), plan=plan)

    return edit


def without(name: str) -> Edit:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        redigest(directory)

    return edit


RELEASE = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MIXED: dict[str, tuple[Edit, str]] = {
    "nibbles swapped": (tensors(swap_nibbles), f"{DOWN}.weight in .* has its nibbles swapped"),
    "offset-binary codes": (tensors(as_compressed_tensors), f"{DOWN}.weight .* offset-binary code"),
    "group scales inverted": (tensors(invert(f"{GATE}.weight_scale_inv")), "has inverted scales"),
    "tile scales inverted": (tensors(invert(f"{O_PROJ}.weight_scale_inv")), "has inverted scales"),
    "gate for up": (
        tensors(exchange(f"{GATE}.weight", f"{UP}.weight")),
        f"{GATE}.weight in .* holds the values of {UP}.weight_packed",
    ),
    "experts exchanged": (
        tensors(exchange(f"{UP}.weight_scale_inv", f"{EXPERT[:-1]}3.up_proj.weight_scale_inv")),
        "holds the values of",
    ),
    "one code": (tensors(flip(f"{UP}.weight")), f"{UP}.weight in .* was changed"),
    "one value of a tile": (tensors(flip(f"{O_PROJ}.weight")), "o_proj.weight in .* was changed"),
    "one value of a norm": (tensors(flip(NORM)), "input_layernorm.weight in .* was changed"),
    "an input scale of its own": (
        tensors(add(**{f"{DOWN}.input_scale": torch.tensor([0.5])})),
        f"{DOWN}.input_scale in .* is 0.5, where all experts of the layer share",
    ),
    "an input scale of zero": (
        tensors(add(**{f"{GATE}.input_scale": torch.zeros(1)})),
        f"{GATE}.input_scale in .* is 0.0, not a positive number",
    ),
    "no input scale": (
        tensors(lambda stored: stored.pop(f"{UP}.input_scale")),
        f"lacks the tensor {UP}.input_scale",
    ),
    "no tile scale": (
        tensors(lambda stored: stored.pop(f"{O_PROJ}.weight_scale_inv")),
        f"lacks the tensor {O_PROJ}.weight_scale_inv",
    ),
    "weight_shape left over": (
        tensors(add(**{f"{DOWN}.weight_shape": torch.tensor([256, 512])})),
        f"holds {DOWN}.weight_shape, which is a checkpoint's of compressed-tensors",
    ),
    "scales in F32": (
        tensors(lambda stored: stored.update(
            {f"{UP}.weight_scale_inv": stored[f"{UP}.weight_scale_inv"].float()}
        )),
        "weight_scale_inv in .* is F32, not BF16",
    ),
    "a tensor of the MTP layer": (
        tensors(add(**{"model.layers.2.enorm.weight": torch.ones(256, dtype=torch.bfloat16)})),
        "holds model.layers.2.enorm.weight of an MTP layer, which the engine was built without",
    ),
    "a tensor twice": (
        tensors(add(**{NORM: torch.ones(256)}), "model-globals.safetensors"),
        "input_layernorm.weight is in .*globals.* and .*00001",
    ),
    "a stray shard": (stray_shard, "model-00002-of-00002.safetensors is no file of this engine"),
    "a linear unlisted": (
        in_both_lists(lambda listed: listed.pop(O_PROJ)),
        f"tensor {O_PROJ}.weight is float8_e4m3fn and is converted",
    ),
    "experts unlisted": (
        in_both_lists(lambda listed: listed.pop("model.layers.1.mlp.experts")),
        "whose bytes TensorRT-LLM takes for bfloat16",
    ),
    "no quant_cfg.json": (without("quant_cfg.json"), "has no quant_cfg.json, without which"),
    "quantization_config left": (
        text("config.json", lambda raw: raw.update(quantization_config=RELEASE)),
        "config.json still has quantization_config beside hf_quant_config.json",
    ),
    "an MTP layer announced": (mtp_announced, "has num_nextn_predict_layers 1, but engine.json"),
    "edited after the build": (
        edited_after_build,
        r"tensor .* in .*globals\.safetensors was changed",
    ),
    "ranks that cut a tile": (on_ranks(8, 4), "would hold 192 rows or columns of .*q_b_proj"),
    "another KV format": (
        lambda directory: redigest(directory, kv_cache="fp8"),
        "kv_cache_quant_algo None, but the engine was built for a KV cache in fp8",
    ),
}  # fmt: skip
SINGLE: dict[str, tuple[Edit, str]] = {
    "ranks that cut a group": (on_ranks(8, 1), "would multiply 64 inputs .*, no multiple of 128"),
    "attention not excluded": (
        text(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["exclude_modules"].remove("*self_attn*"),
        ),
        "quantizes model.layers.0.self_attn.q_b_proj like the routed experts; exclude it",
    ),
    "a bare name excluded": (
        text(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["exclude_modules"].append("*kv_b_proj*"),
        ),
        "lacks the tensor .*kv_b_proj.weight_scale_inv",
    ),
    "the config of the other dialect": (
        lambda directory: (directory / "quant_cfg.json").write_text("{}") and None,
        "quant_cfg.json does not belong to the dialect single",
    ),
}


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("mixed", name) for name in MIXED] + [("single", name) for name in SINGLE],
)
def test_an_engine_that_was_edited_is_refused_by_its_sentence(
    made: Path, tmp_path: Path, dialect: str, name: str
) -> None:
    edit, sentence = (MIXED if dialect == "mixed" else SINGLE)[name]
    engine = shutil.copytree(made / dialect, tmp_path / "engine")
    edit(engine)
    with pytest.raises((ArtifactError, DeployError), match=sentence) as refusal:
        check_engine(engine)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dialect", ["mixed", "single"])
def test_an_engine_that_nobody_touched_passes_after_its_manifest_was_written_again(
    made: Path, tmp_path: Path, dialect: str
) -> None:
    engine = shutil.copytree(made / dialect, tmp_path / "engine")
    redigest(engine)
    tensors(lambda stored: None)(engine)
    assert check_engine(engine).engine_digest != check_engine(made / dialect).engine_digest


def test_check_tells_it_by_exit_code_2_and_one_sentence(
    made: Path, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    engine = shutil.copytree(made / "mixed", tmp_path / "engine")
    checked = command("build", "--check", engine, "--checkpoint", made / "artifact", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["compared"] > 0
    tensors(swap_nibbles)(engine)
    ended = command("build", "--check", engine)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: tensor ")
    assert ended.err.count("\n") == 1

"""What somebody could do to an engine of SGLang that `build` made, each refused by a sentence of
its own, though engine.json was written again for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.sglang_builds import build_sglang
from support.trtllm_builds import make_buildable
from support.trtllm_directories import edit_tensors, redigest
from torch import Tensor

from deepseek.errors import ArtifactError, DeployError
from deepseek.sglang.check import check_engine
from deepseek.tensor_files import read_header

pytestmark = pytest.mark.heavy
Edit = Callable[[Path], None]

LAYER_1 = "model-layer-00001.safetensors"
EXPERT = "model.layers.1.mlp.experts.2"
O_PROJ = "model.layers.1.self_attn.o_proj"
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `w4afp8` and `groups`; nobody may change them."""
    root = tmp_path_factory.mktemp("mutations")
    artifact = make_buildable(root, "int4", layers=2)
    build_sglang(artifact.directory, root / "w4afp8", tp=2, ep=2, dialect="w4afp8")
    build_sglang(artifact.directory, root / "groups", tp=2, ep=2)
    return root


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    """An edit of the tensors of layer 1; index and engine.json are written again for it."""

    def edit(directory: Path) -> None:
        edit_tensors(directory, LAYER_1, change)
        places = {
            name: path.name
            for path in sorted(directory.glob("*.safetensors"))
            for name in read_header(path).tensors
        }
        index = {"metadata": {}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        redigest(directory)

    return edit


def text(name: str, old: str, new: str) -> Edit:
    def edit(directory: Path) -> None:
        content = (directory / name).read_text()
        assert old in content, name
        (directory / name).write_text(content.replace(old, new))
        redigest(directory)

    return edit


def config(change: Callable[[dict[str, object]], object]) -> Edit:
    def edit(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text())
        change(content)
        (directory / "config.json").write_text(json.dumps(content))
        redigest(directory)

    return edit


#: What is done -> (folder, the edit, what the sentence says).
CASES: dict[str, tuple[str, Edit, str]] = {
    "input scale of one expert": (
        "w4afp8",
        tensors(lambda t: t.update({f"{EXPERT}.up_proj.input_scale": torch.tensor([64.0])})),
        f"tensor {EXPERT}.up_proj.input_scale is 64, where a power of two",
    ),
    "input scale absent": (
        "w4afp8",
        tensors(lambda t: t.pop(f"{EXPERT}.down_proj.input_scale")),
        f"tensor {EXPERT}.down_proj.input_scale is in no file",
    ),
    "tensor that nothing reads": (
        "w4afp8",
        tensors(lambda t: t.update({f"{EXPERT}.down_proj.weight_shape": torch.ones(2)})),
        f"holds {EXPERT}.down_proj.weight_shape, which SGLang never reads",
    ),
    "key of gate_proj without a parameter": (
        "w4afp8",
        tensors(
            lambda t: t.update({"model.layers.0.mlp.gate_proj.weight_scale": torch.ones(2, 2)})
        ),
        "model.layers.0.mlp.gate_proj.weight_scale, for which SGLang has no parameter",
    ),
    "codes of the other half": (
        "w4afp8",
        tensors(
            lambda t: t.update(
                {f"{EXPERT}.gate_proj.weight": t.pop(f"{EXPERT}.gate_proj.weight")[:1]}
            )
        ),
        "SGLang would say nothing",
    ),
    "F32 scale": (
        "w4afp8",
        tensors(
            lambda t: t.update(
                {
                    f"{EXPERT}.gate_proj.weight_scale_inv": t[
                        f"{EXPERT}.gate_proj.weight_scale_inv"
                    ].float()
                }
            )
        ),
        f"tensor {EXPERT}.gate_proj.weight_scale_inv in ",
    ),
    "another method": (
        "w4afp8",
        config(lambda c: c.update(quantization_config={"quant_method": "blockwise_int8"})),
        "has another quantization_config.quant_method than the formats of engine.json ask for",
    ),
    "no method": (
        "w4afp8",
        config(lambda c: c.pop("quantization_config")),
        "has another quantization_config than the formats of engine.json ask for",
    ),
    "another top-level format": (
        "groups",
        text(
            "config.json",
            '"format": "pack-quantized",\n    "global',
            '"format": "mixed-precision",\n    "global',
        ),
        "has another quantization_config.format than the formats of engine.json ask for",
    ),
    "a shape of what is fused": (
        "groups",
        tensors(lambda t: t.update({f"{KV_A}.weight_shape": torch.tensor([160, 256])})),
        f"holds {KV_A}.weight_shape, which SGLang never reads",
    ),
    "fused shared experts": (
        "groups",
        text("sglang.yaml", "disable-shared-experts-fusion: true\n", ""),
        "disable-shared-experts-fusion is not set, but the shared expert has another format",
    ),
    "a flag": (
        "groups",
        text("sglang.yaml", "dtype: bfloat16\n", "dtype: bfloat16\nquantization: w8a8_int8\n"),
        "has the quant_method 'compressed-tensors', but the flag says 'w8a8_int8'; they must agree",
    ),
    "an unknown argument": (
        "groups",
        text("sglang.yaml", "dtype: bfloat16\n", "dtype: bfloat16\ntrust-remote-code: true\n"),
        "sglang.yaml: trust-remote-code: Extra inputs are not permitted",
    ),
    "other ranks": (
        "groups",
        text("sglang.yaml", "tensor-parallel-size: 2", "tensor-parallel-size: 4"),
        "tensor-parallel-size 4 and expert-parallel-size 2 are not those that the engine",
    ),
    "another KV cache": (
        "groups",
        text("sglang.yaml", "kv-cache-dtype: bf16", "kv-cache-dtype: fp8_e4m3"),
        "kv-cache-dtype is fp8_e4m3, but the engine was built and is judged with a KV cache in",
    ),
    "a weight that is not there": (
        "groups",
        tensors(lambda t: t.pop(f"{O_PROJ}.weight")),
        f"tensor {O_PROJ}.weight is in no file, so that {O_PROJ} keeps what memory happens",
    ),
    "a changed value": (
        "groups",
        tensors(lambda t: t.update({NORM: t[NORM] * 2})),
        f"{NORM}",
    ),
    "code": (
        "groups",
        config(lambda c: c.update(auto_map={"AutoModel": "x.Model"})),
        "has auto_map, which names code to run",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_changed_directory_is_refused(made: Path, tmp_path: Path, case: str) -> None:
    folder, edit, says = CASES[case]
    shutil.copytree(made / folder, tmp_path / "engine")
    edit(tmp_path / "engine")
    with pytest.raises((ArtifactError, DeployError)) as refused:
        check_engine(tmp_path / "engine")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("folder", ["w4afp8", "groups"])
def test_an_unchanged_copy_passes(made: Path, tmp_path: Path, folder: str) -> None:
    shutil.copytree(made / folder, tmp_path / "engine")
    redigest(tmp_path / "engine")
    report = check_engine(tmp_path / "engine")
    assert report.hashed_bytes > 0
    assert report.verified > 0

"""Checkpoints that `build --target vllm` takes, small enough for two ranks, and edits of what it
made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.synthetic import quantize_plainly, write_checkpoint
from support.trtllm_directories import edit_tensors, index_as_it_is, redigest
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.recipe import Recipe, load_recipe
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions, BuildResult

#: Shapes that two ranks divide in whole FP8 tiles and groups of 128.
SHAPE: dict[str, Any] = {
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
EXPERT = "model.layers.1.mlp.experts.2"
LAYER_0, LAYER_1 = "model-layer-00000.safetensors", "model-layer-00001.safetensors"
Edit = Callable[[Path], None]


def make_vllm_artifact(root: Path, recipe: Recipe | str, **changes: Any) -> ArtifactReader:
    """ROOT/RECIPE, quantized plainly from ROOT/source, which is made where it is absent."""
    if not (root / "source").exists():
        write_checkpoint(root / "source", **(SHAPE | changes))
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    quantize_plainly(root / "source", chosen, root / chosen.name)
    return ArtifactReader(root / chosen.name)


def build_vllm_engine(checkpoint: Path, output: Path, **options: Any) -> BuildResult:
    """Build for vLLM, on two ranks unless `options` say otherwise."""
    return run_build(checkpoint, "vllm", output, BuildOptions(**{"tp": 2, **options}))


def tensors(change: Callable[[dict[str, Tensor]], None], file: str = LAYER_1) -> Edit:
    """An edit of the tensors of one file; index and engine.json are written again for it."""

    def edit(directory: Path) -> None:
        edit_tensors(directory, file, change)
        index_as_it_is(directory)
        redigest(directory)

    return edit


def config(change: Callable[[dict[str, Any]], None]) -> Edit:
    """An edit of config.json; engine.json is written again for it."""

    def edit(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        redigest(directory)

    return edit


def lines(old: str, new: str) -> Edit:
    """An edit of vllm.yaml; engine.json is written again for it."""

    def edit(directory: Path) -> None:
        path = directory / "vllm.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        redigest(directory)

    return edit


def remove(name: str) -> Edit:
    def change(stored: dict[str, Tensor]) -> None:
        del stored[name]

    return tensors(change)


def _ignore_o_proj(content: dict[str, Any]) -> None:
    content["quantization_config"]["ignore"].append("re:.*[.]o_proj$")


def _ignore_part(content: dict[str, Any]) -> None:
    content["quantization_config"]["ignore"].append("re:.*[.]up_proj$")


def _other_groups(content: dict[str, Any]) -> None:
    for group in content["quantization_config"]["config_groups"].values():
        if group["weights"].get("group_size"):
            group["weights"]["group_size"] = 64


def _eight_bits(content: dict[str, Any]) -> None:
    for group in content["quantization_config"]["config_groups"].values():
        if group["weights"].get("num_bits") == 4:
            group["weights"]["num_bits"] = 8


#: What somebody could do to an INT4 engine: name -> (edit, words of the refusal of `--check`).
MUTATIONS: dict[str, tuple[Edit, str]] = {
    "missing expert scale": (
        remove(f"{EXPERT}.gate_proj.weight_scale"),
        f"{EXPERT}.gate_proj.weight_scale is in no file",
    ),
    "missing tile scale": (
        remove("model.layers.1.self_attn.o_proj.weight_scale"),
        "o_proj.weight_scale is in no file",
    ),
    "missing norm": (
        remove("model.layers.1.input_layernorm.weight"),
        "input_layernorm.weight is in no file",
    ),
    "one scale for all groups": (
        tensors(
            lambda stored: stored.update(
                {
                    f"{EXPERT}.gate_proj.weight_scale": stored[f"{EXPERT}.gate_proj.weight_scale"][
                        :, :1
                    ].contiguous()
                }
            )
        ),
        "is copied into a part",
    ),
    "smaller expert": (
        tensors(
            lambda stored: stored.update(
                {
                    f"{EXPERT}.down_proj.weight_packed": stored[
                        f"{EXPERT}.down_proj.weight_packed"
                    ][:128].contiguous()
                }
            )
        ),
        "is copied into a part",
    ),
    "more rows": (
        tensors(
            lambda stored: stored.update(
                {
                    "model.layers.1.self_attn.q_b_proj.weight": stored[
                        "model.layers.1.self_attn.q_b_proj.weight"
                    ].repeat(2, 1)
                }
            )
        ),
        "are never read",
    ),
    "fewer rows": (
        tensors(
            lambda stored: stored.update(
                {
                    "model.layers.1.self_attn.q_b_proj.weight": stored[
                        "model.layers.1.self_attn.q_b_proj.weight"
                    ][:128].contiguous()
                }
            )
        ),
        "where vLLM takes",
    ),
    "scales in another type": (
        tensors(
            lambda stored: stored.update(
                {f"{EXPERT}.up_proj.weight_scale": stored[f"{EXPERT}.up_proj.weight_scale"].float()}
            )
        ),
        "converted to bfloat16",
    ),
    "stray tensor": (
        tensors(
            lambda stored: stored.update(
                {
                    "model.layers.1.self_attn.gamma": stored[
                        "model.layers.1.input_layernorm.weight"
                    ].clone()
                }
            )
        ),
        "for which vLLM has no parameter",
    ),
    "ignored linear": (config(_ignore_o_proj), "another quantization_config.ignore"),
    "ignored part": (config(_ignore_part), "another quantization_config.ignore"),
    "other group size": (config(_other_groups), "group_size than the formats"),
    "other bits": (config(_eight_bits), "num_bits than the formats"),
}

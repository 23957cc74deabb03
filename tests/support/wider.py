"""The example model with more attention heads, and the same function.

Each head is there several times, and the output projection of a copy is divided by their number:
copies attend alike, and their parts add up to what the one head gave. For a power of two that is
exact in every format. TensorRT-LLM divides heads over ranks, so eight ranks need eight heads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Tensors with a row for each head's value, and those with such columns.
_ROWS, _COLUMNS = ("q_b_proj", "kv_b_proj"), ("o_proj",)


def widen(source: Path, output: Path, times: int) -> None:
    """Write the checkpoint with `times` as many heads, a power of two. Scales of FP8 tiles are
    repeated with their tiles, which heads fill whole or share with their copies.

    Raises:
        ValueError: the heads of one copy end within a tile.
    """
    config = json.loads((source / "config.json").read_text())
    heads = config["num_attention_heads"]
    nope, rope, value = (
        config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    for width in (heads * (nope + rope), heads * (nope + value), heads * value):
        if width % 128:
            raise ValueError(f"{width} values of all heads are no whole tiles of 128")
    output.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copy(path, output / path.name)
    config |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), heads * times)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    index_path = output / "model.safetensors.index.json"
    total = 0
    for path in sorted(source.glob("*.safetensors")):
        tensors = {name: _wider(name, t, times) for name, t in load_file(path).items()}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, output / path.name, metadata={"format": "pt"})
    index = json.loads(index_path.read_text())
    index["metadata"]["total_size"] = total
    index_path.write_text(json.dumps(index, indent=2) + "\n")


def _wider(name: str, tensor: Tensor, times: int) -> Tensor:
    module, _, suffix = name.rpartition(".")
    kind = module.rpartition(".")[2]
    if kind in _ROWS:
        return torch.cat([tensor] * times, dim=0).contiguous()
    if kind in _COLUMNS:
        wide = torch.cat([tensor] * times, dim=1)
        # The scale carries the division where there is one.
        return (wide / times).contiguous() if suffix == "weight_scale_inv" else wide.contiguous()
    return tensor

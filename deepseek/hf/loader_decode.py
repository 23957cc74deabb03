"""How transformers decodes one linear: the schemes of its config, packed words, FP8 tiles.

Read in compressed-tensors 0.20 (`PackedQuantizationCompressor`, `dequantize`) and in transformers
5.23's `Fp8Dequantize`. The arithmetic is theirs: codes in the type of the scale, one product.

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.artifact.loader_files import LoaderRefusal


@dataclass(frozen=True, slots=True)
class Group:
    """One config group: what its targets name, and the scheme of its weights."""

    names_experts: bool
    names_class: bool
    form: str
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None

    @property
    def is_fp8(self) -> bool:
        """Whether the weights are FP8."""
        return self.kind == "float" and self.bits == 8

    def decode(self, parts: Mapping[str, Tensor], where: str) -> Tensor:
        """A linear that is no expert, by this scheme, in the type of its scale.

        Raises:
            LoaderRefusal: the tensors are not those of the scheme.
        """
        if self.form == "pack-quantized":
            return decode_packed(parts, self, where)
        if "weight" not in parts:
            raise LoaderRefusal(
                f"{where} is packed, and transformers decodes it as {self.form}, the format of "
                "the first group without experts; build again"
            )
        codes, scale = parts["weight"], parts["weight_scale"]
        if self.strategy == "block":
            rows, columns = (torch.arange(size, device=scale.device) // 128 for size in codes.shape)
            scale = scale[rows][:, columns]
        return codes.to(scale.dtype) * scale


def read_groups(raw: Mapping[str, Any], *, where: str) -> list[Group]:
    """The config groups in order.

    Raises:
        LoaderRefusal: there is none, or one is not what the library takes.
    """
    groups = []
    try:
        for group in raw["config_groups"].values():
            weights, targets = group["weights"], group["targets"]
            groups.append(
                Group(
                    names_experts=any(t.startswith("re:") and "experts" in t for t in targets),
                    names_class=any(not t.startswith("re:") for t in targets),
                    form=str(group.get("format") or raw.get("format")),
                    bits=int(weights["num_bits"]),
                    kind=str(weights["type"]),
                    symmetric=bool(weights["symmetric"]),
                    strategy=str(weights["strategy"]),
                    group_size=weights.get("group_size"),
                )
            )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise LoaderRefusal(f"{where}: quantization_config is not readable; build again") from None
    if not groups:
        raise LoaderRefusal(f"{where}: quantization_config has no config_groups; build again")
    return groups


def decode_packed(parts: Mapping[str, Tensor], group: Group, where: str) -> Tensor:
    """Packed words of a linear [N, K] in the type of the scale: (code - zero point) * scale.

    Raises:
        LoaderRefusal: tensors are missing or do not fit the scheme.
    """
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        if name not in parts:
            raise LoaderRefusal(f"{where} has no {name}, which transformers needs; build again")
    words, scale = parts["weight_packed"], parts["weight_scale"]
    if words.is_meta:  # the shape is a value; without values the words alone say it
        outputs, inputs = words.shape[0], words.shape[1] * 32 // group.bits
    else:
        outputs, inputs = (int(size) for size in parts["weight_shape"].tolist())
    codes = _unpack(words, group.bits)[:, :inputs]
    if codes.shape != (outputs, inputs):
        raise LoaderRefusal(
            f"{where} has words for {list(codes.shape)} of {group.bits} bits, not for "
            f"{[outputs, inputs]}; transformers decodes all such linears by one scheme: build again"
        )
    repeat = group.group_size if group.strategy == "group" else inputs
    if not repeat or scale.shape != (outputs, -(-inputs // repeat)):
        raise LoaderRefusal(
            f"{where} has scales {list(scale.shape)} for {group.strategy}s of {repeat} in "
            f"{[outputs, inputs]}; build again"
        )
    values = codes.to(scale.dtype)
    if not group.symmetric:
        if "weight_zero_point" not in parts:
            raise LoaderRefusal(f"{where} has no weight_zero_point; build again")
        zeros = _unpack(parts["weight_zero_point"].T.contiguous(), group.bits).T[:outputs]
        values -= zeros.to(scale.dtype).repeat_interleave(repeat, 1)[:, :inputs]
    return values * scale.repeat_interleave(repeat, 1)[:, :inputs]


def decode_tiles(parts: Mapping[str, Tensor], where: str) -> Tensor:
    """FP8 tiles of a linear [N, K] in BF16, the size of a tile from the shapes; BF16 as it is.

    Raises:
        LoaderRefusal: the scales do not divide the matrix into equal tiles of 128 x 128, where the
            loader stops or, worse, takes tiles of another size.
    """
    if "weight" not in parts:
        raise LoaderRefusal(f"{where} has no weight; build again")
    codes = parts["weight"]
    if "weight_scale_inv" not in parts:
        if codes.element_size() == 1:
            raise LoaderRefusal(f"{where} has no weight_scale_inv; build again")
        return codes.to(torch.bfloat16)
    scale = parts["weight_scale_inv"]
    if any(size != 128 * count for size, count in zip(codes.shape, scale.shape, strict=True)):
        raise LoaderRefusal(
            f"{where} has {list(scale.shape)} scales for {list(codes.shape)}, and transformers "
            "takes equal tiles from the shapes, which are not 128 x 128 here; build again"
        )
    for dim in (0, 1):
        scale = scale.repeat_interleave(128, dim)
    return (codes.float() * scale).to(torch.bfloat16)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [N, W] -> codes int32 [N, W 32/bits], low bits first, offset by half the range."""
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], words.shape[1] * per_word) - (1 << (bits - 1))

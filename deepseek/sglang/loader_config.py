"""How SGLang chooses the method of a module from config.json and its flag, on Hopper.

Modeled after 0.5.23's `ModelConfig._verify_quantization`, `W4AFp8Config`, `W8A8Int8Config`,
`BlockInt8Config`, `Fp8Config` and `CompressedTensorsConfig` (`get_scheme_dict`,
`_get_scheme_from_parts`, `get_moe_scheme`) with `find_matched_target` and `should_ignore_layer`.
Its own layouts are one method for all linears, without exceptions. Among groups a linear takes the
target that its name matches, then a class that its own contains, and only then, for
`fused_qkv_a_proj_with_mqa`, what its parts match; routed experts take that of expert 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepseek import untrusted
from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.errors import ArtifactError
from deepseek.fused_loader.groups import (
    compiled,
    first_class,
    first_target,
    is_fp8,
    is_w8a8,
    is_wna16,
    packed_method,
)
from deepseek.fused_loader.modules import BF16, Method
from deepseek.inventory import HEAD

#: Formats under which a group's activations are quantized (packed ones among them, unlike vLLM).
_ACTIVATION_FORMATS = frozenset(
    {
        "naive-quantized",
        "int-quantized",
        "float-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    }
)
_PACKED = "pack-quantized"
#: A longer pattern is none that IntServe writes.
_MAX_PATTERN = 20_000
_MAX_TARGETS = 10_000
_TILE = 128


#: In FP8 tiles: as released, and in a group of compressed-tensors; and in INT8 tiles.
_TILES = Method("fp8", scale="weight_scale_inv", tiles=torch.float8_e4m3fn)
_FP8 = Method("fp8", tiles=torch.float8_e4m3fn)
_INT8_TILES = Method("int8-tiles", scale="weight_scale_inv", tiles=torch.int8)
_OWN = {
    "w4afp8": (_TILES, Method("w4afp8", bits=4, group=_TILE, scale="weight_scale_inv")),
    "w8a8_int8": (Method("w8a8", bits=8), Method("w8a8", bits=8)),
    "blockwise_int8": (_INT8_TILES, _INT8_TILES),
}


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """`quantization_config` of one config.json. `kind` is its method, None without one.

    `groups` maps every target to its group, in order; `ignore` are names or patterns.
    """

    source: Path
    kind: str | None = None
    format: str | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    @property
    def knows_tiles(self) -> bool:
        """Whether the size of FP8 tiles is found: under the target `Linear` only, among groups."""
        if self.kind != "compressed-tensors":
            return True
        weights = self.groups.get("Linear", {}).get("weights", {})
        return weights.get("block_structure") == [_TILE, _TILE]

    def linear(self, name: str, parts: tuple[str, ...], module_class: str) -> Method:
        """The method of the linear `name`; `parts` are the roles that it is fused of.

        Raises:
            LoaderRefusal: SGLang would stop.
        """
        if self.kind is None:
            return BF16
        if self.kind in _OWN:
            return _OWN[self.kind][0]
        if self.kind == "fp8":
            return BF16 if name in self.ignore else _TILES
        group = self._group(name, parts, module_class)
        return BF16 if group is None else self._linear_scheme(name, group)

    def experts(self, name: str) -> Method:
        """The method of the routed experts `name` (`model.layers.N.mlp.experts`).

        Raises:
            LoaderRefusal: SGLang would stop.
        """
        if self.kind is None:
            return BF16
        if self.kind in _OWN:
            return _OWN[self.kind][1]
        if self.kind == "fp8":
            return BF16 if name in self.ignore else _TILES
        roles = ("gate_proj", "up_proj", "down_proj")
        found = [self._group(f"{name}.0.{role}", (role,), "FusedMoE") for role in roles]
        if any(group != found[0] for group in found):
            raise LoaderRefusal(
                f"{self.source} gives the projections of {name} different groups; SGLang needs one"
            )
        return BF16 if found[0] is None else self._expert_scheme(name, found[0])

    def head(self) -> Method:
        """The method of the language model's head: BF16 unless a group names it
        (`get_lm_head_scheme`). SGLang's own layouts leave it alone.

        Raises:
            LoaderRefusal: SGLang would stop.
        """
        if self.kind != "compressed-tensors" or first_target(HEAD, self.ignore):
            return BF16
        target = first_target(HEAD, self.groups)
        return BF16 if target is None else self._linear_scheme(HEAD, self.groups[target])

    def _group(
        self, name: str, parts: tuple[str, ...], module_class: str
    ) -> Mapping[str, Any] | None:
        parent, _, role = name.rpartition(".")
        shards = [f"{parent}.{part}" for part in parts]
        is_mapped = role == "fused_qkv_a_proj_with_mqa"
        if is_mapped and name not in self.ignore:
            ignored = [first_target(shard, self.ignore) is not None for shard in shards]
            if any(ignored) and not all(ignored):
                raise LoaderRefusal(
                    f"{self.source} ignores a part of {name} only, which SGLang fuses; ignore all "
                    "of them or none"
                )
            if all(ignored):
                return None
        elif first_target(name, self.ignore):
            return None
        target = first_target(name, self.groups) or first_class(module_class, self.groups)
        if target is None and module_class == "FusedMoE" and "Linear" in self.groups:
            target = "Linear"
        if target is None and is_mapped:
            matched = [first_target(shard, self.groups) for shard in shards]
            target = matched[0] if all(matched) else None
        if target is None:
            raise LoaderRefusal(
                f"{self.source} has no group for {name}, and SGLang stops where it finds none"
            )
        return self.groups[target]

    def _linear_scheme(self, name: str, group: Mapping[str, Any]) -> Method:
        weights, inputs = group["weights"], group["input_activations"]
        form = group.get("format") or self.format
        if inputs is None and is_wna16(weights):
            packed = packed_method(weights)
            if packed is None or form != _PACKED:
                raise self._no_scheme(name, weights, inputs, form)
            return packed
        if form in _ACTIVATION_FORMATS:
            if is_fp8(weights, inputs):
                return _FP8
            if is_w8a8(weights, inputs):
                return Method("w8a8", bits=8)
        raise self._no_scheme(name, weights, inputs, form)

    def _expert_scheme(self, name: str, group: Mapping[str, Any]) -> Method:
        weights, inputs = group["weights"], group["input_activations"]
        form = group.get("format") or self.format
        if inputs is None and is_wna16(weights):
            packed = packed_method(weights)
            # The format at the top is read here, whatever the group says.
            if packed is None or self.format != _PACKED:
                raise self._no_scheme(name, weights, inputs, self.format)
            if not packed.symmetric:
                raise LoaderRefusal(
                    f"{self.source} gives {name} zero points, which SGLang does not turn as it "
                    "turns the weights, so that they do not fit"
                )
            return packed
        if is_fp8(weights, inputs):
            return _FP8
        raise self._no_scheme(name, weights, inputs, form)

    def _no_scheme(self, name: str, weights: Any, inputs: Any, form: Any) -> LoaderRefusal:
        bits, kind = weights.get("num_bits"), weights.get("type")
        what = f"{bits}-bit {kind} weights"
        if inputs is not None:
            state = "dynamic" if inputs.get("dynamic") else "static"
            what += f" and {state} {inputs.get('num_bits')}-bit {inputs.get('type')} inputs"
        return LoaderRefusal(
            f"{self.source} gives {name} {untrusted.show(what)} as {untrusted.show(form)}, for "
            "which SGLang has no scheme"
        )


def read_quant_config(directory: Path, quantization: str | None = None) -> QuantConfig:
    """What SGLang makes of config.json and the flag `--quantization`.

    Raises:
        ArtifactError: it is no JSON object.
        LoaderRefusal: SGLang would stop at it.
    """
    path = directory / "config.json"
    try:
        raw = untrusted.read_json_object(path, root=directory).get("quantization_config")
    except untrusted.UnusableFileError as error:
        raise ArtifactError(f"{path} {error}") from error
    if raw is None:
        if quantization not in (None, "w8a8_int8"):
            raise LoaderRefusal(
                f"{path} has no quantization_config, and the method {untrusted.show(quantization)} "
                "is not modeled without one"
            )
        return QuantConfig(path, quantization)
    if not isinstance(raw, dict):
        raise LoaderRefusal(f"{path} has a quantization_config that is no object")
    method = raw.get("quant_method")
    if quantization not in (None, method):
        raise LoaderRefusal(
            f"{path} has the quant_method {untrusted.show(method)}, but the flag says "
            f"{untrusted.show(quantization)}; they must agree, build again"
        )
    match method:
        case "fp8":
            return _read_fp8(path, raw)
        case "compressed-tensors":
            return _read_groups(path, raw)
        case "w4afp8":
            return QuantConfig(path, "w4afp8")
        case "blockwise_int8":
            tiles = raw.get("weight_block_size"), raw.get("activation_scheme")
            if tiles != ([_TILE, _TILE], "dynamic") or raw.get("ignored_layers"):
                raise LoaderRefusal(
                    f"{path} has blockwise_int8, but not as tiles of {_TILE} with dynamic "
                    "activations for every linear"
                )
            return QuantConfig(path, "blockwise_int8")
    raise LoaderRefusal(
        f"{path} has the quant_method {untrusted.show(method)}, which is not modeled here"
    )


def _read_fp8(path: Path, raw: Mapping[str, Any]) -> QuantConfig:
    if raw.get("activation_scheme") != "dynamic" or raw.get("weight_block_size") != [_TILE, _TILE]:
        raise LoaderRefusal(f"{path} is FP8, but not in blocks of {_TILE} with dynamic activations")
    ignore = raw.get("ignored_layers") or raw.get("modules_to_not_convert") or []
    if not isinstance(ignore, list):
        raise LoaderRefusal(f"{path} has ignored_layers that are no list")
    return QuantConfig(path, "fp8", ignore=tuple(map(str, ignore)))


def _read_groups(path: Path, raw: Mapping[str, Any]) -> QuantConfig:
    groups: dict[str, Mapping[str, Any]] = {}
    listed = raw.get("config_groups")
    if not isinstance(listed, dict):
        raise LoaderRefusal(f"{path} has no config_groups")
    form = raw.get("format")
    for name, group in listed.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not isinstance(group.get("weights"), dict):
            raise LoaderRefusal(f"{path} has the group {untrusted.show(name)} without targets")
        inputs = group.get("input_activations")
        for target in targets:
            groups[str(target)] = dict(group) | {"input_activations": inputs or None}
    ignore = raw.get("ignore") or []
    if not isinstance(ignore, list):
        raise LoaderRefusal(f"{path} has an ignore that is no list")
    names = [*groups, *map(str, ignore)]
    if len(names) > _MAX_TARGETS or any(len(name) > _MAX_PATTERN for name in names):
        raise LoaderRefusal(f"{path} has more or longer targets than IntServe writes")
    for name in names:
        try:
            compiled(name)
        except re.error as error:
            raise LoaderRefusal(f"{path} has the target {untrusted.show(name)}: {error}") from error
    return QuantConfig(
        path,
        "compressed-tensors",
        None if form is None else str(form),
        groups,
        tuple(map(str, ignore)),
    )

"""How vLLM chooses the method of a module from config.json, on Hopper.

Modeled after 0.32's `CompressedTensorsConfig` (`get_scheme_dict`, `_get_scheme_from_parts`),
`CompressedTensorsMoEMethod.get_moe_method`, `Fp8Config`, and their helpers `find_matched_target`
and `should_ignore_layer`. A fused linear takes the group of its *first* part; routed experts take
that of expert 0; what matches nothing is held in BF16. None of this is an error there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from deepseek import untrusted
from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.errors import ArtifactError
from deepseek.fused_loader.groups import (
    compiled,
    first_class,
    first_target,
    is_fp8,
    is_token_int8,
    is_w8a8,
    is_wna16,
    packed_method,
)
from deepseek.fused_loader.modules import BF16, Method
from deepseek.inventory import HEAD

#: Formats under which a group's activations are quantized.
_ACTIVATION_FORMATS = frozenset(
    {"naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized"}
)
_PACKED = "pack-quantized"
#: A longer pattern is none that IntServe writes.
_MAX_PATTERN = 20_000
_MAX_TARGETS = 10_000
_TILE = 128


#: In FP8 tiles: as released, and in a group of compressed-tensors.
_RELEASED = Method("fp8", scale="weight_scale_inv", tiles=torch.float8_e4m3fn)
_FP8 = Method("fp8", tiles=torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """`quantization_config` of one config.json. `kind` is its method, None without one.

    `groups` maps every target to its group, in order; `ignore` are names or patterns.
    """

    source: Path
    kind: Literal["compressed-tensors", "fp8"] | None = None
    format: str | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def linear(self, name: str, parts: tuple[str, ...], module_class: str) -> Method:
        """The method of the linear `name`; `parts` are the roles that it is fused of.

        Raises:
            LoaderRefusal: vLLM would stop.
        """
        if self.kind is None:
            return BF16
        parent = name.rpartition(".")[0]
        shards = [f"{parent}.{part}" for part in parts]
        if self.kind == "fp8":
            skipped = [self._listed(shard) for shard in shards]
            if not self._listed(name) and any(skipped) and not all(skipped):
                raise LoaderRefusal(
                    f"{self.source} leaves out a part of {name} only, which vLLM fuses; list all "
                    "of them or none"
                )
            is_skipped = self._listed(name) or all(skipped)
            return BF16 if is_skipped else _RELEASED
        group = self._group(name, shards, module_class)
        return BF16 if group is None else self._linear_scheme(name, group)

    def experts(self, name: str) -> Method:
        """The method of the routed experts `name` (`model.layers.N.mlp.experts`).

        Raises:
            LoaderRefusal: vLLM would stop.
        """
        if self.kind is None:
            return BF16
        if self.kind == "fp8":
            if self._listed(name):
                return BF16
            return _RELEASED
        parts = ("gate_proj", "up_proj", "down_proj")
        found = [self._group(f"{name}.0.{part}", [f"{name}.0.{part}"], "") for part in parts]
        if any(group != found[0] for group in found):
            raise LoaderRefusal(
                f"{self.source} gives the projections of {name} different groups; vLLM needs one"
            )
        return BF16 if found[0] is None else self._expert_scheme(name, found[0])

    def head(self) -> Method:
        """The method of the language model's head: BF16 unless a group names it.

        Raises:
            LoaderRefusal: vLLM would stop.
        """
        if self.kind != "compressed-tensors":
            return BF16
        group = self._group(HEAD, [HEAD], "ParallelLMHead")
        return BF16 if group is None else self._linear_scheme(HEAD, group)

    def _listed(self, name: str) -> bool:
        return name in self.ignore

    def _group(self, name: str, shards: list[str], module_class: str) -> Mapping[str, Any] | None:
        if not first_target(name, self.ignore):
            ignored = [first_target(shard, self.ignore) is not None for shard in shards]
            if any(ignored) and not all(ignored):
                raise LoaderRefusal(
                    f"{self.source} ignores a part of {name} only, which vLLM fuses; ignore all "
                    "of them or none"
                )
            if not all(ignored):
                target = first_target(name, self.groups)
                if target is None and len(shards) > 1:
                    matched = [first_target(shard, self.groups) for shard in shards]
                    target = matched[0] if all(matched) else None
                if target is None and module_class:
                    target = first_class(module_class, self.groups)
                return None if target is None else self.groups[target]
        return None

    def _linear_scheme(self, name: str, group: Mapping[str, Any]) -> Method:
        weights, inputs = group["weights"], group["input_activations"]
        form = group.get("format") or self.format
        # `_is_wNaM_int`: kernels are chosen by the weight alone, and leave INT8 inputs as they are.
        is_packed = is_wna16(weights) and (inputs is None or is_token_int8(inputs))
        packed = packed_method(weights) if is_packed else None
        if packed is not None and form == _PACKED:
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
            if packed is None or form != _PACKED:
                raise self._no_scheme(name, weights, inputs, form)
            return packed
        if is_fp8(weights, inputs):
            return _FP8
        if is_w8a8(weights, inputs) and weights.get("strategy") == "channel":
            return Method("w8a8", bits=8)
        raise self._no_scheme(name, weights, inputs, form)

    def _no_scheme(self, name: str, weights: Any, inputs: Any, form: Any) -> LoaderRefusal:
        bits, kind = weights.get("num_bits"), weights.get("type")
        what = f"{bits}-bit {kind} weights"
        if inputs is not None:
            state = "dynamic" if inputs.get("dynamic") else "static"
            what += f" and {state} {inputs.get('num_bits')}-bit {inputs.get('type')} inputs"
        return LoaderRefusal(
            f"{self.source} gives {name} {untrusted.show(what)} as {untrusted.show(form)}, for "
            "which vLLM has no scheme"
        )


def read_quant_config(directory: Path) -> QuantConfig:
    """What vLLM makes of config.json.

    Raises:
        ArtifactError: it is no JSON object.
        LoaderRefusal: vLLM would stop at it.
    """
    path = directory / "config.json"
    try:
        raw = untrusted.read_json_object(path, root=directory).get("quantization_config")
    except untrusted.UnusableFileError as error:
        raise ArtifactError(f"{path} {error}") from error
    if raw is None:
        return QuantConfig(path)
    if not isinstance(raw, dict):
        raise LoaderRefusal(f"{path} has a quantization_config that is no object")
    method = raw.get("quant_method")
    if method == "fp8":
        return _read_fp8(path, raw)
    if method == "compressed-tensors":
        return _read_groups(path, raw)
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
        by_format = (group.get("format") or form) in _ACTIVATION_FORMATS
        if by_format and not inputs and group["weights"].get("type") != "float":
            raise LoaderRefusal(  # an assertion there
                f"{path} has the group {untrusted.show(name)} in a format with quantized "
                "activations, but without input_activations"
            )
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

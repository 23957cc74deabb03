"""What TensorRT-LLM takes the quantization of each module to be, from the files of a directory.

Two texts of the loader are told apart. The older one (1.2.1) reads the layers of MIXED_PRECISION
from `quant_cfg.json` and matches exclusions with plain globs. The newer one (1.3.0rc29) also takes
them from `hf_quant_config.json`, excludes a module when an ancestor of it is excluded, and never
keeps `kv_b_proj` in FP8 for a checkpoint that only config.json describes. Of 1.2 two states were
read, one of which stops without `quant_cfg.json`; which of them 1.2.1 has is not known, so the file
must be there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepseek import untrusted
from deepseek.errors import ArtifactError
from deepseek.trtllm.loader_files import LoaderRefusal

HF_QUANT_CONFIG, QUANT_CFG, CONFIG = "hf_quant_config.json", "quant_cfg.json", "config.json"

#: Which text of the loader a version has.
Text = Literal["older", "newer"]
TEXTS: dict[str, Text] = {"1.2.1": "older", "1.3.0rc29": "newer"}

#: The ways of loading that are modeled, by quant_algo. Another algo of a module that is loaded is
#: refused: no directory of ours asks for it.
Method = Literal["bf16", "fp8-block", "int4-fp8", "int8"]
_METHODS: dict[str | None, Method] = {
    None: "bf16",
    "FP8_BLOCK_SCALES": "fp8-block",
    "W4A8_AWQ": "int4-fp8",
    "W8A16": "int8",
}
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True)
class Quant:
    """The quantization of one module: `algo` None is BF16. `group_size` matters to the sharding of
    dense MLPs only."""

    algo: str | None
    group_size: int | None


#: What excluded modules and unquantized checkpoints get.
PLAIN = Quant(None, 128)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The quantization of a directory. `layers` are the entries of MIXED_PRECISION by module name,
    None under one algo. `source` is the file that was believed."""

    text: Text
    source: str | None
    default: Quant
    kv_algo: str | None
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, Quant] | None = None

    def excludes(self, name: str) -> bool:
        """Whether an exclusion names the module (in the newer text: or one that holds it)."""
        while True:
            if any(self._matches(name, pattern) for pattern in self.exclude):
                return True
            if self.text == "older" or "." not in name:
                return False
            name = name.rpartition(".")[0]

    def linear(self, name: str) -> Method:
        """How a linear is loaded: by the entry of exactly its name."""
        quant = (self.layers or {}).get(name, self.default)
        return self._method(name, PLAIN if self.excludes(name) else quant)

    def gate_up(self, name: str) -> Method:
        """How a fused gate and up is loaded: by the first entry whose name contains the name of
        the fused linear or of `gate_proj`."""
        gate, up = (name.replace("gate_up_proj", role) for role in ("gate_proj", "up_proj"))
        quant = self._first(gate, name)
        excluded = any(self.excludes(candidate) for candidate in (name, gate, up))
        return self._method(name, PLAIN if excluded else quant)

    def experts(self, name: str) -> Method:
        """How the routed experts of a layer are loaded: by the first entry that contains the name
        of all of them. The layout of INT4 weights is looked up again, by the exact name.

        Raises:
            LoaderRefusal: INT4 experts are listed one by one, so that the second look-up fails.
        """
        layer = name.removesuffix(".mlp.experts")
        excluded = self.excludes(name) or (self.layers is None and self.excludes(layer))
        method = self._method(name, PLAIN if excluded else self._first(name))
        exact = (self.layers or {}).get(name, self.default)
        if method == "int4-fp8" and exact.algo != "W4A8_AWQ":
            raise LoaderRefusal(
                f"{self.source} lists experts of {name} one by one; TensorRT-LLM looks up exactly "
                f"{name} for W4A8_AWQ and would otherwise read another layout"
            )
        return method

    @property
    def dequantizes_kv_b(self) -> bool:
        """Whether an exclusion matches the bare name `kv_b_proj`: then it is read in FP8 with its
        scale and becomes BF16."""
        return self.excludes("kv_b_proj")

    def dense_group_size(self, layer: int) -> int | None:
        """The group size that decides how the dense MLP of a layer is shared among ranks."""
        excluded = self.excludes(f"model.layers.{layer}")
        return (PLAIN if excluded else self.default).group_size

    def shared_group_size(self, name: str) -> int | None:
        """The same for the shared experts, `name` being `model.layers.N.mlp.shared_experts`: the
        newer text looks at their own entry, or at whether they are excluded."""
        if self.text == "older":
            return self.default.group_size
        for listed, quant in (self.layers or {}).items():
            if listed.startswith(f"{name}."):
                return quant.group_size
        return None if self.excludes(name) else self.default.group_size

    def _first(self, *parts: str) -> Quant:
        for name, quant in (self.layers or {}).items():
            if any(part in name for part in parts):
                return quant
        return self.default

    def _method(self, name: str, quant: Quant) -> Method:
        algo = None if quant.algo == MIXED else quant.algo  # what is not listed is not quantized
        if algo not in _METHODS:
            raise LoaderRefusal(
                f"{self.source} gives {name} the quant_algo {untrusted.show(algo)}, which is none "
                f"that IntServe builds for TensorRT-LLM ({', '.join(filter(None, _METHODS))})"
            )
        return _METHODS[algo]

    def _matches(self, name: str, pattern: str) -> bool:
        subtree = self.text == "newer" and pattern.endswith(".*")
        return fnmatch.fnmatchcase(name, pattern) or (
            subtree and fnmatch.fnmatchcase(name, pattern[:-2])
        )


def read_quant_config(directory: Path, version: str) -> QuantConfig:
    """The quantization of a directory as a version of the loader finds it.

    Raises:
        LoaderRefusal: the version is unknown, or its loader would stop at these files.
        ArtifactError: a file is no JSON object, or a value in it is of the wrong kind.
    """
    if version not in TEXTS:
        raise LoaderRefusal(
            f"no loader of TensorRT-LLM {untrusted.show(version)} is known here, only "
            f"{' and '.join(TEXTS)}"
        )
    text = TEXTS[version]
    if (directory / HF_QUANT_CONFIG).exists():
        return _from_modelopt(directory, text)
    native = _object(directory, CONFIG).get("quantization_config")
    if native is None:
        return QuantConfig(text, None, PLAIN, None)
    return _from_config_json(directory, native, text)


def check_dtype(directory: Path) -> None:
    """Check that config.json asks for BF16, in which the loader keeps what is not quantized.

    Raises:
        LoaderRefusal: it names another type, to which the loader would convert everything, or none.
    """
    raw = _object(directory, CONFIG)
    dtype = raw.get("torch_dtype", raw.get("dtype"))
    if dtype != "bfloat16":
        raise LoaderRefusal(
            f"{directory / CONFIG} has torch_dtype {untrusted.show(dtype)}, to which TensorRT-LLM "
            "would convert everything that is not quantized; it must be 'bfloat16'"
        )


def _from_modelopt(directory: Path, text: Text) -> QuantConfig:
    path = directory / HF_QUANT_CONFIG
    raw = _object(directory, HF_QUANT_CONFIG).get("quantization")
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} has no object `quantization`; build again")
    algo, kv_algo = _name(path, raw, "quant_algo"), _name(path, raw, "kv_cache_quant_algo")
    if algo == "fp8_pb_wo":
        algo = "FP8_BLOCK_SCALES"
    group_size, exclude = _size(path, raw), _patterns(path, raw)
    if algo == "FP8_BLOCK_SCALES" and group_size is None:
        group_size = 128
    if algo != MIXED:
        return QuantConfig(text, path.name, Quant(algo, group_size), kv_algo, exclude)

    more: dict[str, Any] = {}
    if (directory / QUANT_CFG).exists():
        more = _object(directory, QUANT_CFG)
        for key in ("kv_cache_quant_algo", "quantized_layers") if text == "older" else ():
            if key not in more:
                raise LoaderRefusal(
                    f"{directory / QUANT_CFG} has no {key}, which this version of TensorRT-LLM "
                    "looks up; build again"
                )
    elif text == "older":
        raise LoaderRefusal(
            f"{directory} has no {QUANT_CFG}, where TensorRT-LLM 1.2.1 reads the layers of "
            f"{MIXED}; build again"
        )
    path = directory / (QUANT_CFG if "quantized_layers" in more else HF_QUANT_CONFIG)
    more_kv = _name(directory / QUANT_CFG, more, "kv_cache_quant_algo")
    if "kv_cache_quant_algo" in more and more_kv != kv_algo:
        raise LoaderRefusal(  # a null in one of them hides the other without a word
            f"{directory}: kv_cache_quant_algo is {more_kv} in {QUANT_CFG} and {kv_algo} in "
            f"{HF_QUANT_CONFIG}; TensorRT-LLM stops or takes one of them, so build again"
        )
    if text == "newer":  # every key of quant_cfg.json replaces that of hf_quant_config.json
        group_size = _size(directory / QUANT_CFG, raw | more)
        exclude = _patterns(directory / QUANT_CFG, raw | more)
    layers = (raw | more if text == "newer" else more).get("quantized_layers")
    if not isinstance(layers, dict):
        raise LoaderRefusal(
            f"{directory} lists no quantized_layers for {MIXED}, neither in {QUANT_CFG} nor in "
            f"{HF_QUANT_CONFIG}; build again"
        )
    return QuantConfig(
        text, path.name, Quant(MIXED, group_size), kv_algo, exclude, _layers(path, layers)
    )


def _layers(path: Path, raw: Mapping[str, Any]) -> dict[str, Quant]:
    layers: dict[str, Quant] = {}
    for name, entry in raw.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("quant_algo"), str):
            raise ArtifactError(f"{path}: {untrusted.show_name(name)} has no quant_algo")
        parent, _, role = name.rpartition(".")
        if role == "fused_a":  # the name in the first checkpoints
            name = f"{parent}.kv_a_proj_with_mqa"
        layers[name] = Quant(entry["quant_algo"], _size(path, entry))
    return layers


def _from_config_json(directory: Path, native: Any, text: Text) -> QuantConfig:
    path = directory / CONFIG
    if not isinstance(native, dict):
        raise ArtifactError(f"{path}: quantization_config is {untrusted.json_kind(native)}")
    tiles = native.get("weight_block_size")
    if native.get("quant_method") != "fp8" or not tiles:
        raise LoaderRefusal(
            f"{path}: quantization_config is of the method "
            f"{untrusted.show(native.get('quant_method'))}; without {HF_QUANT_CONFIG} IntServe "
            "builds only FP8 blocks for TensorRT-LLM"
        )
    if tiles != [128, 128]:
        raise LoaderRefusal(
            f"{path}: weight_block_size is {untrusted.show(tiles)}; TensorRT-LLM loads [128, 128]"
        )
    exclude = [*_patterns(path, native, "modules_to_not_convert"), "*eh_proj"]
    if text == "newer":
        exclude += ["*kv_b_proj*", "*k_b_proj*"]
    return QuantConfig(text, path.name, Quant("FP8_BLOCK_SCALES", 128), None, tuple(exclude))


def _object(directory: Path, name: str) -> dict[str, Any]:
    try:
        return untrusted.read_json_object(directory / name, root=directory)
    except untrusted.UnusableFileError as error:
        raise ArtifactError(f"{directory / name} {error}; build again") from error


def _name(path: Path, raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"{path}: {key} is {untrusted.json_kind(value)}, not a name")
    return value


def _size(path: Path, raw: Mapping[str, Any]) -> int | None:
    value = raw.get("group_size")
    if value is not None and (type(value) is not int or value < 1):
        raise ArtifactError(f"{path}: group_size is {untrusted.show(value)}, not a size")
    return value


def _patterns(path: Path, raw: Mapping[str, Any], key: str = "exclude_modules") -> tuple[str, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or any(not isinstance(pattern, str) for pattern in value):
        raise ArtifactError(f"{path}: {key} must be a list of patterns")
    for pattern in value:
        if pattern.startswith("re:") or len(pattern) > 256 or pattern.count("*") > 16:
            raise LoaderRefusal(
                f"{path}: {key} holds {untrusted.show(pattern)}, which is no plain glob; "
                "a regular expression means something else to each version of the loader"
            )
    return tuple(value)

"""Parts of a config.json that take more than a look at one key: rope scaling, FP8 tiles, token ids,
repeated lists, and the bounds of every number.

`deepseek/config.py` calls it. Functions that take `given`, the keys that nobody has read yet,
remove those that they read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from deepseek.errors import ConfigError
from deepseek.limits import excess
from deepseek.untrusted import show


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN rope scaling (arXiv 2309.00071), names as in the release."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")


# Keys that transformers 5 knows in YaRN's parameters, at its defaults.
_NEUTRAL_YARN = {"truncate": True, "attention_factor": None}


def check_layer_types(given: dict[str, Any]) -> None:
    """Take the lists out of `given` that transformers 5 saves beside the numbers that they repeat:
    the first `first_k_dense_replace` MLPs are dense, and every attention has DeepSeek-V3.2's
    indexer."""
    layers, dense = given.get("num_hidden_layers"), given.get("first_k_dense_replace")
    keys = ["mlp_layer_types"]
    if given.get("model_type") == "deepseek_v32":
        keys.append("layer_types")
    lists = {key: value for key in keys if (value := given.pop(key, None)) is not None}
    if not isinstance(layers, int) or not isinstance(dense, int):
        return  # whoever reads the numbers refuses them
    if excess("num_hidden_layers", layers):
        return  # likewise, and no list of this length is made
    dense = min(dense, layers)
    repeated = {
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "layer_types": ["indexed_attention"] * layers,
    }
    for key, value in lists.items():
        if value != repeated[key]:
            raise ConfigError(
                f"config.json: {key} contradicts the {layers} layers and first_k_dense_replace "
                f"{dense}; remove it"
            )


_YARN_KEYS = {field.name for field in fields(YarnScaling)}


def read_rope(given: dict[str, Any]) -> tuple[float, YarnScaling | None]:
    """Take the rope keys out of `given`, in the release's layout or in transformers 5's."""
    parameters = _as_dict(given.pop("rope_parameters", None), "rope_parameters")
    scaling = _as_dict(given.pop("rope_scaling", None), "rope_scaling")
    merged = parameters | scaling
    thetas = [d.pop("rope_theta") for d in (given, parameters, scaling) if "rope_theta" in d]
    merged.pop("rope_theta", None)
    theta = thetas[0] if thetas else 10000.0
    if any(other != theta for other in thetas):
        raise ConfigError(
            f"config.json: rope_theta is given as {show(theta)} and as {show(thetas[-1])}"
        )
    kinds = [merged.pop(key) for key in ("type", "rope_type") if key in merged]
    kind = kinds[0] if kinds else "default"
    if any(other != kind for other in kinds):
        raise ConfigError(
            f"config.json: the rope scaling type is given as {show(kind)} and as {show(kinds[-1])}"
        )
    for key, neutral in _NEUTRAL_YARN.items():
        if key in merged and merged[key] is neutral:
            del merged[key]
    if kind == "default" and not merged:
        return theta, None
    if kind != "yarn":
        raise ConfigError(
            f"config.json: rope scaling type {show(kind)} is not implemented; use 'yarn' or none"
        )
    if extra := sorted(set(merged) - _YARN_KEYS):
        raise ConfigError(f"config.json: rope_scaling has the unknown key {show(extra[0])}")
    try:
        return theta, YarnScaling(**merged)
    except TypeError as error:
        raise ConfigError(f"config.json: rope_scaling is incomplete ({error})") from error


#: `quant_method` of a quantized checkpoint, and of the layouts of `--target sglang`.
_OWN_METHODS = ("compressed-tensors", "w4afp8", "blockwise_int8")
#: Settings of transformers' FP8 loader, in a directory that is built for it. Which linears are BF16
#: is said by their tensors.
_OF_TRANSFORMERS = {"dequantize", "modules_to_not_convert"}


def read_block_size(value: Any) -> tuple[int, int] | None:
    """FP8 tile (rows, columns) of a source checkpoint; None for BF16, and for what IntServe itself
    writes: its manifest or engine.json says how weights are stored. Other methods are refused, in
    full sentences by `deepseek/source/origin.py` where a source is asked for."""
    quantization = _as_dict(value, "quantization_config")
    if value is None or quantization.get("quant_method") in _OWN_METHODS:
        return None
    known = {"quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt"}
    if extra := sorted(set(quantization) - known - _OF_TRANSFORMERS):
        raise ConfigError(f"config.json: quantization_config has the unknown key {show(extra[0])}")
    expected = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3",),
        "activation_scheme": ("dynamic",),
        # V3.1 rounds activation scales to powers of two; its weight scales are plain multipliers.
        "scale_fmt": (None, "ue8m0"),
    }
    for key, allowed in expected.items():
        value = quantization.get(key, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"config.json: quantization_config.{key} = {show(value)} is not implemented; "
                f"expected {allowed[0]!r}"
            )
    block = quantization.get("weight_block_size")
    if block != [128, 128]:
        raise ConfigError(
            f"config.json: quantization_config.weight_block_size = {show(block)} is not "
            "implemented; DeepSeek-V3 is released in blocks of [128, 128]"
        )
    return 128, 128


def read_token_ids(value: Any, name: str) -> tuple[int, ...]:
    """One token id or a list of them, as config.json and generation_config.json give `name`.

    Raises:
        ConfigError: another value, an empty list, or an id given twice.
    """
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(item) is int and item >= 0 for item in ids):
        raise ConfigError(f"{name} = {show(value)} must be a token id or a list of token ids")
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{name} = {show(value)} gives a token id twice")
    return tuple(ids)


def _as_dict(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"config.json: {key} = {show(value)} must be a JSON object or null")
    return dict(value or {})


#: Counts and factors that may be 0; everything else that is a number is positive.
_MAY_BE_ZERO = {
    "num_nextn_predict_layers",
    "first_k_dense_replace",
    "bos_token_id",
    "eos_token_id",
    "mscale",
    "mscale_all_dim",
}


def check_fields(config: Any, prefix: str) -> None:
    """Check types, signs and bounds (`limits.py`) of all plain fields of a dataclass; `prefix`
    comes before their names in errors.

    Raises:
        ConfigError: a value has the wrong type (a string in place of a number) or sign, or is too
            large.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if kind.endswith(" | None") and value is None:
            continue
        kind = kind.removesuffix(" | None")
        if kind == "bool":
            ok, expected = isinstance(value, bool), "true or false"
        elif kind in ("int", "float"):
            zero_ok = field.name in _MAY_BE_ZERO
            number = type(value) is int or (
                kind == "float" and type(value) is float and math.isfinite(value)
            )
            ok = number and (value > 0 or (zero_ok and value == 0))
            expected = f"{'zero or ' if zero_ok else ''}a positive {kind}"
            if ok and (above := excess(field.name, value)):
                raise ConfigError(f"config.json: {prefix}{field.name} = {show(value)} {above}")
        else:
            continue
        if not ok:
            raise ConfigError(
                f"config.json: {prefix}{field.name} = {show(value)} must be {expected}"
            )

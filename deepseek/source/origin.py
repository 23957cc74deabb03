"""What a source directory is, from its small files: refused, as it says, or as its names say.

One place decides for everyone who is given a source: `quantize`, `submit`, `build`, `evaluate`,
`plan`, `estimate`. Refused are directories that are quantized already, by any method, because
their weights have lost what a recipe would measure.

Two kinds of copies of the release are common, and their config.json is not true of them. They are
read as what they are, with one warning:

    the release cast to BF16, `quantization_config` left in: no tensor has scales
    saved without the MTP layer, `num_nextn_predict_layers` left at 1: no tensor is of that layer

A mixture is an error; the reader names the first tensor that is missing. This file imports no
torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek.config import CONFIG_FILE, ModelConfig
from deepseek.errors import CheckpointError
from deepseek.models import MODELS
from deepseek.source.index import INDEX_FILE, SINGLE_FILE, list_shards
from deepseek.untrusted import UnusableFileError, read_json_object, show

_log = logging.getLogger(__name__)

#: What ends the name of a tensor of scales of FP8 tiles.
SCALE_SUFFIX = "_scale_inv"

#: Files by which a directory is known as not a source: name -> what it is and what to name instead.
#: Names of our own are written out, because this room stands below those that write them.
_NOT_A_SOURCE = {
    "engine.json": "an engine that IntServe built, not a source checkpoint; name the source that "
    "it was made from",
    "intserve.json": "a quantized checkpoint of IntServe, not a source; name the source checkpoint "
    "that it was made from",
}
_MODELOPT_FILE = "hf_quant_config.json"
#: None: config.json does not say, or is not readable.
_READ_METHODS = ("fp8", None)
_REMEDY = "give the unquantized release, in FP8 tiles of 128 x 128 or in BF16"


def load_model_config(name_or_directory: str) -> ModelConfig:
    """The config of a built-in model (`deepseek/models.py`) by name, or of a source directory.

    Raises:
        CheckpointError, ConfigError: as `read_source_config`.
    """
    return MODELS.get(name_or_directory) or read_source_config(name_or_directory)


def read_source_config(directory: Path | str) -> ModelConfig:
    """The model of a source directory, for those who read no weights: config.json, made true by the
    tensors' names where the index, or a single file, is there to list them.

    Raises:
        CheckpointError: the directory is quantized, or its index is malformed.
        ConfigError: config.json cannot be read or asks for something that is not implemented.
    """
    directory = Path(directory)
    refuse_quantized(directory)
    config = ModelConfig.from_directory(directory)
    if not any((directory / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return config  # a plan needs no more
    names: set[str] = set()
    for shard, listed in list_shards(directory).shards.items():
        names |= _names_in(directory, shard) if listed is None else listed
    config, notes = as_named(directory, config, names)
    for note in notes:
        warn_once(note)
    return config


def refuse_quantized(directory: Path) -> None:
    """Check that a directory is not known to be quantized. Reads what is there; an absent or
    malformed config.json is for others to name.

    Raises:
        CheckpointError: it is, by which method, and what to give instead.
    """
    for name, what in _NOT_A_SOURCE.items():
        if (directory / name).exists():
            raise CheckpointError(f"{directory} is {what}")
    if (directory / _MODELOPT_FILE).exists():
        quantization = _object(_read_if_possible(directory / _MODELOPT_FILE).get("quantization"))
        algorithm = quantization.get("quant_algo")
        label = f"modelopt, {show(algorithm)}" if isinstance(algorithm, str) else "modelopt"
        raise CheckpointError(f"{directory} is quantized ({label}, {_MODELOPT_FILE}); {_REMEDY}")
    quantization = _object(_read_if_possible(directory / CONFIG_FILE).get("quantization_config"))
    method = quantization.get("quant_method", quantization.get("quant_algo"))
    if method not in _READ_METHODS:
        raise CheckpointError(
            f"{directory} is quantized ({show(method)}, quantization_config in {CONFIG_FILE}); "
            f"{_REMEDY}"
        )


def as_named(
    directory: Path, config: ModelConfig, names: Collection[str], *, holds_fp8: bool = False
) -> tuple[ModelConfig, list[str]]:
    """`config` as the tensors' names say, and a line for `warn_once` on each difference that is
    accepted.

    `names` are those of all tensors of the checkpoint; `holds_fp8` says that a tensor is stored as
    FP8, where that is known: such a checkpoint without scales lacks them.
    """
    notes: list[str] = []
    has_scales = any(name.endswith(SCALE_SUFFIX) for name in names)
    if config.weight_block_size and not has_scales and not holds_fp8:
        notes.append(
            f"{directory}: {CONFIG_FILE} has a quantization_config for FP8, but no tensor has "
            "scales; read as an unquantized copy in BF16"
        )
        config = replace(config, weight_block_size=None)
    layers = range(config.num_hidden_layers, config.num_layers_with_mtp)
    mtp = tuple(f"model.layers.{layer}." for layer in layers)
    if mtp and not any(name.startswith(mtp) for name in names):
        notes.append(
            f"{directory}: {CONFIG_FILE} has num_nextn_predict_layers "
            f"{config.num_nextn_predict_layers}, but no tensor is of an MTP layer; read as a model "
            "without one"
        )
        config = replace(config, num_nextn_predict_layers=0)
    return config, notes


@functools.cache
def warn_once(note: str) -> None:
    """Log a line at WARNING, once per process: several readers of a command open one directory."""
    _log.warning("%s", note)


def true_config(content: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """config.json's content, changed where `as_named` found it untrue of the checkpoint; equal to
    it where it is true."""
    content = dict(content)
    if config.weight_block_size is None and content.get("quantization_config") is not None:
        content.pop("quantization_config", None)
    if (content.get("num_nextn_predict_layers") or 0) != config.num_nextn_predict_layers:
        content["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return content


def _names_in(directory: Path, shard: str) -> set[str]:
    from deepseek.source.shards import open_shard  # brings torch, which an index does not need

    return set(open_shard(directory, shard).header.tensors)


def _read_if_possible(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, root=path.parent)
    except UnusableFileError:
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

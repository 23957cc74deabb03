"""Checks that a directory is what transformers loads, as it was built (`build --check`).

The steps:

    documents   engine.json and what it lists, nothing else in the directory; config.json and
                from_pretrained.json say what the schemes of engine.json become
    loading     the loader's model over all layers, without values (`loader.py`): nothing missing,
                nothing unread
    headers     names, types and shapes, against what was to be built, and the index
    values      digests against engine.json and intserve.json
    artifact    if it is given: every parameter, as transformers holds it

What is the same for every target is `deepseek/artifact/engine_checks.py`.

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_checks import (
    ByteProgress,
    CheckReport,
    Original,
    RankLoad,
    artifact_layers,
    check_digests,
    check_headers,
    check_listing,
    check_mtp,
    check_same_config,
    check_schemes,
    read_target_manifest,
    untold,
)
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.formats import decompress, unpack_int8
from deepseek.hf.fields import TARGET, HfFields
from deepseek.hf.launch import LAUNCH_FILE, check_launch
from deepseek.hf.layout import Form, Stored, choose, stored_tensors
from deepseek.hf.loader import LOADER, LoaderModel
from deepseek.hf.quant_config import quantization_config
from deepseek.recipe import Scheme

#: Keys of config.json that the build sets.
_CHANGED = (
    "quantization_config",
    "auto_map",
    "num_nextn_predict_layers",
    "model_type",
    "architectures",
)


def check_engine(
    directory: Path | str,
    *,
    artifact: ArtifactReader | None = None,
    digests: bool = True,
    progress: ByteProgress = untold,
) -> CheckReport:
    """Check a directory of target transformers. Without `digests` its tensors are not read, so that
    a directory that was just built can be checked at once. With `artifact` every parameter is
    compared with that quantized checkpoint.

    Raises:
        ArtifactError: a file or tensor is not what the build would write.
        DeployError: transformers would not load it; the sentence is the loader model's.
        ConfigError: config.json describes no model of the family.
    """
    directory = Path(directory)
    engine, fields, built, stored = read_checked(directory)
    model = LoaderModel(directory, values=False)
    held = sum(tensor.nbytes for layer in model.layers for _, tensor in model.load(layer))
    if extra := model.unread() + model.ignored():
        raise ArtifactError(
            f"{model.checkpoint.file(extra[0])} holds {extra[0]}, which transformers does not "
            "read; build again"
        )
    check_headers(
        model.checkpoint,
        stored_layers(model.config, mtp=False),
        lambda layer: stored_tensors(model.config, stored, layer),
        index_needed=True,
    )
    mapped = model.checkpoint.with_values()
    hashed = verified = compared = 0
    if digests:
        schemes = built.manifest.recipe.resolve(built.config) if built.manifest else {}
        shapes = {
            tensor.spec.module: tensor.spec.shape
            for layer in model.layers
            for tensor in stored_tensors(model.config, stored, layer).values()
        }
        origin = _origins(schemes, stored, shapes)
        hashed, verified = check_digests(mapped, built, engine, origin, progress=progress)
    if artifact is not None:
        check_same_config(directory, built, artifact, changed=_CHANGED)
        reference = artifact_layers(directory, engine, artifact)
        compared = _compare(LoaderModel(directory), artifact.schemes, reference)
    return CheckReport(
        directory=directory,
        target=engine.target,
        loader=LOADER,
        engine_digest=engine.digest,
        dialect=fields.method,
        engine_version=fields.engine_version,
        ranks=(RankLoad(read_bytes=model.checkpoint.read_bytes, held_bytes=held),),
        tensors=len(list(model.checkpoint)),
        reads=sum(model.checkpoint.reads.values()),
        hashed_bytes=hashed,
        verified=verified,
        compared=compared,
    )


def read_checked(directory: Path) -> tuple[EngineManifest, HfFields, BuiltEngine, Stored]:
    """The documents of a directory, which say the same thing, and how its linears are stored.

    Raises:
        ArtifactError, ConfigError, DeployError: they do not.
    """
    engine, fields = read_target_manifest(directory, TARGET, LOADER, HfFields)
    check_listing(directory, engine, LOADER)
    built = read_engine(directory)
    path = directory / "config.json"
    raw = document_object(directory, built.documents, "config.json")
    if "auto_map" in raw:
        raise ArtifactError(f"{path} has auto_map, which names code to run; build again")
    config = ModelConfig.from_dict(raw)
    check_mtp(directory, config, fields.mtp)
    check_schemes(directory, built, config, engine, mtp=False)
    stored = choose(config, engine.schemes)
    if stored.method != fields.method:
        raise ArtifactError(
            f"{directory / ENGINE_FILE} has the method {fields.method}, but its schemes are stored "
            f"in {stored.method}; build again"
        )
    if raw.get("quantization_config") != quantization_config(config, stored):
        raise ArtifactError(
            f"{path}: quantization_config does not describe the schemes of {ENGINE_FILE}; build "
            "again"
        )
    launch = built.documents.get(LAUNCH_FILE)
    if launch is None:
        raise ArtifactError(f"{directory} has no {LAUNCH_FILE}; build again")
    check_launch(launch, where=str(directory / LAUNCH_FILE))
    return engine, fields, built, stored


def _origins(
    schemes: Mapping[str, Scheme], stored: Stored, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[str], Original | None]:
    """What every key of the directory was in the artifact; `schemes` are its recipe's."""

    def origin(key: str) -> Original | None:
        module, _, suffix = key.rpartition(".")
        scheme, form = schemes.get(module), stored.forms.get(module)
        if scheme is None or form is None:
            return Original(key)
        if suffix == "weight_scale_inv":
            return Original(f"{module}.weight_scale")
        if scheme.weights == "int8" and scheme.activations == "int8" and form == Form("packed", 8):
            inputs = shapes[module][1]
            match suffix:
                case "weight_packed":
                    return Original(f"{module}.weight", lambda words: unpack_int8(words, inputs))
                case "weight_scale":
                    return Original(key)
            return None
        return Original(key) if _keeps_bytes(scheme, form) else None

    return origin


def _keeps_bytes(scheme: Scheme, form: Form) -> bool:
    match form.kind:
        case "bf16":
            return scheme.weights == "bf16"
        case "tiles":
            return scheme.weights == "fp8-block"
        case "packed":
            packed = scheme.weights.startswith("int4") or scheme.weights in ("int8", "int8-asym")
            same = packed and form.bits == scheme.bits and form.group_size == scheme.group_size
            return same and form.zero_points != scheme.is_symmetric


def _compare(
    model: LoaderModel,
    schemes: Mapping[str, Scheme],
    reference: Callable[[LayerKey], Mapping[str, Tensor]],
) -> int:
    """Compare every parameter with the artifact's value in the parameter's own type; how many.

    Raises:
        ArtifactError: one differs.
    """
    count = 0
    for layer in model.layers:
        tensors = dict(reference(layer))
        for spec, held in model.load(layer):
            if spec.module in schemes:
                scheme = schemes[spec.module]
                stored = pop_linear(tensors, spec.module, scheme)
                expected = decompress(stored, scheme, (spec.shape[0], spec.shape[1]))
            else:
                expected = tensors.pop(spec.name)
            if not torch.equal(expected.to(held.dtype), held):
                raise ArtifactError(
                    f"{model.directory}: transformers would hold other values of {spec.name} than "
                    "the quantized checkpoint has; build again"
                )
            count += 1
    return count

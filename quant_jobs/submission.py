"""Jobs for a cluster: the command that it runs, and an id that follows from what the job makes.

The id is computed from what decides the output. The number of workers and their CPUs change no byte
and are left out:

    quantize   recipe       what it says
               model        the source's fingerprint, and the files that go along with its weights
               calibration  each file's SHA-256, ending and weight, in the order given
               device       cpu or cuda
    build      checkpoint   the artifact's digest, or the source's fingerprint
               target       and the options that it has, their defaults filled in; --stage
    both       output       its path

So another text under the same name is another job, and the same text under another name is not.
Paths are those of the cluster. Except for the recipe, the files need not exist on this machine: a
model, text or checkpoint that cannot be read here counts by its path. Two machines of which only
one can read it therefore compute different ids. Library versions are those of the nodes and are in
no id. In both cases the output folder is protected by its lock and by the inputs that a job pins
there (`run_folder.py`): no other job writes into it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.config import CONFIG_FILE, ModelConfig
from deepseek.errors import ArtifactError, CheckpointError, ConfigError, DeployError
from deepseek.files import canonical_json, sha256_file
from deepseek.recipe import Recipe, builtin_recipes, load_recipe
from deepseek.source.origin import refuse_quantized
from deepseek.untrusted import UnusableFileError, open_regular
from quant_jobs.workers.devices import Device

if TYPE_CHECKING:
    from quant_jobs.build_options import BuildOptions

#: (part, field) of a recipe that older versions did not know -> its default, which leaves ids as
#: they were.
_LATER_FIELDS: dict[tuple[str, str], object] = {("gate", "max_input_outliers"): 8}


class Submission(ABC):
    """A command for a cluster. Paths are absolute."""

    command: ClassVar[str]
    output: Path

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the output, as JSON. Reads files: use it once per command."""

    @abstractmethod
    def options(self) -> list[str]:
        """Words of the command line behind the command's name."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """What the cluster's list of jobs shows."""

    @property
    def base_id(self) -> str:
        """The id of the first submission; the same job has the same id. Reads the files that the id
        follows from: use it once per command.

        Raises:
            RecipeError: there is no such recipe, or it is wrong.
        """
        digest = hashlib.sha256(canonical_json(self.identity())).hexdigest()
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.output.name).strip("-")[:40] or "output"
        return f"{self.command}-{name}-{digest[:12]}"

    @property
    def entrypoint(self) -> str:
        """The shell command that the cluster runs."""
        return shlex.join(["python", "-m", "quant_jobs", self.command, *self.options()])


@dataclass(frozen=True, slots=True)
class QuantizeSubmission(Submission):
    """One quantize command. `recipe` is the name of a built-in recipe or an absolute path."""

    command: ClassVar[str] = "quantize"

    model: Path
    recipe: str
    calibration: tuple[str, ...]
    output: Path
    workers: int = 1
    device: Device = "cpu"
    cpus_per_worker: int = 1

    def identity(self) -> dict[str, Any]:
        return {
            "model": _identify_model(self.model),
            "recipe": _identify_recipe(load_recipe(self.recipe)),
            "calibration": [_identify_text(argument) for argument in self.calibration],
            "output": str(self.output),
            "device": self.device,
        }

    def options(self) -> list[str]:
        words = ["--model", str(self.model), "--recipe", self.recipe]
        for argument in self.calibration:
            words += ["--calibration", argument]
        words += ["--output", str(self.output), "--workers", str(self.workers)]
        return [*words, "--device", self.device, "--cpus-per-worker", str(self.cpus_per_worker)]

    def metadata(self) -> dict[str, str]:
        return {"output": str(self.output), "recipe": self.recipe}


@dataclass(frozen=True, slots=True)
class BuildSubmission(Submission):
    """One build command. `stage` is the directory of the nodes' own copies, if there are to be
    any."""

    command: ClassVar[str] = "build"

    checkpoint: Path
    target: str
    output: Path
    build: BuildOptions
    stage: Path | None = None

    def identity(self) -> dict[str, Any]:
        chosen = self._chosen()
        chosen.pop("workers", None)
        return {
            "checkpoint": _identify_checkpoint(self.checkpoint),
            "target": self.target,
            "options": chosen,
            "output": str(self.output),
            "stage": None if self.stage is None else str(self.stage),
        }

    def options(self) -> list[str]:
        words = ["--checkpoint", str(self.checkpoint), "--target", self.target]
        words += ["--output", str(self.output)]
        for name, value in self._chosen().items():
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
        return words if self.stage is None else [*words, "--stage", str(self.stage)]

    def metadata(self) -> dict[str, str]:
        return {"output": str(self.output), "target": self.target}

    def _chosen(self) -> dict[str, Any]:
        """The options that are not their defaults: an option that a later version adds changes no
        id of those that do not use it."""
        values = {field.name: getattr(self.build, field.name) for field in fields(self.build)}
        defaults = {field.name: field.default for field in fields(self.build)}
        return {name: value for name, value in values.items() if value != defaults[name]}


def make_quantization(
    model: Path,
    recipe: str,
    calibration: Sequence[str],
    output: Path,
    workers: int,
    device: Device = "cpu",
    cpus_per_worker: int = 1,
) -> QuantizeSubmission:
    """A submission of quantize from a user's arguments. Paths become absolute, because the job runs
    in another working directory.

    Raises:
        DeployError: `workers` is less than 1.
        RecipeError: there is no such recipe, or it is wrong.
        CheckpointError, ConfigError: the model is here, and is quantized already or asks for what
            is not implemented; it is so on the nodes too.
        CalibrationError: a weight is not positive, or a file is of an unknown kind.
    """
    from quant_jobs.calibration.documents import kind_of
    from quant_jobs.calibration.token_blocks import CalibrationSource

    refuse_quantized(model)
    if (model / CONFIG_FILE).exists():
        ModelConfig.from_directory(model)
    _refuse_no_workers(workers, "quantize")
    load_recipe(recipe)
    for argument in calibration:
        kind_of(CalibrationSource.parse(argument).path)
    return QuantizeSubmission(
        model=model.absolute(),
        recipe=recipe if recipe in builtin_recipes() else str(Path(recipe).absolute()),
        calibration=tuple(os.path.abspath(argument) for argument in calibration),
        output=output.absolute(),
        workers=workers,
        device=device,
        cpus_per_worker=cpus_per_worker,
    )


def make_build(
    checkpoint: Path,
    target: str,
    output: Path,
    options: BuildOptions,
    stage: Path | None = None,
) -> BuildSubmission:
    """A submission of build from a user's arguments. Paths become absolute.

    Raises:
        DeployError: `options.workers` is less than 1, the target is unknown or does not take the
            options, or it cannot load the checkpoint, which is here.
        ArtifactError, CheckpointError, ConfigError: the checkpoint is here and damaged; it is so on
            the nodes too.
    """
    from quant_jobs.build import check_checkpoint, complete_options

    _refuse_no_workers(options.workers, "build")
    if target == "embedded" and stage is None and options.workers == 1:
        options = replace(options, workers=0)  # its one file is made by the job's own process
    options = complete_options(target, options)
    if (checkpoint / CONFIG_FILE).exists():
        options = check_checkpoint(checkpoint, target, options)
    return BuildSubmission(
        checkpoint=checkpoint.absolute(),
        target=target,
        output=output.absolute(),
        build=options,
        stage=None if stage is None else stage.absolute(),
    )


def _refuse_no_workers(workers: int, command: str) -> None:
    if workers < 1:
        raise DeployError(
            "--workers 0 is a job without Ray, which cannot be submitted to one: give --workers 1 "
            f"or more, or run {command} here"
        )


def _identify_recipe(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, in the form in which the first ids were made of it."""
    content: dict[str, Any] = recipe.model_dump(mode="json")
    for (part, field), meaningless in _LATER_FIELDS.items():
        if content[part][field] == meaningless:
            del content[part][field]
    return content


def _identify_model(model: Path) -> dict[str, Any]:
    """Identity of a source checkpoint: its fingerprint, or its path where it cannot be opened here.

    A checkpoint that is absent or incomplete on this machine may be complete on the nodes.
    """
    from deepseek.artifact.documents import COPIED_FILES
    from deepseek.source.checkpoint import CheckpointReader

    try:
        fingerprint = CheckpointReader(model).fingerprint
        files = {name: model / name for name in COPIED_FILES if (model / name).is_file()}
        return {
            "fingerprint": fingerprint,
            "files": {name: sha256_file(path) for name, path in files.items()},
        }
    except (OSError, CheckpointError, ConfigError):
        return {"path": str(model)}


def _identify_text(argument: str) -> dict[str, Any]:
    """Identity of `FILE[=WEIGHT]`: weight and content, or the path where it cannot be read here."""
    from quant_jobs.calibration.token_blocks import CalibrationSource

    source = CalibrationSource.parse(argument)
    try:
        os.close(open_regular(source.path))  # reading a pipe would never end
        # The ending decides how the bytes are read.
        content = {"sha256": sha256_file(source.path), "ending": source.path.suffix}
    except (OSError, UnusableFileError):
        content = {"path": str(source.path)}
    return {"weight": source.weight, **content}


def _identify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Identity of what an engine is built from, a quantized checkpoint or a source; its path where
    it cannot be opened here."""
    from deepseek.artifact.reader import ArtifactReader

    if not (checkpoint / MANIFEST_FILE).exists():
        return _identify_model(checkpoint)
    try:
        return {"artifact": ArtifactReader(checkpoint).digest}
    except (OSError, ArtifactError, ConfigError):
        return {"path": str(checkpoint)}

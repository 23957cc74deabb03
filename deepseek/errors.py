"""Every error that a user can cause, as one tree. Commands print it as one sentence and exit 2.

    IntServeError
      ConfigError         config.json has a value we do not implement, or a key we do not know
      CheckpointError     a tensor is missing, extra, misshapen or damaged in a source checkpoint
      RecipeError         a recipe names an unknown key, format or algorithm, or contradicts itself
      CalibrationError    the calibration or evaluation text is empty, too short or unreadable
      ArtifactError       a quantized checkpoint or engine is incomplete, damaged, or of another run
      DeployError         the target engine or the hardware cannot load this artifact
      RequestError        a generation request that can never be served (too long, bad parameter)
      ServiceError        a running service cannot be reached, refuses, or does not do what is asked
      OutputError         a file or directory cannot be written: disk full, read-only, in the way

`assert` elsewhere means a bug of ours; these mean that the user can fix it, and say how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.text import printable

if TYPE_CHECKING:
    from pydantic import ValidationError


class IntServeError(Exception):
    """Base of all errors that name the thing at fault and what to change, in one sentence.

    Whoever shows it, a command, Ray or a log, shows `str(error)`: printable characters in one line
    of bounded length, whatever the names in it are.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(IntServeError):
    """The model's config.json asks for something that is not implemented."""


class CheckpointError(IntServeError):
    """A source checkpoint is incomplete, damaged, or holds what its config does not announce."""


class RecipeError(IntServeError):
    """A quantization recipe cannot be read or applied to this model."""


class CalibrationError(IntServeError):
    """Calibration or evaluation data cannot be used."""


class ArtifactError(IntServeError):
    """A quantized checkpoint or a built engine cannot be used."""


class DeployError(IntServeError):
    """The chosen target or hardware cannot load or hold the artifact."""


class RequestError(IntServeError):
    """A generation request that no amount of waiting would make servable."""


class ServiceError(IntServeError):
    """A service over HTTP cannot be reached, refuses the request, or answers something else."""


class OutputError(IntServeError):
    """A file or directory cannot be written where the user wants it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def first_problem(error: ValidationError) -> str:
    """`place: what is wrong` of the first thing that pydantic found in a file of ours."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{place}: {first['msg']}"

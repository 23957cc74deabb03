"""What the sections of the configuration are made of: their base, and the types of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from deepseek.yaml_files import StrictModel

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,32})?")

#: The pool of a service that names none, and that flags of the command line speak of.
POOL = "default"
#: Serve keeps counts in 32 bits, and some of them are added up.
MAX_COUNT = 10**9
#: 116 days. Clocks of Python and of the system end far beyond, with an OverflowError.
MAX_SECONDS = 1e7
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Tokens = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0, le=MAX_SECONDS)]
SecondsOrZero = Annotated[float, Field(ge=0.0, le=MAX_SECONDS)]
Cpus = Annotated[float, Field(ge=0.0)]
#: More than any replica is placed over.
MAX_GPUS = 1024
Gpus = Annotated[int, Field(ge=0, le=MAX_GPUS)]
#: Ray's own rules for labels of nodes (`ray start --labels`); a value is compared as it is.
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LabelName = Annotated[
    str, StringConstraints(pattern=rf"^([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL}$")
]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^{_LABEL}$")]
#: A part of the name of a deployment, and of labels of metrics.
PoolName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]


def _check_path(path: Path) -> Path:
    if not str(path).isprintable():
        raise ValueError("is no path: it holds a character that cannot be shown; correct it")
    return path


def _check_file(path: Path) -> Path:
    if path.name == "":
        raise ValueError("names no file; write its path, or leave the key out")
    return path


def _check_host(host: str) -> str:
    if not _HOST.fullmatch(host):
        raise ValueError("is no address and no name; write one such as 127.0.0.1, :: or 0.0.0.0")
    return host


def _check_name(name: str) -> str:
    if not 1 <= len(name) <= 256 or not name.isprintable():
        raise ValueError("is no name; write 1 to 256 characters that can be shown")
    return name


ModelName = Annotated[str, AfterValidator(_check_name)]
#: A directory, and a file.
DirectoryPath = Annotated[Path, AfterValidator(_check_path)]
FilePath = Annotated[Path, AfterValidator(_check_path), AfterValidator(_check_file)]
Host = Annotated[str, AfterValidator(_check_host)]


class Section(StrictModel):
    """Base of every section: an error about a value never shows it, since it may be a key."""

    model_config = ConfigDict(protected_namespaces=(), hide_input_in_errors=True)


class LiveSection(Section):
    """A section that changes without new replicas."""

    model_config = ConfigDict(json_schema_extra={"x-live": True})

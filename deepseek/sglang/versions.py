"""The version of SGLang that engines are built for: the one whose source was read."""

from __future__ import annotations

from typing import Literal, get_args

from deepseek.errors import DeployError
from deepseek.untrusted import show_name

EngineVersion = Literal["0.5.23"]
VERSIONS: tuple[EngineVersion, ...] = get_args(EngineVersion)


def require_version(name: str) -> EngineVersion:
    """The version by name.

    Raises:
        DeployError: it is none that engines are built for.
    """
    for version in VERSIONS:
        if version == name:
            return version
    raise DeployError(
        f"SGLang {show_name(name)} is not known to us; use --engine-version {' or '.join(VERSIONS)}"
    )

"""The versions of transformers whose loading is known here."""

from __future__ import annotations

from typing import Literal, get_args

from deepseek.errors import DeployError

EngineVersion = Literal["5.23.0"]
#: The first is the default.
VERSIONS: tuple[EngineVersion, ...] = get_args(EngineVersion)


def require_version(name: str) -> EngineVersion:
    """The version by name.

    Raises:
        DeployError: its loading is not known here.
    """
    for version in VERSIONS:
        if version == name:
            return version
    raise DeployError(
        f"--engine-version {name!r} is no version of transformers whose loading is known here; "
        f"use {' or '.join(VERSIONS)}"
    )

"""The versions of TensorRT-LLM that engines are built for."""

from __future__ import annotations

from typing import Literal, get_args

from deepseek.errors import DeployError

#: The newest general release, and the newest candidate that is known to be in use.
EngineVersion = Literal["1.2.1", "1.3.0rc29"]
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
        f"TensorRT-LLM {name!r} is not known to us; use --engine-version {' or '.join(VERSIONS)}"
    )

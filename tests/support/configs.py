"""Configurations of tests and benches from plain keywords: each goes to its section by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from serve_app.config import ServeConfig
from serve_app.engine_sections import EchoOptions, EmbeddedOptions, RemoteOptions
from serve_app.http_sections import HttpSection
from serve_app.sections import (
    AdmissionSection,
    GateSection,
    PoolSection,
    RequestsSection,
    ResumeSection,
    RoutingSection,
    TelemetrySection,
)

_SECTIONS: dict[str, type[BaseModel]] = {
    "http": HttpSection,
    "requests": RequestsSection,
    "admission": AdmissionSection,
    "routing": RoutingSection,
    "resume": ResumeSection,
    "telemetry": TelemetrySection,
}


def nest(
    *,
    engine: Path | str | None = None,
    echo: EchoOptions | None = None,
    remote: RemoteOptions | None = None,
    api_keys: tuple[Any, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """The content of a configuration file with one pool of `engine` (embedded), `echo` or `remote`.
    Any further keyword is a key of an embedded engine, of the pool, of the gate, or of another
    section; whole sections pass as they are."""
    assert sum(given is not None for given in (engine, echo, remote)) == 1
    if engine is None:
        engine_section = (echo or remote).model_dump(mode="json", exclude_none=True)  # type: ignore[union-attr]
    else:
        engine_section = {"kind": "embedded", "directory": str(engine)}
        engine_section |= _take(settings, EmbeddedOptions)
    pool = _take(settings, PoolSection)
    gate = _take(settings, GateSection)
    given: dict[str, Any] = {
        "pools": {"default": {"engine": engine_section, **({"gate": gate} if gate else {}), **pool}}
    }
    if api_keys:
        given["keys"] = {"inline": list(api_keys)}
    for name, section in _SECTIONS.items():
        if name not in settings and (keys := _take(settings, section)):
            given[name] = keys
    return given | settings


def make_config(**settings: Any) -> ServeConfig:
    """What `nest` makes, read."""
    return ServeConfig.model_validate(nest(**settings))


def _take(settings: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    names = [name for name in section.model_fields if name in settings]
    return {name: settings.pop(name) for name in names}

"""Configurations of tests and benches from plain keywords: each goes to its section by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.config import ServeConfig
from serve_app.sections import (
    AdmissionSection,
    EchoOptions,
    EmbeddedOptions,
    GateSection,
    HttpSection,
    KeysSection,
    PoolSection,
    RequestsSection,
    ResumeSection,
    TelemetrySection,
)

_SECTIONS = {
    "http": HttpSection,
    "requests": RequestsSection,
    "admission": AdmissionSection,
    "resume": ResumeSection,
    "telemetry": TelemetrySection,
}


def make_config(
    *,
    engine: Path | None = None,
    echo: EchoOptions | None = None,
    api_keys: tuple[Any, ...] = (),
    **settings: Any,
) -> ServeConfig:
    """A configuration with one pool of `engine` (embedded) or `echo`. Any further keyword is a key
    of the engine, of the pool, of the gate, or of another section; whole sections pass as they
    are."""
    assert (engine is None) != (echo is None)
    engine_section: Any = echo
    if engine is not None:
        engine_section = EmbeddedOptions(directory=engine, **_take(settings, EmbeddedOptions))
    pool = _take(settings, PoolSection)
    gate = pool.pop("gate", None) or GateSection(**_take(settings, GateSection))
    given: dict[str, Any] = {
        "pools": {"default": PoolSection(engine=engine_section, gate=gate, **pool)}
    }
    if api_keys:
        given["keys"] = KeysSection(inline=api_keys)
    for name, section in _SECTIONS.items():
        if name not in settings:
            given[name] = section(**_take(settings, section))
    return ServeConfig(**given, **settings)


def _take(settings: dict[str, Any], section: Any) -> dict[str, Any]:
    names = [name for name in section.model_fields if name in settings]
    return {name: settings.pop(name) for name in names}

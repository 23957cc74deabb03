"""The tables of docs/configuration.md: every key, from the JSON schema of the models, and where the
keys of earlier versions are. schema.py puts them between the markers of the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from serve_app.mistakes import MOVED
from serve_app.setting_types import MAX_COUNT, MAX_SECONDS

#: Lines of the page between which a table stands.
_KEYS = (
    "<!-- keys: `python -m serve_app.schema docs` makes them; a test holds them to the models -->",
    "<!-- end of keys -->",
)
_MOVED = (
    "<!-- moved: `python -m serve_app.schema docs` makes them -->",
    "<!-- end of moved -->",
)


def with_tables(page: str, schema: dict[str, Any]) -> str:
    """The page with its tables made anew, for the JSON schema of a configuration."""
    keys = [line for name, section in _sections(schema) for line in _table(name, section)]
    moved = ["| was | is |", "|---|---|"]
    for old, new in MOVED.items():
        place, comma, rest = new.partition(",")
        moved.append(f"| `{old}` | `{place}`{comma}{rest} |")
    return _between(_between(page, _KEYS, ["", *keys]), _MOVED, ["", *moved, ""])


def _between(page: str, markers: tuple[str, str], lines: list[str]) -> str:
    start, end = markers
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return "\n".join([f"{before}{start}", *lines, f"{end}{after}"])


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section with its dotted name, sections in sections after their own."""
    yield "", schema
    yield from _below("", schema, schema)


def _below(
    name: str, section: dict[str, Any], schema: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    live = section.get("x-live", False)
    for key, field in section["properties"].items():
        for place, inner in _inner(f"{name}.{key}".strip("."), field, schema):
            inner = inner | {"x-live": live or inner.get("x-live", False)}
            yield place, inner
            yield from _below(place, inner, schema)


def _inner(
    place: str, field: dict[str, Any], schema: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections that a field holds: none, one (or null), one for each kind, or one for each
    name."""
    for pattern in field.get("patternProperties", {}).values():
        yield from _inner(f"{place}.NAME", pattern, schema)
    if "$ref" in field:
        yield place, _resolved(field, schema)
    for kind in field.get("oneOf", ()):
        yield place, _resolved(kind, schema)
    for choice in field.get("anyOf", ()):
        if "$ref" in choice:
            yield place, _resolved(choice, schema)


def _resolved(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return found


def _table(name: str, section: dict[str, Any]) -> list[str]:
    kind = section["properties"].get("kind", {}).get("const")
    head = f"`{name}`" if name else "The file"
    if kind:
        head += f" of kind `{kind}`"
    if section.get("x-live"):
        head += " (live)"
    about = " ".join(section["description"].split())
    rows = [
        f"| `{key}` | {_values(field)} | {_default(key, field, section)} "
        f"| {' '.join(field['description'].split()).replace('|', chr(92) + '|')} |"
        for key, field in section["properties"].items()
    ]
    top = ["| key | values | default | meaning |", "|---|---|---|---|"]
    return [f"### {head}", "", about, "", *top, *rows, ""]


def _values(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"])
    if "$ref" in field or "oneOf" in field:
        return "section"
    if "patternProperties" in field:
        (inner,) = field["patternProperties"].values()
        return "sections by name" if "$ref" in inner else f"{_values(inner)} by name"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    name = {"path": "path", "password": "key"}.get(field.get("format", ""), field["type"])
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("maximum", "≤"))
        if key in field and field[key] not in (MAX_COUNT, MAX_SECONDS)
    ]
    return " ".join([name, ", ".join(bounds)]).strip()


def _default(key: str, field: dict[str, Any], section: dict[str, Any]) -> str:
    if key in section.get("required", ()):
        return "required"
    value = field.get("default")
    return "its keys'" if value and isinstance(value, dict) else f"`{json.dumps(value)}`"

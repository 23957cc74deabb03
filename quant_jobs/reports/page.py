"""Fills in the HTML templates of `templates/`; the callers decide the content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deepseek.text import visible

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """Fill in a template; an unknown name is an error. Everything but `Markup` is escaped, and a
    character that cannot be seen, such as one that turns the direction of writing, is shown as an
    escape."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _finalize(value: Any) -> Any:
    """What `{{ }}` shows of a value."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value, keep="\n\t")
    return value


def show_bytes(count: int) -> str:
    """Bytes in SI units with three digits: 12.3 MB, 356 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"

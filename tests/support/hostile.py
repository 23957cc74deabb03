"""What others may put where a small file is expected, and manifests that they resealed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.manifest import Manifest

#: An escape sequence, a forged line, markup of rich and HTML, a formula, text that runs backward.
NAME = (
    "\x1b[31m\nerror: forged [bold]</code></script><script>console.log(1)</script>"
    '<img src=x onerror=console.log(2)>"\' onload="console.log(3)" '
    "$\\frac{$ \u202ex --> font: 1px '"
)


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "private.key"
    outside.write_text('{"secret": 1}')
    outside.chmod(0o600)
    path.symlink_to(outside)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


#: Name -> (what makes it, what the sentence says).
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link out of the directory": (_link_out, "is a link to a file outside its directory"),
    "a link in a circle": (lambda path: path.symlink_to(path), "cannot be read"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "cannot be read"),
    "a pipe": (os.mkfifo, "is a pipe, not a regular file"),
    "a directory": (Path.mkdir, "is a directory, not a regular file"),
    "10 GB": (_sparse, "has 10737418240 bytes, more than"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "is not UTF-8 text"),
}
#: The same for content that is no JSON object.
JSON: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "is not valid JSON"),
    "null": (lambda path: path.write_text("null"), "must hold a JSON object, not null"),
    "a list": (lambda path: path.write_text("[]"), "must hold a JSON object, not a list"),
    "nested": (
        lambda path: path.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        "is nested deeper than",
    ),
    "NaN": (lambda path: path.write_text('{"passed": NaN}'), "NaN is no JSON number"),
    "a long number": (lambda path: path.write_text(f'{{"a": {"9" * 5000}}}'), "is not valid JSON"),
    "a key twice": (lambda path: path.write_text('{"a": 1, "a": 2}'), "is given twice"),
}


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Edit intserve.json or engine.json and make its own digest right again; return the digest."""
    raw = json.loads(path.read_text())
    change(raw)
    raw.pop("digest")
    form = Manifest if path.name == "intserve.json" else EngineManifest
    raw["digest"] = form.model_validate(raw).digest
    path.write_text(json.dumps(raw))
    return str(raw["digest"])

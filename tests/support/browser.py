"""Opens a page in headless Chromium: the loaded document and the console's messages."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from support.parts import require

_CONSOLE = re.compile(r':CONSOLE:\d+\] "(.*)", source: ', re.DOTALL)


@dataclass(frozen=True)
class Opened:
    """`dom` is the document's HTML after loading; `console` holds each message: of scripts, and of
    the browser about what it could not load or run."""

    dom: str
    console: list[str]


def open_page(page: Path | str, profile: Path) -> Opened:
    """Open a file or a URL. `profile` is a folder for the browser's own files; it may not exist
    yet."""
    url = page if isinstance(page, str) else page.resolve().as_uri()
    command = [
        *(require("chromium"), "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-dev-shm-usage", f"--user-data-dir={profile}"),
        *("--enable-logging=stderr", "--v=0", "--dump-dom", url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    console = [match[1] for line in done.stderr.splitlines() if (match := _CONSOLE.search(line))]
    return Opened(done.stdout, console)

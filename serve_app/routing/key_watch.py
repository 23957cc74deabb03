"""Reads the file of API keys again when it changes, while the service runs.

Every ingress watches the file for itself (openai/ingress.py starts the task): once in a period it
reads the file, which is small, and compares. Looking at the file's times would be cheaper and would
miss what happens to files: a second write within one tick of the clock, a copy that keeps times, an
NFS server's cached attributes, and the links by which Kubernetes swaps a mounted Secret.

A change counts when two reads in a row see the same, so that nobody gets in by the first half of a
key that is still being written. A file that cannot be used changes nothing: the keys of before stay
in force, one sentence in the log says why, and a metric says it until the file is right again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError
from serve_app.key_file import read_key_bytes
from serve_app.routing.keys import Keys
from serve_app.routing.tenants import Tenant, read_tenants
from serve_app.sections import KeysSection

#: Serve writes it to the log of the replica.
log = logging.getLogger("ray.serve")

#: Seconds between two looks at the file, and between the two reads that must agree.
PERIOD_S = 1.0
SETTLE_S = 0.2


class KeyWatch:
    """Keeps `keys` as the file of `section` says. `note_failed` is told after every look at a
    changed file whether it cannot be used."""

    def __init__(
        self,
        section: KeysSection,
        keys: Keys,
        note_failed: Callable[[bool], None],
        *,
        period_s: float = PERIOD_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        assert section.file is not None
        self._section, self._path = section, section.file
        self._keys = keys
        self._note_failed = note_failed
        self._period_s, self._settle_s = period_s, settle_s
        #: The SHA-256 of the content that was last taken in or refused, or why it cannot be read.
        self._seen: bytes | str = b""

    async def run(self) -> None:
        """Look once in a period, until the task is cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                # The watch must outlive what nobody foresaw; the keys stay as they are.
                log.exception("the file of API keys could not be looked at")
                self._note_failed(True)
            await asyncio.sleep(self._period_s)

    async def look(self) -> None:
        """Read the file; where it has changed and holds still, take it in or say why not."""
        seen, _ = await asyncio.to_thread(self._read)
        if seen == self._seen:
            return
        await asyncio.sleep(self._settle_s)
        again, content = await asyncio.to_thread(self._read)
        if again != seen:
            return  # still being written: the next look comes soon enough
        try:
            if content is None:
                raise ConfigError(f"{self._path} {seen!s}")
            tenants = await asyncio.to_thread(read_tenants, self._section, content)
        except ConfigError as error:
            log.error("%s; the API keys of before stay in force", error)
            self._note_failed(True)
        else:
            self._take(tenants)
            self._note_failed(False)
        self._seen = seen

    def _read(self) -> tuple[bytes | str, bytes | None]:
        """What identifies the content, and the content; or why there is none."""
        try:
            content = read_key_bytes(self._path)
        except UnusableFileError as error:
            return error.masked, None
        return hashlib.sha256(content).digest(), content

    def _take(self, tenants: tuple[Tenant, ...]) -> None:
        before = {tenant.digest for tenant in self._keys.tenants}
        after = {tenant.digest for tenant in tenants}
        if tenants == self._keys.tenants:
            return
        self._keys.replace_tenants(tenants)
        log.warning(
            "%s has changed: %d API keys, %d of them new; %d of before are gone",
            self._path,
            len(after),
            len(after - before),
            len(before - after),
        )

"""A key file that changes while the service runs: who gets in, what is logged, and what an editor,
Kubernetes or an attacker does to files on the way."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from serve_app.errors import Unauthorized
from serve_app.routing.key_watch import KeyWatch
from serve_app.routing.keys import Keys
from serve_app.routing.tenants import read_tenants
from serve_app.sections import KeysSection

CANARY = "sk-QZJXVKW"


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve, where another test has started it in this process, keeps its log to itself."""
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)


def put(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace the file at once, as a careful program does."""
    new = path.with_name("new")
    new.touch(0o600)
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)


def names_of(keys: Keys, *asked: str) -> list[str | None]:
    """The names of those of the keys that get in."""
    names: list[str | None] = []
    for key in asked:
        try:
            header = (b"authorization", f"Bearer {key}".encode())
            names.append(keys.check(Headers(raw=[header]), None).name)
        except Unauthorized:
            names.append(None)
    return names


class Watched:
    """A watch over a file, whose looks the test does itself."""

    def __init__(self, path: Path, text: str, settle_s: float = 0.0) -> None:
        put(path, text)
        section = KeysSection(file=path)
        self.path = path
        self.keys = Keys(read_tenants(section))
        self.failed: list[bool] = []
        self.watch = KeyWatch(section, self.keys, self.failed.append, settle_s=settle_s)


ONE = "keys: [{name: one, key: sk-1}]"
TWO = "keys: [{name: one, key: sk-1, priority: 5}, {name: two, key: sk-2}]"


async def test_a_removed_key_is_refused_and_a_new_one_gets_in(tmp_path: Path) -> None:
    it = Watched(tmp_path / "keys", TWO)
    await it.watch.look()
    assert names_of(it.keys, "sk-1", "sk-2") == ["one", "two"]
    put(it.path, "keys: [{name: two, key: sk-2}, {name: three, key: sk-3}]")
    await it.watch.look()
    assert names_of(it.keys, "sk-1", "sk-2", "sk-3") == [None, "two", "three"]
    assert it.failed == [False, False]


async def test_another_name_priority_or_limit_of_a_key_is_a_change_too(tmp_path: Path) -> None:
    it = Watched(tmp_path / "keys", TWO)
    put(it.path, TWO.replace("priority: 5", "limits: {max_concurrency: 2}"))
    await it.watch.look()
    (one, _) = it.keys.tenants
    assert one.priority == 0
    assert one.limits is not None
    assert one.limits.max_concurrency == 2


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        (None, 0o600, "cannot be read"),
        ("", 0o600, "holds no key"),
        (f"{CANARY} two", 0o600, "holds in line 1"),
        (f"keys: [{{name: one, key: *{CANARY}}}]", 0o600, "is not valid YAML"),
        (f"keys: [{{name: one, key: {CANARY}, limit: 1}}]", 0o600, "has a field that is none of"),
        (ONE, 0o644, "has mode 0644"),
    ],
)
async def test_a_file_that_became_unusable_changes_nothing_and_says_so_once(
    text: str | None, mode: int, sentence: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = Watched(tmp_path / "keys", TWO)
    await it.watch.look()
    if text is None:
        it.path.unlink()
    else:
        put(it.path, text, mode)
    for _ in range(3):
        await it.watch.look()
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert sentence in record.getMessage()
    assert record.getMessage().startswith(str(it.path))
    assert record.getMessage().endswith("the API keys of before stay in force")
    assert record.exc_info is None
    assert CANARY not in caplog.text
    assert names_of(it.keys, "sk-1", "sk-2", CANARY) == ["one", "two", None]
    assert it.failed == [False, True]
    put(it.path, TWO)
    await it.watch.look()
    assert it.failed == [False, True, False], "right again, though it is what it was before"


async def test_each_further_mistake_is_told_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = Watched(tmp_path / "keys", ONE)
    for text in ("keys: []", "keys: [1]", "keys: []", "keys: []"):
        put(it.path, text)
        await it.watch.look()
    assert len(caplog.records) == 3


async def test_a_change_tells_the_log_how_many_and_no_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = Watched(tmp_path / "keys", ONE)
    await it.watch.look()
    assert caplog.text == "", "nothing has changed"
    put(it.path, f"{CANARY}\nsk-2\n")
    await it.watch.look()
    (record,) = caplog.records
    assert "2 API keys, 2 of them new; 1 of before are gone" in record.getMessage()
    assert CANARY not in caplog.text


async def test_a_write_that_keeps_size_inode_and_times_is_seen(tmp_path: Path) -> None:
    it = Watched(tmp_path / "keys", "sk-1\n")
    await it.watch.look()
    before = it.path.stat()
    it.path.write_text("sk-2\n")
    os.utime(it.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = it.path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        *(before.st_ino, before.st_size, before.st_mtime_ns),
    )
    await it.watch.look()
    assert names_of(it.keys, "sk-1")[0] is None
    assert names_of(it.keys, "sk-2")[0] is not None


async def test_a_secret_that_kubernetes_swaps_by_links_is_followed(tmp_path: Path) -> None:
    for stamp, text in (("..2026_1", ONE), ("..2026_2", TWO)):
        (tmp_path / stamp).mkdir()
        put(tmp_path / stamp / "keys", text, 0o440)
    data, mounted = tmp_path / "..data", tmp_path / "keys"
    data.symlink_to("..2026_1")
    mounted.symlink_to("..data/keys")
    section = KeysSection(file=mounted)
    keys = Keys(read_tenants(section))
    watch = KeyWatch(section, keys, lambda _: None, settle_s=0.0)
    await watch.look()
    assert names_of(keys, "sk-2") == [None]
    swapped = tmp_path / "..data_tmp"
    swapped.symlink_to("..2026_2")
    swapped.replace(data)
    await watch.look()
    assert names_of(keys, "sk-2") == ["two"]


async def test_nobody_gets_in_by_the_first_half_of_a_key_that_is_being_written(
    tmp_path: Path,
) -> None:
    it = Watched(tmp_path / "keys", "sk-1\n", settle_s=0.05)
    await it.watch.look()
    with it.path.open("w") as file:
        file.write("sk-long-")
        file.flush()
        looking = asyncio.create_task(it.watch.look())
        await asyncio.sleep(0.02)  # between its two reads
        file.write("secret\n")
    await looking
    assert names_of(it.keys, "sk-1") != [None], "nothing was taken in yet"
    assert names_of(it.keys, "sk-long-", "sk-long-secret") == [None, None]
    await it.watch.look()
    assert names_of(it.keys, "sk-1", "sk-long-") == [None, None]
    assert names_of(it.keys, "sk-long-secret") != [None]


async def test_the_task_outlives_what_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = Watched(tmp_path / "keys", ONE)
    watch = KeyWatch(
        KeysSection(file=it.path), it.keys, it.failed.append, period_s=0.01, settle_s=0.0
    )
    broken = [RuntimeError("a bug")]

    def take_in(*given: object) -> object:
        if broken:
            raise broken.pop()
        return read_tenants(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("serve_app.routing.key_watch.read_tenants", take_in)
    put(it.path, TWO)
    task = asyncio.create_task(watch.run())
    async with asyncio.timeout(10):
        while names_of(it.keys, "sk-2") != ["two"]:
            await asyncio.sleep(0.01)
    task.cancel()
    assert it.failed == [True, False]
    assert "could not be looked at" in caplog.text

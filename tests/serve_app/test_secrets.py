"""Secrets of a real Serve instance arrive where they are used and in no file that Ray writes."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve
from support.configs import make_config
from support.otlp import OtlpReceiver
from support.serving import wait_for

from cluster.access import private_folder
from serve_app.app import build
from serve_app.config import EchoOptions
from serve_app.sections import KeysSection

pytestmark = pytest.mark.ray

HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"


def files_with(words: list[str], folder: Path) -> list[tuple[str, str]]:
    """Files below a folder whose content or name holds one of the words, with the word."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            content = path.read_bytes() if path.is_file() else b""
            found += [(str(path), word) for word in words
                      if word.encode() in content or word in path.name]  # fmt: skip
    return found


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.heavy
def test_headers_and_keys_reach_replicas_by_file_also_later_and_stand_in_none_of_rays_files(
    serve_url: str, otlp: OtlpReceiver, tmp_path: Path
) -> None:
    in_file, in_variable, key, later, misplaced = (secrets.token_hex(16) for _ in range(5))
    path = tmp_path / "headers"
    path.touch(0o600)
    path.write_text(f"authorization=Bearer {in_file}\n")
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"keys: [{{name: team-a, key: {key}}}]\n")
    folder = private_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv(HEADERS, f"x-key={in_variable}")
        config = make_config(
            echo=EchoOptions(),
            keys=KeysSection(file=keys),
            otlp_headers_file=path,
            drain_s=2.0,
        )
        serve.run(build(config), name="secret", route_prefix="/secret")
    try:
        url = f"{serve_url}/secret/v1/completions"
        body = {"model": "echo", "prompt": "hi"}
        assert httpx.post(url, json=body, timeout=30).status_code == 401

        def statuses(key: str) -> set[int]:
            """Of enough requests that each ingress answers one."""
            headers = {"authorization": f"Bearer {key}"}
            posts = (httpx.post(url, json=body, headers=headers, timeout=30) for _ in range(8))
            return {answer.status_code for answer in posts}

        assert statuses(key) == {200}
        keys.write_text(f"keys: [{{name: team-a, key: {later}}}]\n")
        wait_for(lambda: statuses(later) == {200})
        assert statuses(key) <= {401, 429}, "a removed key lets nobody in"
        keys.write_text(f"keys: [{misplaced}]\n")
        wait_for(lambda: files_with(["the API keys of before stay in force"], folder))
        assert statuses(later) == {200}
        sent = {"authorization": f"Bearer {in_file}"}
        wait_for(lambda: any(sent.items() <= got.items() for got in otlp.headers))
        words = [in_file, in_variable, key, later, misplaced]
        words += [hashlib.sha256(word.encode()).hexdigest() for word in words]
        assert files_with([str(path)], folder), (
            "the file's own path is in Ray's logs: they are read"
        )
        assert files_with(words, folder) == []
        lines = list(command_lines())
        assert not any(word in line for word in words for line in lines)
    finally:
        serve.delete("secret")

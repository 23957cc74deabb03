"""The client's own parts: addresses, keys, waiting times, and how signals end its loop."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from deepseek.errors import ServiceError
from quant_jobs.evaluation.event_loop import run_in_order
from quant_jobs.evaluation.service_client import base_url, read_key, retry_after_s


def test_retry_after_may_be_a_date() -> None:
    assert retry_after_s("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    assert retry_after_s("Mon, 01 Jan 2300 00:00:00 GMT") == 600
    assert retry_after_s(None) is None
    for nonsense in ("", "-1", "1e999", "nan", "9" * 40, "Mon, 99 Jan 2001"):
        assert retry_after_s(nonsense) is None


def test_a_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INTSERVE_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("INTSERVE_API_KEY", "from-env")
    assert read_key(None) == "from-env"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_key(file) == "from-file"
    for wrong in ("", "two words", "two\nlines", "schlüssel", "x" * 5000):
        file.write_text(wrong)
        with pytest.raises(ServiceError, match="does not hold a key") as refused:
            read_key(file)
        assert not wrong or wrong not in str(refused.value)
    with pytest.raises(ServiceError, match="--api-key-file .* cannot be read"):
        read_key(tmp_path / "absent")


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("http://h:8000/v1", "http://h:8000"),
        ("https://h/tenant/v1/", "https://h/tenant"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_an_address_may_end_in_v1(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize(
    "url",
    ["", "h:8000", "ftp://h", "http://", "http://h:99999", "http://h?x=1", "http://h#x", "\0"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ServiceError, match="--url .*; correct it"):
        base_url(url)


def test_a_key_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ServiceError, match="holds a user or password") as refused:
        base_url("http://user:sesame@h:8000")
    assert "sesame" not in str(refused.value)


class Stopped(BaseException):
    """What the command's own handler of a signal raises."""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_in_order_and_reaches_the_handler_before(signum: int) -> None:
    ended: list[str] = []

    def stop(number: int, frame: object) -> None:
        raise Stopped

    async def wait() -> None:
        try:
            # In a callback of the loop, where an exception would be logged and forgotten.
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signum)
            await asyncio.sleep(60)
        finally:
            ended.append("closed")

    before = signal.signal(signum, stop)
    try:
        with pytest.raises(Stopped):
            run_in_order(wait)
        assert signal.getsignal(signum) is stop
    finally:
        signal.signal(signum, before)
    assert ended == ["closed"]

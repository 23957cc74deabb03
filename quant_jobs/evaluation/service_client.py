"""A small client of an OpenAI-compatible service: retries, bounded answers, one sentence each.

Nothing here knows what is measured; url.py and load.py ask through it. The key is sent as a bearer
token and appears in no sentence. Redirects are not followed: they would carry the key elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from deepseek import untrusted
from deepseek.errors import ServiceError
from deepseek.untrusted import UnusableFileError

#: Tries of one request, the first included, and the wait before the second; it doubles each time.
MAX_TRIES, FIRST_WAIT_S, MAX_WAIT_S = 8, 0.5, 30.0
#: Longest wait that a server's Retry-After is followed for.
MAX_RETRY_AFTER_S = 600.0
#: Seconds without a byte of an answer: a prompt of a large model may take minutes.
READ_TIMEOUT_S = 600.0
#: 40 bytes per named token: 21 of them for 163,840 tokens are 138 MB.
MAX_ANSWER_BYTES = 256 << 20
#: The environment variable that holds the key where no file is named.
KEY_VARIABLE = "INTSERVE_API_KEY"
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})

Answer = TypeVar("Answer")
Sleep = Callable[[float], Awaitable[None]]


class RefusedError(ServiceError):
    """The service answered with a status that says no; `reason` is what it said, short."""

    def __init__(self, sentence: str, status: int, reason: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.reason = reason


def read_key(file: Path | None) -> str | None:
    """The service's key: the content of a file, else of $INTSERVE_API_KEY, else None. A key has no
    place on a command line, which other users of the machine can read.

    Raises:
        ServiceError: the file cannot be read, or holds no key; the sentence does not show it.
    """
    if file is None:
        place, key = f"${KEY_VARIABLE}", os.environ.get(KEY_VARIABLE, "")
        if not key:
            return None
    else:
        try:
            place, key = str(file), untrusted.read_bytes(file, max_bytes=1 << 16).decode("latin-1")
        except UnusableFileError as error:
            raise ServiceError(
                f"--api-key-file {file} {error}; name a file with the key"
            ) from error
    key = key.strip()
    if not re.fullmatch(r"[\x21-\x7e]{1,4096}", key):
        raise ServiceError(
            f"{place} does not hold a key: one line of printable ASCII without spaces; correct it"
        )
    return key


def base_url(url: str) -> str:
    """The address that paths are appended to, without a trailing slash and without `/v1`.

    Raises:
        ServiceError: it is no http address, or carries a key, a query or a fragment.
    """
    try:
        parsed = httpx.URL(url)
        has_host = bool(parsed.host) and (parsed.port or 1) < 1 << 16
    except (httpx.InvalidURL, ValueError) as error:
        raise ServiceError(f"--url {url} is no address ({error}); correct it") from error
    if parsed.userinfo:
        raise ServiceError(
            "--url holds a user or password, which other users of the machine can read; remove it "
            f"and use --api-key-file or ${KEY_VARIABLE}"
        )
    if parsed.scheme not in ("http", "https") or not has_host or parsed.query or parsed.fragment:
        raise ServiceError(
            f"--url {url} is not of the form http://HOST:PORT or https://HOST/PATH; correct it"
        )
    return str(parsed).rstrip("/").removesuffix("/v1")


class ServiceClient:
    """Requests to one service. Use as an asynchronous context manager.

    `sleep` waits between tries; tests pass their own.
    """

    def __init__(self, url: str, key: str | None, *, sleep: Sleep = asyncio.sleep) -> None:
        self.url = base_url(url)
        self._key = key
        self._sleep = sleep
        self.retries = 0
        self._http = httpx.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object that a GET answers; errors as `post`."""
        return self._object(path, await self.ask("GET", path, None, _read))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a POST of a JSON body answers.

        Raises:
            RefusedError: a status of 400 or more, after the retries where it may pass.
            ServiceError: no connection after the retries, or the answer is no JSON object.
        """
        return self._object(path, await self.ask("POST", path, body, _read))

    async def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[httpx.Response], Awaitable[Answer]],
    ) -> Answer:
        """What `read` makes of the response once its status is 200. What may pass (a connection
        that fails or breaks, 429, 503 and the like) is tried again, MAX_TRIES in all, after the
        server's Retry-After or a doubling wait.

        Raises:
            RefusedError, ServiceError: as `post`, and those of `read`.
        """
        wait_s = FIRST_WAIT_S
        for tries_left in reversed(range(MAX_TRIES)):
            asked_s = None
            request = self._http.build_request(method, f"{self.url}{path}", json=body)
            try:
                response = await self._http.send(request, stream=True)
                try:
                    if response.status_code == 200:
                        return await read(response)
                    failure: ServiceError = await self._refusal(path, response)
                finally:
                    await response.aclose()
                if response.status_code not in _RETRIED:
                    raise failure
                asked_s = retry_after_s(response.headers.get("retry-after"))
            except httpx.ReadTimeout as error:  # another try would wait as long
                raise ServiceError(
                    f"{self.url}{path} has not answered for {READ_TIMEOUT_S:.0f} s; see the "
                    "service's log, or use smaller blocks"
                ) from error
            except (httpx.TransportError, httpx.DecodingError) as error:
                failure = self._unreachable(error)
            if tries_left:
                self.retries += 1
                await self._sleep(wait_s if asked_s is None else asked_s)
                wait_s = min(2 * wait_s, MAX_WAIT_S)
        raise failure

    def _object(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            return untrusted.parse_json_object(data)
        except UnusableFileError as error:
            raise ServiceError(
                f"{self.url}{path} answers with what {error}; is --url an OpenAI-compatible "
                "service?"
            ) from error

    def _unreachable(self, error: Exception) -> ServiceError:
        reason = str(error) or type(error).__name__
        return ServiceError(
            f"{self.url} cannot be reached ({self._hide(reason)}); start the service or correct "
            "--url, then run the same command again"
        )

    async def _refusal(self, path: str, response: httpx.Response) -> RefusedError:
        status, reason = response.status_code, ""
        with contextlib.suppress(httpx.TransportError, httpx.DecodingError, ServiceError):
            reason = self._hide(_reason(await _read(response)))
        said = f"{status}: {reason}" if reason else f"{status}"
        if status in (401, 403):
            change = "correct it" if self._key else "give one"
            sentence = (
                f"{self.url} refuses {'the key' if self._key else 'requests without a key'} "
                f"({said}); {change} with --api-key-file or ${KEY_VARIABLE}"
            )
        elif 300 <= status < 400:
            sentence = (
                f"{self.url} redirects to another address ({said}), which is not followed; name "
                "that one as --url"
            )
        elif status in _RETRIED:
            sentence = (
                f"{self.url}{path} answered {said}, {MAX_TRIES} times; see the service's log, then "
                "run the same command again"
            )
        else:
            sentence = f"{self.url}{path} refuses ({said}); correct the service or --url"
        return RefusedError(sentence, status, reason)

    def _hide(self, text: str) -> str:
        """A server's words without our key, which it may repeat."""
        return text.replace(self._key, "***") if self._key else text


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110: seconds or a date), at most MAX_RETRY_AFTER_S;
    None where there is none that can be understood."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max((moment - datetime.now(UTC)).total_seconds(), 0.0), MAX_RETRY_AFTER_S)


async def _read(response: httpx.Response) -> bytes:
    """The whole body, decompressed, of at most MAX_ANSWER_BYTES."""
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise ServiceError(
                f"{response.url.host} answers with more than {MAX_ANSWER_BYTES} bytes; use smaller "
                "blocks"
            )
    return bytes(data)


def _reason(data: bytes) -> str:
    """What an error's body says: OpenAI's `error.message`, FastAPI's `detail`, else its start."""
    try:
        body = untrusted.parse_json_object(data[: 1 << 16])
    except UnusableFileError:
        return data[:200].decode("utf-8", "replace").strip()
    error = body.get("error", body)
    message = error if isinstance(error, str) else ""
    if isinstance(error, dict):
        message = str(error.get("message", error.get("detail", "")))
    return message[:300].strip()

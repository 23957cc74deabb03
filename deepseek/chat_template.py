"""Chat templates: from a checkpoint's files, and rendered where they can do no harm.

A chat template is a program in jinja2 that came with a checkpoint: it may loop forever, build a
string of gigabytes or try to leave its sandbox. `ChatRenderer` runs it in a helper process
(`chat_template_worker.py`) with bounded time, memory and output. The helper stays, so that a
conversation costs about a millisecond; one that overran is killed, and the next conversation gets a
new one. `quant_jobs/calibration` and `serve_app/openai` both use it. This file imports no torch and
no jinja2.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek import untrusted
from deepseek.untrusted import UnusableFileError

#: Of one conversation: wall-clock seconds, and bytes of text.
MAX_SECONDS = 5.0
MAX_OUTPUT_BYTES = 64 << 20
#: Of the address space of the helper process.
MAX_MEMORY_BYTES = 1 << 30
#: Largest template or tokenizer_config.json that is read; the release's have 4 KB.
MAX_FILE_BYTES = 8 << 20
#: Starting Python and importing jinja2 takes 0.1 s, more on a busy machine; not part of a deadline.
_START_SECONDS = 60.0

_WORKER = Path(__file__).with_name("chat_template_worker.py")
#: What the helper gets of our environment: enough to start Python, and no secret.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ")
#: Names under which templates know special tokens.
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
#: Names of a message's reasoning; templates read the first, some of them the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


#: Template -> the file of its own that it may be in.
_TEMPLATE_FILES = {
    "default": "chat_template.jinja",
    "tool_use": "additional_chat_templates/tool_use.jinja",
}


class ChatTemplateError(Exception):
    """A conversation got no text: the template refuses it, fails, or overran its limits. One line
    that reads on from "the chat template"."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`sources`: jinja2 source by name, one of them `default`, `tool_use` for conversations with
    tools where there is one. `special_tokens`: `bos_token`, ... as text."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate | None:
        """The template of a checkpoint; see `from_documents`.

        Raises:
            UnusableFileError: a file is unreadable or malformed; its path opens the sentence.
        """

        def read(name: str) -> bytes | None:
            path = directory / name
            if not os.path.lexists(path):
                return None
            try:
                return untrusted.read_bytes(path, root=directory, max_bytes=MAX_FILE_BYTES)
            except UnusableFileError as error:
                raise UnusableFileError(f"{path} {error}") from error

        return cls._find(directory, read)

    @classmethod
    def from_documents(cls, directory: Path, documents: Mapping[str, bytes]) -> ChatTemplate | None:
        """The template among the files of a checkpoint, by name, where transformers finds it:
        chat_template.jinja, else `chat_template` of tokenizer_config.json, a string or a list of
        named ones. None where there is none. `directory` is for the error sentences.

        Raises:
            UnusableFileError: a file is malformed; its path opens the sentence.
        """
        return cls._find(directory, documents.get)

    @classmethod
    def _find(cls, directory: Path, read: Callable[[str], bytes | None]) -> ChatTemplate | None:
        config = _object(directory, "tokenizer_config.json", read)
        sources = _sources(directory, read) or _named(config, directory / "tokenizer_config.json")
        if not sources:
            return None
        tokens = _special_tokens(config)
        if "added_tokens_decoder" not in config:  # written by older versions of transformers
            tokens |= _special_tokens(_object(directory, "special_tokens_map.json", read))
        return cls(sources, tokens)

    def name_for(self, tools: Sequence[Any] | None) -> str:
        """Which template renders a conversation.

        Raises:
            ChatTemplateError: none of them is the default.
        """
        if tools is not None and "tool_use" in self.sources:
            return "tool_use"
        if "default" not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise ChatTemplateError(f"has the names {names} and no default; call one of them so")
        return "default"


class ChatRenderer:
    """Renders conversations through one template. Threads may share it: as many conversations as
    there are `processes` are rendered at one time, others wait. `now`, in seconds since 1970, is
    what a template takes for the time, where the same text is wanted another day."""

    def __init__(
        self,
        template: ChatTemplate,
        *,
        processes: int = 1,
        max_seconds: float = MAX_SECONDS,
        now: float | None = None,
    ) -> None:
        self._template = template
        self._now = now
        self._max_seconds = max_seconds
        # The last one used comes first, so that no more start than are needed.
        self._helpers: queue.LifoQueue[_Helper] = queue.LifoQueue()
        for _ in range(processes):
            self._helpers.put(_Helper(template, max_seconds))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` gives it.

        `messages` and `tools` are plain JSON values.

        Raises:
            ChatTemplateError: the template refuses the conversation, fails on it, or takes more
                time, memory or output than allowed.
        """
        variables: dict[str, Any] = {
            **self._template.special_tokens,
            "messages": [_without_nulls(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        name = self._template.name_for(tools)
        helper = self._helpers.get()
        try:
            return helper.render({"template": name, "variables": variables, "now": self._now})
        finally:
            self._helpers.put(helper)

    def close(self) -> None:
        """End the helper processes. They also end with this process."""
        for _ in range(self._helpers.qsize()):
            with contextlib.suppress(queue.Empty):
                self._helpers.get_nowait().stop()


class _Helper:
    """One helper process, started when it is needed."""

    def __init__(self, template: ChatTemplate, max_seconds: float) -> None:
        self._template = template
        self._max_seconds = max_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def render(self, request: dict[str, Any]) -> str:
        if self._process is not None and self._process.poll() is not None:
            self.stop()  # it was killed while idle
        if self._process is None:
            self._start()
        try:
            kind, content = self._exchange(b"R", request)
        except BaseException:
            self.stop()
            raise
        if kind in (b"M", b"O"):
            self.stop()
        match kind:
            case b"=":
                return _decode(content)
            case b"?":
                reason = f"is malformed ({_decode(content)}); correct it"
            case b"!":
                reason = f"refuses these messages: {_decode(content)}"
            case b"X":
                reason = f"fails on these messages: {_decode(content)}"
            case b"M":
                reason = f"needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory"
            case _:
                reason = f"writes more than {MAX_OUTPUT_BYTES >> 20} MiB for one conversation"
        raise ChatTemplateError(reason)

    def stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None

    def __del__(self) -> None:
        self.stop()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        limits = (MAX_MEMORY_BYTES, int(self._max_seconds) + 1, MAX_OUTPUT_BYTES)
        try:
            self._process = subprocess.Popen(
                # -P: the folder of this file is not searched for modules
                [sys.executable, "-P", str(_WORKER), *map(str, limits)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        try:
            self._receive(time.monotonic() + _START_SECONDS)
            self._send(b"T", dict(self._template.sources), time.monotonic() + _START_SECONDS)
        except BaseException:
            self.stop()
            raise

    def _exchange(self, kind: bytes, value: dict[str, Any]) -> tuple[bytes, bytes]:
        deadline = time.monotonic() + self._max_seconds
        self._send(kind, value, deadline)
        return self._receive(deadline)

    def _send(self, kind: bytes, value: Any, deadline: float) -> None:
        content = json.dumps(value).encode()
        message = kind + len(content).to_bytes(8, "big") + content
        assert self._socket is not None
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            self._socket.sendall(message)
        except TimeoutError:
            raise self._overtime() from None
        except OSError:
            raise self._ended() from None

    def _receive(self, deadline: float) -> tuple[bytes, bytes]:
        head = self._receive_bytes(9, deadline)
        length = int.from_bytes(head[1:], "big")
        if length > 4 * MAX_OUTPUT_BYTES:  # characters are counted there, of four bytes at most
            raise ChatTemplateError("has taken over its process, which is ended")
        return head[:1], self._receive_bytes(length, deadline)

    def _receive_bytes(self, length: int, deadline: float) -> bytes:
        assert self._socket is not None
        received = bytearray()
        while len(received) < length:
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                chunk = self._socket.recv(min(length - len(received), 1 << 20))
            except TimeoutError:
                raise self._overtime() from None
            except OSError:
                raise self._ended() from None
            if not chunk:
                raise self._ended()
            received += chunk
        return bytes(received)

    def _overtime(self) -> ChatTemplateError:
        return ChatTemplateError(f"takes more than {self._max_seconds:g} s for one conversation")

    def _ended(self) -> ChatTemplateError:
        """Why the helper closed its end: the system killed it, or it cannot run at all."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        if self._process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return self._overtime()
        return ChatTemplateError(
            f"cannot be run: its process ended with {self._process.returncode}; install jinja2 "
            "3.1.6 or newer"
            if self._process.returncode == 1
            else f"makes its process end with {self._process.returncode}"
        )


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ChatTemplateError("writes half of a surrogate pair, which is no character") from None


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its null values, on which many templates fail, and its reasoning under the
    names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if key in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


def _object(directory: Path, name: str, read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is absent."""
    content = read(name)
    if content is None:
        return {}
    try:
        return untrusted.parse_json_object(content)
    except UnusableFileError as error:
        raise UnusableFileError(f"{directory / name} {error}") from error


def _sources(directory: Path, read: Callable[[str], bytes | None]) -> dict[str, str]:
    """Templates in files of their own, which come before those in tokenizer_config.json."""
    sources: dict[str, str] = {}
    for template, name in _TEMPLATE_FILES.items():
        content = read(name)
        if content is None:
            continue
        try:
            sources[template] = untrusted.decode_text(content).replace("\r\n", "\n")
        except UnusableFileError as error:
            raise UnusableFileError(f"{directory / name} {error}") from error
    return sources


def _named(config: dict[str, Any], path: Path) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json."""
    given = config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in given
    ):
        return {entry["name"]: entry["template"] for entry in given}
    raise UnusableFileError(
        f"{path}: chat_template must be a string, or a list of objects with the strings name and "
        "template; correct it"
    )


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Text of the special tokens that are given, as a string or as an object with `content`."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens

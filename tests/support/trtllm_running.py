"""An LLM of the double in this process, with one event loop, for its own tests."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.trtllm_doubles import Double, imported_double

PROMPT = [406, 443, 762, 18, 541]
EXPLICIT: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "end_id": 1}


class Running:
    """An LLM with one event loop, in this process."""

    def __init__(self, double: Double, package: Any, directory: Path, **changes: Any) -> None:
        self.double = double
        self.package = package
        self._params = package.SamplingParams  # before the modules are forgotten
        self.request_error = importlib.import_module("tensorrt_llm.executor.utils").RequestError
        #: Kinds of the violations that the test has asked for.
        self.expected: list[str] = []
        self.runner = asyncio.Runner()
        self.llm = package.LLM(**arguments(directory, **changes))

    def sampling(self, max_tokens: int = 6, **given: Any) -> Any:
        ignores = {"ignore_eos": True}
        return self._params(**(EXPLICIT | ignores | given), max_tokens=max_tokens)

    def ask(self, prompt: list[int] = PROMPT, *, salt: str | None = "a", **given: Any) -> Any:
        """Starts a request; call it on the loop."""
        return self.llm.generate_async(
            list(prompt), sampling_params=self.sampling(**given), streaming=True, cache_salt=salt
        )

    def run(self, work: Awaitable[Any], within_s: float = 30.0) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work, within_s)

        return self.runner.run(bounded())

    def tokens(self, **given: Any) -> list[int]:
        async def read() -> list[int]:
            output = self.ask(**given)
            async for _ in output:
                pass
            return list(output.outputs[0].token_ids)

        return list(self.run(read()))


def arguments(directory: Path, **changes: Any) -> dict[str, Any]:
    """What a worker passes: the file's arguments, and no tokenizer."""
    written = yaml.safe_load((directory / "llm_args.yaml").read_text())
    return {
        "model": directory,
        **written,
        "skip_tokenizer_init": True,
        "stream_interval": 1,
    } | changes


#: Makes an LLM: version, what a violation does, `arguments`, and faults.
Make = Callable[..., Running]


@contextlib.contextmanager
def making(directory: Path, folder: Path) -> Iterator[Make]:
    """For tests that break what they make: nothing is shut down, its ranks are killed."""
    made: list[Running] = []
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        def make(version: str = "1.3.0rc29", strict: str = "record", **faults: Any) -> Running:
            changes = faults.pop("arguments", {})
            double = Double(folder, version, strict)
            double.switch(**faults)
            package = stack.enter_context(imported_double(double, patch))
            made.append(Running(double, package, directory, **changes))
            return made[-1]

        try:
            yield make
        finally:
            for running in made:
                running.runner.close()
            for event in Double(folder).events("ranks"):
                for pid in event["pids"]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    """A thread for what may never return."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_until(reached: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)

"""The other side: a contender in a process of its own, which sleeps while others are measured.

Every worker answers the same calls:

    open(...)                    load the model -> its bytes (`traffic.Stored`) and a few words
    prefill(tokens)              seconds for one prompt of these ids that no cache knows, and the
                                 choice of its next token
    fill(prompts, batches)       compute these prompts and keep their latents, for decodes of these
                                 batch sizes; a few words
    decode(batch, steps)         seconds of each step that decodes one token for each of the first
                                 `batch` prompts, with the choice of the next; the tokens are then
                                 forgotten
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class WorkerError(RuntimeError):
    """A worker ended or never began; with the end of its log."""


class Worker:
    """A worker's process. `log` gets its stderr."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str],
        *,
        threads: int,
    ) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> Any:
        """What the worker answers.

        Raises:
            WorkerError: the worker has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # there is no answer either
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self._log.read_text(errors="replace")[-3000:]
            raise WorkerError(f"{call}: the worker ended with {code}:\n{said}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # its input ends, and so does it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

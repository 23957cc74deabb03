"""What is told while an engine loads, by a thread beside it: how far it is, and who died.

An engine's constructor returns after minutes, or never. Nothing inside it can be asked, so the
bytes that its processes have read stand for its progress, an estimate; and a rank process that dies
ends the loading here, because launchers were seen to wait half an hour for one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from .messages import Progress
from .processes import (
    Process,
    below_guardian,
    bytes_moved,
    ended_words,
    is_disaster,
    is_rank,
    rank_words,
)

_LOOK_S = 0.2
#: Looks after which a process is no helper that lives for a moment, or is about to be waited for.
_SETTLED = 5


@dataclass
class _Rank:
    process: Process
    words: str
    looks: int = 0


class LoadingWatch(threading.Thread):
    """Calls `tell` with every change of the progress, and `died` once, with a sentence, when a rank
    process has ended."""

    def __init__(
        self,
        weight_bytes: int,
        tell: Callable[[Progress], None],
        died: Callable[[str], None],
    ) -> None:
        super().__init__(name="loading-watch", daemon=True)
        self._weight_bytes = weight_bytes
        self._tell = tell
        self._died = died
        self._over = threading.Event()
        self._phase = "starting"
        self._moved: dict[tuple[int, int], int] = {}
        self._base = 0
        self._ranks: dict[int, _Rank] = {}
        self._dead: dict[int, int] = {}
        self._told: Progress | None = None

    def report(self, progress: Progress) -> None:
        """A phase that the backend knows of; from "weights" on, what is read counts as weights."""
        if progress.phase == "weights" != self._phase:
            self._base = sum(self._moved.values())
        self._phase = progress.phase

    def end(self) -> None:
        """The engine has loaded, or has failed in its own words."""
        self._over.set()
        self.join(timeout=5.0)

    def run(self) -> None:
        own = threading.get_native_id()
        while not self._over.wait(_LOOK_S):
            processes = below_guardian()
            fault = self._look_for_deaths(processes)
            if fault is not None:
                self._over.set()
                self._died(fault)
                return
            for pid, started in [(os.getpid(), 0), *((p.pid, p.started) for p in processes)]:
                moved = bytes_moved(pid)
                if pid == os.getpid():
                    moved -= bytes_moved(pid, own)  # what this thread reads in /proc
                self._moved[pid, started] = max(moved, self._moved.get((pid, started), 0))
            activity = sum(self._moved.values())
            done = min(self._weight_bytes, max(0, activity - self._base))
            progress = Progress(
                phase=self._phase,
                done=done if self._phase == "weights" else 0,
                total=self._weight_bytes,
                activity=activity,
            )
            if progress != self._told:
                self._told = progress
                self._tell(progress)

    def _look_for_deaths(self, processes: list[Process]) -> str | None:
        """The sentence on a rank that ended, if one did. Compilers and other helpers come and go,
        and say with their exit codes what their parents asked."""
        for process in processes:
            rank = self._ranks.get(process.pid)
            if process.status is None:
                if rank is not None:
                    rank.looks += 1
                elif is_rank(process.pid):
                    self._ranks[process.pid] = _Rank(process, rank_words(process.pid))
            elif self._is_left_dead(process) or (rank is not None and is_disaster(process.status)):
                words = f"process {process.pid}" if rank is None else rank.words
                return f"{words} {ended_words(process.status)}"
        now = {process.pid for process in processes}
        for pid in [pid for pid in self._ranks if pid not in now]:
            rank = self._ranks.pop(pid)
            if rank.words.startswith("rank") and rank.looks >= _SETTLED:
                return f"{rank.words} ended"  # its launcher has waited for it, and says nothing
        return None

    def _is_left_dead(self, process: Process) -> bool:
        """Whether a process has failed and nobody has asked how it ended for a while."""
        self._dead[process.pid] = self._dead.get(process.pid, 0) + bool(process.status)
        return self._dead[process.pid] >= _SETTLED

"""What an ingress knows of the engine replicas that load: newest reports, and the last failure.

A replica that loads is no failed one: it is left out of nothing, it only does not serve yet. What
is told of it goes into /health, the metrics, and the sentence of a 503.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from deepseek.outputs import format_bytes
from serve_app.engines.protocol import LoadingReplica
from serve_app.errors import EngineUnavailable

#: Age in seconds at which a replica that says nothing more counts as gone: an engine that loads may
#: hold up its replica's event loop for a while.
SILENT_S = 20.0
#: Longest `Retry-After` of a 503 while replicas load.
_MOST_RETRY_S = 60


class LoadingBoard:
    """The newest report of each replica that loads, and why the last one of a pool gave up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, LoadingReplica]] = {}
        #: Pool -> why its last replica that gave up did so; until one of the pool is ready.
        self.failures: dict[str, str] = {}

    def note(self, report: LoadingReplica) -> None:
        """Take in a report."""
        if report.failure is not None:
            self._reports.pop(report.replica_id, None)
            self.failures[report.pool] = report.failure
        else:
            self._reports[report.replica_id] = (self._clock(), report)

    def ready(self, replica_id: str, pool: str) -> None:
        """The replica sends heartbeats: it serves."""
        self._reports.pop(replica_id, None)
        self.failures.pop(pool, None)

    def gone(self, replica_id: str) -> None:
        """The replica has said goodbye."""
        self._reports.pop(replica_id, None)

    def reports(self) -> list[LoadingReplica]:
        """Of the replicas that load now, the furthest first."""
        oldest = self._clock() - SILENT_S
        self._reports = {k: v for k, v in self._reports.items() if v[0] >= oldest}
        reports = (report for _, report in self._reports.values())
        return sorted(reports, key=lambda report: (report.pool, -report.elapsed_s))

    def unavailable(self) -> EngineUnavailable:
        """What a client is told while no replica is ready."""
        reports = self.reports()
        if reports:
            etas = [report.eta_s for report in reports if report.eta_s is not None]
            soonest = min(etas, default=None)
            seconds = 5 if soonest is None else max(1, min(_MOST_RETRY_S, math.ceil(soonest)))
            return EngineUnavailable(
                f"no engine replica is ready: {summary(reports)}; retry later",
                retry_after_s=seconds,
            )
        return EngineUnavailable("no engine replica is ready; retry later")


def summary(reports: Sequence[LoadingReplica]) -> str:
    """`2 are loading (reading the weights, 41.5 GB of 98.0 GB, about 130 s to go)`, as far as the
    furthest is."""
    count = f"{len(reports)} are" if len(reports) > 1 else "1 is"
    furthest = min(reports, key=lambda r: (r.eta_s is None, r.eta_s or 0.0, -r.elapsed_s))
    return f"{count} loading ({describe(furthest)})"


def describe(report: LoadingReplica) -> str:
    """How far one replica is, for people: `reading the weights, 41.5 GB of 98.0 GB, about 130 s to
    go`."""
    progress, words = report.progress, [report.progress.phase]
    if progress.total_bytes > 0:
        done = min(progress.done_bytes, progress.total_bytes)
        words.append(f"{format_bytes(done)} of {format_bytes(progress.total_bytes)}")
    if report.eta_s is not None:
        words.append(f"about {report.eta_s:.0f} s to go")
    else:
        words.append(f"{report.elapsed_s:.0f} s so far")
    return ", ".join(words)

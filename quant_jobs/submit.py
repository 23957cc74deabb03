"""Submits a job to a Ray cluster, under an id of its own and never twice at once.

What a job is, and how its id follows from that, is in `submission.py`. The same command, given
again on any machine, finds the job that was submitted before:

    running              follows that job; submits nothing
    failed or stopped    submits it again as ID-2, ID-3, ..., because Ray takes an id only once;
                         the job goes on after the last file that it has published
    succeeded            does nothing
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from deepseek.errors import DeployError, first_line
from quant_jobs.submission import Submission

#: What a command did: it submitted the job, or found it running or succeeded.
Outcome = Literal["submitted", "running", "succeeded"]

#: How long a head that has just started may take until it can start jobs; its server answers
#: earlier. The server takes 10 s for each refusal.
START_TIMEOUT_S = 60.0
_STARTING = "No available agent"

#: Ray's status words for a job that has not ended.
_ALIVE = ("PENDING", "RUNNING")

#: What is never sent with a working directory, whatever its .gitignore says. Patterns are those of
#: a .gitignore; `/` is the directory itself. Ray adds what .gitignore and .rayignore name.
EXCLUDES = (
    *(".git", ".venv", "venv", "/runs", "__pycache__", "*.egg-info", "*.key"),
    *(".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"),
)

#: Seconds between two requests for the status of a followed job.
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Submitted:
    """The submission of a job, and what the command did. `status` is Ray's word."""

    submission_id: str
    outcome: Outcome
    status: str

    def describe(self) -> str:
        """One or two lines for people."""
        if self.outcome == "succeeded":
            return (
                f"{self.submission_id} has succeeded already; to run it again, delete its record: "
                f"ray job delete {self.submission_id}"
            )
        verb = "submitted" if self.outcome == "submitted" else "already running:"
        return f"{verb} {self.submission_id}\nfollow it: ray job logs --follow {self.submission_id}"


def connect_to_jobs(address: str | None = None) -> Any:
    """A client of the job server at `address` or $RAY_ADDRESS.

    Raises:
        DeployError: neither is set, no job server answers there, or it refuses our token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None or address in ("auto", "local"):
        raise DeployError(
            "no cluster is named: give --address or set RAY_ADDRESS, such as http://HEAD:8265"
        )
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()  # the first request that a server with tokens refuses
    except AuthenticationError as error:
        raise DeployError(
            f"the Ray at {address!r} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH to that cluster's own"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DeployError(
            f"no Ray job server answers at {address!r} ({first_line(error)}); correct --address "
            "or RAY_ADDRESS, and see that the head runs with its dashboard"
        ) from error
    return client


def submit(
    client: Any,
    job: Submission,
    working_dir: Path | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Submitted:
    """Submit the job to the cluster, unless it is running or has succeeded.

    `working_dir` is the directory of the code, sent with the job; None means the nodes have the
    code. A head that is starting may refuse jobs for `start_timeout_s` seconds.

    Raises:
        DeployError: the job server refuses the job, or the working directory is too large for it.
    """
    base_id = job.base_id
    deadline = time.monotonic() + start_timeout_s
    while True:
        known = _submissions(client, base_id)
        number, status = max(known.items(), default=(0, "none"))
        if status in _ALIVE:
            return Submitted(_id(base_id, number), "running", status)
        if status == "SUCCEEDED":
            return Submitted(_id(base_id, number), "succeeded", status)
        submission_id = _id(base_id, number + 1)
        runtime_env: dict[str, Any] = {}
        if working_dir is not None:
            check_working_dir(working_dir)
            runtime_env = {"working_dir": str(working_dir.absolute()), "excludes": list(EXCLUDES)}
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=job.metadata(),
                # The driver mostly waits, so it takes none of the CPUs that workers are placed
                # on. Without a request for resources it runs on the head.
                entrypoint_num_cpus=0,
            )
        except (RuntimeError, ValueError) as error:
            if number + 1 in _submissions(client, base_id):
                continue  # another process submitted the same job at the same moment
            if _STARTING in str(error) and time.monotonic() < deadline:
                continue
            raise DeployError(
                f"the job server refuses {submission_id}: {first_line(error)}; see the logs of "
                "the head"
            ) from error
        return Submitted(submission_id, "submitted", _status(client, submission_id))


def check_working_dir(working_dir: Path, limit_bytes: int | None = None) -> None:
    """Check that Ray's job server takes the directory, before anything is packed.

    `limit_bytes` None means the server's own limit. It is smaller than the 500 MiB that Ray's
    documentation gives for working directories, because the job server takes no request of more
    than 100 MiB.

    Raises:
        DeployError: it is no directory, or the files that are not excluded are too large.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    if not working_dir.is_dir():
        raise DeployError(f"--working-dir {working_dir} is not a directory; name the checkout")
    if limit_bytes is None:
        limit_bytes = min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE)
    sizes = packed_bytes(working_dir)
    total = sum(sizes.values())
    if total < limit_bytes:
        return
    largest = sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))[:3]
    named = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
    raise DeployError(
        f"--working-dir {working_dir} is {total / 2**20:.1f} MiB to send and Ray's job server "
        f"takes less than {limit_bytes / 2**20:.0f} MiB; name what the code does not need in "
        f"{working_dir / '.rayignore'} (as in a .gitignore), the largest being {named}"
    )


def packed_bytes(working_dir: Path) -> dict[str, int]:
    """Bytes that Ray would send of a directory, by the first two parts of the files' paths.

    Walks the directory with Ray's own function and rules. Ray packs without compression, so the sum
    is the size of the package up to the archive's last record.
    """
    from ray._private.ray_constants import (
        RAY_RUNTIME_ENV_IGNORE_GITIGNORE,
        get_runtime_env_default_excludes,
    )
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    root = working_dir.absolute()
    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            name = path.relative_to(root)
            # The two headers of a file in a ZIP archive take twice its name and 76 bytes.
            packed = path.stat().st_size + 2 * len(str(name).encode()) + 76
            group = str(Path(*name.parts[:2]))
            sizes[group] = sizes.get(group, 0) + packed

    _dir_travel(
        root,
        [_get_excludes(root, [*get_runtime_env_default_excludes(), *EXCLUDES])],
        count,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=logging.getLogger(__name__),
    )
    return sizes


def follow(
    client: Any,
    submission_id: str,
    out: TextIO = sys.stderr,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Copy a job's log to `out` until the job ends; returns its last status, in Ray's words."""

    async def tail() -> None:
        async for text in client.tail_job_logs(submission_id):
            out.write(text)
            out.flush()

    while True:
        try:
            asyncio.run(tail())
        except RuntimeError as error:  # the connection broke; the job goes on
            out.write(f"\nthe log broke off ({first_line(error)})\n")
        status = _status(client, submission_id)
        if status not in _ALIVE:
            return status
        sleep(_POLL_S)


def _submissions(client: Any, base_id: str) -> dict[int, str]:
    """Statuses of this job's submissions, by number: 1 is `base_id`, N is `base_id-N`."""
    pattern = re.compile(re.escape(base_id) + r"(?:-([1-9]\d*))?")
    statuses: dict[int, str] = {}
    for details in client.list_jobs():
        if details.submission_id and (match := pattern.fullmatch(details.submission_id)):
            statuses[int(match[1] or 1)] = str(details.status.value)
    return statuses


def _id(base_id: str, number: int) -> str:
    return base_id if number == 1 else f"{base_id}-{number}"


def _status(client: Any, submission_id: str) -> str:
    return str(client.get_job_status(submission_id).value)

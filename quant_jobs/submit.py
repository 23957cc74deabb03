"""Submits `quantize` as a job of a Ray cluster, under an id of its own and never twice at once.

The submission id is computed from what decides the output. The number of workers and their CPUs
change no byte and are left out:

    recipe       what it says
    output       its path
    model        the source's fingerprint, and the files that go along with its weights
    calibration  each file's SHA-256, ending and weight, in the order given
    device       cpu or cuda

So another text under the same name is another job, and the same text under another name is not.
Paths are those of the cluster. Except for the recipe, the files need not exist on this machine: a
model or a text that cannot be read here counts by its path. Two machines of which only one can read
it therefore compute different ids. Library versions are those of the nodes and are in no id. In
both cases the output folder is protected by its lock and by the fingerprint that a job pins there
(`job/folder.py`): no other job writes into it.

The same command, given again on any machine, finds the job that was submitted before:

    running              follows that job; submits nothing
    failed or stopped    submits it again as ID-2, ID-3, ..., because Ray takes an id only once;
                         quantize goes on after the last published layer
    succeeded            does nothing
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from deepseek.config import CONFIG_FILE, ModelConfig
from deepseek.errors import CheckpointError, ConfigError, DeployError, first_line
from deepseek.files import canonical_json, sha256_file
from deepseek.recipe import builtin_recipes, load_recipe
from deepseek.source.origin import refuse_quantized
from deepseek.untrusted import UnusableFileError, open_regular
from quant_jobs.workers.devices import Device

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
class Submission:
    """One quantize command for a cluster. Paths are absolute; `recipe` is the name of a built-in
    recipe or an absolute path."""

    model: Path
    recipe: str
    calibration: tuple[str, ...]
    output: Path
    workers: int = 1
    device: Device = "cpu"
    cpus_per_worker: int = 1

    @property
    def base_id(self) -> str:
        """The id of the first submission; the same job has the same id. Reads the calibration files
        and the parts of the model that its fingerprint covers: use it once per command.

        Raises:
            RecipeError: there is no such recipe, or it is wrong.
        """
        identity = {
            "model": _identify_model(self.model),
            "recipe": load_recipe(self.recipe).model_dump(mode="json"),
            "calibration": [_identify_text(argument) for argument in self.calibration],
            "output": str(self.output),
            "device": self.device,
        }
        digest = hashlib.sha256(canonical_json(identity)).hexdigest()
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.output.name).strip("-")[:40] or "output"
        return f"quantize-{name}-{digest[:12]}"

    @property
    def entrypoint(self) -> str:
        """The shell command that the cluster runs."""
        words = ["python", "-m", "quant_jobs", "quantize", "--model", str(self.model)]
        words += ["--recipe", self.recipe]
        for argument in self.calibration:
            words += ["--calibration", argument]
        words += ["--output", str(self.output), "--workers", str(self.workers)]
        words += ["--device", self.device, "--cpus-per-worker", str(self.cpus_per_worker)]
        return shlex.join(words)


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


def make_submission(
    model: Path,
    recipe: str,
    calibration: Sequence[str],
    output: Path,
    workers: int,
    device: Device = "cpu",
    cpus_per_worker: int = 1,
) -> Submission:
    """A submission from a user's arguments. Paths become absolute, because the job runs in another
    working directory.

    Raises:
        DeployError: `workers` is less than 1.
        RecipeError: there is no such recipe, or it is wrong.
        CalibrationError: a weight is not positive.
        CheckpointError, ConfigError: the model is here, and is quantized already or asks for what
            is not implemented; it is so on the nodes too.
        CalibrationError: a weight is not positive, or a file is of an unknown kind.
    """
    from quant_jobs.calibration.documents import kind_of
    from quant_jobs.calibration.token_blocks import CalibrationSource

    refuse_quantized(model)
    if (model / CONFIG_FILE).exists():
        ModelConfig.from_directory(model)
    if workers < 1:
        raise DeployError(
            "--workers 0 is a job without Ray, which cannot be submitted to one: give --workers 1 "
            "or more, or run quantize here"
        )
    load_recipe(recipe)
    for argument in calibration:
        kind_of(CalibrationSource.parse(argument).path)
    return Submission(
        model=model.absolute(),
        recipe=recipe if recipe in builtin_recipes() else str(Path(recipe).absolute()),
        calibration=tuple(os.path.abspath(argument) for argument in calibration),
        output=output.absolute(),
        workers=workers,
        device=device,
        cpus_per_worker=cpus_per_worker,
    )


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
                metadata={"output": str(job.output), "recipe": job.recipe},
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


def _identify_model(model: Path) -> dict[str, Any]:
    """Identity of a source checkpoint: its fingerprint, or its path where it cannot be opened here.

    A checkpoint that is absent or incomplete on this machine may be complete on the nodes.
    """
    from deepseek.artifact.documents import COPIED_FILES
    from deepseek.source.checkpoint import CheckpointReader

    try:
        fingerprint = CheckpointReader(model).fingerprint
        files = {name: model / name for name in COPIED_FILES if (model / name).is_file()}
        return {
            "fingerprint": fingerprint,
            "files": {name: sha256_file(path) for name, path in files.items()},
        }
    except (OSError, CheckpointError, ConfigError):
        return {"path": str(model)}


def _identify_text(argument: str) -> dict[str, Any]:
    """Identity of `FILE[=WEIGHT]`: weight and content, or the path where it cannot be read here."""
    from quant_jobs.calibration.token_blocks import CalibrationSource

    source = CalibrationSource.parse(argument)
    try:
        os.close(open_regular(source.path))  # reading a pipe would never end
        # The ending decides how the bytes are read.
        content = {"sha256": sha256_file(source.path), "ending": source.path.suffix}
    except (OSError, UnusableFileError):
        content = {"path": str(source.path)}
    return {"weight": source.weight, **content}


def _status(client: Any, submission_id: str) -> str:
    return str(client.get_job_status(submission_id).value)

"""`submit`: ids computed from the job, and what the same command does the second time."""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from support.chain import Ended
from support.kill_rounds import reference
from support.ports import free_ports
from support.quantizing import SmallModel, contents, make_small_model, small_recipe
from support.raylets import end
from support.synthetic import quantize_plainly

from deepseek.errors import ArtifactError, CalibrationError, DeployError, RecipeError
from deepseek.recipe import load_recipe
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.submission import (
    BuildSubmission,
    QuantizeSubmission,
    make_build,
    make_quantization,
)
from quant_jobs.submit import (
    EXCLUDES,
    check_working_dir,
    connect_to_jobs,
    follow,
    packed_bytes,
    submit,
)


class Jobs:
    """A job server in memory. Like Ray's, it accepts no id twice."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.submitted: list[dict[str, Any]] = []
        self.logs = ["layer 0\n"]
        #: The id that another process submits just before our request arrives.
        self.rival: str | None = None

    def list_jobs(self) -> list[SimpleNamespace]:
        names = [*self.statuses, None]  # a driver that was not submitted has no id
        return [SimpleNamespace(submission_id=name, status=self.get_job_status(name))
                for name in names]  # fmt: skip

    def get_job_status(self, name: str | None) -> SimpleNamespace:
        return SimpleNamespace(value="RUNNING" if name is None else self.statuses[name])

    def submit_job(self, **request: Any) -> str:
        name = request["submission_id"]
        if self.rival is not None:
            self.statuses[self.rival], self.rival = "PENDING", None
        if name in self.statuses:
            raise RuntimeError(f"Job with submission_id {name} already exists")
        self.statuses[name] = "PENDING"
        self.submitted.append(request)
        return str(name)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.logs:
            await asyncio.sleep(0)
            yield text
        self.statuses[name] = "SUCCEEDED" if len(self.logs) > 1 else "RUNNING"
        self.logs.append("layer 1\n")


def job_of(**changes: Any) -> QuantizeSubmission:
    given = {"model": "/data/v3", "recipe": "int4", "output": "/data/out", "workers": 2}
    given = {**given, **changes}
    text = changes.get("calibration", ("/data/a.txt=3", "/data/b.txt"))
    return QuantizeSubmission(
        Path(given["model"]), given["recipe"], text, Path(given["output"]), given["workers"]
    )


def test_the_id_follows_from_what_the_job_is_and_not_from_its_workers() -> None:
    base = job_of().base_id
    assert base.startswith("quantize-out-")
    assert job_of(workers=8).base_id == base
    others = [
        job_of(model="/data/r1"),
        job_of(recipe="int8"),
        job_of(output="/else/out"),
        job_of(calibration=("/data/a.txt", "/data/b.txt")),
        replace(job_of(), device="cuda"),
    ]
    assert replace(job_of(), cpus_per_worker=4).base_id == base
    assert len({base, *(other.base_id for other in others)}) == 6


@pytest.mark.parametrize(
    ("recipe", "digest"),
    [("int8", "31514fb09fd5"), ("int4", "d326ccf12bbb"), ("w4a8", "8cabb47fc0f3")],
)
def test_ids_are_those_of_earlier_versions(recipe: str, digest: str) -> None:
    """A job that an earlier version has submitted is found again."""
    assert job_of(recipe=recipe).base_id == f"quantize-out-{digest}"


def test_a_recipe_file_counts_by_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    content = small_recipe("int4").model_dump(mode="json")
    file.write_text(yaml.safe_dump(content))
    before = job_of(recipe=str(file)).base_id
    file.write_text("# a remark\n" + yaml.safe_dump(content))
    assert job_of(recipe=str(file)).base_id == before
    file.write_text(yaml.safe_dump(content | {"kv_cache": "int8"}))
    assert job_of(recipe=str(file)).base_id != before


def test_a_text_counts_by_its_content_weight_and_ending(tmp_path: Path) -> None:
    def of(*calibration: str) -> str:
        return job_of(calibration=tuple(f"{tmp_path}/{given}" for given in calibration)).base_id

    for name, text in {"a.txt": "one", "b.txt": "two", "c.jsonl": "one"}.items():
        (tmp_path / name).write_text(text)
    before = of("a.txt=3", "b.txt")
    assert of("a.txt=3.0", "b.txt=1") == before
    others = [of("a.txt=2", "b.txt"), of("b.txt", "a.txt=3"), of("c.jsonl=3", "b.txt")]
    assert len({before, *others}) == 4

    (tmp_path / "b.txt").write_text("another text under the same name")
    assert of("a.txt=3", "b.txt") not in (before, *others)
    (tmp_path / "d.txt").write_text("two")
    assert of("a.txt=3", "d.txt") == before, "the name must not matter"


def test_a_model_counts_by_its_content(tmp_path: Path) -> None:
    small = make_small_model(tmp_path)
    before = job_of(model=small.directory).base_id
    shutil.copytree(small.directory, tmp_path / "copy")
    assert job_of(model=tmp_path / "copy").base_id == before, "the path must not matter"

    tokenizer = tmp_path / "copy" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("w95", "w96"))
    with_another_tokenizer = job_of(model=tmp_path / "copy").base_id
    shard = next(small.directory.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert len({before, with_another_tokenizer, job_of(model=small.directory).base_id}) == 3


def test_what_cannot_be_read_here_counts_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    ids = [job_of(model=tmp_path / name).base_id for name in ("absent", "mount", "part")]
    ids += [job_of(calibration=(f"{tmp_path}/{name}",)).base_id for name in ("absent", "mount")]
    assert len(set(ids)) == 5
    assert job_of(model=tmp_path / "absent").base_id == ids[0]

    jobs, job = Jobs(), job_of(model=tmp_path / "absent")
    assert [submit(jobs, job).outcome for _ in range(2)] == ["submitted", "running"]


def test_a_text_that_changed_is_submitted_as_a_job_of_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    jobs, job = Jobs(), job_of(calibration=(str(text),))
    first = submit(jobs, job)
    assert submit(jobs, job).outcome == "running"
    jobs.statuses[first.submission_id] = "SUCCEEDED"
    text.write_text("two")
    second = submit(jobs, job)
    assert (second.outcome, len(jobs.submitted)) == ("submitted", 2)
    assert second.submission_id != first.submission_id


def test_a_weight_that_is_none_is_refused_before_anything_is_submitted() -> None:
    with pytest.raises(CalibrationError, match="text=-1: the weight must be a positive number"):
        make_quantization(Path("m"), "int8", ["text=-1"], Path("out"), 1)


def test_a_file_of_an_unknown_kind_is_refused_and_a_pipe_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"text\.csv has the ending \.csv"):
        make_quantization(Path("m"), "int8", ["text.csv=2"], Path("out"), 1)
    os.mkfifo(tmp_path / "text.txt")
    job = make_quantization(Path("m"), "int8", [f"{tmp_path}/text.txt"], Path("out"), 1)
    assert job.base_id  # by its path, as what cannot be read here


def test_paths_become_absolute_and_the_command_survives_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = make_quantization(Path("a model"), "int8", ["text=2"], Path("out"), 3)
    assert job.model == tmp_path / "a model"
    assert job.entrypoint == (
        f"python -m quant_jobs quantize --model '{tmp_path}/a model' --recipe int8 "
        f"--calibration {tmp_path}/text=2 --output {tmp_path}/out --workers 3 "
        "--device cpu --cpus-per-worker 1"
    )
    job = make_quantization(Path("m"), "int8", ["t"], Path("out"), 3, "cuda", 4)
    assert job.entrypoint.endswith(" --workers 3 --device cuda --cpus-per-worker 4")
    with pytest.raises(RecipeError, match="no recipe 'int3'"):
        make_quantization(Path("m"), "int3", ["text"], Path("out"), 1)


def test_a_job_without_ray_is_not_submitted_to_one(command: Callable[..., Ended]) -> None:
    ended = command(
        *("submit", "--model", "m", "--recipe", "int8", "--calibration", "text"),
        *("--output", "out", "--workers", 0, "--address", "http://127.0.0.1:1"),
    )
    assert ended.code == 2
    assert ended.err.startswith("error: --workers 0 is a job without Ray, which cannot be submitt")
    assert ended.err.count("\n") == 1


def build_of(checkpoint: str = "/data/int4", **changes: Any) -> BuildSubmission:
    """A build for TensorRT-LLM; `changes` are options and the others of `make_build`."""
    given = {"target": "trtllm", "output": "/data/engine", "stage": None, "workers": 4}
    given |= changes
    target, output, stage = (given.pop(name) for name in ("target", "output", "stage"))
    place = None if stage is None else Path(stage)
    return make_build(Path(checkpoint), target, Path(output), BuildOptions(**given), place)


def test_the_id_of_a_build_follows_from_what_it_makes_and_not_from_its_workers() -> None:
    base = build_of().base_id
    assert base.startswith("build-engine-")
    same = [
        build_of(workers=8),
        build_of(tp=8),  # the GPUs of --hardware
        build_of(tp=8, ep=8),
        build_of(engine_version="1.2.1"),
        build_of(dialect="mixed"),
    ]
    assert {job.base_id for job in same} == {base}
    others = [
        build_of("/data/w4a8"),
        build_of(output="/else/engine"),
        build_of(tp=4),
        build_of(ep=2),
        build_of(kv_cache="fp8"),
        build_of(dialect="single"),
        build_of(engine_version="1.3.0rc29"),
        build_of(mtp=True),
        build_of(context=4096),
        build_of(hardware="8xH200-141GB"),
        build_of(stage="/local/engine"),
        build_of(target="embedded", workers=1),
    ]
    assert len({base, *(job.base_id for job in others)}) == len(others) + 1


def test_a_checkpoint_counts_by_its_digest(tmp_path: Path, tiny_model: Path) -> None:
    quantize_plainly(tiny_model, load_recipe("int8"), tmp_path / "int8")
    shutil.copytree(tmp_path / "int8", tmp_path / "copy")
    quantize_plainly(tiny_model, load_recipe("int8-weight-only"), tmp_path / "other")
    engine = {"target": "embedded", "workers": 1, "output": "/data/engine"}
    of = {
        name: build_of(str(tmp_path / name), **engine).base_id
        for name in ("int8", "copy", "other", "absent")
    }
    assert of["copy"] == of["int8"], "the path must not matter"
    assert len(set(of.values())) == 3
    source = build_of(str(tiny_model), **engine).base_id
    shutil.copytree(tiny_model, tmp_path / "source")
    assert build_of(str(tmp_path / "source"), **engine).base_id == source
    assert source not in of.values()


def test_the_command_of_a_build_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_of("a checkpoint", output="out", mtp=True, stage="/local/{node}").entrypoint == (
        f"python -m quant_jobs build --checkpoint '{tmp_path}/a checkpoint' --target trtllm "
        f"--output {tmp_path}/out --tp 8 --ep 8 --engine-version 1.2.1 --mtp --workers 4 "
        "--stage '/local/{node}'"
    )
    embedded = build_of("/c", target="embedded", output="/out", workers=1)
    assert embedded.entrypoint == (
        "python -m quant_jobs build --checkpoint /c --target embedded --output /out"
    )
    jobs = Jobs()
    submit(jobs, embedded)
    assert jobs.submitted[0]["metadata"] == {"output": "/out", "target": "embedded"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers": 0}, "--workers 0 is a job without Ray, which cannot be .* or run build here"),
        ({"target": "onnx"}, "target 'onnx' is unknown"),
        ({"tp": 8, "ep": 3}, "--ep 3 does not divide --tp 8"),
        ({"engine_version": "0.1"}, "TensorRT-LLM 0.1 is not known to us"),
        ({"target": "embedded", "mtp": True}, "--mtp means nothing to target embedded"),
        ({"hardware": "8xABACUS"}, "ABACUS"),
    ],
)
def test_a_build_that_no_node_can_make_is_refused_here(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DeployError, match=sentence):
        build_of(**changes)


def test_a_checkpoint_that_the_target_cannot_load_is_refused_here(
    tiny_model: Path, tmp_path: Path
) -> None:
    quantize_plainly(tiny_model, load_recipe("int8"), tmp_path / "int8")
    with pytest.raises(DeployError, match="trtllm"):
        build_of(str(tmp_path / "int8"))
    (tmp_path / "int8" / "intserve.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"intserve\.json"):
        build_of(str(tmp_path / "int8"), target="embedded", workers=1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "m"), "error: give --model, --recipe and --calibration to submit a quantiza"),
        (("--checkpoint", "c", "--model", "m"), "error: --model is for a quantization, and --chec"),
        (("--checkpoint", "c", "--device", "cuda"), "error: --device is for a quantization, and "),
        (
            ("--model", "m", "--recipe", "int8", "--calibration", "t", "--tp", "8"),
            "error: --tp is for a build, which --checkpoint submits; leave one of them out",
        ),
    ],
)
def test_a_command_that_is_half_a_build_is_one_sentence(
    command: Callable[..., Ended], words: tuple[str, ...], sentence: str
) -> None:
    ended = command("submit", "--output", "out", "--address", "http://127.0.0.1:1", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(sentence)


def test_the_same_command_attaches_submits_again_or_has_nothing_to_do() -> None:
    jobs, job = Jobs(), job_of()
    base = job.base_id
    jobs.statuses[f"{base}-other"] = jobs.statuses["quantize-out-0123"] = "RUNNING"
    outcomes = []
    for status in ("RUNNING", "FAILED", "STOPPED", "PENDING", "SUCCEEDED"):
        submitted = submit(jobs, job)
        outcomes.append((submitted.submission_id.removeprefix(base), submitted.outcome))
        jobs.statuses[submitted.submission_id] = status
    outcomes.append((submit(jobs, job).submission_id.removeprefix(base), submit(jobs, job).outcome))
    assert outcomes == [
        ("", "submitted"),
        ("", "running"),
        ("-2", "submitted"),
        ("-3", "submitted"),
        ("-3", "running"),
        ("-3", "succeeded"),
    ]
    assert [request["entrypoint_num_cpus"] for request in jobs.submitted] == [0, 0, 0]


def test_of_two_at_the_same_moment_one_submits_and_the_other_attaches() -> None:
    jobs, job = Jobs(), job_of()
    jobs.rival = job.base_id
    submitted = submit(jobs, job)
    assert (submitted.submission_id, submitted.outcome) == (job.base_id, "running")
    assert jobs.submitted == []


def test_a_refusal_of_the_server_is_one_sentence() -> None:
    class Refusing(Jobs):
        def submit_job(self, **request: Any) -> str:
            raise RuntimeError("Request failed with status code 500: no space\nTraceback")

    with pytest.raises(DeployError, match="refuses quantize-out-.*no space; see the logs"):
        submit(Refusing(), job_of())


def test_a_head_that_is_starting_is_asked_again_for_a_while() -> None:
    class Starting(Jobs):
        refusals = 0

        def submit_job(self, **request: Any) -> str:
            if self.refusals < 3:
                self.refusals += 1
                raise RuntimeError("status code 500: No available agent to submit job")
            return super().submit_job(**request)

    assert submit(Starting(), job_of()).outcome == "submitted"
    with pytest.raises(DeployError, match="refuses quantize-out-.*No available agent"):
        submit(Starting(), job_of(), start_timeout_s=0.0)


def make_working_dir(folder: Path) -> Path:
    """Two files to send, and something of everything that is not sent. No .gitignore."""
    for name in ("code.py", "package/runs/kept.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    unwanted = [".git/objects/a", ".venv/bin/python", "venv/b", "runs/out/c", "one.egg-info/d"]
    unwanted += ["gate.key", "package/gate.key"]
    unwanted += [f"package/{name}/e" for name in ("__pycache__", ".mypy_cache", ".ruff_cache")]
    unwanted += [f"{name}/f" for name in (".pytest_cache", ".hypothesis")]
    for name in unwanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(1 << 20))
    return folder


def test_what_is_sent_is_the_code_and_is_measured_as_ray_packs_it(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    tree = make_working_dir(tmp_path / "tree")
    sizes = packed_bytes(tree)
    assert sorted(sizes) == ["code.py", "package/runs"]
    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True, excludes=list(EXCLUDES))
    assert package.stat().st_size == sum(sizes.values()) + 22  # the archive's last record
    with ZipFile(package) as archive:
        assert sorted(archive.namelist()) == ["code.py", "package/runs/kept.py"]

    (tree / ".rayignore").write_text("code.py\n")
    assert sorted(packed_bytes(tree)) == [".rayignore", "package/runs"]


def test_the_job_server_is_told_what_not_to_pack(tmp_path: Path) -> None:
    jobs = Jobs()
    submit(jobs, job_of(), make_working_dir(tmp_path))
    assert jobs.submitted[0]["runtime_env"] == {
        "working_dir": str(tmp_path),
        "excludes": list(EXCLUDES),
    }


def test_a_working_directory_that_is_too_large_is_one_sentence_with_what_to_exclude(
    tmp_path: Path,
) -> None:
    tree = make_working_dir(tmp_path)
    for name, mib in {"data/a/x": 1, "data/a/y": 2, "weights.bin": 2, "notes": 1}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(bytes(mib << 20))
    with pytest.raises(DeployError) as refused:
        check_working_dir(tree, limit_bytes=4 << 20)
    assert str(refused.value) == (
        f"--working-dir {tree} is 6.0 MiB to send and Ray's job server takes less than 4 MiB; name "
        f"what the code does not need in {tree}/.rayignore (as in a .gitignore), the largest being "
        "data/a (3.0 MiB), weights.bin (2.0 MiB), notes (1.0 MiB)"
    )
    (tree / ".rayignore").write_text("data\n")
    check_working_dir(tree, limit_bytes=4 << 20)


def test_a_working_directory_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    jobs = Jobs()
    with pytest.raises(DeployError, match="--working-dir .*/absent is not a directory"):
        submit(jobs, job_of(), tmp_path / "absent")
    assert jobs.submitted == []


def test_following_goes_on_when_the_log_ends_before_the_job() -> None:
    jobs, out = Jobs(), io.StringIO()
    submitted = submit(jobs, job_of())
    assert follow(jobs, submitted.submission_id, out, sleep=lambda seconds: None) == "SUCCEEDED"
    assert out.getvalue() == "layer 0\nlayer 0\nlayer 1\n"


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_no_cluster_is_guessed(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DeployError, match="no cluster is named: give --address or set RAY_ADDRESS"):
        connect_to_jobs(address)


def test_an_address_without_a_job_server_is_one_sentence(command: Callable[..., Ended]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        ended = command(
            *("submit", "--model", "m", "--recipe", "int8", "--calibration", "text"),
            *("--output", "out", "--address", address),
        )
    assert ended.code == 2
    assert f"error: no Ray job server answers at '{address}'" in ended.err
    assert ended.err.count("\n") == 1


# --- on a real head with its job server ---


@dataclass(frozen=True)
class Head:
    """A head with its job server; `environment` lets a process in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of one CPU, with a token made for it and ports of its own: Ray's default for the agent
    that starts jobs may be taken by another Ray of this machine."""
    folder = Path(tempfile.mkdtemp(prefix="h-", dir=os.environ["RAY_TMPDIR"]))
    port, agent_port = free_ports(2)
    # The job's `python` is found by PATH, as on a node whose environment is activated.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = {**os.environ, "PATH": path, "RAY_TMPDIR": str(folder), **token}
    environment.pop("RAY_ADDRESS", None)
    command = [
        *("ray", "start", "--head", "--block", "--port=0", "--num-cpus=1"),
        *(f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}"),
        f"--object-store-memory={100 << 20}",
    ]
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not listens(port):
            assert process.poll() is None, (folder / "start.log").read_text()
            assert time.monotonic() < deadline, (folder / "start.log").read_text()
            time.sleep(0.1)
        yield Head(f"http://127.0.0.1:{port}", environment)
    finally:
        process.kill()
        process.wait()
        end(folder)
        shutil.rmtree(folder)


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def submit_as_process(
    head: Head, small: SmallModel, folder: Path, *more: str, root: Path, **changes: str
) -> subprocess.CompletedProcess[str]:
    """`python -m quant_jobs submit` on the head; Ray reads its token when it is imported."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe("int4-gptq").model_dump(mode="json")))
    return subprocess.run(
        [
            *(sys.executable, "-m", "quant_jobs", "submit", "--model", str(small.directory)),
            *("--recipe", str(recipe), "--calibration", str(small.text)),
            *("--output", str(folder / "out"), "--json", *more),
        ],
        cwd=root,
        env={**head.environment, "RAY_ADDRESS": head.address, **changes},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_was_killed_is_submitted_again_resumes_and_writes_the_same_bytes(
    head: Head, tmp_path: Path, root: Path
) -> None:
    small = make_small_model(tmp_path)

    def again(*more: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return submit_as_process(head, small, tmp_path, *more, root=root, **changes)

    def answer(*more: str) -> dict[str, str]:
        ended = again(*more)
        assert ended.returncode == 0, ended.stderr
        result: dict[str, str] = json.loads(ended.stdout)
        return result

    for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        refused = again(**wrong)
        assert refused.returncode == 2
        assert "wants its token: set RAY_AUTH_MODE=token" in refused.stderr

    first = answer()
    base = first["submission_id"]
    assert first["outcome"] == "submitted"
    second = answer()
    assert (second["submission_id"], second["outcome"]) == (base, "running")

    published = tmp_path / "out" / ".job" / "part-00000.json"
    wait_until(published.exists)  # the first layer is published
    os.kill(int((tmp_path / "out" / ".job" / "lock").read_text()), signal.SIGKILL)
    wait_until(lambda: answer()["submission_id"] == f"{base}-2")

    ended = again("--wait")
    assert ended.returncode == 0, ended.stderr
    third = json.loads(ended.stdout)
    assert (third["submission_id"], third["status"]) == (f"{base}-2", "SUCCEEDED")
    assert "resuming, " in ended.stderr
    done = again("--wait")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (0, "succeeded")

    undisturbed = reference(small, small_recipe("int4-gptq"), tmp_path / "plain")
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.ray
@pytest.mark.slow
def test_a_build_is_submitted_found_again_and_staged(
    head: Head, tiny_model: Path, tmp_path: Path, root: Path
) -> None:
    artifact, output, copy = tmp_path / "int8", tmp_path / "engine", tmp_path / "copy"
    quantize_plainly(tiny_model, load_recipe("int8"), artifact)

    def answer(*more: str) -> dict[str, str]:
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "quant_jobs", "submit", "--checkpoint", str(artifact)),
                *("--output", str(output), "--stage", str(copy), "--json", *more),
            ],
            cwd=root,
            env={**head.environment, "RAY_ADDRESS": head.address},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        result: dict[str, str] = json.loads(ended.stdout)
        return result

    first, second = answer(), answer()
    assert (first["outcome"], second["outcome"]) == ("submitted", "running")
    assert first["submission_id"] == second["submission_id"]
    assert answer("--wait")["status"] == "SUCCEEDED"
    assert answer()["outcome"] == "succeeded"
    run_build(artifact, "embedded", tmp_path / "plain")
    assert contents(output) == contents(copy) == contents(tmp_path / "plain")


#: Makes every process that imports the uploaded code record its path and the files beside it.
MARK = """
def _mark() -> None:
    import json, os
    from pathlib import Path
    place = Path(__file__).resolve()
    said = {{"place": str(place), "beside": sorted(os.listdir(place.parents[2]))}}
    Path({folder!r}, str(os.getpid())).write_text(json.dumps(said))

_mark()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_from_the_working_directory_that_was_sent_along(
    head: Head, tmp_path: Path, root: Path
) -> None:
    small = make_small_model(tmp_path)
    tree, marks = make_working_dir(tmp_path / "tree"), tmp_path / "marks"
    marks.mkdir()
    for package in ("deepseek", "cluster", "quant_jobs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / package, tree / package, ignore=ignored)
    with (tree / "quant_jobs" / "workers" / "actor.py").open("a") as file:
        file.write(MARK.format(folder=str(marks)))

    ended = submit_as_process(
        head, small, tmp_path, "--working-dir", str(tree), "--wait", root=root
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["status"] == "SUCCEEDED"
    records = [json.loads(mark.read_text()) for mark in marks.iterdir()]
    assert len(records) == 2, "the driver and its worker"
    for record in records:
        assert "_ray_pkg_" in record["place"]
        assert record["beside"] == ["cluster", "code.py", "deepseek", "package", "quant_jobs"]
    undisturbed = reference(small, small_recipe("int4-gptq"), tmp_path / "plain")
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.ray
@pytest.mark.slow
def test_a_tree_is_refused_here_where_the_job_server_would_refuse_it(
    head: Head, tmp_path: Path, root: Path
) -> None:
    small = make_small_model(tmp_path)
    tree = make_working_dir(tmp_path / "tree")
    with (tree / "weights.bin").open("wb") as file:
        file.truncate(100 << 20)
    ended = submit_as_process(head, small, tmp_path, "--working-dir", str(tree), root=root)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: --working-dir {tree} is 100.0 MiB to send and Ray's ")
    assert "the largest being weights.bin (100.0 MiB), " in ended.stderr
    assert ended.stderr.count("\n") == 1

    program = (
        "import sys\n"
        "from ray.job_submission import JobSubmissionClient\n"
        "client = JobSubmissionClient(sys.argv[1])\n"
        "client.submit_job(entrypoint='true', runtime_env={'working_dir': sys.argv[2]})\n"
    )
    unchecked = subprocess.run(
        [sys.executable, "-c", program, head.address, str(tree)],
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert unchecked.returncode == 1
    assert "Maximum request body size 104857600 exceeded" in unchecked.stderr


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)

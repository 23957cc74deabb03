"""A build for TensorRT-LLM on 1, 2 and 4 workers, with kills, and staged: time, bytes, equality.

    python bench/sharded_build.py [--layers 5] [--experts 8]

Rounds a synthetic model of true DeepSeek-V3 layers (one dense, the others MoE with few experts) to
`w4a8` without calibration, builds its engine with `--workers 0` and on three raylets of this
machine, then once with the driver killed three times, once with a killed worker and a killed node,
and stages it into a directory of each raylet. The floor is a plain copy of the same bytes, synced,
in the same run: a build has to read the artifact and write the engine, which is about as large.
Prints Markdown; ends with 1 if any bytes differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from support.building import TASK, BuildProcess
from support.raylets import Raylets, use_token
from support.synthetic import quantize_plainly
from watched import ROOT, make_model

from deepseek.artifact.engine_manifest import ENGINE_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_app, run
from deepseek.files import CHUNK_BYTES, sha256_file
from deepseek.recipe import load_recipe
from deepseek.source.synthetic import Size

app = make_app(__doc__ or "")
NUM_NODES, CPUS = 3, 2


@dataclass(frozen=True, slots=True)
class Built:
    """One command: seconds of all of it, and from the first task to the last file; its answer."""

    wall_s: float
    files_s: float
    answer: dict[str, Any]


@app.command()
def main(
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 2, 4.")] = None,
    layers: Annotated[int, typer.Option(min=2, help="One of them dense.")] = 5,
    experts: Annotated[int, typer.Option(min=8, help="Routed experts per MoE layer.")] = 8,
    output: Annotated[Path, typer.Option(help="Where model and engines go.")] = ROOT
    / "runs"
    / "bench-sharded",
) -> None:
    """See the module's docstring."""
    output.mkdir(parents=True, exist_ok=True)
    artifact = make_artifact(output, Size(layers=layers, experts=experts, vocab=258))
    num_bytes = sum(path.stat().st_size for path in artifact.glob("model-*.safetensors"))
    copied, hashed = floors(artifact, output / "copy", num_bytes)
    typer.echo(
        f"{layers} true-shape layers, {experts} experts, `w4a8`: {num_bytes / 1e9:.2f} GB to read; "
        f"{os.cpu_count()} cores. Plain copy, synced: {copied:.1f} s, "
        f"{num_bytes / copied / 1e6:.0f} MB/s; with one SHA-256: {hashed:.1f} s.\n"
    )
    typer.echo(
        "| build | command s | its files s | of the plain copy | read GB | written GB "
        "| read + written MB/s | engine |\n|---|" + "---:|" * 6 + "---|"
    )
    shutil.rmtree(output / "plain", ignore_errors=True)
    plain = watch(BuildProcess(None, output / "plain", *words(artifact, output / "plain", 0)))
    typer.echo(row("no Ray", plain, copied))
    expected = digests(output / "plain")
    use_token()
    with Raylets(NUM_NODES, CPUS) as cluster:
        for count in workers or (1, 2, 4):
            engine = output / f"workers-{count}"
            shutil.rmtree(engine, ignore_errors=True)
            done = watch(BuildProcess(cluster, engine, *words(artifact, engine, count)))
            typer.echo(row(f"{count} worker{'s' if count > 1 else ''}", done, copied))
            check(engine, expected)
        typer.echo(f"\n{with_killed_drivers(cluster, artifact, output / 'drivers', expected)}")
        typer.echo(stage(cluster, artifact, output / "plain", output))
        typer.echo(with_killed_workers(cluster, artifact, output / "workers", expected))
    shutil.rmtree(output / "plain")


def make_artifact(output: Path, size: Size) -> Path:
    """The synthetic model rounded to w4a8; made where it is absent."""
    artifact = output / f"w4a8-{size.layers}x{size.experts}"
    if not (artifact / "intserve.json").exists():
        model = make_model(output / f"model-{size.layers}x{size.experts}", size)
        quantize_plainly(model.directory, load_recipe("w4a8"), artifact)
    ArtifactReader(artifact)
    return artifact


def floors(artifact: Path, place: Path, num_bytes: int) -> tuple[float, float]:
    """Seconds to copy the artifact's tensor files and sync them: plainly, and with a digest."""
    seconds = []
    for digest in (None, hashlib.sha256()):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        started, copied = time.monotonic(), 0
        for path in sorted(artifact.glob("model-*.safetensors")):
            with path.open("rb") as source, (place / path.name).open("wb") as copy:
                while chunk := source.read(CHUNK_BYTES):
                    if digest is not None:
                        digest.update(chunk)
                    copied += copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())
        seconds.append(time.monotonic() - started)
        assert copied == num_bytes
    shutil.rmtree(place)
    return seconds[0], seconds[1]


def words(artifact: Path, engine: Path, workers: int) -> list[object]:
    return [
        *("-m", "quant_jobs", "build", "--checkpoint", artifact, "--output", engine),
        *("--target", "trtllm", "--tp", 8, "--ep", 8, "--workers", workers, "--json"),
    ]


def watch(build: BuildProcess) -> Built:
    """Wait for the end of a build that has just been started."""
    started = time.monotonic()
    begun = wait(build, (build.output / ".build" / "build.json").exists)
    ended = wait(build, (build.output / ENGINE_FILE).exists)
    answer = finish(build)
    return Built(time.monotonic() - started, ended - begun, answer)


def wait(build: BuildProcess, reached: Callable[[], bool]) -> float:
    """When something holds of a build."""
    while not reached() and build.process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def finish(build: BuildProcess) -> dict[str, Any]:
    code, out, err = build.end()
    if code:
        raise SystemExit(f"bench: build ended with {code}: {err}")
    answer: dict[str, Any] = json.loads(out)
    return answer


def row(name: str, built: Built, copied: float) -> str:
    read, written = built.answer["bytes_read"], built.answer["bytes"]
    return (
        f"| {name} | {built.wall_s:.1f} | {built.files_s:.1f} | {built.files_s / copied:.1f}x "
        f"| {read / 1e9:.3f} | {written / 1e9:.3f} "
        f"| {(read + written) / built.files_s / 1e6:.0f} "
        f"| `{built.answer['engine_digest'][:16]}` |"
    )


def digests(engine: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(engine.iterdir()) if path.is_file()}


def check(engine: Path, expected: dict[str, str]) -> None:
    """Check that the engine has the expected bytes, and delete it."""
    if digests(engine) != expected:
        raise SystemExit(f"bench: the bytes of {engine} differ")
    shutil.rmtree(engine)


def with_killed_drivers(
    cluster: Raylets, artifact: Path, engine: Path, expected: dict[str, str]
) -> str:
    """Three drivers killed after one, two and three files, then a fourth to the end."""
    shutil.rmtree(engine, ignore_errors=True)
    parts = []
    for number in (1, 2, 3):
        build = BuildProcess(cluster, engine, *words(artifact, engine, 2))
        build.wait_for(lambda build=build, number=number: build.num_parts >= number)  # type: ignore[misc]
        build.kill()
        parts.append(str(build.num_parts))
    answer = finish(BuildProcess(cluster, engine, *words(artifact, engine, 2)))
    check(engine, expected)
    return (
        f"Driver killed with {', '.join(parts)} files recorded, then the same command: the same "
        f"bytes, {answer['bytes_read'] / 1e9:.3f} GB read for the files of all runs."
    )


def with_killed_workers(
    cluster: Raylets, artifact: Path, engine: Path, expected: dict[str, str]
) -> str:
    """A worker killed in the first file, a node in a later one."""
    shutil.rmtree(engine, ignore_errors=True)
    build = BuildProcess(cluster, engine, *words(artifact, engine, 3))
    build.wait_for(lambda: bool(cluster.processes(TASK)))
    os.kill(cluster.processes(TASK)[0], signal.SIGKILL)
    build.wait_for(lambda: build.num_parts >= 1 and bool(cluster.processes(TASK)))
    stopped = cluster.processes(TASK)[0]
    os.kill(stopped, signal.SIGSTOP)  # so that it outlives its raylet with a file in hand
    cluster.kill_node(cluster.index_of(stopped))
    code, _, err = build.end()
    if code:
        raise SystemExit(f"bench: build ended with {code}: {err}")
    check(engine, expected)
    lost = err.count("lost the worker or node that had file ")
    return f"A worker and a node killed: {lost} tasks lost and run again, the same bytes."


def stage(cluster: Raylets, artifact: Path, engine: Path, output: Path) -> str:
    """The finished engine verified and copied into a directory of each node, twice."""
    place = output / "nodes"
    shutil.rmtree(place, ignore_errors=True)
    lines = ["", "| staging | node | copied GB | kept GB | s | GB/s |", "|---|---|" + "---:|" * 4]
    expected = digests(engine)
    for what in ("first", "again"):
        answer = finish(
            BuildProcess(
                cluster, engine, *words(artifact, engine, 2), "--stage", place / "{node}" / "engine"
            )
        )
        for number, node in enumerate(answer["stage"]["nodes"]):
            copied, kept = node["copied_bytes"], node["kept_bytes"]
            if digests(Path(node["directory"])) != expected:
                raise SystemExit(f"bench: the bytes of {node['directory']} differ")
            lines.append(
                f"| {what} | {number + 1} | {copied / 1e9:.3f} | {kept / 1e9:.3f} "
                f"| {node['seconds']:.1f} | {(copied + kept) / 1e9 / node['seconds']:.2f} |"
            )
    shutil.rmtree(place)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run(app)

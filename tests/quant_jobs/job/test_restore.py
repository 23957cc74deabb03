"""A rerun of a finished job: lost files come back with the same bytes, or a sentence says why not.

And a source that changes where its fingerprint does not look, between a kill and the rerun.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.quantizing import (
    NUM_LAYERS,
    SmallModel,
    contents,
    flip_byte,
    flip_source_byte,
    small_recipe,
)

from deepseek.artifact.manifest import read_manifest, write_manifest
from deepseek.artifact.tensors import layer_file
from deepseek.errors import ArtifactError, CheckpointError
from quant_jobs.job.job import finished, plan_job
from quant_jobs.job.progress import Event
from quant_jobs.job.restore import lost_files

pytestmark = pytest.mark.heavy

RunJob = Callable[..., Any]


class Stopped(BaseException):
    """Ends a run at once, as a kill would."""


def stop_at(step: str, layer: int | str) -> Callable[[Event], None]:
    def note(event: Event) -> None:
        if (event.step, event.layer) == (step, layer):
            raise Stopped

    return note


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


LOSSES: dict[str, dict[str, Callable[[Path], None]]] = {
    "a layer is missing": {layer_file(1): delete},
    "a byte of a layer is flipped": {layer_file(0): flip_byte},
    "two layers are gone and one is cut off": {
        layer_file(0): delete,
        layer_file(2): delete,
        layer_file(1): cut,
    },
    "the globals and the MTP layer are gone": {
        layer_file("globals"): delete,
        layer_file(NUM_LAYERS): delete,
    },
    "what lies beside the tensors is damaged": {
        "config.json": flip_byte,
        "tokenizer.json": delete,
        "model.safetensors.index.json": cut,
    },
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_finished_output_has_lost_is_made_again(
    run_job: RunJob, whole: Path, tmp_path: Path, loss: str
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    reports = {path.name: path.read_bytes() for path in output.glob("job_report.*")}
    for name, damage in LOSSES[loss].items():
        damage(output / name)
    assert set(lost_files(output, read_manifest(output), whole=False)) == LOSSES[loss].keys()
    published = []

    def note(event: Event) -> None:
        if event.published is not None:
            published.append(event.published.record.file)

    assert run_job(output, note) == read_manifest(whole)
    assert contents(output) == contents(whole)
    assert sorted(published) == sorted(name for name in LOSSES[loss] if name.startswith("model-"))
    assert reports == {path.name: path.read_bytes() for path in output.glob("job_report.*")}


def test_a_restoration_that_is_killed_goes_on(run_job: RunJob, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for layer in (0, 2):
        (output / layer_file(layer)).unlink()
    with pytest.raises(Stopped):
        run_job(output, stop_at("carried", 0))
    with pytest.raises(Stopped):
        run_job(output, stop_at("calibrated", 2))
    run_job(output)
    assert contents(output) == contents(whole)


def test_a_large_artifact_is_read_whole_where_it_is_asked_for(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    manifest = read_manifest(output)
    flip_byte(output / layer_file(1))
    cut(output / layer_file(0))
    flip_byte(output / layer_file(2), 30)  # in its header
    quick = lost_files(output, manifest, whole=False, small_bytes=0)
    assert quick == [layer_file(0), layer_file(2)]
    assert lost_files(output, manifest, whole=True, small_bytes=0) == [
        layer_file(layer) for layer in range(3)
    ]


def test_an_intact_output_is_not_touched(run_job: RunJob, whole: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    run_job(whole)
    assert times == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_layer_that_comes_out_otherwise_is_reported_and_the_manifest_stays(
    run_job: RunJob, whole: Path, tmp_path: Path
) -> None:
    """The manifest records other bytes than this machine makes."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    manifest = read_manifest(output)
    record = manifest.record(1)
    name = min(record.tensors)
    other = record.model_copy(
        update={"sha256": "0" * 64, "tensors": record.tensors | {name: "0" * 32}}
    )
    layers = tuple(other if layer == record else layer for layer in manifest.layers)
    write_manifest(output, manifest.model_copy(update={"layers": layers}))
    before = (output / "intserve.json").read_bytes()
    with pytest.raises(
        ArtifactError, match=rf"made again it has other bytes .*\(tensor {name} differs\).*a copy"
    ):
        run_job(output)
    assert (output / "intserve.json").read_bytes() == before


def copy_of(model: SmallModel, place: Path) -> SmallModel:
    shutil.copytree(model.directory, place)
    return SmallModel(place, model.text)


def test_lost_files_are_not_made_again_from_a_changed_source(
    run_job: RunJob, model: SmallModel, whole: Path, tmp_path: Path
) -> None:
    output, source = tmp_path / "out", copy_of(model, tmp_path / "model")
    shutil.copytree(whole, output)
    (output / "tokenizer.json").unlink()
    (source.directory / "tokenizer_config.json").write_text('{"changed": 1}\n')
    (output / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer_config.json is not what it was made from"):
        run_job(output, source=source)
    (source.directory / "tokenizer_config.json").write_text("{}\n")
    (output / layer_file(1)).unlink()
    flip_source_byte(source, "model.layers.1.mlp.experts.3.up_proj.weight")
    with pytest.raises(CheckpointError, match="layer 1 of .*model has other bytes than when"):
        run_job(output, source=source)
    assert not (output / layer_file(1)).exists()
    flip_source_byte(source, "model.layers.1.mlp.experts.3.up_proj.weight")
    (output / layer_file("globals")).unlink()
    flip_source_byte(source, "lm_head.weight")
    with pytest.raises(CheckpointError, match="the tensors outside the layers of .* have other"):
        run_job(output, source=source)


@pytest.mark.parametrize(
    ("stopped", "lost", "changed"),
    [
        (("solved", 1), None, "model.layers.1.mlp.experts.3.up_proj.weight"),
        (("carried", 1), layer_file(0), "model.layers.0.self_attn.o_proj.weight"),
        (("published", "globals"), None, "model.embed_tokens.weight"),
    ],
)
def test_a_source_that_changes_between_a_kill_and_the_rerun_is_noticed(
    run_job: RunJob,
    model: SmallModel,
    whole: Path,
    tmp_path: Path,
    stopped: tuple[str, int | str],
    lost: str | None,
    changed: str,
) -> None:
    output, source = tmp_path / "out", copy_of(model, tmp_path / "model")
    with pytest.raises(Stopped):
        run_job(output, stop_at(*stopped), source=source)
    if lost is not None:
        (output / lost).unlink()
    flip_source_byte(source, changed)
    with pytest.raises(
        CheckpointError, match=f"tensor {changed} of {source.directory} has other bytes than when"
    ):
        run_job(output, source=source)
    flip_source_byte(source, changed)
    run_job(output, source=source)
    assert contents(output) == contents(whole)


def test_a_damaged_manifest_says_how_to_begin_anew(
    model: SmallModel, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    flip_byte(output / "intserve.json", -500)
    job = plan_job(model.directory, small_recipe("int8-smoothquant"), model.text, output)
    with pytest.raises(ArtifactError, match=f"intserve.json.*; .* delete {output} first"):
        finished(job)

"""A disk that fills up, or a limit on files, at any point of a job: a sentence, then the same
bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.disks import NotPermitted, fill, limited_files, mounted
from support.quantizing import NUM_LAYERS, SmallModel, contents, small_recipe

from deepseek.artifact.tensors import layer_file, layer_keys
from deepseek.errors import OutputError
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.job.folder import FOLDER, JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.job.progress import Event, Step
from quant_jobs.job.space import boundary_bytes, published_bytes
from quant_jobs.quantize import run_quantize

pytestmark = pytest.mark.heavy

#: After each of these the disk is full: before globals, before each layer and each boundary, and
#: before what is written at the end.
MOMENTS: tuple[tuple[Step, Any], ...] = (
    ("started", 0),
    ("published", NUM_LAYERS),
    ("published", "globals"),
    ("solved", 0),
    ("published", 0),
    ("started", 0),
    ("carried", 1),
    ("calibrated", 2),
    ("published", 2),
)


@pytest.fixture(params=["limit", "full"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where the output goes: a plain directory, or a disk of its own."""
    if request.param == "limit":
        yield tmp_path
        return
    try:
        with mounted(tmp_path / "disk", "size=20m") as disk:
            yield disk
    except NotPermitted as error:
        pytest.skip(str(error))


def test_a_disk_that_refuses_at_any_moment_costs_nothing_but_a_rerun(
    run_job: Callable[..., Any], whole: Path, place: Path
) -> None:
    """One output, refused again and again, ends in the bytes of an undisturbed run."""
    output, is_disk = place / "out", place.name == "disk"
    refused = []
    for moment in MOMENTS:
        if moment == ("started", 0) and refused:  # with nothing to write but boundaries
            for boundary in (output / FOLDER).glob("boundary-*"):
                shutil.rmtree(boundary)
        with ExitStack() as stack:

            def refuse(
                event: Event, moment: tuple[Step, Any] = moment, stack: ExitStack = stack
            ) -> None:
                if (event.step, event.layer) != moment:
                    return
                if is_disk:
                    stack.callback(fill(place).unlink)
                else:
                    stack.enter_context(limited_files(64))

            with pytest.raises(OutputError) as raised:
                run_job(output, refuse)
        sentence = str(raised.value)
        assert sentence.startswith(f"{output}/")
        assert ("the disk is full" if is_disk else "larger than a file may be") in sentence
        assert sentence.endswith("then run the same command again to go on")
        refused.append(Path(sentence.partition(" cannot be written")[0]).name)
        assert not list(output.rglob("*.tmp"))
        assert not (output / "intserve.json").exists()
    run_job(output)
    assert contents(output) == contents(whole)
    assert layer_file(NUM_LAYERS) in refused
    assert layer_file("globals") in refused
    assert any(name.startswith("worker-") for name in refused), "a boundary"
    assert "job_report.json" in refused


def test_a_job_that_cannot_end_for_lack_of_space_is_refused_before_it_begins(
    model: SmallModel, tmp_path: Path
) -> None:
    try:
        with mounted(tmp_path / "disk", "size=1m") as disk:
            with pytest.raises(
                OutputError,
                match=r"out needs \d\.\d\d MB more of its disk, but only 1\.0\d MB are free; "
                "free some space there or choose another --output",
            ):
                run_quantize(
                    model.directory, small_recipe("int4"), model.text, disk / "out", 0,
                    lambda event: None,
                )  # fmt: skip
            assert {path.name for path in (disk / "out").rglob("*")} == {
                *(FOLDER, "lock", "job.json")
            }
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("recipe", ["int8-smoothquant", "w4a8"])
def test_the_space_that_is_asked_for_is_what_is_written(
    run_job: Callable[..., Any], model: SmallModel, tmp_path: Path, recipe: str
) -> None:
    """Every file, to the byte, and the boundary but for its headers."""
    output, stored = tmp_path / "out", []
    job = plan_job(model.directory, small_recipe(recipe), model.text, output)

    def measure(event: Event) -> None:
        if (event.step, event.layer) == ("published", 1):
            folder = output / FOLDER / "boundary-00001"
            stored.append(sum(path.stat().st_size for path in folder.iterdir()))

    run_job(output, measure, recipe=recipe)
    source = CheckpointReader(model.directory)
    schemes = job.recipe.resolve(source.config)
    for key in layer_keys(source.config):
        actual = (output / layer_file(key)).stat().st_size
        assert published_bytes(source, schemes, key) == actual, key
    (boundary,) = stored
    assert boundary_bytes(job) <= boundary < boundary_bytes(job) + 4096


def test_scraps_of_killed_writers_are_deleted_before_a_job_goes_on(tmp_path: Path) -> None:
    with JobFolder(tmp_path / "out", {"recipe": {"name": "int8"}}) as folder:
        boundary = folder.make_boundary(1)
        scraps = [place / ".a.0000.tmp" for place in (folder.output, folder.path, boundary)]
        for scrap in scraps:
            scrap.write_bytes(bytes(100))
    JobFolder(tmp_path / "out", {"recipe": {"name": "int8"}}).release()
    assert not any(scrap.exists() for scrap in scraps)

"""The stored reference: read back as written, or refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disks import limited_files
from support.quantizing import contents, flip_byte

from deepseek.errors import ArtifactError, OutputError
from deepseek.tensor_files import save_tensors
from quant_jobs.evaluation.lumped import DRAWN, TOP, CompressedBlock, compress
from quant_jobs.evaluation.record import HeldOut
from quant_jobs.evaluation.reference import (
    REFERENCE,
    VALUES,
    Reference,
    is_reference,
    read_record,
    read_reference,
    write_reference,
)


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "fingerprint": "f" * 64,
        "arithmetic": "embedded",
        "kv_cache": "bf16",
        "vocab_size": 300,
        "data": HeldOut(digest="d" * 64, num_blocks=2, block_tokens=9),
        "source_bytes": 1234,
        "tools": {"torch": "x"},
    } | changes


def make(directory: Path, seed: int = 0) -> Reference:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (2, 9), generator=generator)
    blocks = [compress(torch.randn(9, 300, generator=generator), row, seed=0) for row in ids]
    return write_reference(directory, ids, blocks, torch.tensor([10, 20]), facts())


def test_a_reference_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert not is_reference(tmp_path)
    made = make(tmp_path)
    assert is_reference(tmp_path)
    found = read_reference(tmp_path)
    assert found.record == made.record == read_record(tmp_path)
    assert torch.equal(found.ids, made.ids)
    assert found.tensor_bytes.tolist() == [10, 20]
    for block, other in zip(found.blocks, made.blocks, strict=True):
        for field in fields(CompressedBlock):
            assert torch.equal(getattr(block, field.name), getattr(other, field.name))
    before = contents(tmp_path)
    make(tmp_path)
    assert contents(tmp_path) == before, "the same run gives the same bytes"


def test_its_size_per_token_is_the_one_that_is_stated(tmp_path: Path) -> None:
    make(tmp_path)
    header = int.from_bytes((tmp_path / VALUES).read_bytes()[:8], "little")
    values = (tmp_path / VALUES).stat().st_size - 8 - header
    judged, ids, sizes = 2 * 8, 4 * 2 * 9, 8 * 2
    assert values == judged * (8 + 8 * TOP + 8 * DRAWN) + ids + sizes


def test_a_damaged_or_edited_reference_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    flip_byte(tmp_path / VALUES)
    with pytest.raises(ArtifactError, match=r"safetensors is not the one that reference\.json"):
        read_reference(tmp_path)
    make(tmp_path)
    path = tmp_path / REFERENCE
    written = json.loads(path.read_text())
    for change, says in (
        ({"fingerprint": "0" * 64}, "was changed after it was written"),
        ({"format_version": 2}, "format_version 2 is not supported, only 1"),
        ({"mood": 1}, "mood: Extra inputs"),
        ({"vocab_size": 1}, "vocab_size: "),
    ):
        path.write_text(json.dumps(written | change))
        with pytest.raises(ArtifactError, match=says):
            read_reference(tmp_path)
    path.write_text(json.dumps(written))
    (tmp_path / VALUES).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_reference(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_logprobs", torch.full((2, 8, TOP), float("nan"))),
        ("top_ids", torch.full((2, 8, TOP), 300, dtype=torch.int32)),
        ("drawn_ids", torch.full((2, 8, DRAWN), -1, dtype=torch.int32)),
        ("next_logprob", torch.ones(2, 8)),
        ("rest", torch.zeros(2, 7)),
        ("extra", torch.zeros(1)),
    ],
)
def test_values_that_no_run_gives_are_refused_though_sealed(
    tmp_path: Path, name: str, value: torch.Tensor
) -> None:
    made = make(tmp_path)
    tensors = {
        "token_ids": made.ids.int(),
        "tensor_bytes": made.tensor_bytes,
        **{
            field.name: torch.stack([getattr(block, field.name) for block in made.blocks])
            for field in fields(CompressedBlock)
        },
    }
    saved = save_tensors(tmp_path / VALUES, tensors | {name: value})
    record = made.record.model_copy(update={"values_sha256": saved.sha256})
    content = record.model_dump(mode="json") | {"digest": record.digest}
    (tmp_path / REFERENCE).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="holds values that no reference run gives"):
        read_reference(tmp_path)


def test_a_reference_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    make(tmp_path)
    before = contents(tmp_path)
    with limited_files(2000), pytest.raises(OutputError, match="cannot be"):
        make(tmp_path, seed=1)
    assert contents(tmp_path) == before

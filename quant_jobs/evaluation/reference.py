"""The stored reference: one run of the source over the held-out text, kept, so that it runs once.

    reference.json          what ran on which text, how much is kept, its own digest
    reference.safetensors   per judged token what lumped.py keeps of the source's distribution

`evaluate` makes it from the source's checkpoint (`--keep-reference DIR`, or under --output where a
service is measured) and reads it again where --reference names it. Per judged token it takes
12 + 8 TOP + 8 DRAWN bytes, 1,164 with 128 and 16, instead of 517 kB of logits of DeepSeek-V3; for
131,072 tokens 153 MB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepseek import untrusted
from deepseek.artifact.engine_manifest import CacheFormat
from deepseek.artifact.manifest import Count
from deepseek.artifact.verdict import Arithmetic
from deepseek.errors import ArtifactError, first_problem
from deepseek.files import canonical_json, read_json_object, write_json
from deepseek.outputs import make_directory
from deepseek.tensor_files import save_tensors
from quant_jobs.evaluation.lumped import CompressedBlock
from quant_jobs.evaluation.pairs import publishing, read_values
from quant_jobs.evaluation.record import HeldOut, Strict

REFERENCE, VALUES = "reference.json", "reference.safetensors"
#: 1,164 bytes per token: 14 million of them.
MAX_VALUES_BYTES = 1 << 34


class ReferenceRecord(Strict):
    """The whole of reference.json but its digest.

    `fingerprint` is the source's; `arithmetic` and `kv_cache` say what computed it. `top` and
    `drawn` are how many tokens are kept and drawn per position. `source_bytes` are the bytes of
    the source's tensor files.
    """

    format_version: Literal[1] = 1
    fingerprint: str
    arithmetic: Arithmetic
    kv_cache: CacheFormat
    vocab_size: Annotated[Count, Field(ge=2)]
    data: HeldOut
    top: Annotated[Count, Field(ge=1)]
    drawn: Count
    source_bytes: Count
    values_sha256: str
    tools: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the record's canonical JSON; covers the values by their SHA-256."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


@dataclass(frozen=True, slots=True)
class Reference:
    """A stored reference in memory: `ids` int64 [B, T], one `CompressedBlock` per block, and the
    stored bytes of the source's tensors, scales included, in the order of the inventory."""

    record: ReferenceRecord
    ids: Tensor
    blocks: tuple[CompressedBlock, ...]
    tensor_bytes: Tensor


def is_reference(directory: Path) -> bool:
    """Whether a directory holds a stored reference (and not a source checkpoint)."""
    return os.path.lexists(directory / REFERENCE)


def write_reference(
    directory: Path,
    ids: Tensor,
    blocks: Sequence[CompressedBlock],
    tensor_bytes: Tensor,
    facts: Mapping[str, Any],
) -> Reference:
    """Write the two files; `facts` are the fields of the record that do not follow from the rest.
    One that was there before is replaced when both are whole.

    Raises:
        OutputError: they cannot be written.
    """
    make_directory(directory)
    tensors = {
        "token_ids": ids.int(),
        "tensor_bytes": tensor_bytes,
        **{
            field.name: torch.stack([getattr(block, field.name) for block in blocks])
            for field in fields(CompressedBlock)
        },
    }
    with publishing(directory, values=VALUES, record=REFERENCE) as staging:
        saved = save_tensors(staging / VALUES, tensors)
        record = ReferenceRecord(
            top=tensors["top_ids"].shape[-1],
            drawn=tensors["drawn_ids"].shape[-1],
            values_sha256=saved.sha256,
            **facts,
        )
        write_json(staging / REFERENCE, record.model_dump(mode="json") | {"digest": record.digest})
    return Reference(record, ids, tuple(blocks), tensor_bytes)


def read_record(directory: Path) -> ReferenceRecord:
    """Read DIR/reference.json alone.

    Raises:
        ArtifactError: it is absent, of another format, edited, or not valid.
    """
    path = directory / REFERENCE
    raw = read_json_object(path, f"run `evaluate` with --keep-reference {directory}")
    if raw.get("format_version") != 1:
        shown = untrusted.show(raw.get("format_version"))
        raise ArtifactError(
            f"{path}: format_version {shown} is not supported, only 1; make the reference again"
        )
    recorded = raw.pop("digest", None)
    try:
        record = ReferenceRecord.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; make the reference again") from error
    if record.digest != recorded:
        raise ArtifactError(
            f"{path} was changed after it was written; make the reference again from the source"
        )
    return record


def read_reference(directory: Path) -> Reference:
    """Read a stored reference, every byte verified.

    Raises:
        ArtifactError: a file is absent or damaged, or the values are not those of the record.
    """
    record = read_record(directory)
    path = directory / VALUES
    data = read_values(
        path,
        sha256=record.values_sha256,
        record=REFERENCE,
        max_bytes=MAX_VALUES_BYTES,
        remedy="make the reference again",
    )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file ({error}); make it again") from error
    _check_values(path, tensors, record)
    blocks = tuple(
        CompressedBlock(**{f.name: tensors[f.name][index] for f in fields(CompressedBlock)})
        for index in range(record.data.num_blocks)
    )
    return Reference(record, tensors["token_ids"].long(), blocks, tensors["tensor_bytes"])


def _check_values(path: Path, tensors: dict[str, Tensor], record: ReferenceRecord) -> None:
    """The digest says that the file is the record's; this, that the record is a reference's."""
    shape = (record.data.num_blocks, record.data.block_tokens)
    judged = (shape[0], shape[1] - 1)
    expected = {
        "token_ids": (shape, torch.int32),
        "next_logprob": (judged, torch.float32),
        "rest": (judged, torch.float32),
        "top_ids": ((*judged, record.top), torch.int32),
        "top_logprobs": ((*judged, record.top), torch.float32),
        "drawn_ids": ((*judged, record.drawn), torch.int32),
        "drawn_logprobs": ((*judged, record.drawn), torch.float32),
    }
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    sizes = found.pop("tensor_bytes", None)
    sound = found == expected and sizes is not None and sizes[1] == torch.int64
    if sound:
        for name, tensor in tensors.items():
            if name.endswith("_ids"):
                sound &= bool(((tensor >= 0) & (tensor < record.vocab_size)).all())
            elif tensor.is_floating_point():
                sound &= bool(tensor.isfinite().all())
                sound &= name == "rest" or bool((tensor <= 1e-6).all())
    if not sound:
        raise ArtifactError(
            f"{path} holds values that no reference run gives; make the reference again"
        )

"""Boundary files: the inputs of a layer by calibration block, from which a killed job resumes.

Written by `files.py`, read by `worker.py`. `job/folder.py` decides which boundary to use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.errors import ArtifactError
from deepseek.tensor_files import DamagedFileError, read_header, save_tensors, tensor_digest


def boundary_files(boundary: Path, num_workers: int, wave: int = 0) -> list[Path]:
    """The file of each worker for one wave. Readers take blocks from all files of the folder, so
    the number of workers and the waves may change between runs."""
    return [
        boundary / f"worker-{index:03d}-of-{num_workers:03d}-wave-{wave:03d}.safetensors"
        for index in range(num_workers)
    ]


def save_blocks(path: Path, blocks: Mapping[int, Tensor]) -> int:
    """Store inputs of a layer, f32 [T, D] by block, atomically. Returns the bytes written."""
    named = {block_name(block): x_TD for block, x_TD in blocks.items()}
    digests = {name: tensor_digest(x_TD) for name, x_TD in named.items()}
    return save_tensors(path, named, digests).num_bytes


def load_blocks(
    boundary: Path, blocks: Sequence[int], shape: tuple[int, int] | None = None
) -> dict[int, Tensor]:
    """Load these blocks, f32 [T, D], of a complete boundary; `shape` is the one that they have.

    Raises:
        ArtifactError: a file is damaged, or a block is in none.
    """
    loaded: dict[int, Tensor] = {}
    for path in sorted(boundary.glob("*.safetensors")):
        try:
            read_header(path)
            with safe_open(path, framework="pt") as file:
                digests = file.metadata() or {}
                for block in blocks:
                    name = block_name(block)
                    if block in loaded or name not in digests:
                        continue
                    x_TD = file.get_tensor(name).clone()
                    if tensor_digest(x_TD) != digests[name]:
                        raise SafetensorError(f"{name} has other bytes than were written")
                    if x_TD.dtype != torch.float32 or shape not in (None, tuple(x_TD.shape)):
                        raise SafetensorError(
                            f"{name} is {x_TD.dtype} {list(x_TD.shape)}, not of this job's shape"
                        )
                    loaded[block] = x_TD
        except (OSError, SafetensorError, DamagedFileError) as error:
            raise _damaged(path, f"is damaged ({error})") from error
    for block in blocks:
        if block not in loaded:
            raise _damaged(boundary, f"lacks {block_name(block)} or its digest")
    return {block: loaded[block] for block in blocks}


def stored_blocks(boundary: Path) -> set[str]:
    """Names (`block_name`) of the blocks in the boundary's files, by their headers alone.

    Raises:
        ArtifactError: a header is damaged.
    """
    names: set[str] = set()
    for path in boundary.glob("*.safetensors"):
        try:
            names |= read_header(path).tensors.keys()
        except DamagedFileError as error:
            raise _damaged(path, str(error)) from error
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from error
    return names


def _damaged(path: Path, how: str) -> ArtifactError:
    boundary = path.parent if path.suffix else path
    return ArtifactError(
        f"{path} {how}; delete {boundary} and run again, which goes through the published layers "
        "once more"
    )


def block_name(block: int) -> str:
    """The tensor name of a calibration block in a boundary file."""
    return f"block-{block:05d}"

"""The tensor files of a directory as TensorRT-LLM finds them.

Its weight loader takes every `*.safetensors` of the directory but those named "consolidated" (if
there are others) and merges them into one table; `model.safetensors.index.json` is not read. Where
a key is in two files, the file that is read last wins, and files are read in parallel: which one
wins is not defined.
"""

from __future__ import annotations

import os
from pathlib import Path

from deepseek.artifact import loader_files
from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.errors import ArtifactError

__all__ = ["Checkpoint", "LoaderRefusal", "weight_files"]


def weight_files(directory: Path) -> list[Path]:
    """The tensor files that the loader takes, by name.

    Raises:
        LoaderRefusal: there is none.
        ArtifactError: the directory cannot be listed.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be listed ({error.strerror})") from error
    shards = [name for name in names if name.endswith(".safetensors") and name[0] != "."]
    chosen = [name for name in shards if "consolidated" not in name] or shards
    if not chosen:
        raise LoaderRefusal(f"{directory} holds no *.safetensors for TensorRT-LLM to load")
    return [directory / name for name in chosen]


class Checkpoint(loader_files.Checkpoint):
    """All tensors of a directory by key, of the files that the loader takes.

    Raises on opening:
        ArtifactError: a file is damaged, or no regular file of the directory.
        LoaderRefusal: there are no tensor files.
    """

    def __init__(self, directory: Path, *, values: bool) -> None:
        super().__init__(directory, weight_files(directory), values=values, loader="TensorRT-LLM")

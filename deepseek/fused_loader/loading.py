"""Whether a loader model of an engine that fuses linears takes a directory whole, and not only
without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.loader_files import Checkpoint, LoaderRefusal
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError


class Loader(Protocol):
    """What is needed of an engine's `LoaderModel`."""

    checkpoint: Checkpoint
    config: ModelConfig
    directory: Path
    mtp: bool
    ranks: RankLayout
    silent: dict[str, str]

    def load(self, rank: int) -> Iterator[object]: ...

    def unread(self) -> list[str]: ...


def check_loading(model: Loader, name: str) -> None:
    """Load every rank, and refuse what the engine `name` would take without a word.

    Raises:
        LoaderRefusal: its loader would stop, or would take something wrong in silence.
        ArtifactError: a tensor is read by no rank.
    """
    _refuse_silent(model, name)
    for rank in range(model.ranks.tp):
        for _ in model.load(rank):
            pass
    _refuse_silent(model, name)
    for key in model.unread():
        parts = key.split(".")
        is_layer = parts[:2] == ["model", "layers"] and parts[2].isdigit()
        if is_layer and int(parts[2]) >= model.config.num_hidden_layers:
            if parts[-2] == "embed_tokens" and model.mtp:
                continue  # later MTP layers share the first one's
            raise ArtifactError(
                f"{model.checkpoint.file(key)} holds {key} of an MTP layer, which the engine was "
                "built without; remove it or build again"
            )
        raise ArtifactError(
            f"{model.checkpoint.file(key)} holds {key}, which {name} never reads; remove it or "
            "build again"
        )


def _refuse_silent(model: Loader, name: str) -> None:
    for key, what in sorted(model.silent.items()):
        raise LoaderRefusal(
            f"{model.directory}: tensor {key} {what}, and {name} would say nothing; build again"
        )

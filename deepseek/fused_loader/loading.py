"""Whether a loader model of an engine that fuses linears takes a directory whole, and not only
without a word."""

from __future__ import annotations

from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.errors import ArtifactError
from deepseek.fused_loader.loader import LoaderModel


def check_loading(model: LoaderModel) -> None:
    """Load every rank, and refuse what the engine would take without a word.

    Raises:
        LoaderRefusal: its loader would stop, or would take something wrong in silence.
        ArtifactError: a tensor is read by no rank.
    """
    _refuse_silent(model)
    for rank in range(model.ranks.tp):
        for _ in model.load(rank):
            pass
    _refuse_silent(model)
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
            f"{model.checkpoint.file(key)} holds {key}, which {model.name} never reads; "
            "remove it or build again"
        )


def _refuse_silent(model: LoaderModel) -> None:
    for key, what in sorted(model.silent.items()):
        raise LoaderRefusal(
            f"{model.directory}: tensor {key} {what}, and {model.name} would say nothing; "
            "build again"
        )

"""`tokens.safetensors`: one value per judged token, beside evaluation.json.

`evaluate` writes it and `report` reads it. Apart from `record.py`, so that `gate`, which reads
evaluation.json alone, loads no torch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepseek.errors import ArtifactError
from deepseek.tensor_files import SavedFile, save_tensors
from quant_jobs.evaluation.metrics import TokenScores
from quant_jobs.evaluation.record import TOKENS, Evaluation, read_token_bytes

_FIGURES = ("source_nll", "quantized_nll", "kl")


def write_tokens(directory: Path, ids_BT: Tensor, scores: list[TokenScores]) -> SavedFile:
    """Write the token ids int [B, T] and the scores of the B blocks, atomically."""
    tensors = {
        "token_ids": ids_BT.to(torch.int32),
        "source_nll": torch.stack([score.source_nll for score in scores]).float(),
        "quantized_nll": torch.stack([score.quantized_nll for score in scores]).float(),
        "kl": torch.stack([score.kl for score in scores]).float(),
        "same_top1": torch.stack([score.same_top1 for score in scores]),
    }
    return save_tensors(directory / TOKENS, tensors)


def read_tokens(directory: Path, evaluation: Evaluation) -> dict[str, Tensor]:
    """The values per token of this evaluation: `token_ids` int32 [B, T]; `source_nll`,
    `quantized_nll` and `kl` f32 [B, T-1] in nats, finite; `same_top1` bool [B, T-1].

    Raises:
        ArtifactError: the file is not the one that the evaluation names, or holds something else.
    """
    path = directory / TOKENS
    try:
        tensors = load(read_token_bytes(directory, evaluation))
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a safetensors file ({error}); evaluate again"
        ) from error
    blocks, length = evaluation.data.num_blocks, evaluation.data.block_tokens
    expected = {"token_ids": ((blocks, length), torch.int32)}
    expected |= dict.fromkeys(_FIGURES, ((blocks, length - 1), torch.float32))
    expected |= {"same_top1": ((blocks, length - 1), torch.bool)}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        raise ArtifactError(
            f"{path} does not hold one value per token of {blocks} blocks of {length}; evaluate "
            "again"
        )
    if int(tensors["token_ids"].min()) < 0 or not all(
        bool(tensors[name].isfinite().all()) for name in _FIGURES
    ):
        raise ArtifactError(f"{path} holds a value that no evaluation gives; evaluate again")
    return tensors

"""`tokens.safetensors`: one value per judged token, beside evaluation.json.

`evaluate` writes it and `report` reads it. Apart from `record.py`, so that `gate`, which reads
evaluation.json alone, loads no torch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from deepseek.tensor_files import SavedFile, save_tensors
from quant_jobs.evaluation.metrics import TokenScores
from quant_jobs.evaluation.record import TOKENS


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


def read_tokens(directory: Path) -> dict[str, Tensor]:
    """The values that `read_evaluation` has checked: `token_ids` int32 [B, T]; `source_nll`,
    `quantized_nll` and `kl` f32 [B, T-1] in nats; `same_top1` bool [B, T-1]."""
    return load((directory / TOKENS).read_bytes())

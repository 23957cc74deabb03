"""What rounding cannot change, whatever the data: zeros that follow from the weights alone.

A fallback that touches nothing else loses nothing, so it is not one: callers ask here before they
note it in the ledger (`workers/unit_solver.py`, `workers/original.py`). Every format represents 0
exactly, so what is zero in the source stays zero in the artifact. An input that was zero only on
the calibration text is another matter: other text may activate it.

N outputs · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deepseek.inventory import MLP_ROLES
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.folding import FoldingGroup

#: Rows that are looked at together: a weight with any value that is not zero is known by the first.
_ROWS = 16

#: Norm -> the linear whose first rows make its channels.
_BEHIND_NORM = {"q_a_layernorm": "q_a_proj", "kv_a_layernorm": "kv_a_proj_with_mqa"}


def is_zero(tensor: SourceTensor) -> bool:
    """Whether all values are zero; -0 is. Scales of FP8 tiles are not, so they are not read."""
    return not any(bool(rows.any()) for rows in _bands(tensor))


def computes_zero(module: str, source: Mapping[str, SourceTensor]) -> bool:
    """Whether a linear's rounding cannot show: its weight is all zero, or it belongs to an MLP with
    an all-zero weight, which computes zero whatever the other two hold."""
    parent, _, role = module.rpartition(".")
    roles = MLP_ROLES if role in MLP_ROLES else (role,)
    return any(is_zero(source[f"{parent}.{part}.weight"]) for part in roles)


def silent_channels(group: FoldingGroup, source: Mapping[str, SourceTensor]) -> Tensor:
    """The channels, bool [K], of a folding group's input that are zero on any data: because their
    norm is, or all weights of the row that makes them."""
    made = source[group.divided]
    if made.data.ndim == 2:  # up_proj's rows; a zero row of gate_proj silences a channel too
        gate = group.divided.replace("up_proj", "gate_proj")
        return _zero_rows(made) | _zero_rows(source[gate])
    silent = made.data == 0
    parent, _, norm = group.divided.removesuffix(".weight").rpartition(".")
    if norm in _BEHIND_NORM:
        rows = _zero_rows(source[f"{parent}.{_BEHIND_NORM[norm]}.weight"])
        silent = silent | rows[: len(silent)]
    return silent


def _zero_rows(tensor: SourceTensor) -> Tensor:
    return torch.cat([~rows.any(dim=1) for rows in _bands(tensor)])


def _bands(tensor: SourceTensor) -> Iterator[Tensor]:
    """The stored values as float32, FP8 without its scales, a few rows at a time."""
    for first in range(0, len(tensor.data), _ROWS):
        yield tensor.data[first : first + _ROWS].float()

"""The solver of each linear: its weight and what was measured of its input -> what is stored.

`max` asks modelopt's TensorQuantizer for the amax of every row or group; those are the numerics of
record. The codes are made by `deepseek.formats`, whose scale is the one that will be stored (BF16
for INT4), so they are nearest for the reader; modelopt's fake quantization agrees with them within
that rounding (tested). Zero points have no counterpart in modelopt: `int4-asym` is ours alone.

SmoothQuant changes the weight before (`smoothquant.py`) and then is `max`. AWQ and GPTQ will be
further entries of `AMAX` and of the statistics that they read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from deepseek.checkpoint import SourceTensor
from deepseek.errors import CheckpointError
from deepseek.formats import compress, decompress, dequantize_int8, quantize_tokens_int8
from deepseek.layout import store_tensor
from deepseek.recipe import Scheme
from quant_jobs.calibrate import InputStatistics
from quant_jobs.ledger import Ledger
from quant_jobs.smoothquant import Smoothing


@dataclass(frozen=True, slots=True)
class SolvedLinear:
    """`tensors` by full name, as the artifact stores them; `error` is ||y' - y|| / ||y|| on the
    sampled tokens, None where the weight is only carried through."""

    tensors: dict[str, Tensor]
    error: float | None


def solve_linear(
    source: SourceTensor,
    weight: Tensor,
    scheme: Scheme,
    seen: InputStatistics | None,
    smoothing: Smoothing,
    ledger: Ledger,
) -> SolvedLinear:
    """Quantize one linear. `weight` is `source` dequantized, float32 [N, K]; `seen` is None where
    no calibration token reached it.

    Raises:
        CheckpointError: the weight holds NaN, infinity or magnitudes beyond the formats' range.
    """
    name, module = source.spec.name, source.spec.module
    folded = smoothing.fold(name, weight)
    if not scheme.is_quantized and folded is weight:
        return SolvedLinear(store_tensor(source, scheme), None)
    if not bool(folded.isfinite().all()):  # modelopt asserts that, in words for its developers
        raise CheckpointError(f"tensor {name} holds NaN or infinity; repair the source")
    try:
        amax = AMAX[scheme.weights](folded, scheme)
        stored = compress(folded, scheme, amax=amax)
    except CheckpointError as refusal:
        raise CheckpointError(f"tensor {name} {refusal}") from refusal
    if amax is not None:
        ledger.note("zero_scale", source.spec.layer, module, int((amax == 0).sum()))
    shape = (weight.shape[0], weight.shape[1])
    error = output_error(name, weight, decompress(stored, scheme, shape), scheme, seen, smoothing)
    return SolvedLinear({f"{module}.{suffix}": value for suffix, value in stored.items()}, error)


def output_error(
    name: str,
    weight: Tensor,
    restored: Tensor,
    scheme: Scheme,
    seen: InputStatistics | None,
    smoothing: Smoothing,
) -> float:
    """||y' - y|| / ||y|| over the sampled tokens, six digits; `restored` is the folded weight as
    it will be read back. For an unseen expert: the weight's own relative error, which is the
    expected output error on white inputs."""
    columns, rows = smoothing.columns.get(name), smoothing.rows.get(name)
    if rows is not None:
        restored = restored * rows[:, None]
    if seen is None:
        restored = restored if columns is None else restored / columns
        return _relative(restored, weight)
    x = seen.sample if columns is None else seen.sample / columns
    if scheme.activations == "int8":
        x = dequantize_int8(*quantize_tokens_int8(x))
    return _relative(x @ restored.T, seen.sample @ weight.T)


def _relative(found: Tensor, wanted: Tensor) -> float:
    error = float((found - wanted).double().norm())
    size = float(wanted.double().norm())
    # Zero weights or inputs give exactly zero; anything else is infinitely wrong, but a manifest
    # holds no infinity.
    return float(f"{error / size if size else min(error, 1.0):.6g}")


def _row_amax(weight: Tensor, scheme: Scheme) -> Tensor:
    """amax of every output channel, [N, 1]."""
    return _modelopt_amax(weight, num_bits=8, axis=0)


def _group_amax(weight: Tensor, scheme: Scheme) -> Tensor:
    """amax of every group of inputs of every output channel, [N, K/g]."""
    amax = _modelopt_amax(weight, num_bits=4, block_sizes={-1: scheme.group_size})
    return amax.view(len(weight), -1)


def _by_the_format(weight: Tensor, scheme: Scheme) -> None:
    """Zero points have no modelopt counterpart and BF16 has no scale: the format decides."""
    return


#: Weight format -> amax to quantize with. The seam for other algorithms.
AMAX: dict[str, Callable[[Tensor, Scheme], Tensor | None]] = {
    "int8": _row_amax,
    "int4": _group_amax,
    "int4-asym": _by_the_format,
    "bf16": _by_the_format,
}


def _modelopt_amax(weight: Tensor, **attributes: Any) -> Tensor:
    quantizer = modelopt_quantizer(**attributes)
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    return cast(Tensor, quantizer.amax).float()


def modelopt_quantizer(**attributes: Any) -> Any:
    """modelopt's TensorQuantizer with these attributes (`num_bits`, `axis`, `block_sizes`)."""
    with warnings.catch_warnings():
        # Importing modelopt 0.47 warns of transformers above 5.15 and of its own use of deprecated
        # torch functions; what we use of it is tested.
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer
    return TensorQuantizer(QuantizerAttributeConfig(**attributes))


def use_one_thread() -> None:
    """What the results of this process must not depend on: thread counts, and random choices."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

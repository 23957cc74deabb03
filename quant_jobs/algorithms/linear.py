"""Quantizes one linear: its weight and the sampled inputs -> packed tensors and the output error.

    max, smoothquant   nearest codes in a range chosen from the weight (`ranges.py`)
    awq                nearest codes in the range that AWQ's clip search returns (`awq.py`)
    gptq               codes and ranges from `gptq.py`, which solves many linears at once

For `clip: max`, modelopt's TensorQuantizer computes the amax of every row or group; its numerics
are the reference. `deepseek.formats` computes the codes with the scale that is stored (BF16 for
INT4), so that they are nearest for the reader; modelopt's fake quantization is equal within that
rounding (tested). modelopt has no zero points: the asymmetric formats are our own.

Smoothing scales (SmoothQuant, AWQ) are chosen elsewhere (`scaling.py`) and folded here with
`folding.py`. Called by `workers/unit_solver.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from deepseek.artifact.tensors import store_tensor
from deepseek.errors import CheckpointError
from deepseek.formats import TILE, compress, decompress, input_rounding
from deepseek.formats.scales import largest
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.awq import search_clip
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.algorithms.gptq import Rounded
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.ranges import Range, group_ranges


@dataclass(frozen=True, slots=True)
class SolvedLinear:
    """`tensors` by full name, as the artifact stores them (without `input_scale`, which is chosen
    for the whole layer later); `error` is ||y' - y|| / ||y|| on the sampled tokens, None if the
    weight is copied unchanged."""

    tensors: dict[str, Tensor]
    error: float | None


def solve_linear(
    source: SourceTensor,
    weight: Callable[[], Tensor],
    scheme: Scheme,
    sample: Tensor | None,
    smoothing: Smoothing,
    ledger: Ledger,
    rounded: Rounded | None = None,
) -> SolvedLinear:
    """Quantize one linear. `weight()` returns `source` dequantized, f32 [N, K], on the device to
    compute on. `sample` f32 [R, K] are sampled inputs before folding; None if no token reached the
    linear, which is then rounded to nearest. `rounded` is GPTQ's result for the folded weight.

    One float32 copy of the weight is in memory at a time: original, folded, restored.

    Raises:
        CheckpointError: the weight cannot be represented.
    """
    name, module = source.spec.name, source.spec.module
    if not scheme.is_quantized and not smoothing.changes(name):
        return copy_linear(source, scheme)
    folded = weight()
    y = None if sample is None else sample @ folded.T
    # A float32 source is not copied by `weight()`, so it must not be overwritten.
    folded = smoothing.fold(name, folded, in_place=source.data.dtype != torch.float32)
    if not bool(largest(folded).isfinite()):  # modelopt's own assertion does not name the tensor
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity, or does once it is smoothed; repair the source"
        )
    try:
        if rounded is not None:
            scale = rounded.scale
            if scheme.weights == "int8-block":
                scale = scale[::TILE].contiguous()  # every row has its tile's
            stored = compress(rounded.weight, scheme, scale=scale, zero_point=rounded.zero_point)
        elif scheme.algorithm == "awq" and sample is not None:
            columns = smoothing.columns.get(name)
            x = sample if columns is None else sample / columns
            stored = _compress_within(folded, scheme, search_clip(folded, x, scheme))
        elif scheme.is_quantized and scheme.clip != "max":
            stored = _compress_within(folded, scheme, group_ranges(folded, scheme))
        else:
            stored = compress(folded, scheme, amax=_amax(folded, scheme))
    except CheckpointError as refusal:
        raise CheckpointError(f"tensor {name} {refusal}") from refusal
    shape = (folded.shape[0], folded.shape[1])
    del folded
    restored = decompress(stored, scheme, shape)
    if sample is None or y is None:
        error = weight_error(name, weight(), restored, smoothing)
    else:
        error = output_error(name, y, restored, scheme, sample, smoothing)
    return SolvedLinear({f"{module}.{suffix}": value for suffix, value in stored.items()}, error)


def copy_linear(source: SourceTensor, scheme: Scheme) -> SolvedLinear:
    """Carry one linear through as the source stores it; `scheme` does not quantize."""
    return SolvedLinear(store_tensor(source, scheme), None)


def _compress_within(weight: Tensor, scheme: Scheme, chosen: Range) -> dict[str, Tensor]:
    return compress(weight, scheme, scale=chosen.scale, zero_point=chosen.zero_point)


def output_error(
    name: str,
    y: Tensor,
    restored: Tensor,
    scheme: Scheme,
    sample: Tensor,
    smoothing: Smoothing,
) -> float:
    """||y' - y|| / ||y|| over the sampled tokens, to six digits. `y` f32 [R, N] is the original
    output for `sample` f32 [R, K]; `restored` f32 [N, K] is the dequantized folded weight, and is
    overwritten."""
    columns, rows = smoothing.columns.get(name), smoothing.rows.get(name)
    if rows is not None:
        restored.mul_(rows[:, None])
    x = sample if columns is None else sample / columns
    if scheme.activations == "int8":  # a static FP8 scale is not known yet
        round_input = input_rounding(scheme)
        assert round_input is not None
        x = round_input(x)
    return _relative(x @ restored.T, y)


def weight_error(name: str, weight: Tensor, restored: Tensor, smoothing: Smoothing) -> float:
    """The relative error of the weight itself, for an expert without tokens: the expected output
    error on white inputs. `restored` is overwritten."""
    columns, rows = smoothing.columns.get(name), smoothing.rows.get(name)
    if rows is not None:
        restored.mul_(rows[:, None])
    if columns is not None:
        restored.div_(columns)
    return _relative(restored, weight)


def _relative(value: Tensor, reference: Tensor) -> float:
    error = float((value - reference).double().norm())
    size = float(reference.double().norm())
    # A zero reference that is met exactly has error 0; otherwise the error is infinite, which a
    # manifest cannot record.
    return float(f"{error / size if size else min(error, 1.0):.6g}")


def _amax(weight: Tensor, scheme: Scheme) -> Tensor | None:
    """amax of every output channel [N, 1] (int8) or group [N, K/g] (int4); None for formats with
    zero points, which modelopt lacks, for tiles, of which modelopt's amax is the format's own
    (tested), and for BF16, which has no scale."""
    match scheme.weights:
        case "int8":
            return _modelopt_amax(weight, num_bits=8, axis=0)
        case "int4":
            amax = _modelopt_amax(weight, num_bits=4, block_sizes={-1: scheme.group_size})
            return amax.view(len(weight), -1)
        case _:
            return None


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
        # Importing modelopt 0.47 warns about transformers above 5.15 and about its own use of
        # deprecated torch functions. Tests cover what we use of it.
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer
    return TensorQuantizer(QuantizerAttributeConfig(**attributes))

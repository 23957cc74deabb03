"""Static FP8 scales of the linears' inputs (`activations: fp8`), agreed on per layer.

A linear with such inputs stores `input_scale`, amax / 448 of its input. TensorRT-LLM's W4A8 kernel
has one scale for all routed experts of a layer: its loader takes the largest over the experts, for
w1 and w3 (gate and up) together and for w2 (down) apart (DeepSeek-R1-W4AFP8). The experts are
therefore given one scale per layer here, the one that the loader would arrive at, so that the
engine which judges an artifact computes what will be served.

One expert with a huge amax sets the scale of all. FP8 is a floating-point format, which is why that
costs little: e4m3 has its full 3 bits of mantissa over 448 / 2^-6 = 2^14.8, so a scale that is G
times too large for an expert leaves it full precision down to amax * G / 28,672. Measured on one
million values whose amax is 31 times their RMS (a product of three Gaussians), relative RMS error:

    G              1        8       64      128      256      1024
    error     0.0265   0.0265   0.0265   0.0266   0.0274    0.0432

and with the scale too small instead, 1/2 and 1/4 of it, which clips: 0.038 and 0.106. So clipping
an expert at 8 times the median would harm that expert and help no other; and experts whose inputs
are far larger than the others' can be those that a model does not work without ("super experts",
arXiv 2507.23279). The guard is for what lies beyond: by default 64 times the median amax of the
layer's experts, up to where the others pay nothing. Who exceeds it is clipped there and counted.
No tensors here, and no files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

from deepseek.artifact.manifest import Fallback
from deepseek.formats import FP8_MAX
from quant_jobs.algorithms.ledger import Ledger

#: Experts are clipped at this many times the median amax of their layer.
GUARD = 64.0

#: Roles that read the same input.
_SHARED = {"up_proj": "gate_proj", "kv_a_proj_with_mqa": "q_a_proj"}


def share_input_scales(
    amax: Mapping[str, float], tokens: Mapping[str, int], *, guard: float = GUARD
) -> tuple[dict[str, float], tuple[Fallback, ...]]:
    """The static scale of each linear's input by module, amax / 448, and what went into the ledger.

    `amax` is the largest magnitude of each module's input over the calibration tokens, after
    smoothing was folded; `tokens` is how many tokens reached it. Both have the same full module
    names, of any number of layers. Gate and up (and q_a and kv_a) read one input and share a scale.

    The routed experts of a layer share two scales, one for gate and up, one for down: the largest
    amax over the experts, of which each counts with at most `guard` times the median of those that
    saw anything but zeros. An expert above that is noted as `outlier_input_scale`, its count the
    number of its inputs that clip (1 or 2); an expert without tokens has no say and is noted as
    `unseen_input_scale`. Where nothing but zeros was seen, the scale is 1.

    The result depends on the values alone, not on the order in which they come.
    """
    assert guard >= 1.0, guard
    assert amax.keys() == tokens.keys(), amax.keys() ^ tokens.keys()
    groups: dict[str, dict[str, list[str]]] = {}
    for module in amax:
        owner, _, role = module.rpartition(".")
        everyone, _, number = owner.rpartition(".")
        group = everyone if number.isdecimal() else owner
        members = groups.setdefault(f"{group}.{_SHARED.get(role, role)}", {})
        members.setdefault(owner, []).append(module)

    ledger, scales = Ledger(), dict.fromkeys(sorted(amax), 1.0)
    clipped: Counter[str] = Counter()
    unseen: set[str] = set()
    for members in groups.values():
        silent = {owner for owner, those in members.items() if not any(tokens[m] for m in those)}
        unseen |= silent
        peaks = {owner: max(amax[module] for module in those) for owner, those in members.items()}
        seen = [peak for owner, peak in peaks.items() if owner not in silent and peak > 0]
        if not seen:
            continue
        limit = guard * statistics.median(seen)
        clipped.update(owner for owner, peak in peaks.items() if peak > limit)
        scale = min(max(seen), limit) / FP8_MAX
        scales |= {module: scale for those in members.values() for module in those}
    for owner, count in clipped.items():
        ledger.note("outlier_input_scale", _layer_of(owner), owner, count)
    for owner in unseen:
        ledger.note("unseen_input_scale", _layer_of(owner), owner)
    return scales, ledger.entries()


def _layer_of(owner: str) -> int:
    """`model.layers.3.mlp.experts.7` -> 3."""
    return int(owner.split(".")[2])

"""Static FP8 scales of the linears' inputs (`activations: fp8`), shared within a layer.

A linear with such inputs stores `input_scale`, amax / 448 of its input. TensorRT-LLM's W4A8 kernel
has one scale for all routed experts of a layer: its loader takes the largest over the experts, for
w1 and w3 (gate and up) together and for w2 (down) apart (DeepSeek-R1-W4AFP8). The experts therefore
get one scale per layer here, the one that the loader would compute, so that the engine which judges
an artifact computes what will be served.

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
layer's experts, up to where the others pay nothing. An expert beyond it is clipped there and
counted. No tensors here, and no files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

from deepseek.artifact.manifest import Fallback
from deepseek.formats import FP8_MAX
from deepseek.inventory import group_of, input_key, layer_of
from quant_jobs.algorithms.ledger import Ledger

#: Experts are clipped at this many times the median amax of their layer.
GUARD = 64.0


def share_input_scales(
    amax: Mapping[str, float], tokens: Mapping[str, int], *, guard: float = GUARD
) -> tuple[dict[str, float], tuple[Fallback, ...]]:
    """The static scale of each linear's input by module, amax / 448, and the fallbacks to note.

    `amax` is the largest magnitude of each module's input over the calibration tokens, after
    smoothing was folded; `tokens` is how many tokens reached it. Both have the same full module
    names, of any number of layers. Linears that read one input (gate and up, q_a and kv_a) share
    its scale.

    The routed experts of a layer share two scales, one for gate and up, one for down: the largest
    amax over the experts, where each counts with at most `guard` times the median of those that saw
    anything but zeros. An expert above that is noted as `outlier_input_scale`, its count the number
    of its inputs that clip (1 or 2); an expert without tokens does not count and is noted as
    `unseen_input_scale`. Where nothing but zeros was seen, the scale is 1.

    The result depends on the values alone, not on the order in which they come.
    """
    assert guard >= 1.0, guard
    assert amax.keys() == tokens.keys(), amax.keys() ^ tokens.keys()
    # Those of one scale: parent (the attention or an MLP) -> modules. Routed experts of a layer are
    # one group; any other group has one parent in a layer.
    sharers: dict[tuple[int, str, str], dict[str, list[str]]] = {}
    for module in amax:
        parent, _, input_role = input_key(module).rpartition(".")
        key = layer_of(module), group_of(module), input_role
        sharers.setdefault(key, {}).setdefault(parent, []).append(module)

    ledger, scales = Ledger(), dict.fromkeys(sorted(amax), 1.0)
    num_clipped: Counter[str] = Counter()  # inputs by parent
    unseen: set[str] = set()
    for modules_of in sharers.values():
        peaks = {parent: max(amax[m] for m in modules) for parent, modules in modules_of.items()}
        without_tokens = {
            parent for parent, modules in modules_of.items() if not any(tokens[m] for m in modules)
        }
        unseen |= without_tokens
        counted = [peaks[parent] for parent in peaks.keys() - without_tokens if peaks[parent] > 0]
        if not counted:
            continue
        limit = guard * statistics.median(counted)
        num_clipped.update(parent for parent, peak in peaks.items() if peak > limit)
        scale = min(max(counted), limit) / FP8_MAX
        scales |= {module: scale for modules in modules_of.values() for module in modules}
    for parent, count in num_clipped.items():
        ledger.note("outlier_input_scale", layer_of(parent), parent, count)
    for parent in unseen:
        ledger.note("unseen_input_scale", layer_of(parent), parent)
    return scales, ledger.entries()

"""SmoothQuant (arXiv 2211.10438), folded: outliers move from activations into weights, for free.

A linear y = W x is left unchanged by dividing channel j of x by s_j and multiplying column j of W:

    s_j = amax(x_j)^a / amax(W_:j)^(1-a)          a = `smoothing` of the recipe, 0.5 by default

The division is folded into whatever makes x, so the artifact needs no tensor for it:

    input_layernorm            -> q_a_proj and kv_a_proj_with_mqa
    q_a_layernorm              -> q_b_proj
    kv_a_layernorm             -> kv_b_proj            (MLA caches this normed latent: consistent)
    post_attention_layernorm   -> gate_proj and up_proj of the dense MLP; in a MoE layer one vector
                                  serves the router and all routed and shared experts
    up_proj's rows             -> down_proj            (silu(gate) * up is linear in up)

o_proj is left alone: its input is a mix of values, and no single tensor makes its channels.

Deviation from the paper: s is rounded to a power of two. Dividing BF16 norms and multiplying BF16
router weights is then exact, so the folded layer computes the same function to the bit and routing
cannot change; the price is an s within a factor sqrt(2) of the formula's, in a flat optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import RecipeError
from deepseek.recipe import Scheme
from quant_jobs.calibrate import Statistics, input_of
from quant_jobs.ledger import Ledger

#: |log2 s| beyond this is clipped, and counted in the ledger.
MAX_EXPONENT = 10


@dataclass(frozen=True, slots=True)
class SmoothingSet:
    """Linears that one vector serves. Module names, but for `divided`: the tensor that takes 1/s.

    `measured` names the linear whose input statistics are those of the whole set; `router` is the
    router's weight where it reads the same input.
    """

    divided: str
    consumers: tuple[str, ...]
    measured: str
    router: str | None = None


@dataclass(slots=True)
class Smoothing:
    """The vectors of one layer, by the full name of the tensor that they change.

    `columns[name]` multiplies the columns of a weight; `rows[name]` divides the rows of a weight or
    the elements of a norm. All are powers of two, float32.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as the smoothed layer has it, same shape and dtype; exact, or our bug."""
        if name not in self.columns and name not in self.rows:
            return tensor
        folded = tensor.float()
        if name in self.columns:
            folded = folded * self.columns[name]
        if name in self.rows:
            divisor = self.rows[name]
            folded = folded / (divisor if tensor.ndim == 1 else divisor[:, None])
        stored = folded.to(tensor.dtype)
        assert torch.equal(stored.float(), folded), f"{name}: folding is not exact"
        return stored


def smoothing_sets(config: ModelConfig, layer: int) -> list[SmoothingSet]:
    """All sets of one layer, whatever the recipe asks for."""
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    q_a, kv_a = f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"
    q_b, kv_b = f"{attention}.q_b_proj", f"{attention}.kv_b_proj"
    sets = [
        SmoothingSet(f"{prefix}.input_layernorm.weight", (q_a, kv_a), q_a),
        SmoothingSet(f"{attention}.q_a_layernorm.weight", (q_b,), q_b),
        SmoothingSet(f"{attention}.kv_a_layernorm.weight", (kv_b,), kv_b),
    ]
    blocks, router, measured = [mlp], None, f"{mlp}.gate_proj"
    if config.is_moe(layer):
        # The shared expert sees every token, so its statistics are the whole layer's.
        blocks = [f"{mlp}.experts.{expert}" for expert in range(config.n_routed_experts)]
        blocks.append(f"{mlp}.shared_experts")
        router, measured = f"{mlp}.gate.weight", f"{mlp}.shared_experts.gate_proj"
    into = tuple(f"{block}.{role}" for block in blocks for role in ("gate_proj", "up_proj"))
    norm = f"{prefix}.post_attention_layernorm.weight"
    sets.append(SmoothingSet(norm, into, measured, router))
    for block in blocks:
        down = f"{block}.down_proj"
        sets.append(SmoothingSet(f"{block}.up_proj.weight", (down,), down))
    return sets


def wanted_sets(
    config: ModelConfig, schemes: Mapping[str, Scheme], layer: int
) -> list[tuple[SmoothingSet, float]]:
    """The sets that the recipe smooths, each with its strength a.

    Raises:
        RecipeError: a recipe smooths part of a set, or with different strengths, or the weight that
            takes 1/s keeps the source's FP8 blocks, which cannot.
    """
    wanted = []
    for one in smoothing_sets(config, layer):
        strengths = {name: _strength(schemes[name]) for name in one.consumers}
        if set(strengths.values()) == {None}:
            continue
        first = one.consumers[0]
        for name, strength in strengths.items():
            if strength != strengths[first]:
                raise RecipeError(
                    f"{first} and {name} share one smoothing vector, but the recipe gives them "
                    f"{_say(strengths[first])} and {_say(strength)}; give both the same"
                )
        maker = one.divided.removesuffix(".weight")
        if maker in schemes and schemes[maker].weights == "fp8-block":
            raise RecipeError(
                f"smoothing {first} scales the rows of {maker}, which keeps the source's FP8 "
                f"blocks; quantize {maker} too, or use algorithm max for {first}"
            )
        strength = strengths[first]
        assert strength is not None
        wanted.append((one, strength))
    return wanted


def solve_smoothing(
    wanted: list[tuple[SmoothingSet, float]],
    weight_of: Callable[[str], Tensor],
    statistics: Statistics,
    layer: int,
    ledger: Ledger,
) -> Smoothing:
    """The vectors of one layer. `weight_of` gives the float32 weight [N, K] of a module."""
    smoothing = Smoothing()
    for one, strength in wanted:
        seen = statistics.get(input_of(one.measured))
        if seen is None:
            ledger.note("unseen_expert", layer, one.measured)
            continue
        peaks = [weight_of(name).abs().amax(dim=0) for name in one.consumers]
        amax_w = torch.stack(peaks).amax(dim=0)
        scale = smoothing_scale(seen.amax, amax_w, strength, one.measured, layer, ledger)
        for name in one.consumers:
            smoothing.columns[f"{name}.weight"] = scale
        if one.router is not None:
            smoothing.columns[one.router] = scale
        smoothing.rows[one.divided] = scale
    return smoothing


def smoothing_scale(
    amax_x: Tensor, amax_w: Tensor, strength: float, module: str, layer: int, ledger: Ledger
) -> Tensor:
    """s float32 [K] from the channel maxima of inputs and weights; see the module's formula.

    A channel that carries nothing (in x or in W) has s = 1.
    """
    exponent = strength * amax_x.double().log2() - (1 - strength) * amax_w.double().log2()
    dead = (amax_x == 0) | (amax_w == 0)
    exponent = exponent.masked_fill(dead, 0.0).round()
    ledger.note("dead_channel", layer, module, int((amax_x == 0).sum()))
    clipped = exponent.abs() > MAX_EXPONENT
    ledger.note("clipped_smoothing", layer, module, int(clipped.sum()))
    exponent = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.ldexp(torch.ones_like(amax_x), exponent.to(torch.int32))


def _strength(scheme: Scheme) -> float | None:
    return scheme.smoothing if scheme.algorithm == "smoothquant" else None


def _say(strength: float | None) -> str:
    return "no smoothing" if strength is None else f"smoothing {strength}"

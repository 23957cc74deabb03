"""Channel scales without a tensor of their own: what SmoothQuant and AWQ multiply into a weight is
divided out of whatever makes its input.

A linear y = W x is left unchanged by multiplying column j of W and dividing channel j of x by s_j.
The division goes into the tensor that makes the channel, so the artifact, and whoever serves it,
knows nothing of s:

    input_layernorm            -> q_a_proj and kv_a_proj_with_mqa
    q_a_layernorm              -> q_b_proj
    kv_a_layernorm             -> kv_b_proj            (MLA caches this normed latent: consistent)
    post_attention_layernorm   -> gate_proj and up_proj of the dense MLP; in a MoE layer one vector
                                  serves the router and all routed and shared experts
    up_proj's rows             -> down_proj            (silu(gate) * up is linear in up)

o_proj is left alone: its input is a mix of values, and no single tensor makes its channels.

Folding changes no function. Norms and the router keep their bfloat16, so not every s can be folded
into them; `foldable` turns any s into one that can (docs/decisions/0002 and 0004). How s is found
is in `smoothquant.py` and `awq.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import RecipeError
from deepseek.recipe import Scheme

#: |log2 s| beyond this is clipped, and counted in the ledger.
MAX_EXPONENT = 10

#: How far a norm or a router may be from exact after folding: float32's rounding of s itself.
_TOLERANCE = 2.0**-22


@dataclass(frozen=True, slots=True)
class FoldingGroup:
    """Linears that one vector serves. Module names, but for `divided`: the tensor that takes 1/s.

    `measured` names the linear whose input statistics are those of the whole set; `router` is the
    router's weight where it reads the same input.
    """

    divided: str
    consumers: tuple[str, ...]
    measured: str
    router: str | None = None


@dataclass(frozen=True, slots=True)
class ScaleMethod:
    """What finds the vector of a set; `strength` is SmoothQuant's a, None for AWQ."""

    algorithm: Literal["smoothquant", "awq"]
    strength: float | None = None

    def __str__(self) -> str:
        return "AWQ" if self.strength is None else f"smoothing {self.strength}"


@dataclass(slots=True)
class Smoothing:
    """The vectors of one layer, by the full name of the tensor that they change.

    `columns[name]` multiplies the columns of a weight; `rows[name]` divides the rows of a weight or
    the elements of a norm. Float32, as `foldable` gives them.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, one: FoldingGroup, scale: Tensor) -> None:
        """Have `scale` f32 [K], foldable, serve a set: its consumers, router and `divided`."""
        for name in one.consumers:
            self.columns[f"{name}.weight"] = scale
        if one.router is not None:
            self.columns[one.router] = scale
        self.rows[one.divided] = scale

    def changes(self, name: str) -> bool:
        """Whether folding changes the tensor of this name."""
        return name in self.columns or name in self.rows

    def fold(self, name: str, tensor: Tensor, *, in_place: bool = False) -> Tensor:
        """The tensor as the folded layer has it, same shape and dtype; a float32 one may be
        overwritten if the caller says so.

        A float32 tensor, a weight about to be quantized, takes any scale. What is stored in less
        (norms, router) must hold its part exactly, or it is our bug.
        """
        if not self.changes(name):
            return tensor
        folded = tensor.float()
        if folded is tensor and not in_place:
            folded = tensor.clone()
        if name in self.columns:
            folded.mul_(self.columns[name])
        if name in self.rows:
            divisor = self.rows[name]
            folded.div_(divisor if tensor.ndim == 1 else divisor[:, None])
        stored = folded.to(tensor.dtype)
        exact = tensor.dtype == torch.float32 or torch.allclose(
            stored.float(), folded, rtol=_TOLERANCE, atol=0.0
        )
        assert exact, f"{name}: folding is not exact"
        return stored


def foldable(scale: Tensor, divided: Tensor | None, has_router: bool) -> Tensor:
    """The vectors nearest to `scale` f32 [..., K] that can be folded exactly, f32 [..., K].

    With a router: powers of two, which leave norm and router exact and routing as it was. Into a
    norm alone, `divided` [K]: norm' = norm / s is rounded to the norm's dtype, and norm / norm'
    takes the place of s (1 where norm' would be 0). Into the rows of a weight that is quantized
    anyway, `divided` None: as it is.
    """
    if has_router:
        return torch.ldexp(torch.ones_like(scale), scale.log2().round().to(torch.int32))
    if divided is None:
        return scale
    norm = divided.float()
    stored = (norm / scale).to(divided.dtype).float()
    return (norm / stored).masked_fill(stored == 0, 1.0)


def folding_groups(config: ModelConfig, layer: int) -> list[FoldingGroup]:
    """All sets of one layer, whatever the recipe asks for."""
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    q_a, kv_a = f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"
    q_b, kv_b = f"{attention}.q_b_proj", f"{attention}.kv_b_proj"
    sets = [
        FoldingGroup(f"{prefix}.input_layernorm.weight", (q_a, kv_a), q_a),
        FoldingGroup(f"{attention}.q_a_layernorm.weight", (q_b,), q_b),
        FoldingGroup(f"{attention}.kv_a_layernorm.weight", (kv_b,), kv_b),
    ]
    blocks, router, measured = [mlp], None, f"{mlp}.gate_proj"
    if config.is_moe(layer):
        # The shared expert sees every token, so its statistics are the whole layer's.
        blocks = [f"{mlp}.experts.{expert}" for expert in range(config.n_routed_experts)]
        blocks.append(f"{mlp}.shared_experts")
        router, measured = f"{mlp}.gate.weight", f"{mlp}.shared_experts.gate_proj"
    into = tuple(f"{block}.{role}" for block in blocks for role in ("gate_proj", "up_proj"))
    norm = f"{prefix}.post_attention_layernorm.weight"
    sets.append(FoldingGroup(norm, into, measured, router))
    for block in blocks:
        down = f"{block}.down_proj"
        sets.append(FoldingGroup(f"{block}.up_proj.weight", (down,), down))
    return sets


def scaled_groups(
    config: ModelConfig, schemes: Mapping[str, Scheme], layer: int
) -> list[tuple[FoldingGroup, ScaleMethod]]:
    """The sets that the recipe scales, and how.

    AWQ leaves out a set that it cannot scale as a whole: one with a consumer that is not AWQ's (in
    an experts-only recipe the shared expert keeps its FP8 blocks, and reads the same norm), or a
    down_proj whose up_proj is not quantized and could take no 1/s. Such linears are still AWQ's:
    they get its clip search. SmoothQuant, of which nothing else would be left, refuses.

    Raises:
        RecipeError: a recipe smooths part of a set, or with different strengths, or the weight that
            takes 1/s keeps the source's FP8 blocks, which cannot.
    """
    wanted = []
    for one in folding_groups(config, layer):
        asked = {name: _asked(schemes[name]) for name in one.consumers}
        first = one.consumers[0]
        how = asked[first]
        maker = schemes.get(one.divided.removesuffix(".weight"))
        if any(each is not None and each.algorithm == "smoothquant" for each in asked.values()):
            _check_smoothing(one, asked, maker)
        elif set(asked.values()) != {ScaleMethod("awq")} or (maker and not maker.is_quantized):
            continue
        assert how is not None
        wanted.append((one, how))
    return wanted


def _asked(scheme: Scheme) -> ScaleMethod | None:
    match scheme.algorithm:
        case "smoothquant":
            return ScaleMethod("smoothquant", scheme.smoothing)
        case "awq":
            return ScaleMethod("awq")
        case _:
            return None


def _check_smoothing(
    one: FoldingGroup, asked: Mapping[str, ScaleMethod | None], maker: Scheme | None
) -> None:
    first = one.consumers[0]
    for name, how in asked.items():
        if how != asked[first]:
            raise RecipeError(
                f"{first} and {name} share one smoothing vector, but the recipe gives them "
                f"{asked[first] or 'no smoothing'} and {how or 'no smoothing'}; give both the same"
            )
    if maker is not None and maker.weights == "fp8-block":
        raise RecipeError(
            f"smoothing {first} scales the rows of {one.divided.removesuffix('.weight')}, which "
            f"keeps the source's FP8 blocks; quantize it too, or use algorithm max for {first}"
        )

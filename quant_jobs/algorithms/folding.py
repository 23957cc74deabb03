"""Folding: the scales of input channels that SmoothQuant and AWQ ask for, without a tensor of
their own.

A linear y = W x is left unchanged by multiplying column j of W and dividing channel j of x by s_j.
The division is folded into the tensor that makes the channel (`deepseek/inventory.py` says which),
so the artifact and its engines know nothing of s:

    input_layernorm            -> q_a_proj and kv_a_proj_with_mqa
    q_a_layernorm              -> q_b_proj
    kv_a_layernorm             -> kv_b_proj            (MLA caches this normed latent: consistent)
    post_attention_layernorm   -> gate_proj and up_proj of the dense MLP; in a MoE layer one scale
                                  serves the router and all routed and shared experts
    up_proj's rows             -> down_proj            (silu(gate) * up is linear in up)

o_proj is left alone: its input is a mix of values, and no single tensor makes its channels.

Folding changes no function. Norms and the router keep their bfloat16, so not every s can be folded
into them; `foldable` turns any s into one that can (docs/decisions/0002 and 0004). How s is
computed is in `smoothquant.py` and `awq.py`.

K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError, RecipeError
from deepseek.inventory import LinearInput, layer_inputs, layer_tensors
from deepseek.recipe import Scheme

#: |log2 s| beyond this is clipped, and counted in the ledger.
MAX_EXPONENT = 10

#: How far a norm or a router may be from exact after folding: float32's rounding of s itself.
_TOLERANCE = 2.0**-22
#: The same for values that bfloat16 can only hold as subnormal numbers, which are zero to any sum.
_SUBNORMAL = 2.0**-126


@dataclass(frozen=True, slots=True)
class FoldingGroup:
    """Linears that share one smoothing scale, because one tensor makes their input's channels.

    `divided` is the full name of that tensor, which takes 1/s. `consumers` are module names.
    `measured` is the module whose input statistics are those of the whole group. `router` is the
    full name of the router's weight where it reads the same channels.
    """

    divided: str
    consumers: tuple[str, ...]
    measured: str
    router: str | None = None


@dataclass(frozen=True, slots=True)
class ScaleMethod:
    """How the smoothing scale of a folding group is computed; `strength` is SmoothQuant's a, None
    for AWQ."""

    algorithm: Literal["smoothquant", "awq"]
    strength: float | None = None

    def __str__(self) -> str:
        return "AWQ" if self.strength is None else f"smoothing {self.strength}"


@dataclass(slots=True)
class Smoothing:
    """The scales of one layer, by the full name of the tensor that they change.

    `columns[name]` multiplies the columns of a weight; `rows[name]` divides the rows of a weight or
    the elements of a norm. Float32, as `foldable` gives them.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, group: FoldingGroup, scale: Tensor) -> None:
        """Scale a group by `scale` f32 [K], foldable: its consumers, its router and `divided`."""
        for module in group.consumers:
            self.columns[f"{module}.weight"] = scale
        if group.router is not None:
            self.columns[group.router] = scale
        self.rows[group.divided] = scale

    def changes(self, name: str) -> bool:
        """Whether folding changes the tensor of this name."""
        return name in self.columns or name in self.rows

    def fold(self, name: str, tensor: Tensor, *, in_place: bool = False) -> Tensor:
        """The tensor as the folded layer has it, same shape and dtype. With `in_place` a float32
        tensor is overwritten.

        A float32 weight about to be quantized takes any scale. Tensors stored in fewer bits (norms,
        router) must represent the folded values exactly; else it is our bug, unless a value leaves
        the range of their type, which FP16 has little of.

        Raises:
            CheckpointError: a value of a norm or router would overflow, or lose bits as a subnormal
                number.
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
        if tensor.dtype == torch.float32:
            return stored
        exact = torch.allclose(stored.float(), folded, rtol=_TOLERANCE, atol=_SUBNORMAL)
        if not exact:
            smallest = torch.finfo(tensor.dtype).tiny
            inside = stored.isfinite() & ((folded.abs() >= smallest) | (folded == 0))
            assert not bool(inside.all()), f"{name}: folding is not exact"
        if not exact or not bool(stored.isfinite().all()):
            raise leaves_range(name, tensor.dtype)
        return stored


def leaves_range(name: str, dtype: torch.dtype) -> CheckpointError:
    """The error for a norm or router that cannot take a smoothing scale."""
    return CheckpointError(
        f"tensor {name} has a value so large or small that {dtype} cannot hold it once its layer "
        "is smoothed; store the source as BF16, or use a recipe without smoothquant and awq"
    )


def foldable(scale: Tensor, divided: Tensor | None, has_router: bool) -> Tensor:
    """The scales nearest to `scale` f32 [..., K] that can be folded exactly, f32 [..., K].

    With a router: powers of two, which keep norm and router exact and routing unchanged. Into a
    norm alone, `divided` [K]: norm' = norm / s is rounded to the norm's dtype, and norm / norm'
    replaces s (1 where norm' would be 0). Into the rows of a weight that is quantized anyway,
    `divided` None: `scale` itself.
    """
    if has_router:
        return torch.ldexp(torch.ones_like(scale), scale.log2().round().to(torch.int32))
    if divided is None:
        return scale
    norm = divided.float()
    stored = (norm / scale).to(divided.dtype).float()
    # Where norm' would be infinite, s is left as it is, for `Smoothing.fold` to refuse.
    return torch.where(stored.isfinite(), (norm / stored).masked_fill(stored == 0, 1.0), scale)


def folding_groups(config: ModelConfig, layer: int) -> list[FoldingGroup]:
    """All groups of one layer, whatever the recipe asks for, in the order of the linears."""
    inputs: dict[str, list[LinearInput]] = {}
    for linear_input in layer_inputs(config, layer):
        if linear_input.maker is not None:
            inputs.setdefault(linear_input.maker, []).append(linear_input)
    routers = {
        spec.input_maker: spec.name
        for spec in layer_tensors(config, layer)
        if spec.group == "router" and spec.input_maker is not None
    }
    return [
        FoldingGroup(
            divided=maker,
            consumers=tuple(module for linear_input in made for module in linear_input.modules),
            measured=_measured(made),
            router=routers.get(maker),
        )
        for maker, made in inputs.items()
    ]


def _measured(inputs: list[LinearInput]) -> str:
    """The input among those of one folding group whose statistics are the group's. In a MoE layer
    the shared expert's: every token passes it, so its statistics are the whole layer's."""
    unrouted = (linear_input for linear_input in inputs if linear_input.expert is None)
    return next(unrouted, inputs[0]).name


def scaled_groups(
    config: ModelConfig, schemes: Mapping[str, Scheme], layer: int
) -> list[tuple[FoldingGroup, ScaleMethod]]:
    """The groups that the recipe scales, and how.

    AWQ leaves out a group that it cannot scale as a whole: one with a consumer that is not AWQ's
    (in an experts-only recipe the shared expert keeps its FP8 blocks, and reads the same norm), or
    a down_proj whose up_proj is not quantized and could take no 1/s. Such linears are still AWQ's:
    they get its clip search. SmoothQuant, of which nothing else would be left, refuses.

    Raises:
        RecipeError: a recipe smooths part of a group, or with different strengths, or the weight
            that takes 1/s keeps the source's FP8 blocks, which cannot.
    """
    scaled = []
    for group in folding_groups(config, layer):
        methods = {module: _scale_method(schemes[module]) for module in group.consumers}
        method = methods[group.consumers[0]]
        divided = schemes.get(group.divided.removesuffix(".weight"))  # None for a norm
        takes_scale = divided is None or divided.is_quantized
        if any(other and other.algorithm == "smoothquant" for other in methods.values()):
            _check_smoothing(group, methods, divided)
        elif set(methods.values()) != {ScaleMethod("awq")} or not takes_scale:
            continue
        assert method is not None
        scaled.append((group, method))
    return scaled


def _scale_method(scheme: Scheme) -> ScaleMethod | None:
    match scheme.algorithm:
        case "smoothquant":
            return ScaleMethod("smoothquant", scheme.smoothing)
        case "awq":
            return ScaleMethod("awq")
        case _:
            return None


def _check_smoothing(
    group: FoldingGroup, methods: Mapping[str, ScaleMethod | None], divided: Scheme | None
) -> None:
    first = group.consumers[0]
    for module, method in methods.items():
        if method != methods[first]:
            raise RecipeError(
                f"{first} and {module} share one smoothing vector, but the recipe gives them "
                f"{methods[first] or 'no smoothing'} and {method or 'no smoothing'}; "
                "give both the same"
            )
    if divided is not None and divided.weights == "fp8-block":
        raise RecipeError(
            f"smoothing {first} scales the rows of {group.divided.removesuffix('.weight')}, which "
            f"keeps the source's FP8 blocks; quantize it too, or use algorithm max for {first}"
        )

"""The feed-forward part of a layer: the gated MLP, the router, and the mixture of experts.

The router is DeepSeek-V3's (arXiv 2412.19437, section 2.1.2), as transformers computes it: sigmoid
scores; groups ranked by the sum of their two best biased scores; the best experts of the best
groups. The bias changes which experts are chosen, not their weights.

Tokens are sorted by expert, so each active expert computes two products over a contiguous run of
rows (gate and up are one product). A token's contributions are added in the order in which the
router chose the experts, not in the order of the runs, so the sum does not depend on the batch.

T tokens · D hidden · E experts · I expert width · K experts per token
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.linear import Encoded, Encoding, Kernels, Projection, encode


class GatedMlp:
    """down(silu(gate x) * up x), with gate and up side by side in one projection."""

    def __init__(self, gate_up: Projection, down: Projection, kernels: Kernels) -> None:
        self.gate_up, self.down, self._kernels = gate_up, down, kernels

    @property
    def encodings(self) -> frozenset[Encoding]:
        """The encodings of the input that `forward` needs."""
        return self.gate_up.encodings

    def forward(self, x: dict[Encoding, Encoded]) -> Tensor:
        """Encoded [T, D] -> f32 [T, D]."""
        hidden = silu_gate(self.gate_up.forward(x), self._kernels)
        return self.down.forward(encode(hidden, self.down.encodings))


class Router:
    """Chooses each token's experts. Weight f32 [E, D]; correction bias f32 [E], which balances the
    load of the experts."""

    def __init__(self, config: ModelConfig, weight: Tensor, bias: Tensor, kernels: Kernels) -> None:
        self._config = config
        self._weight, self._bias, self._kernels = weight, bias, kernels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f32 [T, D] -> experts int64 [T, K] and their weights f32 [T, K]."""
        config, kernels = self._config, self._kernels
        logits = torch.nn.functional.linear(kernels.rows.pad(x), self._weight)[: x.shape[0]]
        if kernels.arithmetic.router_logits == "bfloat16":
            logits = kernels.round(logits)
        scores = 1.0 / _one_plus_exp(-logits)
        biased = (scores + self._bias).view(x.shape[0], config.n_group, -1)  # [T, G, E/G]
        best_two = biased.topk(min(2, biased.shape[-1]), dim=-1).values.sum(dim=-1)
        groups = best_two.topk(config.topk_group, dim=-1).indices
        closed = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, groups, False)
        biased = biased.masked_fill(closed[..., None], float("-inf")).flatten(1)
        experts = biased.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class MixtureOfExperts:
    """Routed experts and the shared expert."""

    def __init__(
        self, router: Router, experts: Sequence[GatedMlp], shared: GatedMlp, kernels: Kernels
    ) -> None:
        self._router, self._experts, self._shared = router, experts, shared
        self._kernels = kernels
        self._in_encodings = frozenset[Encoding]().union(*(e.gate_up.encodings for e in experts))
        self._mid_encodings = frozenset[Encoding]().union(*(e.down.encodings for e in experts))

    def forward(self, x: Tensor) -> Tensor:
        """f32 [T, D], normed -> f32 [T, D]."""
        experts, weights = self._router.forward(x)
        encoded = encode(x, self._in_encodings | self._shared.encodings)
        routed = self._run_experts(encoded, experts, weights)
        return self._kernels.round(routed.add_(self._shared.forward(encoded)))

    def _run_experts(self, x: dict[Encoding, Encoded], experts: Tensor, weights: Tensor) -> Tensor:
        num_tokens, num_chosen = experts.shape
        flat = experts.flatten()
        order = flat.argsort(stable=True)  # row in expert order -> token * K + choice
        tokens = order // num_chosen
        runs = _runs(torch.bincount(flat, minlength=len(self._experts)).tolist())

        rows = {name: x[name].take(tokens) for name in self._in_encodings}
        hidden = torch.cat(
            [self._experts[e].gate_up.forward(_cut(rows, first, last)) for e, first, last in runs]
        )
        rows = encode(silu_gate(hidden, self._kernels), self._mid_encodings)
        outputs = torch.cat(
            [self._experts[e].down.forward(_cut(rows, first, last)) for e, first, last in runs]
        )
        chosen = torch.empty_like(outputs)
        chosen[order] = outputs
        chosen = chosen.view(num_tokens, num_chosen, -1)
        products = chosen * weights[..., None]
        if self._kernels.arithmetic.expert_sum == "products":
            products = self._kernels.round(products)
        return self._kernels.round(products.sum(dim=1))


def silu_gate(gate_up: Tensor, kernels: Kernels) -> Tensor:
    """f32 [T, 2 I] -> silu(first half) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    factor = kernels.round_factor(gate / _one_plus_exp(-gate))
    return kernels.round(factor.mul_(up))


def _one_plus_exp(x: Tensor) -> Tensor:
    """1 + exp(x), in place.

    torch's own sigmoid and silu compute the last elements of a tensor, those that do not fill a
    pair of vectors, by another formula than the rest, so a row's bits would depend on how many rows
    precede it. `exp` computes all elements alike.
    """
    return x.exp_().add_(1.0)


def _runs(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, last row) of every expert that has rows; the last row is exclusive."""
    runs, first = [], 0
    for expert, count in enumerate(counts):
        if count:
            runs.append((expert, first, first + count))
        first += count
    return runs


def _cut(rows: dict[Encoding, Encoded], first: int, last: int) -> dict[Encoding, Encoded]:
    return {name: value.cut(first, last) for name, value in rows.items()}

"""Solves the units of one layer: statistics of their inputs, scales of their channels, weights.

The order within one MLP follows from what depends on what: the input of gate and up is known (it
was routed here), the input of down follows from the *original* gate and up; the scale of down's
channels is folded into up's rows, so it is found before either is rounded. GPTQ then takes the
experts of a unit as one batch.

Which tokens an expert is measured on is the recipe's policy (`ExpertCoverage`): those that the
router sends, all, or those and a few of everybody's.

D hidden size · I intermediate size · T tokens of one block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.checkpoint import SourceTensor
from deepseek.errors import CheckpointError
from deepseek.formats.scales import check_magnitude
from deepseek.recipe import Recipe, Scheme
from quant_jobs.awq import candidate_scales, note_fallbacks, scale_losses, weight_means
from quant_jobs.calibrate import (
    SAMPLE_TOKENS,
    Accumulator,
    InputStatistics,
    input_of,
    observe,
    rows_per_block,
    spread,
)
from quant_jobs.folding import FoldingSet, Smoothing, Wanted, foldable
from quant_jobs.gptq import Rounded, gptq, inverse_factor
from quant_jobs.layer import hidden, tokens_of
from quant_jobs.ledger import Ledger
from quant_jobs.messages import Account, Routed, Tensors, moved
from quant_jobs.smoothquant import smoothing_scale
from quant_jobs.solve import solve_linear
from quant_jobs.units import MLP_ROLES, Unit


@dataclass(frozen=True, slots=True)
class Scales:
    """The folding sets that the recipe wants of a layer; `shared` is the one among them that
    several workers agree on, through the driver."""

    wanted: list[tuple[FoldingSet, Wanted]]
    shared: tuple[FoldingSet, Wanted] | None

    def within(self, modules: Sequence[str]) -> list[tuple[FoldingSet, Wanted]]:
        """The sets whose consumers are all among these modules, the shared one apart."""
        mine = set(modules)
        return [
            (one, how)
            for one, how in self.wanted
            if mine.issuperset(one.consumers) and (self.shared is None or one != self.shared[0])
        ]


@dataclass(slots=True)
class _Mlp:
    """One MLP in work: weights f32 by role, and the statistics of its two inputs. `routed` is the
    number of tokens that the router sent."""

    block: str
    weights: dict[str, Tensor]
    into: InputStatistics | None
    down: InputStatistics | None
    routed: int
    is_starved: bool

    def statistics(self, role: str) -> InputStatistics | None:
        return self.down if role == "down_proj" else self.into


@dataclass(slots=True)
class _Readers:
    """Linears of one scheme and shape that GPTQ solves under one Gram matrix: their weights f32
    [N, K] as they will be rounded."""

    scheme: Scheme
    seen: InputStatistics
    modules: list[str] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    @property
    def gram(self) -> Tensor:
        assert self.seen.gram is not None, self.modules
        return self.seen.gram


class UnitSolver:
    """Solves units of one layer on the blocks that everybody routed.

    `source` is the original layer as far as it is here, `attention` the finished statistics of the
    attention's inputs, `blocks` what entered the MLP, in block order.
    """

    def __init__(
        self,
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        layer: int,
        source: Mapping[str, SourceTensor],
        attention: Mapping[str, InputStatistics | None],
        blocks: Sequence[tuple[int, Routed]],
        scales: Scales,
        num_blocks: int,
        device: torch.device,
    ) -> None:
        self._recipe, self._schemes, self._layer = recipe, schemes, layer
        self._source, self._attention, self._blocks = source, attention, blocks
        self._scales, self._device = scales, device
        self._num_rows = rows_per_block(SAMPLE_TOKENS, num_blocks)
        self._num_shrink = rows_per_block(recipe.expert_coverage.shrink_tokens, num_blocks)
        self._whole: InputStatistics | None = None
        self._ledger = Ledger()
        self._account = Account()

    def account(self) -> Account:
        """What was solved so far, without the tensors."""
        self._account.fallbacks = self._ledger.entries()
        return self._account

    def solve(self, unit: Unit, shared: Smoothing) -> Tensors:
        """Quantize one unit; packed tensors by full name. `shared` is what all workers agreed on.

        Raises:
            CheckpointError: a weight cannot be represented, or an activation is not finite.
        """
        return self._attention_unit(unit) if unit.kind == "attention" else self._mlps(unit, shared)

    # --- attention ---

    def _attention_unit(self, unit: Unit) -> Tensors:
        seen = self._attention[input_of(unit.modules[0])]
        assert seen is not None, "every token passes the attention"
        weights = {module: self.weight(module) for module in unit.modules}
        smoothing = Smoothing()
        for one, how in self._scales.within(unit.modules):
            divided = self._source[one.divided].data.to(self._device)
            scale = self._scale(one, how, weights, seen, divided)
            smoothing.add(one, scale)
        self._account.smoothing.rows |= smoothing.rows
        rounded = self._gptq([(module, weights[module], seen) for module in unit.modules])
        packed: Tensors = {}
        for module in unit.modules:
            solved = self._linear(module, weights[module], seen, smoothing, rounded.get(module))
            packed |= solved
        if unit.modules[0].endswith("kv_b_proj"):
            self._account.kv_latent_amax = self._account.input_amax[unit.modules[0]]
        return packed

    # --- MLPs ---

    def _mlps(self, unit: Unit, shared: Smoothing) -> Tensors:
        experts = unit.experts or (None,)
        mlps = [self._open(*pair) for pair in zip(unit.blocks, experts, strict=True)]
        smoothing = Smoothing(dict(shared.columns), dict(shared.rows))
        for mlp in mlps:
            modules = [f"{mlp.block}.{role}" for role in MLP_ROLES]
            for one, how in self._scales.within(modules):
                self._scale_mlp(mlp, one, how, smoothing)
        packed: Tensors = {}
        for roles in (("gate_proj", "up_proj"), ("down_proj",)):
            work = [
                (f"{mlp.block}.{role}", mlp.weights[role], mlp.statistics(role))
                for mlp in mlps
                for role in roles
                if not mlp.is_starved
            ]
            rounded = self._gptq(work, smoothing)
            for mlp in mlps:
                for role in roles:
                    module = f"{mlp.block}.{role}"
                    packed |= self._linear(
                        module,
                        mlp.weights[role],
                        mlp.statistics(role),
                        smoothing,
                        rounded.get(module),
                        is_starved=mlp.is_starved,
                    )
                    self._account.tokens[module] = mlp.routed
        return packed

    def _open(self, block: str, expert: int | None) -> _Mlp:
        """The MLP's weights and what it sees; down's input is that of the original gate and up."""
        weights = {role: self.weight(f"{block}.{role}") for role in MLP_ROLES}
        schemes = {role: self._schemes[f"{block}.{role}"] for role in MLP_ROLES}
        gram_in = any(schemes[role].algorithm == "gptq" for role in ("gate_proj", "up_proj"))
        policy = self._recipe.expert_coverage
        sees_all = expert is None or policy.policy == "all"
        into = Accumulator(f"{block}.gate_proj", gram=gram_in)
        down = Accumulator(f"{block}.down_proj", gram=schemes["down_proj"].algorithm == "gptq")
        routed_tokens = 0
        for index, routed in self._blocks:
            if expert is not None:
                routed_tokens += len(tokens_of(routed, expert)[0])
            else:
                routed_tokens += len(routed.z)
            x = routed.z if sees_all else routed.z[self._chosen(routed, expert)]
            if not len(x):
                continue
            if not sees_all:
                into.add(index, observe(x, self._num_rows, keep_rows=gram_in))
            h = hidden(x, weights["gate_proj"], weights["up_proj"])
            down.add(index, observe(h, self._num_rows, keep_rows=True))
        # Without any token there is nothing to solve on, whatever the floor.
        floor = max(policy.floor_tokens, 1)
        starved = expert is not None and policy.policy == "topk" and routed_tokens < floor
        seen = self.layer_input(gram=gram_in) if sees_all else into.finish()
        return _Mlp(block, weights, seen, down.finish(), routed_tokens, starved)

    def _chosen(self, routed: Routed, expert: int | None) -> Tensor:
        """The tokens of one block that an expert is measured on, int64 [n]."""
        assert expert is not None
        token, _ = tokens_of(routed, expert)
        if self._recipe.expert_coverage.policy != "shrink":
            return token
        return torch.cat([token, spread(len(routed.z), self._num_shrink).to(token.device)])

    def layer_input(self, *, gram: bool) -> InputStatistics:
        """Statistics of what enters the MLP over all tokens; kept, for all experts share them."""
        if self._whole is None or (gram and self._whole.gram is None):
            whole = Accumulator(f"model.layers.{self._layer}.mlp", gram=gram)
            for index, routed in self._blocks:
                whole.add(index, observe(routed.z, self._num_rows, keep_rows=gram))
            self._whole = whole.finish()
        assert self._whole is not None
        return self._whole

    def sample_of(self, module: str) -> Tensor | None:
        """The sampled inputs f32 [R, D] of a gate or up projection; None where it saw nothing."""
        expert = module.rpartition(".")[0].rpartition(".")[2]
        if not expert.isdecimal() or self._recipe.expert_coverage.policy == "all":
            return self.layer_input(gram=False).sample
        rows = []
        for _, routed in self._blocks:
            x = routed.z[self._chosen(routed, int(expert))]
            rows.append(x[spread(len(x), self._num_rows)])
        sample = torch.cat(rows)[:SAMPLE_TOKENS]
        return sample if len(sample) else None

    # --- scales of channels ---

    def _scale_mlp(self, mlp: _Mlp, one: FoldingSet, how: Wanted, smoothing: Smoothing) -> None:
        by_module = {f"{mlp.block}.{role}": mlp.weights[role] for role in MLP_ROLES}
        role = one.measured.rpartition(".")[2]
        seen = mlp.statistics(role)
        if mlp.is_starved and how.algorithm == "awq":
            return  # noted when its linears are rounded
        if seen is None:
            self._ledger.note("unseen_expert", self._layer, one.measured)
            return
        weights = {module: by_module[module] for module in one.consumers}
        norm = self._source.get(one.divided)
        divided = None if one.divided.endswith("up_proj.weight") else norm
        scale = self._scale(
            one, how, weights, seen, None if divided is None else divided.data.to(self._device)
        )
        smoothing.add(one, scale)
        if divided is not None:
            self._account.smoothing.rows[one.divided] = scale

    def _scale(
        self,
        one: FoldingSet,
        how: Wanted,
        weights: Mapping[str, Tensor],
        seen: InputStatistics,
        divided: Tensor | None,
    ) -> Tensor:
        """The vector f32 [K] of a set that is all here: SmoothQuant's formula or AWQ's search."""
        if how.strength is not None:
            amax_w = torch.stack([w.abs().amax(dim=0) for w in weights.values()]).amax(dim=0)
            args = (how.strength, one.measured, self._layer, self._ledger)
            return smoothing_scale(seen.amax, amax_w, *args)
        brought = [weight_means(w, self._schemes[module]) for module, w in weights.items()]
        total = torch.stack([each for each, _ in brought]).sum(dim=0)
        mean_w = (total / sum(count for _, count in brought)).float()
        candidates = foldable(candidate_scales(seen.mean_abs, mean_w), divided, False)
        losses = torch.stack(
            [
                scale_losses([w], seen.sample, candidates, self._schemes[module])
                for module, w in weights.items()
            ]
        ).sum(dim=0)
        scale = candidates[int(losses.argmin())]
        note_fallbacks(scale, seen.mean_abs, one.measured, self._layer, self._ledger)
        return scale

    # --- linears ---

    def weight(self, module: str) -> Tensor:
        """The original weight f32 [N, K].

        Raises:
            CheckpointError: it is to be quantized, and cannot be.
        """
        name = f"{module}.weight"
        weight = moved(self._source[name], self._device).dequantize()
        if self._schemes[module].is_quantized:
            # Here, where its name is known: the searches on several weights would not say whose.
            try:
                check_magnitude(weight.abs().amax())
            except CheckpointError as refusal:
                raise CheckpointError(f"tensor {name} {refusal}") from refusal
        return weight

    def _linear(
        self,
        module: str,
        weight: Tensor,
        seen: InputStatistics | None,
        smoothing: Smoothing,
        rounded: Rounded | None,
        *,
        is_starved: bool = False,
    ) -> Tensors:
        scheme = self._schemes[module]
        if is_starved and scheme.algorithm in ("awq", "gptq"):
            self._ledger.note("starved_expert", self._layer, module)
            scheme = scheme.model_copy(update={"algorithm": "max"})
        source = self._source[f"{module}.weight"]
        solved = solve_linear(source, weight, scheme, seen, smoothing, self._ledger, rounded)
        if solved.error is not None:
            self._account.errors[module] = solved.error
        columns = smoothing.columns.get(f"{module}.weight")
        if seen is not None:
            amax = seen.amax if columns is None else seen.amax / columns
            self._account.input_amax[module] = float(amax.amax())
        else:
            self._account.input_amax[module] = 0.0
        self._account.tokens[module] = 0 if seen is None else seen.tokens
        return {name: tensor.cpu() for name, tensor in solved.tensors.items()}

    def _gptq(
        self,
        work: Sequence[tuple[str, Tensor, InputStatistics | None]],
        smoothing: Smoothing | None = None,
    ) -> dict[str, Rounded]:
        """GPTQ of those of these linears (module, original weight, its input) that ask for it and
        have seen tokens, as one batch per shape and scheme."""
        # Linears of one shape that share an input (gate and up of one expert; everybody's under
        # policy `all`) are stacked along their outputs.
        readers: dict[tuple[object, ...], _Readers] = {}
        for module, weight, seen in work:
            scheme = self._schemes[module]
            if scheme.algorithm == "gptq" and seen is not None:
                name = f"{module}.weight"
                assert smoothing is None or name not in smoothing.columns, module
                folded = weight if smoothing is None else smoothing.fold(name, weight)
                key = scheme, tuple(weight.shape), id(seen)
                each = readers.setdefault(key, _Readers(scheme, seen))
                each.modules.append(module)
                each.weights.append(folded)
        batches: dict[tuple[object, ...], list[_Readers]] = {}
        for (scheme_, shape, _), each in readers.items():
            batches.setdefault((scheme_, shape, len(each.modules)), []).append(each)
        rounded: dict[str, Rounded] = {}
        for batch in batches.values():
            scheme = batch[0].scheme
            factor = inverse_factor(
                torch.stack([each.gram for each in batch]),
                scheme.damping,
                act_order=scheme.act_order,
            )
            stacked = torch.stack([torch.cat(each.weights) for each in batch])
            for index, solved in enumerate(gptq(stacked, factor, scheme)):
                modules = batch[index].modules
                for module, own in zip(modules, solved.split(len(modules)), strict=True):
                    rounded[module] = own
                    self._note_factor(module, factor.failed[index], factor.damping[index], scheme)
        return rounded

    def _note_factor(self, module: str, failed: bool, damping: float, scheme: Scheme) -> None:
        if failed:
            self._ledger.note("unusable_hessian", self._layer, module)
        elif damping > scheme.damping:
            self._ledger.note("damped_hessian", self._layer, module)

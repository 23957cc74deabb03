"""Solves the units of one layer: statistics of their inputs, scales of their channels, weights.

The order within one MLP follows from what depends on what: the input of gate and up is known (it
was routed here), the input of down follows from the *original* gate and up; the scale of down's
channels is folded into up's rows, so it is found before either is rounded. GPTQ then takes the
experts of a unit as one batch on a GPU, where that saves launches, and one by one elsewhere.

Memory: a weight is dequantized when it is used, and let go of then; at most gate and up of one MLP
are here at once. Reading a weight again costs a thousandth of what is done with it.

Which tokens an expert is measured on is the recipe's policy (`ExpertCoverage`): those that the
router sends, all, or those and a few of everybody's.

D hidden size · I intermediate size · T tokens of one block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats.scales import check_magnitude, largest
from deepseek.recipe import Recipe, Scheme
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.awq import candidate_scales, note_fallbacks, scale_losses, weight_means
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, Smoothing, foldable
from quant_jobs.algorithms.gptq import Factor, Rounded, gptq, inverse_factor
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.linear import solve_linear
from quant_jobs.algorithms.smoothquant import column_amax, smoothing_scale
from quant_jobs.calibration.forward import Routed, hidden, tokens_of
from quant_jobs.calibration.statistics import (
    SAMPLE_TOKENS,
    Accumulator,
    InputStatistics,
    input_of,
    observe,
    rows_per_block,
    spread,
)
from quant_jobs.calibration.units import MLP_ROLES, Unit
from quant_jobs.workers.messages import Account, Tensors, moved


@dataclass(frozen=True, slots=True)
class Scales:
    """The folding sets that the recipe wants of a layer; `shared` is the one among them that
    several workers agree on, through the driver."""

    wanted: list[tuple[FoldingGroup, ScaleMethod]]
    shared: tuple[FoldingGroup, ScaleMethod] | None

    def within(self, modules: Sequence[str]) -> list[tuple[FoldingGroup, ScaleMethod]]:
        """The sets whose consumers are all among these modules, the shared one apart."""
        mine = set(modules)
        return [
            (one, how)
            for one, how in self.wanted
            if mine.issuperset(one.consumers) and (self.shared is None or one != self.shared[0])
        ]


@dataclass(slots=True)
class _Mlp:
    """One MLP in work: its block and the expert's number, the statistics of its input, and of the
    input of down once `UnitSolver._down` was asked. `routed` is the number of tokens that the
    router sent."""

    block: str
    expert: int | None
    into: InputStatistics | None
    routed: int
    is_starved: bool
    down: InputStatistics | None = None
    knows_down: bool = False


@dataclass(slots=True)
class _Readers:
    """Linears of one scheme and shape that GPTQ solves under one Gram matrix."""

    scheme: Scheme
    seen: InputStatistics
    modules: list[str] = field(default_factory=list)


class UnitSolver:
    """Solves units of one layer on the blocks that everybody routed.

    `source` is the original layer as far as it is here, `attention` the finished statistics of the
    attention's inputs (their Gram matrices are used up, so a unit is solved once), `blocks` what
    entered the MLP, in block order.
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
        self._source, self._attention, self._blocks = source, dict(attention), blocks
        self._scales, self._device = scales, device
        self._num_rows = rows_per_block(SAMPLE_TOKENS, num_blocks)
        self._num_shrink = rows_per_block(recipe.expert_coverage.shrink_tokens, num_blocks)
        self._whole: InputStatistics | None = None
        self._factors: dict[tuple[float, bool], Factor] = {}  # of its Gram matrix
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
        seen = self._attention.pop(input_of(unit.modules[0]))
        assert seen is not None, "every token passes the attention"
        smoothing = Smoothing()
        for one, how in self._scales.within(unit.modules):
            divided = self._source[one.divided].data.to(self._device)
            smoothing.add(one, self._scale(one, how, seen, divided))
        self._account.smoothing.rows |= smoothing.rows
        rounded = self._gptq([(module, seen) for module in unit.modules], smoothing)
        packed: Tensors = {}
        for module in unit.modules:
            packed |= self._linear(module, seen, smoothing, rounded.pop(module, None))
        if unit.modules[0].endswith("kv_b_proj"):
            self._account.kv_latent_amax = self._account.input_amax[unit.modules[0]]
        return packed

    # --- MLPs ---

    def _mlps(self, unit: Unit, shared: Smoothing) -> Tensors:
        experts = unit.experts or (None,)
        pairs = list(zip(unit.blocks, experts, strict=True))
        # One by one is less to hold. Where all experts see the same tokens, all of a unit that read
        # one input are stacked.
        together = self._device.type != "cpu" or self._recipe.expert_coverage.policy == "all"
        packed: Tensors = {}
        for some in [pairs] if together else [[pair] for pair in pairs]:
            packed |= self._some_mlps([self._open(*pair) for pair in some], shared)
        return packed

    def _some_mlps(self, mlps: Sequence[_Mlp], shared: Smoothing) -> Tensors:
        smoothing = Smoothing(dict(shared.columns), dict(shared.rows))
        for mlp in mlps:
            modules = [f"{mlp.block}.{role}" for role in MLP_ROLES]
            for one, how in self._scales.within(modules):
                self._scale_mlp(mlp, one, how, smoothing)
        packed: Tensors = {}
        for roles in (("gate_proj", "up_proj"), ("down_proj",)):
            seen = {mlp.block: self._statistics(mlp, roles[0]) for mlp in mlps}
            work = [
                (f"{mlp.block}.{role}", seen[mlp.block])
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
                        seen[mlp.block],
                        smoothing,
                        rounded.pop(module, None),
                        is_starved=mlp.is_starved,
                    )
                    self._account.tokens[module] = mlp.routed
        return packed

    def _open(self, block: str, expert: int | None) -> _Mlp:
        """What the MLP sees."""
        policy = self._recipe.expert_coverage
        sees_all = self._sees_all(expert)
        gram = self._wants_gram(block, "gate_proj", "up_proj")
        into = Accumulator(f"{block}.gate_proj", gram=gram)
        routed_tokens = 0
        for index, routed in self._blocks:
            if expert is not None:
                routed_tokens += len(tokens_of(routed, expert)[0])
            else:
                routed_tokens += len(routed.z)
            if sees_all:
                continue
            x = routed.z[self._chosen(routed, expert)]
            if len(x):
                into.add(index, observe(x, self._num_rows, keep_rows=gram))
        # Without any token there is nothing to solve on, whatever the floor.
        floor = max(policy.floor_tokens, 1)
        starved = expert is not None and policy.policy == "topk" and routed_tokens < floor
        seen = self.layer_input(gram=gram) if sees_all else into.finish()
        return _Mlp(block, expert, seen, routed_tokens, starved)

    def _statistics(self, mlp: _Mlp, role: str) -> InputStatistics | None:
        """Of the input of a linear. That of down is made when it is asked for: by then its Gram
        matrix, the largest of a layer, need not lie beside gate and up in work. Where down stays as
        it is, nobody needs to know."""
        if role != "down_proj":
            return mlp.into
        if not mlp.knows_down and self._schemes[f"{mlp.block}.down_proj"].is_quantized:
            mlp.down, mlp.knows_down = self._down(mlp), True
        return mlp.down

    def _down(self, mlp: _Mlp) -> InputStatistics | None:
        """The input of down is that of the original gate and up."""
        gate, up = (self.weight(f"{mlp.block}.{role}") for role in ("gate_proj", "up_proj"))
        gram = self._wants_gram(mlp.block, "down_proj")
        down = Accumulator(f"{mlp.block}.down_proj", gram=gram)
        for index, routed in self._blocks:
            all_of_it = self._sees_all(mlp.expert)
            x = routed.z if all_of_it else routed.z[self._chosen(routed, mlp.expert)]
            if len(x):
                down.add(index, observe(hidden(x, gate, up), self._num_rows, keep_rows=gram))
        return down.finish()

    def _sees_all(self, expert: int | None) -> bool:
        return expert is None or self._recipe.expert_coverage.policy == "all"

    def _wants_gram(self, block: str, *roles: str) -> bool:
        return any(self._schemes[f"{block}.{role}"].algorithm == "gptq" for role in roles)

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

    def _scale_mlp(
        self, mlp: _Mlp, one: FoldingGroup, how: ScaleMethod, smoothing: Smoothing
    ) -> None:
        role = one.measured.rpartition(".")[2]
        if mlp.is_starved and how.algorithm == "awq":
            return  # noted when its linears are rounded
        seen = self._statistics(mlp, role)
        if seen is None:
            self._ledger.note("unseen_expert", self._layer, one.measured)
            return
        norm = self._source.get(one.divided)
        divided = None if one.divided.endswith("up_proj.weight") else norm
        scale = self._scale(
            one, how, seen, None if divided is None else divided.data.to(self._device)
        )
        smoothing.add(one, scale)
        if divided is not None:
            self._account.smoothing.rows[one.divided] = scale

    def _scale(
        self,
        one: FoldingGroup,
        how: ScaleMethod,
        seen: InputStatistics,
        divided: Tensor | None,
    ) -> Tensor:
        """The vector f32 [K] of a set that is all here: SmoothQuant's formula or AWQ's search."""
        if how.strength is not None:
            amax_w = torch.stack([column_amax(self.weight(m)) for m in one.consumers]).amax(dim=0)
            args = (how.strength, one.measured, self._layer, self._ledger)
            return smoothing_scale(seen.amax, amax_w, *args)
        brought = [weight_means(self.weight(m), self._schemes[m]) for m in one.consumers]
        total = torch.stack([each for each, _ in brought]).sum(dim=0)
        mean_w = (total / sum(count for _, count in brought)).float()
        candidates = foldable(candidate_scales(seen.mean_abs, mean_w), divided, False)
        losses = torch.stack(
            [
                scale_losses([self.weight(m)], seen.sample, candidates, self._schemes[m])
                for m in one.consumers
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
                check_magnitude(largest(weight))
            except CheckpointError as refusal:
                raise CheckpointError(f"tensor {name} {refusal}") from refusal
        return weight

    def _linear(
        self,
        module: str,
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
        solved = solve_linear(
            source, lambda: self.weight(module), scheme, seen, smoothing, self._ledger, rounded
        )
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
        self, work: Sequence[tuple[str, InputStatistics | None]], smoothing: Smoothing
    ) -> dict[str, Rounded]:
        """GPTQ of those of these linears (module, its input) that ask for it and have seen tokens,
        as one batch per shape and scheme. Their Gram matrices are used up."""
        # Linears of one shape that share an input (gate and up of one expert; everybody's under
        # policy `all`) are stacked along their outputs.
        readers: dict[tuple[object, ...], _Readers] = {}
        for module, seen in work:
            scheme = self._schemes[module]
            if scheme.algorithm == "gptq" and seen is not None:
                shape = self._source[f"{module}.weight"].spec.shape
                each = readers.setdefault((scheme, shape, id(seen)), _Readers(scheme, seen))
                each.modules.append(module)
        factors = self._invert(list(readers.values()))
        batches: dict[tuple[object, ...], list[_Readers]] = {}
        for (scheme_, shape_, _), each in readers.items():
            batches.setdefault((scheme_, shape_, len(each.modules)), []).append(each)
        rounded: dict[str, Rounded] = {}
        for batch in batches.values():
            scheme = batch[0].scheme
            own_factors = [factors[_factor_key(each)] for each in batch]
            stacked = self._stack([each.modules for each in batch], smoothing)
            for each, factor, solved in zip(
                batch, own_factors, gptq(stacked, own_factors, scheme), strict=True
            ):
                for module, own in zip(each.modules, solved.split(len(each.modules)), strict=True):
                    rounded[module] = own
                    self._note_factor(module, factor, scheme)
        return rounded

    def _invert(self, readers: Sequence[_Readers]) -> dict[_FactorKey, Factor]:
        """The factors of their Gram matrices, each in the place of its matrix."""
        factors: dict[_FactorKey, Factor] = {}
        keys = [_factor_key(each) for each in readers]
        for place, (key, each) in enumerate(zip(keys, readers, strict=True)):
            if key in factors:
                continue
            if each.seen is self._whole and self._recipe.expert_coverage.policy == "all":
                factors[key] = self._whole_factor(each.scheme)
                continue
            # Readers of one input may ask for it damped in several ways.
            is_last = all(other == key or other[0] != key[0] for other in keys[place + 1 :])
            assert each.seen.gram is not None, each.modules
            gram = each.seen.take_gram() if is_last else each.seen.gram.clone()
            factors[key] = _factor_of(gram, each.scheme)
        return factors

    def _whole_factor(self, scheme: Scheme) -> Factor:
        """Of what all experts see: inverted once for all units."""
        assert self._whole is not None
        assert self._whole.gram is not None
        key = scheme.damping, scheme.act_order
        if key not in self._factors:
            self._factors[key] = _factor_of(self._whole.gram.clone(), scheme)
        return self._factors[key]

    def _stack(self, rows: Sequence[Sequence[str]], smoothing: Smoothing) -> Tensor:
        """The weights of linears of one shape as they will be rounded, those of a row one below the
        other: f32 [n, rows of N, K]."""
        outputs, inputs = self._source[f"{rows[0][0]}.weight"].spec.shape
        shape = len(rows), len(rows[0]) * outputs, inputs
        stacked = torch.empty(shape, dtype=torch.float32, device=self._device)
        for entry, modules in zip(stacked, rows, strict=True):
            for part, module in zip(entry.split(outputs), modules, strict=True):
                name = f"{module}.weight"
                assert name not in smoothing.columns, module
                part.copy_(smoothing.fold(name, self.weight(module)))
        return stacked

    def _note_factor(self, module: str, factor: Factor, scheme: Scheme) -> None:
        if factor.failed:
            self._ledger.note("unusable_hessian", self._layer, module)
        elif factor.damping > scheme.damping:
            self._ledger.note("damped_hessian", self._layer, module)


#: Which Gram matrix, and how it is damped and ordered.
_FactorKey = tuple[int, float, bool]


def _factor_key(readers: _Readers) -> _FactorKey:
    return id(readers.seen), readers.scheme.damping, readers.scheme.act_order


def _factor_of(gram: Tensor, scheme: Scheme) -> Factor:
    return inverse_factor(gram, scheme.damping, act_order=scheme.act_order)

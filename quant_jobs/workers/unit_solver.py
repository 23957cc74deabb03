"""Solves the units of one layer: scales of channels, ranges, codes.

What is measured comes from `calibration/measuring.py`. The order within one MLP follows from what
depends on what: the input of gate and up is known (it was routed here), the input of down follows
from the *original* gate and up; the scale of down's channels is folded into up's rows, so it is
chosen before either is rounded. GPTQ then takes the experts of a unit as one batch on a GPU, where
that saves launches, and one by one elsewhere.

Memory: a weight is dequantized when it is used, and let go of then; at most gate and up of one MLP
are here at once. Reading a weight again costs a thousandth of what is done with it.

D hidden size · I intermediate size · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.inventory import MLP_ROLES
from deepseek.recipe import Recipe, Scheme
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.awq import scale_losses
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, Smoothing
from quant_jobs.algorithms.gptq import Factor, Rounded, gptq, inverse_factor
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.linear import solve_linear
from quant_jobs.algorithms.scaling import choose_scale, weight_statistics
from quant_jobs.calibration.measuring import LayerInputs, MlpInput
from quant_jobs.calibration.statistics import InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.messages import SolveSummary, Tensors


@dataclass(slots=True)
class _Mlp:
    """One MLP in work: what it sees, and the statistics of the input of down once they were asked
    for."""

    input: MlpInput
    down: InputStatistics | None = None
    is_down_measured: bool = False

    @property
    def name(self) -> str:
        return self.input.mlp


@dataclass(slots=True)
class _LinearStack:
    """Linears of one scheme and shape that GPTQ solves under one Gram matrix."""

    scheme: Scheme
    statistics: InputStatistics
    modules: list[str] = field(default_factory=list)


class UnitSolver:
    """Solves units of one layer.

    `source` is the original layer as far as it is here, `inputs` what its linears see (their Gram
    matrices are used up, so a unit is solved once), `groups` the folding groups whose linears are
    all in one unit, `weight(module)` the original weight f32 [N, K].
    """

    def __init__(
        self,
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        layer: int,
        source: Mapping[str, SourceTensor],
        inputs: LayerInputs,
        groups: Sequence[tuple[FoldingGroup, ScaleMethod]],
        weight: Callable[[str], Tensor],
        device: torch.device,
    ) -> None:
        self._recipe, self._schemes, self._layer = recipe, schemes, layer
        self._source, self._inputs, self._groups = source, inputs, groups
        self._weight, self._device = weight, device
        self._factors: dict[tuple[float, bool], Factor] = {}  # of the Gram matrix that all share
        self._ledger = Ledger()
        self._summary = SolveSummary()

    def summary(self) -> SolveSummary:
        """What was solved so far, without the tensors."""
        self._summary.fallbacks = self._ledger.entries()
        return self._summary

    def solve(self, unit: Unit, shared: Smoothing) -> Tensors:
        """Quantize one unit; packed tensors by full name. `shared` is what the whole layer shares.

        Raises:
            CheckpointError: a weight cannot be represented, or an activation is not finite.
        """
        return (
            self._solve_attention(unit)
            if unit.kind == "attention"
            else self._solve_mlp_unit(unit, shared)
        )

    # --- attention ---

    def _solve_attention(self, unit: Unit) -> Tensors:
        (linear_input,) = unit.inputs
        statistics = self._inputs.take_attention(linear_input.name)
        smoothing = Smoothing()
        for group, method in self._groups_within(unit.modules):
            divided = self._source[group.divided].data.to(self._device)
            smoothing.add(group, self._scale(group, method, statistics, divided))
        self._summary.smoothing.rows |= smoothing.rows
        rounded = self._gptq([(module, statistics) for module in unit.modules], smoothing)
        packed: Tensors = {}
        for module in unit.modules:
            packed |= self._linear(module, statistics, smoothing, rounded.pop(module, None))
        if unit.modules[0].endswith("kv_b_proj"):
            self._summary.kv_latent_amax = self._summary.input_amax[unit.modules[0]]
        return packed

    # --- MLPs ---

    def _solve_mlp_unit(self, unit: Unit, shared: Smoothing) -> Tensors:
        mlps = unit.numbered_mlps()
        # One by one is less to hold. Where all experts see the same tokens, all of a unit that read
        # one input are stacked.
        together = self._device.type != "cpu" or self._recipe.expert_coverage.policy == "all"
        packed: Tensors = {}
        for batch in [mlps] if together else [[mlp] for mlp in mlps]:
            packed |= self._solve_mlps([_Mlp(self._inputs.mlp(*mlp)) for mlp in batch], shared)
        return packed

    def _solve_mlps(self, mlps: Sequence[_Mlp], shared: Smoothing) -> Tensors:
        smoothing = Smoothing(dict(shared.columns), dict(shared.rows))
        for mlp in mlps:
            modules = [f"{mlp.name}.{role}" for role in MLP_ROLES]
            for group, method in self._groups_within(modules):
                self._scale_mlp(mlp, group, method, smoothing)
        packed: Tensors = {}
        for roles in (("gate_proj", "up_proj"), ("down_proj",)):
            statistics = {mlp.name: self._statistics(mlp, roles[0]) for mlp in mlps}
            work = [
                (f"{mlp.name}.{role}", statistics[mlp.name])
                for mlp in mlps
                for role in roles
                if not mlp.input.is_starved
            ]
            rounded = self._gptq(work, smoothing)
            for mlp in mlps:
                for role in roles:
                    module = f"{mlp.name}.{role}"
                    packed |= self._linear(
                        module,
                        statistics[mlp.name],
                        smoothing,
                        rounded.pop(module, None),
                        is_starved=mlp.input.is_starved,
                    )
                    self._summary.tokens[module] = mlp.input.routed_tokens
        return packed

    def _statistics(self, mlp: _Mlp, role: str) -> InputStatistics | None:
        """Input statistics of one linear. The Gram matrix of `down_proj`, the largest of a layer,
        is computed lazily: gate and up have let go of theirs by then. Where down stays as it is,
        nothing of it is measured."""
        if role != "down_proj":
            return mlp.input.statistics
        if not mlp.is_down_measured and self._schemes[f"{mlp.name}.down_proj"].is_quantized:
            mlp.down, mlp.is_down_measured = self._inputs.down(mlp.input), True
        return mlp.down

    # --- scales of channels ---

    def _groups_within(self, modules: Sequence[str]) -> list[tuple[FoldingGroup, ScaleMethod]]:
        """The folding groups whose linears are all among these modules."""
        owned = set(modules)
        return [pair for pair in self._groups if owned.issuperset(pair[0].consumers)]

    def _scale_mlp(
        self, mlp: _Mlp, group: FoldingGroup, method: ScaleMethod, smoothing: Smoothing
    ) -> None:
        role = group.measured.rpartition(".")[2]
        if mlp.input.is_starved and method.algorithm == "awq":
            return  # noted when its linears are rounded
        statistics = self._statistics(mlp, role)
        if statistics is None:
            self._ledger.note("unseen_expert", self._layer, group.measured)
            return
        divided: Tensor | None = None
        if not group.divided.endswith("up_proj.weight"):
            divided = self._source[group.divided].data.to(self._device)
        scale = self._scale(group, method, statistics, divided)
        smoothing.add(group, scale)
        if divided is not None:
            self._summary.smoothing.rows[group.divided] = scale

    def _scale(
        self,
        group: FoldingGroup,
        method: ScaleMethod,
        statistics: InputStatistics,
        divided: Tensor | None,
    ) -> Tensor:
        """The scale f32 [K] of a group whose linears are all here."""

        def losses_of(candidates: Tensor) -> list[Tensor]:
            return [
                scale_losses(
                    [self._weight(module)], statistics.sample, candidates, self._schemes[module]
                )
                for module in group.consumers
            ]

        return choose_scale(
            group,
            method,
            [
                weight_statistics(self._weight(module), method, self._schemes[module])
                for module in group.consumers
            ],
            amax=statistics.amax,
            mean_abs=statistics.mean_abs,
            divided=divided,
            losses_of=losses_of,
            layer=self._layer,
            ledger=self._ledger,
        )

    # --- linears ---

    def _linear(
        self,
        module: str,
        statistics: InputStatistics | None,
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
            source,
            lambda: self._weight(module),
            scheme,
            None if statistics is None else statistics.sample,
            smoothing,
            self._ledger,
            rounded,
        )
        if solved.error is not None:
            self._summary.errors[module] = solved.error
        columns = smoothing.columns.get(f"{module}.weight")
        self._summary.input_amax[module] = 0.0
        self._summary.tokens[module] = 0
        if statistics is not None:
            amax = statistics.amax if columns is None else statistics.amax / columns
            self._summary.input_amax[module] = float(amax.amax())
            self._summary.tokens[module] = statistics.tokens
        return {name: tensor.cpu() for name, tensor in solved.tensors.items()}

    def _gptq(
        self, work: Sequence[tuple[str, InputStatistics | None]], smoothing: Smoothing
    ) -> dict[str, Rounded]:
        """GPTQ of those of these linears (module, its input) that ask for it and have seen tokens,
        as one batch per shape and scheme. Their Gram matrices are used up."""
        # Linears of one shape that share an input (gate and up of one expert; everybody's under
        # policy `all`) are stacked along their outputs.
        readers: dict[tuple[object, ...], _LinearStack] = {}
        for module, statistics in work:
            scheme = self._schemes[module]
            if scheme.algorithm == "gptq" and statistics is not None:
                shape = self._source[f"{module}.weight"].spec.shape
                key = scheme, shape, id(statistics)
                readers.setdefault(key, _LinearStack(scheme, statistics)).modules.append(module)
        factors = self._factorize(list(readers.values()))
        batches: dict[tuple[object, ...], list[_LinearStack]] = {}
        for (scheme_, shape_, _), stack in readers.items():
            batches.setdefault((scheme_, shape_, len(stack.modules)), []).append(stack)
        rounded: dict[str, Rounded] = {}
        for batch in batches.values():
            scheme = batch[0].scheme
            own_factors = [factors[_factor_key(stack)] for stack in batch]
            weights = self._stack([stack.modules for stack in batch], smoothing)
            for stack, factor, solved in zip(
                batch, own_factors, gptq(weights, own_factors, scheme), strict=True
            ):
                modules = stack.modules
                for module, own in zip(modules, solved.split(len(modules)), strict=True):
                    rounded[module] = own
                    self._note_factor(module, factor, scheme)
        return rounded

    def _factorize(self, readers: Sequence[_LinearStack]) -> dict[_FactorKey, Factor]:
        """The factors of their Gram matrices, each in the place of its matrix."""
        factors: dict[_FactorKey, Factor] = {}
        keys = [_factor_key(stack) for stack in readers]
        for place, (key, stack) in enumerate(zip(keys, readers, strict=True)):
            if key in factors:
                continue
            if self._inputs.is_shared(stack.statistics):
                factors[key] = self._shared_factor(stack.statistics, stack.scheme)
                continue
            # Readers of one input may ask for it damped in several ways.
            is_last = all(other == key or other[0] != key[0] for other in keys[place + 1 :])
            assert stack.statistics.gram is not None, stack.modules
            gram = stack.statistics.take_gram() if is_last else stack.statistics.gram.clone()
            factors[key] = _factorize_gram(gram, stack.scheme)
        return factors

    def _shared_factor(self, statistics: InputStatistics, scheme: Scheme) -> Factor:
        """The factor of what all experts see: inverted once for all units."""
        assert statistics.gram is not None
        key = scheme.damping, scheme.act_order
        if key not in self._factors:
            self._factors[key] = _factorize_gram(statistics.gram.clone(), scheme)
        return self._factors[key]

    def _stack(self, rows: Sequence[Sequence[str]], smoothing: Smoothing) -> Tensor:
        """The weights of linears of one shape as they will be rounded, those of a row one below the
        other: f32 [n, rows of N, K]."""
        outputs, inputs = self._source[f"{rows[0][0]}.weight"].spec.shape
        shape = len(rows), len(rows[0]) * outputs, inputs
        stacked = torch.empty(shape, dtype=torch.float32, device=self._device)
        for entry, modules in zip(stacked, rows, strict=True):
            for rows_NK, module in zip(entry.split(outputs), modules, strict=True):
                name = f"{module}.weight"
                assert name not in smoothing.columns, module
                rows_NK.copy_(smoothing.fold(name, self._weight(module)))
        return stacked

    def _note_factor(self, module: str, factor: Factor, scheme: Scheme) -> None:
        if factor.failed:
            self._ledger.note("unusable_hessian", self._layer, module)
        elif factor.damping > scheme.damping:
            self._ledger.note("damped_hessian", self._layer, module)


#: Which Gram matrix, and how it is damped and ordered.
_FactorKey = tuple[int, float, bool]


def _factor_key(readers: _LinearStack) -> _FactorKey:
    return id(readers.statistics), readers.scheme.damping, readers.scheme.act_order


def _factorize_gram(gram: Tensor, scheme: Scheme) -> Factor:
    return inverse_factor(gram, scheme.damping, act_order=scheme.act_order)

"""Solves the units of one layer: smoothing scales, ranges and codes of their linears.

Called by `original.py`. Measures nothing: input statistics come from `calibration/measuring.py`.
The order within an MLP follows its data dependencies: the input of gate and up is known, the input
of down is computed with the *original* gate and up; the smoothing scale of down is folded into the
rows of up, so it is chosen before either is rounded. On a GPU, GPTQ solves the experts of a unit as
one batch, which saves launches; on a CPU one by one.

Memory: a weight is dequantized when it is used and freed afterwards; at most gate and up of one MLP
are in memory at once. Dequantizing again costs a thousandth of the work done with the weight.

D hidden size · I intermediate size · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.inventory import LATENT_READER, MLP_READERS, MLP_ROLES
from deepseek.recipe import Recipe, Scheme
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.awq import scale_losses
from quant_jobs.algorithms.exact import computes_zero, silent_channels
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
    """An MLP being solved: its input, and the input statistics of `down_proj` once computed."""

    input: MlpInput
    down: InputStatistics | None = None
    is_down_measured: bool = False

    @property
    def name(self) -> str:
        return self.input.mlp


@dataclass(slots=True)
class _LinearStack:
    """Linears of one scheme, shape and input, which GPTQ solves stacked along their outputs."""

    scheme: Scheme
    statistics: InputStatistics
    modules: list[str] = field(default_factory=list)


class UnitSolver:
    """Solves units of one layer.

    `source` has the stored tensors that this worker holds; `inputs` the statistics of the layer's
    inputs, whose Gram matrices are consumed, so each unit is solved once; `groups` the folding
    groups whose linears are all in one unit. `weight(module)` returns the original weight f32
    [N, K]. With `measures_experts` the summary has the largest input of every linear of a routed
    expert, quantized or not. Packed tensors are returned in host memory.
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
        *,
        measures_experts: bool = False,
    ) -> None:
        self._recipe, self._schemes, self._layer = recipe, schemes, layer
        self._measures_experts = measures_experts
        self._source, self._inputs, self._groups = source, inputs, groups
        self._weight, self._device = weight, device
        self._factors: dict[tuple[float, bool], Factor] = {}  # of the Gram matrix all experts share
        self._ledger = Ledger()
        self._summary = SolveSummary()

    def summary(self) -> SolveSummary:
        """The summary of the units solved so far."""
        self._summary.fallbacks = self._ledger.entries()
        return self._summary

    def solve(self, unit: Unit, shared: Smoothing) -> Tensors:
        """Quantize one unit; returns packed tensors by full name. `shared` has the scale that the
        whole layer shares.

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
        if linear_input.readers[0].role == LATENT_READER:
            self._summary.kv_latent_amax = self._summary.input_amax[unit.modules[0]]
        return packed

    # --- MLPs ---

    def _solve_mlp_unit(self, unit: Unit, shared: Smoothing) -> Tensors:
        mlps = unit.numbered_mlps()
        # One by one takes less memory. Where all experts have the same input, those of a unit are
        # stacked.
        is_batched = self._device.type != "cpu" or self._recipe.expert_coverage.policy == "all"
        packed: Tensors = {}
        for batch in [mlps] if is_batched else [[mlp] for mlp in mlps]:
            packed |= self._solve_mlps([_Mlp(self._inputs.mlp(*mlp)) for mlp in batch], shared)
        return packed

    def _solve_mlps(self, mlps: Sequence[_Mlp], shared: Smoothing) -> Tensors:
        smoothing = Smoothing(dict(shared.columns), dict(shared.rows))
        for mlp in mlps:
            modules = [f"{mlp.name}.{role}" for role in MLP_ROLES]
            if computes_zero(modules[0], self._source):
                self._summary.computing_zero.add(mlp.name)
            for group, method in self._groups_within(modules):
                self._scale_mlp(mlp, group, method, smoothing)
        packed: Tensors = {}
        for roles in MLP_READERS:
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
        for mlp in mlps if self._measures_experts else ():
            self._measure_carried_down(mlp, smoothing)
        return packed

    def _measure_carried_down(self, mlp: _Mlp, smoothing: Smoothing) -> None:
        """Measure the input of an expert's `down_proj` that is not quantized, for which `_linear`
        needs no statistics: the maxima are of all experts or of none."""
        module = f"{mlp.name}.down_proj"
        if mlp.input.expert is None or self._schemes[module].is_quantized:
            return
        if (statistics := self._inputs.down(mlp.input)) is not None:
            self._summary.input_amax[module] = _largest_input(
                statistics, smoothing.columns.get(f"{module}.weight")
            )

    def _statistics(self, mlp: _Mlp, role: str) -> InputStatistics | None:
        """Input statistics of one linear. Those of `down_proj`, whose Gram matrix is the largest of
        a layer, are computed lazily, after GPTQ has freed the Gram matrix of gate and up; and only
        if `down_proj` is quantized."""
        if role != "down_proj":
            return mlp.input.statistics
        if not mlp.is_down_measured and self._schemes[f"{mlp.name}.down_proj"].is_quantized:
            mlp.down, mlp.is_down_measured = self._inputs.down(mlp.input), True
        return mlp.down

    # --- smoothing scales ---

    def _groups_within(self, modules: Sequence[str]) -> list[tuple[FoldingGroup, ScaleMethod]]:
        """The folding groups all of whose linears are among these modules."""
        owned = set(modules)
        return [pair for pair in self._groups if owned.issuperset(pair[0].consumers)]

    def _scale_mlp(
        self, mlp: _Mlp, group: FoldingGroup, method: ScaleMethod, smoothing: Smoothing
    ) -> None:
        role = group.measured.rpartition(".")[2]
        if mlp.input.is_starved and method.algorithm == "awq":
            return  # counted when its linears are rounded
        statistics = self._statistics(mlp, role)
        if statistics is None:
            if mlp.name not in self._summary.computing_zero:
                self._ledger.note("unseen_expert", self._layer, group.measured)
            return
        divided: Tensor | None = None
        if group.divided.removesuffix(".weight") not in self._schemes:  # a norm, not up_proj's rows
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
        """The smoothing scale f32 [K] of a group whose linears all belong to this worker."""

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
            silent=lambda: silent_channels(group, self._source).to(self._device),
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
            if module.rpartition(".")[0] not in self._summary.computing_zero:
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
            self._summary.input_amax[module] = _largest_input(statistics, columns)
            self._summary.tokens[module] = statistics.tokens
        return {name: tensor.cpu() for name, tensor in solved.tensors.items()}

    def _gptq(
        self, work: Sequence[tuple[str, InputStatistics | None]], smoothing: Smoothing
    ) -> dict[str, Rounded]:
        """Run GPTQ on those of these linears (module, its input statistics) whose scheme asks for
        it and that have received tokens, in one batch per shape and scheme. Frees their Gram
        matrices."""
        # Linears of one shape and input (gate and up of one expert; those of all experts under
        # policy `all`) are stacked along their outputs.
        stacks: dict[tuple[object, ...], _LinearStack] = {}
        for module, statistics in work:
            scheme = self._schemes[module]
            if scheme.algorithm == "gptq" and statistics is not None:
                shape = self._source[f"{module}.weight"].spec.shape
                key = scheme, shape, id(statistics)
                stacks.setdefault(key, _LinearStack(scheme, statistics)).modules.append(module)
        factors = self._factorize(list(stacks.values()))
        batches: dict[tuple[object, ...], list[_LinearStack]] = {}
        for (scheme_, shape_, _), stack in stacks.items():
            batches.setdefault((scheme_, shape_, len(stack.modules)), []).append(stack)
        rounded: dict[str, Rounded] = {}
        for batch in batches.values():
            scheme = batch[0].scheme
            batch_factors = [factors[_factor_key(stack)] for stack in batch]
            weights = self._stack([stack.modules for stack in batch], smoothing)
            stacked = len(batch[0].modules)
            results = gptq(weights, batch_factors, scheme, stacked=stacked)
            for stack, factor, solved in zip(batch, batch_factors, results, strict=True):
                modules = stack.modules
                for module, result in zip(modules, solved.split(len(modules)), strict=True):
                    rounded[module] = result
                    self._note_factor(module, factor, scheme)
        return rounded

    def _factorize(self, stacks: Sequence[_LinearStack]) -> dict[_FactorKey, Factor]:
        """The inverse factors of the stacks' Gram matrices, each in the memory of its matrix."""
        factors: dict[_FactorKey, Factor] = {}
        keys = [_factor_key(stack) for stack in stacks]
        for position, (key, stack) in enumerate(zip(keys, stacks, strict=True)):
            if key in factors:
                continue
            if self._inputs.is_shared(stack.statistics):
                factors[key] = self._shared_factor(stack.statistics, stack.scheme)
                continue
            # Linears of one input may damp its Gram matrix differently; the last takes it.
            is_last = all(other == key or other[0] != key[0] for other in keys[position + 1 :])
            assert stack.statistics.gram is not None, stack.modules
            gram = stack.statistics.take_gram() if is_last else stack.statistics.gram.clone()
            factors[key] = _factorize_gram(gram, stack.scheme)
        return factors

    def _shared_factor(self, statistics: InputStatistics, scheme: Scheme) -> Factor:
        """The factor of the input that all experts share: computed once for all units."""
        assert statistics.gram is not None
        key = scheme.damping, scheme.act_order
        if key not in self._factors:
            self._factors[key] = _factorize_gram(statistics.gram.clone(), scheme)
        return self._factors[key]

    def _stack(self, rows: Sequence[Sequence[str]], smoothing: Smoothing) -> Tensor:
        """The folded weights of linears of one shape, those of a row stacked along the outputs: f32
        [n, linears per row * N, K]."""
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
        if not factor.failed and factor.damping <= scheme.damping:
            return
        if computes_zero(module, self._source):
            return
        if factor.failed:
            self._ledger.note("unusable_hessian", self._layer, module)
        else:
            self._ledger.note("damped_hessian", self._layer, module)


#: Identity of the Gram matrix, damping, and whether columns are reordered.
_FactorKey = tuple[int, float, bool]


def _factor_key(stack: _LinearStack) -> _FactorKey:
    return id(stack.statistics), stack.scheme.damping, stack.scheme.act_order


def _factorize_gram(gram: Tensor, scheme: Scheme) -> Factor:
    return inverse_factor(gram, scheme.damping, act_order=scheme.act_order)


def _largest_input(statistics: InputStatistics, columns: Tensor | None) -> float:
    """The largest magnitude of an input, whose channels are divided by the scale `columns` f32
    [K]."""
    amax = statistics.amax if columns is None else statistics.amax / columns
    return float(amax.amax())

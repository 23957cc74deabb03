"""The work of quantizing one layer, per worker: FLOPs, bytes and kernels, counted from shapes.

Follows the schedule of `job/layer_steps.py` step by step. No rate is in here (`rates.py` has them;
`model.py` divides one by the other):

    attend   a worker runs its own blocks through the original attention, wave by wave
    observe  the owners of attention units add up the statistics of all blocks of the wave
    receive  every worker moves what enters the MLP, all blocks, to where it computes
    scale    one scale for router, shared and all routed experts (SmoothQuant, AWQ)
    solve    a worker solves its units: gate and up on their tokens, statistics, then the algorithm
    carry    per wave: quantized attention; own experts on all tokens; sums at the blocks' owners
    store    the activations, to resume from

The slowest worker counts in each step, because the driver waits for all. Assumptions: tokens spread
over experts evenly but for `imbalance`, and a group of experts has the schemes of its first one.

T tokens · W workers (one per GPU) · E experts · D hidden · I intermediate · K inputs of a linear
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from deepseek.formats import stored_bytes
from deepseek.inventory import LinearInput, TensorSpec
from quant_jobs.algorithms.awq import NUM_CANDIDATES
from quant_jobs.calibration.statistics import SAMPLE_TOKENS
from quant_jobs.calibration.units import Unit
from quant_jobs.cost.shapes import (
    F32,
    counted_inputs,
    counted_linears,
    group_numel,
    is_trunk_mlp,
    layer_shares,
    layer_units,
    mlp_scale_algorithm,
    num_copies,
)
from quant_jobs.cost.work import (
    Job,
    Load,
    Phase,
    Step,
    column_loop,
    factor,
    gates,
    observed,
    per_weight,
    pieces,
)


@dataclass(frozen=True)
class LayerWork:
    """One layer of a job: `steps()` in their order."""

    job: Job
    layer: int

    @cached_property
    def shares(self) -> list[tuple[Unit, ...]]:
        """Units of each worker; workers with the same work are listed once."""
        distinct: dict[object, tuple[Unit, ...]] = {}
        for share in layer_shares(self.job.config, self.layer, self.job.workers):
            distinct.setdefault(tuple(self._kind(unit) for unit in share), share)
        return list(distinct.values())

    def _kind(self, unit: Unit) -> object:
        """Equal for units of equal work."""
        linears = ((spec.role, spec.shape, self.job.scheme(spec)) for spec in counted_linears(unit))
        return len(unit.experts), tuple(linears)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        return layer_units(self.job.config, self.layer)

    @cached_property
    def numel(self) -> Mapping[str, int]:
        return group_numel(self.job.config, self.layer)

    @property
    def is_moe(self) -> bool:
        return self.job.config.is_moe(self.layer)

    def steps(self) -> Iterator[Step]:
        """The steps of the schedule, `store` apart (`model.py` has its seconds)."""
        for blocks, repeat in self.job.waves:
            yield self._attend(blocks, repeat)
        algorithm = mlp_scale_algorithm(self.job.config, self.job.scheme, self.layer)
        if algorithm is not None:
            yield from self._scale(algorithm)
        yield self._solve()
        if self.job.is_carried(self.layer):
            for blocks, repeat in self.job.waves:
                yield from self._carry(blocks, repeat)

    # --- what enters the MLP, and statistics of the attention ---

    def _attend(self, blocks: int, repeat: int) -> Step:
        """Work of one wave. Attending and observing are two rounds; the driver waits for both."""
        job = self.job
        tokens = blocks * job.block_tokens
        inputs = [(unit.inputs[0].width, self._wants_gram(unit)) for unit in self._attention()]
        sent = sum(width for width, wants_gram in inputs if wants_gram) * F32
        mine = self._busiest(blocks) * job.block_tokens
        block = self._attention_block(quantized=False) + Load(
            put=job.block_tokens * (self._routed_row + sent),
            pcie=job.block_tokens * (job.row + self._routed_row + sent),
            moved=16 * job.block_tokens * sum(width for width, _ in inputs),  # observing them
            launches=12 * len(inputs),
        )
        attended = block.times(mine / job.block_tokens)
        workers: list[Mapping[Phase, Load]] = [
            {"forward A": attended, "statistics": self._observe(share, tokens)}
            for share in self.shares
        ]
        # The rows of an input go to the node of its owner; the busiest node owns the widest.
        gathered = max((width * F32 for width, wants_gram in inputs if wants_gram), default=0)
        fabric = tokens * (self._routed_row + max(gathered, sent / job.nodes)) * job.remote
        return Step("attend", workers, fabric, 2, repeat)

    def _observe(self, share: tuple[Unit, ...], tokens: int) -> Load:
        load = Load()
        for unit in share:
            if unit.kind == "attention" and self._wants_gram(unit):
                width = unit.inputs[0].width
                blocks = tokens / self.job.block_tokens
                load += self.job.gram(tokens, width, blocks) + Load(pcie=tokens * width * F32)
        return load

    def _attention_block(self, *, quantized: bool) -> Load:
        """Work of one block in attention and router. Linears are restored when they are used."""
        config, tokens = self.job.config, self.job.block_tokens
        widths = config.qk_head_dim + config.v_head_dim
        scores = 2 * config.num_attention_heads * widths * tokens // 2  # half the keys on average
        load = Load(
            matmul=tokens * (2 * (self.numel["attention"] + self.numel["router"]) + scores),
            # Two norms, rotary positions, the residual, queries and keys put together.
            moved=40 * tokens * (config.hidden_size + config.num_attention_heads * widths),
            launches=pieces()["launches"]["attend"],
        )
        for spec in (spec for unit in self._attention() for spec in counted_linears(unit)):
            load += self._restored(spec, quantized=quantized)
            if quantized:
                load += self._prepared(spec, tokens)
        return load

    def _prepared(self, spec: TensorSpec, rows: float) -> Load:
        """Work of rounding a linear's input to INT8 or FP8, where its kernel does that."""
        if self.job.scheme(spec).activations == "none":
            return Load()
        return Load(moved=28 * rows * spec.shape[1], launches=8)

    def _restored(self, spec: TensorSpec, *, quantized: bool) -> Load:
        """Work of making a weight float32 from its stored form."""
        scheme = self.job.scheme(spec)
        if quantized and scheme.is_quantized:
            return per_weight(f"decompress_int{scheme.bits}", spec.numel)
        if self.job.config.weight_block_size is None:
            return Load(moved=6 * spec.numel, launches=1)
        bands = math.ceil(spec.shape[0] / 128)
        return per_weight("dequantize_fp8", spec.numel) + Load(launches=3 * bands)

    # --- the shared scale, and the units ---

    def _scale(self, algorithm: str) -> Iterator[Step]:
        """Statistics of weights and inputs, and for AWQ the losses of its candidates. The tokens
        that they read are moved once, which `_solve` counts."""
        statistics: list[Mapping[Phase, Load]] = []
        losses: list[Mapping[Phase, Load]] = []
        for share in self.shares:
            own = [(num_copies(unit), spec) for unit, spec in gates(share)]
            load = Load()
            for copies, spec in own:
                load += self._restored(spec, quantized=False).times(copies)
                load += Load(moved=16 * spec.numel * copies, launches=4 * copies)
            if any(is_trunk_mlp(unit) for unit in share):
                load += observed(self._tokens, self.job.config.hidden_size)
            statistics.append({"statistics": load})
            load = Load()
            for copies, spec in own:
                load += self._restored(spec, quantized=False).times(copies)
                load += per_weight("awq_candidate", spec.numel * copies).times(NUM_CANDIDATES)
            losses.append({"solve": load})
        yield Step("solve", statistics)
        if algorithm == "awq":
            yield Step("solve", losses)

    def _solve(self) -> Step:
        received = Load(pcie=self._tokens * self._routed_row)
        workers: list[Mapping[Phase, Load]] = []
        for share in self.shares:
            statistics, solve = received, Load()
            for unit in share:
                if unit.kind == "mlp":
                    statistics += self._measured(unit)
                solve += self._unit(unit)
            if self.job.sees_all and any(unit.experts and self._wants_gram(unit) for unit in share):
                statistics += self._whole_gram()
            workers.append({"statistics": statistics, "solve": solve})
        return Step("solve", workers, rounds=3)

    def _measured(self, unit: Unit) -> Load:
        """Gate and up on the tokens that the unit is measured on, and statistics of both inputs.
        All three weights are restored for it; the algorithm uses the same."""
        into, down = counted_inputs(unit)
        narrow, wide = down.width, into.width
        tokens = self._rows(unit)
        adds = self.job.num_blocks * num_copies(unit)
        load = Load(
            matmul=2 * tokens * sum(spec.numel for spec in into.readers),
            moved=tokens * (8 * wide + 20 * narrow),
            launches=pieces()["launches"]["measure"] * adds,
        )
        for spec in counted_linears(unit):
            load += self._restored(spec, quantized=False).times(num_copies(unit))
        load += observed(tokens, narrow)
        if self._is_gptq(down.readers[0]):
            load += self.job.gram(tokens, narrow, adds)
        if unit.experts and self.job.sees_all:
            return load
        load += observed(tokens, wide)
        if self._is_gptq(into.readers[0]):
            load += self.job.gram(tokens, wide, adds)
        return load

    def _whole_gram(self) -> Load:
        """Work of the one Gram matrix that serves every expert under coverage policy `all`; each
        worker computes its own."""
        width = self.job.config.hidden_size
        return self.job.gram(self._tokens, width, self.job.num_blocks)

    def _unit(self, unit: Unit) -> Load:
        """Work of the algorithm on the unit's linears."""
        load, copies = Load(), num_copies(unit)
        for counted in counted_inputs(unit):
            if any(self._is_gptq(spec) for spec in counted.readers):
                width = counted.width
                load += factor(width).times(num_grams(self.job, unit, counted))
                rows = sum(spec.shape[0] for spec in counted.readers)
                scheme = self.job.scheme(counted.readers[0])
                size = scheme.group_size or width
                searches = width // size if scheme.clip == "mse" else 0
                load += column_loop(rows, width, copies, searches)
        for spec in counted_linears(unit):
            load += self._linear(spec, unit)
        return load

    def _linear(self, spec: TensorSpec, unit: Unit) -> Load:
        copies = num_copies(unit)
        scheme, numel = self.job.scheme(spec), spec.numel * copies
        load = Load(put=self._stored(spec) * copies, pcie=self._stored(spec) * copies)
        if unit.kind == "attention":
            load += self._restored(spec, quantized=False)
        if not scheme.is_quantized:
            return load
        load += Load(matmul=4 * SAMPLE_TOKENS * numel, launches=30 * copies)
        load += per_weight(f"compress_int{scheme.bits}", numel)
        load += self._restored(spec, quantized=True).times(copies)
        if scheme.clip == "mse":
            load += per_weight("mse_clip", numel)
        if scheme.algorithm != "awq":
            return load
        if unit.kind == "attention" or spec.role == "down_proj":
            load += per_weight("awq_candidate", numel).times(NUM_CANDIDATES)
        return load + per_weight("awq_clip", numel)

    # --- through the quantized layer ---

    def _carry(self, blocks: int, repeat: int) -> Iterator[Step]:
        job = self.job
        tokens, mine = blocks * job.block_tokens, self._busiest(blocks)
        attended = self._attention_block(quantized=True) + Load(
            put=job.block_tokens * self._routed_row,
            pcie=job.block_tokens * (job.row + self._routed_row),
        )
        attention: list[Mapping[Phase, Load]] = [{"forward B": attended.times(mine)}]
        fabric = tokens * self._routed_row * job.remote if self.is_moe else 0.0
        yield Step("carry", attention, fabric, repeat=repeat)
        if self.is_moe:
            experts: list[Mapping[Phase, Load]] = [
                {"forward B": self._run_experts(share, tokens, blocks)} for share in self.shares
            ]
            # What experts make of a token goes to its node only.
            fabric = tokens / job.nodes * job.config.num_experts_per_tok * job.row * job.remote
            yield Step("carry", experts, fabric, 1, repeat)
        yield Step("carry", [{"forward B": self._combine().times(mine)}], repeat=repeat)

    def _run_experts(self, share: tuple[Unit, ...], tokens: int, blocks: int) -> Load:
        """Work of a worker's experts on all tokens of one wave, restored for every wave."""
        load = Load(pcie=tokens * self._routed_row)
        for unit in (unit for unit in share if unit.experts):
            config = self.job.config
            rows, copies = self._routed(unit) * tokens / self._tokens, num_copies(unit)
            wide, narrow = config.hidden_size, config.moe_intermediate_size
            load += Load(
                matmul=2 * rows * sum(spec.numel for spec in counted_linears(unit)),
                moved=rows * (16 * wide + 20 * narrow),
                launches=pieces()["launches"]["run_expert"] * blocks * copies,
                put=rows * self.job.row,
                pcie=rows * self.job.row,
            )
            for spec in counted_linears(unit):
                load += self._restored(spec, quantized=True).times(copies)
                load += self._prepared(spec, rows)
        return load

    def _combine(self) -> Load:
        """Work of one block: adding up the experts' rows, the shared expert or the dense MLP."""
        job, config = self.job, self.job.config
        load = Load()
        for unit in (unit for unit in self.units if is_trunk_mlp(unit)):
            narrow = unit.inputs[-1].width
            load += Load(
                matmul=2 * job.block_tokens * sum(spec.numel for spec in counted_linears(unit)),
                moved=job.block_tokens * (16 * config.hidden_size + 20 * narrow),
                launches=10,
                pcie=job.block_tokens * job.row,
            )
            for spec in counted_linears(unit):
                load += self._restored(spec, quantized=True)
                load += self._prepared(spec, job.block_tokens)
        if self.is_moe:
            rows = job.block_tokens * config.num_experts_per_tok
            load += Load(
                moved=3 * rows * config.hidden_size * F32,
                launches=2 * config.n_routed_experts,
                pcie=rows * job.row,
            )
        return load

    # --- small things ---

    @property
    def _tokens(self) -> int:
        return self.job.num_blocks * self.job.block_tokens

    @property
    def _routed_row(self) -> int:
        """Bytes of a token where it enters the MLP: `z`, and the router's choice, int64 and
        float32."""
        return self.job.row + (12 * self.job.config.num_experts_per_tok if self.is_moe else 0)

    def _busiest(self, blocks: int) -> int:
        """Blocks of a wave that one worker holds at most."""
        return math.ceil(blocks / self.job.workers)

    def _attention(self) -> list[Unit]:
        return [unit for unit in self.units if unit.kind == "attention"]

    def _routed(self, unit: Unit) -> float:
        """Rows that all blocks send to a group of experts."""
        config = self.job.config
        mean = self._tokens * config.num_experts_per_tok / config.n_routed_experts
        return mean * num_copies(unit) * self.job.imbalance

    def _rows(self, unit: Unit) -> float:
        """Rows on which a unit's MLPs are measured, all of them together."""
        if not unit.experts or self.job.sees_all:
            return self._tokens * num_copies(unit)
        policy = self.job.recipe.expert_coverage
        more = 0.0
        if policy.policy == "shrink":
            more = math.ceil(policy.shrink_tokens / self.job.num_blocks) * self.job.num_blocks
        return self._routed(unit) + more * num_copies(unit)

    def _stored(self, spec: TensorSpec) -> int:
        return stored_bytes(self.job.scheme(spec), spec.shape[0], spec.shape[1])

    def _is_gptq(self, spec: TensorSpec) -> bool:
        return self.job.algorithm(spec) == "gptq"

    def _wants_gram(self, unit: Unit) -> bool:
        return any(self._is_gptq(spec) for spec in counted_linears(unit))


def num_grams(job: Job, unit: Unit, counted: LinearInput) -> int:
    """Gram matrices of one counted input: one for each expert of a group, but a single one where
    every expert sees all tokens and so the same input."""
    is_layers_input = bool(unit.experts) and job.sees_all and counted == counted_inputs(unit)[0]
    return 1 if is_layers_input else num_copies(unit)

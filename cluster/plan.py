"""Step 1, plan: whether a recipe fits these machines, whether the target loads it, and what would.

A pure function of the model's config, the recipe and the hardware; it reads no weights. `fits` is
about memory only, `loads` about the deployability matrix; a plan is good when both hold. The plan
is of one replica: tensor parallelism over all its GPUs, whole experts per GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cluster.deployability import Findings, Refusal, examine, require_target, served_schemes
from cluster.hardware import GPUS_PER_NODE, GpuGeneration, Machines
from cluster.matrix import Target
from cluster.memory import GROUPS, Footprint, Tally
from cluster.splits import split_notes, split_refusals, trtllm_refusals
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Recipe
from deepseek.trtllm.layout import Dialect, require_dialect, stored_schemes

#: In this order `auto` takes the first target that loads the recipe. transformers is not among
#: them: it dequantizes everything and has no batching, so that it is for looking and comparing.
GPU_TARGETS: tuple[Target, ...] = ("trtllm", "vllm", "sglang")
#: Tokens of a request when `--context` is not given, unless the model's own limit is less.
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the byte table. The line `scales` is the sum over all groups but MTP."""

    name: str
    total_bytes: int
    per_gpu_bytes: int


@dataclass(frozen=True, slots=True)
class SmallestFit:
    """The fewest GPUs, of one node or as whole nodes of eight, that hold the requests."""

    gpus: int
    hardware: str
    weights_per_gpu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DialectPlan:
    """What one dialect of TensorRT-LLM's directory takes. `refusals` are those of this dialect on
    these GPUs; formats that neither can hold are the plan's own."""

    dialect: Dialect
    fits: bool
    footprint: Footprint
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer for one recipe on one set of machines.

    `kv_tokens` and `max_concurrency` are what this hardware holds, 0 when the weights leave no
    room. `refusals` are those of the targets that `auto` passed over, and of the chosen target
    where none loads the recipe. `dialect` is that of target trtllm, None elsewhere; `dialects` are
    all that the recipe could be built in there, the plan's own among them.
    """

    recipe: str
    machines: Machines
    target: Target
    dialect: Dialect | None
    dialects: tuple[DialectPlan, ...]
    asked_auto: bool
    fits: bool
    loads: bool
    context: int
    concurrency: int
    mtp: bool
    kv_format: str
    footprint: Footprint
    lines: tuple[Line, ...]
    kv_tokens: int
    max_concurrency: int
    smallest_fit: SmallestFit | None
    refusals: tuple[Refusal, ...]
    warnings: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Fits, and the target loads it."""
        return self.fits and self.loads


def make_plan(
    config: ModelConfig,
    recipe: Recipe,
    machines: Machines,
    *,
    target: str = "auto",
    context: int | None = None,
    concurrency: int = 1,
    mtp: bool = False,
    dialect: str | None = None,
) -> Plan:
    """Plan one replica of the model that holds `concurrency` requests of `context` tokens each.

    `dialect` is target trtllm's: mixed (without it) or single. A recipe that quantizes nothing is
    a release there, whatever it says.

    Raises:
        DeployError: context or concurrency out of range, an unknown target or dialect, a dialect
            for a target without any, or a number of GPUs that the attention heads cannot be split
            over.
        RecipeError: the recipe cannot be applied to this model.
    """
    context = _check_context(config, machines, target, context)
    if concurrency < 1:
        raise DeployError(f"--concurrency must be at least 1, not {concurrency}")
    if config.num_attention_heads % machines.count:
        raise DeployError(
            f"--hardware {machines.label}: {config.num_attention_heads} attention heads cannot be "
            f"split over {machines.count} GPUs; use "
            f"{' or '.join(str(n) for n in _counts_near(config, machines.count))}"
        )
    asked = _Asked(config, recipe, machines, mtp, _dialect_of(config, recipe, target, dialect))
    chosen, loads, refusals, notes = _choose(asked, target)
    footprint = asked.footprint(chosen, machines)
    requested = _paged_tokens(footprint, context, concurrency)
    kv_tokens = footprint.kv_tokens(machines.hardware.usable_bytes)
    return Plan(
        recipe=recipe.name,
        machines=machines,
        target=chosen,
        dialect=asked.dialect if chosen == "trtllm" else None,
        dialects=asked.dialects(context, concurrency) if chosen == "trtllm" else (),
        asked_auto=target == "auto",
        fits=kv_tokens >= requested,
        loads=loads,
        context=context,
        concurrency=concurrency,
        mtp=mtp,
        kv_format=recipe.kv_cache,
        footprint=footprint,
        lines=_lines(footprint),
        kv_tokens=kv_tokens,
        max_concurrency=kv_tokens // _paged_tokens(footprint, context, 1),
        smallest_fit=_smallest_fit(asked, chosen, context, concurrency),
        refusals=refusals,
        warnings=(*notes, *_warnings(config, machines, chosen)),
    )


def better_recipes(plan: Plan, config: ModelConfig, recipes: Iterable[Recipe]) -> list[Plan]:
    """Plans with those of `recipes` that are good on the same hardware, target, context and
    concurrency, the largest (most precise) first. Empty when `plan` itself is good.

    Recipes that differ only in how they round have one plan, with the first of them.
    """
    if plan.good:
        return []
    good = []
    for recipe in {_layout(recipe): recipe for recipe in reversed(list(recipes))}.values():
        other = make_plan(
            config,
            recipe,
            plan.machines,
            target="auto" if plan.asked_auto else plan.target,
            context=plan.context,
            concurrency=plan.concurrency,
            mtp=plan.mtp,
            dialect=None if plan.dialect == "released" else plan.dialect,
        )
        if other.good:
            good.append(other)
    return sorted(good, key=lambda other: (-round(other.footprint.weights / 1e8), other.recipe))


def _layout(recipe: Recipe) -> tuple[object, ...]:
    """The fields of a recipe that a plan depends on."""
    rules = ((rule.match, rule.weights, rule.group_size, rule.activations) for rule in recipe.rules)
    return recipe.kv_cache, *rules


@lru_cache(maxsize=12)
def tally_of(config: ModelConfig, recipe: Recipe) -> Tally:
    """The tensors of a model under a recipe, counted; the one slow step of a plan (a second)."""
    schemes = recipe.resolve(config)
    recipe.check_rules(config)
    return Tally(config, schemes)


def _check_context(
    config: ModelConfig, machines: Machines, target: str, context: int | None
) -> int:
    """The context to plan for. The embedded engine serves `ModelConfig.dense_context`."""
    is_embedded = target == "embedded" or (target == "auto" and not machines.hardware.is_gpu)
    limit = config.dense_context if is_embedded else config.max_position_embeddings
    if context is None:
        return min(DEFAULT_CONTEXT, limit)
    if limit < context <= config.max_position_embeddings:
        raise DeployError(
            f"--context {context} is more than {config.context_limit}; lower it, or plan for "
            "GPUs, whose engines have sparse attention"
        )
    if not 1 <= context <= limit:
        raise DeployError(f"--context must be 1 to {limit}, the model's limit, not {context}")
    return context


def _counts_near(config: ModelConfig, count: int) -> list[int]:
    """The nearest usable numbers of GPUs below and above."""
    usable = _usable_counts(config)
    below = [number for number in usable if number < count][-1:]
    return below + [number for number in usable if number > count][:1]


def _usable_counts(config: ModelConfig) -> list[int]:
    heads = config.num_attention_heads
    counts = (1, 2, 4, *range(GPUS_PER_NODE, heads + 1, GPUS_PER_NODE))
    return [count for count in counts if count <= heads and heads % count == 0]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be planned, whatever the target. `dialect` is target trtllm's."""

    config: ModelConfig
    recipe: Recipe
    machines: Machines
    mtp: bool
    dialect: Dialect

    def footprint(
        self, target: Target, machines: Machines, dialect: Dialect | None = None
    ) -> Footprint:
        """Bytes on these machines, which may be other than those asked for."""
        if not machines.hardware.is_gpu:
            return tally_of(self.config, self.recipe).embedded_footprint(self.recipe.kv_cache)
        stored = (dialect or self.dialect) if target == "trtllm" else "mixed"
        return _stored_tally(self.config, self.recipe, stored).gpu_footprint(
            machines.count, self.recipe.kv_cache, mtp=self.mtp, target=target
        )

    def dialects(self, context: int, concurrency: int) -> tuple[DialectPlan, ...]:
        """The dialects that this recipe could be built in: both, or the one of a release; none
        where no dialect can hold its formats."""
        generation = self.machines.hardware.generation
        if _format_findings(self.config, self.recipe, "trtllm", generation, self.mtp).refusals:
            return ()
        names: tuple[Dialect, ...] = ("mixed", "single")
        found = []
        for name in ("released",) if self.dialect == "released" else names:
            footprint = self.footprint("trtllm", self.machines, name)
            tokens = footprint.kv_tokens(self.machines.hardware.usable_bytes)
            refusals = _trtllm_refusals(
                self.config, self.recipe, name, self.machines.num_gpus, self.mtp
            )
            found.append(
                DialectPlan(
                    dialect=name,
                    fits=tokens >= _paged_tokens(footprint, context, concurrency),
                    footprint=footprint,
                    refusals=refusals,
                )
            )
        return tuple(found)


def _dialect_of(config: ModelConfig, recipe: Recipe, target: str, asked: str | None) -> Dialect:
    """The dialect to plan for on target trtllm."""
    if asked is not None and target not in ("auto", "trtllm"):
        raise DeployError(f"--dialect is of --target trtllm; leave it out for {target}")
    chosen = require_dialect(asked or "mixed")
    quantized = any(scheme.is_quantized for scheme in tally_of(config, recipe).schemes.values())
    return chosen if quantized else "released"


@lru_cache(maxsize=12)
def _stored_tally(config: ModelConfig, recipe: Recipe, dialect: Dialect) -> Tally:
    """The tensors as an engine holds them: as the artifact does, but in the dialect single, where
    every linear but the routed experts is BF16."""
    if dialect != "single":
        return tally_of(config, recipe)
    schemes = tally_of(config, recipe).schemes
    return Tally(config, stored_schemes(config, schemes, dialect, mtp=True))


def _choose(
    asked: _Asked, target: str
) -> tuple[Target, bool, tuple[Refusal, ...], tuple[str, ...]]:
    """(target, whether it loads, refusals of the targets that were tried, notes of the target)."""
    candidates: tuple[Target, ...]
    if target != "auto":
        candidates = (require_target(target),)
    else:
        candidates = GPU_TARGETS if asked.machines.hardware.is_gpu else ("embedded",)
    met: list[Refusal] = []
    for candidate in candidates:
        findings = _findings(asked, candidate)
        refusals = [*findings.refusals, *_mtp_refusals(candidate, asked.mtp)]
        met += refusals
        if not refusals:
            return candidate, True, tuple(met), findings.notes
    return candidates[0], False, tuple(met), ()


@lru_cache(maxsize=128)
def _format_findings(
    config: ModelConfig, recipe: Recipe, target: Target, gpu: GpuGeneration, mtp: bool
) -> Findings:
    schemes = served_schemes(config, tally_of(config, recipe).schemes, mtp=mtp)
    return examine(schemes, recipe.kv_cache, target, gpu)


def _findings(asked: _Asked, target: Target) -> Findings:
    config, recipe, machines, mtp = asked.config, asked.recipe, asked.machines, asked.mtp
    tally = tally_of(config, recipe)
    found = _format_findings(config, recipe, target, machines.hardware.generation, mtp)
    if found.refusals or target == "embedded":
        return found
    if target == "trtllm":
        refusals = _trtllm_refusals(config, recipe, asked.dialect, machines.num_gpus, mtp)
    else:
        refusals = tuple(split_refusals(tally, target, machines.num_gpus))
    notes = split_notes(tally, target, machines.num_gpus)
    return Findings(refusals, (*found.notes, *notes))


@lru_cache(maxsize=128)
def _trtllm_refusals(
    config: ModelConfig, recipe: Recipe, dialect: Dialect, tp: int, mtp: bool
) -> tuple[Refusal, ...]:
    schemes = tally_of(config, recipe).schemes
    return tuple(trtllm_refusals(config, schemes, dialect, tp, mtp=mtp))


def _mtp_refusals(target: Target, mtp: bool) -> list[Refusal]:
    if target != "embedded" or not mtp:
        return []
    reason = "the embedded engine does not speculate yet"
    return [Refusal("embedded", "the MTP layer", reason, "Leave out --mtp", "read")]


def _paged_tokens(footprint: Footprint, context: int, concurrency: int) -> int:
    """Tokens of `concurrency` requests, each rounded up to whole KV pages."""
    pages = -(-context // footprint.page_tokens)
    return pages * footprint.page_tokens * concurrency


def _smallest_fit(
    asked: _Asked, target: Target, context: int, concurrency: int
) -> SmallestFit | None:
    """The fewest GPUs of this type, in whole nodes or as given; None where no number suffices."""
    machines = asked.machines
    counts = {count for count in _usable_counts(asked.config) if count % GPUS_PER_NODE == 0}
    counts = counts | {machines.count} if machines.hardware.is_gpu else {1}
    for count in sorted(counts):
        candidate = machines.with_count(count)
        footprint = asked.footprint(target, candidate)
        requested = _paged_tokens(footprint, context, concurrency)
        if footprint.kv_tokens(machines.hardware.usable_bytes) >= requested:
            return SmallestFit(candidate.num_gpus, candidate.label, footprint.weights_per_gpu)
    return None


def _lines(footprint: Footprint) -> tuple[Line, ...]:
    """The weight lines in table order: groups, then all scales, then MTP with its own scales. The
    indexer has a line where it is loaded."""
    groups = footprint.groups
    left_out = {"mtp"} if groups["indexer"].values else {"mtp", "indexer"}
    main = [name for name in GROUPS if name not in left_out]
    mtp = groups["mtp"]
    return (
        *(Line(name, groups[name].values, groups[name].values_per_gpu) for name in main),
        Line(
            "scales",
            sum(groups[name].scales for name in main),
            sum(groups[name].scales_per_gpu for name in main),
        ),
        Line("mtp", mtp.values + mtp.scales, mtp.values_per_gpu + mtp.scales_per_gpu),
    )


def _warnings(config: ModelConfig, machines: Machines, target: Target) -> list[str]:
    warnings = []
    if target == "embedded" and config.dense_context < config.max_position_embeddings:
        warnings.append(
            f"the embedded engine leaves the indexer out and serves {config.dense_context} tokens "
            f"of context, up to which attention is dense, not {config.max_position_embeddings}"
        )
    if machines.num_nodes > 1:
        nvlink = machines.hardware.nvlink_bandwidth / 1e9
        warnings.append(
            f"tensor parallelism spans {machines.num_nodes} nodes: the all-reduces of every layer "
            f"cross the network instead of NVLink ({nvlink:.0f} GB/s)"
        )
    return warnings

"""Step 1, plan: whether a recipe fits these machines, whether the target loads it, and what would.

A pure function of the model's config, the recipe and the hardware; it reads no weights. `fits` is
about memory only, `loads` about the deployability matrix; a plan is good when both hold. The plan
is of one replica: tensor parallelism over all its GPUs, whole experts per GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.choice import Asked, choose, require_plan_dialect
from cluster.hardware import GPUS_PER_NODE, Machines
from cluster.matrix import Refusal, Target
from cluster.memory import GROUPS, Footprint, planned_kv_layout
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.kv_layout import KVLayout
from deepseek.recipe import Recipe
from deepseek.trtllm.layout import Dialect

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
    where none loads the recipe. `dialect` is the target's, None where it has none; `dialects` are
    all of TensorRT-LLM that the recipe could be built in, the plan's own among them.
    `engine_version` is "" for the embedded engine. `kv_layout` is what the target makes of
    `kv_format`.
    """

    recipe: str
    machines: Machines
    target: Target
    engine_version: str
    dialect: str | None
    dialects: tuple[DialectPlan, ...]
    asked_auto: bool
    fits: bool
    loads: bool
    context: int
    concurrency: int
    mtp: bool
    kv_format: str
    kv_layout: KVLayout
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
    engine_version: str | None = None,
) -> Plan:
    """Plan one replica of the model that holds `concurrency` requests of `context` tokens each.

    `dialect` is the target's: of trtllm mixed (without it) or single, of sglang one of its layouts
    (without it the one that fits). A recipe that quantizes nothing is a release on trtllm, whatever
    `dialect` says. `engine_version` is of a target that is named.

    Raises:
        DeployError: context or concurrency out of range, an unknown target, version or dialect, a
            dialect for a target without any, or a number of GPUs that the attention heads cannot
            be split over.
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
    require_plan_dialect(target, dialect)
    if engine_version is not None and target == "auto":
        raise DeployError("--engine-version is of one target; name it with --target")
    asked = Asked(config, recipe, machines, mtp, dialect, engine_version)
    chosen, loads, refusals, notes = choose(asked, target)
    footprint = asked.footprint(chosen, machines)
    requested = _paged_tokens(footprint, context, concurrency)
    kv_tokens = footprint.kv_tokens(machines.hardware.usable_bytes)
    return Plan(
        recipe=recipe.name,
        machines=machines,
        target=chosen,
        engine_version=asked.version_on(chosen),
        dialect=asked.dialect_on(chosen),
        dialects=_dialects(asked, context, concurrency) if chosen == "trtllm" else (),
        asked_auto=target == "auto",
        fits=kv_tokens >= requested,
        loads=loads,
        context=context,
        concurrency=concurrency,
        mtp=mtp,
        kv_format=recipe.kv_cache,
        kv_layout=planned_kv_layout(config, chosen, recipe.kv_cache),
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
    for recipe in distinct_recipes(recipes):
        other = make_plan(
            config,
            recipe,
            plan.machines,
            target="auto" if plan.asked_auto else plan.target,
            context=plan.context,
            concurrency=plan.concurrency,
            mtp=plan.mtp,
            dialect=plan.dialect if plan.dialect in ("mixed", "single") else None,
            engine_version=None if plan.asked_auto else plan.engine_version or None,
        )
        if other.good:
            good.append(other)
    return sorted(good, key=lambda other: (-round(other.footprint.weights / 1e8), other.recipe))


def distinct_recipes(recipes: Iterable[Recipe]) -> list[Recipe]:
    """The first of those that differ only in how they round, and therefore have one plan."""
    return list({_layout(recipe): recipe for recipe in reversed(list(recipes))}.values())


def _layout(recipe: Recipe) -> tuple[object, ...]:
    """The fields of a recipe that a plan depends on."""
    rules = ((rule.match, rule.weights, rule.group_size, rule.activations) for rule in recipe.rules)
    return recipe.kv_cache, *rules


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
    usable = usable_counts(config)
    below = [number for number in usable if number < count][-1:]
    return below + [number for number in usable if number > count][:1]


def usable_counts(config: ModelConfig) -> list[int]:
    """Numbers of GPUs that the attention heads can be split over, within a node or whole nodes."""
    heads = config.num_attention_heads
    counts = (1, 2, 4, *range(GPUS_PER_NODE, heads + 1, GPUS_PER_NODE))
    return [count for count in counts if count <= heads and heads % count == 0]


def _dialects(asked: Asked, context: int, concurrency: int) -> tuple[DialectPlan, ...]:
    """The dialects of TensorRT-LLM that this recipe could be built in: both, or the one of a
    release; none where no dialect can hold its formats."""
    if asked.format_findings("trtllm").refusals:
        return ()
    both: tuple[Dialect, ...] = ("mixed", "single")
    found = []
    for name in ("released",) if asked.trtllm_dialect == "released" else both:
        footprint = asked.footprint("trtllm", asked.machines, name)
        tokens = footprint.kv_tokens(asked.machines.hardware.usable_bytes)
        found.append(
            DialectPlan(
                dialect=name,
                fits=tokens >= _paged_tokens(footprint, context, concurrency),
                footprint=footprint,
                refusals=asked.trtllm_refusals(name),
            )
        )
    return tuple(found)


def _paged_tokens(footprint: Footprint, context: int, concurrency: int) -> int:
    """Tokens of `concurrency` requests, each rounded up to whole KV pages."""
    pages = -(-context // footprint.page_tokens)
    return pages * footprint.page_tokens * concurrency


def _smallest_fit(
    asked: Asked, target: Target, context: int, concurrency: int
) -> SmallestFit | None:
    """The fewest GPUs of this type, in whole nodes or as given; None where no number suffices."""
    machines = asked.machines
    counts = {count for count in usable_counts(asked.config) if count % GPUS_PER_NODE == 0}
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

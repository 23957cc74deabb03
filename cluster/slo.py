"""`plan --slo`: the fewest nodes, the recipe and the layout that hold a latency target at a rate.

Every recipe is tried on replicas of every size that a target loads it on, with attention split by
heads and by sequences. Its batch limit is the largest at which even a full replica holds the TPOT;
then replicas are added until the waits that `cluster/queueing.py` gives leave time for the TTFT.
Speeds are the roofline's, made slower by `MARGINS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.hardware import GPUS_PER_NODE, Hardware, Machines
from cluster.memory import GPU_MAX_BATCH
from cluster.plan import Plan, distinct_recipes, make_plan, usable_counts
from cluster.queueing import prefill_wait, slot_wait
from cluster.roofline import ReplicaSpeed, replica_speed
from cluster.work import Attention
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Recipe
from deepseek.untrusted import show_name

#: Share of requests that must hold the TTFT; what the fleet's autoscaling looks at too.
PERCENTILE = 0.9
#: How much slower than the roofline's answer a replica is taken to be: as much as the figure that
#: the fit is most optimistic about (`needed_margin` of `cluster/fit.py`; a test computes it).
MARGINS: dict[Attention, float] = {"tp": 0.31, "dp": 0.55}
#: Largest replica that is tried, and most requests per second and nodes that make sense here.
MAX_REPLICA_NODES = 4
MAX_RPS = 100_000.0
MAX_NODES = 10_000

_UNITS = {"s": 1.0, "ms": 1e-3}
_ATTENTIONS: tuple[Attention, ...] = ("tp", "dp")


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in seconds: of the time to the first token, held by `PERCENTILE` of the requests, and
    of the time per output token after it, held by all."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests per second that arrive at random, each with `isl` prompt tokens and `osl` output
    tokens."""

    rps: float
    isl: int
    osl: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """`replicas` of one recipe and layout that hold the target. Times are seconds, with the margin.

    `batch` is the limit of requests on one replica, `running` how many run on average; `tpot_s` and
    `full_tpot_s` are the time per token at those. `wait_s` is the wait for a place and
    `prefill_wait_s` that for earlier prompts, both at `PERCENTILE`; `ttft_s` their sum with the
    prompt's own time and one step.
    """

    plan: Plan
    speed: ReplicaSpeed
    replicas: int
    batch: int
    running: float
    tpot_s: float
    full_tpot_s: float
    ttft_s: float
    wait_s: float
    prefill_wait_s: float
    prefill_s: float
    limited_by: str

    @property
    def margin(self) -> float:
        return MARGINS[self.speed.layout.attention]

    @property
    def nodes(self) -> int:
        return -(-self.replicas * self.speed.layout.gpus // GPUS_PER_NODE)

    @property
    def gpus(self) -> int:
        return self.replicas * self.speed.layout.gpus

    @property
    def precision(self) -> int:
        """Weight bytes, rounded to 0.1 GB: more are more precise."""
        return round(self.plan.footprint.weights / 1e8)


def parse_slo(text: str) -> Slo:
    """`ttft=2s,tpot=50ms`, in either order.

    Raises:
        DeployError: something else, with the sentence that names it.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in ("ttft", "tpot") or not equals:
            raise DeployError(
                f"--slo {show_name(text)}: {show_name(part.strip())} is no target; write "
                "ttft=TIME,tpot=TIME, as in ttft=2s,tpot=50ms"
            )
        if name in found:
            raise DeployError(f"--slo {show_name(text)}: {name} is there twice; give it once")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value, re.ASCII)
        seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
        if not 0.0 < seconds <= 86_400.0:
            raise DeployError(
                f"--slo {show_name(text)}: {name} must be a time above 0 and up to a day in s or "
                f"ms, as in 2s or 50ms, not {show_name(value)}"
            )
        found[name] = seconds
    for name in ("ttft", "tpot"):
        if name not in found:
            raise DeployError(
                f"--slo {show_name(text)}: {name} is missing; write ttft=TIME,tpot=TIME, as in "
                "ttft=2s,tpot=50ms"
            )
    return Slo(found["ttft"], found["tpot"])


def check_workload(rps: float | None, isl: int | None, osl: int | None) -> Workload:
    """The workload from the options beside `--slo`.

    Raises:
        DeployError: one is missing or out of range.
    """
    if rps is None or isl is None or osl is None:
        given = {"--rps": rps, "--isl": isl, "--osl": osl}
        missing = " and ".join(name for name, value in given.items() if value is None)
        raise DeployError(
            f"--slo needs {missing} too: requests per second, prompt tokens and output tokens of "
            "one request"
        )
    if not 0.0 < rps <= MAX_RPS:
        raise DeployError(f"--rps must be above 0 and up to {MAX_RPS:g}, not {rps:g}")
    for name, value in (("--isl", isl), ("--osl", osl)):
        if value < 1:
            raise DeployError(f"{name} must be at least 1, not {value}")
    return Workload(rps, isl, osl)


def recommend(
    config: ModelConfig,
    recipes: Sequence[Recipe],
    hardware: Hardware,
    slo: Slo,
    workload: Workload,
    *,
    most_gpus: int | None = None,
    target: str = "auto",
    dialect: str | None = None,
    engine_version: str | None = None,
) -> list[Fleet]:
    """Fleets that hold the target, the best first: fewest nodes, then the most precise recipe, then
    the shortest time per token. One for each recipe that can.

    Raises:
        DeployError: nothing holds it; the sentence names the limit. Or what `make_plan` raises of
            every replica alike.
    """
    if not hardware.is_gpu:
        raise DeployError(
            "--slo is about GPUs, on whose published speeds the roofline is fitted; name one with "
            "--hardware, as in H200-141GB"
        )
    fleets: list[Fleet] = []
    misses: list[_Miss] = []
    plans = list(_plans(config, recipes, hardware, workload, target, dialect, engine_version))
    for plan, recipe in plans:
        if not plan.loads:
            continue
        for attention in _ATTENTIONS if plan.machines.count > 1 else ("tp",):
            speed = replica_speed(
                config, recipe, plan.machines, target=plan.target, attention=attention
            )
            found = _fleet(plan, speed, slo, workload)
            if isinstance(found, Fleet):
                fleets.append(found)
            elif found is not None:
                misses.append(found)
    if not fleets:
        raise DeployError(_why_not(hardware, plans, misses))
    ordered = sorted(fleets, key=lambda one: (one.nodes, -one.precision, one.tpot_s))
    best = ordered[0]
    if best.nodes > MAX_NODES or (most_gpus is not None and best.gpus > most_gpus):
        have = f"a plan has {MAX_NODES:,} nodes at most"
        if most_gpus is not None:
            have = f"--hardware {most_gpus}x{hardware.name} has {most_gpus:,}"
        raise DeployError(
            f"--rps {workload.rps:g} needs {best.gpus:,} GPUs with recipe {best.plan.recipe} (each "
            f"replica is limited to {best.batch:,} requests by {best.limited_by}), and {have}; "
            "lower --rps or relax --slo"
        )
    first: dict[str, Fleet] = {}
    for fleet in ordered:
        first.setdefault(fleet.plan.recipe, fleet)
    return list(first.values())


@dataclass(frozen=True, slots=True)
class _Miss:
    """Why a replica can't hold the target, however many there are: it takes `best_s` of `name`
    where `wanted_s` is asked."""

    name: str
    best_s: float
    wanted_s: float
    what: str
    plan: Plan
    speed: ReplicaSpeed
    limit: str

    @property
    def ratio(self) -> float:
        return self.best_s / self.wanted_s


def _plans(
    config: ModelConfig,
    recipes: Sequence[Recipe],
    hardware: Hardware,
    workload: Workload,
    target: str,
    dialect: str | None,
    engine_version: str | None,
) -> Iterable[tuple[Plan, Recipe]]:
    """Plans of one request on every size of replica."""
    for recipe in distinct_recipes(recipes):
        for count in usable_counts(config):
            if count <= MAX_REPLICA_NODES * GPUS_PER_NODE:
                plan = make_plan(
                    config,
                    recipe,
                    Machines(hardware, count),
                    target=target,
                    context=workload.isl + workload.osl,
                    dialect=dialect,
                    engine_version=engine_version,
                )
                yield plan, recipe


def _fleet(plan: Plan, speed: ReplicaSpeed, slo: Slo, workload: Workload) -> Fleet | _Miss | None:
    """The fewest replicas, or why no number of them would do; None where not one request fits."""
    isl, osl = workload.isl, workload.osl
    layout = speed.layout
    slower = 1.0 + MARGINS[layout.attention]
    places = GPU_MAX_BATCH * (layout.gpus if layout.attention == "dp" else 1)
    most = min(speed.max_batch(isl, osl), places)
    if most < 1:
        return None
    alone, prefill = slower * speed.tpot_s(1, isl, osl), slower * speed.prefill_s(isl)
    if alone > slo.tpot_s:
        limit = speed.step(1, isl + osl / 2).limit
        what = "one request alone takes {best} a token"
        return _Miss("tpot", alone, slo.tpot_s, what, plan, speed, limit)
    batch = _largest_batch(speed, most, slo.tpot_s / slower, isl, osl)
    full = slower * speed.tpot_s(batch, isl, osl)
    step = slower * speed.decode_s(batch, isl + osl / 2)
    if prefill + step > slo.ttft_s:
        limit = speed.chunk(min(speed.chunk_tokens, isl), isl / 2).limit
        what = f"a prompt of {isl:,} tokens takes {{best}} on an idle replica"
        return _Miss("ttft", prefill + step, slo.ttft_s, what, plan, speed, limit)
    service = prefill + osl * full
    load = workload.rps * service
    one_prompt = slower * isl / speed.prefill_tokens_per_s(isl)

    def waits(replicas: int) -> tuple[float, float]:
        slot = slot_wait(replicas * batch, load, service, PERCENTILE)
        busy = workload.rps / replicas * one_prompt
        return slot, prefill_wait(busy, one_prompt, PERCENTILE)

    def holds(replicas: int) -> bool:
        return sum(waits(replicas)) + prefill + step <= slo.ttft_s

    replicas = _fewest(holds, max(1, math.ceil(load / batch)))
    slot, before = waits(replicas)
    running = _running(speed, workload, replicas, batch, prefill)
    limited_by = "tpot"
    if batch == most:
        limited_by = "the workspace" if most == places else "the KV cache"
    return Fleet(
        plan=plan,
        speed=speed,
        replicas=replicas,
        batch=batch,
        running=running,
        tpot_s=slower * speed.tpot_s(running, isl, osl),
        full_tpot_s=full,
        ttft_s=slot + before + prefill + step,
        wait_s=slot,
        prefill_wait_s=before,
        prefill_s=prefill,
        limited_by=limited_by,
    )


def _largest_batch(speed: ReplicaSpeed, most: int, tpot_s: float, isl: int, osl: int) -> int:
    """The largest batch up to `most` whose TPOT holds; one request's does."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if speed.tpot_s(middle, isl, osl) <= tpot_s:
            low = middle
        else:
            high = middle - 1
    return low


def _fewest(holds: Callable[[int], bool], start: int) -> int:
    """The smallest number from `start` on that holds; larger ones hold too, and one does."""
    step, low, high = 1, start, start
    while not holds(high):
        low, high, step = high + 1, high + step, step * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _running(
    speed: ReplicaSpeed, workload: Workload, replicas: int, batch: int, prefill_s: float
) -> float:
    """Requests that run on one replica on average: those that arrive during one's own time, which
    depends on them again (Little's law, iterated from none)."""
    running, each = 1.0, workload.rps / replicas
    slower = 1.0 + MARGINS[speed.layout.attention]
    for _ in range(100):
        tpot = slower * speed.tpot_s(max(1.0, running), workload.isl, workload.osl)
        found = min(float(batch), each * (prefill_s + workload.osl * tpot))
        if abs(found - running) < 1e-3 * running:
            break
        running = found
    return running


def _why_not(
    hardware: Hardware, plans: Sequence[tuple[Plan, Recipe]], misses: Sequence[_Miss]
) -> str:
    """One sentence with the limit that is nearest to being met."""
    if misses:
        miss = min(misses, key=lambda one: one.ratio)
        what = miss.what.format(best=show_time(miss.best_s))
        return (
            f"--slo {miss.name}={show_time(miss.wanted_s)} cannot be held on {hardware.name} by "
            f"any number of replicas: {what} with recipe {miss.plan.recipe} on "
            f"{miss.plan.machines.label} ({miss.speed.layout.label}), most of it {miss.limit}; ask "
            f"for {miss.name}={show_time(miss.best_s, up=True)} or more"
        )
    context = plans[0][0].context
    loading = [plan for plan, _ in plans if plan.loads]
    if loading:
        return (
            f"no replica of up to {MAX_REPLICA_NODES * GPUS_PER_NODE} {hardware.name} holds one "
            f"request of {context:,} tokens beside the weights; lower --isl or --osl, or use GPUs "
            "with more memory"
        )
    refusals = plans[0][0].refusals
    reason = f": {refusals[0].sentence()}" if refusals else ""
    return f"no target loads any of these recipes on {hardware.name}{reason}"


def show_time(seconds: float, *, up: bool = False) -> str:
    """`12.3ms`, `1.24s`, as `--slo` reads it; with `up` never less than it is."""
    unit, factor, digits = ("ms", 1e3, 1) if seconds < 1.0 else ("s", 1.0, 2)
    if unit == "ms" and seconds >= 0.1:
        digits = 0
    value = seconds * factor
    value = math.ceil(value * 10**digits) / 10**digits if up else value
    shown = f"{value:.{digits}f}"
    return (shown.rstrip("0").rstrip(".") if digits else shown) + unit

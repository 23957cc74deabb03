"""What each serving engine can load: recipe part x target x version x GPU generation, with the
reason if not.

The planner calls `check` before it reads weights, `build` before it writes any. The facts are rows
of data (`cluster/rows/`, one file for each target); this file looks them up. A part is a kind of
linear, because loaders treat kinds differently. Three rules concern several parts: linears that an
engine fuses must have one scheme, SGLang takes one layout per model, and transformers reads an
artifact by one scheme for the experts and one for the rest.

What to change is worked out for all refusals of a target together, so that following any one of
them leads to a recipe, target or machine that loads.

Not a promise about speed or accuracy, and not about memory (`cluster/plan.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from cluster.hardware import GpuGeneration
from cluster.layouts import (
    fused_refusals,
    join_words,
    mix_refusals,
    uniform_refusals,
)
from cluster.matrix import (
    ELSEWHERE,
    ENGINE_VERSIONS,
    GLOBS,
    KV_CACHE,
    TARGETS,
    Evidence,
    Handed,
    Refusal,
    Row,
    Target,
)
from cluster.rows import embedded, sglang, transformers, trtllm, vllm
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import HEAD, group_of, is_within
from deepseek.recipe import Scheme
from deepseek.trtllm.versions import require_version

#: What becomes of what `build --target` makes.
ROWS: dict[Target, tuple[Row, ...]] = {
    "trtllm": trtllm.ROWS,
    "vllm": vllm.ROWS,
    "sglang": sglang.ROWS,
    "transformers": transformers.ROWS,
    "embedded": embedded.ROWS,
}
#: What becomes of the quantized artifact as it is. The embedded engine reads built engines only.
ARTIFACT_ROWS: dict[Target, tuple[Row, ...]] = {
    "trtllm": trtllm.ARTIFACT_ROWS,
    "vllm": vllm.ARTIFACT_ROWS,
    "sglang": sglang.ARTIFACT_ROWS,
    "transformers": transformers.ARTIFACT_ROWS,
}
#: Targets that `{elsewhere}` may name on GPUs; transformers serves nobody.
_SERVERS: tuple[Target, ...] = ("trtllm", "vllm", "sglang")
_RELATIVE_STRENGTH: tuple[Evidence, ...] = ("inferred", "read", "executed")


@dataclass(frozen=True, slots=True)
class Findings:
    """Refusals, notes on what loads only under a condition, and the rows that were used.

    `evidence` is the weakest of what the answer rests on: of the refusing rows, else of the rows
    about linears (KV formats have cells of their own)."""

    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    evidence: Evidence


def check(
    schemes: Mapping[str, Scheme],
    kv_cache: str,
    target: str,
    gpu: GpuGeneration,
    version: str | None = None,
) -> list[Refusal]:
    """What `target` cannot load on this GPU generation; an empty list means that it loads all.

    `schemes` maps module names of the served layers to resolved schemes (no `source`). Use
    `served_schemes` to leave out the MTP layer. `version` is the target's, without it the first
    that the matrix knows.

    Raises:
        DeployError: the target or its version is unknown.
    """
    return list(examine(schemes, kv_cache, target, gpu, version).refusals)


def examine(
    schemes: Mapping[str, Scheme],
    kv_cache: str,
    target: str,
    gpu: GpuGeneration,
    version: str | None = None,
    *,
    handed: Handed = "engine",
) -> Findings:
    """Like `check`, with notes on the conditions under which the rest loads. `handed` says whether
    the target gets what `build` makes for it, or the artifact as it is."""
    known = require_target(target)
    wanted = require_engine_version(known, version)
    used = cells_of(schemes, kv_cache)
    by_row: dict[Row, list[tuple[str, str]]] = {}
    for part, form in used:
        row = find_row(known, gpu, part, form, wanted, handed=handed)
        by_row.setdefault(row, []).append((part, form))
    rows = tuple(by_row)
    refused = [row for row in rows if not row.loads]
    parts = {part for part, _ in used}
    refusals = []
    if refused:
        change = _Change(schemes, kv_cache, known, gpu, by_row)
        # Rows that give one reason, and differ in what to use instead, are one refusal.
        same: dict[tuple[str, str], list[Row]] = {}
        for row in refused:
            same.setdefault((row.text, row.change), []).append(row)
        refusals = [
            _refusal(alike, [cell for row in alike for cell in by_row[row]], parts, change)
            for alike in same.values()
        ]
    stopped = any(_stops_everything(row) for row in rows)
    if known not in ("transformers", "embedded") and not stopped:
        refusals += fused_refusals(schemes, known)
    if not refused:
        refusals += mix_refusals(used, known, gpu, handed)
        refusals += uniform_refusals(used, known, handed)
    return Findings(
        tuple(refusals),
        tuple(f"{known}: {row.text}" for row in rows if row.loads and row.text),
        rows,
        _weakest(refused or [row for row in rows if KV_CACHE not in row.parts] or rows),
    )


def cells_of(schemes: Mapping[str, Scheme], kv_cache: str) -> list[tuple[str, str]]:
    """The (part, format) pairs of a model, sorted, the KV cache's last."""
    # A recipe has a few schemes and a model 46,000 modules, which are asked about many times.
    found = {(part_of(module), id(scheme)): scheme for module, scheme in schemes.items()}
    used = {(part, scheme.label) for (part, _), scheme in found.items()}
    return [*sorted(used), (KV_CACHE, kv_cache)]


def served_schemes(
    config: ModelConfig, schemes: Mapping[str, Scheme], *, mtp: bool = False
) -> dict[str, Scheme]:
    """The schemes of the layers that an engine loads: without the MTP layer's unless `mtp`."""
    if mtp:
        return dict(schemes)
    return {m: s for m, s in schemes.items() if is_within(m, config.num_hidden_layers)}


def require_target(name: str) -> Target:
    """The target by name.

    Raises:
        DeployError: no such target.
    """
    for target in TARGETS:
        if target == name:
            return target
    raise DeployError(f"target {name!r} is unknown; use one of {', '.join(TARGETS)}")


def require_engine_version(target: Target, name: str | None) -> str:
    """The target's version by name, without one the first that the matrix knows.

    Raises:
        DeployError: the matrix knows nothing of that version.
    """
    versions = ENGINE_VERSIONS[target]
    if name is None or name in versions:
        return versions[0] if name is None else name
    if target == "trtllm":
        return require_version(name)  # says what is wrong with it
    if versions == ("",):
        raise DeployError(f"--engine-version means nothing to target {target}; leave it out")
    raise DeployError(
        f"{target} {name!r} is not known to us; use --engine-version {' or '.join(versions)}"
    )


@lru_cache(maxsize=1 << 17)
def part_of(module: str) -> str:
    """Which part of a recipe a linear belongs to: `routed_experts`, `kv_b_proj`, ..., `lm_head`."""
    if module == HEAD:
        return module
    group = group_of(module)
    return module.rpartition(".")[2] if group == "attention" else group


def find_row(
    target: Target,
    gpu: GpuGeneration,
    part: str,
    form: str,
    version: str | None = None,
    *,
    handed: Handed = "engine",
) -> Row:
    """The first row about this cell. A test checks that every cell has one."""
    wanted = ENGINE_VERSIONS[target][0] if version is None else version
    for row in (ROWS if handed == "engine" else ARTIFACT_ROWS)[target]:
        if gpu in row.gpus and part in row.parts and form in row.formats and row.is_about(wanted):
            return row
    raise AssertionError(f"no row about {target} {wanted} {gpu} {part} {form}")


def loader_refusals(
    used: Iterable[tuple[str, str]], target: Target, version: str, handed: Handed
) -> list[str]:
    """Why the target's loader refuses linears of these parts and formats, whatever its kernels
    take; an empty list means that it loads them. For Hopper, whose loader is everybody's."""
    linears = list(used)
    rows = [find_row(target, "sm90", p, form, version, handed=handed) for p, form in linears]
    found = [row.text for row in rows if not row.loads and row.stops == "loader"]
    found += [r.reason for r in mix_refusals(linears, target, "sm90", handed)]
    found += [r.reason for r in uniform_refusals(linears, target, handed)]
    return found


def _weakest(rows: Iterable[Row]) -> Evidence:
    return min((row.evidence for row in rows), key=_RELATIVE_STRENGTH.index)


def _stops_everything(row: Row) -> bool:
    """Whether the target does not run on that hardware at all, so that details do not matter."""
    return not row.loads and KV_CACHE in row.parts and len(row.parts) > 1


class _Change:
    """What to change so that nothing is refused any more, for all refused rows together."""

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        kv_cache: str,
        target: Target,
        gpu: GpuGeneration,
        by_row: Mapping[Row, list[tuple[str, str]]],
    ) -> None:
        self.schemes, self.kv_cache, self.target, self.gpu = schemes, kv_cache, target, gpu
        refused = [row for row in by_row if not row.loads]
        self.must_move = any(row.change == ELSEWHERE for row in refused)
        instead = {
            part: row.instead
            for row in refused
            if "{rules}" in row.change
            for part, _ in by_row[row]
        }
        model = {part for cells in by_row.values() for part, _ in cells if part in GLOBS}
        self.rules = join_words(_rules(instead, model))
        # A row with other words, such as another KV format, is to be followed beside the rules.
        self.rule_words = next((row.change for row in refused if "{rules}" in row.change), "")
        self.others = list(dict.fromkeys(r.change for r in refused if "{rules}" not in r.change))

    def words(self, row: Row) -> str:
        """The change of one row, and what the other rows ask for beside it."""
        if self.must_move:
            return ELSEWHERE.format(elsewhere=self._elsewhere())
        own = row.change.format(rules=self.rules)
        template = self.rule_words if "{rules}" not in row.change else ""
        more = [template.format(rules=self.rules)] if template else []
        more += [other for other in self.others if other != row.change]
        return "; ".join([own, *(f"{words[0].lower()}{words[1:]}" for words in more)])

    def _elsewhere(self) -> str:
        """Where the same recipe loads as it is: another server on these GPUs, this target on
        another generation, else the embedded engine, which takes every recipe."""
        servers = [t for t in _SERVERS if t != self.target and self._loads(t, self.gpu)]
        ways = [f"--target {join_words(servers, 'or')}"] if servers else []
        if self.target in _SERVERS and self.gpu != "sm90" and self._loads(self.target, "sm90"):
            ways.append("Hopper GPUs")
        if self.target == "embedded":
            ways.append("--hardware cpu")
        elif not ways or self.gpu == "cpu":
            ways.append("--target embedded" + " with --hardware cpu" * (self.gpu != "cpu"))
        return join_words(ways, "or")

    def _loads(self, target: Target, gpu: GpuGeneration) -> bool:
        version = ENGINE_VERSIONS[target][0]
        used = cells_of(self.schemes, self.kv_cache)
        return (
            all(find_row(target, gpu, part, form, version).loads for part, form in used)
            and (target == "embedded" or not any(fused_refusals(self.schemes, target)))
            and not any(mix_refusals(used, target, gpu, "engine"))
        )


def _rules(instead: Mapping[str, str], model: set[str]) -> list[str]:
    """Recipe rules that give parts other formats; one for all but the routed experts where all
    parts of the model get other ones."""
    head = {GLOBS[HEAD]: instead[HEAD]} if HEAD in instead else {}
    instead = {part: weights for part, weights in instead.items() if part != HEAD}
    model = model - {HEAD}  # which no star matches
    globs = {GLOBS[part]: weights for part, weights in instead.items()}
    rest = {weights for part, weights in instead.items() if part != "routed_experts"}
    if instead.keys() == model and len(rest) == 1 and "routed_experts" in model:
        experts = GLOBS["routed_experts"]
        globs = {"*": rest.pop(), experts: globs[experts]}
    return [f'{{match: "{glob}", {weights}}}' for glob, weights in (globs | head).items()]


def _refusal(
    rows: list[Row], cells: list[tuple[str, str]], all_parts: set[str], change: _Change
) -> Refusal:
    """The refusal of rows with one reason; `all_parts` are the parts that the model has."""
    row = rows[0]
    if _stops_everything(row):
        part = "anything on this hardware"
    else:
        parts = {part for part, _ in cells}
        which = "every linear" if parts == all_parts - {KV_CACHE} else join_words(sorted(parts))
        part = f"{which} as {join_words(sorted({form for _, form in cells}))}"
    return Refusal(row.target, part, row.text, change.words(row), _weakest(rows))

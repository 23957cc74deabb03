"""What each serving engine can load: recipe part x target x GPU generation, with the reason if not.

The planner calls `check` before it reads weights, `build` before it writes any. The facts are rows
of data (`cluster/matrix.py`); this file looks them up. A part is a kind of linear, because loaders
treat kinds differently. Two rules concern several parts: linears that an engine fuses must have one
scheme, and SGLang takes one layout per model.

Not a promise about speed or accuracy, and not about memory (`cluster/plan.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cluster.hardware import GpuGeneration
from cluster.matrix import GLOBS, KV_CACHE, MIXES, ROWS, TARGETS, Row, Target
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import FUSED, Group, group_of
from deepseek.recipe import Scheme


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that the target cannot load. `part` says which linears and in which format,
    `reason` why, `change` what would make it load; `evidence` as in `Row`."""

    target: Target
    part: str
    reason: str
    change: str
    evidence: str

    def sentence(self) -> str:
        doubt = f" ({self.evidence})" if self.evidence in ("inferred", "unverified") else ""
        return f"{self.target} cannot load {self.part}: {self.reason}{doubt}. {self.change}."


@dataclass(frozen=True, slots=True)
class Findings:
    """Refusals, and notes on what loads only under a condition."""

    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]


def check(
    schemes: Mapping[str, Scheme], kv_cache: str, target: str, gpu: GpuGeneration
) -> list[Refusal]:
    """What `target` cannot load on this GPU generation; an empty list means that it loads all.

    `schemes` maps module names of the served layers to resolved schemes (no `source`). Use
    `served_schemes` to leave out the MTP layer.

    Raises:
        DeployError: the target is unknown.
    """
    return list(examine(schemes, kv_cache, target, gpu).refusals)


def examine(
    schemes: Mapping[str, Scheme], kv_cache: str, target: str, gpu: GpuGeneration
) -> Findings:
    """Like `check`, with notes on the conditions under which the rest loads."""
    known = require_target(target)
    used = {(part_of(module), scheme.label) for module, scheme in schemes.items()}
    by_row: dict[Row, list[tuple[str, str]]] = {}
    for part, form in sorted(used) + [(KV_CACHE, kv_cache)]:
        by_row.setdefault(find_row(known, gpu, part, form), []).append((part, form))
    parts = {part for part, _ in used}
    refusals = [_refusal(row, cells, parts) for row, cells in by_row.items() if not row.loads]
    notes = [row.text for row in by_row if row.loads and row.text]
    if gpu != "cpu" and not any(_stops_everything(row) for row in by_row):
        refusals += _fused_refusals(schemes, known)
        refusals += _mix_refusals(used, known, gpu)
    return Findings(tuple(refusals), tuple(f"{known}: {note}" for note in notes))


def served_schemes(
    config: ModelConfig, schemes: Mapping[str, Scheme], *, mtp: bool = False
) -> dict[str, Scheme]:
    """The schemes of the layers that an engine loads: without the MTP layer's unless `mtp`."""
    if mtp:
        return dict(schemes)
    return {m: s for m, s in schemes.items() if _split(m)[0] < config.num_hidden_layers}


def require_target(name: str) -> Target:
    """The target by name.

    Raises:
        DeployError: no such target.
    """
    for target in TARGETS:
        if target == name:
            return target
    raise DeployError(f"target {name!r} is unknown; use one of {', '.join(TARGETS)}")


def part_of(module: str) -> str:
    """Which part of a recipe a linear belongs to: `routed_experts`, `kv_b_proj`, ..."""
    group = group_of(module)
    return module.rpartition(".")[2] if group == "attention" else group


def find_row(target: Target, gpu: GpuGeneration, part: str, form: str) -> Row:
    """The first row about this cell. A test checks that every cell has one."""
    for row in ROWS:
        if row.target == target and gpu in row.gpus and part in row.parts and form in row.formats:
            return row
    raise AssertionError(f"no row about {target} {gpu} {part} {form}")


def _split(module: str) -> tuple[int, str]:
    """(layer, rest of the name); 46,000 times per question, hence no regular expression."""
    model, layers, layer, rest = module.split(".", 3)
    assert (model, layers) == ("model", "layers"), f"{module} is no linear of a decoder layer"
    return int(layer), rest


def _stops_everything(row: Row) -> bool:
    """Whether the target does not run on that hardware at all, so that details do not matter."""
    return not row.loads and KV_CACHE in row.parts and len(row.parts) > 1


def _refusal(row: Row, cells: list[tuple[str, str]], all_parts: set[str]) -> Refusal:
    """The refusal of one row; `all_parts` are the parts that the model has."""
    if _stops_everything(row):
        part = "anything on this hardware"
    else:
        parts = {part for part, _ in cells}
        which = "every linear" if parts == all_parts else _and(sorted(parts))
        part = f"{which} as {_and(sorted({form for _, form in cells}))}"
    globs = [GLOBS[part] for part, _ in cells if part in GLOBS]
    rules = _and(f'{{match: "{glob}", {row.instead}}}' for glob in dict.fromkeys(globs))
    return Refusal(row.target, part, row.text, row.change.format(rules=rules), row.evidence)


def _fused_refusals(schemes: Mapping[str, Scheme], target: Target) -> Iterator[Refusal]:
    """Linears that the engine stores as one tensor must have one scheme."""
    units: dict[tuple[int, str], set[str]] = {}
    for module, scheme in schemes.items():
        layer, rest = _split(module)
        if unit := _fused_unit(group_of(module), rest):
            units.setdefault((layer, unit), set()).add(scheme.label)
    wrong: dict[str, list[int]] = {}
    for (layer, unit), labels in units.items():
        if len(labels) > 1:
            wrong.setdefault(unit, []).append(layer)
    for unit, layers in wrong.items():
        yield Refusal(
            target,
            f"{unit} of layer {layers[0]}" + (f" and {len(layers) - 1} more" * (len(layers) > 1)),
            "it fuses them into one tensor, which has one format",
            "Give them the same format in the recipe",
            "read",
        )


def _fused_unit(group: Group, rest: str) -> str | None:
    if group == "routed_experts":
        return "all routed experts"
    parent, _, role = rest.rpartition(".")
    for roles in FUSED.values():
        if role in roles:
            unit = " with ".join(roles)
            return unit if group == "attention" else f"{parent}: {unit}"
    return None


def _mix_refusals(
    used: set[tuple[str, str]], target: Target, gpu: GpuGeneration
) -> Iterator[Refusal]:
    """A refusal if the target cannot combine the formats of this model (BF16 goes with any)."""
    quantized = {(part, form) for part, form in used if form != "bf16"}
    mixes = [mix for mix in MIXES if mix.target == target]
    if not mixes or not quantized:
        return
    if any(gpu in mix.gpus and quantized <= mix.cells for mix in mixes):
        return
    yield Refusal(
        target,
        f"{_and(sorted({form for _, form in quantized}))} in one model",
        "it takes one layout for the whole model: "
        + _and((mix.name for mix in mixes if gpu in mix.gpus), "or"),
        "Make the recipe one of these, or use --target vllm",
        "read",
    )


def _and(words: Iterable[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; repeated words once."""
    unique = list(dict.fromkeys(words))
    if len(unique) < 2:
        return "".join(unique)
    return f"{', '.join(unique[:-1])} {last} {unique[-1]}"

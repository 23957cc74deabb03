"""docs/deployability.md, from the matrix and the records of the interop tests alone."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.built_bytes import built_bytes_section
from cluster.choice import tally_of
from cluster.deployability import (
    ARTIFACT_ROWS,
    ROWS,
    Findings,
    examine,
    served_schemes,
)
from cluster.hardware import GpuGeneration
from cluster.interop_records import Outcome, Record, read_records
from cluster.matrix import (
    ANY,
    DENSE,
    ENGINE_VERSIONS,
    EVERYTHING,
    FORMATS,
    GENERIC,
    HEAD,
    HEAD_FORMATS,
    INT4,
    INT4_A8,
    INT4_ASYM,
    INT4_ASYM_A8,
    INT4_OTHER,
    INT8_ASYM,
    INT8_BLOCK,
    KV_CACHE,
    PACKED,
    PARTS,
    ROUTED,
    TARGETS,
    V3_PARTS,
    W4A8,
    W4A8_G128,
    W4A8_INT8,
    W8A8,
    W8A16,
    Handed,
    Kernels,
    Row,
    Target,
)
from cluster.server_bytes import server_bytes_section
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import builtin_recipes, load_recipe

#: The six combinations first, then the other built-in recipes. Those that differ from one of these
#: only in the algorithm (`int4-gptq`, ...) take the same bytes and load in the same places.
_ORDER = (
    *("int8", "int8-weight-only", "int4", "int4-all", "int4-asym", "int8-smoothquant"),
    *("int8-asym", "w4a8", "int8-experts", "int8-block", "int4-a8", "int8-head"),
)
RECIPES = tuple(name for name in _ORDER if name in builtin_recipes())
#: Shorter names for sets of parts and formats.
_ALL = {
    PARTS: "every linear",
    V3_PARTS: "every linear but q_proj",
    DENSE: "every linear but routed_experts, q_proj",
    PARTS - ROUTED: "every linear but routed_experts",
    PARTS | HEAD: "every linear, lm_head",
    EVERYTHING: "everything",
    GENERIC: "the other linears",
    FORMATS: "any",
    ANY: "any",
    INT4: "int4",
    INT4_ASYM: "int4-asym",
    W4A8: "int4-afp8",
    W4A8 - W4A8_G128: "int4-afp8 but g128",
    INT4_OTHER | INT4_ASYM: "int4 but g128, int4-asym",
    W8A16 | INT4: "int8, int4",
    W8A8 | W8A16 | INT4: "int8-a8, int8, int4",
    W4A8_INT8: "int4-a8, int4-asym-a8",
    INT4_A8: "int4-a8",
    INT4_ASYM_A8: "int4-asym-a8",
    HEAD_FORMATS: "int8-a8, int8, int4, int4-a8",
    W8A8 | INT4: "int8-a8, int4",
    PACKED | W4A8: "int8, int8-asym, int4, int4-asym, int4-afp8",
    W4A8 | W8A8 | INT8_BLOCK: "int4-afp8, int8-a8, int8-block-a8",
    W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8: "int8, int8-asym, int4, int4-asym, int4-afp8",
}
#: Most characters of a tool's own words in a cell.
_SHOWN = 160
_KERNEL_STRENGTH: tuple[Kernels, ...] = ("inferred", "read", "")
#: Tools in the order of the columns of what ran.
_TOOLS: tuple[Target, ...] = ("vllm", "transformers", "sglang")


def deployability_page() -> list[str]:
    """Lines of Markdown, without the notice."""
    return [
        "# What loads where",
        "",
        "The one place that README, plan and build speak from: data of `cluster/rows/`, a file for "
        "each target, looked up by part, format, version and GPU generation. Every cell says what "
        "it rests on:",
        "",
        "- *executed*: the tool's own config code, choice of schemes, loader and model code ran on "
        "an artifact of ours, in the version named, on a CPU, with GPU kernels replaced; the test "
        "is in the last column of the tables below, its figures in "
        "[what ran](#what-ran-in-the-tools-themselves).",
        "- *read*: in the source of that version, or in the documentation inside it.",
        "- *inferred*: follows from what was read; nobody wrote or ran it.",
        "",
        "*kernels* is what is known of the GPU kernels beside the loader. It is never more than "
        "read: no GPU has run anything of ours under these engines. A default test compares the "
        "cells with the records of the interop tests.",
        "",
        "## What `build --target` makes of the built-in recipes for DeepSeek-V3",
        "",
        *_recipe_table(TARGETS, "engine"),
        "",
        "`int4-gptq` and `int4-awq` load as `int4` does, `int4-all-gptq` and `int4-all-awq` as "
        "`int4-all`, `int4-a8-gptq` as `int4-a8`: an algorithm changes values, not the layout. "
        "transformers dequantizes "
        "everything, and what is built for it holds the values in a form that it reads: for "
        "looking and comparing, not for serving, so that the planner's `auto` does not choose it. "
        "What `build` refuses ran as the artifact, where that says why.",
        "",
        "## What loads the artifact as it is",
        "",
        "The directory that `quantize` writes (compressed-tensors), without a `build`. vLLM reads "
        "it as it reads what is built for it, but rounds the scales itself; the embedded engine "
        "reads built engines only.",
        "",
        *_recipe_table(tuple(ARTIFACT_ROWS), "artifact"),
        "",
        *_ran_section(read_records()),
        *built_bytes_section(),
        *server_bytes_section(),
        *_row_sections(),
    ]


def _recipe_table(targets: tuple[Target, ...], handed: Handed) -> Iterator[str]:
    yield f"| recipe | {' | '.join(f'{t} ({_where(t)})' for t in targets)} |"
    yield f"|---|{'---|' * len(targets)}"
    for name in RECIPES:
        recipe = load_recipe(name)
        schemes = served_schemes(DEEPSEEK_V3, tally_of(DEEPSEEK_V3, recipe).schemes)
        cells = []
        for target in targets:
            gpu: GpuGeneration = "cpu" if target == "embedded" else "sm90"
            by_words: dict[str, list[str]] = {}
            for version in ENGINE_VERSIONS[target]:
                found = examine(schemes, recipe.kv_cache, target, gpu, version, handed=handed)
                by_words.setdefault(_answer(found), []).append(version)
            cells.append("; ".join(_cell(words, *names) for words, names in by_words.items()))
        yield f"| `{name}` | {' | '.join(cells)} |"


def _answer(found: Findings) -> str:
    """The words of a cell, with a place for the versions."""
    if found.refusals:
        refusal = found.refusals[0]
        return f"no: {refusal.reason} ({refusal.evidence}@)"
    linears = [row for row in found.rows if KV_CACHE not in row.parts]
    kernels = min((row.kernels for row in linears), key=_KERNEL_STRENGTH.index)
    return f"loads ({found.evidence}@{f'; kernels {kernels}' * bool(kernels)})"


def _cell(words: str, *versions: str) -> str:
    named = " and ".join(version for version in versions if version)
    return words.replace("@", f", {named}" if named else "")


def _where(target: Target) -> str:
    if target == "transformers":
        return "Hopper or CPU"
    return "CPU" if target == "embedded" else "Hopper"


def _ran_section(records: list[Record]) -> Iterator[str]:
    """What the interop tests recorded."""
    yield "## What ran in the tools themselves"
    yield ""
    yield (
        "Outcomes of `make interop` on the tiny model, as recorded in `tests/interop/records`: "
        "median and mean KL in nats per token from the embedded engine to the tool on held-out "
        "text, and how many greedy continuations of 32 tokens are the same. A dash: nothing was "
        "computed there, only loaded."
    )
    yield ""
    order = {tool: number for number, tool in enumerate(_TOOLS)}
    records = sorted(records, key=lambda record: (order[record.tool], record.name))
    heads = [
        f"{record.tool} {record.version}" + ", the artifact" * record.name.endswith("-artifact")
        for record in records
    ]
    yield f"| recipe | {' | '.join(heads)} |"
    yield f"|---|{'---|' * len(heads)}"
    for name in dict.fromkeys(name for record in records for name in record.recipes):
        outcomes = (record.recipes.get(name) for record in records)
        yield f"| `{name}` | {' | '.join(_outcome(outcome) for outcome in outcomes)} |"
    yield ""
    for record in records:
        yield (
            f"- `{record.name}.json`: `{record.package}`, `{record.test}`, artifacts of form "
            f"{record.artifact_form}"
        )
    yield ""


def _outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    prefix = "built: " if outcome.input == "engine" else ""
    if outcome.loaded is False:
        return f"{prefix}refuses: {_short(outcome.refusal or '')}"
    if outcome.loaded is None:
        return f"{prefix}schemes only"
    words = ["loads"]
    if outcome.unread:
        words.append(f"{len(outcome.unread)} tensors unread")
    if outcome.kl_median is not None:
        mean = f" (mean {outcome.kl_mean:.1e})" if outcome.kl_mean is not None else ""
        words.append(f"KL {outcome.kl_median:.1e}{mean}")
    if outcome.greedy_equal is not None:
        words.append(f"greedy {outcome.greedy_equal}/{outcome.greedy_of}")
    return prefix + ", ".join([*words, *["-"] * (len(words) == 1)])


def _short(words: str) -> str:
    """The first words of what a tool says, for a cell."""
    words = " ".join(words.replace("|", "/").split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN].rsplit(' ', 1)[0]} ..."


def _row_sections() -> Iterator[str]:
    for target in TARGETS:
        versions = " and ".join(version for version in ENGINE_VERSIONS[target] if version)
        yield from (f"## {target} {versions}".rstrip(), "")
        artifact = ARTIFACT_ROWS.get(target, ())
        same = artifact is ROWS[target]
        yield from _rows(ROWS[target])
        if same:
            yield "The artifact as it is: the same rows."
            yield ""
        elif artifact:
            yield "The artifact as it is:"
            yield ""
            yield from _rows(artifact)


def _rows(rows: tuple[Row, ...]) -> Iterator[str]:
    yield (
        "| GPUs | part | format | loads | why, or under which condition | evidence | kernels | "
        "source, and the test that executed it |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    yield from map(_row, rows)
    yield ""


def _row(row: Row) -> str:
    loads = "yes" if row.loads else "no" if row.stops == "loader" else "no: kernels only"
    text = row.text + (f"; {row.change[0].lower()}{row.change[1:]}" if row.change else "")
    if row.versions:
        text = f"{' and '.join(row.versions)}: {text}"
    cells = [
        _list(row.gpus),
        _ALL.get(row.parts) or _list(row.parts),
        _ALL.get(row.formats) or _list(row.formats),
        loads,
        text,
        row.evidence,
        row.kernels,
        row.source + (f"; `{row.test}`" if row.test else ""),
    ]
    rules = f"`{{match: ..., {row.instead}}}` for the part"
    filled = f"| {' | '.join(cells)} |".replace("{rules}", rules)
    return filled.replace("{elsewhere}", "another target or other GPUs, whichever loads it")


def _list(words: frozenset[str]) -> str:
    return ", ".join(sorted(words))

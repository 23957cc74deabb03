"""docs/quantize-671b.md: the paper model of quantizing the whole DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from cluster.estimate import LEVERS, Estimate, gb, make_estimate, minutes, with_levers
from cluster.job_model import PHASES, bytes_read, bytes_written, peak_bytes
from cluster.job_rates import GPU, inputs
from cluster.job_work import pieces
from deepseek.config import DEEPSEEK_V3
from deepseek.recipe import load_recipe

_RECIPES = (
    *("int4", "int8-smoothquant", "int4-awq", "int4-gptq"),
    *("int4-all", "int4-all-awq", "int4-all-gptq"),
)
_NODES = (1, 2, 4)
#: GPTQ, 4 bits, groups of 128, R1-671B, 512 x 4096 tokens, 8 x H100 [IST-DASLab/MoE-Quant].
_MOE_QUANT_S = 2 * 3600.0

_BUILT = (
    "**What is built.** The schedule (`quant_jobs/layer_run.py`), the sharing of reading, solving "
    "and packing, the exchange through Ray's object store (what an expert makes of a token goes to "
    "its node only), waves, writing beside the next layer: built, and tested on CPU workers over "
    "several raylets. `quantize --device cuda` gives each worker a GPU, which dequantizes its "
    "weights and solves them. **What is not:** no GPU has run that yet (tests hold it against a "
    "stand-in that knows where each tensor is), and none of the changes below is made. So these "
    "times are of the present schedule on hardware that it has not seen."
)


def quantize_page(notice: str) -> str:
    """The page. `notice` is its first line."""
    made = {
        (name, nodes): make_estimate(DEEPSEEK_V3, load_recipe(name), nodes)
        for name in _RECIPES
        for nodes in _NODES
    }
    gptq = made["int4-gptq", 1]
    measured = pieces()
    lines = [
        notice,
        "# Quantizing 671B: time and memory, on paper",
        "",
        f"`python -m cluster estimate --recipe RECIPE --nodes N` on nodes of 8 {GPU.name}, "
        f"{gptq.job.num_blocks} x {gptq.job.block_tokens} calibration tokens, storage "
        f"{gptq.storage / 1e9:g} GB/s a node. *Floor*: no job of this schedule is faster on "
        "hardware of these peaks. *Expected*: with the fractions and overheads of the table of "
        "inputs. GB are 1e9 bytes.",
        "",
        _BUILT,
        "",
        "## Time and memory",
        "",
        "| recipe | nodes | floor min | expected min | most of it | GPU GB | host GB "
        "| of it object store | fits |",
        "|---|---:|---:|---:|---|---:|---:|---:|---|",
        *(_row(estimate) for estimate in made.values()),
        "",
        _against_moe_quant(gptq),
        "",
        "More nodes help less than they could as long as the exchange is the limit: a token's "
        "experts are on most nodes, so every node gets what enters the MLP of all tokens. The list "
        "of changes below says what would help.",
        "",
        "## Where the time goes: `int4-gptq`",
        "",
        f"| minutes | {' | '.join(f'{n} nodes floor | expected' for n in _NODES)} |",
        f"|---|{'---:|' * (2 * len(_NODES))}",
        *(_phase_row(name, [made["int4-gptq", n] for n in _NODES]) for name in PHASES),
        "",
        "Reading, boundaries and writing go on beside the rest. "
        f"{gb(bytes_read(gptq.job))} GB are read, each byte once whatever the number of nodes; "
        f"{gb(bytes_written(gptq.job)[0])} GB of artifact and {gb(bytes_written(gptq.job)[1])} GB "
        "of boundaries, from which a killed job resumes, are written.",
        "",
        "## What would make it faster",
        "",
        "`int4-gptq`, expected minutes, each change on top of those above it.",
        "",
        f"| change | {' | '.join(f'{n} nodes' for n in _NODES)} |",
        f"|---|{'---:|' * len(_NODES)}",
        *_lever_rows([made["int4-gptq", n] for n in _NODES]),
        "",
        "## Inputs",
        "",
        f"Measured: {measured['machine']}. Work per weight (kernels, bytes, FLOP) was counted from "
        "the operators that the solvers dispatch; shapes and bytes follow from the model.",
        "",
        "| input | value | unit | kind | where from |",
        "|---|---:|---|---|---|",
        *(
            f"| {one.name} | {one.value:.4g} | {one.unit} | {one.source} | {one.where} |"
            for one in inputs().values()
        ),
        "",
        "## Held against a run",
        "",
        *_held_against(measured.get("checks")),
        "",
    ]
    return "\n".join(lines)


def _held_against(checks: dict[str, Any] | None) -> list[str]:
    """What `bench/job_model.py --save` found; of runs on a CPU."""
    told = (
        "`python bench/job_model.py` runs jobs on one CPU worker and predicts them with the rates "
        "of `bench/pieces.py` on the same machine, in CPU seconds."
    )
    if checks is None:
        return [f"{told} It has not been run since the pieces were measured."]
    lines = [
        f"{told} {checks['shape']}. This tests what is counted and the schedule's work; not the "
        "overlap, Ray, the network, or anything of a GPU.",
        "",
        "| recipe, seconds predicted / measured | read | attend | solve | carry | write | together "
        "| bytes read |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    ratios = []
    for one in checks["runs"]:
        both = [one[kind] for kind in ("predicted", "measured")]
        pairs = list(zip(*(one_kind.values() for one_kind in both), strict=True))
        pairs.append((sum(both[0].values()), sum(both[1].values())))
        ratios.append(pairs[-1][0] / pairs[-1][1])
        cells = " | ".join(f"{p:.1f} / {m:.1f}" for p, m in pairs)
        equal = one["bytes_read"] == one["predicted_bytes_read"]
        read = f"{one['bytes_read']:,}, {'as predicted' if equal else 'NOT as predicted'}"
        lines.append(f"| `{one['recipe']}` | {cells} | {read} |")
    return [
        *lines,
        "",
        f"Predicted over measured, all steps together: {min(ratios):.2f} to {max(ratios):.2f}.",
    ]


def _row(estimate: Estimate) -> str:
    host, store, gpu = peak_bytes(estimate.uses)
    job, expected = estimate.job, estimate.expected
    cells = [
        f"`{job.recipe.name}`", str(job.nodes), minutes(estimate.floor.total),
        minutes(expected.total), expected.limit, gb(gpu), gb(host + store), gb(store),
        "yes" if estimate.fits else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _against_moe_quant(gptq: Estimate) -> str:
    ratio = gptq.expected.total / _MOE_QUANT_S
    best = with_levers(gptq, len(LEVERS)).total / _MOE_QUANT_S
    return (
        "MoE-Quant reports 120 minutes for GPTQ of the experts, groups of 128, on as many tokens "
        f"and 8 x H100, all experts resident: `int4-gptq` on one node is expected at {ratio:.2f}x "
        f"that, {best:.2f}x with all changes below, and does not need the model to fit in memory."
    )


def _phase_row(name: str, estimates: list[Estimate]) -> str:
    cells = [minutes(time.phase(name)) for one in estimates for time in (one.floor, one.expected)]
    return f"| {name} | {' | '.join(cells)} |"


def _lever_rows(estimates: list[Estimate]) -> list[str]:
    rows = [f"| as it is | {' | '.join(minutes(one.expected.total) for one in estimates)} |"]
    for number, (name, _) in enumerate(LEVERS, 1):
        times = [minutes(with_levers(one, number).total) for one in estimates]
        rows.append(f"| {name} | {' | '.join(times)} |")
    return rows

"""docs/roofline.md, from the published figures, the fit and the planner alone."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.fit import (
    EARLY_LAYER_S,
    SINCE,
    Row,
    rows,
    spread,
)
from cluster.hardware import GPUS
from cluster.published import Figure
from cluster.roofline import FITTED, LINK
from cluster.slo import MARGINS, PERCENTILE
from cluster.uncompared import NOT_COMPARED

_UNITS = {"tpot": "ms a token", "ttft": "ms", "output": "tokens/s", "prefill": "prompt tokens/s"}


def roofline_page() -> Iterator[str]:
    """Lines of Markdown."""
    found = rows()
    yield "# How fast a replica is: the roofline, and its errors"
    yield ""
    yield (
        "`python -m cluster plan --slo` rests on `cluster/roofline.py`, which predicts a replica's "
        "speed from bytes and operations. Nothing of ours ran on these GPUs: its constants are "
        "fitted on figures that others published, and this page shows how far off it is. "
        "`python -m cluster.fit` fits again."
    )
    yield ""
    yield from _model()
    yield from _constants()
    yield from _errors(found)
    yield from _hardware()
    yield from _slo()


def _model() -> Iterator[str]:
    yield "## What is counted"
    yield ""
    yield (
        "A pass is a decoding step (one token of each of B sequences) or a chunk of a prompt. Its "
        "time on the busiest GPU is a sum: dense linears, routed experts and attention, each the "
        "longer of its bytes over the memory's bandwidth and its operations over the tensor cores' "
        "peak in the number format that multiplies it; the activations between kernels; what "
        "crosses NVLink and the network, with no overlap; and a fixed cost of every layer."
    )
    yield ""
    yield from (
        "- Weights: stored bytes, as `docs/plans.md` counts them, and of routed experts only those "
        "that a pass touches: E (1 - (1 - k/E)^B) of a layer's E if each token takes k evenly. The "
        "busiest of n groups of GPUs has sqrt(2 ln n) standard deviations more than the mean.",
        "- KV cache: bytes of the format on the target, of every sequence on every GPU when "
        "attention is split by heads (TP), of its own sequences when it is split by requests (DP).",
        "- Operations: two for each weight and token; attention on latents in steps, on expanded "
        "keys and values in chunks, in BF16. Weight-only formats multiply in BF16.",
        "- Links: two all-reduces a layer (TP), or the tokens' way to their experts and back in "
        "FP8 and BF16 (DP).",
        "- Chunks of prompts are computed between steps, so that a request's time per token is a "
        "step and isl/osl prompt tokens for every other running request.",
    )
    yield ""


def _constants() -> Iterator[str]:
    used = FITTED
    yield "## Constants"
    yield ""
    yield "| constant | value | from |"
    yield "|---|---:|---|"
    yield f"| share of HBM bandwidth | {used.memory:.3f} | fitted |"
    yield f"| share of peak operations, decoding | {used.decode:.3f} | fitted |"
    yield (
        f"| share of peak operations, prefill | {used.prefill:.2f} | fitted, at its bound: "
        "[DeepGEMM](https://github.com/deepseek-ai/DeepGEMM) reaches 1550 of an H800's 1979 "
        "TFLOP/s; the figures tell it poorly from the activations |"
    )
    yield (
        f"| activations a token and layer | {used.activation_bytes / 1e6:.1f} MB | fitted; all "
        "that kernels write and read besides weights and KV |"
    )
    yield (
        f"| share of NVLink and network | {LINK:g} | not fitted: "
        "[DeepEP](https://github.com/deepseek-ai/DeepEP) reaches 726 of 900 GB/s |"
    )
    yield f"| fixed cost of a layer | {used.layer_s * 1e6:.1f} us | fitted on those since {SINCE} |"
    yield (
        f"| the same, earlier software | {EARLY_LAYER_S * 1e6:.0f} us | fitted on earlier figures; "
        "plans do not use it |"
    )
    yield f"| a collective between nodes | {used.hop_s * 1e6:.1f} us | fitted |"
    yield ""


def _errors(found: list[Row]) -> Iterator[str]:
    fitted = [row for row in found if row.figure.role == "fit"]
    median, worst = spread(row.error for row in fitted)
    one, _ = spread(row.left_out for row in fitted if row.left_out is not None)
    source, most = spread(row.source_left_out for row in fitted if row.source_left_out is not None)
    yield "## Published and predicted"
    yield ""
    yield (
        f"{len(fitted)} figures from {len({row.figure.source for row in fitted})} sources are "
        f"fitted on. The median error is {median:.0%}, the largest {worst:.0%}; with the figure "
        f"left out of the fit the median is {one:.0%}, with its whole source left out {source:.0%} "
        f"(largest {most:.0%}). The last is what to expect of cards, engines and layouts that are "
        "not among these. An error is predicted over published, less one; of tokens per second, "
        "plus is too fast, of milliseconds, minus is."
    )
    yield ""
    yield from _table(fitted, left_out=True)
    yield ""
    yield from (
        "Outliers, as far as they can be explained:",
        "",
        "- TensorRT-LLM's guide: of 5,120 requests 1,024 run at once, so that part of the run has "
        "less than full batches; that does not explain all of it.",
        "- LMSYS's H20 and 96 H100: kernels tuned for those cards and two batches that hide the "
        "links; this model has no overlap, and one share for all cards, though an H20's few tensor "
        "cores are easier to fill.",
        "- SGLang #8118: an early version of the kernel; #15315, half a year later, is in line.",
        "",
    )
    yield "Measurements that are compared only, because something is missing or known to differ:"
    yield ""
    yield from _table([row for row in found if row.figure.role == "check"])
    yield ""
    yield (
        "[AIConfigurator](https://pypi.org/project/aiconfigurator/), which interpolates measured "
        "kernels, gives figures of its own; `tests/interop/test_aiconfigurator.py` runs it:"
    )
    yield ""
    yield from _table([row for row in found if row.figure.role == "model"])
    yield ""
    yield "Published, and not comparable:"
    yield ""
    for what, url, why in NOT_COMPARED:
        yield f"- [{what}]({url}): {why}."
    yield ""


def _table(found: list[Row], *, left_out: bool = False) -> Iterator[str]:
    more = " without it | without its source |" if left_out else ""
    yield (
        "| source | engine | replica | requests x tokens | published | predicted | error |"
        f"{more} note |"
    )
    yield "|---|---|---|---|---:|---:|---:|" + "---:|---:|" * left_out + "---|"
    for row in found:
        figure = row.figure
        cells = [
            f"[{figure.source}]({figure.url})",
            f"{figure.engine}, {figure.date}",
            f"{figure.hardware}, `{figure.recipe}`, {_layout(figure)}",
            _lengths(figure),
            f"{_number(figure.value)} {_UNITS[figure.metric]}",
            _number(row.predicted),
            f"{row.error:+.0%}",
        ]
        if row.left_out is not None and row.source_left_out is not None:
            cells += [f"{row.left_out:+.0%}", f"{row.source_left_out:+.0%}"]
        yield f"| {' | '.join([*cells, figure.note])} |"


def _layout(figure: Figure) -> str:
    gpus = int(figure.hardware.partition("x")[0])
    return f"{figure.attention.upper()}{gpus} EP{figure.ep or gpus}"


def _lengths(figure: Figure) -> str:
    if figure.metric == "prefill":
        return f"{figure.isl:,}"
    osl = f" + {figure.osl:,}" if figure.osl > 1 else ""
    return f"{figure.batch:,.0f} x {figure.isl:,}{osl}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _hardware() -> Iterator[str]:
    yield "## Cards"
    yield ""
    yield (
        "Dense peaks, from the data sheets (`cluster/hardware.py`). NVLink is one GPU's, both "
        "directions; network is one adapter for each GPU, one direction, assumed for H800 and H20."
    )
    yield ""
    yield "| card | HBM TB/s | FP16 | FP8 | INT8 | NVLink GB/s | network GB/s |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for gpu in GPUS.values():
        peaks = [
            f"{gpu.peak_tflops[form]:,.0f}" if form in gpu.peak_tflops else "-"
            for form in ("fp16", "fp8", "int8")
        ]
        cells = [
            gpu.name,
            f"{gpu.memory_bandwidth / 1e12:g}",
            *peaks,
            f"{gpu.nvlink_bandwidth / 1e9:g}",
            f"{gpu.network_bandwidth / 1e9:g}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _slo() -> Iterator[str]:
    yield "## What `plan --slo` assumes"
    yield ""
    yield from (
        f"- Every time is longer than predicted by {MARGINS['tp']:.0%} with attention split by "
        f"heads and {MARGINS['dp']:.0%} by requests: as much as in the fitted figure of that kind "
        "that the fit is most optimistic about. By requests that is TensorRT-LLM's guide, the only "
        "one with whole experts on a single node; it needs an engine that sends tokens to their "
        "experts (DeepEP), and does not gather them all.",
        "- A replica runs at most as many requests as hold the TPOT even when all places are "
        "taken, as fit its KV cache, and as its workspace is planned for.",
        f"- The TTFT holds for {PERCENTILE:.0%} of the requests. It is the sum of the wait for a "
        "place, the wait for earlier prompts, the prompt's own chunks and one step; both waits are "
        "at that percentile, and adding them is more than the percentile of their sum unless they "
        "come together.",
        "- The wait for a place is that of one queue before all places of the fleet (M/M/m): "
        "P(wait > t) = C e^(-(m - a) t / S), with Erlang's C, m places, a load of a = rate x S and "
        "S the time of a request on a full replica.",
        "- The wait for earlier prompts is that before one server with constant service time "
        "(M/D/1, Pollaczek-Khinchine), with an exponential tail (Kingman): P(wait > t) = "
        "rho e^(-2 (1 - rho) t / s), s the time of one prompt and rho its share of the replica's "
        "time. Formulas: Kleinrock, Queueing Systems I, 1975.",
        "- Requests arrive at random, all of one length. No prompt is found in a prefix cache, and "
        "nothing speculates. Routing is taken to be perfect, and load to be even over DP ranks.",
        "- Fewest nodes first, then the recipe with the most bytes, then the shortest TPOT.",
    )
    yield ""

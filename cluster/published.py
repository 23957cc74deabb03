"""Speeds of DeepSeek-V3 and R1 that others published, as data, with where each was read.

`fit` are measurements that `cluster/fit.py` fits on: the engine, the cards, the formats, the
lengths and the batch are all stated. `check` are measurements that lack one of them or differ in
something that the roofline does not have; they are compared, with what is missing, and not fitted.
`model` are another model's answers, no measurements. The rest is in `cluster/uncompared.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cluster.work import Attention

Role = Literal["fit", "check", "model"]
#: `tpot` and `ttft` milliseconds; `output` and `prefill` tokens per second of the whole replica.
Metric = Literal["tpot", "ttft", "output", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One published number. `batch` are the requests that run at once; with `alone` no prompts are
    prefilled beside them (prefill elsewhere, or one request). `chunk` are the prompt tokens of one
    pass, None for the planner's. `date` is the month of the figure or of its software."""

    role: Role
    source: str
    url: str
    engine: str
    date: str
    hardware: str
    recipe: str
    attention: Attention = "tp"
    ep: int | None = None
    metric: Metric
    value: float
    batch: float = 1
    isl: int
    osl: int = 1
    alone: bool = False
    chunk: int | None = None
    note: str = ""

    @property
    def is_time(self) -> bool:
        return self.metric in ("tpot", "ttft")


GITHUB = "https://github.com/"
_INFERENCEX = GITHUB + "SemiAnalysisAI/InferenceX/issues/870"
TENSTORRENT = GITHUB + "tenstorrent/tt-inference-server/issues/356"
TRTLLM = (
    GITHUB + "NVIDIA/TensorRT-LLM/blob/main/docs/source/blogs/"
    "Best_perf_practice_on_DeepSeek-R1_in_TensorRT-LLM.md"
)
SGLANG = GITHUB + "sgl-project/sglang/pull/"
_GPUSTACK = GITHUB + "gpustack/gpustack/blob/main/docs/performance-lab/deepseek-r1/h200.md"
_DEEPSEEK = (
    GITHUB + "deepseek-ai/open-infra-index/blob/main/202502OpenSourceWeek/"
    "day_6_one_more_thing_deepseekV3R1_inference_system_overview.md"
)
_LMSYS_96 = "https://lmsys.org/blog/2025-05-05-large-scale-ep/"
LMSYS_H20 = "https://lmsys.org/blog/2025-09-26-sglang-ant-group"
_AIC = "https://pypi.org/project/aiconfigurator/0.12.0/"


_H200 = Figure(
    role="fit",
    source="InferenceX #870",
    url=_INFERENCEX,
    engine="SGLang 0.5.7",
    date="2026-03",
    hardware="8xH200",
    recipe="released",
    ep=1,
    metric="tpot",
    value=10.93,
    batch=4,
    isl=1024,
    osl=8192,
)
_AWQ = Figure(
    role="fit",
    source="tt-inference-server #356",
    url=TENSTORRENT,
    engine="vLLM, AWQ",
    date="2025-07",
    hardware="8xH100-80GB",
    recipe="int4-all",
    ep=1,
    metric="tpot",
    value=16.1,
    isl=128,
    osl=128,
    note="AWQ's INT4 with BF16 activations is planned as int4-all",
)
_TWO_NODES = replace(
    _AWQ,
    engine="SGLang, InfiniBand",
    hardware="16xH100-80GB",
    recipe="released",
    value=23.1,
    note="",
)
_A100 = Figure(
    role="fit",
    source="SGLang #3922",
    url=SGLANG + "3922",
    engine="SGLang, block INT8",
    date="2025-02",
    hardware="16xA100-80GB",
    recipe="int8-block",
    ep=1,
    metric="output",
    value=33.17,
    isl=128,
    osl=128,
    note="lengths are not stated, and do not matter to one short request",
)
_STACK = Figure(
    role="fit",
    source="GPUStack lab",
    url=_GPUSTACK,
    engine="vLLM 0.11",
    date="2025-11",
    hardware="8xH200",
    recipe="released",
    ep=1,
    metric="output",
    value=753.67,
    batch=170,
    isl=3995,
    osl=200,
    note="500 requests at once; the batch is what the KV cache holds",
)
_WIDE = Figure(
    role="fit",
    source="LMSYS, 96 H100",
    url=_LMSYS_96,
    engine="SGLang, prefill apart",
    date="2025-05",
    hardware="72xH100-80GB",
    recipe="released",
    attention="dp",
    metric="output",
    value=22_300 * 9,
    batch=72 * 256,
    isl=2000,
    osl=100,
    alone=True,
    note="decode nodes; 256 requests a GPU as in SGLang #6017; two batches overlap, 32 more copies "
    "of experts",
)
_PRODUCTION = Figure(
    role="check",
    source="DeepSeek, production",
    url=_DEEPSEEK,
    engine="DeepSeek's own, prefill apart",
    date="2025-02",
    hardware="144xH800-80GB",
    recipe="released",
    attention="dp",
    metric="tpot",
    value=1000 / 21,
    batch=14_800 / 8 / 21 * 144,
    isl=4989,
    alone=True,
    note="a day's mean: 14.8k output tokens/s a node at 20 to 22 tokens/s a request; 4,989 tokens "
    "of context; 32 more copies of experts",
)
_MODELLED = Figure(
    role="model",
    source="AIConfigurator 0.12",
    url=_AIC,
    engine="its TensorRT-LLM 1.3.0rc20 tables",
    date="2026-09",
    hardware="8xH200",
    recipe="released",
    metric="tpot",
    value=7.0,
    isl=1024,
    osl=2048,
)

FIGURES: tuple[Figure, ...] = (
    _H200,
    replace(_H200, isl=8192, osl=1024, value=12.05),
    replace(
        _H200,
        role="check",
        osl=1024,
        value=22.73,
        note="twice the time of its neighbors, on a machine of its own (P99 28.7 ms)",
    ),
    replace(_H200, batch=8, osl=1024, value=12.8),
    replace(_H200, batch=16, osl=1024, value=17.2),
    replace(_H200, batch=32, osl=1024, value=25.6),
    replace(_H200, batch=64, osl=1024, value=34.6),
    Figure(
        role="fit",
        source="TensorRT-LLM guide",
        url=TRTLLM,
        engine="TensorRT-LLM",
        date="2025-09",
        hardware="8xH200",
        recipe="released",
        attention="dp",
        metric="output",
        value=11_489.0,
        batch=1024,
        isl=1024,
        osl=2048,
        chunk=8 * 1151,
        note="the batch is the concurrency; requests start together",
    ),
    _AWQ,
    replace(_AWQ, isl=4096, value=16.4),
    replace(_AWQ, isl=8192, value=16.6),
    _TWO_NODES,
    replace(_TWO_NODES, isl=4096, value=23.7),
    replace(_TWO_NODES, isl=8192, value=24.0),
    replace(
        _TWO_NODES,
        role="check",
        engine="not said which",
        value=31.2,
        note="the engine and the network are not named",
    ),
    replace(
        _AWQ,
        role="check",
        metric="ttft",
        isl=8192,
        value=242.0,
        note="2,048 and 4,096 tokens take 127 and 120 ms, as if a prefix cache had some of them",
    ),
    replace(
        _TWO_NODES,
        role="check",
        metric="ttft",
        isl=8192,
        value=263.9,
        note="1,024 tokens take 392 ms and 4,096 take 200 ms; a prefix cache likewise",
    ),
    replace(
        _H200,
        role="check",
        metric="ttft",
        isl=8192,
        osl=1024,
        value=474.3,
        note="the mean TTFT of four at once, waits for each other included",
    ),
    _A100,
    replace(
        _A100,
        source="SGLang #4287",
        url=SGLANG + "4287",
        engine="SGLang, channel INT8",
        recipe="int8",
        value=38.30,
    ),
    replace(
        _A100,
        role="check",
        source="SGLang #4323",
        url=SGLANG + "4323",
        engine="SGLang, channel INT8",
        recipe="int8",
        value=37.89,
        note="A800, an A100 with 400 GB/s of NVLink; planned as A100",
    ),
    replace(
        _A100,
        source="SGLang #4220",
        url=SGLANG + "4220",
        hardware="8xH20-96GB",
        value=44.90,
    ),
    Figure(
        role="fit",
        source="SGLang #8118",
        url=SGLANG + "8118",
        engine="SGLang, W4AFP8",
        date="2025-07",
        hardware="8xH20-96GB",
        recipe="w4a8",
        ep=1,
        metric="output",
        value=256_000 / 159.0,
        batch=128,
        isl=1000,
        osl=1000,
        note="256 requests, 128 at once, in 159 s",
    ),
    Figure(
        role="fit",
        source="SGLang #15315",
        url=SGLANG + "15315",
        engine="SGLang, W4AFP8, prefill apart",
        date="2025-12",
        hardware="8xH20-96GB",
        recipe="w4a8",
        metric="tpot",
        value=(256 / 2.66 - 6.437) / 1500 * 1000,
        batch=256 * (1 - 6.437 * 2.66 / 256),
        isl=3500,
        osl=1500,
        alone=True,
        note="from 2.66 requests/s of 256 at once and a TTFT of 6.4 s (Little's law)",
    ),
    _STACK,
    replace(
        _STACK,
        value=48.33,
        batch=22,
        isl=31_999,
        osl=100,
        note="100 requests at once; the batch is what the KV cache holds",
    ),
    replace(
        _STACK,
        engine="SGLang 0.5.3",
        attention="dp",
        value=16_096.80 * 200 / 4195,
        batch=500,
        note="500 requests at once; output's share of all tokens; experts cut, not whole",
    ),
    replace(
        _STACK,
        engine="SGLang 0.5.3",
        attention="dp",
        value=19_024.33 * 100 / 2100,
        batch=500,
        isl=2000,
        osl=100,
        note="500 requests at once; output's share of all tokens; experts cut, not whole",
    ),
    Figure(
        role="fit",
        source="LMSYS, H20",
        url=LMSYS_H20,
        engine="SGLang, prefill apart",
        date="2025-09",
        hardware="8xH20-96GB",
        recipe="released",
        ep=1,
        metric="prefill",
        value=16_500,
        isl=4096,
        chunk=16_384,
    ),
    _WIDE,
    replace(
        _WIDE,
        hardware="32xH100-80GB",
        metric="prefill",
        value=52_300 * 4,
        batch=1,
        osl=1,
        chunk=32 * 16_384,
        note="prefill nodes, likewise; chunks of 16,384 tokens a GPU are assumed",
    ),
    _PRODUCTION,
    replace(
        _PRODUCTION,
        hardware="32xH800-80GB",
        metric="prefill",
        value=73_700 * (1 - 0.563) * 4,
        batch=1,
        chunk=32 * 16_384,
        note="a day's mean, nights included; without the 56.3 % of tokens that a cache had",
    ),
    Figure(
        role="check",
        source="SGLang #7762",
        url=SGLANG + "7762",
        engine="SGLang, W4AFP8",
        date="2025-07",
        hardware="16xH20-96GB",
        recipe="w4a8",
        metric="output",
        value=941,
        batch=64,
        isl=500,
        osl=500,
        note="the first version of that kernel; lengths uniform up to 1000",
    ),
    replace(_MODELLED, isl=1024, osl=2048, note="no measurement, one request"),
    replace(_MODELLED, batch=64, value=28.5, note="no measurement"),
    replace(
        _MODELLED,
        metric="prefill",
        value=8192 / 0.289,
        osl=1,
        note="no measurement; eight prompts of 1,024 tokens in 289 ms",
    ),
    replace(
        _MODELLED,
        attention="dp",
        metric="output",
        batch=1792,
        value=2278 * 8,
        note="no measurement; its sweep's best, as the next",
    ),
    replace(
        _MODELLED,
        hardware="16xH100-80GB",
        attention="dp",
        metric="output",
        batch=1641 / 14.7 * 16,
        value=1641 * 16,
        note="no measurement; the batch is tokens/s over tokens/s a request",
    ),
    replace(
        _MODELLED, hardware="8xH100-80GB", recipe="w4a8", value=8.3, note="no measurement behind it"
    ),
    replace(
        _MODELLED,
        hardware="8xH100-80GB",
        recipe="w4a8",
        batch=64,
        value=45.0,
        note="no measurement behind it",
    ),
)

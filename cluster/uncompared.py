"""Published speeds of DeepSeek-V3 and R1 that the roofline cannot be compared with, and why."""

from __future__ import annotations

from cluster.published import GITHUB, LMSYS_H20, SGLANG, TRTLLM

#: (what, where, why)
NOT_COMPARED: tuple[tuple[str, str, str], ...] = (
    (
        "158 tokens/s, 8xH200, TensorRT-LLM, one request",
        TRTLLM,
        "three tokens of the MTP layer a step; how many are accepted is not said",
    ),
    (
        "2,200 tokens/s an H200, vLLM, wide EP",
        "https://llm-d.ai/blog/llm-d-v0.3-expanded-hardware-faster-perf-and-igw-ga",
        "batch, lengths and number of GPUs are not said",
    ),
    (
        "5,700 output tokens/s a node, H20, SGLang, decode EP16",
        LMSYS_H20,
        "the batch is not in what could be read",
    ),
    (
        "3,342 (BF16, 32xA100), 4,450 (INT8) tokens/s at 128 requests/s, SGLang",
        SGLANG + "3730",
        "lengths and batch are not said; the same of #3888, #3922, #4287 and #4323 at 128",
    ),
    (
        "74 output tokens/s, 8xH20, SGLang W4AFP8, 64 at once",
        SGLANG + "7762",
        "a user's report of a run that went wrong",
    ),
    (
        "+56 % at 64 and +125 % at 128 of W4AFP8 over FP8, 8xH20, SGLang",
        SGLANG + "9508",
        "a ratio without the figures",
    ),
    (
        "TPOT 55.4, 41.5 and 44.7 ms (AWQ, GPTQ experts, GPTQ all), vLLM, ShareGPT",
        GITHUB + "IST-DASLab/MoE-Quant",
        "the cards and the rate of requests are not in what could be read",
    ),
    (
        "3,872 tokens/s of an HGX H200, NVIDIA NIM",
        GITHUB + "deepseek-ai/DeepSeek-R1/issues/507",
        "told there as 3,800 and more; batch and lengths are not said",
    ),
    (
        "TPOT 12.2 ms, TTFT 574 ms for 10,240 tokens, SGLang W4AFP8",
        SGLANG + "10027",
        "the cards are not in what could be read",
    ),
    (
        "TPOT 16 to 50 ms, INT8 and W4A8 on Atlas A3",
        "https://docs.sglang.io/docs/hardware-platforms/ascend-npus/best_practice/deepseek_v3_2",
        "no card that the planner has",
    ),
)

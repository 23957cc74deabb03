"""The arguments of `tensorrt_llm.LLM` for an engine, made from the plan of its machines."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.hardware import GPUS_PER_NODE, Machines
from cluster.memory import GPU_STEP_TOKENS, Footprint, Tally
from deepseek.config import ModelConfig
from deepseek.recipe import Scheme
from deepseek.trtllm.llm_args import make_llm_args
from deepseek.trtllm.llm_schema import LlmArgs
from quant_jobs.targets.request_limits import request_limits
from quant_jobs.targets.trtllm_plan import TrtllmOptions


def args_from_plan(
    config: ModelConfig,
    stored: Mapping[str, Scheme],
    options: TrtllmOptions,
    machines: Machines,
    *,
    context: int | None = None,
    concurrency: int | None = None,
) -> LlmArgs:
    """The arguments for one replica on `machines`, whose count is the number of ranks.

    `context` and `concurrency` are those of `request_limits`, which says what they default to.

    Raises:
        DeployError: the weights leave no room for one such request, or a number is out of range.
    """
    footprint = _footprint(config, stored, options)
    limits = request_limits(config, footprint, machines, context=context, concurrency=concurrency)
    return make_llm_args(
        options.engine_version,
        tp=options.ranks.tp,
        ep=options.ranks.ep,
        kv_cache=options.kv_cache,
        max_batch_size=limits.concurrency,
        max_num_tokens=GPU_STEP_TOKENS,
        max_seq_len=limits.context,
        gpus_per_node=min(GPUS_PER_NODE, options.ranks.tp),
        mtp=options.keep_mtp and config.num_nextn_predict_layers > 0,
    )


def planned_rank_bytes(
    config: ModelConfig, stored: Mapping[str, Scheme], options: TrtllmOptions
) -> int:
    """Bytes of weights that the planner expects on the fullest GPU."""
    return _footprint(config, stored, options).weights_per_gpu


def _footprint(
    config: ModelConfig, stored: Mapping[str, Scheme], options: TrtllmOptions
) -> Footprint:
    return Tally(config, stored).gpu_footprint(
        options.ranks.tp, options.kv_cache, mtp=options.keep_mtp, target="trtllm"
    )

"""The arguments of `vllm serve` for an engine, made from the plan of its machines."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.hardware import Machines
from cluster.memory import GPU_STEP_TOKENS, Footprint, Tally
from deepseek.config import ModelConfig
from deepseek.recipe import Scheme
from deepseek.vllm.launch import Launch, make_launch
from quant_jobs.targets.request_limits import request_limits
from quant_jobs.targets.vllm_plan import VllmOptions


def launch_from_plan(
    config: ModelConfig,
    stored: Mapping[str, Scheme],
    options: VllmOptions,
    machines: Machines,
    *,
    context: int | None = None,
    concurrency: int | None = None,
) -> Launch:
    """The arguments for one replica on `machines`, whose count is the number of ranks.

    `context` and `concurrency` are those of `request_limits`, which says what they default to.

    Raises:
        DeployError: the weights leave no room for one such request, or a number is out of range.
    """
    footprint = _footprint(config, stored, options)
    limits = request_limits(config, footprint, machines, context=context, concurrency=concurrency)
    return make_launch(
        options.ranks,
        kv_cache=options.kv_cache,
        max_model_len=limits.context,
        max_num_seqs=limits.concurrency,
        max_num_batched_tokens=GPU_STEP_TOKENS,
        memory_fraction=machines.hardware.usable_fraction,
        mtp=options.keep_mtp and config.num_nextn_predict_layers > 0,
    )


def planned_rank_bytes(
    config: ModelConfig, stored: Mapping[str, Scheme], options: VllmOptions
) -> int:
    """Bytes of weights that the planner expects on the fullest GPU."""
    return _footprint(config, stored, options).weights_per_gpu


def _footprint(
    config: ModelConfig, stored: Mapping[str, Scheme], options: VllmOptions
) -> Footprint:
    return Tally(config, stored).gpu_footprint(
        options.ranks.tp,
        options.kv_cache,  # type: ignore[arg-type]  # `kv_format` has admitted it
        mtp=options.keep_mtp,
        target="vllm",
    )

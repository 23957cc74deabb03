"""The arguments of SGLang's server for an engine, made from the plan of its machines."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.hardware import Machines
from cluster.memory import GPU_STEP_TOKENS, Footprint, Tally
from deepseek.config import ModelConfig
from deepseek.recipe import Scheme
from deepseek.sglang.launch import Launch, keeps_shared_experts_apart, make_launch
from deepseek.sglang.layout import Dialect
from quant_jobs.targets.request_limits import request_limits
from quant_jobs.targets.sglang_plan import SglangOptions


def launch_from_plan(
    config: ModelConfig,
    stored: Mapping[str, Scheme],
    dialect: Dialect,
    options: SglangOptions,
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
    # SGLang takes this share for weights and KV cache; its workspace comes from what is left.
    workspace = footprint.workspace_per_gpu / machines.hardware.usable_bytes
    return make_launch(
        options.ranks,
        dialect,
        kv_cache=options.kv_cache,
        context_length=limits.context,
        max_running_requests=limits.concurrency,
        chunked_prefill_size=GPU_STEP_TOKENS,
        memory_fraction=machines.hardware.usable_fraction * (1 - workspace),
        shared_apart=keeps_shared_experts_apart(stored),
        mtp=options.keep_mtp and config.num_nextn_predict_layers > 0,
    )


def planned_rank_bytes(
    config: ModelConfig, stored: Mapping[str, Scheme], options: SglangOptions
) -> int:
    """Bytes of weights that the planner expects on the fullest GPU."""
    return _footprint(config, stored, options).weights_per_gpu


def _footprint(
    config: ModelConfig, stored: Mapping[str, Scheme], options: SglangOptions
) -> Footprint:
    return Tally(config, stored).gpu_footprint(
        options.ranks.tp,
        options.kv_cache,  # type: ignore[arg-type]  # `kv_format` has admitted it
        mtp=options.keep_mtp,
        target="sglang",
    )

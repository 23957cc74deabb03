"""The arguments of `vllm serve` for an engine, made from the plan of its machines."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.hardware import Machines
from cluster.memory import GPU_MAX_BATCH, GPU_STEP_TOKENS, Footprint, Tally
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Scheme
from deepseek.vllm.launch import Launch, make_launch
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

    `context` is the longest request in tokens, answer included (the model's limit, or what the KV
    cache holds, without it), `concurrency` the largest batch (`GPU_MAX_BATCH` without it).

    Raises:
        DeployError: the weights leave no room for one such request, or a number is out of range.
    """
    footprint = _footprint(config, stored, options)
    room = footprint.kv_tokens(machines.hardware.usable_bytes)
    limit = config.max_position_embeddings
    if context is not None and not 1 <= context <= limit:
        raise DeployError(f"--context must be 1 to {limit}, the model's limit, not {context}")
    if concurrency is not None and concurrency < 1:
        raise DeployError(f"--concurrency must be at least 1, not {concurrency}")
    if room < (context or footprint.page_tokens):
        raise DeployError(
            f"{machines.label} has no room: {footprint.weights_per_gpu / 1e9:.1f} GB of weights "
            f"and {footprint.workspace_per_gpu / 1e9:.1f} GB of workspace per GPU leave "
            f"{room:,} tokens of KV cache; name other --hardware, or ask `python -m cluster plan` "
            "what fits"
        )
    return make_launch(
        options.ranks,
        kv_cache=options.kv_cache,
        max_model_len=context or min(limit, room),
        max_num_seqs=concurrency or GPU_MAX_BATCH,
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

"""The longest request and the largest batch of an engine for a server, from the plan of its
machines. The launch file of every server's target states them in its own words."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hardware import Machines
from cluster.memory import GPU_MAX_BATCH, Footprint
from deepseek.config import ModelConfig
from deepseek.errors import DeployError


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """`context` is the longest request in tokens, answer included; `concurrency` the largest
    batch."""

    context: int
    concurrency: int


def request_limits(
    config: ModelConfig,
    footprint: Footprint,
    machines: Machines,
    *,
    context: int | None,
    concurrency: int | None,
) -> RequestLimits:
    """The limits of one replica on `machines`, whose count is the number of ranks.

    Without `context` a request may have the model's limit, or what the KV cache holds; without
    `concurrency` a batch has `GPU_MAX_BATCH`.

    Raises:
        DeployError: the weights leave no room for one such request, or a number is out of range.
    """
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
    return RequestLimits(context or min(limit, room), concurrency or GPU_MAX_BATCH)

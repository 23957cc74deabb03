"""From the options of an engine to its process and its plan: one file for each kind."""

from __future__ import annotations

from serve_app.engine_sections import RemoteOptions, TrtllmOptions
from serve_app.engines.remote.launch import Launch, Plan
from serve_app.engines.remote.trtllm import launch_trtllm, plan_trtllm
from serve_app.engines.remote.vllm import launch_vllm, plan_vllm


def launch_of(options: RemoteOptions) -> Launch:
    """The process that the options ask for."""
    if isinstance(options, TrtllmOptions):
        return launch_trtllm(options)
    return launch_vllm(options)


def plan_of(options: RemoteOptions) -> Plan:
    """What the engine directory of the options holds, checked.

    Raises:
        ArtifactError, DeployError, ConfigError: it cannot be served with these options.
    """
    if isinstance(options, TrtllmOptions):
        return plan_trtllm(options)
    return plan_vllm(options)

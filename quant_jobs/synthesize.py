"""The `synthesize` command: writes a checkpoint of random weights for measurements.

`deepseek/source/synthetic.py` makes it; this file adds the progress bar. Called by `__main__.py`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from deepseek.cli import make_progress
from deepseek.inventory import count_parameters
from deepseek.outputs import check_directory
from deepseek.source.synthetic import Preset, Size, num_bytes, synthesize, synthetic_config


class SynthesizeResult(BaseModel):
    """The JSON output of `synthesize`. `bytes` is the size of all tensors; `layers` and `experts`
    (per layer) are the model's without MTP layers; `parameters` includes them."""

    output: str
    layers: int
    experts: int
    parameters: int
    bytes: int
    shards: int
    seed: int


def run_synthesize(output: Path, size: Size, preset: Preset, seed: int) -> SynthesizeResult:
    """Write a synthetic checkpoint into `output`, which must be empty or absent.

    Raises:
        ConfigError: the sizes contradict each other.
        CheckpointError: `output` is not empty.
        OutputError: the disk is too small, or `output` cannot be written.
    """
    config = synthetic_config(size, preset)
    check_directory(output)  # before there is a bar
    with make_progress() as bar:
        task = bar.add_task("synthesize, MB", total=num_bytes(config) // 10**6)
        written = 0

        def advance(num_bytes: int) -> None:
            nonlocal written
            written += num_bytes
            bar.update(task, completed=written // 10**6)

        checkpoint = synthesize(output, config, seed, advance)
    return SynthesizeResult(
        output=str(output),
        layers=config.num_hidden_layers,
        experts=config.n_routed_experts,
        parameters=count_parameters(config, with_mtp=True),
        bytes=checkpoint.num_bytes,
        shards=checkpoint.num_shards,
        seed=seed,
    )

"""One calibration pass through a finished artifact that measures what enters its routed experts.

The blocks go through the artifact's own quantized layers, as they do when a job carries them from
layer to layer (`layer_steps.py`); nothing is solved, the source is not needed, and nothing is
written. Every tensor is verified where it is read. Memory: a worker's share of one layer's packed
tensors, and the activations of its blocks. The values depend neither on the number of workers nor
on their order: a block goes through an expert alone, and the largest of all is taken.

The pass keeps no state on disk: it takes a fraction of what quantizing took, and a pass that is
killed begins anew. Where workers die, so does this file, with those that replace them. Called by
`quant_jobs/measure.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from deepseek.artifact.input_maxima import InputMaxima, LayerMaxima, moe_layers
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import IntServeError
from quant_jobs.job.layer_steps import LayerSteps
from quant_jobs.workers.devices import Device
from quant_jobs.workers.messages import MeasureJob
from quant_jobs.workers.protocol import Workers, WorkersLost

#: Times that the pass begins anew because workers died, before it fails.
MAX_LOSSES = 3

#: Called with the number of layers done, and a sentence or nothing.
Report = Callable[[int, str], None]


def measure_experts(
    artifact: ArtifactReader,
    ids: Tensor,
    pool: Workers,
    report: Report,
    *,
    device: Device = "cpu",
    wave_blocks: int | None = None,
) -> InputMaxima:
    """The largest inputs of every routed expert over the calibration blocks `ids` int64 [B, T].

    Raises:
        ArtifactError: a tensor is damaged, or an input is not finite.
        IntServeError: workers die too often, or none is left.
    """
    losses = 0
    while True:
        try:
            return _run(artifact, ids, pool, report, device, wave_blocks)
        except WorkersLost:
            losses += 1
            lost = pool.recover()
            if losses > MAX_LOSSES:
                raise IntServeError(
                    f"workers {lost} died; that makes {losses} times, probably for lack of memory: "
                    "run again with fewer --workers per node or more memory"
                ) from None
            report(0, f"lost workers {lost}; beginning anew on {pool.describe()}")


def _run(
    artifact: ArtifactReader,
    ids: Tensor,
    pool: Workers,
    report: Report,
    device: Device,
    wave_blocks: int | None,
) -> InputMaxima:
    config, directory = artifact.config, Path(artifact.directory).resolve()
    steps = LayerSteps(config, artifact.recipe, artifact.schemes, pool, wave_blocks)
    pool.admit()
    job = MeasureJob(directory, len(ids), device)
    pool.each(lambda worker, _: worker.begin_measuring.remote(job))
    pool.each(
        lambda worker, i: worker.embed.remote({block: ids[block] for block in steps.blocks_of(i)})
    )
    layers: dict[int, LayerMaxima] = {}
    last = moe_layers(config)[-1]
    for layer in range(last + 1):
        by_expert = steps.measure(layer)
        if config.is_moe(layer):
            values = [
                by_expert.get(expert, (0.0, 0.0)) for expert in range(config.n_routed_experts)
            ]
            layers[layer] = LayerMaxima(
                gate_up=tuple(gate_up for gate_up, _ in values),
                down=tuple(down for _, down in values),
            )
        report(layer + 1, "")
    return InputMaxima(layers=layers)

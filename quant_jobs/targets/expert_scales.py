"""Static input scales of INT4 experts for an engine whose target quantizes their inputs to FP8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseek.artifact.input_scales import LayerInputScales, runtime_input_scale
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.packing import Source
from deepseek.errors import ArtifactError
from deepseek.inventory import expert_of, layer_of
from deepseek.recipe import Scheme
from quant_jobs.algorithms.input_scales import share_input_scales


def expert_input_scales(
    source: Source, stored: Mapping[str, Scheme], loader: str
) -> dict[int, LayerInputScales]:
    """The static input scales of every layer with INT4 experts. `loader` names who reads them.

    Scales that the artifact itself has (FP8 activations, measured and judged with it) are the ones
    needed; without them they follow from the input maxima by the same rule
    (`quant_jobs/algorithms/input_scales.py`).

    Raises:
        ArtifactError: the artifact has neither.
    """
    by_layer: dict[int, list[str]] = {}
    for module, scheme in stored.items():
        if scheme.weights == "int4":
            by_layer.setdefault(layer_of(module), []).append(module)
    if not by_layer:
        return {}
    assert isinstance(source, ArtifactReader), "a source has no INT4 experts"
    scales = {}
    for layer, modules in by_layer.items():
        needed = _needed_scales(source, layer, modules, loader)
        gate_up, down = (
            max(scale for module, scale in needed.items() if module.endswith(role))
            for role in ("gate_proj", "down_proj")
        )
        scales[layer] = LayerInputScales(
            gate_up=runtime_input_scale(gate_up),
            down=runtime_input_scale(down),
            needed_gate_up=gate_up,
            needed_down=down,
        )
    return scales


def _needed_scales(
    source: ArtifactReader, layer: int, modules: Sequence[str], loader: str
) -> dict[str, float]:
    """amax / 448 of the inputs of the experts' linears of one layer, by module."""
    if source.schemes[modules[0]].activations == "fp8":
        names = {f"{module}.input_scale": module for module in modules}
        stored = source.read_some(layer, names.__contains__)
        return {names[name]: float(tensor) for name, tensor in stored.items()}
    if source.input_maxima is None:
        raise ArtifactError(
            f"{source.directory} holds no maxima of its experts' inputs, from which {loader}'s "
            "static input scales are made: an older version quantized it; add them without "
            "quantizing again: python -m quant_jobs measure --checkpoint "
            f"{source.directory} --calibration FILE"
        )
    maxima = source.input_maxima.layers[layer]
    amax, seen = {}, {}
    for module in modules:
        expert = expert_of(module)
        assert expert is not None, module
        amax[module] = (maxima.down if module.endswith("down_proj") else maxima.gate_up)[expert]
        # Not the manifest's coverage: what `measure` adds comes from another pass than that.
        seen[module] = int(amax[module] > 0)
    scales, _ = share_input_scales(amax, seen)
    return scales


def outlier_warnings(source: Source) -> tuple[str, ...]:
    """A sentence about the experts whose inputs set a layer's static scale far above the others'
    need; none where there is no such expert."""
    outliers = source.manifest.input_outliers if isinstance(source, ArtifactReader) else ()
    if not outliers:
        return ()
    worst = max(outliers, key=lambda outlier: outlier.ratio)
    return (
        f"{len(outliers)} inputs of experts are far above the others of their layer and set its "
        f"static scale for all (the gate limits their number); the largest: {worst.describe()}",
    )

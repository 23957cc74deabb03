"""Engines for TensorRT-LLM on every rank of three layouts, and their input scales.

    python bench/trtllm_ranks.py [--no-heads] [--no-width] [--no-scales] [--output FOLDER]

heads   a model of 3 layers with DeepSeek-V3's head dims: hidden 1024, 16 heads, 8 experts in 4
        groups, experts 1024 wide
width   one MoE layer of DeepSeek-V3's true widths, 16 of its 256 experts: 1 GB
scales  gain error of the input scales on the trained example and on a model with an outlier

The two synthetic models are quantized to `int4` with a little calibration text, built for TP8 x
EP8, TP8 x MoE-TP8 and TP4 x EP2 x MoE-TP2 in both dialects, and checked with `build --check
--checkpoint`: the model of the loader reads the directory rank by rank, and every value that a rank
holds is decoded and compared with the artifact's. Prints Markdown; a key that the loader leaves
unread, or a value that differs, ends it with the sentence that names it.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from support.outliers import outlier_small_model

from deepseek.artifact.input_maxima import INPUTS
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_app, run
from deepseek.recipe import Recipe, load_recipe
from deepseek.source.synthetic import Size, synthesize, synthetic_config
from deepseek.trtllm.fields import LayerInputScales
from deepseek.trtllm.input_scales import gain_error
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions, BuildResult
from quant_jobs.calibration.token_blocks import CalibrationSource
from quant_jobs.check import CheckResult, run_check
from quant_jobs.quantize import run_quantize
from quant_jobs.targets.expert_scales import expert_input_scales

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3"
TEXT = EXAMPLE / "calibration.txt"
#: (tp, ep): whole experts on each rank, every expert cut over all, and both.
LAYOUTS = ((8, 8), (8, 1), (4, 2))
DIALECTS: tuple[Literal["mixed", "single"], ...] = ("mixed", "single")

HEADS = Size(
    layers=3,
    experts=8,
    vocab=1024,
    hidden=1024,
    intermediate=2048,
    moe_intermediate=1024,
    heads=16,
)
WIDTH = Size(layers=1, dense_layers=0, experts=16, vocab=1024)

#: Of the table of engines; the plan's bytes are followed by those of engine.json against them.
HEADINGS = (
    "model",
    "ranks",
    "dialect",
    "files, MB",
    "a rank reads, MB",
    "holds, MB",
    "plan, MB",
    "tensors, equal on all ranks, of keys",
    "reads",
    "build, check, s",
)

app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True)
class Row:
    """One engine: what `build` and `build --check` say of it, and their seconds."""

    model: str
    built: BuildResult
    checked: CheckResult
    build_s: float
    check_s: float

    def cells(self) -> list[str]:
        """Of a row of the table."""
        built, plan = self.built, self.built.planned_rank_bytes
        assert plan is not None
        held = [rank.held_bytes for rank in built.ranks]
        read = [rank.read_bytes for rank in built.ranks]
        return [
            self.model,
            layout_name(built.tp, built.ep),
            str(built.dialect),
            f"{built.bytes / 1e6:.1f}",
            _span(read),
            _span(held),
            f"{plan / 1e6:.1f} ({max(built.rank_weight_bytes) / plan - 1:+.2%})",
            f"{self.checked.compared:,} of {self.checked.tensors:,}",
            f"{self.checked.reads:,}",
            f"{self.build_s:.1f}, {self.check_s:.1f}",
        ]


@app.command()
def main(
    heads: Annotated[bool, typer.Option(help="The model with V3's head dims.")] = True,
    width: Annotated[bool, typer.Option(help="The layer of true width.")] = True,
    scales: Annotated[bool, typer.Option(help="Gain errors.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Keep models and engines here; else nowhere.")
    ] = None,
) -> None:
    """See the module's docstring."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        sizes = {"heads": HEADS} if heads else {}
        sizes |= {"width": WIDTH} if width else {}
        if rows := [row for name in sizes for row in run_layouts(name, sizes[name], folder / name)]:
            show(rows)
        if scales:
            show_scales(folder / "scales")


def run_layouts(
    name: str,
    size: Size,
    folder: Path,
    *,
    layouts: tuple[tuple[int, int], ...] = LAYOUTS,
    keep: bool = False,
) -> Iterator[Row]:
    """Make a model of this size, quantize it, and build and check every layout and dialect of it.
    Engines are deleted after they were checked, unless they are to be kept.

    Raises:
        IntServeError: an engine is not what the artifact says, on some rank.
    """
    source, artifact = folder / "source", folder / "artifact"
    if not (source / "config.json").exists():
        synthesize(source, synthetic_config(size))
    quantize(source, artifact, num_blocks=2, block_tokens=128)
    for tp, ep in layouts:
        for dialect in DIALECTS:
            engine = folder / f"tp{tp}-ep{ep}-{dialect}"
            options = BuildOptions(tp=tp, ep=ep, dialect=dialect)
            start = time.perf_counter()
            built = run_build(artifact, "trtllm", engine, options)
            middle = time.perf_counter()
            checked = run_check(engine, artifact)
            yield Row(name, built, checked, middle - start, time.perf_counter() - middle)
            if not keep:
                shutil.rmtree(engine)


def quantize(source: Path, output: Path, *, num_blocks: int, block_tokens: int) -> None:
    """INT4 experts by rounding; what calibration is for here are the maxima of their inputs."""
    content = load_recipe("int4").model_dump(mode="json")
    content["calibration"] = {"num_blocks": num_blocks, "block_tokens": block_tokens}
    text = [CalibrationSource(TEXT)]
    run_quantize(source, Recipe.model_validate(content), text, output, 0, lambda _: None)


def layout_name(tp: int, ep: int) -> str:
    """`TP8 x EP4 x MoE-TP2`, without what is 1."""
    parts = [f"TP{tp}", f"EP{ep}" * (ep > 1), f"MoE-TP{tp // ep}" * (tp > ep)]
    return " x ".join(part for part in parts if part)


def show(rows: list[Row]) -> None:
    """A Markdown table of engines."""
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * 3}{'---:|' * (len(HEADINGS) - 3)}")
    for row in rows:
        print(f"| {' | '.join(row.cells())} |")
    print()


def _span(sizes: list[int]) -> str:
    low, high = f"{min(sizes) / 1e6:.1f}", f"{max(sizes) / 1e6:.1f}"
    return low if low == high else f"{low} to {high}"


# --- input scales ---


@dataclass(frozen=True, slots=True)
class Gain:
    """Gain error of the input scales of one layer: for gate and up, and for down, as they were
    needed (amax / 448, rounded by the loader), and as `build` writes them."""

    model: str
    layer: int
    before: tuple[float, float]
    after: tuple[float, float]
    chosen: LayerInputScales
    #: Largest maximum of an expert over the median: of both inputs.
    spread: tuple[float, float]


def gains(model: str, artifact: ArtifactReader) -> list[Gain]:
    """The gain errors of every layer of an artifact with INT4 experts."""
    assert artifact.input_maxima is not None
    found = []
    for layer, chosen in expert_input_scales(artifact, artifact.schemes, "TensorRT-LLM").items():
        maxima = artifact.input_maxima.layers[layer]
        gate_up, down = (
            max(values) / statistics.median([value for value in values if value > 0])
            for values in (maxima.of(kind) for kind in INPUTS)
        )
        found.append(
            Gain(
                model,
                layer,
                (
                    gain_error(chosen.needed_gate_up, down=False),
                    gain_error(chosen.needed_down, down=True),
                ),
                (gain_error(chosen.gate_up, down=False), gain_error(chosen.down, down=True)),
                chosen,
                (gate_up, down),
            )
        )
    return found


def show_scales(folder: Path) -> None:
    """Gain errors of the trained example and of a model with an outlier, and its report. Pairs are
    of gate and up, and of down."""
    quantize(EXAMPLE, folder / "example", num_blocks=8, block_tokens=512)
    small = outlier_small_model(folder / "small")
    content = load_recipe("int4").model_dump(mode="json")
    content["calibration"] = {"num_blocks": 4, "block_tokens": 48}
    text = [CalibrationSource(small.text)]
    recipe = Recipe.model_validate(content)
    run_quantize(small.directory, recipe, text, folder / "outlier", 0, lambda _: None)
    example, outlier = ArtifactReader(folder / "example"), ArtifactReader(folder / "outlier")
    print("| model | layer | needed | gain error | written | gain error | largest over median |")
    print("|---|---:|---|---|---|---|---|")
    for gain in [*gains("tiny-deepseek-v3", example), *gains("with an outlier", outlier)]:
        scales = gain.chosen
        cells = [
            gain.model,
            str(gain.layer),
            f"{scales.needed_gate_up:.3e}; {scales.needed_down:.3e}",
            _percent(gain.before),
            f"{scales.gate_up:.3e}; {scales.down:.3e}",
            _percent(gain.after),
            f"{gain.spread[0]:.1f}; {gain.spread[1]:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")
    print()
    for name, artifact in (("tiny-deepseek-v3", example), ("with an outlier", outlier)):
        outliers = [found.describe() for found in artifact.manifest.input_outliers]
        print(f"Outliers of {name}: {'; '.join(outliers) or 'none'}.")


def _percent(errors: tuple[float, float]) -> str:
    return "; ".join(f"{error:.3%}" if error else "0" for error in errors)


if __name__ == "__main__":
    run(app)

"""AIConfigurator's answers are those that docs/roofline.md compares with, and are near ours.

It interpolates kernels that were measured on the cards, which the roofline does not know. The
figures are of the pinned version and of engines' versions in its tables.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.environments import environment, run_checked

from cluster.fit import EARLY_LAYER_S, Constants, error
from cluster.published import FIGURES, Figure
from cluster.roofline import FITTED

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

BY_HEADS = ("--tp-size", "8", "--moe-ep-size", "8", "--moe-tp-size", "1")
BY_SEQUENCES = ("--tp-size", "1", "--attention-dp-size", "8", *BY_HEADS[2:])
W4AFP8 = ("--moe-quant-mode", "w4afp8", "--database-mode", "EMPIRICAL")
#: Its system and options -> the figure, how near its answer is to what is written down (a sweep
#: chooses other chunks), and how near ours is to that.
ASKED: dict[str, tuple[tuple[str, ...], tuple[str, str, float], float, float]] = {
    "one": (("h200_sxm", *BY_HEADS), ("8xH200", "tpot", 1), 0.01, 0.4),
    "many": (("h200_sxm", *BY_HEADS), ("8xH200", "tpot", 64), 0.01, 0.4),
    "by sequences": (("h200_sxm", *BY_SEQUENCES), ("8xH200", "output", 1792), 0.03, 0.4),
    "one in W4AFP8": (("h100_sxm", *BY_HEADS, *W4AFP8), ("8xH100-80GB", "tpot", 1), 0.01, 0.2),
    "many in W4AFP8": (("h100_sxm", *BY_HEADS, *W4AFP8), ("8xH100-80GB", "tpot", 64), 0.01, 0.3),
    "prompts": (("h200_sxm", *BY_HEADS), ("8xH200", "prefill", 1), 0.01, 0.4),
}


def estimate(folder: Path, *words: str) -> dict[str, float]:
    """The numbers that `aiconfigurator cli estimate` prints for DeepSeek-V3."""
    program = environment("aiconfigurator").parent / "aiconfigurator"
    done = run_checked(
        [
            *(program, "cli", "estimate", "--no-color", "--log-level", "ERROR"),
            *("--model-path", "deepseek-ai/DeepSeek-V3", "--isl", "1024", "--osl", "2048"),
            *words,
        ],
        HF_HUB_OFFLINE="1",
        HF_HOME=str(folder),
        PYTHONWARNINGS="ignore",
    )
    found = re.findall(r"^ +(TTFT|TPOT|tokens/s): +([\d,.]+)", done, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found}


@pytest.mark.parametrize("asked", ASKED)
def test_its_answer_is_the_one_that_is_compared_and_ours_is_near(
    asked: str, tmp_path: Path
) -> None:
    (system, *options), (hardware, metric, batch), same, near = ASKED[asked]
    [figure] = [f for f in FIGURES if f.role == "model" and _is(f, hardware, metric, batch)]
    size = {"output": batch / 8, "prefill": 8}.get(metric, batch)
    mode = ("--estimate-mode", "static_ctx") if metric == "prefill" else ()
    found = estimate(
        tmp_path,
        *("--system", system, "--backend", "trtllm", "--batch-size", f"{size:.0f}"),
        *options,
        *mode,
    )
    answer = {
        "tpot": found.get("TPOT"),
        "output": found.get("tokens/s"),
        "prefill": 1000 * 8 * 1024 / found["TTFT"],
    }[metric]
    assert answer == pytest.approx(figure.value, rel=same)
    assert abs(error(figure, Constants(FITTED, EARLY_LAYER_S))) < near


def _is(figure: Figure, hardware: str, metric: str, batch: float) -> bool:
    return (figure.hardware, figure.metric, figure.batch) == (hardware, metric, batch)

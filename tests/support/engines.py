"""Engines for tests: artifacts and engine directories made once per process, and a driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from support.page_checks import check_engine
from support.synthetic import quantize_plainly

from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.engine import LLMEngine
from deepseek.engine.request import Request, SamplingParams, StepOutput
from deepseek.recipe import load_recipe
from quant_jobs.targets.embedded import pack_engine


@functools.cache
def make_artifact(source: Path, recipe: str, base: Path) -> Path:
    """A quantized checkpoint under `base`, rounded to nearest without calibration."""
    output = base / "artifacts" / f"{source.name}-{recipe}"
    output.parent.mkdir(parents=True, exist_ok=True)
    quantize_plainly(source, load_recipe(recipe), output)
    return output


@functools.cache
def make_engine(source: Path, recipe: str, base: Path) -> Path:
    """An engine directory of that artifact."""
    output = base / "engines" / f"{source.name}-{recipe}"
    pack_engine(ArtifactReader(make_artifact(source, recipe, base)), output)
    return output


def request(
    request_id: str, prompt: Iterable[int], max_tokens: int = 8, *, salt: str = "", **sampling
) -> Request:
    """Greedy and deaf to the end token unless told otherwise."""
    given = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens} | sampling
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(**given),
        cache_salt=salt,
    )


def run(
    engine: LLMEngine,
    requests: Iterable[Request] = (),
    check: Callable[[LLMEngine], None] = check_engine,
) -> dict[str, list[StepOutput]]:
    """Add the requests, step until nothing is left, and return every request's outputs. `check`
    looks at the engine after each step."""
    for item in requests:
        engine.add_request(item)
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        check(engine)
    return outputs


def tokens(outputs: Iterable[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(outputs: Iterable[StepOutput]) -> str:
    return "".join(output.text for output in outputs)

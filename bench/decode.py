"""Decode speed of engines beside the unquantized engine and transformers, in one run.

    python bench/decode.py --reference examples/tiny-deepseek-v3 --engine runs/demo/int8/engine

Every contender runs once per round, so a slow phase of the machine affects all of them. Prints
medians and their ratio to the unquantized engine. Only decoding is timed, without prefill.
transformers runs `generate` in FP32 with the attention and expert kernels of its own choice; it
gets dequantized weights, because it cannot run FP8 tiles on a CPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from support.engine_reference import reference_model

from deepseek.cli import make_app, make_progress, run
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.request import Request, SamplingParams

app = make_app(__doc__ or "")

#: Seconds that decoding `tokens` tokens for each prompt of a batch took.
Contender = Callable[[list[list[int]], int], float]


@app.command()
def main(
    reference: Annotated[Path, typer.Option(help="the unquantized source checkpoint")],
    engine: Annotated[list[Path] | None, typer.Option(help="engine directory; repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size; repeatable")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="tokens to decode per prompt")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    transformers: Annotated[bool, typer.Option(help="include transformers' generate")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON to stdout")] = False,
) -> None:
    """Measure and print tokens per second."""
    torch.set_num_threads(threads)
    batches = batch or [1, 8]
    contenders = open_contenders(reference, engine or [], max(batches), transformers)
    seconds: dict[tuple[str, int], list[float]] = {}
    with make_progress() as progress:
        task = progress.add_task("rounds", total=(rounds + 1) * len(batches) * len(contenders))
        for number in range(rounds + 1):  # the first one warms up
            for size in batches:
                prompts = make_prompts(size, prompt_tokens)
                for name, contender in contenders.items():
                    taken = contender(prompts, tokens)
                    if number:
                        seconds.setdefault((name, size), []).append(taken)
                    progress.advance(task)
    figures = [
        {
            "contender": name,
            "batch": size,
            "tokens_per_s": round(size * tokens / statistics.median(taken), 2),
            "ratio": round(
                statistics.median(seconds["unquantized", size]) / statistics.median(taken), 3
            ),
            "rounds": rounds,
            "threads": threads,
        }
        for (name, size), taken in seconds.items()
    ]
    print(json.dumps(figures, indent=2)) if as_json else show(figures)


def open_contenders(
    reference: Path, engines: list[Path], max_batch: int, transformers: bool
) -> dict[str, Contender]:
    """Load every contender, by name."""
    options = EngineOptions(max_batch_size=max(max_batch, 16), prefix_cache=False)
    contenders: dict[str, Contender] = {
        "unquantized": decode_with_engine(LLMEngine.from_checkpoint(reference, options))
    }
    for directory in engines:
        opened = LLMEngine.load(directory, options)
        name = opened.identity.recipe
        if name in contenders:
            name = str(directory)
        contenders[name] = decode_with_engine(opened)
    if transformers:
        contenders["transformers"] = decode_with_transformers(reference)
    return contenders


def decode_with_engine(engine: LLMEngine) -> Contender:
    def decode(prompts: list[list[int]], tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens + 1, temperature=0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            engine.add_request(
                Request(request_id=str(number), prompt_ids=tuple(prompt), sampling=sampling)
            )
        waiting = {str(number) for number in range(len(prompts))}
        while waiting:  # every prompt has its first token before the clock starts
            waiting -= {output.request_id for output in engine.step() if output.token_ids}
        started = time.perf_counter()
        num_timed = 0
        while engine.has_work:
            num_timed += sum(len(output.token_ids) for output in engine.step())
        taken = time.perf_counter() - started
        # Prompts whose prefill ended before the last step have decoded tokens before the clock.
        return taken * len(prompts) * tokens / num_timed

    return decode


def decode_with_transformers(reference: Path) -> Contender:
    model = reference_model(reference, attention="sdpa", experts="grouped_mm")

    @torch.inference_mode()
    def generate(ids: torch.Tensor, tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return time.perf_counter() - started

    def decode(prompts: list[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts)
        return generate(ids, tokens + 1) - generate(ids, 1)

    return decode


def make_prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 2000, (count, length), generator=generator).tolist()


def show(figures: list[dict[str, object]]) -> None:
    table = Table("contender", "batch", "tokens/s", "against unquantized")
    for row in figures:
        table.add_row(
            str(row["contender"]), str(row["batch"]), str(row["tokens_per_s"]), f"{row['ratio']} x"
        )
    Console().print(table)


if __name__ == "__main__":
    run(app)

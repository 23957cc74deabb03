"""`python -m cluster plan`: what fits which machines, before anything is read or rented."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from cluster.hardware import parse_hardware
from cluster.matrix import TARGETS
from cluster.plan import better_recipes, make_plan
from cluster.show import as_json, print_plan
from deepseek.cli import make_app, make_console, run
from deepseek.models import MODELS
from deepseek.recipe import builtin_recipes, load_recipe
from deepseek.source.origin import load_model_config

app = make_app(
    """Plan DeepSeek-V3 or a model of its family on machines, before anything is read or rented.

    What quantizing takes there: `python -m quant_jobs estimate`.
    """
)


@app.callback()
def commands() -> None:
    """Keeps the word `plan` in the command line, though it is the only command."""


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)} (shapes built in), or a checkpoint directory.")
    ],
    recipe: Annotated[str, typer.Option(help="Built-in recipe's name, or a YAML file.")],
    hardware: Annotated[str, typer.Option(help="COUNTxNAME, as in 8xH800-80GB; or cpu.")],
    target: Annotated[
        str,
        typer.Option(help=f"{', '.join(TARGETS)}; auto takes the first server that loads."),
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(help="Tokens of one request [default: 8192 or the model's limit].")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests that must fit at once.")] = 1,
    mtp: Annotated[bool, typer.Option("--mtp", help="Load the MTP layer too.")] = False,
    engine_version: Annotated[
        str | None,
        typer.Option(help="Version of the target [default: the first in docs/deployability.md]."),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Layout of the target's directory. trtllm: mixed (FP8 blocks beside quantized "
            "experts) or single (BF16 beside them) [default: mixed; the plan shows both]; sglang: "
            "w8a8_int8, blockwise_int8, compressed-tensors or w4afp8 [default: the one that fits]."
        ),
    ] = None,
    as_machine: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Does the recipe fit this hardware, will an engine load it, and what would?

    Exit code 0: fits and loads; 1: does not; 2: a mistake in the command.

    \b
    Examples:
      python -m cluster plan --model deepseek-v3 --recipe int4 --hardware 8xH800-80GB
      python -m cluster plan --model deepseek-v3 --recipe int8 --hardware 16xH800-80GB \\
          --context 32768 --concurrency 8 --json
      python -m cluster plan --model deepseek-v3 --recipe int8-experts --hardware 8xH200 \\
          --target trtllm --dialect single
      python -m cluster plan --model examples/tiny-deepseek-v3 --recipe int8 --hardware cpu
    """
    config = load_model_config(model)
    answer = make_plan(
        config,
        load_recipe(recipe),
        parse_hardware(hardware),
        target=target,
        context=context,
        concurrency=concurrency,
        mtp=mtp,
        dialect=dialect,
        engine_version=engine_version,
    )
    others = [load_recipe(name) for name in builtin_recipes()]
    alternatives = better_recipes(answer, config, others)
    if as_machine:
        sys.stdout.write(json.dumps(as_json(answer, model, alternatives), indent=2) + "\n")
    else:
        print_plan(answer, model, alternatives, make_console())
    raise typer.Exit(0 if answer.good else 1)


if __name__ == "__main__":
    run(app)

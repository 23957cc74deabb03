"""`python -m cluster plan`: what fits which machines, before anything is read or rented."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from cluster.hardware import parse_device, parse_hardware
from cluster.matrix import TARGETS
from cluster.plan import better_recipes, make_plan
from cluster.show import as_json, print_plan
from cluster.show_slo import print_fleets, slo_json
from cluster.slo import check_workload, parse_slo, recommend
from deepseek.cli import make_app, make_console, run
from deepseek.errors import DeployError
from deepseek.models import MODELS
from deepseek.recipe import builtin_recipes, load_recipe
from deepseek.source.origin import load_model_config

app = make_app(
    """Plan DeepSeek-V3 or a model of its family on machines, before anything is read or rented.

    What quantizing takes there: `python -m quant_jobs estimate`.
    """
)

#: Option -> why `--slo` has none of it.
_WITHOUT = {
    "--context": "plans for --isl + --osl tokens",
    "--concurrency": "works out how many requests run at once",
    "--mtp": "knows nothing of speculation",
}


@app.callback()
def commands() -> None:
    """Keeps the word `plan` in the command line, though it is the only command."""


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)} (shapes built in), or a checkpoint directory.")
    ],
    hardware: Annotated[
        str,
        typer.Option(
            help="COUNTxNAME, as in 8xH800-80GB; or cpu. With --slo the name alone, or the most "
            "that there are."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Built-in recipe's name, or a YAML file. Needed without --slo, which tries all "
            "built-in ones."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(help=f"{', '.join(TARGETS)}; auto takes the first server that loads."),
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(help="Tokens of one request [default: 8192 or the model's limit].")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests that must fit at once [default: 1].")
    ] = None,
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
    slo: Annotated[
        str | None,
        typer.Option(
            help="Latency target, as in ttft=2s,tpot=50ms: recommends the fewest nodes and the "
            "recipe for --rps requests of --isl + --osl tokens."
        ),
    ] = None,
    rps: Annotated[float | None, typer.Option(help="Requests per second, for --slo.")] = None,
    isl: Annotated[int | None, typer.Option(help="Prompt tokens, for --slo.")] = None,
    osl: Annotated[int | None, typer.Option(help="Output tokens, for --slo.")] = None,
    as_machine: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Does the recipe fit this hardware, will an engine load it, and what would? With --slo: how
    many nodes, and of which recipe, hold a latency target?

    Exit code 0: fits and loads, or the target is held; 1: does not; 2: a mistake in the command, or
    a target that nothing holds.

    \b
    Examples:
      python -m cluster plan --model deepseek-v3 --recipe int4 --hardware 8xH800-80GB
      python -m cluster plan --model deepseek-v3 --recipe int8 --hardware 16xH800-80GB \\
          --context 32768 --concurrency 8 --json
      python -m cluster plan --model deepseek-v3 --recipe int8-experts --hardware 8xH200 \\
          --target trtllm --dialect single
      python -m cluster plan --model examples/tiny-deepseek-v3 --recipe int8 --hardware cpu
      python -m cluster plan --model deepseek-v3 --hardware H200 --slo ttft=2s,tpot=50ms \\
          --rps 10 --isl 2048 --osl 512
    """
    config = load_model_config(model)
    if slo is not None:
        leave_out = {"--context": context, "--concurrency": concurrency, "--mtp": mtp or None}
        for name, value in leave_out.items():
            if value is not None:
                raise DeployError(f"--slo {_WITHOUT[name]}; leave {name} out")
        asked, workload = parse_slo(slo), check_workload(rps, isl, osl)
        device, most = parse_device(hardware)
        fleets = recommend(
            config,
            [load_recipe(name) for name in ([recipe] if recipe else builtin_recipes())],
            device,
            asked,
            workload,
            most_gpus=most,
            target=target,
            dialect=dialect,
            engine_version=engine_version,
        )
        if as_machine:
            found = slo_json(fleets, model, device.name, asked, workload)
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
        else:
            print_fleets(fleets, model, device.name, asked, workload, make_console())
        return
    for name, given in {"--rps": rps, "--isl": isl, "--osl": osl}.items():
        if given is not None:
            raise DeployError(f"{name} is about --slo; add that, or leave {name} out")
    if recipe is None:
        raise DeployError("--recipe is missing; name one, or a latency target with --slo")
    answer = make_plan(
        config,
        load_recipe(recipe),
        parse_hardware(hardware),
        target=target,
        context=context,
        concurrency=1 if concurrency is None else concurrency,
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

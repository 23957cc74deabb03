"""`python -m quant_jobs`: the job's steps as commands, in the order in which they run.

    quantize -> build -> evaluate -> gate -> report

This file defines names, options and output of the commands. The work is done by the file named
after the step, imported when the command runs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from quant_jobs.evaluation.record import Evaluation
    from quant_jobs.evaluation.served import Served

from deepseek.cli import make_app, run, show_lines
from deepseek.errors import CalibrationError, DeployError
from deepseek.models import MODELS
from deepseek.outputs import check_apart, check_directory
from quant_jobs.cost import BLOCK_TOKENS, CALIBRATION_TOKENS, STORAGE
from quant_jobs.options import (
    ConcurrencyOption,
    ContextOption,
    CpusOption,
    DeviceOption,
    DialectOption,
    EngineOption,
    EngineVersionOption,
    EpOption,
    EvaluationOption,
    HardwareOption,
    JsonFlag,
    KVOption,
    MtpOption,
    StageOption,
    TargetOption,
    TpOption,
)

app = make_app(
    """Quantize DeepSeek-V3 or a model of its family, build an engine, prove that it is still good.

    \b
    quantize   source checkpoint + recipe  -> quantized checkpoint
    submit     the same, or a build, as a job of a Ray cluster
    measure    the largest inputs of the experts, for a checkpoint made without them
    build      quantized checkpoint        -> engine for one target
    evaluate   engine against the source   -> evaluation.json
    gate       evaluation against limits   -> verdict beside the engine; exit 1 if it fails
    report     all of it                   -> one HTML page
    estimate   recipe, number of nodes     -> minutes, memory and storage of quantize, on paper
    synthesize sizes                       -> a source of random weights, to measure with
    """
)


@app.command()
def quantize(
    model: Annotated[Path, typer.Option(help="Source checkpoint directory (BF16 or FP8 blocks).")],
    recipe: Annotated[str, typer.Option(help="Built-in recipe's name, or a YAML file.")],
    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="FILE[=WEIGHT]",
            help="Calibration data: plain text in UTF-8 (.txt, .md), or records (.jsonl, .json, "
            ".parquet) with `text`, `messages`, `conversations`, `input_ids` or `prompt`, or ids "
            "(.safetensors). May be given several times; blocks are drawn in proportion to the "
            "weights (1 without one).",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory of the quantized checkpoint.")],
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ray workers; the output's bytes do not depend on it. 0: no Ray, one worker in "
            "this process.",
        ),
    ] = 1,
    device: DeviceOption = "cpu",
    cpus_per_worker: CpusOption = 1,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read a finished output whole; without it, one above 256 MB is checked by its "
            "files' sizes and headers.",
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Quantize a checkpoint layer by layer, on Ray.

    A rerun of the same command resumes after the last published layer. Of a finished output it
    makes again what is missing or damaged.

    \b
    Examples:
      python -m quant_jobs quantize --model examples/tiny-deepseek-v3 --recipe int8 \\
          --calibration examples/tiny-deepseek-v3/calibration.txt --output runs/int8
      ray job submit --working-dir . -- python -m quant_jobs quantize --model /data/DeepSeek-V3 \\
          --recipe int4 --calibration /data/text.jsonl=3 --calibration /data/code.jsonl=1 \\
          --output /data/v3-int4 --workers 8
    """
    from quant_jobs.calibration.token_blocks import CalibrationSource
    from quant_jobs.quantize import run_quantize

    sources = [CalibrationSource.parse(argument) for argument in calibration]
    with redirect_stdout(sys.stderr):  # Ray prints to stdout when a node dies
        manifest = run_quantize(
            model,
            recipe,
            sources,
            output,
            workers,
            device=device,
            cpus_per_worker=cpus_per_worker,
            verify=verify,
        )
    result = {
        "output": str(output),
        "recipe": manifest.recipe.name,
        "artifact_digest": manifest.digest,
        "layers": len(manifest.layers),
        "fallbacks": sum(fallback.count for fallback in manifest.fallbacks),
    }
    _show(
        result,
        as_json,
        f"{output}: {result['recipe']}, {result['layers']} files, "
        f"{result['fallbacks']} fallbacks, artifact {manifest.digest[:16]}",
    )


@app.command()
def submit(
    output: Annotated[Path, typer.Option(help="On storage that all nodes share.")],
    model: Annotated[
        Path | None, typer.Option(help="As for quantize; paths as the cluster sees them.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Built-in recipe's name, or a YAML file.")
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(metavar="FILE[=WEIGHT]", help="As above.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="In place of --model, --recipe and --calibration: submit a build of it."),
    ] = None,
    target: TargetOption = "embedded",
    tp: TpOption = None,
    ep: EpOption = None,
    kv_cache: KVOption = None,
    dialect: DialectOption = None,
    engine_version: EngineVersionOption = None,
    mtp: MtpOption = False,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    hardware: HardwareOption = "8xH800-80GB",
    stage: StageOption = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers, at least 1.")] = 1,
    device: DeviceOption = "cpu",
    cpus_per_worker: CpusOption = 1,
    address: Annotated[
        str | None, typer.Option(help="Job server, http://HEAD:8265; without it, $RAY_ADDRESS.")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory with the code, sent along (below 100 MiB; without .git, .venv, runs, "
            "caches and what .gitignore or .rayignore names). Not given: the nodes have the code."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log until the job ends.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Submit `quantize`, or with --checkpoint `build`, to a Ray cluster, under an id that follows
    from the job.

    The same command again finds the job: running, it is attached to; failed or stopped, it is
    submitted again and resumes. Exit code 1: with --wait, the job failed or was stopped.

    The id follows from the output's path, the recipe, and the content of the calibration files and
    of the model (its fingerprint, no weights are read); of a build from the checkpoint's digest,
    the target and its options. Where a file cannot be read from here, from its path.

    \b
    Examples:
      python -m quant_jobs submit --address http://head:8265 --working-dir . --wait \\
          --model /data/DeepSeek-V3 --recipe int4-gptq --calibration /data/text.jsonl \\
          --output /data/v3-int4 --workers 8
      python -m quant_jobs submit --address http://head:8265 --checkpoint /data/v3-int4 \\
          --target trtllm --tp 8 --ep 8 --output /data/v3-int4-trtllm --workers 8
    """
    from quant_jobs import submit as jobs
    from quant_jobs.submission import Submission, make_build, make_quantization

    build_options = {
        "tp": tp,
        "ep": ep,
        "kv_cache": kv_cache,
        "dialect": dialect,
        "engine_version": engine_version,
        "mtp": mtp or None,
        "context": context,
        "concurrency": concurrency,
    }
    job: Submission
    if checkpoint is not None:
        own: dict[str, object] = {
            **{"model": model, "recipe": recipe, "calibration": calibration},
            **{"device": device != "cpu", "cpus_per_worker": cpus_per_worker != 1},
        }
        _refuse_given(own, "a quantization, and --checkpoint submits a build")
        from quant_jobs.build_options import BuildOptions

        chosen = {name: value for name, value in build_options.items() if value is not None}
        options = BuildOptions(hardware=hardware, workers=workers, **chosen)  # type: ignore[arg-type]
        job = make_build(checkpoint, target, output, options, stage)
    else:
        own = {**build_options, "stage": stage}
        _refuse_given(own, "a build, which --checkpoint submits")
        if model is None or recipe is None or not calibration:
            raise DeployError(
                "give --model, --recipe and --calibration to submit a quantization, or "
                "--checkpoint to submit a build"
            )
        job = make_quantization(
            model, recipe, calibration, output, workers, device, cpus_per_worker
        )
    client = jobs.connect_to_jobs(address)
    submitted = jobs.submit(client, job, working_dir)
    if wait and submitted.outcome != "succeeded":
        typer.echo(submitted.describe(), err=True)
        status = jobs.follow(client, submitted.submission_id)
        submitted = replace(submitted, status=status)
        text = f"{submitted.submission_id}: {status}"
    else:
        text = submitted.describe()
    _show(asdict(submitted), as_json, *text.split("\n"))
    if wait and submitted.status != "SUCCEEDED":
        raise typer.Exit(1)


@app.command()
def measure(
    checkpoint: Annotated[Path, typer.Option(help="Quantized checkpoint, made by `quantize`.")],
    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="FILE[=WEIGHT]",
            help="Calibration data, as for quantize; how much of it, the checkpoint's recipe says.",
        ),
    ],
    workers: Annotated[
        int, typer.Option(min=0, help="Ray workers, as for quantize. 0: no Ray.")
    ] = 1,
    device: DeviceOption = "cpu",
    cpus_per_worker: CpusOption = 1,
    as_json: JsonFlag = False,
) -> None:
    """Measure the largest inputs of the routed experts, for a checkpoint that was made without.

    One calibration pass through the quantized checkpoint; the source is not needed and no tensor
    changes. Writes input_maxima.json, and intserve.json, which lists it: the checkpoint gets
    another digest, so engines built from it before must be built again. A checkpoint that has its
    maxima is verified and kept. A killed run begins anew.

    \b
    Examples:
      python -m quant_jobs measure --checkpoint runs/int4 --workers 0 \\
          --calibration examples/tiny-deepseek-v3/calibration.txt
    """
    from quant_jobs.calibration.token_blocks import CalibrationSource
    from quant_jobs.measure import run_measure

    sources = [CalibrationSource.parse(argument) for argument in calibration]
    with redirect_stdout(sys.stderr):  # Ray prints to stdout when a node dies
        result = run_measure(
            checkpoint, sources, workers, device=device, cpus_per_worker=cpus_per_worker
        )
    _show(result.summary(), as_json, *result.describe(checkpoint))


@app.command()
def build(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Quantized checkpoint; or a source as it is, for a baseline engine."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Engine directory.")] = None,
    target: TargetOption = "embedded",
    tp: TpOption = None,
    ep: EpOption = None,
    kv_cache: KVOption = None,
    dialect: DialectOption = None,
    engine_version: EngineVersionOption = None,
    mtp: MtpOption = False,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    hardware: HardwareOption = "8xH800-80GB",
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ray workers that build its files; the bytes do not depend on it. 0: no Ray.",
        ),
    ] = 0,
    stage: StageOption = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Build nothing: check an engine directory, every byte, as its target's loader "
            "would read it; with --checkpoint also bit for bit against that artifact.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Build the engine of one target from a checkpoint.

    A rerun of the same command verifies what is there and makes what is missing.

    \b
    Examples:
      python -m quant_jobs build --checkpoint runs/int8 --target embedded --output runs/int8-engine
      python -m quant_jobs build --checkpoint examples/tiny-deepseek-v3 --output runs/baseline
      python -m quant_jobs build --checkpoint /data/v3-int4 --target trtllm --tp 8 --ep 8 \\
          --kv-cache fp8 --workers 8 --output /data/v3-int4-trtllm --stage /local/v3-int4-trtllm
      python -m quant_jobs build --checkpoint /data/v3-w4a8 --target sglang --tp 8 \\
          --output /data/v3-w4a8-sglang
      python -m quant_jobs build --check /data/v3-int4-trtllm --checkpoint /data/v3-int4
    """
    from quant_jobs.build import run_build, run_stage
    from quant_jobs.build_options import BuildOptions

    if check is not None:
        from quant_jobs.check import run_check

        if output is not None or stage is not None:
            raise DeployError("--check builds nothing; leave --output and --stage out")
        report = run_check(check, checkpoint)
        _show(report.model_dump(mode="json"), as_json, *report.describe())
        return
    if checkpoint is None or output is None:
        raise DeployError("build needs --checkpoint and --output (or --check DIR)")
    options = BuildOptions(
        hardware=hardware,
        tp=tp,
        ep=ep,
        kv_cache=kv_cache,
        dialect=dialect,
        engine_version=engine_version,
        mtp=mtp,
        context=context,
        concurrency=concurrency,
        workers=workers,
    )
    if stage is not None:
        check_directory(stage, "--stage")
        check_apart(stage, output, "the engine", "--stage")
    with redirect_stdout(sys.stderr):  # Ray prints to stdout when a node dies
        if target == "embedded" and stage is not None:  # one file: --workers are those that copy
            options = replace(options, workers=0)
        result = run_build(checkpoint, target, output, options)
        copies = None if stage is None else run_stage(output, stage, workers)
    content, lines = result.model_dump(mode="json"), result.describe()
    if copies is not None:
        content["stage"] = copies.model_dump(mode="json")
        lines += copies.describe()
    _show(content, as_json, *lines)
    if copies is not None:
        copies.check()


@app.command()
def evaluate(
    reference: Annotated[
        Path,
        typer.Option(
            help="The source checkpoint that the engine was quantized from, or a stored reference "
            "(--keep-reference) of it."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for evaluation.json or served.json.")],
    engine: Annotated[
        Path | None, typer.Option("--engine", help="Engine directory made by `build`; or --url.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A running service, http://HOST:PORT, to measure in place of an engine."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Held-out data, a file as for quantize; not the calibration data. A stored "
            "reference holds its own."
        ),
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=2, help="Blocks of text, spread evenly over the file [24].")
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option(min=8, help="Tokens per block, the first one BOS [512].")
    ] = None,
    decode_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens per speed run and sequence; 0 measures no speed.")
    ] = 32,
    keep_reference: Annotated[
        Path | None,
        typer.Option(
            help="Keep the run of the source here, to name it as --reference later. With --url: "
            "[OUTPUT/reference], and one that is there is used."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --url: the model's name there [the only one].")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="With --url: file with the service's key; without it, $INTSERVE_API_KEY. Keys "
            "have no place on a command line."
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="With --url: blocks that are asked for at a time.")
    ] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores but one without it.")
    ] = None,
    kv_cache: Annotated[
        Literal["bf16", "fp8", "int8"] | None,
        typer.Option(
            help="KV format to measure, as the engine's target lays it out; without it, as the "
            "engine was built. The verdict then admits this one and no other."
        ),
    ] = None,
    kernels: Annotated[
        Literal["auto", "native", "torch"],
        typer.Option(
            help="Kernels of the embedded engine: the compiled ones, PyTorch's, or the compiled "
            "ones where they were built."
        ),
    ] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Measure an engine, or a running service, against the source of the model.

    Of an engine: perplexity, KL, top-1 agreement, size, decode speed (evaluation.json, which `gate`
    judges). An engine for another target than `embedded` is executed in memory with the values, the
    roundings and the KV layout of its target, and its speed is not measured. Of a service (--url):
    perplexity, a lower bound of the KL and top-1 agreement through the logprobs that it returns,
    latency and throughput (served.json). A killed run against a service goes on where it was.

    \b
    Examples:
      python -m quant_jobs evaluate --engine runs/int8-engine \\
          --reference examples/tiny-deepseek-v3 --data examples/tiny-deepseek-v3/heldout.txt \\
          --output runs/int8-evaluation
      python -m quant_jobs evaluate --engine E --reference DeepSeek-V3 --data heldout.txt \\
          --output out --num-blocks 64 --block-tokens 2048 --keep-reference ref --json
      python -m quant_jobs evaluate --url http://127.0.0.1:8000 --reference ref --output served
    """
    from quant_jobs.evaluate import Settings, run_evaluate, run_evaluate_url

    settings = Settings(
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        decode_tokens=decode_tokens,
        num_threads=threads,
        kv_cache=kv_cache,
        kernels=kernels,
    )
    result: Evaluation | Served
    if url is not None and engine is None:
        if kv_cache is not None:
            raise CalibrationError("a service has its own KV format; leave --kv-cache out")
        result = run_evaluate_url(
            url,
            reference,
            data,
            output,
            settings,
            model=model,
            api_key_file=api_key_file,
            concurrency=concurrency,
            keep_reference=keep_reference,
        )
    elif engine is not None and url is None:
        if model is not None or api_key_file is not None:
            raise CalibrationError("--model and --api-key-file go with --url; leave them out")
        result = run_evaluate(
            engine, reference, data, output, settings, keep_reference=keep_reference
        )
    else:
        raise CalibrationError(
            "give either --engine DIR or --url URL, not both and not neither: what is measured"
        )
    _show(result.model_dump(mode="json"), as_json, *result.describe())


@app.command()
def gate(
    engine: EngineOption,
    evaluation: EvaluationOption,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ed25519 private key in PEM, readable by its owner alone: signs the verdict, so "
            "that a server can require it (`serve_app --require-signature`).",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge an evaluation by the recipe's limits and write the verdict beside the engine.

    Exit code 0: passed, may be served. 1: failed, with one line per reason.

    \b
    Examples:
      python -m quant_jobs gate --engine runs/int8-engine --evaluation runs/int8-evaluation
      python -m quant_jobs gate --engine E --evaluation OUT --sign-key gate.key
      python -m quant_jobs gate --engine E --evaluation OUT --json | jq .verdict
    """
    from quant_jobs.gate import run_gate

    outcome = run_gate(engine, evaluation, sign_key=sign_key)
    _show(outcome.summary(), as_json, *outcome.describe())
    if not outcome.verdict.passed:
        raise typer.Exit(1)


@app.command()
def report(
    engine: EngineOption,
    evaluation: EvaluationOption,
    output: Annotated[Path, typer.Option(help="The HTML file; a .json goes beside it.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The quantized checkpoint, to check that the engine is made of it."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write one self-contained HTML page: verdict, sizes, errors, coverage, KL, recipe, digests.

    \b
    Examples:
      python -m quant_jobs report --engine runs/int8-engine --evaluation runs/int8-evaluation \\
          --output runs/int8.html
    """
    from quant_jobs.report import run_report

    result = run_report(engine, evaluation, output, checkpoint=checkpoint)
    _show(result.model_dump(mode="json"), as_json, f"{output} and {output.with_suffix('.json')}")


@app.command()
def estimate(
    recipe: Annotated[str, typer.Option(help="Built-in recipe's name, or a YAML file.")],
    nodes: Annotated[int, typer.Option(help="Nodes of 8 x H800-80GB.")],
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)} (shapes built in), or a checkpoint directory.")
    ] = "deepseek-v3",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = CALIBRATION_TOKENS,
    block_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of one block [{BLOCK_TOKENS}, or what the model's attention is dense on]."
        ),
    ] = None,
    storage: Annotated[
        float, typer.Option(help="GB/s of one node's storage, reads and writes together.")
    ] = STORAGE / 1e9,
    as_json: JsonFlag = False,
) -> None:
    """How long quantizing takes on nodes of GPUs, and how much memory: on paper.

    Exit code 0: fits in memory; 1: does not; 2: a mistake in the command.

    \b
    Examples:
      python -m quant_jobs estimate --nodes 1 --recipe int4-gptq
      python -m quant_jobs estimate --nodes 2 --recipe int8-smoothquant --tokens 131072 \\
          --block-tokens 2048 --storage 2 --json
    """
    from quant_jobs.cost.estimate import as_json as as_json_object
    from quant_jobs.cost.estimate import print_estimate
    from quant_jobs.estimate import run_estimate

    result = run_estimate(
        model, recipe, nodes, tokens=tokens, block_tokens=block_tokens, storage_gb=storage
    )
    if as_json:
        typer.echo(json.dumps(as_json_object(result, model), indent=2))
    else:
        print_estimate(result, model)
    raise typer.Exit(0 if result.fits else 1)


@app.command(name="synthesize")
def synthesize_command(
    output: Annotated[Path, typer.Option(help="Directory of the checkpoint; absent or empty.")],
    preset: Annotated[
        Literal["deepseek-v3", "deepseek-v3.2", "kimi-k2", "moonlight", "small", "small-v3.2"],
        typer.Option(help="Shapes of one layer: a release's, or a test's of a few kilobytes."),
    ] = "deepseek-v3",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers, dense ones included.")] = 4,
    dense_layers: Annotated[int, typer.Option(min=0, help="The first so many are dense.")] = 1,
    mtp_layers: Annotated[int, typer.Option(min=0, help="MTP layers behind them.")] = 0,
    experts: Annotated[int, typer.Option(min=1, help="Routed experts per MoE layer.")] = 16,
    experts_per_token: Annotated[
        int | None, typer.Option(min=1, help="As the release, or all a token can reach, without.")
    ] = None,
    vocab: Annotated[
        int | None,
        typer.Option(
            min=1, help="Embedding and head take 4 bytes x hidden per token: 3.7 GB without it."
        ),
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Of a dense MLP.")] = None,
    moe_intermediate: Annotated[int | None, typer.Option(min=1, help="Of one expert.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and sizes, same bytes.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Make a checkpoint of random weights in a release's format, to measure a job with.

    \b
    Examples:
      python -m quant_jobs synthesize --output runs/v3-layers --layers 4 --experts 16 --vocab 1024
      python -m quant_jobs synthesize --output runs/kimi --preset kimi-k2 --layers 2 --vocab 1024
      python -m quant_jobs synthesize --output runs/small --preset small --layers 3 --experts 8
    """
    from deepseek.source.synthetic import Size
    from quant_jobs.synthesize import run_synthesize

    size = Size(
        layers=layers,
        dense_layers=dense_layers,
        mtp_layers=mtp_layers,
        experts=experts,
        experts_per_token=experts_per_token,
        vocab=vocab,
        hidden=hidden,
        intermediate=intermediate,
        moe_intermediate=moe_intermediate,
        heads=heads,
    )
    result = run_synthesize(output, size, preset, seed)
    _show(
        result.model_dump(),
        as_json,
        f"{output}: {result.layers} layers, {result.parameters / 1e9:.3f} B parameters, "
        f"{result.bytes / 1e9:.3f} GB in {result.shards} files",
    )


def _refuse_given(options: Mapping[str, object], purpose: str) -> None:
    """Refuse options that are given, by name, and are for something else."""
    for name, value in options.items():
        if value:
            raise DeployError(f"--{name.replace('_', '-')} is for {purpose}; leave one of them out")


def _show(result: dict[str, Any], as_json: bool, *lines: str) -> None:
    """Print the result on stdout: one JSON object, or lines for a person."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True))
    else:
        show_lines(lines)


if __name__ == "__main__":
    run(app)

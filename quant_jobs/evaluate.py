"""Step 6, evaluate: measures an engine, or a running service, against the source of the model.

An engine is loaded as its target loads it (deepseek/target_engine.py), so that the measured
computation is the served one: an embedded engine with its own kernels and KV format; an engine for
another target with the values, the roundings and the KV layout of that target, executed by the
embedded engine, in memory. The source runs unquantized with a BF16 cache, or a stored reference is
read in its place (`evaluation/reference.py`). One block of text is scored at a time, so that logits
[block, vocabulary] of each model are in memory. Decode speed is measured in the same process, in
turns (`evaluation/speed.py`), of embedded engines: an emulation's says nothing about its target. A
service is measured over HTTP (`evaluation/url.py`),
always against a stored reference, which is made first where --reference is the source.

`evaluate` measures only; `gate` compares the result with the recipe's limits.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.engine_manifest import CacheFormat
from deepseek.artifact.verdict import EMBEDDED
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions, KernelChoice
from deepseek.errors import ArtifactError, CalibrationError
from deepseek.inventory import tensors
from deepseek.outputs import check_apart, check_directory, check_writable, make_directory
from deepseek.source.checkpoint import CheckpointReader, scale_name
from deepseek.target_engine import check_kv_format, load_as_target
from quant_jobs.calibration.token_blocks import TokenBlocks, load_token_blocks
from quant_jobs.evaluation.event_loop import run_in_order
from quant_jobs.evaluation.load import is_loopback, measure_load
from quant_jobs.evaluation.lumped import CompressedBlock
from quant_jobs.evaluation.pairs import publishing
from quant_jobs.evaluation.record import (
    EVALUATION,
    TOKENS,
    DecodeSpeed,
    Evaluation,
    HeldOut,
    LumpedKL,
    write_evaluation,
)
from quant_jobs.evaluation.reference import (
    Reference,
    is_reference,
    read_reference,
    write_reference,
)
from quant_jobs.evaluation.scorers import (
    BlockScores,
    compress_blocks,
    score_against,
    score_blocks,
    score_served,
    summarize,
    summarize_lumped,
)
from quant_jobs.evaluation.served import LoadPoint, Served, write_served
from quant_jobs.evaluation.service_client import ServiceClient, base_url, read_key
from quant_jobs.evaluation.sizes import (
    artifact_schemes,
    bytes_by_name,
    group_sizes,
    source_config,
)
from quant_jobs.evaluation.speed import BATCH_SIZES, measure_decode
from quant_jobs.evaluation.tokens import write_tokens
from quant_jobs.evaluation.url import ServedText, forget_partial, measure_text

#: Where --url keeps the reference run below --output, unless --keep-reference names a place.
REFERENCE_FOLDER = "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much to measure. `num_blocks` and `block_tokens` None: 24 and 512, or as the stored
    reference has them. `decode_tokens` 0 skips the speed measurement; `num_threads` None takes all
    cores but one; `kv_cache` None measures the KV format that the engine was built with;
    `kernels` is the engine's option."""

    num_blocks: int | None = None
    block_tokens: int | None = None
    decode_tokens: int = 32
    num_threads: int | None = None
    kv_cache: CacheFormat | None = None
    kernels: KernelChoice = "auto"


def run_evaluate(
    engine_dir: Path,
    reference_dir: Path,
    data: Path | None,
    output: Path,
    settings: Settings,
    *,
    keep_reference: Path | None = None,
) -> Evaluation:
    """Measure an engine; write OUTPUT/evaluation.json and OUTPUT/tokens.safetensors.

    `reference_dir` is the source checkpoint, which then runs on `data` and leaves a stored
    reference in `keep_reference` if that is given; or such a stored reference, which holds its own
    text (`data` is None).

    Raises:
        ArtifactError: the engine is incomplete, or was not made from this reference; the stored
            reference is damaged; or OUTPUT lies in one of the two.
        DeployError: the target would not load the engine, has no such KV format, or the emulated
            engine does not fit into this machine's memory.
        CheckpointError, ConfigError: the reference cannot be read.
        CalibrationError: the data is absent, of an unknown kind, malformed or too short, or is
            given beside a stored reference.
        OutputError: the output cannot be written; seen before anything is measured if it can be.
    """
    check_directory(output)
    check_apart(output, engine_dir, "the engine")
    check_apart(output, reference_dir, "the reference")
    built = read_engine(engine_dir)
    options = _engine_options(settings.kv_cache, settings)
    kv_cache = check_kv_format(built.target, settings.kv_cache or built.kv_cache)
    no_speed = _why_no_speed(built, settings, is_reference(reference_dir))
    speed: tuple[DecodeSpeed, ...] = ()
    if is_reference(reference_dir):
        _refuse_text(reference_dir, data, settings, keep_reference)
        reference = read_reference(reference_dir)
        _check_source(built, reference.record.fingerprint, reference_dir)
        ids_BT, held_out = reference.ids, reference.record.data
        check_writable(output)  # now, not after an hour
        quantized = load_as_target(engine_dir, options)
        scores = score_against(reference, quantized)
        config = source_config(built, len(reference.tensor_bytes))
        stored_bytes = bytes_by_name(config, reference.tensor_bytes)
        source_bytes, digest = reference.record.source_bytes, reference.record.digest
    else:
        source = CheckpointReader(reference_dir)
        _check_source(built, source.fingerprint, reference_dir)
        blocks, held_out = _load_text(data, reference_dir, settings)
        ids_BT = blocks.ids
        for place in (output, keep_reference or output):
            check_writable(place)
        quantized = load_as_target(engine_dir, options)
        original = _load_source(reference_dir, settings)
        scores = score_blocks(original, quantized, ids_BT)
        if no_speed is None:
            speed = measure_decode(original, quantized, ids_BT, settings.decode_tokens, BATCH_SIZES)
        config, stored_bytes = source.config, source.stored_bytes
        source_bytes, digest = source.file_bytes, None
        if keep_reference is not None:
            kept = [score.reference for score in scores]
            _write_reference(keep_reference, source, ids_BT, held_out, kept)

    make_directory(output)
    with publishing(output, values=TOKENS, record=EVALUATION) as staging:
        tokens = write_tokens(staging, ids_BT, [score.tokens for score in scores])
        evaluation = Evaluation(
            engine_digest=built.digest,
            artifact_digest=built.artifact_digest,
            recipe=built.recipe,
            target=built.target,
            arithmetic=quantized.identity.arithmetic,
            executed_by=EMBEDDED,
            kv_cache=kv_cache,
            reference_fingerprint=built.source_fingerprint,
            stored_reference=digest,
            data=held_out,
            **summarize([score.tokens for score in scores]),
            lumped_kl=_lumped(scores),
            artifact_bytes=built.manifest.num_bytes if built.manifest else source_bytes,
            sizes=group_sizes(config, stored_bytes, artifact_schemes(built, config)),
            engine_bytes=built.num_bytes,
            speed=speed,
            no_speed=no_speed,
            tokens_sha256=tokens.sha256,
            tools=_tools(),
        )
        write_evaluation(staging, evaluation)
    return evaluation


def run_evaluate_url(
    url: str,
    reference_dir: Path,
    data: Path | None,
    output: Path,
    settings: Settings,
    *,
    model: str | None = None,
    api_key_file: Path | None = None,
    concurrency: int = 4,
    keep_reference: Path | None = None,
) -> Served:
    """Measure a running service; write OUTPUT/served.json and OUTPUT/served.safetensors.

    `reference_dir` and `data` are as for `run_evaluate`; a reference run is kept in
    `keep_reference`, or in OUTPUT/reference, and read there by the next run. `model` None: the only
    one of the service. A run that is killed goes on where it was.

    Raises:
        ServiceError: the service cannot be reached, refuses, has no such model, does not do echo
            with logprobs, has another vocabulary, or a context that is too short.
        ArtifactError, CalibrationError, CheckpointError, ConfigError, OutputError: as
            `run_evaluate`.
    """
    check_directory(output)
    check_apart(output, reference_dir, "the reference")
    key = read_key(api_key_file)
    base_url(url)  # before a reference run is spent on a misspelt address
    check_writable(output)
    reference = obtain_reference(
        reference_dir, data, keep_reference or output / REFERENCE_FOLDER, settings
    )

    async def measure() -> tuple[ServedText, tuple[LoadPoint, ...], int]:
        async with ServiceClient(url, key) as client:
            text = await measure_text(
                client, reference, output, model=model, concurrency=concurrency
            )
            load = await measure_load(client, text.identity, reference, settings.decode_tokens)
            return text, load, client.retries

    text, load, retries = run_in_order(measure)
    scored = score_served(reference, text.blocks)
    served = write_served(
        output,
        scored.tensors(reference.ids),
        {
            "url": base_url(url),
            "service": text.identity,
            "on_loopback": is_loopback(base_url(url)),
            "reference_digest": reference.record.digest,
            "reference_fingerprint": reference.record.fingerprint,
            "data": reference.record.data,
            "load": load,
            "retries": retries,
            "tools": _tools(),
            **scored.summary(),
        },
    )
    forget_partial(output)
    return served


def obtain_reference(
    reference_dir: Path, data: Path | None, keep: Path, settings: Settings
) -> Reference:
    """The stored reference in `reference_dir`; or that of the source checkpoint there on `data`,
    which is read from `keep` where an earlier run left it, and otherwise made and kept there.

    Raises:
        ArtifactError: a stored reference is damaged, or `keep` holds that of another source or
            text.
        CalibrationError, CheckpointError, ConfigError, OutputError: as `run_evaluate`.
    """
    if is_reference(reference_dir):
        _refuse_text(reference_dir, data, settings, None)
        return read_reference(reference_dir)
    check_apart(keep, reference_dir, "the reference")
    source = CheckpointReader(reference_dir)
    blocks, held_out = _load_text(data, reference_dir, settings)
    if is_reference(keep):
        reference = read_reference(keep)
        if (reference.record.fingerprint, reference.record.data) != (source.fingerprint, held_out):
            raise ArtifactError(
                f"{keep} holds the reference of another source or text than {reference_dir} on "
                f"{data}; name another --keep-reference, or delete it"
            )
        return reference
    check_writable(keep)
    kept = compress_blocks(_load_source(reference_dir, settings), blocks.ids)
    return _write_reference(keep, source, blocks.ids, held_out, kept)


def _why_no_speed(built: BuiltEngine, settings: Settings, is_stored: bool) -> str | None:
    """Why decode speed is not measured; None where it is."""
    if built.target != EMBEDDED:
        return (
            f"not measured: the {EMBEDDED} engine emulates the arithmetic of {built.target}, and "
            "how long that takes says nothing about its kernels"
        )
    if is_stored:
        return "not measured: a stored reference stands for the source, and does not decode"
    return None if settings.decode_tokens else "not measured: it was not asked for"


def _load_source(directory: Path, settings: Settings) -> LLMEngine:
    """The source's own engine: unquantized, on BF16 pages."""
    return LLMEngine.from_checkpoint(directory, _engine_options("bf16", settings))


def _engine_options(kv_cache: CacheFormat | None, settings: Settings) -> EngineOptions:
    """Every token of what is judged is computed for it."""
    return EngineOptions(
        kv_cache=kv_cache,
        num_threads=settings.num_threads,
        kernels=settings.kernels,
        prefix_cache=False,
    )


def _load_text(
    data: Path | None, reference_dir: Path, settings: Settings
) -> tuple[TokenBlocks, HeldOut]:
    if data is None:
        raise CalibrationError(
            f"--data is missing: {reference_dir} is a source checkpoint, not a stored reference "
            "that holds its text; name a held-out file"
        )
    num_blocks = settings.num_blocks or 24
    block_tokens = settings.block_tokens or 512
    # Blocks are spread evenly over the text, so that they represent all of a long file.
    blocks = load_token_blocks(data, reference_dir, num_blocks, block_tokens)
    return blocks, HeldOut(digest=blocks.digest, num_blocks=num_blocks, block_tokens=block_tokens)


def _refuse_text(
    reference_dir: Path, data: Path | None, settings: Settings, keep: Path | None
) -> None:
    """A stored reference is of its own text, whatever the options say."""
    given = {
        "--data": data,
        "--num-blocks": settings.num_blocks,
        "--block-tokens": settings.block_tokens,
        "--keep-reference": keep,
    }
    for option, value in given.items():
        if value is not None:
            raise CalibrationError(
                f"{option} {value} cannot be followed: {reference_dir} is a stored reference with "
                "a text of its own; leave the option out, or name the source as --reference"
            )


def _check_source(built: BuiltEngine, fingerprint: str, reference_dir: Path) -> None:
    if built.source_fingerprint != fingerprint:
        raise ArtifactError(
            f"{built.directory} was made from source {built.source_fingerprint[:16]}, not from "
            f"{reference_dir} ({fingerprint[:16]}); --reference must be its own source"
        )


def _write_reference(
    directory: Path,
    source: CheckpointReader,
    ids_BT: Tensor,
    held_out: HeldOut,
    blocks: list[CompressedBlock],
) -> Reference:
    stored = source.stored_bytes
    sizes = [
        stored[spec.name] + stored.get(scale_name(spec.name), 0) for spec in tensors(source.config)
    ]
    facts = {
        "fingerprint": source.fingerprint,
        "arithmetic": EMBEDDED,
        "kv_cache": "bf16",
        "vocab_size": source.config.vocab_size,
        "data": held_out,
        "source_bytes": source.file_bytes,
        "tools": _tools(),
    }
    return write_reference(directory, ids_BT, blocks, torch.tensor(sizes), facts)


def _lumped(scores: list[BlockScores]) -> LumpedKL:
    return summarize_lumped(torch.stack([score.lumped_kl for score in scores]))


def _tools() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }

"""Step 6, evaluate: measures an engine against the source that it was made from.

Both models run in the embedded engine, so that the measured computation is the served one: the
quantized model with its own kernels and KV format, the source unquantized with a BF16 cache. One
block of text is scored at a time, so that logits [block, vocabulary] of each model are in memory.
Decode speed is measured in the same process, in turns (`evaluation/speed.py`).

`evaluate` measures only; `gate` compares the result with the recipe's limits.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_manifest import CacheFormat
from deepseek.artifact.verdict import EMBEDDED
from deepseek.engine.engine import LLMEngine
from deepseek.engine.kv_cache import check_cache_format
from deepseek.engine.options import EngineOptions
from deepseek.errors import ArtifactError
from deepseek.outputs import check_apart, check_directory, check_writable, make_directory, writing
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.calibration.token_blocks import load_token_blocks
from quant_jobs.evaluation.record import (
    EVALUATION,
    TOKENS,
    Evaluation,
    HeldOut,
    write_evaluation,
)
from quant_jobs.evaluation.scorers import score_blocks, summarize
from quant_jobs.evaluation.sizes import group_sizes
from quant_jobs.evaluation.speed import BATCH_SIZES, measure_decode
from quant_jobs.evaluation.tokens import write_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much to measure. `decode_tokens` 0 skips the speed measurement; `num_threads` None takes
    all cores but one; `kv_cache` None measures the KV format that the engine was built with."""

    num_blocks: int = 24
    block_tokens: int = 512
    decode_tokens: int = 32
    num_threads: int | None = None
    kv_cache: CacheFormat | None = None


def run_evaluate(
    engine_dir: Path, reference_dir: Path, data: Path, output: Path, settings: Settings
) -> Evaluation:
    """Measure an engine; write OUTPUT/evaluation.json and OUTPUT/tokens.safetensors.

    Raises:
        ArtifactError: the engine is incomplete, or was not made from this reference; or OUTPUT lies
            in one of the two.
        CheckpointError, ConfigError: the reference cannot be read.
        CalibrationError: the data is absent, of an unknown kind, malformed or too short.
        OutputError: the output cannot be written; seen before anything is measured if it can be.
    """
    check_directory(output)
    check_apart(output, engine_dir, "the engine")
    check_apart(output, reference_dir, "the reference")
    built = read_engine(engine_dir)
    reference = CheckpointReader(reference_dir)
    if built.source_fingerprint != reference.fingerprint:
        raise ArtifactError(
            f"{engine_dir} was made from source {built.source_fingerprint[:16]}, not from "
            f"{reference_dir} ({reference.fingerprint[:16]}); --reference must be its own source"
        )
    config = reference.config
    # Blocks are spread evenly over the text, so that they represent all of a long file.
    blocks = load_token_blocks(data, reference_dir, settings.num_blocks, settings.block_tokens)
    ids_BT = blocks.ids
    check_writable(output)  # now, not after an hour
    threads = settings.num_threads
    quantized = LLMEngine.load(
        engine_dir, EngineOptions(kv_cache=settings.kv_cache, num_threads=threads)
    )
    source = LLMEngine.from_checkpoint(
        reference_dir, EngineOptions(kv_cache="bf16", num_threads=threads)
    )
    scores = score_blocks(source, quantized, ids_BT)
    speed = measure_decode(source, quantized, ids_BT, settings.decode_tokens, BATCH_SIZES)

    make_directory(output)
    with _staged(output) as staging:
        tokens = write_tokens(staging, ids_BT, scores)
        evaluation = Evaluation(
            engine_digest=built.digest,
            artifact_digest=built.artifact_digest,
            recipe=built.recipe,
            arithmetic=EMBEDDED,
            kv_cache=check_cache_format(quantized.identity.kv_cache),
            reference_fingerprint=reference.fingerprint,
            data=HeldOut(
                digest=blocks.digest,
                num_blocks=settings.num_blocks,
                block_tokens=settings.block_tokens,
            ),
            **summarize(scores),
            artifact_bytes=built.manifest.num_bytes if built.manifest else reference.file_bytes,
            sizes=group_sizes(config, reference.stored_bytes, built.schemes),
            engine_bytes=built.num_bytes,
            speed=speed,
            tokens_sha256=tokens.sha256,
            tools={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": str(torch.get_num_threads()),
            },
        )
        write_evaluation(staging, evaluation)
    return evaluation


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder in `output` for the two files, which take the place of an earlier evaluation's when
    both are whole: a disk that is full costs neither."""
    staging = output / f".{secrets.token_hex(4)}.tmp"
    try:
        make_directory(staging)
        yield staging
        with writing(output / EVALUATION):
            # A run that is killed between the two leaves no old evaluation beside new tokens.
            (output / EVALUATION).unlink(missing_ok=True)
            for name in (TOKENS, EVALUATION):
                os.replace(staging / name, output / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

"""Step 6, evaluate: how good is this engine, measured against the source it was made from?

Both models run through the embedded engine, so that what is judged is what will be served: the
quantized one with its own kernels and KV format, the source unquantized with a BF16 cache. One
block of text at a time: no more than [block, vocabulary] logits of each model are held. Decode
speed is measured in the same process, in turns (`speed.py`).

Evaluating is not judging: `gate` compares the result with the recipe's limits.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek.cli import make_progress
from deepseek.config import ModelConfig
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.errors import ArtifactError
from deepseek.files import read_header, save_tensors
from deepseek.formats import stored_bytes
from deepseek.inventory import tensors
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader, scale_name
from quant_jobs.build import read_engine
from quant_jobs.calibration.token_blocks import load_token_blocks
from quant_jobs.evaluation.metrics import TokenScores, compare_logits, estimate
from quant_jobs.evaluation.record import (
    EVALUATION,
    TOKENS,
    Divergence,
    Estimate,
    Evaluation,
    GroupBytes,
    HeldOut,
    write_evaluation,
)
from quant_jobs.evaluation.speed import BATCH_SIZES, measure_decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much to measure. `decode_tokens` 0 skips the speed measurement; `num_threads` None is
    all cores but one."""

    num_blocks: int = 24
    block_tokens: int = 512
    decode_tokens: int = 32
    num_threads: int | None = None


class Scorer(Protocol):
    """The part of an engine that scoring needs."""

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits float32 [T, V] of token ids int64 [T]."""
        ...


def run_evaluate(
    engine_dir: Path, reference_dir: Path, data: Path, output: Path, settings: Settings
) -> Evaluation:
    """Measure, and write OUTPUT/evaluation.json and OUTPUT/tokens.safetensors.

    Raises:
        ArtifactError: the engine is incomplete, or was not made from this reference.
        CheckpointError, ConfigError: the reference cannot be read.
        CalibrationError: the text is absent, empty or too short.
    """
    built = read_engine(engine_dir)
    reference = CheckpointReader(reference_dir)
    if built.source_fingerprint != reference.fingerprint:
        raise ArtifactError(
            f"{engine_dir} was made from source {built.source_fingerprint[:16]}, not from "
            f"{reference_dir} ({reference.fingerprint[:16]}); --reference must be its own source"
        )
    config = reference.config
    # Blocks spread evenly over the text, so that a long file is not judged by its beginning.
    blocks = load_token_blocks(data, reference_dir, settings.num_blocks, settings.block_tokens)
    ids_BT = blocks.ids
    threads = settings.num_threads
    quantized = LLMEngine.load(engine_dir, EngineOptions(num_threads=threads))
    source = LLMEngine.from_checkpoint(
        reference_dir, EngineOptions(kv_cache="bf16", num_threads=threads)
    )
    scores = score_blocks(source, quantized, ids_BT)
    speed = measure_decode(source, quantized, ids_BT, settings.decode_tokens, BATCH_SIZES)

    output.mkdir(parents=True, exist_ok=True)
    # The old evaluation must not stand beside new tokens, should this end in between.
    (output / EVALUATION).unlink(missing_ok=True)
    saved = save_tensors(output / TOKENS, token_arrays(ids_BT, scores))
    evaluation = Evaluation(
        engine_digest=built.digest,
        artifact_digest=built.artifact_digest,
        recipe=built.recipe,
        kv_cache=built.kv_cache,
        reference_fingerprint=reference.fingerprint,
        data=HeldOut(
            digest=blocks.digest,
            num_blocks=settings.num_blocks,
            block_tokens=settings.block_tokens,
        ),
        **summarize(scores),
        artifact_bytes=built.manifest.num_bytes if built.manifest else file_bytes(reference_dir),
        sizes=group_sizes(config, stored_sizes(reference_dir), built.schemes),
        engine_bytes=built.num_bytes,
        speed=speed,
        tokens_sha256=saved.sha256,
        tools={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
        },
    )
    write_evaluation(output, evaluation)
    return evaluation


def score_blocks(source: Scorer, quantized: Scorer, ids_BT: Tensor) -> list[TokenScores]:
    """Both models on every block, with a progress line.

    Raises:
        ArtifactError: the quantized engine gave a logit that is not finite.
    """
    with make_progress() as progress:
        blocks = progress.track(range(len(ids_BT)), description="evaluate")
        return [_score_block(source, quantized, ids_BT[block], block) for block in blocks]


def _score_block(source: Scorer, quantized: Scorer, ids_T: Tensor, block: int) -> TokenScores:
    """A function of its own, so that the logits are gone before the next block's are made."""
    source_TV, quantized_TV = source.score(ids_T), quantized.score(ids_T)
    if not quantized_TV.isfinite().all():
        raise ArtifactError(
            f"the engine gave logits that are not finite in block {block} of the text; quantize "
            "again with another recipe, and do not serve it"
        )
    return compare_logits(source_TV, quantized_TV, ids_T)


def token_arrays(ids_BT: Tensor, scores: list[TokenScores]) -> dict[str, Tensor]:
    """What `tokens.safetensors` holds; see `evaluation.read_tokens`."""
    return {
        "token_ids": ids_BT.to(torch.int32),
        "source_nll": torch.stack([score.source_nll for score in scores]).float(),
        "quantized_nll": torch.stack([score.quantized_nll for score in scores]).float(),
        "kl": torch.stack([score.kl for score in scores]).float(),
        "same_top1": torch.stack([score.same_top1 for score in scores]),
    }


def summarize(scores: list[TokenScores]) -> dict[str, Any]:
    """The fields of `Evaluation` that follow from the tokens' scores alone."""
    source_BT = torch.stack([score.source_nll for score in scores])
    quantized_BT = torch.stack([score.quantized_nll for score in scores])
    kl_BT = torch.stack([score.kl for score in scores])
    same_BT = torch.stack([score.same_top1 for score in scores])
    levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    p50, p90, p99 = torch.quantile(kl_BT.flatten(), levels).tolist()
    return {
        "perplexity": math.exp(float(quantized_BT.mean())),
        "source_perplexity": math.exp(float(source_BT.mean())),
        # Paired: the difference per block varies far less than either loss.
        "perplexity_ratio": _estimate(quantized_BT - source_BT, math.exp),
        "kl": Divergence(mean=_estimate(kl_BT), p50=p50, p90=p90, p99=p99, max=float(kl_BT.max())),
        "top1": _estimate(same_BT),
    }


def _estimate(values_BT: Tensor, transform: Callable[[float], float] = float) -> Estimate:
    return Estimate(**asdict(estimate(values_BT, transform)))


def stored_sizes(directory: Path) -> dict[str, int]:
    """Bytes of every tensor of a safetensors directory, by name, from the files' headers."""
    return {
        name: entry.num_bytes
        for path in sorted(directory.glob("*.safetensors"))
        for name, entry in read_header(path).tensors.items()
    }


def file_bytes(directory: Path) -> int:
    """Bytes of the tensor files of a checkpoint directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def group_sizes(
    config: ModelConfig, source_bytes: Mapping[str, int], schemes: Mapping[str, Scheme]
) -> tuple[GroupBytes, ...]:
    """Bytes by group of tensors; what no scheme names (norms, router, embeddings, head) is stored
    as in the source."""
    rows: dict[str, list[int]] = {}
    for spec in tensors(config):
        source = source_bytes[spec.name] + source_bytes.get(scale_name(spec.name), 0)
        artifact = source
        if spec.kind == "linear" and schemes[spec.module].is_quantized:
            artifact = stored_bytes(schemes[spec.module], *spec.shape)
        row = rows.setdefault(spec.group, [0, 0, 0, 0])
        for column, value in enumerate((spec.numel, 2 * spec.numel, source, artifact)):
            row[column] += value
    return tuple(
        GroupBytes(
            group=group,
            parameters=parameters,
            bf16_bytes=bf16,
            source_bytes=source,
            artifact_bytes=artifact,
        )
        for group, (parameters, bf16, source, artifact) in rows.items()
    )

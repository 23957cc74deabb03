"""Blocks of token ids from files: calibration data of a job, or held-out data of an evaluation.

Several files share the blocks in proportion to their weights. Every block begins with BOS if the
model has one, like every sequence that the model was trained on. The data is identified by the
digest of the ids, not of the files: files that give the same blocks are the same data.

    documents.py   kinds of files, and how they are read from any place on
    records.py     what a record may say
    encoding.py    documents -> ids: tokenizer and chat template
    sampling.py    which tokens of a file become blocks

Called by `job/job.py` and `evaluate.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CalibrationError
from quant_jobs.calibration.documents import kind_of, open_documents
from quant_jobs.calibration.encoding import Encoder
from quant_jobs.calibration.sampling import draw_blocks


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """A file of documents. Its share of the blocks is `weight` over the sum of all weights."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, argument: str) -> CalibrationSource:
        """Parse `FILE` or `FILE=WEIGHT`, as on the command line. The text after the last `=` is a
        weight if it is a number, and otherwise part of the name.

        Raises:
            CalibrationError: the weight is not positive.
        """
        path, equals, last = argument.rpartition("=")
        try:
            weight = float(last)
        except ValueError:
            equals = ""
        if not equals:
            return cls(Path(argument))
        if not 0 < weight < math.inf:
            raise CalibrationError(
                f"--calibration {argument}: the weight must be a positive number"
            )
        return cls(Path(path), weight)


@dataclass(frozen=True, slots=True)
class SourceBlocks:
    """The blocks from one file: `blocks` is their number, `tokens` that of their text tokens
    (without BOS), `sha256` the digest of the file."""

    path: Path
    weight: float
    sha256: str
    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """`ids` int64 [B, T]: B independent sequences of T tokens, those of the first file first.
    `digest`: their SHA-256 in hex. `sources`: one entry per file, in the order given."""

    ids: Tensor
    digest: str
    sources: tuple[SourceBlocks, ...]

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()


def load_token_blocks(
    sources: Path | Sequence[CalibrationSource],
    tokenizer_dir: Path,
    num_blocks: int,
    block_tokens: int,
) -> TokenBlocks:
    """Cut one file, or several by weight, into `num_blocks` blocks of `block_tokens` tokens, BOS
    included.

    Raises:
        CalibrationError: a file is absent, of an unknown kind, empty, malformed, too short, or has
            too little weight for a single block; or there is no tokenizer or chat template.
        ConfigError: config.json in `tokenizer_dir` cannot be read.
    """
    if isinstance(sources, Path):
        sources = [CalibrationSource(sources)]
    config = ModelConfig.from_directory(tokenizer_dir)
    if block_tokens > config.dense_context:
        raise CalibrationError(
            f"block_tokens {block_tokens} is more than {config.context_limit}; lower it"
        )
    shares = _share_blocks(sources, num_blocks)
    for source in sources:
        kind_of(source.path)  # before time goes into the first of them
    bos = config.bos_token_id
    length = block_tokens - (bos is not None)
    pieces: list[Tensor] = []
    source_blocks: list[SourceBlocks] = []
    with contextlib.closing(Encoder(tokenizer_dir, config)) as encoder:
        for source, share in zip(sources, shares, strict=True):
            with open_documents(source.path) as (documents, file):
                pieces.append(
                    draw_blocks(
                        documents,
                        encoder,
                        share,
                        length,
                        config.eos_token_id,
                        is_alone=len(sources) == 1,
                    )
                )
                sha256 = _sha256(file)
            source_blocks.append(
                SourceBlocks(source.path, source.weight, sha256, share, share * length)
            )
    blocks = torch.cat(pieces)
    if bos is not None:
        blocks = torch.cat([torch.full((num_blocks, 1), bos), blocks], dim=1)
    return TokenBlocks(blocks, _digest(blocks), tuple(source_blocks))


def _share_blocks(sources: Sequence[CalibrationSource], num_blocks: int) -> list[int]:
    """The number of blocks of each file: its exact share rounded down, then one more each for the
    largest remainders (the earlier file first where they are equal)."""
    if not sources:
        raise CalibrationError("no calibration text is given; name at least one file")
    paths: set[Path] = set()
    for source in sources:
        if source.path.resolve() in paths:
            raise CalibrationError(f"{source.path} is given twice; give it once, with more weight")
        paths.add(source.path.resolve())
    weights = [Fraction(source.weight) for source in sources]
    exact = [weight * num_blocks / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: num_blocks - sum(shares)]:
        shares[index] += 1
    for source, share in zip(sources, shares, strict=True):
        if not share:
            raise CalibrationError(
                f"{source.path} gives none of the {num_blocks} blocks at weight "
                f"{source.weight:g}; raise its weight or the recipe's num_blocks, or leave it out"
            )
    return shares


def _sha256(file: io.BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(ids: Tensor) -> str:
    digest = hashlib.sha256(f"int64 {list(ids.shape)}\n".encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()

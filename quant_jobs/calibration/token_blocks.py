"""Cuts text into blocks of token ids: calibration data of a job, or held-out data of an evaluation.

A file is tokenized and cut into pieces of equal length, of which the requested number is taken,
spread evenly over the file. Several files share the blocks in proportion to their weights. Every
block begins with BOS if the model has one, like every sequence that the model was trained on. The
data is identified by the digest of the ids, not of the files: files that give the same blocks are
the same data.

Two kinds of files. Plain text, UTF-8, is one document. Each line of a `.jsonl` file is one
document, the string `text` of an object (other keys are metadata, and are ignored); documents are
concatenated, separated by EOS if the model has one.

The `tokenizers` library reads tokenizer.json directly. transformers' fast tokenizers wrap it (a
test compares the ids with AutoTokenizer's), and importing it is six seconds faster. Called by
`job/job.py` and `evaluate.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CalibrationError
from deepseek.tokenizer_files import missing_tokenizer


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """A text file. Its share of the blocks is `weight` over the sum of all weights."""

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
        CalibrationError: a file is absent, empty, malformed, too short, or has too little weight
            for a single block; or there is no tokenizer.
        ConfigError: config.json in `tokenizer_dir` cannot be read.
    """
    if isinstance(sources, Path):
        sources = [CalibrationSource(sources)]
    config = ModelConfig.from_directory(tokenizer_dir)
    if block_tokens > config.max_position_embeddings:
        raise CalibrationError(
            f"block_tokens {block_tokens} is more than the model's {config.max_position_embeddings}"
            " positions; lower it"
        )
    shares = _share_blocks(sources, num_blocks)
    bos = config.bos_token_id
    length = block_tokens - (bos is not None)
    pieces: list[Tensor] = []
    source_blocks: list[SourceBlocks] = []
    for source, share in zip(sources, shares, strict=True):
        documents, sha256 = _read_documents(source.path)
        ids = _tokenize(documents, tokenizer_dir, config)
        pieces.append(_cut(ids, share, length, source.path, is_alone=len(sources) == 1))
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


def _read_documents(path: Path) -> tuple[list[str], str]:
    """The documents of a file, and the file's SHA-256 in hex."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read ({error.strerror}); give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or give another file"
        ) from error
    if not text.strip():
        raise CalibrationError(f"{path} is empty; give a text file")
    if path.suffix != ".jsonl":
        return [text], hashlib.sha256(content).hexdigest()
    # Not splitlines: JSON strings may contain other line separators unescaped.
    documents = [
        _document(line, f"{path}, line {number}")
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1)
    ]
    return documents, hashlib.sha256(content).hexdigest()


def _document(line: str, place: str) -> str:
    """The text of one line of JSON; `place` names it in errors."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{place}: not JSON ({error}); correct the line") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise CalibrationError(
            f'{place}: not an object with a string "text"; each line must be {{"text": "..."}}'
        )
    return str(document["text"])


def _tokenize(documents: list[str], tokenizer_dir: Path, config: ModelConfig) -> list[int]:
    """The ids of all documents, concatenated, with EOS between them."""
    file = tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise CalibrationError(missing_tokenizer(tokenizer_dir))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise CalibrationError(f"{file} is not a tokenizer: {error}") from error
    ids: list[int] = []
    for document in documents:
        if ids and config.eos_token_id is not None:
            ids.append(config.eos_token_id)
        ids += tokenizer.encode(document, add_special_tokens=False).ids
    if (largest := max(ids, default=0)) >= config.vocab_size:
        raise CalibrationError(
            f"the tokenizer in {tokenizer_dir} gives the id {largest}, but the model has only "
            f"{config.vocab_size} tokens; tokenizer and model do not belong together"
        )
    return ids


def _cut(ids: list[int], num_blocks: int, length: int, path: Path, *, is_alone: bool) -> Tensor:
    """int64 [num_blocks, length]: distinct pieces of the text, spread evenly over it."""
    pieces = len(ids) // length
    if pieces < num_blocks:
        raise CalibrationError(
            f"{path} has {len(ids)} tokens, but {num_blocks} blocks of {length} tokens of text "
            f"need {num_blocks * length}; give a longer text"
            + (
                f" or lower num_blocks to {max(pieces, 1)}"
                + ("" if pieces else f" and block_tokens below {len(ids) + 1}")
                if is_alone
                else " or lower its weight"
            )
        )
    chosen = [index * pieces // num_blocks for index in range(num_blocks)]
    table = torch.tensor(ids[: pieces * length], dtype=torch.int64).view(pieces, length)
    return table[chosen]


def _digest(ids: Tensor) -> str:
    digest = hashlib.sha256(f"int64 {list(ids.shape)}\n".encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()

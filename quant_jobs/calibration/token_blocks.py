"""Text to blocks of token ids: a job's calibration data, or an evaluation's held-out data.

A file is tokenized, cut into pieces of equal length, and as many pieces as asked for are taken,
spread evenly over the file. Several files share the blocks in proportion to their weights. Every
block opens with BOS where the model has one, as every sequence that the model was trained on does.
The digest of the ids, not of the files, names the data: files that give the same blocks are the
same data.

Two kinds of files. Plain text, UTF-8, is one document. JSON lines (`.jsonl`) hold one document
each, the string `text` of an object (other keys are what collections note about a document, and are
not read); documents are packed one after the other, EOS between them where the model has one.

The `tokenizers` library reads tokenizer.json directly. It is what transformers' fast tokenizers
wrap (a test holds the ids equal to AutoTokenizer's) and saves six seconds of import.
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


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """A file of text, and its share of the blocks: `weight` over the sum of all weights."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, given: str) -> CalibrationSource:
        """`FILE` or `FILE=WEIGHT`, as on the command line. What follows the last `=` is a weight
        where it is a number; otherwise it belongs to the name.

        Raises:
            CalibrationError: the weight is not positive.
        """
        path, equals, last = given.rpartition("=")
        try:
            weight = float(last)
        except ValueError:
            equals = ""
        if not equals:
            return cls(Path(given))
        if not 0 < weight < math.inf:
            raise CalibrationError(f"--calibration {given}: the weight must be a positive number")
        return cls(Path(path), weight)


@dataclass(frozen=True, slots=True)
class SourceBlocks:
    """What one file gave: `tokens` of its own text, BOS not counted. `sha256` is of the file."""

    path: Path
    weight: float
    sha256: str
    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """`ids` int64 [B, T]: B independent sequences of T tokens, those of the first file first.
    `digest`: SHA-256 in hex of them. `sources`: by file, in the order given."""

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
    """Cut a file, or several by weight, into `num_blocks` blocks of `block_tokens` tokens, BOS
    included.

    Raises:
        CalibrationError: a file is absent, empty, malformed, too short, or of so little weight that
            it gives no block; or there is no tokenizer.
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
    given: list[SourceBlocks] = []
    for source, share in zip(sources, shares, strict=True):
        documents, sha256 = _read_documents(source.path)
        ids = _tokenize(documents, tokenizer_dir, config)
        pieces.append(_cut(ids, share, length, source.path, is_alone=len(sources) == 1))
        given.append(SourceBlocks(source.path, source.weight, sha256, share, share * length))
    cut = torch.cat(pieces)
    if bos is not None:
        cut = torch.cat([torch.full((num_blocks, 1), bos), cut], dim=1)
    return TokenBlocks(cut, _digest(cut), tuple(given))


def _share_blocks(sources: Sequence[CalibrationSource], num_blocks: int) -> list[int]:
    """Blocks of each file: the whole part of its due, then one more each to the largest
    remainders (to the earlier file where they are equal)."""
    if not sources:
        raise CalibrationError("no calibration text is given; name at least one file")
    seen: set[Path] = set()
    for source in sources:
        if source.path.resolve() in seen:
            raise CalibrationError(f"{source.path} is given twice; give it once, with more weight")
        seen.add(source.path.resolve())
    weights = [Fraction(source.weight) for source in sources]
    due = [weight * num_blocks / sum(weights) for weight in weights]
    shares = [math.floor(one) for one in due]
    order = sorted(range(len(due)), key=lambda index: (shares[index] - due[index], index))
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
    """The texts of a file, and its SHA-256 in hex."""
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
    # Not splitlines: JSON strings may hold other line separators as they are.
    documents = [
        _document(line, f"{path}, line {number}")
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1)
    ]
    return documents, hashlib.sha256(content).hexdigest()


def _document(line: str, place: str) -> str:
    """The text of one JSON line."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{place}: not JSON ({error}); correct the line") from error
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise CalibrationError(
            f'{place}: not an object with a string "text"; each line must be {{"text": "..."}}'
        )
    return str(found["text"])


def _tokenize(documents: list[str], tokenizer_dir: Path, config: ModelConfig) -> list[int]:
    """The ids of all documents, one after the other; EOS between them."""
    file = tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise CalibrationError(f"{file} is absent; the model directory must hold its tokenizer")
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
    """int64 [num_blocks, length]: pieces spread evenly over the text, each used once."""
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

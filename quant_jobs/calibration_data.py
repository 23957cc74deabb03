"""Text to blocks of token ids: a job's calibration data, or an evaluation's held-out data.

A text file is tokenized as a whole, cut into pieces of equal length, and as many pieces as asked
for are taken, spread evenly over the file. Every block opens with BOS where the model has one, as
every sequence that the model was trained on does. The digest of the ids, not of the file, names the
data: two files that give the same blocks are the same data.

The `tokenizers` library reads tokenizer.json directly. It is what transformers' fast tokenizers
wrap (a test holds the ids equal to AutoTokenizer's) and saves six seconds of import.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """`ids` int64 [B, T]: B independent sequences of T tokens. `digest`: SHA-256 in hex of them."""

    ids: Tensor
    digest: str

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()


def load_token_blocks(
    path: Path, tokenizer_dir: Path, num_blocks: int, block_tokens: int
) -> TokenBlocks:
    """Cut a UTF-8 text into `num_blocks` blocks of `block_tokens` tokens, BOS included.

    Raises:
        CalibrationError: the file is absent, empty, not UTF-8 or too short, or there is no
            tokenizer.
        ConfigError: config.json in `tokenizer_dir` cannot be read.
    """
    config = ModelConfig.from_directory(tokenizer_dir)
    if block_tokens > config.max_position_embeddings:
        raise CalibrationError(
            f"block_tokens {block_tokens} is more than the model's {config.max_position_embeddings}"
            " positions; lower it"
        )
    ids = _tokenize(_read_text(path), tokenizer_dir)
    if (largest := max(ids, default=0)) >= config.vocab_size:
        raise CalibrationError(
            f"the tokenizer in {tokenizer_dir} gives the id {largest}, but the model has only "
            f"{config.vocab_size} tokens; tokenizer and model do not belong together"
        )
    bos = config.bos_token_id
    cut = _cut(ids, num_blocks, block_tokens - (bos is not None), path)
    if bos is not None:
        cut = torch.cat([torch.full((num_blocks, 1), bos), cut], dim=1)
    return TokenBlocks(cut, _digest(cut))


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
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
    return text


def _tokenize(text: str, tokenizer_dir: Path) -> list[int]:
    file = tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise CalibrationError(f"{file} is absent; the model directory must hold its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise CalibrationError(f"{file} is not a tokenizer: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _cut(ids: list[int], num_blocks: int, length: int, path: Path) -> Tensor:
    """int64 [num_blocks, length]: pieces spread evenly over the text, each used once."""
    pieces = len(ids) // length
    if pieces < num_blocks:
        raise CalibrationError(
            f"{path} has {len(ids)} tokens, but {num_blocks} blocks of {length} tokens of text "
            f"need {num_blocks * length}; give a longer text or lower num_blocks to "
            f"{max(pieces, 1)}" + ("" if pieces else f" and block_tokens below {len(ids) + 1}")
        )
    chosen = [index * pieces // num_blocks for index in range(num_blocks)]
    table = torch.tensor(ids[: pieces * length], dtype=torch.int64).view(pieces, length)
    return table[chosen]


def _digest(ids: Tensor) -> str:
    digest = hashlib.sha256(f"int64 {list(ids.shape)}\n".encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()

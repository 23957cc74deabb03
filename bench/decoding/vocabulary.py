"""A byte-level BPE tokenizer of any size whose tokens are printable ASCII.

An engine that speaks random tokens then streams whole characters at every token, as one that speaks
English does; a tokenizer of bytes alone would hold most of them back as unfinished UTF-8. Every
token longer than a byte comes from one merge of two shorter ones, because llama.cpp loads no BPE
vocabulary without merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
#: Printable ASCII; byte-level BPE writes the space as the letter Ġ.
PRINTABLE = [chr(code) for code in range(33, 127)] + ["Ġ"]


def merges() -> Iterator[tuple[str, str]]:
    """Pairs of printable characters in a fixed order, then pairs with one more character."""
    for one, two in product(PRINTABLE, repeat=2):
        yield one, two
    for one, two, three in product(PRINTABLE, repeat=3):
        yield one + two, three


def tokenizer_files(vocab_size: int, model_max_length: int) -> dict[str, str]:
    """The files of the tokenizer, by name: ids 0 and 1 are BOS and EOS, then one id per byte, then
    one per merge up to `vocab_size`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0, EOS: 1} | {letter: 2 + index for index, letter in enumerate(alphabet)}
    assert vocab_size >= len(vocab), f"{vocab_size} tokens do not hold all bytes"
    pairs = list(islice(merges(), vocab_size - len(vocab)))
    vocab |= {one + two: len(vocab) + index for index, (one, two) in enumerate(pairs)}
    assert len(vocab) == vocab_size, f"there are no {vocab_size} such tokens"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": str(tokenizer.to_str()) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }

"""Small tokenizers of the kinds that there are, with control tokens, for tests of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<｜User｜>", "<｜Assistant｜>"
#: As in DeepSeek-V3's tokenizer.json, whose `<｜User｜>` is not special.
CONTROL = [AddedToken(BOS, special=True), AddedToken(EOS, special=True)]
ROLES = [
    AddedToken(USER, special=False, normalized=False),
    AddedToken(ASSISTANT, special=False, normalized=False),
    AddedToken("<think>", special=False, normalized=True),
    AddedToken("</think>", special=False, normalized=True),
]
TEXT = [
    "What does json.dumps do? It writes an object as text.",
    "x < y and y > z, a/b, <div>User｜ Assistant</div> | s",
    "def f(): return ' spaces   and\n\nlines'",
    "Ein Fluß, 你好, 😀 e\u0301 user",
] * 8
#: DeepSeek-V3's pre-tokenizer.
V3_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(ROLES)
    return tokenizer


def _byte_level(*, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in V3_PATTERNS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _finished(tokenizer)


def v3() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.Sequence([])
    return tokenizer


def byte_level_with_prefix_space() -> Tokenizer:
    return _byte_level(add_prefix_space=True)


def ignoring_merges() -> Tokenizer:
    """A pre-token that is in the vocabulary is its token: `<s>` is in it."""
    parsed = json.loads(_byte_level().to_str())
    parsed["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def llama_legacy() -> Tokenizer:
    """Prefix and spaces by the normalizer, BPE with byte fallback."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", BOS, EOS, *alphabet], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    parsed = json.loads(tokenizer.to_str())  # the bytes are ordinary entries
    parsed["added_tokens"] = [
        token for token in parsed["added_tokens"] if token["content"] not in alphabet
    ]
    return _finished(Tokenizer.from_str(json.dumps(parsed)))


def _unigram(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", BOS, EOS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _finished(tokenizer)


def unigram_first() -> Tokenizer:
    return _unigram("first")


def unigram_always() -> Tokenizer:
    return _unigram("always")


def words() -> Tokenizer:
    """No bytes: what is in no word is unknown. `<s>` is a word of the vocabulary."""
    vocab = {word: number for number, word in enumerate(["<unk>", BOS, EOS, "x", "y", "User", "<"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True)])
    return _finished(tokenizer)


def normalizing() -> Tokenizer:
    """Writes everything in lower case and compatible characters; its control tokens too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([AddedToken(token.content, normalized=True) for token in ROLES])
    return tokenizer


def stripping() -> Tokenizer:
    """Its control tokens take the spaces beside them."""
    tokenizer = _byte_level()
    parsed = json.loads(tokenizer.to_str())
    for token in parsed["added_tokens"]:
        token["lstrip"] = token["rstrip"] = True
    return Tokenizer.from_str(json.dumps(parsed))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    function.__name__: function
    for function in (
        v3,
        byte_level_with_prefix_space,
        ignoring_merges,
        llama_legacy,
        unigram_first,
        unigram_always,
        words,
        normalizing,
        stripping,
    )
}

"""The texts of a text's tokens join to the text, and their bytes to its bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.models import BPE

from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.token_names import TokenNames, added_text

TEXTS = [
    "Hello, world",
    "Привет 世界 🙂!",
    "a\ufffdb",
    "e\u0301\u200d👩‍👧",
    "\x00\x7f\u00ad\u0100\n\t",
]


def name_all(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, bytes]:
    names = TokenNames(tokenizer)
    pairs = [names.name(token, ids[:at]) for at, token in enumerate(ids)]
    return "".join(text for text, _ in pairs), b"".join(data or b"" for _, data in pairs)


@pytest.mark.parametrize("text", TEXTS)
def test_names_and_bytes_of_tokens_join_to_the_text(tiny_model: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert name_all(tokenizer, ids) == (text, text.encode())


def test_names_of_any_tokens_join_to_what_the_decoder_makes_of_them(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert isinstance(tokenizer, Tokenizer)
    chance = random.Random(5)
    for _ in range(200):
        ids = [chance.randrange(2048) for _ in range(chance.randint(1, 12))]
        text, data = name_all(tokenizer, ids)
        assert data.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)
        unfinished = len(added_text(b"", data + b"a")) - 1 - len(text)
        assert unfinished in (0, 1)  # the character that the last token begins
        assert data.decode(errors="replace").startswith(text)


def test_a_token_within_a_character_is_empty_and_the_last_one_has_it_whole(
    tiny_model: Path,
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode("世", add_special_tokens=False).ids
    assert len(ids) == 3
    names = TokenNames(tokenizer)
    parts = [names.name(token, ids[:at]) for at, token in enumerate(ids)]
    assert parts == [("", b"\xe4"), ("", b"\xb8"), ("世", b"\x96")]
    # An alternative at the last place is named as if it stood there.
    assert names.name(tokenizer.token_to_id("a"), ids[:2]) == ("\ufffda", b"a")


def test_special_tokens_are_their_text_and_unknown_ids_have_none(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert isinstance(tokenizer, Tokenizer)
    names = TokenNames(tokenizer)
    text = "<｜end▁of▁sentence｜>"
    assert names.name(tokenizer.token_to_id(text), ()) == (text, text.encode())
    assert names.name(100_000, ()) == ("", None)


def test_pieces_of_byte_fallback_are_single_bytes_and_marks_are_spaces() -> None:
    vocabulary = {"<unk>": 0, "\u2581Hi": 1, "<0xE3>": 2, "<0x81>": 3, "<0x82>": 4}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = TokenNames(tokenizer)
    ids = [1, 2, 3, 4]
    assert [names.name(token, ids[:at]) for at, token in enumerate(ids)] == [
        (" Hi", b" Hi"),
        ("", b"\xe3"),
        ("", b"\x81"),
        ("\u3042", b"\x82"),
    ]


def test_a_tokenizer_of_whole_words_names_them_by_its_decoder() -> None:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    assert TokenNames(tokenizer).name(1, [0]) == ("two", b"two")

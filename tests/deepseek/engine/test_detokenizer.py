"""Text from tokens: unfinished text is held back, no text is lost, stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.engine.detokenizer import Detokenizer, load_tokenizer
from deepseek.errors import ArtifactError


class Letters:
    """Every token is one or more bytes of UTF-8; undecodable ones become U+FFFD."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def play(
    tokenizer: Letters, ids: Sequence[int], stop: Sequence[str] = (), prompt: Sequence[int] = ()
) -> tuple[list[str], str, bool]:
    """Pieces shown per token, the rest at the end, and whether a stop string ended it."""
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces, "", True
    rest = detokenizer.flush()
    return pieces, rest, detokenizer.stopped


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    euro = "€".encode()
    tokenizer = Letters(b"a", euro[:1], euro[1:2], euro[2:] + b"b")
    assert play(tokenizer, [0, 1, 2, 3]) == (["a", "", "", "€b"], "", False)


def test_half_a_character_at_the_end_is_shown_as_replaced() -> None:
    tokenizer = Letters(b"a", "€".encode()[:2])
    assert play(tokenizer, [0, 1]) == (["a", ""], "\ufffd", False)


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    euro = "€".encode()
    tokenizer = Letters(euro[:2], euro[2:], b"x")
    assert play(tokenizer, [1, 2], prompt=[0]) == (["€", "x"], "", False)


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    tokenizer = Letters(b"one ", b"tw", b"o th", b"ree")
    assert play(tokenizer, [0, 1, 2, 3], stop=["two"]) == (["one ", "", ""], "", True)


def test_what_only_looked_like_a_stop_string_is_shown_later() -> None:
    tokenizer = Letters(b"xEN", b"D", b"Z!")
    assert play(tokenizer, [0, 1, 2], stop=["ENDE"]) == (["x", "", "ENDZ!"], "", False)
    assert play(tokenizer, [0, 1], stop=["ENDE"]) == (["x", ""], "END", False)


def test_the_stop_string_that_comes_first_wins() -> None:
    tokenizer = Letters(b"a stop b end c")
    assert play(tokenizer, [0], stop=["end", "stop"]) == (["a "], "", True)


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    tokenizer = Letters(b"st", b"op", b"!")
    assert play(tokenizer, [1, 2], stop=["stop"], prompt=[0]) == (["op", "!"], "", False)


def test_a_stop_string_that_repeats_its_own_beginning_is_found() -> None:
    tokenizer = Letters(b"a", b"b")
    assert play(tokenizer, [0, 0, 0, 1], stop=["aab"]) == (["", "", "a", ""], "", True)


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=90), st.integers(1, 5))
def test_shown_text_adds_up_to_the_whole_however_it_is_cut(data: bytes, size: int) -> None:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    tokenizer = Letters(*pieces)
    shown, rest, _ = play(tokenizer, range(len(pieces)))
    assert "".join(shown) + rest == data.decode(errors="replace")


@settings(deadline=None, max_examples=60)
@given(st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_before_the_first_stop_string_is_shown_and_no_more(text: str, stop: list[str]) -> None:
    tokenizer = Letters(*(character.encode() for character in text))
    shown, rest, stopped = play(tokenizer, range(len(text)), stop)
    ends = [text.find(word) for word in stop if word in text]
    assert "".join(shown) + rest == (text[: _first_end(text, stop)] if ends else text)
    assert stopped == bool(ends)


def _first_end(text: str, stop: list[str]) -> int:
    """Where the text ends when it is read character by character."""
    for length in range(len(text) + 1):
        ends = [text[:length].find(word) for word in stop if word in text[:length]]
        if ends:
            return min(ends)
    return len(text)


def test_the_models_own_tokenizer_gives_its_own_text_back(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer is not None
    text = "def größe(x):  # 5 € – 日本語 🙂\n\treturn x**2\n" * 3
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, [0])
    shown = [detokenizer.push(token) for token in ids]
    assert "".join(shown) + detokenizer.flush() == text
    assert all("\ufffd" not in piece for piece in shown)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)

"""Keeps the control tokens in the text of a message from becoming tokens (decision 0011).

A tokenizer's added tokens (`<｜User｜>`, `<｜end▁of▁sentence｜>`) are what a chat template writes
between messages. A message that has such a string in it would speak for another role. So

- `mark` puts a MARK around every character of a message that control tokens are made of: no control
  token is in a message any more, nor comes about where the template joins texts;
- the template renders the marked conversation: the control tokens in that text are its own;
- `rewrite` gives each of them the name that it has in `encoder`, and takes the marks away;
- `encoder` is the same tokenizer, in which the control tokens have these names only: it encodes the
  template's as their usual ids, and everything else as text.

Names and marks are noncharacters of Unicode, which no text is meant to hold. What a template looks
for in the assistant's messages (`'</think>' in content`) is not marked there, so that it is found.
tokenizer.py calls this file.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from serve_app.errors import InvalidRequest

#: Unicode's block of noncharacters: the mark, and what names are made of.
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_MARK, _FRAME = "\ufdd0", "\ufdd1"
_DIGITS = [chr(code) for code in range(0xFDE0, 0xFDF0)]
#: Methods of strings by which a template looks for a text in a message.
_METHODS = "split rsplit partition rpartition startswith endswith find rfind index rindex count"
_METHODS += " replace strip lstrip rstrip removeprefix removesuffix"

Conversation = Sequence[Mapping[str, Any]]


class ControlTokens:
    """The control tokens of one tokenizer: its added tokens, special or not, except those of white
    space alone. `templates` are the sources of its chat templates. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, templates: Iterable[str]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._ids = {token.content: id_ for id_, token in added.items() if token.content.strip()}
        self._names = {token: _name(number) for number, token in enumerate(sorted(self._ids))}
        self._tokens = _any_of(self._ids)
        sources = "\n".join(templates)
        self._looked_for = _any_of(token for token in self._ids if _looks_for(sources, token))
        self._keys = sorted({char for token in self._ids for char in _keys(token)})
        self._any_key = _any_of(self._keys)
        normalizer = tokenizer.normalizer
        self._normalizes = normalizer is not None and _does_something(
            json.loads(normalizer.__getstate__())
        )
        self._encoder: Tokenizer | None = None
        self._lock = threading.Lock()
        self._made = False

    def encode(self, protected: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of what `protect` returned; `special_tokens` as in `PromptText`."""
        encoder = self._make_encoder()
        assert encoder is not None
        [encoding] = encoder.encode_batch_fast([protected], add_special_tokens=special_tokens)
        return list(encoding.ids)

    def protect(
        self, conversation: Conversation, plain: str, render: Callable[[Conversation], str]
    ) -> str | None:
        """The text of a conversation for `encode`; None where no message brings in a control token,
        so that `plain`, what the template makes of the conversation, may be encoded as it is.
        `render` applies the template.

        Raises:
            InvalidRequest: a message brings in a control token beside noncharacters, or the
                tokenizer has no form in which control tokens are text.
        """
        if not self._normalizes and not any(map(self._any_key.search, _texts(conversation))):
            return None
        marked = render(self._mark(conversation))
        same = self._same(plain, marked)
        # A normalizer may make control tokens of other characters: its texts take no short way.
        if same and not self._normalizes:
            return None
        reserved = next(filter(None, map(_RESERVED.search, _texts(conversation))), None)
        if reserved is not None:
            raise InvalidRequest(
                "the messages hold a control token of this model beside "
                f"U+{ord(reserved[0]):04X}, which is no character; remove that",
                param="messages",
            )
        if self._make_encoder() is None:
            if same:
                return None
            raise InvalidRequest(
                "the messages hold a control token of this model, and its tokenizer cannot read "
                "one as text; remove it",
                param="messages",
            )
        return self._tokens.sub(lambda match: self._names[match[0]], marked).replace(_MARK, "")

    def _same(self, plain: str, marked: str) -> bool:
        """Whether two texts have the same control tokens."""
        pairs = itertools.zip_longest(self._tokens.finditer(plain), self._tokens.finditer(marked))
        return all(one is not None and two is not None and one[0] == two[0] for one, two in pairs)

    def _make_encoder(self) -> Tokenizer | None:
        """Made when it is needed: it takes as much memory as the tokenizer, and a second."""
        with self._lock:
            if not self._made:
                self._encoder = _renamed(self._tokenizer, self._names, self._ids)
                self._made = True
            return self._encoder

    def _mark(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The conversation with marks in every text of a message but its role."""
        return [
            {
                key: value
                if key == "role"
                else self._marked(value, keep_looked_for=message["role"] == "assistant")
                for key, value in message.items()
            }
            for message in conversation
        ]

    def _marked(self, value: Any, *, keep_looked_for: bool) -> Any:
        if isinstance(value, str):
            # `split` by a pattern that is a group gives texts and what was between them in turn.
            parts = self._looked_for.split(value) if keep_looked_for else [value]
            for key in self._keys:
                parts[::2] = [part.replace(key, f"{_MARK}{key}{_MARK}") for part in parts[::2]]
            return "".join(parts)
        if isinstance(value, list):
            return [self._marked(item, keep_looked_for=keep_looked_for) for item in value]
        if isinstance(value, dict):
            return {
                key: self._marked(item, keep_looked_for=keep_looked_for)
                for key, item in value.items()
            }
        return value


def _texts(value: Any) -> Iterable[str]:
    """Every string in messages, keys of objects and roles apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _name(number: int) -> str:
    return _FRAME + "".join(_DIGITS[number >> shift & 15] for shift in (12, 8, 4, 0))


def _keys(token: str) -> str:
    """The characters of a control token that are no letters, digits or white space; its first where
    there are none. Without them in a message the token cannot be there."""
    return "".join(c for c in token if not c.isalnum() and not c.isspace()) or token.strip()[0]


def _looks_for(source: str, token: str) -> bool:
    """Whether a template compares messages with a control token, or cuts them there."""
    quoted = "(?:" + "|".join(re.escape(mark + token + mark) for mark in "'\"") + ")"
    methods = "|".join(_METHODS.split())
    found = re.search(rf"{quoted}\s+(?:not\s+)?in\b|\.(?:{methods})\(\s*{quoted}", source)
    return found is not None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of these texts, in time that does not depend on how many they are: common
    beginnings are tried once. The pattern is one group; without texts it matches nothing."""
    unique = set(texts)
    return re.compile(f"({_branches(unique)})") if unique else _NOTHING


_NOTHING = re.compile("((?!))")


def _branches(texts: set[str]) -> str:
    prefix = os.path.commonprefix(sorted(texts))
    rests = {text[len(prefix) :] for text in texts}
    by_first: dict[str, set[str]] = {}
    for rest in rests - {""}:
        by_first.setdefault(rest[0], set()).add(rest)
    if not by_first:
        return re.escape(prefix)
    body = "|".join(_branches(by_first[first]) for first in sorted(by_first))
    return f"{re.escape(prefix)}(?:{body}){'?' if '' in rests else ''}"


def _does_something(normalizer: dict[str, Any]) -> bool:
    """Whether it is no empty sequence, which DeepSeek-V3's tokenizer has."""
    if normalizer["type"] != "Sequence":
        return True
    return any(map(_does_something, normalizer["normalizers"]))


def _renamed(
    tokenizer: Tokenizer, names: Mapping[str, str], ids: Mapping[str, int]
) -> Tokenizer | None:
    """The tokenizer with other names for its control tokens, also in the model's vocabulary: some
    models find any entry of it in a text. None where the library does not make it so."""
    parsed = json.loads(tokenizer.to_str())
    _rename_in_model(parsed["model"], names)
    for token in parsed["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["single_word"] = False
    for _ in range(2):
        try:
            renamed = Tokenizer.from_str(json.dumps(parsed))
        except Exception:  # of no type of its own
            return None
        if all(
            ids[token] in renamed.encode(name, add_special_tokens=False).ids
            and renamed.token_to_id(token) is None
            for token, name in names.items()
        ):
            return renamed
        for token in parsed["added_tokens"]:
            token["normalized"] = False  # a normalizer may drop noncharacters
    return None


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): id_ for token, id_ in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        # Two tokens that make a control token, or one that it is part of, are merged no more.
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if not {left, right, left + right.removeprefix(prefix)} & names.keys()
        ]

"""The API keys of the configuration: what a key file, or an environment variable, may say.

There are two forms. Keys alone, one a line (in a variable also separated by commas), where empty
lines and lines that begin with `#` are skipped:

    sk-4f0c...

and a YAML mapping, which names the keys and says what each may do:

    keys:
      - {name: team-a, key: sk-..., priority: 0, weight: 2, models: [deepseek-v3-int4],
         limits: {max_concurrency: 8, requests_per_minute: 60, tokens_per_minute: 100000}}
      - {name: team-b, key_sha256: <64 hexadecimal digits>}

The first line that is neither empty nor a comment says which form it is: YAML begins with a word
and a colon (`keys:`), with `{`, with `- ` or with `---`. No sentence here repeats anything of the
content, because a key may stand in the wrong place. routing/tenants.py makes tenants of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError, decode_text
from deepseek.yaml_files import StrictModel, parse_yaml_mapping
from serve_app.key_file import MAX_KEY_FILE_BYTES, is_sendable, read_key_bytes
from serve_app.sections import KeyLimits, KeysSection

#: Keys in all. Every request is compared with each of them.
MAX_KEYS = 10_000
#: Hexadecimal digits of a key's SHA-256 by which a key without a name is called.
_NAME_DIGITS = 12

#: How YAML begins. A key of the other form has no space and, but for its last character, no reason
#: to look like this.
_YAML_START = re.compile(r"\{|-\s|---(\s|$)|%YAML|[\"']?[A-Za-z_]+[\"']?\s*:(\s|$)")
#: Names go to logs, metrics and spans.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedKey:
    """One API key. `digest` is the key's SHA-256: the key itself is not kept. `limits` None takes
    the configured default; `models` None is every model."""

    name: str
    digest: bytes = field(repr=False)
    priority: int = 0
    weight: float = 1.0
    limits: KeyLimits | None = None
    models: frozenset[str] | None = None


def key_digest(key: str) -> bytes:
    """The SHA-256 of a key, as `printf %s KEY | sha256sum` prints it."""
    return hashlib.sha256(key.encode()).digest()


def read_keys(section: KeysSection, content: bytes | None = None) -> tuple[NamedKey, ...]:
    """All configured keys: inline, of the file, of the variable. `content` is what the file holds,
    where it was read already.

    Raises:
        ConfigError: the file or the variable cannot be used, or two keys have one name or are the
            same; says why, and shows no key.
    """
    keys = tuple(_unnamed(key.get_secret_value()) for key in section.inline)
    problem = None
    where = "keys.inline"
    try:
        _check_unique(keys)
        if section.file is not None:
            where = str(section.file)
            content = read_key_bytes(section.file) if content is None else content
            keys += parse_keys(content)
        if section.variable is not None:
            where = f"the environment variable {section.variable}"
            keys += _read_variable(section.variable)
        where = "the configuration (keys.inline, keys.file, keys.variable)"
        _check_unique(keys)
    except UnusableFileError as error:
        problem = f"{where} {error}"
    if problem is not None:  # raised here, so that no traceback leads to what was read
        raise ConfigError(problem)
    return keys


def parse_keys(data: bytes, *, commas: bool = False) -> tuple[NamedKey, ...]:
    """The keys of a file's or a variable's content, in either form. `commas` separate keys, too.

    Raises:
        UnusableFileError: it holds no key, or something wrong; says where and what to change.
    """
    text = decode_text(data).removeprefix("\ufeff")
    lines = [line.strip() for line in text.split("\n")]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    keys = _parse_yaml(data) if _YAML_START.match(first) else _parse_lines(lines, commas=commas)
    if len(keys) > MAX_KEYS:
        raise UnusableFileError(f"holds {len(keys)} keys; the limit is {MAX_KEYS}")
    _check_unique(keys)
    return keys


def _read_variable(name: str) -> tuple[NamedKey, ...]:
    value = os.environ.get(name)
    if value is None:
        raise UnusableFileError("is not set; set it, or remove keys.variable")
    data = os.fsencode(value)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise UnusableFileError(f"has over {MAX_KEY_FILE_BYTES} bytes; keep only keys in it")
    return parse_keys(data, commas=True)


def _unnamed(key: str) -> NamedKey:
    digest = key_digest(key)
    return NamedKey(name=f"key-{digest.hex()[:_NAME_DIGITS]}", digest=digest)


def _parse_lines(lines: list[str], *, commas: bool) -> tuple[NamedKey, ...]:
    keys = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            continue
        for key in map(str.strip, line.split(",") if commas else [line]):
            if not key:
                continue
            if not is_sendable(key):
                raise UnusableFileError(
                    f"holds in line {number} what no header carries; keys are visible ASCII "
                    "without spaces"
                )
            keys.append(_unnamed(key))
    if not keys:
        raise UnusableFileError("holds no key; write one a line")
    return tuple(keys)


def _check_unique(keys: Iterable[NamedKey]) -> None:
    names: dict[bytes, str] = {}
    taken: set[str] = set()
    for key in keys:
        other = names.get(key.digest)
        if other == key.name:
            raise UnusableFileError(f"holds the key {key.name} twice; remove one")
        if other is not None:
            raise UnusableFileError(f"gives {other} and {key.name} the same key; remove one")
        if key.name in taken:
            raise UnusableFileError(f"gives two keys the name {key.name}; give each its own")
        names[key.digest] = key.name
        taken.add(key.name)


class _Strict(StrictModel):
    model_config = ConfigDict(hide_input_in_errors=True)


class _Entry(_Strict):
    """One key of the YAML form."""

    name: str
    key: SecretStr | None = None
    key_sha256: SecretStr | None = None
    #: Bands of lower priority go first.
    priority: int = Field(default=0, ge=-1000, le=1000)
    #: The share of a key among those of its band that want more than there is.
    weight: float = Field(default=1.0, ge=0.01, le=100.0)
    limits: KeyLimits | None = None
    models: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
            Field(min_length=1, max_length=64),
        ]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_nothing(cls, given: Any) -> Any:
        """A field without a value would mean every model, or no limit: it is more likely a slip."""
        known = {*cls.model_fields, *KeyLimits.model_fields}
        mappings = [given, given.get("limits")] if isinstance(given, dict) else []
        for mapping in mappings:
            for name, value in mapping.items() if isinstance(mapping, dict) else ():
                if value is None and name in known:
                    raise ValueError(f"{name} holds nothing; give it a value or remove it")
        return given

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "a name is 1 to 64 letters, digits, dots, underscores and hyphens, and begins with "
                "a letter or digit"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> _Entry:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give one of key and key_sha256")
        if self.key is not None and not is_sendable(self.key.get_secret_value()):
            raise ValueError("key holds what no header carries; keys are visible ASCII")
        if self.key_sha256 is not None and not _SHA256.fullmatch(self._hex):
            raise ValueError("key_sha256 must be 64 hexadecimal digits")
        return self

    @property
    def _hex(self) -> str:
        assert self.key_sha256 is not None
        return self.key_sha256.get_secret_value().lower()

    def named(self) -> NamedKey:
        return NamedKey(
            name=self.name,
            digest=(
                bytes.fromhex(self._hex)
                if self.key is None
                else key_digest(self.key.get_secret_value())
            ),
            priority=self.priority,
            weight=self.weight,
            limits=self.limits,
            models=None if self.models is None else frozenset(self.models),
        )


class _KeyFile(_Strict):
    keys: tuple[_Entry, ...] = Field(min_length=1)


#: What pydantic says of these in its own words, which speak of Python.
_WORDS = {
    "model_type": "must be a mapping",
    "tuple_type": "must be a list",
    "string_type": "must be text; put it in quotes",
    "missing": "is missing",
}


def _parse_yaml(data: bytes) -> tuple[NamedKey, ...]:
    problem = ""
    try:
        entries = _KeyFile.model_validate(parse_yaml_mapping(data)).keys
    except UnusableFileError as error:
        problem = error.masked
    except ValidationError as error:
        problem = _explain(error.errors(include_input=False, include_url=False)[0])
    if problem:
        raise UnusableFileError(problem)
    return tuple(entry.named() for entry in entries)


def _explain(item: Any) -> str:
    """One sentence for one of pydantic's errors, without anything that the file holds."""
    known = [*item["loc"]]
    if item["type"] == "extra_forbidden":
        known.pop()
        fields = _KeyFile if not known else KeyLimits if known[-1] == "limits" else _Entry
        reason = f"has a field that is none of {', '.join(fields.model_fields)}; correct it"
    else:
        reason = _WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
    place = ".".join(map(str, known)) or "the top"
    return f"is wrong at {place}: {reason}"

"""Reads the YAML files that a user writes (recipes, settings) to plain values; and the model that
validates them.

YAML has more than such a file needs, and some of it harms: aliases that expand to gigabytes,
objects, a key given twice of which the last wins silently, numbers that are not what they look like
(1:30 is 90, 010 is 8). `read_yaml_mapping` refuses all of that in one sentence. This file imports
no torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from deepseek.untrusted import UnusableFileError, decode_text, read_bytes

#: Largest file. A rule for each role of each layer of DeepSeek-V3 takes about 50 KB.
MAX_YAML_BYTES = 256 << 10
#: Most values and keys, each alias counted as all that it stands for.
MAX_NODES = 40_000
#: Deepest nesting, aliases followed; a recipe needs 3.
MAX_DEPTH = 16

_TAG = "tag:yaml.org,2002:"


class StrictModel(BaseModel):
    """Settings that a user writes: no unknown key, no infinity or NaN, no boolean for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"Input should not be {str(value).lower()}, a boolean")
        return value


def read_yaml_mapping(path: Path, *, root: Path | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds: strings to strings, numbers, booleans, null, lists and
    mappings. `root` as for `untrusted.read_bytes`.

    Raises:
        UnusableFileError: the file cannot be read, is not such YAML, or holds something else; the
            sentence says where.
    """
    return parse_yaml_mapping(read_bytes(path, root=root, max_bytes=MAX_YAML_BYTES))


def parse_yaml_mapping(data: bytes) -> dict[str, Any]:
    """Like `read_yaml_mapping`, for the content of a file that was read already.

    Raises:
        UnusableFileError: it is not such YAML; the sentence says where.
    """
    text = decode_text(data).removeprefix("\ufeff")
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else _place(error.problem_mark)
        problem = f"{error.problem or error.context}"[:200]
        raise UnusableFileError(
            f"is not valid YAML: {problem}{where}", masked=f"is not valid YAML{where}"
        ) from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())[:200]
        raise UnusableFileError(
            f"is not valid YAML: {problem}",
            masked="is not valid YAML: it holds a character that YAML has not",
        ) from error
    if not isinstance(value, dict):
        kind = "nothing" if value is None else "a list" if isinstance(value, list) else "one value"
        raise UnusableFileError(f"must hold a mapping of keys to values, not {kind}")
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds, and without the types and number forms that a settings file
    has no use for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._num_nodes = 0
        #: id of a finished node -> its number of nodes and its depth, aliases followed.
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._extents:
                raise UnusableFileError(
                    f"has an alias for something that the alias is part of{_place(mark)}; remove it"
                )
            return node
        self._level += 1
        self._check_depth(self._level, mark)
        self._num_nodes += 1
        self._check_size(self._num_nodes, mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is not None:
            self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> None:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        extents = [self._extents[id(child)] for child in children]
        size = 1 + sum(size for size, _ in extents)
        self._check_size(size, node.start_mark)
        depth = 1 + max((depth for _, depth in extents), default=0)
        self._check_depth(depth, node.start_mark)
        self._extents[id(node)] = size, depth

    def _check_size(self, size: int, mark: yaml.Mark) -> None:
        if size > MAX_NODES:
            raise UnusableFileError(f"holds more than {MAX_NODES} values{_place(mark)}; shorten it")

    def _check_depth(self, depth: int, mark: yaml.Mark) -> None:
        if depth > MAX_DEPTH:
            raise UnusableFileError(f"is nested deeper than {MAX_DEPTH} levels{_place(mark)}")


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    given: set[str] = set()
    for key, _ in node.value:
        if key.tag == _TAG + "merge":
            continue
        _check_key(key)
        if key.value in given:
            place = _place(key.start_mark)
            raise UnusableFileError(
                f"gives the key {key.value[:80]!r} twice{place}; remove one",
                masked=f"gives a key of a mapping twice{place}; remove one",
            )
        given.add(key.value)
    loader.flatten_mapping(node)  # `<<`, whose keys may be given again
    for key, _ in node.value:
        _check_key(key)
    return {
        _construct_string(loader, key): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _check_key(key: yaml.Node) -> None:
    if key.tag != _TAG + "str":
        shown = f" {key.value[:40]!r}" if isinstance(key, yaml.ScalarNode) else ""
        rest = f"that is no string{_place(key.start_mark)}; correct it, or put it in quotes"
        raise UnusableFileError(f"has a key{shown} {rest}", masked=f"has a key {rest}")


def _construct_string(loader: _Loader, node: yaml.ScalarNode) -> str:
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise UnusableFileError(
            f"holds half of a surrogate pair, which is no character{_place(node.start_mark)}; "
            "correct it"
        ) from error
    return str(node.value)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = node.value.lstrip("+-")
    if ":" in digits or (len(digits) > 1 and digits[0] == "0" and digits[1] not in "bx"):
        raise _misleading(node, "a number of base 60 or 8")
    if len(digits) > 100:
        raise _misleading(node, "an integer of more than 100 digits")
    try:
        return int(loader.construct_yaml_int(node))
    except ValueError as error:  # 0x_: a prefix without a digit
        raise _misleading(node, "a number without digits") from error


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    if ":" in node.value:
        raise _misleading(node, "a number of base 60")
    value = float(loader.construct_yaml_float(node))
    if not math.isfinite(value):
        rest = f"which is no finite number{_place(node.start_mark)}; give one"
        raise UnusableFileError(f"holds {node.value[:40]}, {rest}", masked=f"holds a number {rest}")
    return value


def _refuse(loader: _Loader, node: yaml.Node) -> Any:
    kind = str(node.tag).removeprefix(_TAG)
    if kind == "timestamp":
        raise _misleading(node, "a date")
    place = _place(node.start_mark)
    rest = "only strings, numbers, booleans, null, lists and mappings are read"
    raise UnusableFileError(
        f"uses the YAML type {kind[:40]!r}{place}; {rest}",
        masked=f"uses another YAML type{place}; {rest}",
    )


def _misleading(node: yaml.Node, what: str) -> UnusableFileError:
    rest = (
        f"which YAML reads as {what}{_place(node.start_mark)}; write a decimal number, or put it "
        "in quotes"
    )
    return UnusableFileError(
        f"holds {str(node.value)[:40]}, {rest}", masked=f"holds a value {rest}"
    )


def _place(mark: yaml.Mark) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})"


for _tag in list(_Loader.yaml_constructors):
    if _tag not in (_TAG + "null", _TAG + "bool", _TAG + "seq"):
        _Loader.add_constructor(_tag, _refuse)
_Loader.add_constructor(_TAG + "map", _construct_mapping)
_Loader.add_constructor(_TAG + "str", _construct_string)
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)

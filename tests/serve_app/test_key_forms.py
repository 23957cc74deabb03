"""The two forms of a key file and a variable: what is read of them, and that no sentence, repr or
traceback shows a key."""

from __future__ import annotations

import hashlib
import re
import subprocess
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from support.parts import require

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError
from serve_app.key_forms import MAX_KEYS, NamedKey, key_digest, parse_keys, read_keys
from serve_app.sections import KeyLimits, KeysSection

#: A key of which no four characters in a row stand in any sentence of ours.
CANARY = "QZJXVKWQJZ0417"
SHA = hashlib.sha256(b"sk-b").hexdigest()

WHOLE = f"""\
# who may ask
keys:
  - name: team-a
    key: sk-a
    priority: -1
    weight: 2
    limits: {{max_concurrency: 8, requests_per_minute: 60, tokens_per_minute: 100000}}
    models: [deepseek-v3-int4, other]
  - {{name: b, key_sha256: {SHA}}}
"""


def shows(text: str, secret: str = CANARY) -> bool:
    """Whether a text holds any four characters in a row of a secret."""
    return any(secret[i : i + 4] in text for i in range(len(secret) - 3))


def everything_of(error: BaseException | None) -> str:
    """An exception and all that it came from, also what a traceback would leave out."""
    text = ""
    while error is not None:
        text += "".join(traceback.format_exception_only(error)) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return text


def refusal(data: bytes | str) -> str:
    data = data.encode() if isinstance(data, str) else data
    with pytest.raises(UnusableFileError) as refused:
        parse_keys(data)
    return str(refused.value)


def entries(*keys: dict[str, Any]) -> bytes:
    return yaml.safe_dump({"keys": list(keys)}).encode()


def test_the_yaml_form_says_all_that_a_key_may_do() -> None:
    a, b = parse_keys(WHOLE.encode())
    limits = KeyLimits(max_concurrency=8, requests_per_minute=60, tokens_per_minute=100000)
    models = frozenset(("deepseek-v3-int4", "other"))
    assert a == NamedKey(name="team-a", digest=key_digest("sk-a"), priority=-1, weight=2.0,
                         limits=limits, models=models)  # fmt: skip
    assert b == NamedKey(name="b", digest=key_digest("sk-b")), "a digest stands for its key"


def test_keys_alone_are_one_a_line_and_are_called_by_their_digest() -> None:
    keys = parse_keys(b"\xef\xbb\xbf# alice\nsk-one\r\n\n  sk-two==  \n#sk-three\na,b\n")
    assert [key.digest for key in keys] == [key_digest(k) for k in ("sk-one", "sk-two==", "a,b")]
    assert keys[0].name == "key-" + hashlib.sha256(b"sk-one").hexdigest()[:12]
    assert keys[0] == NamedKey(name=keys[0].name, digest=keys[0].digest)


@pytest.mark.parametrize("value", ["one,two", "one\ntwo", " one , two ,", "#x\none,\n\ntwo\n"])
def test_a_variable_separates_keys_by_commas_or_lines(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEYS", value)
    keys = read_keys(KeysSection(variable="SOME_KEYS"))
    assert [key.digest for key in keys] == [key_digest("one"), key_digest("two")]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"---\n{WHOLE}",
        "\n\n   # a comment\n" + WHOLE,
        '{"keys": [{"name": "team-a", "key": "sk-a"}, {"name": "b", "key": "sk-b"}]}',
        "keys: [{name: team-a, key: sk-a}, {name: b, key: sk-b}]",
        '"keys":\r\n- name: team-a\r\n  key: sk-a\r\n- name: b\r\n  key: sk-b\r\n',
        "%YAML 1.1\n---\nkeys: [{name: team-a, key: sk-a}, {name: b, key: sk-b}]",
    ],
)
def test_the_content_says_which_form_it_is_in_a_file_and_in_a_variable(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEYS", text)
    for keys in (parse_keys(text.encode()), read_keys(KeysSection(variable="SOME_KEYS"))):
        assert [key.name for key in keys] == ["team-a", "b"]
        assert keys[1].digest == key_digest("sk-b")


@pytest.mark.parametrize("line", ["sk-one", "abc:def", "a,b", "YWJj==", "key1:", "sk-x:", "-", "'"])
def test_what_was_a_key_before_is_one_still(line: str) -> None:
    assert parse_keys(line.encode())[0].digest == key_digest(line)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("", "holds no key; write one a line"),
        (f"\n# {CANARY}\n", "holds no key; write one a line"),
        (f"good\n{CANARY} two\n", "holds in line 2 what no header carries"),
        (f"{CANARY}\u00e9", "holds in line 1 what no header carries"),
        (f"{CANARY}\n\n{CANARY}", "twice; remove one"),
        (CANARY.encode() + b"\xff", "is not UTF-8 text"),
        (f"{CANARY}\x00", "holds in line 1"),
        ("\n".join(f"k{i}" for i in range(MAX_KEYS + 1)), f"holds {MAX_KEYS + 1} keys; the limit"),
        (f"- {CANARY}\n- b", "must hold a mapping of keys to values, not a list"),
        ("keys:", "is wrong at keys: must be a list"),
        ("keys: []", "is wrong at keys: "),
        (f"keys: {CANARY}", "is wrong at keys: must be a list"),
        (f"keys: [{CANARY}]", "is wrong at keys.0: must be a mapping"),
        (f"keys: {{{CANARY}: {{name: a}}}}", "is wrong at keys: must be a list"),
        (f"key: [{CANARY}]", "is wrong at "),
        (f"keys: []\n{CANARY}: 1", "is wrong at "),
        (f"keys:\n  - key: {CANARY}\n", "is wrong at keys.0.name: is missing"),
        (f"keys: [{{name: '', key: {CANARY}}}]", "keys.0.name: a name is 1 to 64 letters"),
        (f"keys: [{{name: a b, key: {CANARY}}}]", "keys.0.name: a name is 1 to 64 letters"),
        (f"keys: [{{name: {'a' * 65}, key: {CANARY}}}]", "keys.0.name: a name is 1 to 64"),
        (f'keys: [{{name: "a\\n", key: {CANARY}}}]', "keys.0.name: a name is 1 to 64"),
        (f"keys: [{{name: 7, key: {CANARY}}}]", "keys.0.name: must be text; put it in quotes"),
        ("keys: [{name: a}]", "is wrong at keys.0: give one of key and key_sha256"),
        (f"keys: [{{name: a, key: {CANARY}, key_sha256: {SHA}}}]", "give one of key and key_sha"),
        ("keys: [{name: a, key: 4170417}]", "keys.0.key: must be text; put it in quotes"),
        ("keys: [{name: a, key: ''}]", "key holds what no header carries"),
        (f"keys: [{{name: a, key: '{CANARY} x'}}]", "key holds what no header carries"),
        (f"keys: [{{name: a, key: [{CANARY}]}}]", "keys.0.key: must be text"),
        (f"keys: [{{name: a, key_sha256: {CANARY}}}]", "must be 64 hexadecimal digits"),
        (f"keys: [{{name: a, key_sha256: {SHA}0}}]", "must be 64 hexadecimal digits"),
        (f"keys: [{{name: a, key_sha256: {'1' * 64}}}]", "key_sha256: must be text; put it in q"),
        (f"keys: [{{name: a, key_sha256: {'0' * 64}}}]", "a number of base 60 or 8"),
        (f"keys: [{{name: a, key: {CANARY}, key: x}}]", "gives a key of a mapping twice"),
        (f"keys: [{{name: a, key: x, {CANARY}: 1}}]", "keys.0: has a field that is none of name,"),
        (f"keys: [{{name: a, key: {CANARY}, limit: 3}}]", "keys.0: has a field that is none of n"),
        (f"keys: [{{name: a, key: x, limits: {{{CANARY}: 1}}}}]", "none of max_concurrency, requ"),
        (f"keys: [{{name: a, key: {CANARY}, limits: {{max_concurrency: 0}}}}]",
         "keys.0.limits.max_concurrency: "),
        (f"keys: [{{name: a, key: {CANARY}, priority: high}}]", "keys.0.priority: "),
        (f"keys: [{{name: a, key: {CANARY}, priority: true}}]", "keys.0.priority: "),
        (f"keys: [{{name: a, key: {CANARY}, priority: 1001}}]", "keys.0.priority: "),
        (f"keys: [{{name: a, key: {CANARY}, weight: 0}}]", "keys.0.weight: "),
        (f"keys: [{{name: a, key: {CANARY}, weight: .inf}}]", "no finite number"),
        (f"keys: [{{name: a, key: {CANARY}, models: []}}]", "keys.0.models: "),
        (f"keys: [{{name: a, key: {CANARY}, models: }}]", "keys.0: models holds nothing; give it"),
        (f"keys: [{{name: a, key: {CANARY}, limits: }}]", "keys.0: limits holds nothing"),
        (f"keys: [{{name: a, key: {CANARY}, limits: {{max_concurrency: }}}}]",
         "keys.0: max_concurrency holds nothing"),
        (f"keys: [{{name: a, key: {CANARY}, {CANARY}: }}]", "keys.0: has a field that is none of"),
        (f"keys: [{{name: a, key: {CANARY}, models: one}}]", "keys.0.models: must be a list"),
        (f"keys: [{{name: a, key: {CANARY}, models: ['']}}]", "keys.0.models.0: "),
        (f"keys: [{{name: a, key: {CANARY}}}, {{name: a, key: x}}]", "gives two keys the name a;"),
        (f"keys: [{{name: a, key: {CANARY}}}, {{name: b, key: {CANARY}}}]",
         "gives a and b the same key; remove one"),
        (f"keys: [{{name: a, key: sk-b}}, {{name: b, key_sha256: {SHA.upper()}}}]",
         "gives a and b the same key"),
        (f"keys: [{{name: a, key: *{CANARY}}}]", "is not valid YAML (line 1"),
        (f"keys: [{{name: a, key: !{CANARY} x}}]", "uses another YAML type (line 1"),
        (f"keys: [{{name: a, key: \"{CANARY}\\q\"}}]", "is not valid YAML (line 1"),
        (f"keys: [{{name: a, key: \"{CANARY}", "is not valid YAML"),
        (f"keys: [{{name: a, key: {CANARY}\x07}}]", "a character that YAML has not"),
        ("keys: [{name: a, key: 0x_}]", "a number without digits"),
        ("keys: [{name: a, key: 2026-11-26}]", "holds a value which YAML reads as a date"),
        (f"keys: [{{name: a, key: x, 4170417: {CANARY}}}]", "has a key that is no string"),
        ("keys: &x [*x]", "has an alias"),
        ("keys: " + "[" * 200, "is nested deeper than"),
    ],
)  # fmt: skip
def test_what_holds_no_usable_keys_is_refused_in_a_sentence_that_shows_none(
    data: bytes | str, sentence: str
) -> None:
    told = refusal(data)
    assert sentence in told
    assert not shows(told)
    assert "417041" not in told
    assert SHA[:6] not in told
    assert "\n" not in told


@pytest.mark.heavy
def test_no_slip_of_the_keyboard_shows_a_key(tmp_path: Path) -> None:
    text = f"keys:\n- name: a\n  key: {CANARY}\n  weight: 8\n- {{name: b, key: '{CANARY[::-1]}'}}\n"
    section = KeysSection(file=tmp_path / "keys")
    refused = 0
    for place in range(len(text)):
        after = text[place + 1 :]
        changes = [text[:place] + character + text[place:] for character in ":,{[\"'&*!\n 0"]
        for changed in (text[:place], text[:place] + after, *changes):
            try:
                keys = read_keys(section, changed.encode())
            except ConfigError as error:
                refused += 1
                told = everything_of(error)
                assert not shows(told), changed
                assert not shows(told, CANARY[::-1]), changed
            else:
                assert not shows(repr(keys)), changed
    assert refused > 500


def test_no_traceback_leads_to_what_was_read(tmp_path: Path) -> None:
    section = KeysSection(inline=(SecretStr(CANARY),), file=tmp_path / "keys")
    for content in (f"keys: [{{name: a, key: *{CANARY}}}]", f"keys: [{{key: {CANARY}}}]", CANARY):
        with pytest.raises(ConfigError) as refused:
            read_keys(section, content.encode())
        assert not shows(everything_of(refused.value))


def test_keys_of_all_sources_are_right_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_bytes(entries({"name": "a", "key": "of-file"}))
    monkeypatch.setenv("SOME_KEYS", "of-variable")
    section = KeysSection(inline=(SecretStr("inline"),), file=path, variable="SOME_KEYS")
    digests = [key.digest for key in read_keys(section)]
    assert digests == [key_digest(k) for k in ("inline", "of-file", "of-variable")]


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("inline", r"^the configuration \(keys.inline, .* holds the key key-\w{12} twice"),
        ("keys: [{name: a, key: x}]", "gives two keys the name a; give each its own"),
        ("keys: [{name: b, key: of-file}]", "gives a and b the same key"),
        ("", "^the environment variable SOME_KEYS holds no key"),
        (f"keys: {CANARY}", "^the environment variable SOME_KEYS is wrong at keys"),
        ("x" * 90_000, None),
    ],
)
def test_two_sources_hold_no_key_or_name_twice(
    variable: str, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEYS", variable)
    section = KeysSection(
        inline=(SecretStr("inline"),), file=tmp_path / "absent", variable="SOME_KEYS"
    )
    content = entries({"name": "a", "key": "of-file"})
    if sentence is None:
        assert len(read_keys(section, content)) == 3
        return
    with pytest.raises(ConfigError, match=sentence) as refused:
        read_keys(section, content)
    assert not shows(str(refused.value))


def test_a_variable_of_any_bytes_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEYS", b"\xff\xfe".decode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="SOME_KEYS is not UTF-8 text"):
        read_keys(KeysSection(variable="SOME_KEYS"))


def test_the_example_has_the_keys_that_it_says(root: Path) -> None:
    text = (root / "examples" / "serve" / "keys.yaml").read_text(encoding="utf-8")
    said = re.findall(r"# printf %s (\S+) \| sha256sum", text)
    keys = parse_keys(text.encode())
    assert [key.digest for key in keys] == [key_digest(key) for key in said]
    assert [f"example-key-of-{key.name}" for key in keys] == said


def test_the_commands_of_the_page_make_a_key_and_its_file(root: Path, tmp_path: Path) -> None:
    require("openssl")
    page = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    marked = re.search(
        r"<!-- executed by tests/serve_app/test_key_forms\.py -->\n```sh\n(.*?)```", page, re.S
    )
    assert marked
    subprocess.run(["bash", "-euo", "pipefail", "-c", marked[1]], cwd=tmp_path, check=True)
    key = (tmp_path / "team-a.key").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    (made,) = read_keys(KeysSection(file=tmp_path / "keys.yaml"))
    assert made == NamedKey(name="team-a", digest=key_digest(key))


def test_the_page_lists_every_field_of_an_entry(root: Path) -> None:
    page = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("each entry of its list `keys` has:")[2].partition("\n- ")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    listed = re.findall(r"`(\w+)`", " ".join(cells))
    message = refusal(f"keys: [{{name: a, key: x, {CANARY}: 1}}]")
    assert ", ".join(listed) in message


def test_a_repr_shows_neither_key_nor_digest() -> None:
    (key,) = parse_keys(entries({"name": "a", "key": CANARY}))
    told = repr(key)
    assert "name='a'" in told
    assert not shows(told)
    assert not shows(told, key.digest.hex())
    assert "digest" not in told

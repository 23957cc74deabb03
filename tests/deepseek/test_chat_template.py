"""Chat templates: transformers' text of them, and no harm from hostile ones."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import ATTACKS, ENDLESS, TEMPLATES, write_tokenizer

from deepseek.chat_template import ChatRenderer, ChatTemplate, ChatTemplateError
from deepseek.untrusted import UnusableFileError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": 'Hallo <b>"Welt"</b> & ü 你好\n '}],
    "system and reply": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>so</think>yes", "reasoning": "because"},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "and?"},
    ],
    "tools": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "two"},
    ],
    "outputs are read": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "I add.", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": None},
        {"role": "assistant", "content": "It is 2.", "thinking": "easy"},
    ],
}


@pytest.fixture(scope="module")
def transformers_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return PreTrainedTokenizerFast.from_pretrained(str(directory))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(
    name: str, transformers_tokenizer: Any, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    renderer = ChatRenderer(template)
    for conversation in CONVERSATIONS.values():
        for tools in (None, [TOOL]):
            for prompt in (False, True):
                theirs = transformers_tokenizer.apply_chat_template(
                    conversation,
                    tools=tools,
                    chat_template=TEMPLATES[name],
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
                ours = renderer.render(conversation, tools=tools, add_generation_prompt=prompt)
                assert ours == theirs
    renderer.close()


def test_the_example_models_template_gives_transformers_text(tiny_model: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = ChatTemplate.from_directory(tiny_model)
    assert template is not None
    renderer = ChatRenderer(template)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tiny_model))
    for conversation in list(CONVERSATIONS.values())[:2]:
        theirs = tokenizer.apply_chat_template(conversation, tokenize=False)
        assert renderer.render(conversation) == theirs
    renderer.close()


def test_every_filter_runs_in_the_helper_as_it_does_here() -> None:
    """The helper may open no file, so that whatever a filter imports must have been imported."""
    from jinja2.exceptions import TemplateError

    from deepseek.chat_template_worker import make_environment

    environment = make_environment()
    names = sorted(set(environment.filters) - {"random"})
    sources = {
        name: "{{ ['b<c> http://a.b', 'a'] | %s }}{{ 'b <c>' | %s }}".replace("%s", name)
        for name in names
    }
    cases = "".join(
        "{% elif messages[0].content == '" + name + "' %}" + source
        for name, source in sources.items()
    )
    source = "{% if false %}" + cases + "{% endif %}"
    renderer = ChatRenderer(ChatTemplate({"default": source}, {}))
    here = environment.from_string(source)
    for name in names:
        messages = [{"content": name}]
        expected, refusal = None, None
        try:
            expected = here.render(messages=messages)
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            refusal = " ".join(str(error).split())[:60]
        if expected is None:
            with pytest.raises(ChatTemplateError, match=re.escape(str(refusal))):
                renderer.render(messages)
        else:
            text = renderer.render(messages)
            assert text.partition(" at 0x")[0] == expected.partition(" at 0x")[0], name
    renderer.close()


def attack(source: str, sentence: str, max_seconds: float) -> None:
    guarded = "{% if messages[0].content == 'go' %}" + source + "{% else %}fine{% endif %}"
    renderer = ChatRenderer(ChatTemplate({"default": guarded}, {}), max_seconds=max_seconds)
    with pytest.raises(ChatTemplateError, match=sentence) as error:
        renderer.render([{"role": "user", "content": "go"}])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert renderer.render([{"role": "user", "content": "stay"}]) == "fine"
    renderer.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_template_gets_one_line_and_the_next_conversation_its_text(name: str) -> None:
    attack(*ATTACKS[name], max_seconds=20)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_ended_and_the_next_conversation_gets_its_text(name: str) -> None:
    attack(*ENDLESS[name], max_seconds=2)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% if %}", r"is malformed \(line 1: "),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "RecursionError"),
        ("{% block %}", "is malformed"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused(source: str, sentence: str) -> None:
    renderer = ChatRenderer(ChatTemplate({"default": source}, {}))
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match=sentence):
            renderer.render([])
    renderer.close()


def test_what_a_template_raises_is_told_in_one_line() -> None:
    source = "{{ raise_exception('roles\n must ' + 'alternate ' * 99) }}"
    renderer = ChatRenderer(ChatTemplate({"default": source}, {}))
    with pytest.raises(
        ChatTemplateError, match="refuses these messages: roles must alter"
    ) as error:
        renderer.render([])
    assert len(str(error.value)) < 350
    renderer.close()


def test_the_helper_has_none_of_our_environment_and_opens_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    renderer = ChatRenderer(ChatTemplate({"default": "fine"}, {}))
    assert renderer.render([]) == "fine"
    helper = renderer._helpers.queue[0]._process  # type: ignore[attr-defined]
    folder = Path(f"/proc/{helper.pid}")
    assert b"SECRET_OF_OURS" not in (folder / "environ").read_bytes()
    assert len(os.listdir(folder / "fd")) == 3
    limits = (folder / "limits").read_text()
    assert [line.split()[3] for line in limits.splitlines() if "open files" in line] == ["3"]
    renderer.close()
    assert helper.poll() is not None


def test_a_helper_that_was_killed_is_replaced() -> None:
    renderer = ChatRenderer(ChatTemplate({"default": "fine"}, {}))
    assert renderer.render([]) == "fine"
    helper = renderer._helpers.queue[0]._process  # type: ignore[attr-defined]
    helper.kill()
    helper.wait()
    assert renderer.render([]) == "fine"
    renderer.close()


@pytest.mark.heavy
def test_while_one_conversation_loops_another_is_rendered() -> None:
    source = "{% if messages[0].content == 'go' %}" + ENDLESS["loops"][0] + "{% endif %}fine"
    renderer = ChatRenderer(ChatTemplate({"default": source}, {}), processes=2, max_seconds=2)
    failed: list[str] = []

    def loop() -> None:
        try:
            renderer.render([{"content": "go"}])
        except ChatTemplateError as error:
            failed.append(str(error))

    thread = threading.Thread(target=loop)
    thread.start()
    while renderer._helpers.qsize() == 2:
        time.sleep(0.01)
    assert renderer.render([{"content": "stay"}]) == "fine"
    assert not failed  # it was still at work
    thread.join()
    assert failed == ["takes more than 2 s for one conversation"]
    renderer.close()


def written(directory: Path, files: dict[str, Any]) -> ChatTemplate | None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8", newline="")
    return ChatTemplate.from_directory(directory)


NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("files", "sources"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"bos_token": "<s>"}}, None),
        ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, {"default": "d", "tool_use": "t"}),
        (
            {"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b\r\nc"},
            {"default": "b\nc"},
        ),
        (
            {"chat_template.jinja": "b", "additional_chat_templates/tool_use.jinja": "u"},
            {"default": "b", "tool_use": "u"},
        ),
    ],
)
def test_a_template_is_found_where_transformers_finds_it(
    tmp_path: Path, files: dict[str, Any], sources: dict[str, str] | None
) -> None:
    template = written(tmp_path, files)
    assert (template and dict(template.sources)) == sources


def test_special_tokens_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    config = {"chat_template": "a", "bos_token": {"content": "<s>"}, "pad_token": None}
    template = written(
        tmp_path,
        {"tokenizer_config.json": config, "special_tokens_map.json": {"eos_token": "</s>"}},
    )
    assert template is not None
    assert template.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    template = written(tmp_path, {"tokenizer_config.json": config | {"added_tokens_decoder": {}}})
    assert template is not None
    assert template.special_tokens == {"bos_token": "<s>"}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("{{ 1 }}")
    return path


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json is not valid JSON"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template must be a string, or a"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "a"}]}}, "chat_template must be"),
        ({"chat_template.jinja": "x" * (9 << 20)}, r"chat_template\.jinja has 9437184 bytes"),
    ],
)
def test_malformed_files_are_refused_by_name(
    tmp_path: Path, files: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UnusableFileError, match=sentence):
        written(tmp_path, files)


def test_a_template_is_no_link_to_elsewhere(tmp_path: Path, elsewhere: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "chat_template.jinja").symlink_to(elsewhere)
    with pytest.raises(UnusableFileError, match="link to a file outside"):
        ChatTemplate.from_directory(model)


def test_named_templates_without_a_default_are_refused_by_name() -> None:
    renderer = ChatRenderer(ChatTemplate({"rag": "a", "tool_use": "b"}, {}))
    with pytest.raises(ChatTemplateError, match="names rag, tool_use and no default"):
        renderer.render([])
    assert renderer.render([], tools=[TOOL]) == "b"
    renderer.close()

"""Chat templates that tests render: the forms of the field, and ones that attack."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

#: DeepSeek-V3's form of a conversation, tool calls and their outputs included, with the constructs
#: of the release's own template: a namespace that a loop writes to, `is none`, `in message`.
DEEPSEEK = textwrap.dedent("""\
    {% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
    {%- set state = namespace(system='', calls=0, outputs=0) %}
    {%- for message in messages if message['role'] == 'system' %}
    {%- set state.system = state.system + ('\\n\\n' if state.system else '') + message['content'] %}
    {%- endfor %}
    {{- bos_token }}{{ state.system }}
    {%- for message in messages %}
      {%- if message['role'] == 'user' %}
        {%- set state.outputs = 0 %}
        {{- '<｜User｜>' + message['content'] }}
      {%- elif message['role'] == 'assistant' and 'tool_calls' in message %}
        {%- set state.calls = 0 %}
        {%- for call in message['tool_calls'] %}
          {%- if state.calls == 0 %}
            {{- '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}
          {%- else %}
            {{- '\\n' }}
          {%- endif %}
          {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' }}
          {{- call['function']['name'] }}
          {{- '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
          {%- set state.calls = state.calls + 1 %}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜>' + eos_token }}
      {%- elif message['role'] == 'assistant' %}
        {%- set said = message['content'].split('</think>')[-1] %}
        {{- ('<｜tool▁outputs▁end｜>' if state.outputs else '<｜Assistant｜>') + said + eos_token }}
        {%- set state.outputs = 0 %}
      {%- elif message['role'] == 'tool' %}
        {{- '' if state.outputs else '<｜tool▁outputs▁begin｜>' }}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
        {%- set state.outputs = state.outputs + 1 %}
      {%- endif %}
    {%- endfor %}
    {%- if state.outputs %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
    {%- if add_generation_prompt and not state.outputs %}{{ '<｜Assistant｜>' }}{% endif %}
    """)

#: Templates by what they show of the environment.
TEMPLATES = {
    "deepseek": DEEPSEEK,
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content|trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tools": "{% if tools %}{{ tools | tojson }}{% for t in tools %}"
    "{{ t.function | tojson(indent=2) }}{% endfor %}{% endif %}{{ messages | tojson }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n"
    "{% set x = 1 %}{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}"
    "{{ x }}{% endfor %}",
    "loopcontrols": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "whitespace": "a\n  {% if true %}  \n  b\n  {% endif %}\n\n{# c #}\n  d\n",
    "macro": "{% macro turn(m) -%} <{{ m.role }}>{{ m.content }} {%- endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "globals": "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['k']) }}{{ bos_token }}"
    "{{ pad_token }}{{ unk_token is defined }}{{ documents is none }}{{ tools is none }}"
    "{{ strftime_now('%%') }}"
    "{{ cycler('a', 'b').next() }}{{ joiner(',')() }}{{ range(3) | list }}",
    "html": "{{ messages[0].content | tojson }}{{ '<&>' }}"
    "{{ {'ü': '<'} | tojson(ensure_ascii=true) }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content "
    "is defined }};{% endfor %}",
}

#: What takes all the time it gets, and what fails at once, with the sentence of each.
ENDLESS = {
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 2 s for one",
    ),
    "lorem": ("{{ lipsum(n=10**9) }}", "takes more than 2 s for one"),
    "power": ("{{ (messages | length + 2) ** 900000000 }}", "takes more than 2 s for one"),
}
ATTACKS = {
    "long string": ("{{ 'a' * 4000000000 }}", "needs more than 1024 MiB"),
    "long string, unprinted": (
        "{% set x = 'a' * 4000000000 %}{{ x | length }}",
        "needs more than 1024 MiB",
    ),
    "center": ("{{ 'a' | center(4000000000) }}", "needs more than 1024 MiB"),
    "format": ("{{ '{0:>4000000000}'.format('') }}", "needs more than 1024 MiB"),
    "percent": ("{{ '%4000000000d' % 1 }}", "needs more than 1024 MiB"),
    "range": ("{{ range(10**9) | list | length }}", "Range too big"),
    "output": (
        "{% for i in range(9999) %}{{ 'a' * 100000 }}{% endfor %}",
        "writes more than 64 MiB",
    ),
    "macros": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "class": ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    "format class": ("{{ '{0.__class__.__mro__}'.format('') }}", "'__class__' of 'str' object"),
    "cycler": ("{{ cycler.__init__.__globals__.os.popen('id') }}", "'__init__' of 'type'"),
    "namespace": ("{{ namespace(__class__=1) }}", "cannot hold the name '__class__'"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "surrogate": ("{{ '\\ud800' }}", "half of a surrogate pair"),
}


def write_tokenizer(directory: Path, **config: Any) -> None:
    """A tokenizer of single words with special tokens, and a tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", "<pad>", *[f"w{index}" for index in range(3, 96)]]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "<pad>",
    }
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special, **config})
    (directory / "tokenizer_config.json").write_text(text)

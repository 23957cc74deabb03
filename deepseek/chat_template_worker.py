"""The helper process that renders chat templates; `chat_template.py` starts it and speaks with it.

A chat template is code that came with a checkpoint. It runs here, in jinja2's sandbox, in a process
that holds none of the user's environment, may open no file and write none, and has bounded memory,
processor time and output. What the template sees is what transformers 5 gives it: the same filters,
globals, tags and whitespace rules (a test compares).

Runs as a file, `python -P chat_template_worker.py MEMORY SECONDS OUTPUT` (bytes, seconds, bytes),
and imports nothing of ours. A message on standard input and output is one byte of kind, the length
in eight bytes, and the content in UTF-8:

    in   T  JSON object: the sources of the templates by name
         R  JSON object: the name of a template, its variables, and seconds since 1970 or null
    out  =  ready, compiled or rendered; the text, where there is one
         !  the template refuses: its message     X  it fails: the error     ?  it is malformed
         M  more memory than allowed              O  more output than allowed; the process ends
"""

from __future__ import annotations

import html  # noqa: F401  jinja2 imports these when it needs them, too late; see `main`
import json
import pprint  # noqa: F401
import resource
import sys
import textwrap  # noqa: F401
from collections.abc import Callable
from datetime import UTC, datetime
from encodings import unicode_escape  # noqa: F401
from typing import Any, NoReturn

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Longest message of a failed template that is passed on.
MAX_MESSAGE = 300


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, and prints it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be a name too
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


class _Clock:
    """`strftime_now(form)`: the time that it was set to, or that it is."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def set(self, seconds: float | None) -> None:
        self._seconds = seconds

    def strftime(self, form: str) -> str:
        if self._seconds is None:
            return datetime.now().strftime(form)
        return datetime.fromtimestamp(self._seconds, UTC).strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment(clock: _Clock | None = None) -> ImmutableSandboxedEnvironment:
    """The sandbox, with what transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": (clock or _Clock()).strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _read() -> tuple[bytes, Any]:
    """The next message; ends the process where the input ends."""
    head = sys.stdin.buffer.read(9)
    if len(head) < 9:
        sys.exit(0)
    return head[:1], json.loads(sys.stdin.buffer.read(int.from_bytes(head[1:], "big")))


def _write(kind: bytes, text: str = "") -> None:
    content = text.encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(kind + len(content).to_bytes(8, "big") + content)
    sys.stdout.buffer.flush()


def _limit_seconds(seconds: int) -> None:
    """From now on this process gets so much processor time, and is killed after that."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = int(usage.ru_utime + usage.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _message(error: BaseException) -> str:
    """One line of what a failed template says."""
    return " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__


def _render(template: jinja2.Template, variables: dict[str, Any], max_output: int) -> str | None:
    """The text, or None where it is longer than allowed."""
    pieces: list[str] = []
    length = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > max_output:
            return None
    return "".join(pieces)


def main() -> None:
    memory, seconds, max_output = map(int, sys.argv[1:4])
    clock = _Clock()
    environment = make_environment(clock)
    # No file can be opened after this: modules are imported now, and the time zone is read.
    environment.from_string("{{ 'text' }}{{ strftime_now('%Y') }}").render()
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 3,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    _write(b"=")
    sources: dict[str, str] = {}
    compiled: dict[str, jinja2.Template] = {}
    while True:
        kind, value = _read()
        if kind == b"T":
            sources = value
            continue
        _limit_seconds(seconds)
        try:
            clock.set(value["now"])
            name = value["template"]
            if name not in compiled:
                compiled[name] = environment.from_string(sources[name])
            text = _render(compiled[name], value["variables"], max_output)
        except MemoryError:
            _write(b"M")
            return
        except jinja2.TemplateSyntaxError as error:
            _write(b"?", f"line {error.lineno}: {_message(error)}")
        except jinja2.TemplateError as error:
            _write(b"!", _message(error))
        except Exception as error:  # whatever the template's own code raises
            _write(b"X", f"{type(error).__name__}: {_message(error)}")
        else:
            if text is None:
                _write(b"O")
                return
            _write(b"=", text)


if __name__ == "__main__":
    main()

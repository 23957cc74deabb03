"""`python -m serve_app`: serve one engine on this machine until interrupted.

Reads flags and settings, reports a user's mistakes, and waits for a signal. local.py starts, drains
and stops the service. A cluster does not use this command: `serve deploy` imports app.py.

Exit codes: 0 when every request in flight has finished, which is how a service is meant to end;
143 after SIGTERM and 130 after Ctrl-C when some had to be cut, or when it was not serving yet. A
second signal while it drains cuts them at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from deepseek.cli import make_app, run
from deepseek.errors import ConfigError
from deepseek.text import printable
from serve_app.config import ServeConfig, load_config, read_settings
from serve_app.deploy_file import check_deploy_file, is_deploy_file
from serve_app.setting_types import POOL
from serve_app.telemetry.travel import HEADERS_FILE, read_headers

_HELP = """Serve an engine behind an OpenAI-compatible endpoint.

Starts Ray and Ray Serve (or attaches to RAY_ADDRESS), waits until the engine answers, prints
one line with the URL, and runs until Ctrl-C or SIGTERM. Requests in flight then finish, for up
to shutdown_s seconds; a second Ctrl-C ends them at once.

Examples:

  python -m serve_app --engine runs/demo/int4/engine

  python -m serve_app --engine runs/demo/int4/engine --require-signature gate.pub

  python -m serve_app --echo --port 8080

  python -m serve_app --config examples/serve/node.yaml

  python -m serve_app --config examples/serve/node.yaml --port 8080

  python -m serve_app --check --config examples/serve/fleet.yaml

Every key of the file: docs/configuration.md.
"""

app = make_app(_HELP)


#: The pool that the flags speak of.
_POOL = f"pools.{POOL}"


class _Stopped(Exception):
    """SIGINT or SIGTERM arrived while the service was starting."""


class _Signals:
    """SIGINT and SIGTERM: one while the service starts ends the start; later they are counted."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._first = threading.Event()
        self._serving = False

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def ignore(self) -> None:
        """From here on a signal must not cut the clean end."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)

    def wait(self) -> None:
        """Wait for a signal. From now on they raise nothing."""
        self._serving = True
        self._first.wait()

    def hurried(self) -> bool:
        """Whether a second one has arrived."""
        return len(self.received) > 1

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)
        self._first.set()
        if not self._serving:
            raise _Stopped


@app.command(help=_HELP)  # alone, it is what --help shows
def main(
    engine: Annotated[Path | None, typer.Option(help="Engine directory made by build.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; flags go over it.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Echo the prompt; no model.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Model name in the API [the directory's name].")
    ] = None,
    allow_ungated: Annotated[
        bool,
        typer.Option("--allow-ungated", help="Serve although no accuracy gate passed. Loud."),
    ] = False,
    require_signature: Annotated[
        Path | None,
        typer.Option(
            metavar="PUBLIC_KEY",
            help="Serve only a verdict that `quant_jobs gate --sign-key` signed; Ed25519, PEM.",
        ),
    ] = None,
    access_log: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON line per request into this file; - is stderr."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say whether it could be served, and start nothing."),
    ] = False,
) -> None:
    """Serve one engine; flags override the file."""
    flags = _nested(
        {
            "http.host": host,
            "http.port": port,
            "model_name": model_name,
            f"{_POOL}.engine.kind": "echo" if echo else "embedded" if engine is not None else None,
            f"{_POOL}.engine.directory": _text(engine),
            f"{_POOL}.gate.allow_ungated": allow_ungated or None,
            f"{_POOL}.gate.require_signature": _text(require_signature),
            "telemetry.access_log": "stderr" if access_log == "-" else _absolute(access_log),
        }
    )
    if check and config is not None and is_deploy_file(raw := read_settings(config)):
        if flags:
            raise ConfigError(f"{config} is a file for `serve deploy`; flags do not go over it")
        for of_application in check_deploy_file(config, raw):
            print(f"{config}: valid, deploys {printable(of_application.served_name)}")
        return
    settings = load_config(config, flags)

    if check:
        _check_files(settings)
        print(f"{config or 'settings'}: valid, serves {printable(settings.served_name)}")
        return
    # Ray is slow to import: a mistake in the settings is reported before.
    from serve_app.local import check_port, drain, serving

    check_port(settings.http.host, settings.http.port)
    _check_files(settings)
    signals = _Signals()
    signals.install()
    finished = False
    stdout = sys.stdout
    try:
        # stdout holds our one line; what Ray prints there goes to stderr.
        with redirect_stdout(sys.stderr), serving(settings, report=_report) as url:
            signals.install()  # Ray replaces the handler of SIGTERM while it starts
            name = printable(settings.served_name)
            try:
                print(f"serving {name} at {url}", file=stdout, flush=True)
                signals.wait()
                finished = drain(settings, hurried=signals.hurried, report=_report)
            finally:
                signals.ignore()
    except _Stopped:
        pass  # before anything was served
    _report("stopped")
    if not finished:
        raise typer.Exit(128 + signals.received[-1])


def _check_files(settings: ServeConfig) -> None:
    """Look at what replicas will read and write, while a mistake costs no start.

    Raises:
        ArtifactError: what is to be served has not passed its gate, as far as its documents say,
            or pools serve different models.
        ConfigError: the headers of traces, the access log or an engine's Python cannot be used.
        DeployError: a replica of these engines can be placed nowhere.
    """
    from serve_app.one_model import admit_pools
    from serve_app.placement import check_python, reserved
    from serve_app.telemetry.access_log import check_target

    headers = settings.telemetry.otlp_headers_file
    if headers is not None:
        read_headers({HEADERS_FILE: str(headers)})
    check_target(settings.telemetry.access_log)
    for name, pool in settings.pools.items():
        check_python(name, pool.engine)
    admit_pools(settings, depth="headers")
    for name, pool in settings.pools.items():
        reserved(name, pool)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _absolute(path: str | None) -> str | None:
    """Replicas have a working directory of their own."""
    return None if path is None else os.path.abspath(path)


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name as nested mappings, without those that are None."""
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None:
            continue
        *sections, key = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return nested


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(app)

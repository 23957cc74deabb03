"""`python -m serve_app`: serve one engine on this machine until interrupted.

Reads flags and settings, reports a user's mistakes, and waits for a signal. What is started and
stopped is in local.py. A cluster does not use this command: `serve deploy` imports app.py.
"""

from __future__ import annotations

import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from deepseek.cli import make_app, run
from deepseek.text import printable
from serve_app.config import load_config

app = make_app(
    """Serve an engine behind an OpenAI-compatible endpoint.

    Starts Ray and Ray Serve (or attaches to RAY_ADDRESS), waits until the engine answers, prints
    one line with the URL, and runs until Ctrl-C or SIGTERM.

    Examples:

      python -m serve_app --engine runs/demo/int4/engine

      python -m serve_app --engine runs/demo/int4/engine --require-signature gate.pub

      python -m serve_app --echo --port 8080

      python -m serve_app --config serve.yaml
    """
)


class _Stop(Exception):
    """SIGINT or SIGTERM arrived."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _Stop


@app.command()
def main(
    engine: Annotated[Path | None, typer.Option(help="Engine directory made by build.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
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
) -> None:
    """Serve one engine; flags override the file."""
    flags: dict[str, Any] = {
        "engine": engine,
        "host": host,
        "port": port,
        "model_name": model_name,
        "echo": {} if echo else None,
        "allow_ungated": allow_ungated or None,
        "require_signature": require_signature,
    }
    settings = load_config(config, {k: v for k, v in flags.items() if v is not None})

    # Ray is slow to import: a mistake in the settings is reported before.
    from serve_app.gating import admit
    from serve_app.local import check_port, serving

    check_port(settings.host, settings.port)
    if settings.engine is not None:
        admit(
            settings.engine,
            kv_cache=settings.kv_cache,
            allow_ungated=settings.allow_ungated,
            require_signature=settings.require_signature,
        )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    stdout = sys.stdout
    try:
        # stdout holds our one line; what Ray prints there goes to stderr.
        with redirect_stdout(sys.stderr), serving(settings) as url:
            # Ray replaces the handler of SIGTERM while it starts.
            signal.signal(signal.SIGTERM, _stop)
            name = printable(settings.served_name)
            print(f"serving {name} at {url}", file=stdout, flush=True)
            try:
                while True:
                    signal.pause()
            finally:
                for signum in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C must not cut draining
    except _Stop:
        sys.stderr.write("stopped\n")


if __name__ == "__main__":
    run(app)

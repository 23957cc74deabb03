"""A stream whose engine replica is killed in the middle: what the client reads, and its trace.

    python examples/resumed_stream.py

Starts `python -m serve_app` with two replicas of the echo engine, asks with the `openai` client,
sends SIGKILL to the process that answers, and prints each chunk with the time at which it came.
Then it prints the trace of the request, which the service has sent to a collector in this process.
Exit code 1 when the answer is not whole. Linux only: it finds the process in /proc.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The tokens of this answer come from two processes."
#: Chunks that the client has read when the replica that answers is looked for.
BEGUN = 5
#: Seconds between two tokens: a replica says once a second what it works on.
ITL_S = 0.1
PATIENCE_S = 60.0
#: Fields of a chunk that are the same in all.
UNSHOWN: Any = {"created", "model", "object"}


class Collector:
    """The endpoint that OpenTelemetry's exporters post to; `spans` are all that came."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait_for(self, *names: str) -> None:
        """Until spans of all these names are here."""
        end = time.monotonic() + PATIENCE_S
        while not set(names) <= {span.name for span in self.spans}:
            if time.monotonic() > end:
                raise SystemExit(f"no spans of all the names {', '.join(names)} have come")
            time.sleep(0.05)


@contextmanager
def service(folder: Path, collector: Collector) -> Iterator[str]:
    """Run the public command with a file of settings; its URL without `/v1`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = {"kind": "echo", "ttft_s": 0.1, "itl_s": ITL_S}
    settings = {
        "http": {"port": port},
        "pools": {"default": {"engine": engine, "replicas": 2}},
    }
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    command = [sys.executable, "-m", "serve_app", "--config", str(config)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            if not process.stdout.readline().startswith(b"serving "):
                raise SystemExit("the service did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def busy_replica(url: str) -> str:
    """The engine replica that has a request, once it has said so."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        text = httpx.get(f"{url}/metrics", timeout=10).text
        pattern = r'^intserve_engine_requests_running\{replica="(\w+)"\} 1\.0$'
        if found := re.search(pattern, text, re.MULTILINE):
            return found[1]
        time.sleep(0.05)
    raise SystemExit("no replica has said that it works")


def process_of(replica: str) -> int:
    """The process that writes this replica's log."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink().name == f"replica_intserve_engine_{replica}.log":
                return int(link.parts[2])
        except OSError:  # it has ended, or is another user's
            continue
    raise SystemExit(f"no process of replica {replica} is here")


def ask(url: str) -> tuple[str, Any]:
    """Ask, kill, and print what comes and when; the text and the usage."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    began = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - began:7.3f} s  {words}", flush=True)

    def kill() -> None:
        replica = busy_replica(url)
        pid = process_of(replica)
        os.kill(pid, signal.SIGKILL)
        say(f"--- SIGKILL to replica {replica}, process {pid} ---")

    chunks = client.completions.create(
        model="echo", prompt=PROMPT, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    killer = threading.Thread(target=kill, daemon=True)
    for number, chunk in enumerate(chunks, 1):
        say(f"data: {chunk.model_dump_json(exclude_unset=True, exclude=UNSHOWN)}")
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
        if number == BEGUN:
            killer.start()
    killer.join(0)
    if killer.is_alive():
        raise SystemExit("the stream ended before the replica could be killed")
    return text, usage


def show(spans: list[Any]) -> None:
    """Print the tree of spans: seconds from the start of the first, and what they tell."""
    children: dict[bytes, list[Any]] = {}
    for span in sorted(spans, key=lambda span: span.start_time_unix_nano):
        children.setdefault(span.parent_span_id, []).append(span)
    start_ns = min(span.start_time_unix_nano for span in spans)

    def seconds(moment_ns: int) -> str:
        return f"{(moment_ns - start_ns) / 1e9:.3f}"

    def told(pairs: Any) -> str:
        values = {pair.key: pair.value for pair in pairs}
        names = {
            "intserve.replica_id": "replica",
            "intserve.attempt": "attempt",
            "gen_ai.usage.output_tokens": "output_tokens",
            "intserve.resumes": "resumes",
            "intserve.outcome": "outcome",
        }
        words = []
        for name, short in names.items():
            if name in values:
                kind = values[name].WhichOneof("value")
                words.append(f"{short}={getattr(values[name], kind)}")
        return " ".join(words)

    def branch(parent: bytes, indent: str) -> None:
        for span in children.get(parent, []):
            times = f"{seconds(span.start_time_unix_nano)}..{seconds(span.end_time_unix_nano)}"
            print(f"{indent}{span.name}  {times} s  {told(span.attributes)}".rstrip())
            for event in span.events:
                moment = seconds(event.time_unix_nano)
                print(f"{indent}  * {event.name}  {moment} s  {told(event.attributes)}")
            branch(span.span_id, indent + "  ")

    branch(b"", "")


def main() -> None:
    collector = Collector()
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), collector) as url,
    ):
        text, usage = ask(url)
        collector.wait_for("text_completion echo", "engine.lost", "decode")
    print("\nThe trace of the request:\n")
    show(collector.spans)
    whole = text == PROMPT and usage.completion_tokens == len(PROMPT)
    print(f"\nThe answer is {'whole' if whole else 'NOT whole'}: {text!r}, {usage}")
    raise SystemExit(not whole)


if __name__ == "__main__":
    main()

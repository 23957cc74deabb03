"""Clients of other people read on while the engine replica that answers them is killed.

Each client asks three questions, first undisturbed and then again: this time the process of the
replica that has the answer in its batch gets a SIGKILL once the client has some of it. What the
client makes of the answer must be the same, and it must have asked once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.environments import INTEROP, environment, node_environment
from support.served import Served, serving_command
from support.serving import wait_for

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]

TOKENS = 1500
QUESTIONS = ("greedy_stream", "seeded_stream", "greedy_whole")
#: Beside the one that is killed there is always one that runs; more need not be waited for.
ENOUGH = 2
NODE = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
CLIENTS = ("openai", "litellm", pytest.param("node", marks=NODE))


def command(client: str, *words: object) -> list[str]:
    """That runs the client's script with these words."""
    if client == "node":
        package = node_environment() / "package.json"
        return list(map(str, ("node", INTEROP / "run_openai_kill.mjs", *words, package)))
    python = environment("openai_newest" if client == "openai" else client)
    script = INTEROP / f"run_{client}_kill.py"
    return list(map(str, (python, "-E", "-s", script, *words)))


class Fleet:
    """The service with three replicas, its access log, and the replicas that were killed."""

    def __init__(self, served: Served, log: Path) -> None:
        self.served = served
        self._log = log
        self.killed: list[str] = []

    def running(self) -> dict[str, int]:
        """Requests in the batch of each replica that has said so lately, killed ones left out."""
        numbers = self.served.running()
        return {name: number for name, number in numbers.items() if name not in self.killed}

    def wait_idle(self) -> None:
        wait_for(lambda: len(self.running()) >= ENOUGH and not any(self.running().values()), 300)

    def kill_the_one_that_answers(self) -> None:
        wait_for(lambda: sum(self.running().values()) == 1, 60)
        [busy] = [name for name, number in self.running().items() if number]
        pid = self.served.replica_process(busy)
        self.killed.append(busy)
        os.kill(pid, signal.SIGKILL)

    def lines(self) -> list[dict[str, Any]]:
        """Of the access log."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture(scope="module")
def fleet(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    settings: dict[str, Any] = {
        "engine": str(engine_dir),
        "model_name": "tiny",
        "allow_ungated": True,
        "kv_cache": "bf16",
        "num_threads": 1,
        "replicas": 3,
        "access_log": str(folder / "access.log"),
    }
    with serving_command(folder, settings) as served:
        yield Fleet(served, folder / "access.log")


@pytest.fixture(scope="module", params=CLIENTS)
def done(
    request: pytest.FixtureRequest, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one client made of each answer, by question; and `lines` of the access log."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "key").write_text(fleet.served.key)
    output = folder / "results.json"
    served, lines_before, killed_before = fleet.served, len(fleet.lines()), len(fleet.killed)
    with (folder / "stderr").open("wb") as stderr:
        client = subprocess.Popen(
            command(request.param, served.base, served.model, folder / "key", output),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            for word in client.stdout:
                if word == "ready\n":
                    fleet.wait_idle()
                    client.stdin.write("go\n")
                    client.stdin.flush()
                elif word == "begun\n":
                    fleet.kill_the_one_that_answers()
        except BaseException:
            client.kill()
            raise
    assert client.returncode == 0, (folder / "stderr").read_text()[-4000:]
    wait_for(lambda: len(fleet.lines()) >= lines_before + 2 * len(QUESTIONS))
    return {
        **json.loads(output.read_text()),
        "lines": fleet.lines()[lines_before:],
        "killed": fleet.killed[killed_before:],
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_that_of_an_undisturbed_run(done: dict[str, Any], question: str) -> None:
    calm, disturbed = done[question]["calm"], done[question]["disturbed"]
    assert "error" not in calm, calm
    assert disturbed == calm
    prompt, completion, total = disturbed["usage"]
    assert (completion, total) == (TOKENS, prompt + TOKENS)
    assert disturbed["finish_reasons"] == ["length"]
    assert disturbed.get("num_ids", 1) == 1
    assert disturbed.get("roles", ["assistant"]) == ["assistant"]
    if (
        "logprobs" in disturbed
    ):  # its tokens are more than the text, which leaves out control tokens
        assert disturbed["logprobs"][1] == TOKENS


def test_streamed_and_whole_answers_are_the_same_and_a_seeded_one_is_another(
    done: dict[str, Any],
) -> None:
    texts = {question: done[question]["disturbed"]["text"] for question in QUESTIONS}
    assert texts["greedy_stream"] == texts["greedy_whole"] != texts["seeded_stream"]


def test_each_question_was_asked_once_and_went_on_in_another_replica(done: dict[str, Any]) -> None:
    calm, disturbed = done["lines"][::2], done["lines"][1::2]
    assert [line["resumes"] for line in calm] == [0] * len(QUESTIONS)
    assert [line["resumes"] for line in disturbed] == [1] * len(QUESTIONS)
    assert [line["replicas"][0] for line in disturbed] == done["killed"]
    assert all(len(set(line["replicas"])) == 2 for line in disturbed)
    assert {(line["status"], line["outcome"]) for line in done["lines"]} == {(200, "ok")}
    assert [line["stream"] for line in disturbed] == [True, True, False]

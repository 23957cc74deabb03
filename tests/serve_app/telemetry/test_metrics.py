"""The text of /metrics as Prometheus' own tool reads it."""

from __future__ import annotations

import subprocess

import pytest
from support.parts import require
from support.serving import client_of, make_service


@pytest.mark.heavy
async def test_promtool_finds_no_fault() -> None:
    promtool = require("promtool")
    body = {"model": "echo", "prompt": "hello"}
    async with client_of(make_service()) as client:
        for change in ({}, {"stream": True}, {"model": "another"}):
            await client.post("/v1/completions", json=body | change)
        text = (await client.get("/metrics")).text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

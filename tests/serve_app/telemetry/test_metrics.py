"""The text of /metrics as Prometheus' own tool reads it."""

from __future__ import annotations

import subprocess

import pytest
from support.parts import require
from support.serving import client_of, make_service

#: What promtool would name otherwise. The name is part of the interface and stays.
KNOWN = 'intserve_engine_kv_tokens_total non-counter metrics should not have "_total" suffix'


@pytest.mark.heavy
async def test_promtool_finds_fault_with_one_name_only() -> None:
    promtool = require("promtool")
    body = {"model": "echo", "prompt": "hello"}
    async with client_of(make_service()) as client:
        for change in ({}, {"stream": True}, {"model": "another"}):
            await client.post("/v1/completions", json=body | change)
        text = (await client.get("/metrics")).text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    findings = {line for line in done.stderr.splitlines() if "metric" in line}
    assert findings == {KNOWN}, done.stderr
    assert done.returncode == 3, "3: read without an error, and found fault with style"

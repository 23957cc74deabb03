"""Stop the service under a stream, and write down what a newcomer gets and how the stream ends.

python run_openai_drain.py BASE_URL MODEL KEY_FILE OUTPUT PID
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI

base, model, key_file, output, pid = sys.argv[1:]
client = OpenAI(base_url=base, api_key=Path(key_file).read_text(), max_retries=0)
PROMPT = "abcdefgh" * 25
SAID: Any = {"model": model, "prompt": PROMPT, "max_tokens": 1000}

chunks = client.completions.create(stream=True, **SAID)
text = next(iter(chunks)).choices[0].text
os.kill(int(pid), signal.SIGTERM)
newcomer: list[Any] = []
end = time.monotonic() + 3
while not newcomer and time.monotonic() < end:
    try:
        client.completions.create(**{**SAID, "max_tokens": 1})
    except openai.APIStatusError as error:
        retry_after = error.response.headers.get("retry-after")
        newcomer = [type(error).__name__, error.status_code, error.code, retry_after]
text += "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
result = {"newcomer": newcomer, "streamed": text, "expected": PROMPT}
Path(output).write_text(json.dumps(result), encoding="utf-8")

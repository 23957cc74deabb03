"""The matrix and what the interop tests recorded of the tools themselves say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import deployability, interop_records
from cluster.deployability import cells_of, served_schemes
from cluster.interop_records import TOOLS, Record, contradictions, read_records
from cluster.matrix import KV_CACHE, Row, Target
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import builtin_recipes, load_recipe

NAMES = [path.stem for path in sorted(interop_records.RECORDS.glob("*.json"))]


@pytest.fixture(scope="module")
def cells(tiny_model: Path) -> dict[str, list[tuple[str, str]]]:
    """Part and format of every linear of each built-in recipe."""
    config = ModelConfig.from_directory(tiny_model)
    found = {}
    for name in builtin_recipes():
        schemes = served_schemes(config, load_recipe(name).resolve(config))
        found[name] = [cell for cell in cells_of(schemes, "bf16") if cell[0] != KV_CACHE]
    return found


def test_no_cell_claims_what_a_record_contradicts_or_nobody_recorded(cells: Any) -> None:
    """An executed cell has a run of that tool, version and test behind it; a recorded refusal is a
    refusal here, and what was loaded loads here."""
    records = read_records()
    assert {record.tool for record in records} == set(TOOLS)
    assert list(contradictions(records, cells)) == []


def record(name: str, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Record:
    raw = json.loads((interop_records.RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    change(raw)
    return Record.model_validate(raw)


def refuses(recipe: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["recipes"][recipe] = {"input": "artifact", "loaded": False, "refusal": "no such thing"}

    return change


def leaves_unread(recipe: str) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["recipes"][recipe].update(unread=["model.layers.1.mlp.gate.weight"])


def loads(recipe: str) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["recipes"].update({recipe: raw["recipes"]["int4"]})


@pytest.mark.parametrize(
    ("tool", "change", "sentence"),
    [
        ("vllm", refuses("int4"), "vllm 0.32.0 has refused int4 (artifact), and the matrix loads"),
        ("vllm", refuses("int4-asym"), "vllm loads kv_b_proj as int4-asym-g128 (engine), executed"),
        ("vllm", loads("w4a8"), "vllm 0.32.0 has loaded w4a8 (engine), and the matrix refuses"),
        ("vllm", loads("w4a8"), "vllm refuses routed_experts as int4-g128-afp8 (engine), executed"),
        ("vllm", leaves_unread("int8-asym"), "vllm loads o_proj as int8-asym (engine), executed"),
        ("vllm", lambda raw: raw.update(test="tests/other.py"), "no record of that test has it"),
        ("transformers", loads("int8-asym"), "transformers 5.23.0 has loaded int8-asym"),
        ("transformers", refuses("w4a8"), "transformers 5.23.0 has refused w4a8 (artifact)"),
        ("transformers", leaves_unread("w4a8"), "loads routed_experts as int4-g128-afp8"),
        ("transformers", lambda raw: raw["recipes"].clear(), "loads o_proj as fp8-block"),
        ("sglang", leaves_unread("w4a8"), "routed_experts as int4-g128-afp8 (engine), executed"),
        ("sglang-artifact", refuses("int4"), "sglang 0.5.23 has refused int4 (artifact), and the"),
    ],
)
def test_another_outcome_in_a_record_is_noticed(
    tool: str, change: Callable[[dict[str, Any]], None], sentence: str, cells: Any
) -> None:
    changed = {tool, f"{tool}-artifact"}  # two records may back the same cell
    records = [record(name, change) if name in changed else record(name) for name in NAMES]
    found = list(contradictions(records, cells))
    assert any(sentence in each for each in found), found


def test_without_the_record_of_a_tool_nothing_of_it_is_executed(cells: Any) -> None:
    records = [record(name) for name in NAMES]
    found = list(contradictions([each for each in records if each.tool != "vllm"], cells))
    assert found
    assert all(each.startswith("vllm ") for each in found)


def mutated(target: Target, keep: Callable[[Row], bool], **changes: Any) -> tuple[Row, ...]:
    rows = deployability.ROWS[target]
    assert any(keep(row) for row in rows)
    return tuple(replace(row, **changes) if keep(row) else row for row in rows)


@pytest.mark.parametrize(
    ("keep", "changes"),
    [
        # says executed of what was only read
        (lambda row: row.loads and "int4-g32" in row.formats, {"evidence": "executed"}),
        # loads what was refused
        (lambda row: not row.loads and row.evidence == "executed", {"loads": True}),
        # refuses what was loaded
        (lambda row: row.loads and "int8-a8" in row.formats and row.test, {"loads": False}),
        # of another version
        (lambda row: row.evidence == "executed", {"versions": ("0.31.0",)}),
    ],
)
def test_a_row_that_claims_otherwise_is_noticed(
    keep: Callable[[Row], bool],
    changes: dict[str, Any],
    cells: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = mutated("vllm", keep, **changes)
    records = [record(name) for name in NAMES]
    assert list(contradictions(records, cells)) == []
    for table in (deployability.ROWS, deployability.ARTIFACT_ROWS):
        monkeypatch.setitem(table, "vllm", rows)
    try:
        found = list(contradictions(records, cells))
    except AssertionError as error:  # no row is left about that version
        found = [str(error)]
    assert found


def test_a_record_that_is_none_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "vllm.json").write_text('{"tool": "vllm", "version": 3}')
    with pytest.raises(DeployError, match=r"vllm.json: .*version"):
        read_records(tmp_path)
    (tmp_path / "vllm.json").write_text("{")
    with pytest.raises(DeployError, match=r"vllm.json: "):
        read_records(tmp_path)

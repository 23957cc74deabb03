"""Cases of the linter of llm_args.yaml: arguments over those that are written, and the finding."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.models import DEEPSEEK_V3
from deepseek.trtllm.findings import Finding
from deepseek.trtllm.lint import lint
from deepseek.trtllm.llm_args import make_llm_args
from deepseek.trtllm.llm_schema import parse_llm_args
from deepseek.trtllm.versions import EngineVersion

WITHOUT_MTP = replace(DEEPSEEK_V3, num_nextn_predict_layers=0)
#: An engine on 8 x 80 GB: INT4 experts, BF16 everything else, no MTP layer.
ENGINE: dict[str, Any] = {
    "dialect": "single",
    "config": WITHOUT_MTP,
    "kv_cache": "bf16",
    "experts": ("int4",),
    "ranks": RankLayout(tp=8, ep=8),
}
RELEASED = {"dialect": "released", "experts": ("fp8-block",)}
LEFT_OUT = object()


class Case(NamedTuple):
    """Arguments that are set, by path, over those that `make_llm_args` chooses; what is different
    of the engine; and the finding."""

    severity: str
    sentence: str
    changes: dict[str, Any]
    engine: dict[str, Any] = {}
    version: EngineVersion = "1.2.1"


def found(case: Case) -> tuple[Finding, ...]:
    args = make_llm_args(
        case.version,
        tp=8,
        ep=8,
        kv_cache="bf16",
        max_batch_size=64,
        max_num_tokens=8192,
        max_seq_len=32768,
    )
    raw = args.model_dump(mode="json", exclude_unset=True)
    for path, value in case.changes.items():
        *parents, name = path.split(".")
        place = raw
        for parent in parents:
            place = place[parent]
        if value is LEFT_OUT:
            del place[name]
        else:
            place[name] = value
    args = parse_llm_args(raw, case.version, where="llm_args.yaml")
    return lint(args, case.version, **ENGINE | case.engine)


def check(case: Case) -> None:
    """Assert that a case has one finding, and that it is the expected one."""
    (finding,) = found(case)
    assert finding.severity == case.severity
    assert case.sentence in finding.sentence
    assert finding.evidence
    assert finding.arguments


def sentences_without_case(module: ModuleType, cases: Iterable[Case]) -> list[str]:
    """The longest fixed part of every sentence in a module's source that no case brings about."""
    sentences = [finding.sentence for case in cases for finding in found(case)]
    missing: list[str] = []
    calls = 0
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) in ("refuse", "warn")):
            continue
        calls += 1
        text = call.args[0]
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        fixed = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
        longest = max(fixed, key=len)
        if not any(longest in sentence for sentence in sentences):
            missing.append(longest)
    assert calls > 10, f"{module.__name__} has the linter's sentences no longer"
    return missing

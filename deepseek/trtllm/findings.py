"""One finding of the linter of llm_args.yaml, and what its rules look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.llm_schema import KvCache, LlmArgs, Moe
from deepseek.trtllm.versions import EngineVersion

#: Format of the routed experts as the directory stores them.
ExpertFormat = Literal["int4", "int8", "fp8-block", "bf16"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One combination. `arguments` are the paths in llm_args.yaml that make it up, the one to
    change first; `sentence` says what happens and what to change."""

    severity: Literal["refuse", "warn"]
    arguments: tuple[str, ...]
    sentence: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Case:
    """The arguments and the engine that they belong to; see `lint.lint`."""

    args: LlmArgs
    version: EngineVersion
    dialect: Dialect
    config: ModelConfig
    kv_cache: str
    experts: frozenset[str]
    ranks: RankLayout | None

    @property
    def kv(self) -> KvCache:
        return self.args.kv_cache_config or KvCache()

    @property
    def moe(self) -> Moe:
        return self.args.moe_config or Moe()

    @property
    def tp(self) -> int:
        return self.args.tensor_parallel_size or 1

    @property
    def quantized(self) -> str:
        """Formats of experts that only one kernel computes, for a sentence; empty without any."""
        names = {"int4": "INT4", "int8": "INT8"}
        return " and ".join(names[each] for each in sorted(self.experts & names.keys()))


Rule = Callable[[Case], Iterator[Finding]]


def refuse(sentence: str, evidence: str, *arguments: str) -> Finding:
    return Finding("refuse", arguments, sentence, evidence)


def warn(sentence: str, evidence: str, *arguments: str) -> Finding:
    return Finding("warn", arguments, sentence, evidence)

"""Running the double of `tensorrt_llm` (tests/support/trtllm_double): its path, its environment,
its faults and its journal."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: What a worker's Python needs on its path to import the double, and the engine under it.
DOUBLE_PATH = (str(ROOT / "tests" / "support" / "trtllm_double"), str(ROOT))
VERSIONS = ("1.2.1", "1.3.0rc29")


@dataclass(frozen=True)
class Double:
    """One use of the double, whose files are in `folder`."""

    folder: Path
    version: str = "1.2.1"
    strict: str = "exit"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of the process that imports the double."""
        return {
            "TRTLLM_DOUBLE_VERSION": self.version,
            "TRTLLM_DOUBLE_JOURNAL": str(self.folder / "journal.jsonl"),
            "TRTLLM_DOUBLE_CONTROL": str(self.folder / "faults.json"),
            "TRTLLM_DOUBLE_STRICT": self.strict,
        }

    def switch(self, **faults: Any) -> None:
        """From now on these faults, and no others; also in a process that runs already."""
        path = self.folder / "faults.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(faults))
        os.replace(draft, path)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What was written so far, or the events of one name."""
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if name in (None, event["event"])]

    @property
    def violations(self) -> list[str]:
        """Kinds of the violations so far."""
        return [event["kind"] for event in self.events("violation")]

    @property
    def rank_pids(self) -> list[int]:
        """Processes of the ranks that were started last."""
        pids: list[int] = self.events("ranks")[-1]["pids"]
        return pids


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@contextmanager
def imported_double(double: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The double in this process. Each use imports it anew: its version is fixed on import."""
    for name, value in double.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.syspath_prepend(DOUBLE_PATH[0])
    forget_modules()
    try:
        yield importlib.import_module("tensorrt_llm")
    finally:
        forget_modules()


@functools.cache
def make_trtllm_engine(source: Path, base: Path, tp: int = 4, version: str = "1.2.1") -> Path:
    """The example model with INT4 experts, built for TensorRT-LLM on `tp` ranks: 1, 2 or 4. In the
    dialect `single`, because its heads have 64 dims."""
    from support.synthetic import quantize_plainly
    from support.trtllm_builds import make_maxima

    from deepseek.config import ModelConfig
    from deepseek.recipe import load_recipe
    from quant_jobs.build import run_build
    from quant_jobs.build_options import BuildOptions

    base.mkdir(parents=True, exist_ok=True)
    artifact, output = base / "artifact", base / f"trtllm-tp{tp}-{version}"
    if not artifact.exists():
        config = ModelConfig.from_directory(source)
        quantize_plainly(source, load_recipe("w4a8"), artifact, make_maxima(config))
    options: dict[str, Any] = {"tp": tp, "ep": tp, "dialect": "single", "engine_version": version}
    run_build(artifact, "trtllm", output, BuildOptions(**options))
    return output

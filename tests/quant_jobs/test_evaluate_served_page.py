"""The commands of docs/evaluate-served.md, executed as they stand there but for the service's port,
on fewer tokens."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chain import Ended
from support.engines import make_engine
from support.local_service import serving_engine

from quant_jobs.evaluation.lumped import DRAWN, TOP
from quant_jobs.evaluation.record import read_evaluation
from quant_jobs.evaluation.served import read_served


def words(root: Path, name: str, **changes: str) -> list[str]:
    page = (root / "docs" / "evaluate-served.md").read_text(encoding="utf-8")
    marked = re.search(
        r"<!-- executed by tests/quant_jobs/test_evaluate_served_page\.py: "
        rf"{name} -->\n```sh\n(.*?)```",
        page,
        re.S,
    )
    assert marked, f"docs/evaluate-served.md lost its block {name}"
    python, flag, module, *found = shlex.split(marked[1].replace("\\\n", " "))
    assert (python, flag, module) == ("python", "-m", "quant_jobs")
    return [changes.get(word, word) for word in found]


@pytest.mark.heavy
def test_the_commands_of_the_page_run_one_after_the_other(
    root: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Ended],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(root / "examples")
    (tmp_path / "runs").mkdir()
    engine = make_engine(tiny_model, "int8", tmp_path)
    (tmp_path / "runs" / "int8-engine").symlink_to(engine)
    few = ("--num-blocks", "2", "--block-tokens", "48", "--decode-tokens", "0")
    ended = command(*words(root, "reference"), *few)
    assert ended.code == 0, ended.err
    with serving_engine(engine, num_threads=1) as url:
        ended = command(*words(root, "url", **{"http://127.0.0.1:8000": url}), "--decode-tokens", 0)
    assert ended.code == 0, ended.err
    offline = read_evaluation(Path("runs/int8-evaluation"))
    served = read_served(Path("runs/int8-served"))
    assert served.perplexity == pytest.approx(offline.perplexity, rel=1e-5)


def test_the_page_states_the_size_of_a_token(root: Path) -> None:
    page = (root / "docs" / "evaluate-served.md").read_text(encoding="utf-8")
    size = 4 + 4 + 8 * TOP + 8 * DRAWN + 4  # the next token's, the rest's, both lists, the id
    assert f"{size:,} bytes" in page
    assert f"the {TOP} most likely tokens" in page
    assert f"{DRAWN} tokens drawn" in page

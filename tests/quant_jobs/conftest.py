"""One engine, evaluated: what the tests of build, evaluate, gate, report and the CLI look at.

Quantized by plain rounding (no calibration, no Ray), so that these tests stand on their own.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chain import Chain, Ended


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for `chain` first waits for all of it."""
    for item in items:
        if "chain" in getattr(item, "fixturenames", ()):
            item.add_marker("heavy")


@pytest.fixture(scope="session")
def chain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """int8-weight-only, built and evaluated on 5 x 512 tokens. Read it; write into `fresh`."""
    from support.synthetic import quantize_plainly

    from deepseek.recipe import load_recipe
    from quant_jobs.build import run_build
    from quant_jobs.evaluate import Settings, run_evaluate

    root = tmp_path_factory.mktemp("chain")
    made = Chain(tiny_model, root / "checkpoint", root / "engine", root / "evaluation")
    quantize_plainly(tiny_model, load_recipe("int8-weight-only"), made.checkpoint)
    run_build(made.checkpoint, "embedded", made.engine)
    settings = Settings(num_blocks=5, block_tokens=512, decode_tokens=2)
    run_evaluate(made.engine, tiny_model, tiny_model / "heldout.txt", made.evaluation, settings)
    return made


@pytest.fixture
def fresh(chain: Chain, tmp_path: Path) -> Chain:
    """A copy of engine and evaluation that a test may write into."""
    engine, evaluation = tmp_path / "engine", tmp_path / "evaluation"
    shutil.copytree(chain.engine, engine)
    shutil.copytree(chain.evaluation, evaluation)
    return Chain(chain.source, chain.checkpoint, engine, evaluation)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """`python -m quant_jobs WORDS` in this process: a Python start with torch costs seconds."""
    from deepseek.cli import run
    from quant_jobs.__main__ import app

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["quant_jobs", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(app)
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, out, err)

    return call

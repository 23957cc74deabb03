"""The commands of docs/security.md, executed as they stand there."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.parts import require

from deepseek.artifact.signature import read_public_key
from deepseek.artifact.verdict import GateVerdict, read_verdict, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import load_recipe


def block(root: Path, name: str) -> str:
    page = (root / "docs" / "security.md").read_text(encoding="utf-8")
    marked = re.search(
        rf"<!-- executed by tests/test_security_page\.py: {name} -->\n```sh\n(.*?)```", page, re.S
    )
    assert marked, f"docs/security.md lost its block {name}"
    return marked[1]


def run(script: str, folder: Path, root: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def keys(root: Path, tmp_path: Path) -> Path:
    require("openssl")
    done = run(block(root, "keys"), tmp_path, root)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_the_keys_are_made_as_they_must_be(keys: Path) -> None:
    assert stat.S_IMODE((keys / "gate.key").stat().st_mode) == 0o600
    read_public_key(keys / "gate.pub")


@pytest.mark.heavy
def test_the_command_that_signs_takes_the_key(keys: Path, root: Path) -> None:
    """Judging takes an engine; here its folder is empty, which the sentence says after the key."""
    done = run(block(root, "gate"), keys, root)
    assert done.returncode == 2
    assert "runs/int8-engine is not an engine" in done.stderr
    (keys / "gate.key").chmod(0o644)
    done = run(block(root, "gate"), keys, root)
    assert done.returncode == 2
    assert "chmod 600" in done.stderr


def test_openssl_checks_the_signature_as_it_is_written(keys: Path, root: Path) -> None:
    from deepseek.artifact.signature import read_private_key

    engine = keys / "runs" / "int8-engine"
    engine.mkdir(parents=True)
    verdict = GateVerdict(
        passed=True,
        artifact_digest="a" * 64,
        engine_digest="e" * 64,
        arithmetic="embedded",
        kv_cache="bf16",
        measured={},
        limits=load_recipe("int8").gate,
        reasons=(),
    )
    write_verdict(engine, verdict, read_private_key(keys / "gate.key"))
    script = block(root, "openssl")
    assert run(script, keys, root).returncode == 0
    raw = json.loads((engine / "gate.json").read_text())
    (engine / "gate.json").write_text(json.dumps(raw | {"engine_digest": "f" * 64}))
    assert run(script, keys, root).returncode != 0
    with pytest.raises(ArtifactError, match="is no signature"):
        read_verdict(engine, signed_by=keys / "gate.pub")


def test_the_files_that_the_page_allows_and_refuses_are_those_of_the_code(root: Path) -> None:
    from deepseek.artifact.documents import _HARMLESS

    page = (root / "docs" / "security.md").read_text(encoding="utf-8")
    beside = page[page.index("**Beside the listed files**") :].partition("**Names and")[0]
    allowed, refused = beside.split("Anything else is refused by name:")
    own = ("gate.json", "gate.json.sig", "job_report.json", ".html", ".md")
    for name in re.findall(r"`([\w.]+)`", allowed):
        assert name in own or _HARMLESS.fullmatch(name), name
    for name in re.findall(r"`([\w.*]+[.]\w+)`", refused.partition("a folder")[0]):
        assert not _HARMLESS.fullmatch(name.replace("*", "x")), name

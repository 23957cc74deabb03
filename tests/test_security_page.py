"""The commands of docs/security.md, executed as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
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
        target="embedded",
        arithmetic="embedded",
        executed_by="embedded",
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


def test_the_token_is_made_as_ray_env_wants_it(root: Path, tmp_path: Path) -> None:
    require("openssl")
    script = block(root, "ray token")
    (line,) = script.splitlines()
    assert f"#     {line}" in (root / "cluster.yaml").read_text(encoding="utf-8")
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run(["bash", "-euc", script], env=environment, check=True)
    token = tmp_path / ".intserve" / "ray-token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert re.fullmatch(r"[0-9a-f]{64}\n", token.read_text())
    sourced = subprocess.run(
        ["bash", "-c", f". {root}/cluster/ray-env.sh && echo $RAY_AUTH_TOKEN_PATH"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_TMPDIR": str(tmp_path / "r")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sourced.stdout == f"{token}\n"


def test_the_firewall_names_the_nodes_of_cluster_yaml_and_ports_of_the_table(
    root: Path, tmp_path: Path
) -> None:
    done = run(block(root, "firewall"), tmp_path, root)
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "intserve.nft").read_text()
    provider = yaml.safe_load((root / "cluster.yaml").read_text(encoding="utf-8"))["provider"]
    nodes = re.search(r"set nodes .*elements = \{ (.*?) \}", rules)
    assert nodes
    assert nodes[1].split(", ") == [provider["head_ip"], *provider["worker_ips"]]
    assert "policy drop" in rules
    page = (root / "docs" / "security.md").read_text(encoding="utf-8")
    for ports in re.findall(r"@(?:clients|monitoring) tcp dport (?:\{ )?([\d, ]+)", rules):
        for port in ports.split(","):
            row = re.search(rf"^\| `{port.strip()}` .*$", page, re.MULTILINE)
            assert row, port
            assert re.search("clients|Prometheus", row[0])
    if nft := shutil.which("nft"):  # needs rights that not every machine gives
        checked = subprocess.run(
            [nft, "-c", "-f", "intserve.nft"], cwd=tmp_path, capture_output=True, text=True
        )
        assert "syntax error" not in checked.stderr, checked.stderr

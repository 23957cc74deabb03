"""A signed verdict: whose key it is, over exactly these bytes, and keys that are none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.keys import Keys, make_keys
from support.parts import require

from deepseek.artifact.signature import read_private_key, read_public_key
from deepseek.artifact.verdict import GateVerdict, read_verdict, require_passed, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import load_recipe


def verdict(*, passed: bool = True) -> GateVerdict:
    return GateVerdict(
        passed=passed,
        artifact_digest="a" * 64,
        engine_digest="e" * 64,
        target="embedded",
        arithmetic="embedded",
        executed_by="embedded",
        kv_cache="bf16",
        measured={"mean_kl": 0.02},
        limits=load_recipe("int4").gate,
        reasons=() if passed else ("mean KL 0.02000 is above 0.01 nats per token",),
    )


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path / "keys")


@pytest.fixture
def engine(tmp_path: Path, keys: Keys) -> Path:
    """A directory with a signed verdict."""
    directory = tmp_path / "engine"
    directory.mkdir()
    write_verdict(directory, verdict(), read_private_key(keys.private))
    return directory


def test_a_verdict_signed_with_the_key_is_read(engine: Path, keys: Keys) -> None:
    assert read_verdict(engine, signed_by=keys.public) == verdict()
    served = {"engine_digest": "e" * 64, "artifact_digest": "a" * 64}
    served |= {"target": "embedded", "arithmetic": "embedded", "kv_cache": "bf16"}
    assert require_passed(engine, **served, signed_by=keys.public).passed


def test_openssl_verifies_it_and_signs_as_we_do(engine: Path, keys: Keys) -> None:
    openssl = require("openssl")
    common = [openssl, "pkeyutl", "-rawin", "-in", "gate.json"]
    checked = subprocess.run(
        [*common, "-verify", "-pubin", "-inkey", keys.public, "-sigfile", "gate.json.sig"],
        cwd=engine,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Verified Successfully" in checked.stdout
    ours = (engine / "gate.json.sig").read_bytes()
    (engine / "gate.json.sig").unlink()
    subprocess.run(
        [*common, "-sign", "-inkey", keys.private, "-out", "gate.json.sig"], cwd=engine, check=True
    )
    assert (engine / "gate.json.sig").read_bytes() == ours
    read_verdict(engine, signed_by=keys.public)


def test_every_changed_byte_is_noticed(engine: Path, keys: Keys) -> None:
    for name in ("gate.json", "gate.json.sig"):
        path = engine / name
        whole = path.read_bytes()
        for position in range(0, len(whole), 1 if name.endswith("sig") else 17):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match="is no signature of gate.json with the key of"):
                read_verdict(engine, signed_by=keys.public)
        path.write_bytes(whole)
    (engine / "gate.json").write_bytes(b" " + (engine / "gate.json").read_bytes())  # the same JSON
    with pytest.raises(ArtifactError, match="is no signature"):
        read_verdict(engine, signed_by=keys.public)


def test_a_verdict_by_hand_passes_without_a_key_and_not_with_one(
    engine: Path, keys: Keys, tmp_path: Path
) -> None:
    write_verdict(engine, verdict(passed=False), read_private_key(keys.private))
    forged = json.loads((engine / "gate.json").read_text()) | {"passed": True, "reasons": []}
    (engine / "gate.json").write_text(json.dumps(forged))
    assert read_verdict(engine).passed  # anybody can write one: it is not authenticated
    with pytest.raises(ArtifactError, match="the verdict is not the gate's, or was changed"):
        read_verdict(engine, signed_by=keys.public)
    write_verdict(engine, verdict(), read_private_key(make_keys(tmp_path / "other").private))
    with pytest.raises(ArtifactError, match="is no signature"):
        read_verdict(engine, signed_by=keys.public)


def test_an_unsigned_verdict_is_refused_where_a_signature_is_required(
    engine: Path, keys: Keys
) -> None:
    write_verdict(engine, verdict())  # deletes the signature of the verdict before
    with pytest.raises(ArtifactError, match=r"has no gate\.json\.sig, and a signature is required"):
        read_verdict(engine, signed_by=keys.public)


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 65, b"x" * 64])
def test_what_is_no_signature_is_refused(engine: Path, keys: Keys, content: bytes) -> None:
    (engine / "gate.json.sig").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"gate\.json\.sig (is no signature|has 65 bytes)"):
        read_verdict(engine, signed_by=keys.public)


# Keys.


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_private_key_that_others_can_read_is_refused(keys: Keys, mode: int) -> None:
    keys.private.chmod(mode)
    with pytest.raises(ArtifactError, match=f"mode {mode:04o}.*chmod 600"):
        read_private_key(keys.private)
    keys.private.chmod(0o400)
    read_private_key(keys.private)


def test_a_wrong_key_is_one_sentence_without_the_key(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", others=True)
    text = keys.private.read_text()
    (keys.folder / "text").write_text("no key\n")
    (keys.folder / "cut").write_text(text[:80])
    for path in keys.folder.iterdir():
        path.chmod(0o600)
    private = {
        "absent": "cannot be read",
        "text": "is not a private key in PEM",
        "cut": "is not a private key in PEM",
        "gate.pub": "is a public key, which signs nothing",
        "encrypted.key": "is encrypted; decrypt it first",
        "rsa.key": r"is a key of another kind \(RSA\); make one with `openssl genpkey",
        "ec.key": r"is a key of another kind \(EC",
    }
    public = {
        "absent": "cannot be read",
        "text": "is not a public key in PEM",
        "gate.key": "is a private key, which a server must not have",
        "encrypted.key": "is a private key",
        "rsa.pub": r"is a key of another kind \(RSA\)",
    }
    secrets = text.splitlines()[1:-1]
    for read, cases in ((read_private_key, private), (read_public_key, public)):
        for name, says in cases.items():
            with pytest.raises(ArtifactError, match=says) as refused:
                read(keys.folder / name)  # type: ignore[operator]
            assert str(refused.value).startswith(f"{keys.folder / name} ")
            assert str(refused.value).isprintable()
            assert not any(secret in str(refused.value) for secret in secrets)


# The form of gate.json.


def test_a_later_form_of_a_verdict_is_refused(engine: Path) -> None:
    path = engine / "gate.json"
    raw = json.loads(path.read_text())
    assert raw["format_version"] == 5  # 5: the target, and what executed it
    for version in (6, 0, "5", 5.0, True, None, [2]):
        path.write_text(json.dumps(raw | {"format_version": version}))
        with pytest.raises(ArtifactError, match=r"format_version .* is not supported, only 5"):
            read_verdict(engine)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('{"passed": 1}', "passed: Input should be a valid boolean"),
        ('{"passed": "true"}', "passed: Input should be a valid boolean"),
        ('{"measured": {"mean_kl": 1e999}}', "measured.mean_kl: Input should be a finite number"),
        ('{"limits": {"max_mean_kl": 1e999}}', "limits."),
    ],
)
def test_a_verdict_says_only_what_the_gate_says(engine: Path, change: str, says: str) -> None:
    path = engine / "gate.json"
    raw = json.loads(path.read_text())
    [field] = json.loads(change)
    raw.pop(field)
    path.write_text(f"{json.dumps(raw)[:-1]}, {change[1:]}")
    with pytest.raises(ArtifactError) as refused:
        read_verdict(engine)
    assert says in str(refused.value)

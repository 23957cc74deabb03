"""Keys for signed verdicts, made as a user makes them: by the library here, in OpenSSL's forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


@dataclass(frozen=True)
class Keys:
    """`private` and `public` belong together."""

    folder: Path
    private: Path
    public: Path


def make_keys(folder: Path, *, others: bool = False) -> Keys:
    """A pair of keys in a new folder; with `others` also some that cannot be used."""
    folder.mkdir()
    own = ed25519.Ed25519PrivateKey.generate()
    _write(folder / "gate.key", own)
    (folder / "gate.pub").write_bytes(_public(own))
    if others:
        _write_others(folder, own)
    return Keys(folder, folder / "gate.key", folder / "gate.pub")


def _write_others(folder: Path, own: ed25519.Ed25519PrivateKey) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    _write(folder / "encrypted.key", own, BestAvailableEncryption(b"secret"))
    _write(folder / "rsa.key", other)
    (folder / "rsa.pub").write_bytes(_public(other))
    _write(folder / "ec.key", ec.generate_private_key(ec.SECP256R1()))


def _write(path: Path, key: Any, encryption: Any = None) -> None:
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    )
    path.chmod(0o600)


def _public(key: Any) -> bytes:
    data: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return data

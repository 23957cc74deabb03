"""Signed verdicts: Ed25519 over the bytes of gate.json, the signature beside it in gate.json.sig.

`quant_jobs gate --sign-key` signs; `serve_app --require-signature` verifies, with the public key
alone. Keys are PEM files as OpenSSL writes them, the signature is its 64 bytes and nothing else, so
that OpenSSL makes and checks the same files:

    openssl genpkey -algorithm ed25519 -out gate.key
    openssl pkey -in gate.key -pubout -out gate.pub
    openssl pkeyutl -verify -pubin -inkey gate.pub -rawin -in gate.json -sigfile gate.json.sig

No sentence here holds a part of a key. `cryptography` is imported only where a key is used.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek import untrusted
from deepseek.errors import ArtifactError
from deepseek.untrusted import UnusableFileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE_BYTES = 64
_MAX_KEY_BYTES = 1 << 16


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key that verdicts are signed with.

    Raises:
        ArtifactError: it cannot be read, others can read it too, or it is not an unencrypted
            Ed25519 private key in PEM.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data, mode = _read(path)
    if mode & 0o077:
        raise ArtifactError(
            f"{path} can be read or changed by others than its owner (mode "
            f"{stat.S_IMODE(mode):04o}), and so is no secret; run `chmod 600` on it"
        )
    if b"-----BEGIN PUBLIC KEY-----" in data:
        raise ArtifactError(
            f"{path} is a public key, which signs nothing; name the private key that it belongs to"
        )
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise ArtifactError(
            f"{path} is encrypted; decrypt it first: `openssl pkey -in FILE -out DECRYPTED`"
        ) from None
    except Exception:  # the library raises several types; none of their texts is needed
        raise ArtifactError(f"{path} is not a private key in PEM; {_MAKE_KEY}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{path} is a key of another kind ({_kind(key)}); {_MAKE_KEY}")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The key that verdicts are verified with.

    Raises:
        ArtifactError: it cannot be read, or is not an Ed25519 public key in PEM.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data, _ = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise ArtifactError(
            f"{path} is a private key, which a server must not have; {_MAKE_PUBLIC_KEY}"
        )
    try:
        key = load_pem_public_key(data)
    except Exception:  # as above
        raise ArtifactError(f"{path} is not a public key in PEM; {_MAKE_PUBLIC_KEY}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ArtifactError(f"{path} is a key of another kind ({_kind(key)}); {_MAKE_KEY}")
    return key


def is_signed(data: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    """Whether `signature` is the key's over `data`."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


_MAKE_KEY = "make one with `openssl genpkey -algorithm ed25519 -out FILE`"
_MAKE_PUBLIC_KEY = "make one with `openssl pkey -in PRIVATE_KEY -pubout -out FILE`"


def _read(path: Path) -> tuple[bytes, int]:
    """Content and mode of a key's file, both of the same open file."""
    try:
        descriptor = untrusted.open_regular(path)
        try:
            mode = os.fstat(descriptor).st_mode
            data = os.read(descriptor, _MAX_KEY_BYTES)
        finally:
            os.close(descriptor)
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; name the PEM file of a key") from error
    return data, mode


def _kind(key: Any) -> str:
    """The algorithm of a key, from the name of its type: RSA, EllipticCurve, X25519, ..."""
    return type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey").lstrip("_")

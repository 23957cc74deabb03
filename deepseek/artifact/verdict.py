"""The gate's verdict on an engine. The server serves an engine only with a passing verdict.

`gate` writes gate.json into the engine directory that was evaluated; `serve_app` requires it. A
verdict names the digests of the artifact and of the engine, so it is refused beside another engine;
and what the figures hold for: target, arithmetic and KV format, so it is refused where the same
engine is to be served otherwise.
Whoever can write into the directory can write a verdict too: gate.json alone says what was
measured, not by whom. A signature (`signature.py`) says that, where a server requires one. This
file imports no torch.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from deepseek import untrusted
from deepseek.artifact.engine_manifest import (
    SIGNATURE_FILE,
    VERDICT_FILE,
    CacheFormat,
    read_engine_manifest,
)
from deepseek.artifact.signature import SIGNATURE_BYTES, is_signed, read_public_key
from deepseek.errors import ArtifactError, first_problem
from deepseek.files import json_bytes, write_atomic
from deepseek.recipe import GateLimits
from deepseek.untrusted import UnusableFileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT_VERSION = 5

#: In whose arithmetic the figures were computed, and whose engine computed them: names of targets,
#: as in engine.json. An engine for TensorRT-LLM that the embedded engine executed has a verdict on
#: "trtllm" that was `executed_by` "embedded": the values and the roundings are TensorRT-LLM's, the
#: kernels are not. It admits the engine to TensorRT-LLM, and what serves it says that the verdict
#: is an emulation's.
Arithmetic = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
#: The one target, arithmetic and engine that was ever judged when verdicts (to form 4) and
#: evaluations (to form 2) did not name all of them.
EMBEDDED = "embedded"


class GateVerdict(BaseModel):
    """What was measured on one engine, the limits, and the decision.

    `artifact_digest` is the quantized checkpoint's (or, for an unquantized engine, the source's
    fingerprint). The figures are of an engine for `target`, computed in `arithmetic` on KV pages of
    the format `kv_cache` as that target lays them out, by the engine `executed_by`; they say
    nothing of the engine on others. `measured` maps names to figures: perplexity, mean_kl, top1,
    and others. `reasons` holds one sentence for each broken limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[5] = 5
    passed: StrictBool
    artifact_digest: str
    engine_digest: str
    target: Arithmetic
    arithmetic: Arithmetic
    executed_by: Arithmetic
    kv_cache: CacheFormat
    measured: dict[str, float]
    limits: GateLimits
    reasons: tuple[str, ...]

    @property
    def is_emulated(self) -> bool:
        """Whether another engine than the target's own computed the figures."""
        return self.executed_by != self.target


def write_verdict(
    engine_dir: Path | str, verdict: GateVerdict, sign_key: Ed25519PrivateKey | None = None
) -> None:
    """Write gate.json into the engine directory, and gate.json.sig where there is a key, each
    atomically. A signature of an earlier verdict is deleted first."""
    directory = Path(engine_dir)
    data = json_bytes(verdict.model_dump(mode="json"))
    (directory / SIGNATURE_FILE).unlink(missing_ok=True)
    write_atomic(directory / VERDICT_FILE, data)
    if sign_key is not None:
        write_atomic(directory / SIGNATURE_FILE, sign_key.sign(data))


def read_verdict(engine_dir: Path | str, *, signed_by: Path | None = None) -> GateVerdict:
    """Read the verdict of an engine directory. With `signed_by`, the PEM file of a public key, its
    signature is verified before anything in it is believed.

    Raises:
        ArtifactError: there is none, it cannot be understood, or is not signed with this key.
    """
    directory = Path(engine_dir)
    path = directory / VERDICT_FILE
    if not os.path.lexists(path):
        raise ArtifactError(
            f"{engine_dir} has no {VERDICT_FILE}: it was never gated; run `python -m quant_jobs "
            "evaluate` and `gate` first"
        )
    try:
        data = untrusted.read_bytes(path, root=directory)
        if signed_by is not None:
            _require_signature(directory, data, signed_by)
        raw = untrusted.parse_json_object(data)
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; run the gate again") from error
    version = raw.pop("format_version", 1)  # form 1 has the same fields as 2 and no number
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format_version {untrusted.show(version)} is not supported, only "
            f"{FORMAT_VERSION}; run the gate again with this version"
        )
    if version < 3:
        raw = _name_what_was_judged(raw, path)
    if version < 4:
        _refuse_later_limit(raw, path)
    if version < 5:
        raw = _add(raw, path, {"target": EMBEDDED, "executed_by": EMBEDDED})
    try:
        return GateVerdict.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; run the gate again") from error


def require_passed(
    engine_dir: Path | str,
    *,
    engine_digest: str,
    artifact_digest: str,
    target: str,
    arithmetic: str,
    kv_cache: str,
    signed_by: Path | None = None,
) -> GateVerdict:
    """Read the verdict and check that it passed and is about exactly this engine and artifact, as
    an engine for `target`, in this arithmetic on KV pages of this format, and signed with the key
    of `signed_by` where that is given.

    Raises:
        ArtifactError: no verdict, a failed one, one about another engine, artifact, target,
            arithmetic or KV format, or not the signature.
    """
    verdict = read_verdict(engine_dir, signed_by=signed_by)
    for subject, judged, present in (
        ("engine", verdict.engine_digest, engine_digest),
        ("artifact", verdict.artifact_digest, artifact_digest),
    ):
        if not hmac.compare_digest(judged.encode(), present.encode()):
            raise ArtifactError(
                f"{engine_dir}: {VERDICT_FILE} judges the {subject} {judged[:16]}, but this one is "
                f"{present[:16]}; run evaluate and gate again"
            )
    if verdict.target != target:
        raise ArtifactError(
            f"{engine_dir}: {VERDICT_FILE} judges an engine for {verdict.target}, but this one is "
            f"for {target}; run evaluate and gate again"
        )
    if verdict.arithmetic != arithmetic:
        raise ArtifactError(
            f"{engine_dir}: {VERDICT_FILE} judges the arithmetic of {verdict.arithmetic}, but "
            f"{arithmetic} would serve; run evaluate and gate again"
        )
    if verdict.kv_cache != kv_cache:
        raise ArtifactError(
            f"{engine_dir}: {VERDICT_FILE} judges {verdict.kv_cache} KV pages, but {kv_cache} ones "
            f"would be served; serve with kv_cache {verdict.kv_cache}, or evaluate with --kv-cache "
            f"{kv_cache} and gate again"
        )
    if not verdict.passed:
        reasons = "; ".join(verdict.reasons) or "no reason was recorded"
        raise ArtifactError(f"{engine_dir} failed its accuracy gate: {reasons}")
    return verdict


def _name_what_was_judged(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a verdict of form 1 or 2, in form 3. When those were written, `evaluate` had
    the embedded engine and the KV format that the engine was built with, and no others."""
    kv_cache = read_engine_manifest(path.parent).kv_cache
    return _add(raw, path, {"arithmetic": EMBEDDED, "kv_cache": kv_cache})


def _add(raw: dict[str, Any], path: Path, added: dict[str, Any]) -> dict[str, Any]:
    """The fields of a verdict of an older form with those that came later, which it must not have
    itself."""
    if known := raw.keys() & added.keys():
        raise ArtifactError(
            f"{path}: {min(known)} is no field of its format_version; run the gate again"
        )
    return raw | added


def _refuse_later_limit(raw: dict[str, Any], path: Path) -> None:
    """Check that a verdict of form 1, 2 or 3 does not claim the limit that came with form 4. Read,
    it has that limit's default: what it judges kept no maxima, so there was nothing to count."""
    limits = raw.get("limits")
    if isinstance(limits, dict) and "max_input_outliers" in limits:
        raise ArtifactError(
            f"{path}: limits.max_input_outliers is no field of its format_version; run the gate "
            "again"
        )


def _require_signature(directory: Path, data: bytes, public_key: Path) -> None:
    """Check DIRECTORY/gate.json.sig over `data`, the bytes of gate.json."""
    key = read_public_key(public_key)
    path = directory / SIGNATURE_FILE
    if not os.path.lexists(path):
        raise ArtifactError(
            f"{directory} has no {SIGNATURE_FILE}, and a signature is required: run `python -m "
            "quant_jobs gate` with --sign-key where the private key is"
        )
    try:
        signature = untrusted.read_bytes(path, root=directory, max_bytes=SIGNATURE_BYTES)
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; run the gate again with --sign-key") from error
    if not is_signed(data, signature, key):
        raise ArtifactError(
            f"{path} is no signature of {VERDICT_FILE} with the key of {public_key}: the verdict "
            "is not the gate's, or was changed; run the gate again with --sign-key"
        )

"""Who may use a Ray: tokens for the local one, and a refusal of clusters that ask for none.

A Ray without tokens runs, as its own user, whatever a process that reaches its ports sends it: a
task, a job, a further node. So:

    a Ray that we start    is in token mode, with a token made for it, known to no other Ray; its
                           files lie in a folder that only this user can enter
    a Ray that is named    is used with the user's own token (RAY_AUTH_MODE, RAY_AUTH_TOKEN or
                           RAY_AUTH_TOKEN_PATH), and refused where it has several nodes and asks
                           for no token

`cluster.yaml`, ray-env.sh and the manifests start clusters in token mode; why it is done this way
is in docs/decisions/0012-ray-token.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deepseek.errors import DeployError, first_line
from deepseek.untrusted import UnusableFileError, read_bytes

log = logging.getLogger(__name__)

#: Ray's own names of its mode and of its token, which comes first; the file comes second.
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

#: Set to 1, it lets jobs and servers use a cluster of several nodes that asks for no token.
ALLOW_OPEN = "INTSERVE_ALLOW_OPEN_RAY"

#: How long the head may take to refuse a request without a token.
_PROBE_TIMEOUT_S = 10.0
#: Methods of a head and of a Ray Client server that take an empty message and change nothing.
_HEAD_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CLIENT_METHOD = "/ray.rpc.RayletDriver/ClusterInfo"
#: What Ray's servers say to a request without their token.
_UNWELCOME = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def private_folder() -> Path:
    """This user's folder for the files of local Rays, made if it is not there; nobody else can
    enter it, so that logs and runtime environments below it are not world-readable, though Ray
    opens the modes of its own folders.

    Its name is short, because Ray's sockets lie below it and a socket's path holds at most 107
    bytes.

    Raises:
        DeployError: the folder cannot be made, or is not this user's own.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    folder = base / f"ray-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700, parents=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise DeployError(
                f"{folder} is not a folder of this user, so Ray's files would not be private "
                "there; remove it, or set RAY_TMPDIR to a folder of your own"
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise DeployError(
            f"{folder} cannot be made ({first_line(error)}); set RAY_TMPDIR to a folder where this "
            "user may write"
        ) from error
    return folder


class LocalToken:
    """Puts this process, and those that it starts, into token mode with a token of their own, until
    `withdraw`: Ray reads mode and token from the environment, in every process.

    The user's own token and mode are set aside meanwhile, and are for clusters that are named.
    """

    def __init__(self, folder: Path) -> None:
        handle, name = tempfile.mkstemp(prefix="token-", dir=folder)  # of mode 0600
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        self.path = Path(name)
        self._before = {key: os.environ.get(key) for key in (MODE, TOKEN, TOKEN_PATH)}
        self._withdrawn = False
        set_environment({MODE: "token", TOKEN: None, TOKEN_PATH: name})

    def withdraw(self) -> None:
        """Go back to the user's mode and token, and remove ours. A second time does nothing."""
        if self._withdrawn:
            return
        self._withdrawn = True
        set_environment(self._before)
        self.path.unlink(missing_ok=True)


def set_environment(values: Mapping[str, str | None]) -> None:
    """Set or unset variables, and make Ray in this process read them again."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    mode = os.environ.get(MODE)
    if mode is None:  # Ray would keep the mode that it read before
        os.environ[MODE] = "disabled"
    Config.initialize("")
    if mode is None:
        del os.environ[MODE]
    AuthenticationTokenLoader.instance().reset_cache()


def _read_token(environ: Mapping[str, str]) -> str | None:
    """The user's token, found as Ray finds it; None outside token mode. Checked here because Ray
    ends the process when it cannot read it.

    Raises:
        DeployError: token mode without a usable token, or an unknown mode; says what to set.
    """
    mode = environ.get(MODE, "disabled").lower()
    if mode not in ("disabled", "token"):
        raise DeployError(f"{MODE}={mode!r} is no mode of Ray; set it to token")
    if mode == "disabled":
        return None
    if environ.get(TOKEN):
        return environ[TOKEN].strip()
    given = environ.get(TOKEN_PATH)
    path = Path(given) if given else Path(environ.get("HOME", "~")).expanduser() / ".ray/auth_token"
    try:
        content = read_bytes(path, max_bytes=1 << 16)
        token = content.decode("ascii").strip()
        if not token:
            raise UnusableFileError("is empty")
        readers = stat.S_IMODE(path.stat().st_mode) & 0o077
    except (OSError, UnicodeDecodeError, UnusableFileError) as error:
        reason = str(error) if isinstance(error, UnusableFileError) else "holds no token"
        raise DeployError(
            f"{MODE}=token, but the token's file {path} {reason}; set {TOKEN_PATH} to the "
            "cluster's own, of mode 600"
        ) from error
    if readers:
        log.warning("others can read the Ray token in %s; run chmod 600 %s", path, path)
    return token


def check_welcome(address: str, environ: Mapping[str, str] = os.environ) -> None:
    """Ask the head whether it takes the user's token. Ray itself would ask for a minute and more,
    or end the process.

    address: HOST:PORT of a head, or ray://HOST:PORT of its client server.

    Raises:
        DeployError: it wants a token, and the user's is not its own or is not set.
    """
    if environ.get("RAY_ENABLE_K8S_TOKEN_AUTH", "").lower() in ("1", "true"):
        return  # Ray then finds a token of Kubernetes by itself
    token = _read_token(environ)
    if _answer(address, token) not in _UNWELCOME:
        return
    raise DeployError(
        f"the Ray at {address!r} wants its token: set {MODE}=token, and {TOKEN} or {TOKEN_PATH} to "
        "that cluster's own"
    )


def refuse_open_cluster(address: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse the cluster that this process is connected to if it has several nodes and takes
    requests without a token. One node without tokens is a warning.

    Asks the head itself, without a token: a client in token mode is welcome to a head that wants
    none, so our own mode says nothing.

    address: HOST:PORT of the head, or ray://HOST:PORT of its client server.

    Raises:
        DeployError: it is open, and INTSERVE_ALLOW_OPEN_RAY is not 1.
    """
    import ray

    if not is_open(address):
        return
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    told = (
        f"the Ray at {address} asks for no token, so whoever reaches its ports runs code on its "
        f"{f'{nodes} nodes' if nodes > 1 else 'node'}"
    )
    if nodes == 1 or environ.get(ALLOW_OPEN) == "1":
        log.warning("%s; start it with %s=token (docs/security.md)", told, MODE)
        return
    raise DeployError(
        f"{told}; start it with {MODE}=token on every node (docs/security.md), or set "
        f"{ALLOW_OPEN}=1 to use it all the same"
    )


def is_open(address: str) -> bool:
    """Whether a head answers a request that carries no token. False where nothing answers: what
    cannot be asked is left to Ray's own errors.

    address: HOST:PORT of a head, or ray://HOST:PORT of its client server.
    """
    return _answer(address, None) not in (*_UNWELCOME, "UNAVAILABLE", "DEADLINE_EXCEEDED")


def _answer(address: str, token: str | None) -> str:
    """The gRPC status of a request with this token. A server that was reached and dislikes the
    request for another reason has not asked for a token."""
    import grpc

    place = address.removeprefix("ray://")
    method = _CLIENT_METHOD if address.startswith("ray://") else _HEAD_METHOD
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(place, (("grpc.enable_http_proxy", 0),)) as channel:
        ask = channel.unary_unary(method)  # messages are bytes, and an empty one will do
        try:
            ask(b"", timeout=_PROBE_TIMEOUT_S, wait_for_ready=True, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"

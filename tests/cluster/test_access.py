"""Who may use a Ray: real raylets in token mode let in nobody without the token, and ours works."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from support.raylets import Raylets, end

from cluster.access import (
    ALLOW_OPEN,
    MODE,
    TOKEN,
    TOKEN_PATH,
    check_welcome,
    is_open,
    private_folder,
    set_environment,
)
from cluster.connect import connect
from deepseek.errors import DeployError

pytestmark = pytest.mark.ray

#: What an intruder may have set: nothing, token mode without the token, or a token of its own.
INTRUDERS = {
    "no token": {"RAY_AUTH_MODE": "disabled"},
    "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
}

RUN_A_TASK = """
import os, ray
ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
print("uid", ray.get(ray.remote(num_cpus=0)(lambda: os.getuid()).remote()))
"""

CONNECT = """
import sys
from cluster.connect import connect
from deepseek.errors import DeployError
try:
    with connect() as connection:
        import os, ray
        print("uid", ray.get(ray.remote(num_cpus=0)(lambda: os.getuid()).remote()))
except DeployError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with Raylets(2) as raylets:
        yield raylets


def run(
    words: list[str], address: str, root: Path, timeout_s: float = 90, **changes: str
) -> subprocess.CompletedProcess[str]:
    """A process with RAY_ADDRESS; one that still tries when the time is up is killed: its return
    code is then -9."""
    environment = {name: value for name, value in os.environ.items() if name[:8] != "RAY_AUTH"}
    try:
        return subprocess.run(
            words,
            cwd=root,
            env={**environment, "RAY_ADDRESS": address, **changes},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as expired:
        told = [text.decode() if isinstance(text, bytes) else text or ""
                for text in (expired.stdout, expired.stderr)]  # fmt: skip
        return subprocess.CompletedProcess(words, -9, *told)


def own_token() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}


@pytest.mark.heavy
def test_a_process_without_the_token_runs_no_task_and_joins_as_no_node(
    cluster: Raylets, root: Path
) -> None:
    """All intruders at one time: most of it is waiting."""
    base = os.environ["RAY_TMPDIR"]
    folders = {who: tempfile.mkdtemp(prefix="i-", dir=base) for who in INTRUDERS}
    start = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=1", f"--object-store-memory={100 << 20}"),
    ]

    def run_task(who: str) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "-c", RUN_A_TASK], cluster.address, root, **INTRUDERS[who])

    def join(who: str) -> subprocess.CompletedProcess[str]:
        own = {"RAY_TMPDIR": folders[who]}
        return run(start, cluster.address, root, 25, **INTRUDERS[who], **own)

    try:
        with ThreadPoolExecutor(2 * len(INTRUDERS)) as threads:
            runs = threads.map(run_task, INTRUDERS), threads.map(join, INTRUDERS)
            tasks, nodes = (dict(zip(INTRUDERS, ended, strict=True)) for ended in runs)
    finally:
        for folder in folders.values():
            end(Path(folder))
            shutil.rmtree(folder)
    for who, ended in tasks.items():
        assert ended.returncode != 0, who
        assert "uid" not in ended.stdout, who
        assert "nvalidAuthToken" in ended.stderr or "uthenticat" in ended.stderr, ended.stderr
    for who, ended in nodes.items():
        assert ended.returncode != 0, who
        assert "Ray runtime started" not in ended.stdout, who
    with connect(cluster.address):
        assert len(ray.nodes()) == 1 + cluster.num_nodes


def test_our_own_connection_has_the_token_and_a_wrong_one_is_one_sentence(
    cluster: Raylets, root: Path
) -> None:
    assert not is_open(cluster.address)
    ours = run([sys.executable, "-c", CONNECT], cluster.address, root, **own_token())
    assert ours.stdout == f"uid {os.getuid()}\n", ours.stderr
    for who, setting in INTRUDERS.items():
        theirs = run([sys.executable, "-c", CONNECT], cluster.address, root, **setting)
        assert theirs.returncode == 1, who
        assert theirs.stderr.splitlines()[-1].startswith(
            f"error: the Ray at '{cluster.address}' wants its token: set RAY_AUTH_MODE=token"
        ), theirs.stderr


def test_an_open_cluster_of_several_nodes_is_refused_unless_that_is_asked_for(root: Path) -> None:
    ours = {name: os.environ.get(name) for name in (MODE, TOKEN, TOKEN_PATH)}
    set_environment({MODE: "disabled", TOKEN: None, TOKEN_PATH: None})
    try:
        with Raylets(1) as open_cluster:
            assert is_open(open_cluster.address)
            # Our own token does not make the head ask others for one.
            for setting in (INTRUDERS["no token"], INTRUDERS["a wrong token"]):
                refused = run(
                    [sys.executable, "-c", CONNECT], open_cluster.address, root, **setting
                )
                assert (refused.returncode, refused.stdout) == (1, "")
                assert refused.stderr.splitlines()[-1] == (
                    f"error: the Ray at {open_cluster.address} asks for no token, so whoever "
                    "reaches its ports runs code on its 2 nodes; start it with "
                    "RAY_AUTH_MODE=token on every node (docs/security.md), or set "
                    f"{ALLOW_OPEN}=1 to use it all the same"
                )
            allowed = run(
                [sys.executable, "-c", CONNECT],
                open_cluster.address,
                root,
                **INTRUDERS["no token"],
                **{ALLOW_OPEN: "1"},
            )
            assert allowed.stdout == f"uid {os.getuid()}\n", allowed.stderr
            assert "asks for no token" in allowed.stderr
    finally:
        set_environment(ours)


def test_a_local_ray_has_a_token_of_its_own_a_private_folder_and_the_loopback_address(
    root: Path, tmp_path: Path
) -> None:
    """In a process of its own, whose user has a token, and another one in the default place."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("d" * 64)
    ended = run(
        [sys.executable, "-c", LOCAL], "", root, HOME=str(tmp_path), RAY_AUTH_TOKEN="e" * 64
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["token"] not in ("d" * 64, "e" * 64)
    assert len(told["token"]) == 64
    assert told["modes"] == ["0o600", "0o700"]
    assert told["open"] is False
    assert told["worker"] == ["token", None, told["path"]]
    assert told["after"] == [None, "e" * 64, None]
    assert not Path(told["path"]).exists()
    assert (tmp_path / ".ray" / "auth_token").read_text() == "d" * 64
    assert len(told["sockets"]) > 5
    assert set(told["sockets"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


LOCAL = """
import json, os, stat
from pathlib import Path
from cluster.access import MODE, TOKEN, TOKEN_PATH, is_open
from cluster.connect import connect

names = (MODE, TOKEN, TOKEN_PATH)
with connect(num_cpus=1, include_dashboard=True) as connection:
    import ray
    path = Path(os.environ[TOKEN_PATH])
    import psutil  # Ray brings it along
    me = psutil.Process()
    sockets = [socket.laddr.ip for process in (me, *me.children(recursive=True))
               for socket in process.net_connections("tcp") if socket.status == "LISTEN"]
    told = {
        "token": path.read_text(),
        "path": str(path),
        "modes": [oct(stat.S_IMODE(p.stat().st_mode)) for p in (path, path.parent)],
        "open": is_open(connection.address),
        "worker": ray.get(ray.remote(lambda: [os.environ.get(n) for n in names]).remote()),
        "sockets": sockets,
    }
told["after"] = [os.environ.get(n) for n in names]
print(json.dumps(told))
"""


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "absent"}, "the token's file absent"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}, "/nowhere/.ray/auth_token"),
        ({"RAY_AUTH_MODE": "tokens"}, "RAY_AUTH_MODE='tokens' is no mode of Ray; set it to token"),
    ],
)
def test_a_token_that_cannot_be_read_is_one_sentence(setting: dict[str, str], told: str) -> None:
    with pytest.raises(DeployError) as caught:
        check_welcome("127.0.0.1:9", setting)
    assert told in str(caught.value)


def test_a_folder_that_somebody_else_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / f"ray-{os.getuid()}"
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeployError, match="is not a folder of this user"):
        private_folder()
    place.unlink()
    place.mkdir(0o755)
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700

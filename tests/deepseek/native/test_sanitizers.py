"""The tests of this folder once more, on an extension built with the sanitizers of addresses and of
undefined behavior: what is read or written outside of a tensor ends the process with a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

#: Puts the extension of the folder argv[1] in the place of the checkout's, then runs pytest.
RUN = """
import importlib.util, sys
import torch, pytest, deepseek
from pathlib import Path
[path] = Path(sys.argv[1]).glob("_native*.so")
spec = importlib.util.spec_from_file_location("deepseek._native", path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = deepseek._native = module
spec.loader.exec_module(module)
sys.exit(pytest.main(sys.argv[2:]))
"""
#: As RUN, and an address beyond a tensor goes down: proof that the sanitizer looks.
OVERRUN = """
from deepseek import _native
_native.encode("int8", torch.ones(8).data_ptr(), 1, 1 << 12, 1.0, 1)
"""


@pytest.fixture(scope="module")
def sanitized(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sanitized extension."""
    pytest.importorskip("nanobind")
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    options = {
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_BUILD_TYPE": "None",
        "INTSERVE_SANITIZE": "ON",
        "INTSERVE_OUTPUT": str(folder / "out"),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    source, build = str(root / "deepseek/native"), str(folder / "build")
    subprocess.run(["cmake", "-S", source, "-B", build, *defined], check=True)
    subprocess.run(["cmake", "--build", build, "-j", "2"], check=True)
    return folder / "out"


def run(program: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    environment = {
        **os.environ,
        # The interpreter is not sanitized, so the runtime comes first; Python frees little at exit.
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tests_of_the_kernels_pass_under_the_sanitizers(root: Path, sanitized: Path) -> None:
    folder = str(root / "tests/deepseek/native")
    ended = run(RUN, root, str(sanitized), folder, "-q", "-m", "not slow", "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]


def test_a_read_beyond_a_tensor_is_reported(root: Path, sanitized: Path) -> None:
    program = RUN.replace("sys.exit(pytest.main(sys.argv[2:]))", OVERRUN)
    ended = run(program, root, str(sanitized))
    assert ended.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ended.stderr

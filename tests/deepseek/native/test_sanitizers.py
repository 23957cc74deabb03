"""The tests of this folder once more, on an extension built with the sanitizers of addresses and of
undefined behavior: what is read or written outside of a tensor ends the process with a report. They
run every kernel on every instruction set: linears, attention, router, whole steps, the team."""

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
#: As RUN, and an address beyond a tensor goes down: proof that the sanitizers look.
OVERRUN = """
from deepseek import _native
x = torch.ones(16)
_native.encode("int8", x.data_ptr(), 1, 1 << 12, 1.0, 1)
"""
#: As OVERRUN, with floats at an odd address, which C++ does not define.
MISALIGNED = """
from deepseek import _native
_native.use_isa("portable")
x = torch.ones(8)
_native.encode("bf16", x.data_ptr() + 1, 1, 3, 1.0, 1)
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


def library(name: str) -> str:
    """The path of a library of the compiler's."""
    found = subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def run(program: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        # The interpreter is not sanitized, so the runtime comes first, and with it the library
        # whose `throw` it wraps, which the interpreter does not bring. Python frees little at exit.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
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
    # pytest captures nothing (-s): a report, after which nothing runs, would go down with it.
    options = ["-q", "-s", "-m", "not slow", "-p", "no:cacheprovider"]
    ended = run(RUN, root, str(sanitized), folder, *options)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert " passed" in ended.stdout
    assert " failed" not in ended.stdout


@pytest.mark.parametrize(
    ("program", "report"),
    [
        (OVERRUN, "AddressSanitizer: heap-buffer-overflow"),
        (MISALIGNED, "runtime error: load of misaligned address"),
    ],
)
def test_what_they_look_for_is_reported(
    program: str, report: str, root: Path, sanitized: Path
) -> None:
    ended = run(RUN.replace("sys.exit(pytest.main(sys.argv[2:]))", program), root, str(sanitized))
    assert ended.returncode != 0
    assert report in ended.stderr

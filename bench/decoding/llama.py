"""llama.cpp from the source that llama-cpp-python's sdist brings: the program, and ds3 for it.

    python -m bench.decoding.llama [--jobs N] [--cache DIR] [--ds3 DIR]

makes everything and prints the paths. One CMake build with the machine's own instructions
(GGML_NATIVE) gives the shared library, which the Python binding loads, and `llama-server`, so both
are measured with the same code. It takes 10 to 20 minutes of two cores, once. Nothing of it enters
this project's environment: the binding has a venv of its own, with the pins of `llama_cpp.txt`.
llama.cpp's converter runs with this environment's torch and transformers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.decoding import ds3
from bench.decoding.ds3 import made_once
from deepseek.cli import make_app, run
from deepseek.errors import IntServeError

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "llama-cpp"
PINS = HERE / "llama_cpp.txt"
#: GGUF types: how `llama_ftype` numbers those that are made from f16.
QUANTIZED = {"q8_0": 7, "q4_0": 2}
TYPES = ("f16", *QUANTIZED)
#: What is built, and what of the build is left out. The server's page needs a download.
TARGETS = ("llama", "llama-server", "llama-batched-bench")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


class BuildError(IntServeError):
    """A step of making llama.cpp failed; with the end of what it said."""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """`python` is the binding's; `source` llama.cpp's tree; `programs` holds the libraries too."""

    python: Path
    source: Path
    programs: Path

    @property
    def server(self) -> Path:
        return self.programs / "llama-server"

    @property
    def environment(self) -> dict[str, str]:
        """What a worker of the binding needs."""
        return {
            "LLAMA_CPP_LIB_PATH": str(self.programs),
            "PYTHONPATH": str(self.source / "gguf-py"),
        }


def llama_cpp(cache: Path = CACHE, jobs: int | None = None) -> LlamaCpp:
    """The program, made where it is not there yet, with `jobs` compilers at once (None: one per
    core).

    Raises:
        BuildError: pip or CMake failed.
    """
    source = made_once(cache / "source", _download) / "vendor" / "llama.cpp"
    build = made_once(
        cache / "build", lambda folder: _compile(source, folder, jobs or os.cpu_count() or 1)
    )
    environment = made_once(cache / "env", _install)
    return LlamaCpp(environment / "bin" / "python", source, build / "bin")


def gguf(program: LlamaCpp, kind: str, checkpoint: Path, cache: Path = CACHE) -> Path:
    """ds3's file in one of `TYPES`.

    Raises:
        BuildError: llama.cpp's converter or quantizer failed.
    """
    if kind == "f16":
        return _made_file(cache / "ds3-f16.gguf", lambda half: _convert(program, checkpoint, half))
    source = gguf(program, "f16", checkpoint, cache)
    return _made_file(
        cache / f"ds3-{kind}.gguf", lambda half: _quantize(program, source, kind, half)
    )


# --- steps ---


def _download(folder: Path) -> None:
    sdist = ["llama-cpp-python", *_pin("llama-cpp-python")]
    folder.mkdir(parents=True)
    _check(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        + ["--no-binary", *sdist]
    )
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    archive.unlink()
    (tree,) = folder.iterdir()
    for path in list(tree.iterdir()):
        path.rename(folder / path.name)
    tree.rmdir()


def _pin(name: str) -> list[str]:
    lines = PINS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(f"{name}==")]


def _compile(source: Path, folder: Path, jobs: int) -> None:
    """Configure and build. Shared libraries are found beside the programs, because the folder gets
    another name when it is whole."""
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    options += ["-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    _check(["cmake", "-S", source, "-B", folder, *options])
    _check(["cmake", "--build", folder, "--parallel", str(jobs), "--target", *TARGETS])


def _install(folder: Path) -> None:
    """The binding alone: it finds the library by LLAMA_CPP_LIB_PATH. The folder is renamed, and a
    venv's python works from anywhere, unlike its scripts, which nobody calls."""
    _check([sys.executable, "-m", "venv", folder])
    _check(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
        + ["--no-binary", "llama-cpp-python", "--requirement", PINS],
        {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
    )


def _convert(program: LlamaCpp, checkpoint: Path, output: Path) -> None:
    _check(
        [sys.executable, "-P", HERE / "llama_convert.py", checkpoint, "--outfile", output]
        + ["--outtype", "f16"],
        {"PYTHONPATH": str(program.source), "HF_HUB_OFFLINE": "1"},
    )


def _quantize(program: LlamaCpp, source: Path, kind: str, output: Path) -> None:
    _check(
        [program.python, HERE / "llama_quantize.py", source, output, str(QUANTIZED[kind])],
        program.environment,
    )


def _made_file(path: Path, make: object) -> Path:
    """As `made_once`, for a file."""
    assert callable(make)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ds3.locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            half = path.with_name(f"half-{path.name}")
            half.unlink(missing_ok=True)
            make(half)
            half.rename(path)
    return path


def _check(command: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildError(f"{Path(str(command[0])).name} ended with {done.returncode}:\n{said}")


app = make_app(__doc__ or "")


@app.command(no_args_is_help=False)
def main(
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once.")] = None,
    cache: Annotated[Path, typer.Option(help="Where llama.cpp is kept.")] = CACHE,
    ds3_cache: Annotated[Path, typer.Option("--ds3", help="Where ds3 is kept.")] = ds3.CACHE,
) -> None:
    """See the module's docstring."""
    program = llama_cpp(cache, jobs)
    print(f"llama-server {program.server}\npython {program.python}", flush=True)
    for kind in TYPES:
        print(f"{kind} {gguf(program, kind, ds3.checkpoint(ds3_cache), cache)}", flush=True)


if __name__ == "__main__":
    run(app)

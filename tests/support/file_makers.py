"""A maker of small files for tests of sharded builds, and a command that builds with it.

python tests/support/file_makers.py OUTPUT WORKERS [SECONDS_PER_FILE]
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from deepseek.cli import make_app, run
from deepseek.errors import ArtifactError
from deepseek.files import write_atomic
from quant_jobs.targets.sharded import BuildFolder, BuiltFile, build_files

NUM_FILES = 12
KEYS = tuple(f"{number:05d}" for number in range(NUM_FILES))
INPUTS = {"checkpoint": "a" * 64, "tp": 8}


@dataclass(frozen=True)
class SmallMaker:
    """Files of 64 KiB that follow from their key and `seed`, each made in `seconds`. `log` is a
    directory that gets a file per key that was made. `damaged` is a key that cannot be made, and
    `deadly` one whose making ends the worker."""

    log: Path
    seconds: float = 0.0
    seed: int = 0
    damaged: str = ""
    deadly: str = ""

    def make(self, key: str, directory: Path) -> BuiltFile:
        time.sleep(self.seconds)
        if key == self.damaged:
            raise ArtifactError(f"layer {key} is damaged; quantize it again")
        if key == self.deadly:
            os._exit(1)
        data = hashlib.shake_256(f"{key} {self.seed}".encode()).digest(1 << 16)
        name = f"model-{key}.safetensors"
        write_atomic(directory / name, data)
        with (self.log / key).open("a") as file:
            file.write("made\n")
        return BuiltFile(
            key=key,
            file=name,
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes_read=2 * len(data),
        )


def build(output: Path, maker: SmallMaker, workers: int = 0) -> dict[str, BuiltFile]:
    """Build all files, to the end; notes and progress go to stderr."""

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with BuildFolder(output, INPUTS) as folder:
        built = build_files(folder, KEYS, maker, workers, lambda done, total: None, note=note)
        folder.remove()
    return built


app = make_app("Build small files.")


@app.command()
def main(
    output: Path,
    workers: int,
    log: Path,
    seconds: float = 0.0,
    damaged: str = "",
    deadly: str = "",
) -> None:
    build(output, SmallMaker(log, seconds, damaged=damaged, deadly=deadly), workers)


if __name__ == "__main__":
    run(app)

"""Who takes part in bench/peers_decode.py, and how each is opened in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.decoding import ds3, llama
from bench.decoding.traffic import Stored
from bench.decoding.workers import Worker

Kind = Literal["ours", "llama.cpp", "transformers"]
#: Kinds -> the largest batch that is measured, and the most steps at a time: transformers takes
#: seconds for one.
MOST_BATCH: dict[Kind, int] = {"ours": 1024, "llama.cpp": 1024, "transformers": 16}
MOST_STEPS: dict[Kind, int] = {"ours": 1024, "llama.cpp": 1024, "transformers": 3}


@dataclass(frozen=True, slots=True)
class Contender:
    """`model` is a recipe (ours), a GGUF type (llama.cpp) or "bf16"."""

    kind: Kind
    model: str
    kv_cache: str | None = None

    @property
    def name(self) -> str:
        pages = "" if self.kv_cache is None else f", KV {self.kv_cache}"
        return f"{self.kind} {self.model}{pages}"

    @property
    def program(self) -> list[str]:
        """The arguments of a Python that runs the worker."""
        if self.kind == "llama.cpp":  # its environment knows the file and its folder alone
            return [str(Path(__file__).with_name("llama_worker.py"))]
        return ["-m", f"bench.decoding.{self.kind}_worker"]


UNQUANTIZED = "bf16"
#: Of ours, unless others are asked for: W8A8 without and with the head, and INT4 with BF16 and with
#: INT8 activations.
RECIPES = ("int8", "int8-head", "int4-all", "int4-a8")


def contenders(recipes: Iterable[str] = RECIPES) -> list[Contender]:
    return [
        *(Contender("ours", model) for model in (UNQUANTIZED, *recipes)),
        *(Contender("llama.cpp", kind) for kind in llama.TYPES),
        Contender("transformers", UNQUANTIZED),
    ]


@dataclass(slots=True)
class Opened:
    """A contender whose model is loaded. `words` say how it runs."""

    contender: Contender
    worker: Worker
    stored: Stored
    words: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where models and llama.cpp are kept, and where logs go."""

    ds3: Path
    llama: Path
    logs: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`threads` of every contender; the largest batch, its context and the steps at a time."""

    threads: int
    batch: int
    context: int
    steps: int


def prepare(contenders: Iterable[Contender], places: Places, jobs: int | None) -> None:
    """Make what opening them needs, so that nothing is built while others are loaded."""
    for contender in contenders:
        if contender.kind == "llama.cpp":
            program = llama.llama_cpp(places.llama, jobs)
            llama.gguf(program, contender.model, ds3.checkpoint(places.ds3), places.llama)
        else:
            _directory(contender, places.ds3)


def open_contender(contender: Contender, places: Places, load: Load) -> Opened:
    """Start its worker and load its model.

    Raises:
        WorkerError: it does not load.
    """
    arguments: dict[str, Any] = {"threads": load.threads}
    sizes = {"batch": load.batch, "context": load.context, "steps": load.steps}
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    python: Path | str = sys.executable
    if contender.kind == "llama.cpp":
        program = llama.llama_cpp(places.llama)
        python, environment = program.python, environment | program.environment
        file = llama.gguf(program, contender.model, ds3.checkpoint(places.ds3), places.llama)
        arguments |= {"file": str(file), **sizes}
    else:
        environment["PYTHONPATH"] = f"{ds3.ROOT}:{ds3.ROOT / 'tests'}"
        arguments["directory"] = str(_directory(contender, places.ds3))
    if contender.kind == "ours":
        is_engine = contender.model != UNQUANTIZED
        arguments |= {"is_engine": is_engine, "kv_cache": contender.kv_cache, **sizes}
    log = places.logs / f"{contender.name.replace(' ', '-').replace(',', '')}.log"
    worker = Worker([python, *contender.program], log, environment, threads=load.threads)
    answer = worker.ask("open", **arguments)
    return Opened(contender, worker, Stored(**answer["stored"]), [answer["words"]])


def _directory(contender: Contender, cache: Path) -> Path:
    if contender.model == UNQUANTIZED:
        return ds3.checkpoint(cache)
    return ds3.engine(contender.model, cache)

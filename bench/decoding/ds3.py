"""The model "ds3": DeepSeek-V3's architecture in 706 M parameters of random weights, in BF16.

    python -m bench.decoding.ds3 [--cache DIR] [RECIPE ...]

makes the checkpoint, and of each recipe an artifact and an embedded engine, and prints their
directories. It is large enough that a step streams its weights from memory, and small enough for a
CPU; accuracy means nothing on it, so an artifact is rounded to nearest without calibration. Speed
does not depend on the values, but for the experts that the router chooses, which are spread as
evenly as random weights spread them.

What is made is kept in the cache (default: `.cache/ds3` of this checkout), of which several
processes may ask at once: one makes it, the others wait. An engine is kept by the sources that lay
it out, so that checkouts that lay engines out differently may share a cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from support.synthetic import quantize_plainly

from bench.decoding.vocabulary import tokenizer_files
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_app, run
from deepseek.files import write_atomic
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import load_recipe
from deepseek.source.synthetic import synthesize
from quant_jobs.targets.embedded import pack_engine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "ds3"
#: The sources in `deepseek/engine` that decide the bytes of an engine beside its artifact.
LAYOUT_SOURCES = ("pack*.py", "*layout*.py", "absorbed.py")

DS3 = replace(
    DEEPSEEK_V3,
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    moe_intermediate_size=512,
    num_hidden_layers=12,
    first_k_dense_replace=1,
    num_attention_heads=16,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=65536,
    yarn=None,
    num_nextn_predict_layers=0,
    weight_block_size=None,
)


def checkpoint(cache: Path = CACHE) -> Path:
    """The directory of the BF16 checkpoint: 1.4 GB."""

    def make(folder: Path) -> None:
        synthesize(folder, DS3)
        files = tokenizer_files(DS3.vocab_size, DS3.max_position_embeddings)
        for name, text in files.items():
            write_atomic(folder / name, text.encode())

    return made_once(cache / "checkpoint", make)


def artifact(recipe: str, cache: Path = CACHE) -> Path:
    """The directory of the checkpoint quantized by a recipe, of a built-in name or in a file."""
    source = checkpoint(cache)
    content = load_recipe(recipe)
    return made_once(
        cache / "artifacts" / content.name,
        lambda folder: quantize_plainly(source, content, folder),
    )


def engine(recipe: str, cache: Path = CACHE) -> Path:
    """The engine directory of that artifact."""
    stored = artifact(recipe, cache)
    return made_once(
        cache / "engines" / f"{stored.name}-{layout_digest()}",
        lambda folder: pack_engine(ArtifactReader(stored), folder),
    )


def layout_digest() -> str:
    """Names the layout of engines in this checkout."""
    folder = ROOT / "deepseek" / "engine"
    files = sorted({path for pattern in LAYOUT_SOURCES for path in folder.glob(pattern)})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A directory that `make` fills under another name, and that has its own name once it is whole.
    A second process waits for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            half = folder.with_name(f"{folder.name}.half")
            shutil.rmtree(half, ignore_errors=True)
            make(half)
            half.rename(folder)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


app = make_app(__doc__ or "")


@app.command(no_args_is_help=False)
def main(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes; none: the checkpoint alone.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where everything is kept.")] = CACHE,
) -> None:
    """See the module's docstring."""
    print(f"checkpoint {checkpoint(cache)}")
    for recipe in recipes or []:
        print(f"{recipe} {engine(recipe, cache)}", flush=True)


if __name__ == "__main__":
    run(app)

"""How much context each KV format serves at once in the same bytes: both are filled.

    python bench/kv_fill.py [--megabytes 64] [--context 2048]

A small model with DeepSeek-V3's latent (512 values and 64 of the rotary key per token and layer)
and random weights. Every engine gets a cache of the same bytes and three times as many requests of
`--context` tokens as BF16 has room for, each with a prompt of its own. A request that finds no room
waits; one that outgrows a full cache is preempted, and computed again later. Prints a table, in
Markdown: tokens that the bytes hold, requests that ran at once and their context at the fullest
step, and the ratio to BF16. Fails when a request is not answered whole.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.synthetic import write_checkpoint

from deepseek.cli import make_app, make_progress, run
from deepseek.config import ModelConfig
from deepseek.engine.arithmetic import EMBEDDED
from deepseek.engine.engine import LLMEngine
from deepseek.engine.kv_cache import token_bytes
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.options import EngineIdentity, EngineOptions
from deepseek.engine.packed_layout import source_schemes
from deepseek.engine.packing import pack_tensors
from deepseek.engine.request import Request, SamplingParams
from deepseek.errors import ArtifactError
from deepseek.kv_layout import kv_layout
from deepseek.models import DEEPSEEK_V3
from deepseek.source.checkpoint import CheckpointReader

app = make_app(__doc__ or "")

FORMATS = ("bf16", "fp8", "int8")
PAGE_TOKENS = 64
#: Tokens of each answer: more steps than all prompts that fit take to be computed.
ANSWER = 256


@dataclass(frozen=True)
class Filled:
    """What a cache held: its bytes and tokens, and requests and their tokens at its fullest."""

    num_bytes: int
    room_tokens: int
    running: int
    context_tokens: int
    preemptions: int


@app.command()
def main(
    megabytes: Annotated[int, typer.Option(min=4, help="bytes of each cache, in MB")] = 64,
    context: Annotated[int, typer.Option(min=512, help="tokens of a request, answer and all")] = (
        2048
    ),
) -> None:
    """Fill a cache of every format and print what ran at once."""
    torch.set_num_threads(1)
    filled: dict[str, Filled] = {}
    num_bytes = megabytes * 10**6
    with tempfile.TemporaryDirectory() as folder, make_progress() as progress:
        write_checkpoint(
            Path(folder),
            max_position_embeddings=context,
            kv_lora_rank=DEEPSEEK_V3.kv_lora_rank,
            qk_rope_head_dim=DEEPSEEK_V3.qk_rope_head_dim,
        )
        source = CheckpointReader(Path(folder))
        num_requests = 3 * (_pages(source.config, "bf16", num_bytes) * PAGE_TOKENS // context)
        if num_requests == 0:
            raise ArtifactError(f"{megabytes} MB hold no request of {context} tokens; give more")
        task = progress.add_task("requests", total=num_requests * len(FORMATS))
        for name in FORMATS:
            engine = _open(source, name, num_bytes, num_requests)
            filled[name] = _fill(engine, context, num_requests, lambda: progress.advance(task))
    print(f"Caches of {megabytes} MB, {num_requests} requests of {context:,} tokens")
    print(
        "| KV | bytes allocated | room | requests at once | tokens at once | x BF16 | preempted |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, each in filled.items():
        ratio = each.context_tokens / filled["bf16"].context_tokens
        print(
            f"| {name} | {each.num_bytes:,} | {each.room_tokens:,} | {each.running} "
            f"| {each.context_tokens:,} | {ratio:.2f} | {each.preemptions} |"
        )


def _pages(config: ModelConfig, kv_cache: str, num_bytes: int) -> int:
    """KV pages in so many bytes, beside the zero page."""
    return num_bytes // (PAGE_TOKENS * token_bytes(config, kv_layout(EMBEDDED.name, kv_cache))) - 1


def _open(source: CheckpointReader, kv_cache: str, num_bytes: int, max_batch: int) -> LLMEngine:
    """An engine whose cache takes at most `num_bytes`, for as many requests as there are."""
    tensors = pack_tensors(source, layout="torch")
    kernels = Kernels.detect(batch_invariant=False, arithmetic=EMBEDDED)
    model = Model(source.config, source_schemes(source.config), tensors, kernels)
    identity = EngineIdentity(
        recipe="source",
        artifact_digest=source.fingerprint,
        engine_digest=None,
        kv_cache=kv_cache,
        page_tokens=PAGE_TOKENS,
    )
    options = EngineOptions(
        max_kv_tokens=_pages(source.config, kv_cache, num_bytes) * PAGE_TOKENS,
        max_batch_size=max_batch,
        max_batched_tokens=512 + max_batch,
        prefix_cache=False,
        num_threads=1,
    )
    return LLMEngine(model, identity, options)


def _fill(
    engine: LLMEngine, context: int, num_requests: int, advance: Callable[[], None]
) -> Filled:
    """Serve requests of `context` tokens each, and say what the fullest step held.

    Raises:
        ArtifactError: an answer is not whole.
    """
    words = random.Random(0)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ANSWER)
    for number in range(num_requests):
        prompt = tuple(words.choices(range(2, engine.config.vocab_size), k=context - ANSWER))
        engine.add_request(Request(request_id=str(number), prompt_ids=prompt, sampling=sampling))
    fullest = engine.current_load()
    answers: Counter[str] = Counter()
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += len(output.token_ids)
            if output.finish_reason is not None:
                advance()
        load = engine.current_load()
        fullest = max(fullest, load, key=lambda each: (each.kv_tokens_used, each.running))
    if answers != Counter({str(number): ANSWER for number in range(num_requests)}):
        raise ArtifactError("an answer is not whole")
    return Filled(
        num_bytes=engine.allocated_bytes()["kv_cache"],
        room_tokens=fullest.kv_tokens_total,
        running=fullest.running,
        context_tokens=fullest.kv_tokens_used,
        preemptions=engine.num_preemptions,
    )


if __name__ == "__main__":
    run(app)

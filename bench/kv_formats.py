"""What each layout of the KV cache costs in accuracy and in memory.

    python bench/kv_formats.py [--texts 6] [--model examples/tiny-deepseek-v3]

Three tables, in Markdown:

1. KL to the same model on FP32 KV, and on BF16 KV, in nats per token, by length of context. One
   pass over held-out texts as long as the model allows (4,096 tokens); the tokens scored are the
   last 128 before each context length, so each has seen between length - 128 and length tokens. The
   95 % interval is a bootstrap over texts. Everything but the KV cache is the embedded engine's own
   arithmetic; the row "queries too" rounds queries to e4m3 as well, as the targets' kernels do
   beside `fp8-tensor`.
2. The same KL at the shortest context, with latents that are scaled by a power of two while the
   two halves of kv_b_proj are scaled back: in exact arithmetic the same model. A layout with scales
   of its own does not notice; `fp8-tensor` saturates at 448 and flushes to zero below 2^-10.
3. Bytes per token and layer in DeepSeek-V3's widths: planned, allocated, and by how much the
   process grows when every slot is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from torch import Tensor

from deepseek.cli import make_app, make_progress, run
from deepseek.engine.arithmetic import EMBEDDED
from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.options import EngineIdentity
from deepseek.engine.packed_layout import source_schemes
from deepseek.engine.packing import pack_tensors
from deepseek.kv_layout import KVLayout, kv_layout, layer_token_bytes
from deepseek.models import DEEPSEEK_V3
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.evaluation.metrics import Interval, estimate

app = make_app(__doc__ or "")

CONTEXTS = (256, 1024, 4096)
SCORED = 128
#: Factors of the latents in the second table.
FACTORS = (2.0**-12, 2.0**-8, 2.0**-4, 1.0, 2.0**4, 2.0**6, 2.0**8)
#: Enough that every large tensor is mapped afresh, instead of reusing freed heap memory.
_FILLED_TOKENS = 32768
_FP8_QUERIES = replace(EMBEDDED, name="embedded with fp8 queries", fp8_queries=True)


@dataclass(frozen=True)
class Contender:
    """A KV format of a target, whose layout the cache gets, and whether queries are FP8 too."""

    name: str
    target: str
    kv_cache: str
    fp8_queries: bool = False


CONTENDERS = (
    Contender("fp32", "embedded", "fp32"),
    Contender("bf16", "embedded", "bf16"),
    Contender("int8", "embedded", "int8"),
    Contender("fp8-tiles", "embedded", "fp8"),
    Contender("fp8-tensor", "trtllm", "fp8"),
    Contender("fp8-tensor, queries too", "trtllm", "fp8", fp8_queries=True),
)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="trained source checkpoint")] = Path(
        "examples/tiny-deepseek-v3"
    ),
    texts: Annotated[int, typer.Option(min=2, help="held-out texts of 4,096 tokens")] = 6,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure and print the three tables."""
    torch.set_num_threads(threads)
    source = CheckpointReader(model)
    tensors = pack_tensors(source, layout="torch")
    ids = _texts(model, texts)
    with make_progress() as progress:
        task = progress.add_task("texts", total=(texts + len(FACTORS)) * len(CONTENDERS))
        by_context: dict[tuple[int, str, str], list[Tensor]] = {}
        for text in ids:
            logits = {}
            for contender in CONTENDERS:
                engine = _open(source, tensors, contender, threads)
                logits[contender.name] = engine.score(text)
                progress.advance(task)
            for context, reference, name, kl in _token_kls(logits):
                by_context.setdefault((context, reference, name), []).append(kl)
        by_factor: dict[tuple[float, str], Tensor] = {}
        for factor in FACTORS:
            scaled = _scale_latents(tensors, factor)
            logits = {}
            for contender in CONTENDERS:
                engine = _open(source, scaled, contender, threads)
                logits[contender.name] = engine.score(ids[0][: CONTEXTS[0]])
                progress.advance(task)
            for name, values in logits.items():
                by_factor[factor, name] = _kl(logits["fp32"], values)
    _print_contexts(by_context, texts)
    print()
    _print_factors(by_factor)
    print()
    _print_bytes()


def _texts(model: Path, count: int) -> list[Tensor]:
    tokenizer, longest = load_tokenizer(model), CONTEXTS[-1]
    tokens = tokenizer.encode((model / "heldout.txt").read_text(encoding="utf-8")).ids
    if len(tokens) < count * longest:
        raise typer.BadParameter(f"held-out text has {len(tokens) // longest} texts", None)
    return [torch.tensor(tokens[i * longest : (i + 1) * longest]) for i in range(count)]


def _open(
    source: CheckpointReader, tensors: Mapping[str, Tensor], contender: Contender, threads: int
) -> LLMEngine:
    arithmetic = _FP8_QUERIES if contender.fp8_queries else EMBEDDED
    kernels = Kernels.detect(batch_invariant=True, arithmetic=arithmetic)
    model = Model(source.config, source_schemes(source.config), tensors, kernels)
    identity = EngineIdentity(
        recipe="source",
        artifact_digest=source.fingerprint,
        engine_digest=None,
        kv_cache=contender.kv_cache,
        page_tokens=16,
        arithmetic=contender.target,
    )
    return LLMEngine(model, identity, EngineOptions(max_batch_size=1, num_threads=threads))


def _scale_latents(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same model with other latents: exact, because the factor is a power of two."""
    scaled = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("kv_a_layernorm.weight"):
            scaled[name] = tensor * factor
        elif name.endswith((".w_uk", ".w_uv")):
            scaled[name] = tensor / factor
    return scaled


def _kl(want: Tensor, got: Tensor) -> Tensor:
    """KL of each token's distributions, f64 [T]."""
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _token_kls(logits: Mapping[str, Tensor]) -> Iterator[tuple[int, str, str, Tensor]]:
    for reference in ("fp32", "bf16"):
        for name, values in logits.items():
            for context in CONTEXTS:
                scored = slice(context - SCORED, context)
                yield context, reference, name, _kl(logits[reference][scored], values[scored])


def _print_contexts(by_context: Mapping[tuple[int, str, str], list[Tensor]], texts: int) -> None:
    print(f"KL in nats per token, {texts} texts, {SCORED} tokens each before every context length")
    print("| KV | context | mean KL to FP32 KV | median | mean KL to BF16 KV |")
    print("|---|---:|---|---|---|")
    for contender in CONTENDERS[1:]:
        for context in CONTEXTS:
            to_fp32 = torch.stack(by_context[context, "fp32", contender.name])
            to_bf16 = torch.stack(by_context[context, "bf16", contender.name])
            other = "-" if contender.name == "bf16" else _show(estimate(to_bf16))
            print(
                f"| {contender.name} | {context:,} | {_show(estimate(to_fp32))} "
                f"| {to_fp32.median():.1e} | {other} |"
            )


def _show(interval: Interval) -> str:
    return f"{interval.value:.1e} ({interval.low:.1e} to {interval.high:.1e})"


def _print_factors(by_factor: Mapping[tuple[float, str], Tensor]) -> None:
    names = [contender.name for contender in CONTENDERS[1:]]
    print(f"Mean KL to FP32 KV with scaled latents, one text of {CONTEXTS[0]} tokens")
    print(f"| latents times | {' | '.join(names)} |")
    print("|---:|" + "---|" * len(names))
    for factor in FACTORS:
        values = [f"{by_factor[factor, name].mean():.1e}" for name in names]
        print(f"| {factor:g} | {' | '.join(values)} |")


def _print_bytes() -> None:
    warm = LatentCache(DEEPSEEK_V3, "fp8-tiles", 31, 16)  # the operators' own buffers
    warm.write(0, torch.arange(512), torch.ones((512, 512)), torch.ones((512, 64)))
    print(f"Bytes per token and layer in DeepSeek-V3's widths, {_FILLED_TOKENS:,} tokens written")
    print("| layout | formats | planned | allocated | process grew by |")
    print("|---|---|---:|---:|---:|")
    config = replace(DEEPSEEK_V3, num_hidden_layers=8)
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    users: dict[KVLayout, list[str]] = {}
    for target in ("trtllm", "vllm", "sglang", "embedded"):
        users.setdefault(kv_layout(target, "fp8"), []).append(f"fp8 of {target}")
    for layout in get_args(KVLayout):
        values = torch.ones((512, latent)), torch.ones((512, rope))
        before = _resident_bytes()
        cache = LatentCache(config, layout, _FILLED_TOKENS // 16 - 1, 16)
        for layer in range(config.num_hidden_layers):
            for slots in torch.arange(_FILLED_TOKENS).split(512):
                cache.write(layer, slots, *values)
        per_slot = _FILLED_TOKENS * config.num_hidden_layers
        grown = (_resident_bytes() - before) / per_slot
        planned = layer_token_bytes(layout, latent, rope)
        formats = ", ".join(users.get(layout, [layout]))
        allocated = cache.num_bytes / per_slot
        print(f"| {layout} | {formats} | {planned} | {allocated:g} | {grown:.0f} |")
        del cache


def _resident_bytes() -> int:
    """The anonymous memory of this process, without mapped files."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    run(app)

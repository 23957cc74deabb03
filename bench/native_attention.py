"""Time the native attention of one layer by layout, context and batch, beside its floor.

    python bench/native_attention.py [--rounds 5] [--threads N] [--cases decode,batch,prefill]

Every case is one call: the step's tokens are stored and attend over their contexts, whose pages lie
in random order. The cache has several layers, of which each call takes the next one, so that the
pages of long contexts are not in the CPU's caches, as after a model's other layers. Layouts take
turns within a round; a figure is the median over the rounds.

    floor     the larger of two: the bytes of the pages, read once at the bandwidth that is measured
              first; the dot products at one instruction per cycle and thread (--ghz), of 16 query
              rows times one dword (1 FP32, 2 BF16 or, in two terms, 2 INT8 values)
    Gdot/s    such instructions per second and thread
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import get_args

import torch

from deepseek import _native
from deepseek.engine.batch import Span
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.native_attention import NativeCache, SpanTable, attend
from deepseek.kv_layout import KVLayout, layer_token_bytes
from deepseek.models import DEEPSEEK_V3

PAGE_TOKENS = 16
#: Heads, latent width, rotary width: a small model's and DeepSeek-V3's.
MODELS = {"16 heads 256+64": (16, 256, 64), "128 heads 512+64": (128, 512, 64)}
CONTEXTS = (512, 2048, 8192, 32768)
#: Bytes of pages that the calls of a case read before they come back to the same ones.
FOOTPRINT = 96 << 20
LAYOUTS: tuple[KVLayout, ...] = get_args(KVLayout)


def read_bandwidth(threads: int) -> float:
    """Bytes per second of summing 512 MiB."""
    torch.set_num_threads(threads)
    data = torch.ones(128 << 20)
    data.sum()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)


class Case:
    """`batch` sequences with `rows` tokens each that end at `context`, in one layout."""

    def __init__(
        self, layout: KVLayout, model: tuple[int, int, int], context: int, batch: int, rows: int
    ) -> None:
        self.layout, self.model, self.rows = layout, model, batch * rows
        heads, latent, rope = model
        pages = batch * -(-context // PAGE_TOKENS)
        self.page_bytes = batch * context * layer_token_bytes(layout, latent, rope)
        self.layers = max(3, min(24, FOOTPRINT // self.page_bytes))
        config = replace(
            DEEPSEEK_V3,
            kv_lora_rank=latent,
            qk_rope_head_dim=rope,
            num_hidden_layers=self.layers,
        )
        generator = torch.Generator().manual_seed(0)
        self._cache = LatentCache(config, layout, pages, PAGE_TOKENS)
        self._native = NativeCache(self._cache)
        slots = torch.arange(PAGE_TOKENS, (pages + 1) * PAGE_TOKENS)
        for layer in range(self.layers):
            values = torch.randn(len(slots), latent + rope, generator=generator)
            self._cache.write(layer, slots, values[:, :latent], values[:, latent:])
        order = (torch.randperm(pages, generator=generator) + 1).view(batch, -1).tolist()
        spans = [Span([0] * rows, context - rows, own) for own in order]
        self._spans = SpanTable(self._native, spans)
        scale = (latent + rope) ** -0.5
        self._query = torch.randn(self.rows, heads, latent + rope, generator=generator) * scale
        self._latent = torch.randn(self.rows, latent, generator=generator)
        self._key = torch.randn(self.rows, rope, generator=generator)
        visible = sum(context - rows + i + 1 for i in range(rows)) * batch
        values_per_dot = 1 if layout == "fp32" else 2
        self.dots = visible * heads * (2 * latent + rope) / 16 / values_per_dot
        self._calls = 0

    def run(self, threads: int) -> float:
        """Seconds of one call."""
        layer = self._calls % self.layers
        self._calls += 1
        begin = time.perf_counter()
        attend(self._native, layer, self._query, self._latent, self._key, self._spans, threads)
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ghz", type=float, default=3.7)
    parser.add_argument("--cases", default="decode,batch,prefill")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    options = parser.parse_args()
    layouts = [layout for layout in LAYOUTS if layout in options.layouts.split(",")]
    contexts = [int(context) for context in options.contexts.split(",")]
    shapes = {"decode": (1, 1), "batch": (16, 1), "prefill": (1, 512)}
    bandwidth = read_bandwidth(options.threads)
    print(f"{_native.isa()}, {options.threads} threads, memory {bandwidth / 1e9:.1f} GB/s")
    for kind in options.cases.split(","):
        batch, rows = shapes[kind]
        for name, model in MODELS.items():
            for context in contexts:
                if batch * context * model[1] > 16 * 8192 * 512:
                    continue  # more memory than such a machine has
                cases = [Case(layout, model, context, batch, rows) for layout in layouts]
                times: list[list[float]] = [[] for _ in cases]
                for number in range(options.rounds + 1):
                    for case, own in zip(cases, times, strict=True):
                        several = [case.run(options.threads) for _ in range(case.layers)]
                        if number:
                            own.append(statistics.median(several))
                print(f"{kind} x{batch}, {rows} tokens, {name}, context {context}")
                for case, own in zip(cases, times, strict=True):
                    seconds = statistics.median(own)
                    floor = max(
                        case.page_bytes / bandwidth,
                        case.dots / (options.threads * options.ghz * 1e9),
                    )
                    rate = case.dots / seconds / options.threads
                    print(
                        f"    {case.layout:10} {1e3 * seconds:9.3f} ms"
                        f" {seconds / floor:6.2f} x floor {rate / 1e9:6.2f} Gdot/s"
                        f" {case.page_bytes / seconds / 1e9:6.1f} GB/s"
                    )


if __name__ == "__main__":
    main()

"""transformers' own DeepseekV3ForCausalLM in BF16 as a worker (workers.py).

Attention by torch's SDPA; of transformers' two ways to run experts on a CPU the one that decodes
faster here is taken, and said. The context is a `DynamicCache`, which holds expanded keys and
values.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bench.decoding import traffic
from bench.decoding.lines import answer

EXPERTS = ("grouped_mm", "eager")


class Transformers:
    def open(self, directory: str, *, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._caches: dict[int, DynamicCache] = {}
        chosen = min(EXPERTS, key=self._decode_once)
        self._model.set_experts_implementation(chosen)
        parameters = dict(self._model.named_parameters())
        sizes = {name: parameter.nbytes for name, parameter in parameters.items()}
        config = self._model.config
        row = 2 * config.hidden_size
        heads = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
        stored = traffic.Stored(
            routed=routed,
            rest=sum(sizes.values()) - routed - row * config.vocab_size,
            row=row,
            token=2 * config.num_attention_heads * heads * config.num_hidden_layers,
        )
        return {"stored": asdict(stored), "words": f"sdpa, experts {chosen}, expanded KV"}

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        started = time.perf_counter()
        self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def fill(self, prompts: list[list[int]], batches: list[int]) -> str:
        """The prompts are computed one by one; `decode` puts them side by side."""
        self._each = []
        for prompt in prompts:
            cache = DynamicCache(config=self._model.config)
            self._model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
            self._each.append(cache)
        return ""

    @torch.inference_mode()
    def decode(self, batch: int, steps: int) -> list[float]:
        cache = self._beside(batch)
        ids = torch.zeros((batch, 1), dtype=torch.int64) + torch.arange(2, 2 + batch)[:, None]
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            ids = self._model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            seconds.append(time.perf_counter() - started)
        cache.crop(-steps)  # back to the context
        return seconds

    def _beside(self, batch: int) -> DynamicCache:
        """The first contexts as one batch, kept for the next time."""
        if batch not in self._caches:
            whole = copy.deepcopy(self._each[0])
            for index, layer in enumerate(whole.layers):
                rows = [each.layers[index] for each in self._each[:batch]]
                layer.keys = torch.cat([row.keys for row in rows])
                layer.values = torch.cat([row.values for row in rows])
            self._caches[batch] = whole
        return self._caches[batch]

    @torch.inference_mode()
    def _decode_once(self, experts: str) -> float:
        """Seconds of a step over a short context, the better of two."""
        self._model.set_experts_implementation(experts)
        cache = DynamicCache(config=self._model.config)
        self._model(torch.tensor([list(range(2, 34))]), past_key_values=cache, logits_to_keep=1)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            self._model(torch.tensor([[5]]), past_key_values=cache, logits_to_keep=1)
            times.append(time.perf_counter() - started)
        return min(times)


if __name__ == "__main__":
    peer = Transformers()
    answer({"open": peer.open, "prefill": peer.prefill, "fill": peer.fill, "decode": peer.decode})

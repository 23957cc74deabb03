"""llama.cpp through its Python binding as a worker (workers.py). Runs in its own environment, where
of this project only this file and lines.py are known.

A step is one `llama_decode` and the argmax of each sequence's logits; making the batch is not in
the time. Flash attention is on and the KV cache is f16, the fastest of its formats on a CPU for
multi-head latent attention. llama.cpp can hold the sequences in one buffer or in one each; both
contexts are kept, `fill` times some steps in each for every batch size that will be asked for, and
the faster one is measured.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from typing import Any

import llama_cpp as ll
import numpy as np
from gguf import GGUFReader
from lines import answer

_TRIED_STEPS = 4


@ll.llama_log_callback
def _log(level: int, text: bytes, _: object) -> None:
    """Only warnings and errors; kept by the module, because llama.cpp keeps the pointer alone."""
    if level >= 3:
        sys.stderr.write(text.decode(errors="replace"))


class _Context:
    """One llama_context over a model. `unified` holds all sequences in one buffer."""

    def __init__(
        self, model: Any, *, unified: bool, sequences: int, room: int, threads: int
    ) -> None:
        params = ll.llama_context_default_params()
        params.n_ctx = sequences * room
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        params.type_k = params.type_v = 1  # GGML_TYPE_F16
        params.kv_unified = unified
        self._context = ll.llama_init_from_model(model, params)
        assert self._context, "llama.cpp makes no context"
        self._memory = ll.llama_get_memory(self._context)
        self._batch = ll.llama_batch_init(512, 0, 1)
        self._vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

    def compute(self, rows: list[tuple[int, int, int, bool]]) -> tuple[float, list[int]]:
        """Rows of (token, position, sequence, whether its logits are wanted) -> seconds, and the
        likeliest next token of each wanted row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = wanted
        started = time.perf_counter()
        code = ll.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode: {code}"
        tokens = []
        for row, (*_, wanted) in enumerate(rows):
            if wanted:
                logits = ll.llama_get_logits_ith(self._context, row)
                tokens.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
        return time.perf_counter() - started, tokens

    def prefill(self, tokens: list[int], sequence: int) -> float:
        last = len(tokens) - 1
        seconds, _ = self.compute([(t, p, sequence, p == last) for p, t in enumerate(tokens)])
        return seconds

    def forget(self, sequence: int, start: int) -> None:
        assert ll.llama_memory_seq_rm(self._memory, sequence, start, -1)


class Llama:
    def open(
        self, file: str, *, threads: int, batch: int, context: int, steps: int
    ) -> dict[str, Any]:
        ll.llama_log_set(_log, ctypes.c_void_p())
        ll.llama_backend_init()
        self._model = ll.llama_model_load_from_file(file.encode(), ll.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {file}"
        self._spare = batch  # the sequence of prefills
        self._contexts = {
            unified: _Context(
                self._model,
                unified=unified,
                sequences=batch + 1,
                room=-(-(context + steps + 8) // 256) * 256,
                threads=threads,
            )
            for unified in (False, True)
        }
        self._best: dict[int, bool] = {}
        return {"stored": self._stored(file), "words": "KV f16, flash attention"}

    def _stored(self, file: str) -> dict[str, int]:
        """As `traffic.Stored`, from the file's own list of tensors."""
        reader = GGUFReader(file)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
        routed = sum(size for name, size in sizes.items() if "_exps." in name)
        layers = ll.llama_model_n_layer(self._model)
        latent = int(self._field(reader, "attention.key_length"))
        return {
            "routed": routed,
            "rest": sum(sizes.values()) - routed - int(table.n_bytes),
            "row": int(table.n_bytes) // int(table.shape[1]),
            "token": 2 * latent * layers,
        }

    @staticmethod
    def _field(reader: GGUFReader, name: str) -> Any:
        return next(
            field.contents() for key, field in reader.fields.items() if key.endswith("." + name)
        )

    def prefill(self, tokens: list[int]) -> float:
        context = self._contexts[False]
        seconds = context.prefill(tokens, self._spare)
        context.forget(self._spare, 0)
        return seconds

    def fill(self, prompts: list[list[int]], batches: list[int]) -> str:
        self._length = len(prompts[0])
        for context in self._contexts.values():
            for sequence, prompt in enumerate(prompts):
                context.prefill(prompt, sequence)
        for batch in batches:
            self._best[batch] = min(
                self._contexts,
                key=lambda unified: statistics.median(self._steps(unified, batch, _TRIED_STEPS)),
            )
        joint = [str(batch) for batch in batches if self._best[batch]]
        return f"sequences in one buffer at batch {', '.join(joint) or '-'}, else in one each"

    def decode(self, batch: int, steps: int) -> list[float]:
        return self._steps(self._best[batch], batch, steps)

    def _steps(self, unified: bool, batch: int, steps: int) -> list[float]:
        context = self._contexts[unified]
        tokens, seconds = list(range(2, 2 + batch)), []
        for step in range(steps + 1):  # the first warms up, as ours ends its prefill
            rows = [(t, self._length + step, s, True) for s, t in enumerate(tokens)]
            taken, tokens = context.compute(rows)
            seconds.append(taken)
        for sequence in range(batch):
            context.forget(sequence, self._length)
        return seconds[1:]


if __name__ == "__main__":
    llama = Llama()
    answer(
        {"open": llama.open, "prefill": llama.prefill, "fill": llama.fill, "decode": llama.decode}
    )

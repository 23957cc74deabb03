"""A strict double of `tensorrt_llm`, the members of its LLM API that IntServe uses.

It refuses what the real one refuses, and more: what the real one takes in silence and a user pays
for later is a violation (`journal.py`). It computes with the embedded engine in TensorRT-LLM's
arithmetic over the very directory that `build --target trtllm` wrote, so its answers are real.
Importing it is cheap; the engine is imported when an `LLM` is made.

    llm.py         LLM                           ranks.py    processes that stand for ranks
    arguments.py   its keywords                  rank.py     the program of one of them
    admission.py   a request, before it runs     steps.py    the step loop, in a thread
    sampling.py    SamplingParams                stats.py    iteration statistics and KV events
    result.py      what generate_async returns   journal.py  what was done, and done wrongly
    model.py       the directory, as an engine   faults.py   what goes wrong, by switch

Environment of the process that imports it:

    TRTLLM_DOUBLE_VERSION   1.2.1 (default) or 1.3.0rc29
    TRTLLM_DOUBLE_GPUS      GPUs of the node, 8 by default; CUDA_VISIBLE_DEVICES hides some
    TRTLLM_DOUBLE_JOURNAL   the file that `journal.py` appends to
    TRTLLM_DOUBLE_STRICT    what a violation does: exit (default), raise, record
    TRTLLM_DOUBLE_FAULTS    a JSON object of faults
    TRTLLM_DOUBLE_CONTROL   a file with such an object, read again whenever it changes
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tensorrt_llm.version import __version__

__all__ = ["LLM", "SamplingParams", "__version__"]

# As the real one does, which is why a worker's standard output is no channel.
print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}", file=sys.stdout, flush=True)


_PLACES = {"LLM": "llm", "SamplingParams": "sampling"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tensorrt_llm' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"tensorrt_llm.{_PLACES[name]}"), name)
    return globals()[name]

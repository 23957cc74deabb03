"""The names that the real package exports here."""

from __future__ import annotations

from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llm import LLM
from tensorrt_llm.result import CompletionOutput, RequestOutput
from tensorrt_llm.sampling import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestError", "RequestOutput", "SamplingParams"]

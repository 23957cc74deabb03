"""What `generate_async` looks at before it returns: inputs, sampling, and how it is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tensorrt_llm.journal import violate
from tensorrt_llm.sampling import SamplingParams


def prepare_sampling(
    sampling: SamplingParams | None, args: SimpleNamespace, end_id: int | None
) -> SamplingParams:
    """The request's sampling with what the real one fills in; `end_id` is the tokenizer's, None
    without one.

    Raises:
        TypeError, ValueError, NotImplementedError: this request is refused.
    """
    if sampling is None:
        sampling = SamplingParams()
    if not isinstance(sampling, SamplingParams):
        raise TypeError(
            f"The sampling_params must be type SamplingParams or None, but got {type(sampling)}"
        )
    if sampling.end_id is None:
        if end_id is None:
            violate("implicit_end_id", "end_id is None without a tokenizer", refused=True)
            raise ValueError(
                "tokenizer is required to reset end_id if it is None, or you can explicitly "
                "specify the end_id for sampling_params"
            )
        sampling.end_id = end_id
    if sampling._stream_interval is None:
        sampling._stream_interval = args.stream_interval
    implicit = [
        name
        for name in ("temperature", "top_p", "top_k", "max_tokens")
        if name not in sampling.given or getattr(sampling, name) is None
    ]
    if implicit:
        violate("implicit_sampling", f"{', '.join(implicit)} left to the version's defaults")
    if sampling.logprobs is not None and sampling.logprobs < 1:
        violate("logprobs_0", "versions disagree on logprobs=0; send at least 1")
    sampling.refuse_what_is_not_computed()
    return sampling


def read_inputs(inputs: Any) -> list[int]:
    """The token ids of a prompt. Text would be tokenized by the real one; ours never is.

    Raises:
        TypeError, ValueError: other inputs.
    """
    if isinstance(inputs, dict) and "prompt_token_ids" in inputs:
        inputs = inputs["prompt_token_ids"]
    if isinstance(inputs, list) and all(type(token) is int for token in inputs):
        if not inputs:
            raise ValueError("prompt token ids must not be empty")
        return list(inputs)
    raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")


def check_use(
    prompt_ids: list[int],
    sampling: SamplingParams,
    cache_salt: str | None,
    args: SimpleNamespace,
    max_seq_len: int,
) -> None:
    """Note what the real one would take and answer with trouble.

    Raises:
        TypeError, ValueError: what it would not.
    """
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise TypeError(f"cache_salt must be str, not {type(cache_salt)}")
    if len(prompt_ids) == 1 and sampling.max_tokens == 1 and not cache_salt:
        violate("unsalted_canary", "a canary has a cache salt of its own")
    if len(prompt_ids) >= max_seq_len:
        violate(
            "over_long_prompt",
            f"{len(prompt_ids)} tokens, of {max_seq_len} with the answer",
            refused=True,
        )
    if not args.enable_chunked_prefill and len(prompt_ids) > args.max_num_tokens:
        raise ValueError(
            f"The sum of prompt length ({len(prompt_ids)}), query length (0) should not exceed "
            f"max_num_tokens ({args.max_num_tokens})"
        )

"""SamplingParams: the fields of 1.2.1 with their defaults, and what 1.3 adds.

Of what it may ask for the double computes temperature, top_k, top_p, seed, end tokens and logprobs;
it refuses the rest with NotImplementedError, which the real one also raises for single requests.
"""

from __future__ import annotations

from typing import Any

from tensorrt_llm.journal import violate
from tensorrt_llm.version import IS_1_3, __version__

_NONE = """
end_id pad_id bad bad_token_ids stop stop_token_ids embedding_bias logits_processor best_of top_k
top_p top_p_min top_p_reset_ids top_p_decay seed temperature min_tokens beam_search_diversity_rate
repetition_penalty presence_penalty frequency_penalty prompt_ignore_length length_penalty
early_stopping no_repeat_ngram_size min_p beam_width_array logprobs prompt_logprobs
additional_model_outputs lookahead_config guided_decoding truncate_prompt_tokens
"""
FIELDS: dict[str, Any] = dict.fromkeys(_NONE.split()) | {
    "max_tokens": 32,
    "include_stop_str_in_output": False,
    "apply_batched_logits_processor": False,
    "n": 1,
    "use_beam_search": False,
    "return_context_logits": False,
    "return_generation_logits": False,
    "exclude_input_from_output": True,
    "return_encoder_output": False,
    "return_perf_metrics": False,
    "ignore_eos": False,
    "detokenize": True,
    "add_special_tokens": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}
if IS_1_3:
    FIELDS["logprobs_mode"] = None
#: What the embedded engine does not compute.
_NOT_COMPUTED = """
bad bad_token_ids stop embedding_bias logits_processor top_p_min top_p_reset_ids top_p_decay
min_tokens beam_search_diversity_rate repetition_penalty presence_penalty frequency_penalty
length_penalty early_stopping no_repeat_ngram_size min_p beam_width_array additional_model_outputs
lookahead_config guided_decoding truncate_prompt_tokens logprobs_mode
"""


class SamplingParams:
    """Keywords only. `given` are those that the caller wrote.

    Raises:
        TypeError: an unknown keyword.
        ValueError: a value outside its range.
    """

    __slots__ = (*FIELDS, "_stream_interval", "given")

    def __init__(self, **given: Any) -> None:
        for name in given:
            if name not in FIELDS:
                violate(
                    "unknown_keyword",
                    f"SamplingParams has no {name} in {__version__}",
                    refused=True,
                    name=name,
                )
                raise TypeError(
                    f"SamplingParams.__init__() got an unexpected keyword argument {name!r}"
                )
        self.given = frozenset(given)
        self._stream_interval: int | None = None
        for name, default in FIELDS.items():
            setattr(self, name, given.get(name, default))
        if self.best_of is None:
            self.best_of = self.n
        self._validate()

    def _validate(self) -> None:
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"require max_tokens >= 1, got max_tokens={self.max_tokens}")
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        if self.best_of > 1 and self.is_greedy:
            raise ValueError("Greedy decoding in the LLM API does not allow multiple returns")
        if self.logprobs is not None:
            self.logprobs = int(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken."""
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    def refuse_what_is_not_computed(self) -> None:
        """Raises:
        NotImplementedError: it asks for something that the double does not compute."""
        asked = [name for name in _NOT_COMPUTED.split() if getattr(self, name, None) is not None]
        if self.n > 1 or self.use_beam_search:
            asked.append("n > 1")
        if asked:
            raise NotImplementedError(f"the double does not compute {', '.join(asked)}")

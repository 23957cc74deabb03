"""What a request must fulfill that goes on with the tokens which another engine generated.

The continuation is the rest of the undisturbed run: the same tokens, text, logprobs, end and
counts. That holds because the next token depends on the tokens before it, the seed and the position
alone (sampler.py), and the text on the tokens alone: an engine replays its detokenizer over them.
The engines share these checks. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from deepseek.engine.request import SamplingParams
from deepseek.errors import RequestError


def check_continuation(
    sampling: SamplingParams, output_ids: Items[int], num_shown: int, vocab_size: int
) -> None:
    """Check what can be said before the text is replayed. No output tokens: nothing to check.

    Raises:
        RequestError: no run with these settings can have generated `output_ids`.
    """
    if num_shown < 0:
        raise RequestError(f"num_shown is {num_shown}; count the characters passed on, from 0")
    if not output_ids:
        return
    if len(output_ids) > sampling.max_tokens:
        raise RequestError(
            f"there are {len(output_ids)} output_ids, more than max_tokens {sampling.max_tokens}; "
            "give those that were generated, and the max_tokens of the whole answer"
        )
    if not 0 <= min(output_ids) <= max(output_ids) < vocab_size:
        raise RequestError(f"output_ids hold a token id outside 0..{vocab_size - 1}")
    if sampling.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs come before the first token, so a request with output_ids has had "
            "them; ask for none"
        )


def check_seed(sampling: SamplingParams, output_ids: Items[int]) -> None:
    """Check that the next token can be drawn as the undisturbed run would have drawn it.

    Raises:
        RequestError: the tokens so far were drawn with a seed that is not told.
    """
    if output_ids and sampling.temperature > 0 and sampling.seed is None:
        raise RequestError(
            "output_ids at a temperature above 0 need the seed that they were drawn with; give it"
        )


def unshown_text(replayed: str, num_shown: int) -> str:
    """The part of the replayed text that was not passed on yet.

    Raises:
        RequestError: more was passed on than the tokens so far have made final.
    """
    if num_shown > len(replayed):
        raise RequestError(
            f"num_shown is {num_shown}, but only {len(replayed)} characters of the text of the "
            "output_ids are final; give the number that was passed on"
        )
    return replayed[num_shown:]

"""Many random requests through one engine: its small cache preempts them, cuts their prompts into
chunks and gives them each other's prefixes; some are aborted. Each answer is held against that of
an engine that computes the request alone, with all of its tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from support.continuing import Answer, answer
from support.engines import request, run
from support.page_checks import PageWatch

from deepseek.engine.engine import LLMEngine
from deepseek.engine.request import Request, StepOutput

#: At most so many requests are under way or wait.
MAX_HELD = 10


def random_requests(
    chance: random.Random,
    count: int,
    heads: Sequence[Sequence[int]],
    vocabulary: int,
    *,
    longest_answer: int = 16,
    long_prompt: int | None = None,
) -> list[Request]:
    """Conversations of one of a few beginnings (`heads`) and salts, cut anywhere, greedy but for
    some. One in twenty has a prompt of up to `long_prompt` tokens."""
    items = []
    for number in range(count):
        head = chance.choice(heads)
        head = head[: chance.randint(len(head) // 4, len(head))]
        sampling: dict[str, Any] = {"logprobs": 0}
        if chance.random() < 0.2:
            sampling |= {"temperature": 1.0, "seed": number}
        if chance.random() < 0.1:
            sampling |= {"prompt_logprobs": 0}
        most = 12
        if long_prompt is not None and chance.random() < 0.05:
            most = long_prompt - len(head)
        tail = [chance.randrange(vocabulary) for _ in range(chance.randint(1, most))]
        salt = chance.choice(["", "", "a"])
        prompt = [*head, *tail]
        length = chance.randint(1, longest_answer)
        items.append(request(str(number), prompt, length, salt=salt, **sampling))
    return items


def answer_alone(engine: LLMEngine, item: Request) -> Answer:
    """What the request is told by an engine that computes all of it."""
    assert not engine._options.prefix_cache
    return answer(run(engine, [item])[item.request_id])


def soak(
    engine: LLMEngine, plain: LLMEngine, items: Iterable[Request], chance: random.Random
) -> None:
    """Run the requests through `engine` as they come, aborting some: each is answered as `plain`
    answers it alone, bit for bit; what an aborted one said is the beginning of that. At the end all
    pages are free, and every one of these things has happened."""
    items = list(items)
    watch = PageWatch()
    outputs: dict[str, list[StepOutput]] = {item.request_id: [] for item in items}
    waiting = items[::-1]
    num_aborted = 0
    while waiting or engine.has_work:
        while waiting and len(engine._tracked) < MAX_HELD and chance.random() < 0.6:
            engine.add_request(waiting.pop())
        if engine._tracked and chance.random() < 0.02:
            num_aborted += engine.abort(chance.choice(list(engine._tracked)))
        for output in engine.step():
            outputs[output.request_id].append(output)
        watch(engine)
    for item in items:
        got, want = answer(outputs[item.request_id]), answer_alone(plain, item)
        if got.reason == "abort":
            assert got.token_ids == want.token_ids[: len(got.token_ids)]
            assert got.logprobs == want.logprobs[: len(got.logprobs)]
        else:
            assert got == want, item.request_id
    load = engine.current_load()
    assert (load.kv_tokens_used, engine._pool.num_free) == (0, engine._pool.num_pages)
    assert load.cached_prompt_tokens > load.computed_prompt_tokens / 4
    assert num_aborted > 0
    assert engine.num_preemptions > 0

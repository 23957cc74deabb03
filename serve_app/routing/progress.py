"""What one sequence has so far, over all replicas that it ran on, and how it goes on.

fleet.py keeps one per sequence. The tokens of a sequence are a function of its prompt, its seed and
its position, so that another replica continues it with the tokens that an undisturbed run has; the
seed is therefore drawn here when the client gave none.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from serve_app.engines.protocol import (
    Done,
    Event,
    GenerateRequest,
    Placed,
    PromptLogprobs,
    Tokens,
)


class Failures:
    """The replicas that failed while they had a sequence of one request. Its choices share it:
    they have one prompt, and what that does to replicas they do together."""

    def __init__(self) -> None:
        self.replica_ids: set[str] = set()


class Progress:
    """One sequence: what was passed on of it, and the replicas that it lost.

    `attempt` counts the replicas that it was sent to, from 1. `replica_id` is the one that has it,
    None while that is not known. `failures` are those of its request.
    """

    def __init__(
        self,
        request: GenerateRequest,
        failures: Failures,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sampling = request.sampling
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        self._request = replace(request, sampling=sampling, arrived=None)
        self._clock = clock
        self._failures = failures
        self._refusals = 0
        self._heard = False
        self._output_ids = list(request.output_ids)
        self._num_shown = request.num_shown
        self._avoid = request.avoid
        self.attempt = 0
        self.replica_id: str | None = None
        #: Seconds in queue, prefill and decode with the replicas that were lost, as seen from here.
        self._lost_s = [0.0, 0.0, 0.0]
        self._sent_s = self._first_s = self._last_s = 0.0
        self._arrived_s = request.arrived
        self._began_s: float | None = None
        self._newest_s = 0.0

    @property
    def num_output(self) -> int:
        """Tokens that were passed on."""
        return len(self._output_ids)

    @property
    def num_losses(self) -> int:
        """Replicas that failed with its request, and those that did not take this sequence. One
        that it ran on until that stopped is none: an update may take it through many."""
        return len(self._failures.replica_ids) + self._refusals

    @property
    def used_tokens(self) -> int:
        """Prompt and completion; 0 where it never ran."""
        return len(self._request.prompt_ids) + self.num_output if self.attempt else 0

    @property
    def home(self) -> str:
        """The pool that it belongs to."""
        return self._request.pools[0]

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools that it may run in."""
        return self._request.pools

    @property
    def ttft_s(self) -> float | None:
        """From the arrival of its HTTP request to its first token, over all replicas; None before
        that, or where its arrival is not known."""
        if self._began_s is None or self._arrived_s is None:
            return None
        return self._began_s - self._arrived_s

    @property
    def itl_s(self) -> float | None:
        """The mean time between its tokens, over all replicas; None before the second one."""
        num_intervals = self.num_output - 1
        if self._began_s is None or num_intervals < 1:
            return None
        return (self._newest_s - self._began_s) / num_intervals

    def send(self, place: str | None) -> GenerateRequest:
        """The request for the next replica: `place`, where one was granted. Its id differs from
        those of earlier attempts, because a replica that was lost may still hold one."""
        now = self._clock()
        if self.attempt:
            self._lost_s[0] += now - self._last_s
        self._sent_s = self._first_s = self._last_s = now
        self.attempt += 1
        self.replica_id = place
        self._heard = False
        request = replace(
            self._request,
            output_ids=tuple(self._output_ids),
            num_shown=self._num_shown,
            replica_id=place,
            avoid=self._avoid,
        )
        if self.attempt > 1:
            request = replace(request, request_id=f"{request.request_id}~{self.attempt}")
        return request

    def take(self, event: Event) -> Event:
        """Note an event of the replica; returns it as the sequence's own."""
        self._last_s = self._clock()
        self._heard = True
        if isinstance(event, Placed):
            self.replica_id = event.replica_id
            return replace(event, attempt=self.attempt)
        if isinstance(event, PromptLogprobs):
            sampling = replace(self._request.sampling, prompt_logprobs=None)
            self._request = replace(self._request, sampling=sampling)
        elif isinstance(event, Tokens):
            if self._first_s == self._sent_s:
                self._first_s = self._last_s
            if event.token_ids:
                self._newest_s = self._last_s
                self._began_s = self._last_s if self._began_s is None else self._began_s
            self._output_ids += event.token_ids
            self._num_shown += len(event.text)
        elif self.attempt > 1:
            return self._whole(event)
        return event

    def lose(self, *, failed: bool, avoid: bool) -> None:
        """The replica is lost; `failed` says that it did not merely stop or have no room. With
        `avoid` the sequence does not go there again."""
        now = self._clock()
        if failed:
            unknown = f"{self._request.request_id}~{self.attempt}"
            self._failures.replica_ids.add(self.replica_id or unknown)
        elif not self._heard:
            self._refusals += 1
        if avoid and self.replica_id is not None:
            self._avoid += (self.replica_id,)
        # Until its first token it was in the replica's queue or prefill, which look alike from
        # here; after its last one it waited for somebody to notice.
        if self._first_s == self._sent_s:
            self._last_s = now
            self._lost_s[1] += now - self._sent_s
        else:
            self._lost_s[1] += self._first_s - self._sent_s
            self._lost_s[2] += self._last_s - self._first_s

    def _whole(self, done: Done) -> Done:
        """The final event with the times of all replicas. Its engine has counted the tokens of the
        earlier ones; what it found in its cache may be more than the prompt."""
        queue_s, prefill_s, decode_s = self._lost_s
        return replace(
            done,
            cached_tokens=min(done.cached_tokens, done.prompt_tokens),
            queue_s=done.queue_s + queue_s,
            prefill_s=done.prefill_s + prefill_s,
            decode_s=done.decode_s + decode_s,
        )

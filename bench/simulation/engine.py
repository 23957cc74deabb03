"""One engine replica as rates: how fast it prefills and decodes what it holds.

Between two events (a request comes, its prompt is done, its last token is said) all rates are
constant, so time goes from event to event and never by tokens. Every decoding request gets tokens
at the same rate: `progress` counts the tokens that each has got since the replica was there, and a
request ends when `progress` has grown by what it still wants.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

NEVER = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What a replica can do. The defaults are round numbers of the size that eight GPUs show with
    DeepSeek-V3 (docs/benchmarks.md says what is assumed); nothing here was measured."""

    #: Tokens of prompts per second, when nothing decodes beside them.
    prefill_tokens_per_s: float = 16_000.0
    #: The part of each step that prompts get while others decode (chunked prefill).
    prefill_share: float = 0.5
    #: Seconds of a decoding step: for itself, and for each sequence in it.
    step_s: float = 0.020
    step_per_sequence_s: float = 0.0003
    places: int = 64
    kv_tokens: int = 400_000

    def decode_step_s(self, sequences: int) -> float:
        """Seconds between two tokens of each of so many sequences, without prompts beside them."""
        return self.step_s + self.step_per_sequence_s * sequences

    def residence_s(self, prompt: float, output: float, prompts_per_s: float = 0.0) -> float:
        """How long a request is in a replica that is four fifths full and prefills
        `prompts_per_s` tokens per second."""
        busy = min(0.95, prompts_per_s / (self.prefill_tokens_per_s * self.prefill_share))
        step_s = self.decode_step_s(round(0.8 * self.places)) / (1.0 - self.prefill_share * busy)
        prefill_s = prompt / (self.prefill_tokens_per_s * self.prefill_share)
        return prefill_s / max(0.05, 1.0 - busy) + output * step_s

    def rate(self, prompt: float, output: float, places_share: float = 0.8) -> float:
        """Requests per second of such a mean size by which that share of the places is taken: what
        one replica carries."""
        low, high = 0.0, 0.8 * self.prefill_tokens_per_s * self.prefill_share / max(prompt, 1e-9)
        places = min(float(self.places), self.kv_tokens / (prompt + output)) * places_share
        for _ in range(50):
            middle = (low + high) / 2
            if middle * self.residence_s(prompt, output, middle * prompt) > places:
                high = middle
            else:
                low = middle
        return low


@dataclass(slots=True, eq=False)
class Request:
    """One request; times in seconds of the simulation, None until it has come so far."""

    arrived_s: float
    prompt: float
    output: float
    placed_s: float | None = None
    first_s: float | None = None
    done_s: float | None = None

    @property
    def kv_tokens(self) -> float:
        """What is set aside for it."""
        return self.prompt + self.output

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between its tokens; None: it has one token, or is not done."""
        if self.first_s is None or self.done_s is None or self.output <= 1.0:
            return None
        return (self.done_s - self.first_s) / (self.output - 1.0)


class Replica:
    """One replica. `advance` brings it to a moment, `next_s` says when something happens next."""

    __slots__ = (
        "_decoding",
        "_head_left",
        "_model",
        "_order",
        "_prefilling",
        "_progress",
        "_time_s",
        "draining",
        "kv_used",
        "number",
        "version",
    )

    def __init__(self, number: int, model: EngineModel, now_s: float) -> None:
        self.number = number
        self.draining = False
        self.kv_used = 0.0
        #: Grows with each change, so that an event that was foreseen before it is known as stale.
        self.version = 0
        self._model = model
        self._time_s = now_s
        self._prefilling: deque[Request] = deque()
        self._head_left = 0.0
        self._progress = 0.0
        self._decoding: list[tuple[float, int, Request]] = []
        self._order = 0

    @property
    def held(self) -> int:
        """Requests that have a place."""
        return len(self._prefilling) + len(self._decoding)

    def has_room(self, request: Request) -> bool:
        return (
            not self.draining
            and self.held < self._model.places
            and self.kv_used + request.kv_tokens <= self._model.kv_tokens
        )

    def place(self, request: Request, now_s: float) -> None:
        """Take a request in. The replica must be at `now_s`."""
        request.placed_s = now_s
        self.kv_used += request.kv_tokens
        self._prefilling.append(request)
        if len(self._prefilling) == 1:
            self._head_left = request.prompt
        self.version += 1

    def advance(self, now_s: float) -> tuple[list[Request], list[Request]]:
        """Go on to `now_s`, at most to `next_s`; the requests that end there, and those that get
        their first token there."""
        passed = now_s - self._time_s
        self._time_s = now_s
        if passed > 0.0:
            if self._decoding:
                self._progress += passed / self._token_s()
            if self._prefilling:
                self._head_left -= passed * self._prefill_rate()
        ended: list[Request] = []
        begun: list[Request] = []
        while self._prefilling and self._head_left <= 1e-6:
            request = self._prefilling.popleft()
            request.first_s = now_s
            begun.append(request)
            self._head_left = self._prefilling[0].prompt if self._prefilling else 0.0
            if request.output <= 1.0:
                ended.append(request)
            else:
                self._order += 1
                until = self._progress + request.output - 1.0
                heapq.heappush(self._decoding, (until, self._order, request))
        while self._decoding and self._decoding[0][0] <= self._progress + 1e-6:
            ended.append(heapq.heappop(self._decoding)[2])
        for request in ended:
            request.done_s = now_s
            self.kv_used -= request.kv_tokens
        self.version += 1
        return ended, begun

    def next_s(self) -> float:
        """When the next prompt is done or the next request ends."""
        soonest = NEVER
        if self._prefilling:
            soonest = max(0.0, self._head_left) / self._prefill_rate()
        if self._decoding:
            left = max(0.0, self._decoding[0][0] - self._progress)
            soonest = min(soonest, left * self._token_s())
        return self._time_s + soonest

    def _prefill_rate(self) -> float:
        share = self._model.prefill_share if self._decoding else 1.0
        return self._model.prefill_tokens_per_s * share

    def _token_s(self) -> float:
        step_s = self._model.decode_step_s(len(self._decoding))
        return step_s / (1.0 - self._model.prefill_share) if self._prefilling else step_s

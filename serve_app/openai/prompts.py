"""From a body's prompts to token ids, in threads; what cannot fit is refused before that.

Encoding a text takes a hundred times its bytes of memory, and seconds for megabytes. So

- a text is refused as soon as its pieces, encoded one after the other, have more tokens than the
  context can hold; only one that may fit is encoded as a whole, which gives its exact ids;
- texts that are encoded at one time have at most MAX_BYTES together, others wait in order; short
  prompts have threads of their own, and wait for no long one;
- conversations are rendered in further threads: a chat template may take seconds to fail;
- a request that waits, or whose text is being encoded, is answered when its deadline passes. The
  thread goes on to the end of what it does, and its bytes count until then.

service.py calls it. The tokenizer itself is in tokenizer.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from serve_app.errors import DeadlineExceeded, InvalidRequest
from serve_app.openai.tokenizer import PromptText, Tokenizer
from serve_app.routing.checks import ContextLimit, too_long

#: Bytes of text of one request up to which it counts as short; and up to which it is encoded in
#: the event loop, in less time than a thread takes to get Python's lock from a busy one.
SHORT_BYTES = 64 << 10
INLINE_BYTES = 1 << 10
#: Bytes of the texts, of requests that are not short, that are encoded at one time. A longer text
#: is encoded alone.
MAX_BYTES = 4 << 20
#: Requests that are rendered, and encoded, at one time.
CHAT_THREADS, SHORT_THREADS, LONG_THREADS = 8, 4, 2

Result = TypeVar("Result")


class Budget:
    """Bytes that are in use at one time. Who asks first gets first. Belongs to one event loop."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, size: int) -> int:
        """Wait for so many bytes, of more than there are for all; returns what `release` takes."""
        size = min(size, self._total)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, place))
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(size)
            else:
                place.cancel()
                self._admit()
            raise
        return size

    def release(self, size: int) -> None:
        self._free += size
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            size, place = self._waiting[0]
            if not place.cancelled():
                if size > self._free:
                    return
                self._free -= size
                place.set_result(None)
            self._waiting.popleft()


class PromptEncoder:
    """Encodes prompts of requests. Belongs to the event loop that uses it first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._budget = Budget(MAX_BYTES)
        self._chat = ThreadPoolExecutor(CHAT_THREADS, "chat-template")
        self._short = ThreadPoolExecutor(SHORT_THREADS, "tokenize")
        self._long = ThreadPoolExecutor(LONG_THREADS, "tokenize-long")

    async def encode_chat(
        self,
        conversation: list[dict[str, str]],
        limit: ContextLimit,
        deadline: float,
        *,
        special_tokens: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation; other arguments and errors as of `encode`."""
        turn = {"add_generation_prompt": add_generation_prompt}
        with _abandoning() as abandoned:
            async with _until(deadline):
                rendered = await self._in_thread(
                    self._chat, partial(self._tokenizer.render, conversation, **turn)
                )
                rendered = replace(rendered, special_tokens=special_tokens)
                await self._refuse_too_long(rendered, limit, "messages", abandoned)
                prompt = await self._in_thread(
                    self._chat, partial(self._tokenizer.protect, conversation, rendered, **turn)
                )
                if prompt is not rendered:
                    await self._refuse_too_long(prompt, limit, "messages", abandoned)
                [ids] = await self._encode([prompt], "messages", abandoned)
                return ids

    async def encode(
        self,
        prompts: Sequence[str | list[int]],
        limit: ContextLimit,
        deadline: float,
        *,
        special_tokens: bool = True,
    ) -> list[list[int]]:
        """Token ids of each prompt; those that are token ids already stay as they are.

        `deadline` is on the running loop's clock.

        Raises:
            InvalidRequest: a text has more tokens than `limit`. One of at most SHORT_BYTES may be
                longer: it is for admission to refuse, which then knows its number of tokens.
            DeadlineExceeded: the deadline passed.
        """
        texts = [PromptText(text, special_tokens) for text in prompts if isinstance(text, str)]
        with _abandoning() as abandoned:
            async with _until(deadline):
                for text in texts:
                    await self._refuse_too_long(text, limit, "prompt", abandoned)
                encoded = iter(await self._encode(texts, "prompt", abandoned))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def run(self, work: Callable[[], Result], size: int, deadline: float) -> Result:
        """Other work of the tokenizer, on about `size` bytes of text, in a thread.

        Raises:
            DeadlineExceeded: the deadline passed.
        """
        async with _until(deadline):
            if size <= SHORT_BYTES:
                return await self._in_thread(self._short, work)
            held = await self._budget.acquire(size)
            return await self._in_thread(self._long, work, lambda: self._budget.release(held))

    async def _encode(
        self,
        texts: Sequence[PromptText],
        param: str,
        abandoned: threading.Event,
    ) -> list[list[int]]:
        if not texts:
            return []
        total = sum(_num_bytes(text.text, param) for text in texts)
        encode = partial(self._encode_all, texts, abandoned)
        if total <= INLINE_BYTES:
            return encode()
        if total <= SHORT_BYTES:
            return await self._in_thread(self._short, encode)
        held = await self._budget.acquire(total)
        return await self._in_thread(self._long, encode, lambda: self._budget.release(held))

    async def _refuse_too_long(
        self, text: PromptText, limit: ContextLimit, param: str, abandoned: threading.Event
    ) -> None:
        # No token is shorter than a byte.
        if _num_bytes(text.text, param) > max(limit.tokens, SHORT_BYTES):
            exceeds = partial(self._tokenizer.exceeds, text, limit.tokens, abandoned.is_set)
            if await self._in_thread(self._long, exceeds):
                raise too_long(limit, param)

    def _encode_all(
        self, texts: Sequence[PromptText], abandoned: threading.Event
    ) -> list[list[int]]:
        return [self._tokenizer.encode(text) for text in texts if not abandoned.is_set()]

    async def _in_thread(
        self,
        threads: ThreadPoolExecutor,
        function: Callable[[], Result],
        at_end: Callable[[], None] | None = None,
    ) -> Result:
        """Call in a thread. `at_end` is called on the loop once the thread is done with it, or will
        never begin, which may be after the caller has been cancelled."""
        future = threads.submit(function)
        if at_end is not None:
            loop = asyncio.get_running_loop()

            def ended(_: Future[Result]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                    loop.call_soon_threadsafe(at_end)

            future.add_done_callback(ended)
        return await asyncio.wrap_future(future)


def _num_bytes(text: str, param: str) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(
            "the prompt holds half of a surrogate pair, which is no character; remove it",
            param=param,
        ) from None


@contextlib.contextmanager
def _abandoning() -> Iterator[threading.Event]:
    """An event that is set when the block is left by an exception: threads look at it."""
    abandoned = threading.Event()
    try:
        yield abandoned
    except BaseException:
        abandoned.set()
        raise


@contextlib.asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded(
            "the request waited to be tokenized until its deadline; send it again later"
        ) from None

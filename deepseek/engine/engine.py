"""The step loop: requests in, one output per request and step out.

Not thread-safe and not asynchronous: one thread owns an engine and calls `step` while `has_work`
(serve_app/engines/embedded.py; `quant_jobs evaluate` calls `score`). Every accepted request ends in
exactly one output with a finish reason, also when it is aborted or a step fails; its KV pages are
free by then. Prompts and outputs are never logged.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from deepseek.artifact.stored_model import StoredModel
from deepseek.engine.arithmetic import Arithmetic
from deepseek.engine.detokenizer import Detokenizer, Tokenizer
from deepseek.engine.kv_cache import LatentCache, check_cache_format
from deepseek.engine.limits import RequestLimits
from deepseek.engine.logprob_names import LogprobNamer
from deepseek.engine.opening import Opened, open_checkpoint, open_directory, open_stored
from deepseek.engine.options import EngineIdentity, EngineLoad, EngineOptions
from deepseek.engine.pages import PagePool
from deepseek.engine.prefix import root_key
from deepseek.engine.request import (
    Choice,
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    StepOutput,
    TokenLogprob,
)
from deepseek.engine.runner import Runner, StepModel
from deepseek.engine.scheduler import Chunk, Scheduler
from deepseek.engine.tracked import Tracked
from deepseek.errors import DeployError, RequestError
from deepseek.kv_layout import kv_layout

LOG = logging.getLogger(__name__)


class LLMEngine:
    """One model, its cache, and the requests under way.

    `failure` is the last exception of a step, for health checks. `max_model_len` is the limit of
    prompt and completion together: at most `ModelConfig.dense_context`, because attention is dense;
    the size of the cache bounds it too. A text ends at any of `end_token_ids`, the config's by
    default.
    """

    def __init__(
        self,
        model: StepModel,
        identity: EngineIdentity,
        options: EngineOptions,
        *,
        tokenizer: Tokenizer | None = None,
        end_token_ids: frozenset[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = model.config
        self.identity = identity
        self.config = config
        self.tokenizer = tokenizer
        self._namer = LogprobNamer(tokenizer)
        self._end_token_ids = end_token_ids or frozenset(config.eos_token_ids)
        self.failure: Exception | None = None
        self._options = options
        self._clock = clock
        model_len = options.max_model_len or config.dense_context
        if model_len > config.dense_context:
            raise DeployError(f"max_model_len {model_len} exceeds {config.context_limit}; lower it")
        kv_tokens = options.max_kv_tokens or max(model_len, 1024 * options.max_batch_size)
        num_pages = -(-kv_tokens // identity.page_tokens)
        self._pool = PagePool(num_pages, identity.page_tokens)
        self.max_model_len = min(model_len, self._pool.capacity_tokens)
        layout = kv_layout(
            identity.arithmetic, check_cache_format(identity.kv_cache), sparse=config.has_indexer
        )
        cache = LatentCache(config, layout, num_pages, identity.page_tokens)
        self._runner = Runner(model, cache)
        self._limits = RequestLimits(
            max_model_len=self.max_model_len,
            vocab_size=config.vocab_size,
            has_tokenizer=tokenizer is not None,
            is_cut_to_dense=self.is_cut_to_dense,
        )
        self._scheduler = Scheduler(
            self._pool,
            max_batch_size=options.max_batch_size,
            max_batched_tokens=options.max_batched_tokens,
        )
        self._tracked: dict[str, Tracked] = {}
        self._finished: list[StepOutput] = []  # ends outside of a step, reported by the next
        self._poison()

    @classmethod
    def load(
        cls,
        engine_dir: Path | str,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> LLMEngine:
        """Open an engine directory that `build --target embedded` wrote.

        Raises:
            ArtifactError: it is incomplete or damaged.
            DeployError: the engine cannot run with these options.
        """
        options = options or EngineOptions()
        return cls._of(open_directory(Path(engine_dir), options), options, clock)

    @classmethod
    def from_checkpoint(
        cls,
        source_dir: Path | str,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> LLMEngine:
        """The unquantized model, packed in memory from its source checkpoint.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
        """
        options = options or EngineOptions()
        return cls._of(open_checkpoint(source_dir, options), options, clock)

    @classmethod
    def from_stored(
        cls,
        stored: StoredModel,
        *,
        arithmetic: Arithmetic,
        identity: EngineIdentity,
        options: EngineOptions | None = None,
        tokenizer: Tokenizer | None = None,
        end_token_ids: frozenset[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> LLMEngine:
        """A stored model, packed in memory and executed in `arithmetic`. `identity` says what it is
        and which KV format its pages have; the options' own are not looked at.

        Raises:
            ArtifactError: the stored model is damaged.
            DeployError: the engine has no kernel for a linear.
        """
        assert identity.arithmetic == arithmetic.name, identity.arithmetic
        options = options or EngineOptions()
        return cls(
            open_stored(stored, arithmetic, options),
            identity,
            options,
            tokenizer=tokenizer,
            end_token_ids=end_token_ids,
            clock=clock,
        )

    @classmethod
    def _of(cls, opened: Opened, options: EngineOptions, clock: Callable[[], float]) -> LLMEngine:
        return cls(
            opened.model,
            opened.identity,
            options,
            tokenizer=opened.tokenizer,
            end_token_ids=opened.end_token_ids,
            clock=clock,
        )

    @property
    def is_cut_to_dense(self) -> bool:
        """Whether `max_model_len` is what it is because attention is dense here, and sparse in the
        model beyond that context (DeepSeek-V3.2)."""
        return self.max_model_len == self.config.dense_context < self.config.max_position_embeddings

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return bool(self._tracked or self._finished)

    @property
    def num_preemptions(self) -> int:
        """Number of times that a sequence lost its pages to older ones, since the start."""
        return self._scheduler.num_preemptions

    def current_load(self) -> EngineLoad:
        pool, scheduler = self._pool, self._scheduler
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_tokens_used=(pool.num_pages - pool.num_free) * pool.page_tokens,
            kv_tokens_total=pool.capacity_tokens,
            kv_tokens_cached=pool.prefixes.num_idle * pool.page_tokens,
            cached_prompt_tokens=scheduler.num_cached_tokens,
            computed_prompt_tokens=scheduler.num_uncached_tokens,
        )

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes held, by inventory group and "kv_cache"; see `packed_layout.planned_bytes`."""
        runner = self._runner
        return runner.model.allocated_bytes | {"kv_cache": runner.cache.num_bytes}

    def add_request(self, request: Request) -> None:
        """Accept a request; from here on it ends in exactly one final output. One that its
        `output_ids` end already is not computed: the next step reports its end.

        Raises:
            RequestError: it can never be served, or its id is in use.
        """
        if request.request_id in self._tracked:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        self._limits.check(request)
        sampling = request.sampling
        seed = sampling.seed
        sequence = Sequence(
            request,
            arrived_s=self._clock(),
            seed=secrets.randbits(64) if seed is None else seed,
            prefix_root=self._prefix_root(request),
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, request.prompt_ids, sampling.stop)
        ends = frozenset(sampling.stop_token_ids)
        tracked = Tracked(
            sequence,
            detokenizer,
            end_token_ids=ends if sampling.ignore_eos else ends | self._end_token_ids,
            max_model_len=self.max_model_len,
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
        )
        reason = tracked.replay()
        self._tracked[request.request_id] = tracked
        self._scheduler.add(sequence)
        if reason is not None:
            self._finished.append(self._end(tracked, reason))

    def abort(self, request_id: str) -> bool:
        """End a request and free its pages now; the next step reports it. False if unknown."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return False
        self._finished.append(self._end(tracked, "abort"))
        self._poison()
        return True

    def step(self) -> list[StepOutput]:
        """Run one step and return an output for every request that got a token or ended."""
        outputs, self._finished = self._finished, []
        schedule = self._scheduler.schedule()
        if not schedule.chunks:
            return outputs
        started_s = self._clock()
        for chunk in schedule.chunks:
            if chunk.sequence.scheduled_s is None:
                chunk.sequence.scheduled_s = started_s
        try:
            choices, scores = self._runner.compute(schedule)
        except Exception as error:  # every failure ends its requests and shows in health checks
            LOG.exception("a step of %d tokens failed", schedule.num_tokens)
            self.failure = error
            reason = f"the engine failed in this step ({type(error).__name__})"
            outputs += [
                self._fail(chunk.sequence, reason, retryable=True) for chunk in schedule.chunks
            ]
            self._poison()
            return outputs
        self._scheduler.advance(schedule)
        for chunk, found in zip(schedule.chunks, scores, strict=True):
            choice = choices.get(chunk.sequence.request.request_id)
            if found is None or (choice is None and chunk.chooses):
                outputs.append(self._fail(chunk.sequence, "the model's output is not finite"))
                continue
            self._add_scores(chunk.sequence, found)
            if choice is not None:
                outputs.append(self._append(chunk.sequence, choice))
            elif chunk.completes:  # max_tokens 0
                outputs.append(self._end(self._tracked_of(chunk.sequence), "length"))
        self._poison()
        return outputs

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits f32 [T, V] after each of the tokens int64 [T], computed with the kernels, KV pages
        and KV format of generation, in chunks of `max_batched_tokens`. The pages are free again
        when it returns. It computes every token, whatever prefixes there are, and leaves none; but
        it may take the pages of some.

        Raises:
            RequestError: the text is empty or longer than the engine's limit, or running requests
                hold the pages that it needs.
        """
        tokens = token_ids.tolist()
        self._limits.check_tokens(tokens, "text")
        request = Request(
            request_id="score", prompt_ids=tuple(tokens), sampling=SamplingParams(max_tokens=1)
        )
        sequence = Sequence(request, arrived_s=self._clock())
        if self._pool.pages_for(len(tokens)) > self._pool.num_free:
            raise RequestError(
                f"{len(tokens)} tokens need {self._pool.pages_for(len(tokens))} KV pages, but only "
                f"{self._pool.num_free} are free; wait for the running requests"
            )
        try:
            new_pages = self._pool.grow(sequence, len(tokens))
            size = self._options.max_batched_tokens
            starts = range(0, len(tokens), size)
            chunks = [Chunk(sequence, s, min(size, len(tokens) - s)) for s in starts]
            return self._runner.score(chunks, new_pages)
        finally:
            self._pool.release(sequence)
            self._poison()

    def _add_scores(self, sequence: Sequence, scores: list[Choice]) -> None:
        """Keep the logprobs of the prompt's next tokens."""
        if scores:
            logprobs = self._tracked_of(sequence).prompt_logprobs
            assert logprobs is not None
            logprobs += self._namer.name_prompt(sequence, sequence.num_scored, scores)
            sequence.num_scored += len(scores)

    def _append(self, sequence: Sequence, choice: Choice) -> StepOutput:
        """Append the next token to a sequence; end the sequence at a limit or a stop."""
        tracked = self._tracked_of(sequence)
        if sequence.first_token_s is None:
            sequence.first_token_s = self._clock()
        reason, text = tracked.push(choice.token_id)
        logprobs = () if choice.logprob is None else (self._namer.name_last(sequence, choice),)
        if reason is not None:
            return self._end(tracked, reason, (choice.token_id,), text, logprobs)
        return tracked.output(self._clock(), None, (choice.token_id,), text, logprobs)

    def _fail(self, sequence: Sequence, error: str, *, retryable: bool = False) -> StepOutput:
        """End a request in an error. Output that is not finite is not retryable: the same weights
        compute the same elsewhere. What it has computed goes to nobody else."""
        self._pool.forget(sequence)
        return self._end(self._tracked_of(sequence), "error", error=error, retryable=retryable)

    def _tracked_of(self, sequence: Sequence) -> Tracked:
        return self._tracked[sequence.request.request_id]

    def _end(
        self,
        tracked: Tracked,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
        retryable: bool = False,
    ) -> StepOutput:
        """Remove a request, free its pages, and return its final output."""
        sequence = tracked.sequence
        self._scheduler.remove(sequence)
        del self._tracked[sequence.request.request_id]
        if reason == "abort" and tracked.detokenizer is not None:
            text = tracked.detokenizer.flush()
        return tracked.output(self._clock(), reason, token_ids, text, logprobs, error, retryable)

    def _prefix_root(self, request: Request) -> bytes | None:
        """None where the request computes all of its tokens, and for itself: a prompt's logprobs
        need all of its logits, and say of no token what another request has computed."""
        if not self._options.prefix_cache or request.sampling.prompt_logprobs is not None:
            return None
        digest = self.identity.engine_digest or self.identity.artifact_digest
        return root_key(request.cache_salt, digest, self.identity.kv_cache)

    def _poison(self) -> None:
        if self._options.poison_free_pages:
            self._runner.cache.poison(self._pool.blank_pages)

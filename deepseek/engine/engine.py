"""The step loop: requests in, one output per request and step out.

Not thread-safe and not asynchronous: one thread owns an engine and calls `step` while `has_work`
(serve_app/engines/embedded.py; `quant_jobs evaluate` calls `score`). Every accepted request ends in
exactly one output with a finish reason, also when it is aborted or a step fails; its KV pages are
free by then. Prompts and outputs are never logged.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek.artifact.engine_manifest import UNQUANTIZED
from deepseek.engine.batch import Span, make_batch
from deepseek.engine.detokenizer import (
    Detokenizer,
    Tokenizer,
    engine_tokenizer,
    load_tokenizer,
)
from deepseek.engine.kv_cache import LatentCache, check_cache_format
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.options import EngineIdentity, EngineLoad, EngineOptions
from deepseek.engine.packed import load_packed
from deepseek.engine.packing import pack_tensors, schemes_of
from deepseek.engine.pages import PagePool
from deepseek.engine.request import (
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    StepOutput,
    TokenLogprob,
)
from deepseek.engine.sampler import Choice, Draw, choose
from deepseek.engine.scheduler import Chunk, Schedule, Scheduler
from deepseek.errors import DeployError, RequestError
from deepseek.source.checkpoint import CheckpointReader
from deepseek.stop_tokens import FILE as GENERATION_FILE
from deepseek.stop_tokens import merge_stop_tokens, stop_token_ids

LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tracked:
    """A sequence and, where the engine has a tokenizer, the detokenizer of its text."""

    sequence: Sequence
    detokenizer: Detokenizer | None


class LLMEngine:
    """One model, its cache, and the requests under way.

    `failure` is the last exception of a step, for health checks. `max_model_len` is the limit of
    prompt and completion together: at most `ModelConfig.dense_context`, because attention is dense;
    the size of the cache bounds it too. A text ends at any of `end_token_ids`, the config's by
    default.
    """

    def __init__(
        self,
        model: Model,
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
        self._end_token_ids = end_token_ids or frozenset(config.eos_token_ids)
        self.failure: Exception | None = None
        self._options = options
        self._model = model
        self._clock = clock
        model_len = options.max_model_len or config.dense_context
        if model_len > config.dense_context:
            raise DeployError(f"max_model_len {model_len} exceeds {config.context_limit}; lower it")
        kv_tokens = options.max_kv_tokens or max(model_len, 1024 * options.max_batch_size)
        num_pages = -(-kv_tokens // identity.page_tokens)
        self._pool = PagePool(num_pages, identity.page_tokens)
        self.max_model_len = min(model_len, self._pool.capacity_tokens)
        self._cache = LatentCache(
            config, check_cache_format(identity.kv_cache), num_pages, identity.page_tokens
        )
        self._scheduler = Scheduler(
            self._pool,
            max_batch_size=options.max_batch_size,
            max_batched_tokens=options.max_batched_tokens,
        )
        self._tracked: dict[str, _Tracked] = {}
        self._finished: list[StepOutput] = []  # aborts, reported by the next step
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
        packed = load_packed(engine_dir)
        manifest = packed.manifest
        model = Model(packed.config, manifest.schemes, packed.tensors, _kernels(options))
        identity = EngineIdentity(
            recipe=manifest.recipe,
            artifact_digest=manifest.artifact_digest,
            engine_digest=manifest.digest,
            kv_cache=options.kv_cache or manifest.kv_cache,
            page_tokens=options.page_tokens or packed.fields.page_tokens,
        )
        directory, documents = Path(engine_dir), packed.documents
        return cls(
            model,
            identity,
            options,
            tokenizer=engine_tokenizer(directory, documents),
            end_token_ids=merge_stop_tokens(
                documents.get(GENERATION_FILE), directory / GENERATION_FILE, packed.config
            ),
            clock=clock,
        )

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
        source = CheckpointReader(source_dir)
        model = Model(source.config, schemes_of(source), pack_tensors(source), _kernels(options))
        identity = EngineIdentity(
            recipe=UNQUANTIZED,
            artifact_digest=source.fingerprint,
            engine_digest=None,
            kv_cache=options.kv_cache or "bf16",
            page_tokens=options.page_tokens or 16,
        )
        return cls(
            model,
            identity,
            options,
            tokenizer=load_tokenizer(source_dir),
            end_token_ids=stop_token_ids(source_dir, source.config),
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
        used = self._pool.num_pages - self._pool.num_free
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_tokens_used=used * self._pool.page_tokens,
            kv_tokens_total=self._pool.capacity_tokens,
        )

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes held, by inventory group and "kv_cache"; see `packed_layout.planned_bytes`."""
        return self._model.allocated_bytes | {"kv_cache": self._cache.num_bytes}

    def add_request(self, request: Request) -> None:
        """Accept a request; from here on it ends in exactly one final output.

        Raises:
            RequestError: it can never be served, or its id is in use.
        """
        self._check(request)
        seed = request.sampling.seed
        sequence = Sequence(
            request,
            arrived_s=self._clock(),
            seed=secrets.randbits(64) if seed is None else seed,
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, request.prompt_ids, request.sampling.stop)
        self._tracked[request.request_id] = _Tracked(sequence, detokenizer)
        self._scheduler.add(sequence)

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
        completing = [chunk for chunk in schedule.chunks if chunk.completes]
        try:
            choices = self._compute(schedule, completing)
        except Exception as error:  # every failure ends its requests and shows in health checks
            LOG.exception("a step of %d tokens failed", schedule.num_tokens)
            self.failure = error
            reason = f"the engine failed in this step ({type(error).__name__})"
            outputs += [self._fail(chunk.sequence, reason) for chunk in schedule.chunks]
            self._poison()
            return outputs
        self._scheduler.advance(schedule)
        for chunk, choice in zip(completing, choices, strict=True):
            if choice is None:
                outputs.append(self._fail(chunk.sequence, "the model's output is not finite"))
            else:
                outputs.append(self._append(chunk.sequence, choice))
        self._poison()
        return outputs

    def score(self, token_ids: Tensor) -> Tensor:
        """Logits f32 [T, V] after each of the tokens int64 [T], computed with the kernels, KV pages
        and KV format of generation, in chunks of `max_batched_tokens`. The pages are free again
        when it returns.

        Raises:
            RequestError: the text is empty or longer than the engine's limit, or running requests
                hold the pages that it needs.
        """
        tokens = token_ids.tolist()
        self._check_tokens(tokens, "text", limit=self.max_model_len)
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
            self._cache.clear(self._pool.grow(sequence, len(tokens)))
            size = self._options.max_batched_tokens
            starts = range(0, len(tokens), size)
            chunks = [Chunk(sequence, s, min(size, len(tokens) - s)) for s in starts]
            return torch.cat([self._forward([chunk], every_token=True) for chunk in chunks])
        finally:
            self._pool.release(sequence)
            self._poison()

    def _compute(self, schedule: Schedule, completing: list[Chunk]) -> list[Choice | None]:
        self._cache.clear(schedule.new_pages)
        logits = self._forward(schedule.chunks)
        draws = [
            Draw(chunk.sequence.request.sampling, chunk.sequence.seed, chunk.stop)
            for chunk in completing
        ]
        return choose(logits, draws)

    @torch.inference_mode()
    def _forward(self, chunks: list[Chunk], *, every_token: bool = False) -> Tensor:
        """Logits of every token, or of the last token of each chunk that completes its sequence."""
        spans = [
            Span(chunk.sequence.tokens(chunk.start, chunk.stop), chunk.start, chunk.sequence.pages)
            for chunk in chunks
        ]
        batch = make_batch(spans, self._pool.page_tokens)
        hidden = self._model.forward(batch, self._cache)
        if not every_token:
            pairs = zip(chunks, batch.last_rows, strict=True)
            rows = [row for chunk, row in pairs if chunk.completes]
            hidden = hidden.index_select(0, torch.tensor(rows, dtype=torch.int64))
        return self._model.logits(hidden)

    def _append(self, sequence: Sequence, choice: Choice) -> StepOutput:
        """Append the next token to a sequence; end the sequence at a limit or a stop."""
        tracked = self._tracked[sequence.request.request_id]
        if sequence.first_token_s is None:
            sequence.first_token_s = self._clock()
        sequence.output_ids.append(choice.token_id)
        logprobs = () if choice.logprob is None else (self._name_logprobs(choice),)
        reason = self._stop_reason(sequence, choice.token_id)
        is_end_token = reason == "stop"  # an end token has no text
        text, detokenizer = "", tracked.detokenizer
        if detokenizer is not None:
            text = "" if is_end_token else detokenizer.push(choice.token_id)
            if detokenizer.stopped:
                reason = "stop"
            elif reason is not None:
                text += detokenizer.flush()
                reason = "stop" if detokenizer.stopped else reason
        if reason is not None:
            return self._end(tracked, reason, (choice.token_id,), text, logprobs)
        return self._output(sequence, None, (choice.token_id,), text, logprobs)

    def _stop_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token_id in sampling.stop_token_ids:
            return "stop"
        if token_id in self._end_token_ids and not sampling.ignore_eos:
            return "stop"
        if len(sequence.output_ids) >= sampling.max_tokens:
            return "length"
        return "length" if sequence.num_tokens >= self.max_model_len else None

    def _fail(self, sequence: Sequence, error: str) -> StepOutput:
        return self._end(self._tracked[sequence.request.request_id], "error", error=error)

    def _end(
        self,
        tracked: _Tracked,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> StepOutput:
        """Remove a request, free its pages, and return its final output."""
        sequence = tracked.sequence
        self._scheduler.remove(sequence)
        del self._tracked[sequence.request.request_id]
        if reason == "abort" and tracked.detokenizer is not None:
            text = tracked.detokenizer.flush()
        return self._output(sequence, reason, token_ids, text, logprobs, error)

    def _output(
        self,
        sequence: Sequence,
        reason: FinishReason | None,
        token_ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        error: str | None = None,
    ) -> StepOutput:
        queue_s, prefill_s, decode_s = sequence.phases(self._clock())
        return StepOutput(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            prompt_tokens=len(sequence.request.prompt_ids),
            completion_tokens=len(sequence.output_ids),
            queue_s=queue_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            error=error,
        )

    def _name_logprobs(self, choice: Choice) -> TokenLogprob:
        assert choice.logprob is not None
        top = tuple((token, self._name(token), value) for token, value in choice.top)
        return TokenLogprob(choice.token_id, self._name(choice.token_id), choice.logprob, top)

    def _name(self, token_id: int) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def _check(self, request: Request) -> None:
        if request.request_id in self._tracked:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        self._check_tokens(request.prompt_ids, "prompt", limit=self.max_model_len - 1)
        if request.sampling.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which this engine has not")

    def _check_tokens(self, tokens: tuple[int, ...] | list[int], what: str, limit: int) -> None:
        if not tokens:
            raise RequestError(f"the {what} is empty; give at least one token")
        if len(tokens) > limit:
            raise RequestError(
                f"the {what} has {len(tokens)} tokens, but this engine takes at most {limit}"
                + (" (it has no sparse attention)" if self.is_cut_to_dense else "")
                + "; shorten it"
            )
        vocabulary = self.config.vocab_size
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise RequestError(f"the {what} holds a token id outside 0..{vocabulary - 1}")

    def _poison(self) -> None:
        if self._options.poison_free_pages:
            self._cache.poison(self._pool.free_pages)


def _kernels(options: EngineOptions) -> Kernels:
    all_but_one = max(1, len(os.sched_getaffinity(0)) - 1)
    torch.set_num_threads(options.num_threads or min(torch.get_num_threads(), all_but_one))
    kernels = Kernels.detect(batch_invariant=options.batch_invariant)
    if options.batch_invariant and not kernels.is_batch_invariant:
        LOG.warning("this CPU's GEMM is not batch invariant; tokens may depend on the batch")
    return kernels

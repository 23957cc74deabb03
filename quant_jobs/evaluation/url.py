"""Measures a running service over HTTP: the log-probabilities that it gives the held-out text.

Each block of the reference goes to `/v1/completions` as token ids, with `echo` and `logprobs`: the
service names its most likely tokens at every position and the probability of the one that follows.
Tokens are named by id (`return_tokens_as_token_ids`, as vLLM has it), because two tokens may have
one text. lumped.py compares them with the reference.

A block's answer is kept in OUTPUT/.served-FINGERPRINT until the whole text is done, so that a
killed run goes on where it was. The fingerprint covers the service's identity, the reference and
what is asked; a run of another service, text or reference starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepseek import untrusted
from deepseek.cli import make_progress
from deepseek.engine.request import MAX_LOGPROBS
from deepseek.errors import ServiceError
from deepseek.files import canonical_json, remove_scraps
from deepseek.outputs import make_directory
from deepseek.tensor_files import save_tensors
from deepseek.untrusted import UnusableFileError
from quant_jobs.evaluation.event_loop import together
from quant_jobs.evaluation.lumped import ServedBlock
from quant_jobs.evaluation.reference import Reference
from quant_jobs.evaluation.served import Identity
from quant_jobs.evaluation.service_client import RefusedError, ServiceClient

#: Tokens of the first request, which finds out what the service can do.
_PROBE_TOKENS = 8
_PARTIAL = ".served-"


@dataclass(frozen=True, slots=True)
class ServedText:
    """The answers for all blocks, and what the service says that it is."""

    identity: Identity
    blocks: tuple[ServedBlock, ...]


async def identify(client: ServiceClient, model: str | None) -> Identity:
    """Find the model in GET /v1/models (`model` None: the only one there), and what /health tells
    of it.

    Raises:
        ServiceError: there is no such model, or several and none was named.
    """
    listed = (await client.get("/v1/models")).get("data")
    cards = {
        card["id"]: card
        for card in (listed if isinstance(listed, list) else [])
        if isinstance(card, dict) and isinstance(card.get("id"), str)
    }
    names = ", ".join(untrusted.show_name(name) for name in list(cards)[:8]) or "none"
    if model is None and len(cards) != 1:
        raise ServiceError(f"{client.url} serves the models {names}; choose one with --model")
    name = next(iter(cards)) if model is None else model
    if name not in cards:
        raise ServiceError(
            f"{client.url} serves no model {untrusted.show_name(name)}, only {names}; correct "
            "--model"
        )
    facts: dict[str, Any] = {}
    with contextlib.suppress(ServiceError):  # another service may have none, or tell nothing
        facts = await client.get("/health")
    told = {"max_model_len": cards[name].get("max_model_len")} | facts
    kinds: dict[str, type] = {"gated": bool, "max_model_len": int}
    return Identity(
        model=name,
        **{
            field: told[field]
            for field in Identity.model_fields
            if field != "model" and type(told.get(field)) is kinds.get(field, str)
        },
    )


class Asker:
    """Asks one service for the log-probabilities of blocks."""

    def __init__(self, client: ServiceClient, identity: Identity, reference: Reference) -> None:
        self._client = client
        self._identity = identity
        self._reference = reference
        self._max_tokens = 0

    async def probe(self) -> None:
        """Ask for a few tokens, to learn whether the service generates none (`max_tokens` 0) or
        must generate one, and refuse what cannot be measured before anything is.

        Raises:
            ServiceError: the blocks are too long, or the service does not do what is asked.
        """
        self._check_length()
        ids = self._reference.ids[0][:_PROBE_TOKENS]
        try:
            await self.ask(ids)
        except RefusedError as error:
            if error.status not in (400, 422):
                raise
            self._max_tokens = 1
            self._check_length()
            await self.ask(ids)

    def _check_length(self) -> None:
        needed = self._reference.record.data.block_tokens + self._max_tokens
        limit = self._identity.max_model_len
        if limit is not None and limit < needed:
            raise ServiceError(
                f"{self._client.url} takes at most {limit} tokens, but a block of the reference "
                f"with what is generated after it has {needed}; start the service with a "
                "larger max_model_len, or make the reference with a smaller --block-tokens"
            )

    async def ask(self, ids_T: Tensor) -> ServedBlock:
        """What the service says about the tokens int64 [T].

        Raises:
            ServiceError: it refuses, or does not answer as vLLM does.
        """
        body = {
            "model": self._identity.model,
            "prompt": ids_T.tolist(),
            "max_tokens": self._max_tokens,
            "echo": True,
            "logprobs": MAX_LOGPROBS,
            "temperature": 0,
            "return_tokens_as_token_ids": True,
        }
        try:
            answer = await self._client.post("/v1/completions", body)
        except RefusedError as error:
            if error.status not in (400, 422):
                raise
            raise RefusedError(
                f"{self._client.url} refuses echo with logprobs of {len(ids_T)} token ids "
                f"({error.status}: {error.reason}); serve the model with IntServe or vLLM, with "
                "the reference's vocabulary and context",
                error.status,
                error.reason,
            ) from error
        try:
            return read_logprobs(answer, ids_T, self._reference.record.vocab_size)
        except UnusableFileError as error:
            raise ServiceError(f"{self._client.url} {error}") from error


def read_logprobs(answer: dict[str, Any], ids_T: Tensor, vocab_size: int) -> ServedBlock:
    """Read an answer to `echo` with `logprobs`: its first T tokens are the prompt's.

    Raises:
        UnusableFileError: it is something else; the sentence says what.
    """
    ids = ids_T.tolist()
    lists = _lists_of(answer, len(ids))
    tokens, values, tops = lists["tokens"], lists["token_logprobs"], lists["top_logprobs"]
    if not isinstance(tokens[0], str) or _token_id(tokens[0]) is None:
        raise UnusableFileError(
            f"names tokens by text ({untrusted.show(tokens[0])}), not as token_id:N: it does not "
            "know return_tokens_as_token_ids; serve the model with IntServe or vLLM"
        )
    if [_token_id(token) for token in tokens[: len(ids)]] != ids:
        raise UnusableFileError(
            "does not echo the token ids of the prompt: it has another vocabulary, or adds tokens; "
            "serve the reference's model"
        )
    rows: list[list[tuple[int, float]]] = []
    for position in range(1, len(ids)):
        following = _logprob(values[position])
        top = tops[position]
        if not isinstance(top, dict) or not top:
            raise UnusableFileError(
                f"names no alternatives at token {position} of the prompt; does it do echo with "
                "logprobs?"
            )
        named = {_known_id(token, vocab_size): _logprob(value) for token, value in top.items()}
        best = sorted(named.items(), key=lambda item: (-item[1], item[0]))[:MAX_LOGPROBS]
        row = [(ids[position], following)]
        rows.append(row + [item for item in best if item[0] != ids[position]])
    width = max(map(len, rows))
    padded = [row + [(-1, 0.0)] * (width - len(row)) for row in rows]
    return ServedBlock(
        next_logprob=torch.tensor([row[0][1] for row in rows], dtype=torch.float64),
        ids=torch.tensor([[token for token, _ in row] for row in padded]),
        logprobs=torch.tensor([[value for _, value in row] for row in padded]).double(),
    )


def _lists_of(answer: dict[str, Any], length: int) -> dict[str, list[Any]]:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    lists = {}
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        found = logprobs.get(name) if isinstance(logprobs, dict) else None
        if not isinstance(found, list) or not length <= len(found) <= length + 1:
            raise UnusableFileError(
                f"answers without the {length} {name} of the prompt: it does not do echo with "
                "logprobs; serve the model with IntServe or vLLM"
            )
        lists[name] = found
    return lists


def _token_id(token: Any) -> int | None:
    match = re.fullmatch(r"token_id:([0-9]{1,9})", token) if isinstance(token, str) else None
    return int(match[1]) if match else None


def _known_id(token: str, vocab_size: int) -> int:
    number = _token_id(token)
    if number is None or number >= vocab_size:
        raise UnusableFileError(
            f"names the token {untrusted.show(token)}, which is none of the reference's "
            f"{vocab_size}; serve a model of the same vocabulary"
        )
    return number


def _logprob(value: Any) -> float:
    if type(value) not in (int, float) or not -1e6 <= value <= 1e-3:
        raise UnusableFileError(
            f"gives {untrusted.show(value)} as the logarithm of a probability; see its log"
        )
    return float(value)


async def ask_blocks(
    asker: Asker, reference: Reference, partial: Path, concurrency: int
) -> tuple[ServedBlock, ...]:
    """All blocks, `concurrency` at a time, with a progress line; those in `partial` are not asked
    for again."""
    make_directory(partial)
    remove_scraps(partial)
    num_blocks, width = reference.record.data.num_blocks, reference.record.data.block_tokens - 1
    blocks = {
        index: found
        for index in range(num_blocks)
        if (found := _read_partial(_partial_file(partial, index), width)) is not None
    }
    waiting = iter([index for index in range(num_blocks) if index not in blocks])
    with make_progress() as progress:
        task = progress.add_task("evaluate", total=num_blocks, completed=len(blocks))

        async def work() -> None:
            for index in waiting:
                block = await asker.ask(reference.ids[index])
                _write_partial(_partial_file(partial, index), block)
                blocks[index] = block
                progress.advance(task)

        await together(work() for _ in range(concurrency))
    return tuple(blocks[index] for index in range(num_blocks))


async def measure_text(
    client: ServiceClient,
    reference: Reference,
    output: Path,
    *,
    model: str | None,
    concurrency: int,
) -> ServedText:
    """Everything that the service says about the reference's text.

    Raises:
        ServiceError: it cannot be reached, refuses, does not do echo with logprobs, or was
            exchanged for another while it was measured.
    """
    identity = await identify(client, model)
    asker = Asker(client, identity, reference)
    await asker.probe()
    partial = output / f"{_PARTIAL}{fingerprint(client.url, identity, reference)}"
    blocks = await ask_blocks(asker, reference, partial, concurrency)
    if (now := await identify(client, identity.model)) != identity:
        changed = [f for f in Identity.model_fields if getattr(now, f) != getattr(identity, f)]
        raise ServiceError(
            f"{client.url} changed while it was measured ({', '.join(changed)}); run the same "
            "command again"
        )
    return ServedText(identity, blocks)


def fingerprint(url: str, identity: Identity, reference: Reference) -> str:
    """16 hex digits that name what partial answers belong to. A service that tells its engine's
    digest may move to another address; of others the address is a part."""
    facts = {
        "format_version": 1,
        "url": None if identity.engine_digest else url,
        "identity": identity.model_dump(mode="json"),
        "reference": reference.record.digest,
        "logprobs": MAX_LOGPROBS,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def forget_partial(output: Path) -> None:
    """Delete the partial answers of all runs into this directory."""
    for path in output.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _partial_file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:06}.safetensors"


def _write_partial(path: Path, block: ServedBlock) -> None:
    tensors = {name: getattr(block, name) for name in ServedBlock.__slots__}
    save_tensors(path, tensors)


def _read_partial(path: Path, width: int) -> ServedBlock | None:
    """An answer that an earlier run kept; None where there is none or it is not whole."""
    try:
        tensors = load(untrusted.read_bytes(path, root=path.parent))
        block = ServedBlock(**tensors)
    except (UnusableFileError, SafetensorError, TypeError):
        return None
    sound = block.ids.dtype == torch.int64 and block.ids.shape == block.logprobs.shape
    sound &= block.ids.dim() == 2 and len(block.ids) == width
    sound &= block.next_logprob.shape == (width,)
    for values in (block.next_logprob, block.logprobs):
        sound = sound and values.dtype == torch.float64 and bool((values <= 1e-3).all())
    return block if sound else None

"""What the prefix cache saves: the second turn of a chat on the engine itself, without HTTP.

    python bench/prefix_reuse.py [--model examples/tiny-deepseek-v3] [--kv-cache bf16] [--rounds 5]

Prints three tables, in Markdown. TTFT is the time from `add_request` to the first token, of
requests that run alone.

1. By length of the first turn: TTFT of the second turn (prompt, answer and new words) with and
   without the cache. Both engines take each chat in turn; every round has chats of its own.
2. Chats of three turns, whose turns come in random order, by size of the cache: the share of
   prompt tokens that were found, when all chats fit and when they do not.
3. The same chats over two engines, each of which holds half of them: every chat on one engine
   (session affinity), or each turn on either at random, or without the cache.

The answers of all engines are compared; the command fails where one differs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli import make_app, make_progress, run
from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.engine.request import Request, SamplingParams
from deepseek.errors import ArtifactError

app = make_app(__doc__ or "")

#: New words of each turn, and tokens of each answer.
WORDS, ANSWER = 32, 32
TURNS = 3


@dataclass
class Figures:
    """Of some turns: seconds to their first tokens, and prompt tokens, found and in all."""

    ttft_s: list[float] = field(default_factory=list)
    cached: int = 0
    prompt: int = 0

    @property
    def row(self) -> str:
        """TTFT p50 and the longest in ms, and the share found."""
        longest, middle = max(self.ttft_s), statistics.median(self.ttft_s)
        return f"{1000 * middle:.1f} | {1000 * longest:.1f} | {self.cached / self.prompt:.0%}"


@dataclass
class Chat:
    """What was said so far, and what the user says next."""

    salt: str
    tokens: list[int]
    words: list[int]

    def turn(self, engine: LLMEngine, figures: Figures | None) -> None:
        """Ask, and take the answer. Without `figures` it is not counted."""
        prompt = [*self.tokens, *self.words[:WORDS]]
        self.words = self.words[WORDS:]
        sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
        request = Request(
            request_id="turn", prompt_ids=tuple(prompt), sampling=sampling, cache_salt=self.salt
        )
        answer: list[int] = []
        ttft_s, cached = 0.0, 0
        started_s = time.perf_counter()
        engine.add_request(request)
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise ArtifactError(f"the engine could not answer: {output.error}")
                if not answer:
                    ttft_s = time.perf_counter() - started_s
                answer += output.token_ids
                cached = output.cached_tokens
        if figures is not None:
            figures.ttft_s.append(ttft_s)
            figures.cached += cached
            figures.prompt += len(prompt)
        self.tokens = prompt + answer


class Texts:
    """Chats on pieces of the held-out text, each different from all others."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._count = 0

    def chat(self, first: int) -> Chat:
        """One whose first turn has `first` tokens, WORDS of which are its words."""
        self._count += 1
        needed = first + TURNS * WORDS
        start = self._count * 997 % (len(self._ids) - needed)
        piece = self._ids[start : start + needed]
        head = first - WORDS
        return Chat(str(self._count), piece[:head], piece[head:])


@app.command()
def main(
    model: Annotated[
        Path, typer.Option(help="a source checkpoint, or the directory of an embedded engine")
    ] = Path("examples/tiny-deepseek-v3"),
    text: Annotated[
        Path | None, typer.Option(help="what the chats say; default: heldout.txt in --model")
    ] = None,
    kv_cache: Annotated[str, typer.Option(help="KV format")] = "bf16",
    first: Annotated[
        list[int] | None, typer.Option(help="tokens of the first turn; repeatable")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    chats: Annotated[int, typer.Option(min=2, help="chats of tables 2 and 3")] = 12,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure and print the three tables."""
    opener = _opener(model, kv_cache, threads)
    content = (text or model / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise typer.BadParameter(f"{model} has no tokenizer.json")
    texts = Texts(tokenizer.encode(content).ids)
    lengths = first or [128, 512, 1024, 2048, 3072]
    with make_progress() as progress:
        task = progress.add_task("chats", total=len(lengths) * (rounds + 1) + 4 * chats + 3 * chats)

        def advance() -> None:
            progress.advance(task)

        by_length = [_second_turns(opener, texts, length, rounds, advance) for length in lengths]
        by_size = [
            (share, _turn_about(opener, texts, chats, share, advance))
            for share in (0.25, 0.5, 1.0, 2.0)
        ]
        by_routing = {
            name: _over_two(opener, texts, chats, name, advance)
            for name in ("affinity", "at random", "no cache")
        }
    _print_lengths(lengths, by_length, rounds)
    _print_sizes(by_size, chats)
    _print_routing(by_routing, chats)


Opener = Callable[[int, bool], LLMEngine]


def _opener(model: Path, kv_cache: str, threads: int) -> Opener:
    def open_engine(kv_tokens: int, prefix_cache: bool) -> LLMEngine:
        options = EngineOptions(
            kv_cache=kv_cache,
            max_kv_tokens=kv_tokens,
            num_threads=threads,
            prefix_cache=prefix_cache,
        )
        is_engine = (model / "engine.json").exists()
        return (LLMEngine.load if is_engine else LLMEngine.from_checkpoint)(model, options)

    return open_engine


def _same(chats: Sequence[Chat]) -> None:
    if any(chat.tokens != chats[0].tokens for chat in chats):
        raise SystemExit("an answer differs with the prefix cache, which is a bug")


def _copy(chat: Chat) -> Chat:
    return Chat(chat.salt, list(chat.tokens), list(chat.words))


def _second_turns(
    opener: Opener, texts: Texts, length: int, rounds: int, advance: Callable[[], None]
) -> tuple[Figures, Figures]:
    """Without and with the cache."""
    kv_tokens = 2 * (length + TURNS * (WORDS + ANSWER))
    engines = [opener(kv_tokens, False), opener(kv_tokens, True)]
    figures = (Figures(), Figures())
    for number in range(rounds + 1):  # the first one warms up
        begun = texts.chat(length)
        both = [begun, _copy(begun)]
        order = [0, 1] if number % 2 else [1, 0]
        for turn in range(2):
            for i in order:
                both[i].turn(engines[i], figures[i] if number and turn else None)
        _same(both)
        advance()
    return figures


def _turn_about(
    opener: Opener, texts: Texts, count: int, share: float, advance: Callable[[], None]
) -> Figures:
    """Chats whose turns come at random, in a cache for `share` of what all hold at their ends."""
    length = 256
    total = count * (length + (TURNS - 1) * WORDS + TURNS * ANSWER)
    least = length + TURNS * (WORDS + ANSWER)
    engine = opener(max(least, int(share * total)), True)
    chats = [texts.chat(length) for _ in range(count)]
    turns = [chat for chat in chats for _ in range(TURNS)]
    random.Random(0).shuffle(turns)
    figures = Figures()
    begun: set[str] = set()
    for chat in turns:
        chat.turn(engine, figures if chat.salt in begun else None)
        if chat.salt in begun:
            continue
        begun.add(chat.salt)
        advance()
    return figures


def _over_two(
    opener: Opener, texts: Texts, count: int, routing: str, advance: Callable[[], None]
) -> Figures:
    """Two engines, each with room for half of the chats' tokens and a little more."""
    length = 1024
    total = count * (length + (TURNS - 1) * WORDS + TURNS * ANSWER)
    engines = [opener(int(0.6 * total), routing != "no cache") for _ in range(2)]
    chats = [texts.chat(length) for _ in range(count)]
    chance = random.Random(0)
    figures = Figures()
    for turn in range(TURNS):
        for number, chat in enumerate(chats):
            place = chance.randrange(2) if routing == "at random" else number % 2
            chat.turn(engines[place], figures if turn else None)
    for _ in chats:
        advance()
    return figures


def _print_lengths(lengths: list[int], pairs: list[tuple[Figures, Figures]], rounds: int) -> None:
    print(f"Second turn of a chat, {rounds} rounds: TTFT in ms, prompt tokens found")
    print("| first turn | without: p50 | longest | found | with: p50 | longest | found | times |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for length, (without, with_cache) in zip(lengths, pairs, strict=True):
        ratio = statistics.median(without.ttft_s) / statistics.median(with_cache.ttft_s)
        print(f"| {length:,} | {without.row} | {with_cache.row} | {ratio:.1f} |")


def _print_sizes(by_size: list[tuple[float, Figures]], chats: int) -> None:
    print(f"\n{chats} chats, turns in random order, first turn 256 tokens; turns 2 and 3")
    print("| cache, of what all chats hold | TTFT p50 ms | longest | found |")
    print("|---:|---:|---:|---:|")
    for share, figures in by_size:
        print(f"| {share:.0%} | {figures.row} |")


def _print_routing(by_routing: dict[str, Figures], chats: int) -> None:
    print(f"\n{chats} chats over two engines, first turn 1,024 tokens; turns 2 and 3")
    print("| routing | TTFT p50 ms | longest | found |")
    print("|---|---:|---:|---:|")
    for routing, figures in by_routing.items():
        print(f"| {routing} | {figures.row} |")


if __name__ == "__main__":
    run(app)

"""Asks `tensorrt_llm` what its documents leave open. Run by the engine's own Python, with nothing
of ours on its path:

    python probe.py JOB.json ANSWERS.json

JOB has `directory`, `arguments` of the constructor, `prompt` (token ids), `end_id`, `sampling`
(what the worker sends, by name) and `question_s` (seconds for one question). ANSWERS is written
anew after every question, so that a hang shows which one. An answer that could not be had is
{"error": ...}.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

#: Tokens of an answer.
TOKENS = 6


class Probe:
    """The questions, each a coroutine that returns what can be written as JSON."""

    def __init__(self, job: dict[str, Any], package: Any, llm: Any) -> None:
        self.job = job
        self.package = package
        self.llm = llm
        self.prompt = list(job["prompt"])

    def ask(self, prompt: list[int] | None = None, *, salt: str = "probe", **given: Any) -> Any:
        """Start a greedy request that no token ends, unless `given` says otherwise."""
        sampling = {
            "max_tokens": TOKENS,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 0,
            "end_id": self.job["end_id"],
            "pad_id": self.job["end_id"],
            "ignore_eos": True,
            "detokenize": False,
        }
        return self.llm.generate_async(
            self.prompt if prompt is None else prompt,
            sampling_params=self.package.SamplingParams(**(sampling | given)),
            streaming=True,
            cache_salt=salt,
        )

    async def finish(self, **given: Any) -> Any:
        output = self.ask(**given)
        async for _ in output:
            pass
        return output

    async def members(self) -> Any:
        executor = getattr(self.llm, "_executor", None)
        accepted = inspect.signature(self.package.LLM.generate_async).parameters
        return {
            "generate_async": list(accepted),
            "present": {
                "LLM._check_health": hasattr(self.llm, "_check_health"),
                "LLM._executor.check_health": hasattr(executor, "check_health"),
                "LLM._executor._fatal_error": hasattr(executor, "_fatal_error"),
                "LLM.get_kv_cache_capacity": hasattr(self.llm, "get_kv_cache_capacity"),
                "LLM.get_stats_async": hasattr(self.llm, "get_stats_async"),
            },
            "request_error": hasattr(
                importlib.import_module(f"{self.package.__name__}.executor.utils"), "RequestError"
            ),
        }

    async def sampling(self) -> Any:
        """What the worker sends and SamplingParams does not take, each by itself."""
        refused = []
        for name, value in self.job["sampling"].items():
            try:
                self.package.SamplingParams(**{name: value})
            except Exception:
                refused.append(name)
        return {"refused": refused}

    async def steps(self) -> Any:
        counts, identities, kept = [], set(), None
        output = self.ask(max_tokens=24)
        async for item in output:
            kept = kept or item.outputs[0]
            identities.add(id(item))
            counts.append(len(item.outputs[0].token_ids))
        final = output.outputs[0]
        return {
            "counts": counts,
            "is_one_object": len(identities) == 1,
            "finish_reason": final.finish_reason,
            "text": final.text,
            "cached_tokens": getattr(output, "cached_tokens", None),
        }

    async def end_token(self) -> Any:
        """Whether the token that ends a text is in its token ids."""
        free = list((await self.finish()).outputs[0].token_ids)
        token = free[2]
        first = free.index(token)
        answers = {}
        for name, given in {
            "end_id": {"end_id": token, "ignore_eos": False},
            "stop_token_ids": {"stop_token_ids": [token], "include_stop_str_in_output": True},
        }.items():
            ended = (await self.finish(**given)).outputs[0]
            found = list(ended.token_ids)
            kind = "other"
            if found == free[: first + 1]:
                kind = "kept"
            elif found == free[:first]:
                kind = "left out"
            answers[name] = {"token": kind, "finish_reason": ended.finish_reason}
        return answers

    async def logprobs(self) -> Any:
        answers: dict[str, Any] = {}
        for count in (1, 0):
            try:
                output = (await self.finish(logprobs=count)).outputs[0]
            except Exception as error:
                answers[str(count)] = {"error": _words(error)}
                continue
            entries = list(output.logprobs or ())
            answers[str(count)] = {
                "entries": len(entries),
                "tokens": len(output.token_ids),
                "form": type(entries[0]).__name__ if entries else None,
                "holds_token": all(
                    not hasattr(entry, "keys") or token in entry
                    for entry, token in zip(entries, output.token_ids, strict=False)
                ),
            }
        return answers

    async def prompt_logprobs(self) -> Any:
        output = (await self.finish(prompt_logprobs=1)).outputs[0]
        entries = list(output.prompt_logprobs or ())
        named = entries[-len(self.prompt) + 1 :]
        return {
            "entries": len(entries),
            "prompt": len(self.prompt),
            "holds_tokens": bool(named)
            and all(
                hasattr(entry, "keys") and token in entry
                for entry, token in zip(named, self.prompt[1:], strict=False)
            ),
        }

    async def seed(self) -> Any:
        given = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
        drawn = [list((await self.finish(**given)).outputs[0].token_ids) for _ in range(2)]
        return {"same": drawn[0] == drawn[1]}

    async def statistics(self) -> Any:
        await self._drain()
        await self.finish()
        items, idle = await self._drain()
        told = [json.loads(item) if isinstance(item, (str, bytes)) else item for item in items]
        last = told[-1] if told else {}
        cache = last.get("kvCacheStats") or {}
        return {
            "items": len(items),
            "type": type(items[0]).__name__ if items else None,
            "idle": idle,
            "fields": sorted(last),
            "kv": sorted(cache),
            "tokens_per_block": cache.get("tokensPerBlock"),
        }

    async def blocks(self) -> Any:
        wanted = (self.job["arguments"].get("kv_cache_config") or {}).get("tokens_per_block")
        capacity = None
        if hasattr(self.llm, "get_kv_cache_capacity"):
            capacity = self.llm.get_kv_cache_capacity()
        return {
            "wanted": wanted,
            "arguments": getattr(self.llm.args.kv_cache_config, "tokens_per_block", None),
            "capacity": capacity,
        }

    async def reuse(self) -> Any:
        """Tokens of a prompt of several blocks that a second request finds, and one of another
        salt."""
        long = (self.prompt * (400 // len(self.prompt) + 1))[:400]
        found = []
        for salt in ("one", "one", "two"):
            found.append(getattr(await self.finish(prompt=long, salt=salt), "cached_tokens", None))
        return {"first": found[0], "again": found[1], "other_salt": found[2]}

    async def abort(self) -> Any:
        output = self.ask(max_tokens=200)
        await anext(output)
        began = time.monotonic()
        output.abort()
        async for _ in output:
            pass
        final = output.outputs[0]
        await asyncio.sleep(0.2)
        items, _ = await self._drain()
        told = [json.loads(item) if isinstance(item, (str, bytes)) else item for item in items]
        cache = (told[-1].get("kvCacheStats") or {}) if told else {}
        return {
            "finish_reason": final.finish_reason,
            "tokens": len(final.token_ids),
            "seconds": time.monotonic() - began,
            "used_blocks": cache.get("usedNumBlocks"),
        }

    async def ranks(self) -> Any:
        """Processes below this one that run for the engine, and the sessions they are in."""
        parents: dict[int, int] = {}
        for entry in os.listdir("/proc"):
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents[int(entry)] = int(fields[1])
            except (OSError, ValueError, IndexError):
                continue
        below = {os.getpid()}
        for _ in range(8):
            below |= {pid for pid, parent in parents.items() if parent in below}
        below.discard(os.getpid())
        own = os.getsid(0)
        return {
            "processes": len(below),
            "other_sessions": sum(os.getsid(pid) != own for pid in below),
        }

    async def metrics(self) -> Any:
        """Prometheus names of its collector, where it has one."""
        collector = importlib.import_module(f"{self.package.__name__}.metrics.collector")
        collector.MetricsCollector({"model_name": "m", "engine_type": "trtllm"})
        from prometheus_client import REGISTRY

        return {"names": sorted(family.name for family in REGISTRY.collect())}

    async def _drain(self) -> tuple[list[Any], str]:
        items: list[Any] = []
        try:
            async for item in self.llm.get_stats_async(timeout=0.3):
                items.append(item)
        except Exception as error:
            return items, type(error).__name__
        return items, "ends"


QUESTIONS = (
    *("members", "sampling", "ranks", "blocks", "steps", "end_token", "logprobs"),
    *("prompt_logprobs", "seed", "statistics", "reuse", "abort", "metrics"),
)


async def answer(probe: Probe, write: Callable[[str, Any], None]) -> None:
    """Ask everything, one after the other."""
    for name in QUESTIONS:
        question: Callable[[], Awaitable[Any]] = getattr(probe, name)
        try:
            write(name, await asyncio.wait_for(question(), probe.job["question_s"]))
        except Exception as error:
            write(name, {"error": _words(error)})


def main() -> None:
    job_file, answers_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    answers: dict[str, Any] = {}

    def write(name: str, value: Any) -> None:
        answers[name] = value
        draft = answers_file.with_suffix(".draft")
        draft.write_text(json.dumps(answers, default=repr))
        draft.replace(answers_file)

    began = time.monotonic()
    try:
        package = importlib.import_module("tensorrt_llm")
        write("version", str(package.__version__))
        llm = package.LLM(model=job["directory"], **job["arguments"])
    except Exception as error:
        causes = [error]
        while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
            causes.append(cause)
        write("load", {"error": "; ".join(map(_words, causes))})
        return
    write("load", {"seconds": time.monotonic() - began})
    asyncio.run(answer(Probe(job, package, llm), write))
    began = time.monotonic()
    llm.shutdown()
    write("shutdown", {"seconds": time.monotonic() - began})


def _words(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:400]}"


if __name__ == "__main__":  # MPI's ranks import this file again
    main()

"""What the probe's answers mean for the adapter: one verdict for each open question.

`held`: as the adapter expects, or in one of the forms that it takes. `failed`: the adapter cannot
work with that, or its answers would be wrong. `told`: it works either way; this is what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["held", "failed", "told", "skipped"]
#: Parameters of generate_async that the worker passes, and the one that it passes where it is.
PASSED = ("inputs", "sampling_params", "streaming", "cache_salt")
Answers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one step: what was asked, and what was seen. `number` is that of an open question in
    docs/tensorrt-llm.md."""

    step: str
    number: str
    outcome: Outcome
    seen: str
    seconds: float | None = None


Judge = Callable[[Any, Answers], tuple[Outcome, str]]


def judge(answers: Answers, version: str) -> list[Verdict]:
    """The verdicts of a prefix of layers. A question that the probe did not get to has failed."""
    found = answers.get("version")
    verdicts = [
        Verdict(
            "version",
            "",
            "held" if found == version else "failed",
            f"{found}, built for {version}" if found else "tensorrt_llm cannot be imported",
        )
    ]
    for step, number, name, decide in _STEPS:
        answer = answers.get(name)
        outcome: Outcome
        if answer is None:
            outcome, seen = ("failed", "no answer: it hung or ended here or before")
        elif "error" in answer:
            outcome, seen = ("told" if name in _OPTIONAL else "failed"), answer["error"]
        else:
            outcome, seen = decide(answer, answers)
        verdicts.append(Verdict(step, number, outcome, seen, (answer or {}).get("seconds")))
    return verdicts


def _load(answer: Any, _: Answers) -> tuple[Outcome, str]:
    return "held", "the first layers loaded"


def _members(answer: Any, _: Answers) -> tuple[Outcome, str]:
    missing = [name for name in PASSED if name not in answer["generate_async"]]
    absent = [name for name, there in answer["present"].items() if not there]
    if "LLM.get_stats_async" in absent or not answer["request_error"] or missing:
        wrong = [*missing, *absent, *([] if answer["request_error"] else ["RequestError"])]
        return "failed", f"missing: {', '.join(wrong)}"
    priority = "priority" if "priority" in answer["generate_async"] else "no priority"
    return "held", f"{priority}; absent: {', '.join(absent) or 'nothing'}"


def _sampling(answer: Any, _: Answers) -> tuple[Outcome, str]:
    if answer["refused"]:
        return "failed", f"SamplingParams refuses {', '.join(answer['refused'])}"
    return "held", "SamplingParams takes every name that the worker sends"


def _ranks(answer: Any, _: Answers) -> tuple[Outcome, str]:
    if answer["processes"] < 1:
        return "failed", "no process below this one: a rank that dies could not be seen"
    return "held", f"{answer['processes']} processes, {answer['other_sessions']} in other sessions"


def _blocks(answer: Any, answers: Answers) -> tuple[Outcome, str]:
    statistics = answers.get("statistics") or {}
    capacity = answer["capacity"] or {}
    sizes = {
        "statistics": statistics.get("tokens_per_block"),
        "capacity": capacity.get("tokensPerBlock") if isinstance(capacity, dict) else None,
        "arguments": answer["arguments"],
    }
    seen = ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
    real = sizes["statistics"] or sizes["capacity"]
    if real is None:
        return "told", f"wanted {answer['wanted']}; it does not say ({seen or 'nothing'})"
    return "held" if real == answer["wanted"] else "failed", f"wanted {answer['wanted']}; {seen}"


def _steps(answer: Any, _: Answers) -> tuple[Outcome, str]:
    counts = answer["counts"]
    seen = f"ids cumulative {counts}, ended {answer['finish_reason']}, text {answer['text']!r}"
    grows = counts == sorted(counts) and counts[-1] == 24
    return "held" if grows and answer["finish_reason"] == "length" else "failed", seen


def _end_token(answer: Any, _: Answers) -> tuple[Outcome, str]:
    seen = "; ".join(
        f"{name}: {ended['token']}, {ended['finish_reason']}" for name, ended in answer.items()
    )
    known = all(
        ended["token"] in ("kept", "left out") and ended["finish_reason"] in ("stop", None)
        for ended in answer.values()
    )
    return "held" if known else "failed", seen


def _logprobs(answer: Any, _: Answers) -> tuple[Outcome, str]:
    one, none = answer["1"], answer["0"]
    zero = none.get("error") or f"{none['entries']} entries"
    if "error" in one:
        return "failed", f"1: {one['error']}; 0: {zero}"
    whole = one["entries"] == one["tokens"] and one["holds_token"]
    return "held" if whole else "failed", f"1: {one['entries']} of {one['form']}; 0: {zero}"


def _prompt_logprobs(answer: Any, _: Answers) -> tuple[Outcome, str]:
    seen = f"{answer['entries']} entries for {answer['prompt']} tokens"
    fits = answer["entries"] in (answer["prompt"], answer["prompt"] - 1)
    if fits and answer["holds_tokens"]:
        return "held", seen
    return "failed", f"{seen}; they do not name the prompt's own tokens"


def _seed(answer: Any, _: Answers) -> tuple[Outcome, str]:
    return "told", "a seed repeats" if answer["same"] else "a seed does not repeat"


def _statistics(answer: Any, _: Answers) -> tuple[Outcome, str]:
    if not answer["items"]:
        return "told", f"none; idle: {answer['idle']}; the adapter counts by itself"
    seen = f"{answer['type']}; idle: {answer['idle']}; KV fields: {', '.join(answer['kv']) or '-'}"
    return "held" if answer["type"] in ("dict", "str") else "failed", seen


def _reuse(answer: Any, _: Answers) -> tuple[Outcome, str]:
    seen = f"again {answer['again']}, another salt {answer['other_salt']} of 400 tokens"
    if answer["other_salt"]:
        return "failed", f"{seen}: prefixes cross salts"
    return "held" if answer["again"] else "told", seen


def _abort(answer: Any, _: Answers) -> tuple[Outcome, str]:
    seen = f"ended {answer['finish_reason']} after {answer['seconds']:.2f} s and "
    seen += f"{answer['tokens']} tokens; used blocks {answer['used_blocks']}"
    ends = answer["tokens"] < 200 and answer["used_blocks"] in (0, None)
    return "held" if ends else "failed", seen


def _metrics(answer: Any, _: Answers) -> tuple[Outcome, str]:
    names = [name for name in answer["names"] if "trtllm" in name or "time_to_first" in name]
    return "told", ", ".join(names) or "none of those known"


def _shutdown(answer: Any, _: Answers) -> tuple[Outcome, str]:
    return "held" if answer["seconds"] < 10 else "told", f"returned in {answer['seconds']:.1f} s"


#: Step, open question, the probe's answer, its judge.
_STEPS: tuple[tuple[str, str, str, Judge], ...] = (
    ("a prefix of layers loads", "1", "load", _load),
    ("members", "", "members", _members),
    ("sampling parameters", "", "sampling", _sampling),
    ("rank processes", "10", "ranks", _ranks),
    ("tokens of a KV block", "5", "blocks", _blocks),
    ("streaming", "", "steps", _steps),
    ("the token that ends a text", "8", "end_token", _end_token),
    ("logprobs", "4", "logprobs", _logprobs),
    ("logprobs of a prompt", "9", "prompt_logprobs", _prompt_logprobs),
    ("a seed", "11", "seed", _seed),
    ("statistics", "6", "statistics", _statistics),
    ("prefixes and salts", "", "reuse", _reuse),
    ("an abort", "", "abort", _abort),
    ("names of metrics", "3", "metrics", _metrics),
    ("shutdown", "", "shutdown", _shutdown),
)
#: Questions that a version may answer with an error, and the adapter works all the same.
_OPTIONAL = ("prompt_logprobs", "metrics", "seed", "statistics")

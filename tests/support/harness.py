"""lm-evaluation-harness against the service, and the same tasks computed from an engine's logits.

The tasks are files that are written here, over texts of the example model: nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from support.engines import request, run, text
from support.environments import environment, run_checked
from support.served import Served
from transformers import PreTrainedTokenizerBase

from deepseek.engine.engine import LLMEngine

MAX_NEW_TOKENS, UNTIL = 24, "\n\n"
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [UNTIL],
            "max_gen_toks": MAX_NEW_TOKENS,
            "do_sample": False,
            "temperature": 0,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    },
}


def write_tasks(folder: Path, documents: dict[str, list[dict[str, Any]]]) -> None:
    """One YAML file and one file of documents for each task."""
    for name, rows in documents.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(data)}}
        source = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        task = {"task": name, **source, **TASKS[name]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@dataclass(frozen=True)
class Judged:
    """What the harness found: the metrics of each task, and what came back for each document."""

    metrics: dict[str, dict[str, Any]]
    responses: dict[str, list[list[Any]]]


def evaluate(
    served: Served, folder: Path, tasks: list[str], path: str, *options: str, **arguments: object
) -> Judged:
    """Run the tasks of `folder` against an endpoint as a user does; `arguments` are those of the
    harness's model, and the model's kind follows from `path`."""
    kind = "local-chat-completions" if "chat" in path else "local-completions"
    given = {"model": served.model, "base_url": f"{served.url}{path}", "max_retries": 1}
    joined = ",".join(f"{key}={value}" for key, value in {**given, **arguments}.items())
    output = folder / f"output-{'-'.join(tasks)}-{kind}"
    words = (
        *("-m", "lm_eval", "run", "--model", kind, "--model_args", joined),
        *("--include_path", folder, "--tasks", ",".join(tasks), *options),
        *("--output_path", output, "--log_samples"),
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    run_checked([environment("lm_eval"), "-I", *words], OPENAI_API_KEY=served.key, **offline)
    [results] = output.rglob("results_*.json")
    responses = {}
    for task in tasks:
        [samples] = output.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        responses[task] = [[response[0] for response in row["resps"]] for row in rows]
    return Judged(json.loads(results.read_text(encoding="utf-8"))["results"], responses)


@dataclass(frozen=True)
class Offline:
    """The same numbers without HTTP: an engine's `score`, and its greedy generation."""

    engine: LLMEngine
    tokenizer: PreTrainedTokenizerBase

    def loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """In nats, of the continuation after the context; and whether it is the greedy one."""
        ids = torch.tensor(context + continuation)
        logprobs_TV = self.engine.score(ids).log_softmax(-1)[len(context) - 1 : -1]
        targets = ids[len(context) :]
        chosen = logprobs_TV.gather(1, targets[:, None])[:, 0]
        return float(chosen.double().sum()), bool((logprobs_TV.argmax(-1) == targets).all())

    def choices(self, question: str, choices: list[str]) -> list[tuple[float, bool]]:
        """Of each choice after the question, with a BOS before it. White space at the question's
        end belongs to the choice. Where a token spans the two, the harness takes the question's own
        tokens, and of the whole what follows as many."""
        context = self.tokenizer(question.rstrip())["input_ids"]
        whole = [self.tokenizer(question + choice)["input_ids"] for choice in choices]
        return [self.loglikelihood(context, ids[len(context) :]) for ids in whole]

    def rolling(self, document: str, window: int) -> float:
        """Loglikelihood of a document in nats: windows of `window` predicted tokens, the first
        after a BOS, each later one after the token before it, the last with as much context as a
        window has room for."""
        tokens = self.tokenizer(document, add_special_tokens=False)["input_ids"]
        first = tokens[:window]
        total = self.loglikelihood([self.tokenizer.bos_token_id], first)[0]
        for start in range(window, len(tokens), window):
            end = min(start + window, len(tokens))
            total += self.loglikelihood(tokens[end - window - 1 : start], tokens[start:end])[0]
        return total

    def say(self, prompts: list[list[int]]) -> Iterator[str]:
        """The greedy continuation of each prompt."""
        stop = (UNTIL, str(self.tokenizer.eos_token))
        fields = {"stop": stop, "ignore_eos": False}
        requests = [request(str(n), ids, MAX_NEW_TOKENS, **fields) for n, ids in enumerate(prompts)]
        outputs = run(self.engine, requests)
        return (text(outputs[str(n)]) for n in range(len(prompts)))

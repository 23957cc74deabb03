"""lm-evaluation-harness over HTTP finds the scores that the engine's own logits give.

Multiple choice and rolling perplexity go through `echo` with logprobs, generation through both
endpoints. The engine that is compared runs in this process, with the kernels and the KV format of
the one that is served.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.harness import Judged, Offline, evaluate, write_tasks
from support.served import Served
from transformers import AutoTokenizer

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]

#: Largest differences: nats of a choice, the ratio of two perplexities.
MAX_NATS, MAX_RATIO = 1e-3, 1e-4
#: The harness's `max_length`, and the tokens that its rolling windows then predict.
MAX_LENGTH, WINDOW = 300, 298
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def documents(tiny_model: Path) -> dict[str, list[dict[str, Any]]]:
    """Twelve questions of four choices, three documents longer than a window, six prompts."""
    held_out = (tiny_model / "heldout.txt").read_text(encoding="utf-8")
    pieces = [held_out[n * 160 : (n + 1) * 160] for n in range(48)]
    choose = [
        {
            "question": piece[:120],
            "choices": [pieces[n + 12 * other][120:] for other in range(4)],
            "gold": 0,
        }
        for n, piece in enumerate(pieces[:12])
    ]
    roll = [{"text": held_out[n * 1800 : (n + 1) * 1800]} for n in range(3)]
    functions = ("json.dumps", "os.path.join", "shutil.copytree", "print", "re.match", "open")
    say = [
        {"question": f"What does {name} do?", "answer": "Return a string."} for name in functions
    ]
    return {"choose": choose, "roll": roll, "say": say}


@pytest.fixture(scope="module")
def offline(engine_dir: Path, tiny_model: Path) -> Offline:
    engine = LLMEngine.load(engine_dir, EngineOptions(kv_cache="bf16"))
    return Offline(engine, AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, documents: dict[str, list[dict[str, Any]]]
) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder, documents)
    return folder


@pytest.fixture(scope="module")
def judged(served: Served, folder: Path, tiny_model: Path) -> Judged:
    """Two tasks through completions, in batches, with a BOS before every prompt."""
    arguments = {"tokenizer": tiny_model, "add_bos_token": True}
    tasks = ["choose", "say"]
    return evaluate(served, folder, tasks, COMPLETIONS, "--batch_size", "4", **arguments)


def test_multiple_choice_scores_what_the_logits_say(
    judged: Judged, offline: Offline, documents: dict[str, list[dict[str, Any]]]
) -> None:
    expected = [offline.choices(d["question"], d["choices"]) for d in documents["choose"]]
    found = [
        [(float(value), greedy == "True") for value, greedy in responses]
        for responses in judged.responses["choose"]
    ]
    flat = [
        (ours, theirs)
        for row, other in zip(expected, found, strict=True)
        for ours, theirs in zip(row, other, strict=True)
    ]
    assert max(abs(ours[0] - theirs[0]) for ours, theirs in flat) < MAX_NATS
    assert [ours[1] for ours, _ in flat] == [theirs[1] for _, theirs in flat]
    right = [max(range(4), key=lambda n: row[n][0]) == 0 for row in expected]
    accuracy = sum(right) / len(right)
    assert 0 < accuracy < 1, "these documents cannot tell a wrong score from a right one"
    assert judged.metrics["choose"]["acc,none"] == accuracy


def test_completions_say_what_the_engine_says(
    judged: Judged, offline: Offline, documents: dict[str, list[dict[str, Any]]]
) -> None:
    prompts = [offline.tokenizer(d["question"])["input_ids"] for d in documents["say"]]
    assert [row[0] for row in judged.responses["say"]] == list(offline.say(prompts))


def test_rolling_perplexity_is_that_of_the_logits(
    served: Served,
    folder: Path,
    tiny_model: Path,
    offline: Offline,
    documents: dict[str, list[dict[str, Any]]],
) -> None:
    arguments = {"tokenizer": tiny_model, "max_length": MAX_LENGTH, "num_concurrent": 2}
    judged = evaluate(served, folder, ["roll"], COMPLETIONS, **arguments)
    texts = [document["text"] for document in documents["roll"]]
    expected = [offline.rolling(text, WINDOW) for text in texts]
    found = [float(row[0]) for row in judged.responses["roll"]]
    assert found == pytest.approx(expected, rel=MAX_RATIO)
    counts = {"byte": sum(len(t.encode()) for t in texts), "word": sum(map(num_words, texts))}
    for unit, number in counts.items():
        perplexity = math.exp(-sum(expected) / number)
        metric = judged.metrics["roll"][f"{unit}_perplexity,none"]
        assert metric == pytest.approx(perplexity, rel=MAX_RATIO), unit


def num_words(document: str) -> int:
    """As the harness counts them: what lies between runs of white space, the ends included."""
    words = document.split()
    return len(words) + document[0].isspace() + document[-1].isspace()


def test_chat_completions_say_what_the_engine_says(
    served: Served, folder: Path, offline: Offline, documents: dict[str, list[dict[str, Any]]]
) -> None:
    arguments = {"num_concurrent": 4, "eos_string": offline.tokenizer.eos_token}
    judged = evaluate(served, folder, ["say"], CHAT, "--apply_chat_template", **arguments)
    prompts = [
        offline.tokenizer.apply_chat_template(
            [{"role": "user", "content": document["question"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for document in documents["say"]
    ]
    assert [row[0] for row in judged.responses["say"]] == list(offline.say(prompts))

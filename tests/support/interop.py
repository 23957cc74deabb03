"""Artifacts of every built-in recipe for other projects' tools, what the embedded engine says with
them, and the records of what the tools made of them.

A record is written by a test with INTSERVE_RECORD=1 and compared by every other run: what was
loaded or refused must be the same, figures within `LARGER` of the recorded ones. There are two for
a tool: `tests/interop/records/TOOL.json` is of what the tool is given, the directory of
`build --target TOOL` or, where build refuses, the artifact; `TOOL-artifact.json` is of all
artifacts themselves.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.engines import request, run, tokens
from support.environments import INTEROP
from torch import Tensor
from transformers import AutoTokenizer

from deepseek.artifact.manifest import FORMAT_VERSION
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.errors import DeployError
from deepseek.recipe import builtin_recipes, load_recipe
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.quantize import run_quantize
from quant_jobs.targets.embedded import pack_engine

RECORDS = INTEROP / "records"
RECORD = os.environ.get("INTSERVE_RECORD") == "1"
RECIPES = tuple(builtin_recipes())
#: Held-out text in sequences of their own, and prompts behind it.
NUM_TEXTS, TEXT_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, NUM_GREEDY = 8, 256, 8, 48, 32
#: A divergence may be this many times the recorded one, or below `SMALL` nats; of eight greedy
#: continuations one more may leave the path, at a near tie.
LARGER, SMALL, MORE_DIFFERENT = 3.0, 2e-5, 1
#: The example model's MTP layer: the tools load it, if at all, as a model of its own.
MTP_LAYER = "model.layers.4."


@functools.cache
def calibrated_artifact(model: Path, recipe: str, base: Path) -> Path:
    """What `quantize` makes of a built-in recipe, from two blocks of the calibration text."""
    output = base / "calibrated" / recipe
    content = load_recipe(recipe)
    few = content.model_copy(
        update={"calibration": content.calibration.model_copy(update={"num_blocks": 2})}
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    run_quantize(model, few, model / "calibration.txt", output, 0, lambda _: None)
    return output


@functools.cache
def built(model: Path, recipe: str, target: str, base: Path) -> Path | None:
    """What `build --target` makes of that artifact for one GPU; None where it refuses."""
    ranks = None if target == "transformers" else 1
    output = base / f"built-{target}" / recipe
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_build(
            calibrated_artifact(model, recipe, base),
            target,
            output,
            BuildOptions(tp=ranks, workers=0),
        )
    except DeployError:
        return None
    return output


def checkpoints(model: Path, target: str, base: Path) -> dict[str, Path]:
    """Every artifact by its recipe's name, and every directory built for a target by "built "
    and the name."""
    found = {recipe: calibrated_artifact(model, recipe, base) for recipe in RECIPES}
    for recipe in RECIPES:
        directory = built(model, recipe, target, base)
        if directory is not None:
            found[f"built {recipe}"] = directory
    return found


@functools.cache
def held_out(model: Path, base: Path) -> Path:
    """A safetensors file: `text` int64 [B, T] and `prompts` int64 [P, L] of the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = (model / "heldout.txt").read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(tokenizer(read)["input_ids"])
    num_text = NUM_TEXTS * TEXT_TOKENS
    text = ids[:num_text].view(NUM_TEXTS, TEXT_TOKENS).clone()
    prompts = ids[num_text:][: NUM_PROMPTS * PROMPT_TOKENS].view(NUM_PROMPTS, -1).clone()
    save_file({"text": text, "prompts": prompts}, base / "held-out.safetensors")
    return base / "held-out.safetensors"


@functools.cache
def embedded_answers(model: Path, recipe: str, base: Path) -> dict[str, Tensor]:
    """`logits` f32 [B, T, V] and `greedy` int64 [P, G] of the embedded engine."""
    artifact = calibrated_artifact(model, recipe, base)
    engine_dir = base / "packed" / recipe
    pack_engine(ArtifactReader(artifact), engine_dir)
    engine = LLMEngine.load(engine_dir, EngineOptions(kv_cache="bf16"))
    given = load_file(held_out(model, base))
    logits = torch.stack([engine.score(text) for text in given["text"]])
    prompts = given["prompts"].tolist()
    outputs = run(engine, [request(str(n), row, NUM_GREEDY) for n, row in enumerate(prompts)])
    greedy = torch.tensor([tokens(outputs[str(n)]) for n in range(len(prompts))])
    return {"logits": logits, "greedy": greedy}


def continued(model: Path, base: Path) -> Path:
    """`held_out`, and of every recipe the embedded engine's greedy continuations [P, G]."""
    greedy = {recipe: embedded_answers(model, recipe, base)["greedy"] for recipe in RECIPES}
    path = base / "continued.safetensors"
    save_file(load_file(held_out(model, base)) | greedy, path)
    return path


def divergence(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    """Median and mean over tokens of the KL in nats from the tool's to the embedded engine's."""
    source, other = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (source.exp() * (source - other)).sum(-1).flatten()
    return kl.median().item(), kl.mean().item()


def judged(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """How a tool's answers differ from the embedded engine's, as a record says it."""
    median, mean = divergence(theirs["logits"], ours["logits"])
    same = (theirs["greedy"] == ours["greedy"]).all(-1)
    figures: dict[str, Any] = {
        "kl_median": median,
        "kl_mean": mean,
        "greedy_equal": int(same.sum()),
        "greedy_of": len(same),
    }
    if "served" in theirs:
        median, mean = divergence(theirs["served"], ours["logits"])
        figures |= {"bfloat16_kl_median": median, "bfloat16_kl_mean": mean}
    return figures


def answered(
    found: dict[str, dict[str, Any]], names: Iterable[str], folder: Path, model: Path, base: Path
) -> dict[str, dict[str, Any]]:
    """What was found of each checkpoint, in the order that the tool was given them, with `figures`
    of those that it answered with; the last word of a name is the recipe."""
    results = {}
    for number, name in enumerate(names):
        results[name] = found[name]
        answers = folder / f"{number}.safetensors"
        if answers.exists():
            theirs = load_file(answers)
            recipe = name.split()[-1]
            ours = embedded_answers(model, recipe, base)
            results[name] = found[name] | {"figures": judged(theirs, ours)}
    return results


def records_of(
    tool: str, version: str, found: Mapping[str, Any], *, package: str, test: str
) -> dict[str, Any]:
    """Both records of a tool, by file name without suffix; `test` is the name of the test file."""
    head = {
        "tool": tool,
        "version": version,
        "package": f"{package}=={version}",
        "test": f"tests/interop/{test}",
        "artifact_form": FORMAT_VERSION,
    }

    def of(name: str, form: str) -> dict[str, Any]:
        return outcome(found[name], form, found[name].get("figures", {}))

    artifacts = {recipe: of(recipe, "artifact") for recipe in RECIPES}
    given = {
        recipe: of(f"built {recipe}", "engine") if f"built {recipe}" in found else artifacts[recipe]
        for recipe in RECIPES
    }
    return {
        tool: head | {"recipes": given},
        f"{tool}-artifact": head | {"recipes": artifacts},
    }


def outcome(found: Mapping[str, Any], form: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """One recipe of a record. `form` is what was loaded: an artifact or an engine."""
    if "refused" in found:
        return {"input": form, "loaded": False, "refusal": found["refused"]}
    kept = {key: found[key] for key in ("parameters", "schemes", "unread", "wrong") if key in found}
    if "unread" in kept:
        kept["unread"] = [name for name in kept["unread"] if not name.startswith(MTP_LAYER)]
    return {"input": form, "loaded": True, **kept} | {
        key: float(f"{value:.2e}") if isinstance(value, float) else value
        for key, value in figures.items()
    }


def keep_or_compare(records: Mapping[str, Any]) -> list[str]:
    """Write the records with INTSERVE_RECORD=1; else what the fresh ones contradict in them, a
    sentence each."""
    return [
        f"{name}: {difference}"
        for name, fresh in records.items()
        for difference in _kept_or_different(name, fresh)
    ]


def _kept_or_different(name: str, fresh: Mapping[str, Any]) -> list[str]:
    path = RECORDS / f"{name}.json"
    if RECORD:
        path.write_text(json.dumps(fresh, indent=1) + "\n", encoding="utf-8")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    head = [
        f"{key} is {fresh[key]!r}, recorded {recorded.get(key)!r}"
        for key in fresh.keys() - {"recipes"}
        if fresh[key] != recorded.get(key)
    ]
    if fresh["recipes"].keys() != recorded["recipes"].keys():
        head.append(f"recipes {sorted(fresh['recipes'].keys() ^ recorded['recipes'].keys())}")
    return head + [
        f"{recipe}: {difference}"
        for recipe in sorted(fresh["recipes"].keys() & recorded["recipes"].keys())
        for difference in _differences(fresh["recipes"][recipe], recorded["recipes"][recipe])
    ]


def _differences(fresh: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    found = []
    for key in sorted(fresh.keys() | recorded.keys()):
        now, then = fresh.get(key), recorded.get(key)
        if now is None or then is None:
            agree = now == then
        elif "kl_" in key:
            agree = now <= max(LARGER * then, SMALL)
        elif key == "greedy_equal":
            agree = now >= then - MORE_DIFFERENT
        elif key == "refusal":  # of loaders with threads any of several reasons is the first
            agree = now.partition(":")[0] == then.partition(":")[0]
        else:
            agree = now == then
        if not agree:
            found.append(f"{key} is {now!r}, recorded {then!r}")
    return found

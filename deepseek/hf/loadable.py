"""What transformers cannot load of a model, and what it would make of an artifact as it is.

`problems` is for `build` and the planner: what no layout of ours makes it load. `artifact_problems`
is what `from_pretrained` on the quantized checkpoint itself refuses, or reads wrongly without an
error; a directory built with `--target transformers` has none of them. `notes` says what the built
directory computes otherwise than the artifact's recipe says. Executed with transformers 5.23.0 and
compressed-tensors 0.20 on a CPU. This file imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.hf.layout import TILE, Form, Stored
from deepseek.inventory import expert_of, is_within, linears
from deepseek.recipe import Scheme

#: Reasons that the planner's matrix gives too.
NO_INDEXER = "what its own model of DeepSeek-V3.2 reads of an indexer was not checked"
NO_KV = "it caches keys and values in the model's own type"
#: What becomes of a format in a built directory.
NO_INT8_INPUTS = "INT8 activations are not quantized: it computes with the weights' values alone"
NO_FP8_INPUTS = "FP8 activations are not quantized: it computes with the weights' values alone"
#: What an artifact's format becomes if it is loaded as it is.
AS_IS_W8A8 = (
    "transformers reads integers of routed experts from packed words only (torch.cat of no tensors)"
)
AS_IS_ZERO_POINTS = "transformers drops the zero points of routed experts and stops"
AS_IS_FP8_EXPERTS = (
    "transformers multiplies FP8 experts by their scales without spreading them over the tiles"
)
AS_IS_MIXED_EXPERTS = "transformers decodes all routed experts by the scheme of one config group"
AS_IS_MIXED_LINEARS = (
    "transformers decodes all linears but the routed experts by the scheme of one config group"
)
AS_IS_BF16_EXPERTS = "transformers takes BF16 experts for packed ones (torch.cat of no tensors)"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that transformers cannot load. `part` says what, `reason` why, `change` what would
    make it load, in the imperative; `evidence` as in the planner's matrix."""

    part: str
    reason: str
    change: str
    evidence: Literal["executed", "read", "inferred"] = "executed"

    def sentence(self) -> str:
        return f"transformers cannot load {self.part}: {self.reason}; {self.change}"


def check_loadable(config: ModelConfig, kv_cache: str) -> None:
    """Check that transformers can load a directory of ours of this model at all.

    Raises:
        DeployError: it cannot; the sentence names the first thing and what to change.
    """
    for problem in problems(config, kv_cache):
        raise DeployError(problem.sentence())


def problems(config: ModelConfig, kv_cache: str) -> Iterator[Problem]:
    """All that transformers cannot load, whatever the directory says."""
    if config.has_indexer:
        yield Problem("the indexer", NO_INDEXER, "use --target vllm or sglang", "inferred")
    if kv_cache != "bf16":
        yield Problem(f"a KV cache in {kv_cache}", NO_KV, "give --kv-cache bf16", "read")


def artifact_problems(config: ModelConfig, schemes: Mapping[str, Scheme]) -> Iterator[Problem]:
    """What `from_pretrained` cannot read, or would read wrongly, of the quantized checkpoint
    itself. `schemes` maps every linear to its scheme (no `source`)."""
    change = "build it with --target transformers"
    kept = {m: s for m, s in schemes.items() if is_within(m, config.num_hidden_layers)}
    experts = _formats(s for m, s in kept.items() if expert_of(m) is not None)
    others = _formats(s for m, s in kept.items() if expert_of(m) is None)
    for weights, _, activations in sorted(experts, key=str):
        label = f"routed experts in {weights}"
        if weights == "int8-block" or (weights == "int8" and activations == "int8"):
            yield Problem(f"{label} with INT8 activations", AS_IS_W8A8, change)
        elif weights.endswith("-asym"):
            yield Problem(label, AS_IS_ZERO_POINTS, change)
        elif weights == "fp8-block":
            yield Problem(label, AS_IS_FP8_EXPERTS, change)
        elif weights == "bf16" and {w for w, _, _ in others} - {"bf16", "fp8-block"}:
            yield Problem(label, AS_IS_BF16_EXPERTS, change)
    if len(experts) > 1:
        yield Problem(f"routed experts in {_list(experts)}", AS_IS_MIXED_EXPERTS, change)
    quantized = {each for each in others if each[0] != "bf16"}
    if len(quantized) > 1:
        yield Problem(f"linears in {_list(quantized)}", AS_IS_MIXED_LINEARS, change)


def notes(config: ModelConfig, schemes: Mapping[str, Scheme], stored: Stored) -> tuple[str, ...]:
    """What a built directory is or computes otherwise than the recipe says, one sentence each."""
    kept = {m: s for m, s in schemes.items() if m in stored.forms}
    activations = {scheme.activations for scheme in kept.values()}
    said: list[str] = []
    if "int8" in activations:
        said.append(f"transformers: {NO_INT8_INPUTS}")
    if "fp8" in activations:
        said.append(f"transformers: {NO_FP8_INPUTS}")
    if changed := _changed(kept, stored):
        said.append(f"stored in another form, with the same values: {changed}")
    rounded = sum(
        scheme.weights != "bf16" and stored.forms[module].kind == "bf16"
        for module, scheme in kept.items()
    )
    if rounded:
        partial = stored.method == "fp8" and _only_partial(config, kept, stored)
        why = (
            "their last FP8 tile is partial, and transformers infers the size of tiles"
            if partial
            else "transformers has no form that holds them"
        )
        said.append(f"{rounded} linears are dequantized and rounded to BF16 once: {why}")
    if any(_is_f32(form) for m, form in stored.forms.items() if expert_of(m) is not None):
        said.append(
            "transformers holds these experts in FP32, four bytes per weight, because their scales "
            "are FP32"
        )
    return tuple(said)


def _formats(schemes: Iterator[Scheme]) -> set[tuple[str, int | None, str]]:
    return {(s.weights, s.group_size, s.activations) for s in schemes}


def _list(formats: set[tuple[str, int | None, str]]) -> str:
    labels = {
        Scheme(weights=w, group_size=g, activations=a).label  # type: ignore[arg-type]
        for w, g, a in formats
    }
    return " and ".join(sorted(labels))


def _changed(schemes: Mapping[str, Scheme], stored: Stored) -> str:
    """Formats that are stored in another form with the same values, and in which."""
    found = {
        (scheme.label, form.label)
        for module, scheme in schemes.items()
        if (form := stored.forms[module]).kind == "packed" and not _is_artifacts(scheme, form)
    }
    return ", ".join(f"{label} as {form}" for label, form in sorted(found))


def _is_artifacts(scheme: Scheme, form: Form) -> bool:
    """Whether the tensors of a linear are those of the artifact."""
    if scheme.weights == "int8" and scheme.activations == "int8":
        return False
    bits = scheme.bits if scheme.is_quantized else 0
    same = (form.bits, form.group_size) == (bits, scheme.group_size)
    return same and form.zero_points == (not scheme.is_symmetric)


def _is_f32(form: Form) -> bool:
    return form.kind == "packed" and form.scales == "F32"


def _only_partial(config: ModelConfig, schemes: Mapping[str, Scheme], stored: Stored) -> bool:
    shapes = {
        spec.module: spec.shape
        for layer in range(config.num_hidden_layers)
        for spec in linears(config, layer)
    }
    return all(
        any(math.remainder(size, TILE) for size in shapes[module])
        for module, scheme in schemes.items()
        if scheme.weights != "bf16" and stored.forms[module].kind == "bf16"
    )

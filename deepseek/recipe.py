"""The recipe: how an artifact is to be quantized. Read strictly, resolved to a scheme per linear.

A recipe is YAML. Ordered rules map a pattern of module names to a weight format and an algorithm,
and the last match wins, so that one rule may concern a single layer. Then come the KV format, the
calibration settings, expert coverage and the gate's limits. Planner, quantizer, builder and server
all read it. The built-in recipes are the files `deepseek/recipes/*.yaml`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from deepseek.config import ModelConfig
from deepseek.errors import RecipeError
from deepseek.inventory import HEAD, TensorSpec, head_spec, linears
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import StrictModel, read_yaml_mapping

#: `source` keeps the format of the source: FP8 128x128 tiles for the release, else BF16.
WeightFormat = Literal[
    "source", "bf16", "fp8-block", "int8", "int8-asym", "int8-block", "int4", "int4-asym"
]
#: Activations entering the linear: none (weight-only), INT8 with one dynamic scale per token (per
#: token and 128 channels beside `int8-block`), or FP8 e4m3 with one static scale per tensor,
#: measured (`input_scale` of the artifact). A product of INT8 activations and INT8 or INT4 codes is
#: a sum of integers, which is what CPUs compute fastest.
ActivationFormat = Literal["none", "int8", "fp8"]
#: How a weight is rounded. `max` is round-to-nearest; the others read calibration statistics.
Algorithm = Literal["max", "smoothquant", "awq", "gptq"]
#: Limit of the range of a group or channel: its largest weight, a percentile of the magnitudes, or
#: the value with the least squared rounding error.
Clip = Literal["max", "percentile", "mse"]
KVFormat = Literal["bf16", "int8", "fp8"]

RECIPES = Path(__file__).resolve().parent / "recipes"

#: Most rules of a recipe; one for each role of each layer of DeepSeek-V3 are 500.
MAX_RULES = 1024
#: Longest pattern and most stars in it. Names of linears have about 40 characters.
MAX_MATCH_LENGTH, MAX_STARS = 256, 16


#: Activation format -> the weight formats with which a target multiplies it.
_ACTIVATIONS_NEED: dict[ActivationFormat, tuple[WeightFormat, ...]] = {
    "int8": ("int8", "int8-block", "int4", "int4-asym"),
    "fp8": ("int4",),
}
#: Setting -> the algorithm or clip that reads it.
_ONLY_FOR = {
    "smoothing": "smoothquant",
    "percentile": "percentile",
    "damping": "gptq",
    "act_order": "gptq",
}


class Scheme(StrictModel):
    """How one linear is stored and computed.

    `int8` and `int8-asym` have one scale (and zero point) per output channel; `int4` and
    `int4-asym` have one per output channel and group of `group_size` inputs; `fp8-block` and
    `int8-block` have one scale per 128x128 tile.

    `smoothing` is SmoothQuant's strength alpha. `percentile` is of the magnitudes of one group or
    channel. `damping` is GPTQ's, as a share of the Hessian's mean diagonal. With `act_order` GPTQ
    rounds the most active inputs first; groups and their scales stay those of the original order,
    so that no target needs an index of groups.
    """

    weights: WeightFormat
    group_size: int | None = None
    activations: ActivationFormat = "none"
    algorithm: Algorithm = "max"
    smoothing: float = Field(default=0.5, ge=0.0, le=1.0)
    clip: Clip = "max"
    percentile: float = Field(default=99.9, gt=50.0, le=100.0)
    damping: float = Field(default=0.01, gt=0.0, le=1.0)
    act_order: bool = False

    @model_validator(mode="after")
    def _check(self) -> Scheme:
        grouped = self.weights in ("int4", "int4-asym")
        if grouped and self.group_size not in (32, 64, 128):
            raise ValueError(f"weights {self.weights} need group_size 32, 64 or 128")
        if not grouped and self.group_size is not None:
            raise ValueError(f"group_size means nothing for weights {self.weights}; remove it")
        needed = _ACTIVATIONS_NEED.get(self.activations, (self.weights,))
        if self.weights not in needed:
            raise ValueError(
                f"activations {self.activations} need weights {' or '.join(needed)}, not "
                f"{self.weights}; no target computes that"
            )
        if self.weights == "int8-block" and self.activations != "int8":
            raise ValueError(
                "weights int8-block need activations int8, which is all that a target multiplies "
                "them with; add it, or use weights int8"
            )
        if self.weights == "int8-block" and self.algorithm == "awq":
            raise ValueError(
                "awq searches the range of one output channel at a time, and a tile of int8-block "
                "has 128 of them; use max, smoothquant or gptq"
            )
        if self.algorithm == "smoothquant" and self.activations != "int8":
            raise ValueError("algorithm smoothquant needs activations int8; use max")
        if not self.is_quantized and (self.algorithm != "max" or self.clip != "max"):
            what = self.algorithm if self.algorithm != "max" else f"clip {self.clip}"
            raise ValueError(f"{what} means nothing for weights {self.weights}; remove it")
        if self.algorithm == "awq" and self.clip != "max":
            raise ValueError(f"awq searches its own clipping; remove clip {self.clip}")
        for name, user in _ONLY_FOR.items():
            default = Scheme.model_fields[name].default
            if getattr(self, name) != default and user not in (self.algorithm, self.clip):
                raise ValueError(f"{name} means nothing without {user}; remove it")
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether IntServe itself quantizes this linear (rather than carrying it through)."""
        return self.weights in ("int8", "int8-asym", "int8-block", "int4", "int4-asym")

    @property
    def is_symmetric(self) -> bool:
        """Whether the codes have no zero point."""
        return not self.weights.endswith("-asym")

    @property
    def is_packed(self) -> bool:
        """Whether an artifact stores the codes as packed words: all but INT8 that meets INT8
        activations."""
        return self.is_quantized and (self.bits == 4 or self.activations == "none")

    @property
    def bits(self) -> int:
        """Width of a code of a quantized weight."""
        assert self.is_quantized, self.weights
        return 8 if self.weights.startswith("int8") else 4

    @property
    def label(self) -> str:
        """Short name for tables: `int4-g128`, `int4-g128-a8`, `int8-a8`, `int8-block-a8`,
        `int4-g128-afp8`, `source`."""
        group = f"-g{self.group_size}" if self.group_size else ""
        inputs = {"none": "", "int8": "-a8", "fp8": "-afp8"}[self.activations]
        return f"{self.weights}{group}{inputs}"


def source_scheme(config: ModelConfig) -> Scheme:
    """The scheme of every linear in the source checkpoint."""
    return Scheme(weights="fp8-block" if config.weight_block_size else "bf16")


#: Formats that the language model's head may have, `source` apart: a scale for each token of the
#: vocabulary, or for groups of it. No tile lies within a token.
_HEAD_FORMATS: tuple[WeightFormat, ...] = ("int8", "int4")


class Rule(Scheme):
    """A scheme for all linears whose module name matches `match` (a glob; `*` crosses dots).

    The language model's head, `lm_head`, is matched by its own name only, never by a star: it stays
    as the source has it unless a rule names it.
    """

    match: str = Field(min_length=1, max_length=MAX_MATCH_LENGTH)

    @field_validator("match")
    @classmethod
    def _check_match(cls, match: str) -> str:
        if match.count("*") > MAX_STARS:
            raise ValueError(f"a pattern may have at most {MAX_STARS} stars")
        return match

    @model_validator(mode="after")
    def _check_head(self) -> Rule:
        if self.match != HEAD or self.weights == "source":
            return self
        if self.weights not in _HEAD_FORMATS or self.activations == "fp8":
            raise ValueError(
                f"{HEAD} may have weights source, {' or '.join(_HEAD_FORMATS)}, with activations "
                f"none or int8, not {self.label}"
            )
        if self.algorithm not in ("max", "gptq"):
            raise ValueError(
                f"{self.algorithm} folds its scales into the tensor before a linear, which is not "
                f"done for {HEAD}; use max or gptq"
            )
        return self

    def matches(self, module: str) -> bool:
        """Whether this rule is about a linear, or about the head, by module name."""
        if module == HEAD:
            return self.match == HEAD
        return self._pattern.match(module) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return _compiled(self.match)

    @cached_property
    def scheme(self) -> Scheme:
        return Scheme.model_construct(**{k: getattr(self, k) for k in Scheme.model_fields})


class Calibration(StrictModel):
    """Calibration text is cut into blocks of `block_tokens`. Statistics are added in block order,
    so that they do not depend on which worker held a block."""

    num_blocks: int = Field(default=32, ge=1, le=1 << 16)
    block_tokens: int = Field(default=512, ge=16, le=163_840)  # DeepSeek-V3's longest context


class ExpertCoverage(StrictModel):
    """Which tokens the statistics of a routed expert are taken from; forwarding is always top-k.

    `topk`: the tokens that the router sends. `all`: every token. `shrink`: the tokens that the
    router sends, and `shrink_tokens` more that stand for the mean of the whole layer: H_e +
    shrink_tokens * H_layer per token. The fewer tokens an expert has, the more this pulls its
    statistics toward the layer's.

    An expert that the router sent fewer than `floor_tokens` is starved. It is reported and counts
    toward the gate's `max_starved_experts`; under `topk` it is rounded to nearest in place of AWQ
    or GPTQ, which the ledger counts.
    """

    policy: Literal["topk", "all", "shrink"] = "topk"
    floor_tokens: int = Field(default=16, ge=0, le=1 << 24)
    shrink_tokens: int = Field(default=64, ge=1, le=1 << 24)


class GateLimits(StrictModel):
    """Limits that a measured artifact must keep to be served. Every limit is inclusive."""

    max_perplexity_ratio: float = Field(ge=1.0)
    max_mean_kl: float = Field(gt=0.0, description="nats per token, source against quantized")
    min_top1: float = Field(ge=0.0, le=1.0)
    max_fallbacks: int = Field(default=0, ge=0, le=1 << 31)
    max_starved_experts: float = Field(default=0.25, ge=0.0, le=1.0)
    # Judged where the experts' inputs have static FP8 scales, one for all experts of a layer. One
    # expert far above the others is no loss by itself: a scale up to 64 times too large costs the
    # others nothing that can be measured (the table in quant_jobs/algorithms/input_scales.py). But
    # it stands on what one expert saw. DeepSeek-V3 has 116 such scales (58 layers, 2 inputs); a few
    # outliers are known of such models, more of them mean damaged weights or a text unlike
    # any that the model was made for.
    max_input_outliers: int = Field(default=8, ge=0, le=1 << 31)


class Recipe(StrictModel):
    """A whole recipe, as the YAML file gives it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    rules: tuple[Rule, ...] = Field(min_length=1, max_length=MAX_RULES)
    kv_cache: KVFormat = "bf16"
    calibration: Calibration = Calibration()
    expert_coverage: ExpertCoverage = ExpertCoverage()
    gate: GateLimits

    def scheme_for(self, spec: TensorSpec) -> Scheme:
        """The scheme of the last rule that matches the linear; `source` where none does.

        MTP layers and the indexer are always `source` (`TensorSpec.is_carried`).
        """
        if spec.is_carried:
            return _SOURCE
        module = spec.module
        return next((r.scheme for r in reversed(self.rules) if r.matches(module)), _SOURCE)

    def resolve(self, config: ModelConfig) -> dict[str, Scheme]:
        """Scheme of every linear by module name, with `source` replaced by the source's format.
        The head is among them where a rule quantizes it, as the last.

        Raises:
            RecipeError: a rule matches no linear that may be quantized, a group size does not
                divide an input width, or FP8 blocks are asked of a BF16 source.
        """
        as_source = source_scheme(config)
        schemes: dict[str, Scheme] = {}
        unmatched = {rule.match: rule for rule in self.rules}
        of_carried: set[str] = set()  # rules that match a linear that no rule may change
        for spec in _quantizable(config, config.num_layers_with_mtp):
            module = spec.module
            matched = [match for match, rule in unmatched.items() if rule.matches(module)]
            if spec.is_carried:
                of_carried |= set(matched)
            else:
                for match in matched:
                    del unmatched[match]
            scheme = self.scheme_for(spec)
            if scheme.weights == "source":
                if module == HEAD:
                    continue
                scheme = as_source
            if scheme.weights == "fp8-block" and as_source.weights != "fp8-block":
                raise RecipeError(
                    f"recipe {self.name!r}: {module} asks for fp8-block, but the source is BF16; "
                    "use weights: source"
                )
            if scheme.group_size and spec.shape[1] % scheme.group_size:
                raise RecipeError(
                    f"recipe {self.name!r}: group_size {scheme.group_size} does not divide the "
                    f"{spec.shape[1]} inputs of {module}"
                )
            schemes[module] = scheme
        if unmatched:
            match = next(iter(unmatched))
            what = "no linear of this model"
            if match in of_carried:
                what = "only linears of an MTP layer or an indexer, which stay as released"
            raise RecipeError(
                f"recipe {self.name!r}: rule match {match!r} matches {what}; correct or remove it"
            )
        return schemes

    def check_rules(self, config: ModelConfig) -> None:
        """Check that every rule decides the scheme of a linear, which a new recipe must: of an
        artifact that exists already, nobody asks it.

        Raises:
            RecipeError: later rules decide all that a rule matches; the sentence names them.
        """
        #: Rule that has decided nothing so far -> the later rules that decided what it matches.
        idle: dict[int, set[int]] = {index: set() for index in range(len(self.rules))}
        for spec in _quantizable(config, config.num_hidden_layers):
            module = spec.module
            matching = (
                i for i in reversed(range(len(self.rules))) if self.rules[i].matches(module)
            )
            deciding = next(matching, None)
            if deciding is None:
                continue
            idle.pop(deciding, None)
            for index in matching if idle else ():
                if index in idle:
                    idle[index].add(deciding)
        for index, deciding_rules in idle.items():
            if deciding_rules:
                later = sorted(deciding_rules)
                more = f" and {len(later) - 1} more" if len(later) > 1 else ""
                raise RecipeError(
                    f"recipe {self.name!r}: rule match {self.rules[index].match!r} decides "
                    f"nothing, because the later rule match {self.rules[later[-1]].match!r}{more} "
                    "wins wherever it matches; remove it, or move it after that one"
                )


_SOURCE = Scheme(weights="source")


def _quantizable(config: ModelConfig, layers: int) -> Iterator[TensorSpec]:
    """The linears of so many decoder layers, and the head."""
    for layer in range(layers):
        yield from linears(config, layer)
    yield head_spec(config)


@lru_cache(maxsize=1024)
def _compiled(glob: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob))


def builtin_recipes() -> list[str]:
    """Names that `--recipe` accepts besides the path of a file."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a built-in recipe by name, or a YAML file.

    Raises:
        RecipeError: no such recipe, not YAML, or an unknown or contradictory key, named.
    """
    known = builtin_recipes()
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if not os.path.exists(path):
        raise RecipeError(
            f"no recipe {name_or_path[:200]!r}; use a YAML file or one of {', '.join(known)}"
        )
    try:
        raw = read_yaml_mapping(path)
    except UnusableFileError as error:
        raise RecipeError(f"{path} {error}") from error
    return parse_recipe(raw, where=str(path))


def parse_recipe(raw: object, *, where: str) -> Recipe:
    """Validate a parsed recipe; `where` names it in the error.

    Raises:
        RecipeError: a key is unknown, or a value is wrong or contradicts another.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the recipe"
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: unknown key {place!r}; remove or correct it") from error
        raise RecipeError(f"{where}: {place}: {first['msg']}") from error

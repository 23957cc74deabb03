"""The compressed-tensors library and transformers read our artifacts as we do: the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import W4A8
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file
from support.family import NAMES, Name, family_config
from support.synthetic import V3_2, config_dict, quantize_plainly, write_checkpoint
from transformers import (
    CompressedTensorsConfig,
    DeepseekV3ForCausalLM,
    DeepseekV32ForCausalLM,
)
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

from deepseek.artifact.compressed_tensors import quantization_config
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file, layer_keys, pop_linear
from deepseek.config import ModelConfig
from deepseek.formats import decompress
from deepseek.inventory import head_spec, layer_tensors, linears, tensors
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, builtin_recipes, load_recipe, parse_recipe

RECIPES = (
    *("int8", "int8-weight-only", "int8-experts", "int8-block", "int4", "int4-all", "int4-asym"),
    *("int4-a8", "int8-head"),
)
#: Recipes whose FP8 blocks have a class as their last target.
WITH_A_CLASS = {"int4", "int8-experts", "w4a8"}
GATE = {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.1, "min_top1": 0.9}


def recipe_of(*rules: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {"name": "t", "description": "", "rules": list(rules), "gate": GATE}, where="test"
    )


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact per recipe of one random model."""
    root = tmp_path_factory.mktemp("oracle")
    write_checkpoint(root / "source")
    for name in RECIPES:
        quantize_plainly(root / "source", load_recipe(name), root / name)
    return root


def scheme_by_library(config: QuantizationConfig, module: str) -> QuantizationScheme | None:
    """The one group whose targets the library says match, unless ignored."""
    if any(match_name(module, entry) for entry in config.ignore or []):
        return None
    hits = [
        group
        for group in config.config_groups.values()
        if isinstance(group, QuantizationScheme)
        and any(match_name(module, target) for target in group.targets)
    ]
    assert len(hits) <= 1, module
    return hits[0] if hits else None


@pytest.mark.parametrize("name", RECIPES)
def test_the_library_accepts_the_config_without_changing_it(artifacts: Path, name: str) -> None:
    raw = json.loads((artifacts / name / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(raw)
    groups = raw["config_groups"]
    for key, group in parsed.config_groups.items():
        assert isinstance(group, QuantizationScheme)
        dumped = group.model_dump(mode="json")
        assert dumped["targets"] == groups[key]["targets"]
        assert dumped["format"] == groups[key]["format"]
        for part in ("weights", "input_activations"):
            given = groups[key][part]
            if given is not None:
                assert given.items() <= dumped[part].items(), (key, part)
    assert parsed.format == raw["format"]
    assert parsed.quantization_status == "compressed"
    wrapped = CompressedTensorsConfig.from_dict(raw)
    assert wrapped.is_quantization_compressed


@pytest.mark.parametrize("name", RECIPES)
def test_the_library_alone_decompresses_every_linear_to_our_weights(
    artifacts: Path, name: str
) -> None:
    """Bit for bit: with the scales as stored, up to the library's rounding of its result to the
    scale's own type; and exactly, when the scale is first widened to FP32."""
    raw = json.loads((artifacts / name / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    reader = ArtifactReader(artifacts / name)
    decompressed = 0
    for layer in layer_keys(reader.config):
        ours = reader.read_globals() if layer == "globals" else reader.read_layer(layer)
        theirs = load_file(artifacts / name / layer_file(layer))
        specs = [head_spec(reader.config)] if layer == "globals" else linears(reader.config, layer)
        for spec in specs:
            if spec.module not in reader.schemes:  # a head that the recipe does not name
                assert scheme_by_library(config, spec.module) is None
                continue
            scheme = scheme_by_library(config, spec.module)
            assert scheme is not None
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            expected = decompress(
                pop_linear(ours, spec.module, reader.schemes[spec.module]),
                reader.schemes[spec.module],
                (spec.shape[0], spec.shape[1]),
            )
            suffixes = compressor.compression_param_names(scheme)
            stored = {suffix: theirs.pop(f"{spec.module}.{suffix}") for suffix in suffixes}
            scale = stored["weight_scale"]
            as_stored = compressor.decompress(stored, scheme)["weight"]
            assert torch.equal(as_stored, expected.to(scale.dtype)), spec.module
            wide = compressor.decompress(stored | {"weight_scale": scale.float()}, scheme)
            assert torch.equal(wide["weight"], expected), spec.module
            decompressed += 1
        assert theirs.keys() == ours.keys(), "both leave the same tensors: norms, router, MTP head"
    assert decompressed == len(reader.schemes)


@pytest.mark.parametrize("name", ["int4", "int4-all", "int8-weight-only"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_loads_the_artifact_by_itself_into_our_weights(
    artifacts: Path, name: str
) -> None:
    """Fused experts included. Of compressed-tensors' formats, transformers 5.23 can only fuse
    experts from `pack-quantized` without zero points, hence three of the recipes."""
    model = DeepseekV3ForCausalLM.from_pretrained(
        artifacts / name,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    )
    loaded = dict(model.named_parameters())
    reader = ArtifactReader(artifacts / name)
    for layer in range(reader.config.num_hidden_layers):
        ours = reader.read_layer(layer)
        for spec in linears(reader.config, layer):
            scheme = reader.schemes[spec.module]
            shape = (spec.shape[0], spec.shape[1])
            expected = decompress(pop_linear(ours, spec.module, scheme), scheme, shape)
            if spec.expert is None:
                actual = loaded[spec.name]
            else:
                experts = f"model.layers.{layer}.mlp.experts"
                if spec.role == "down_proj":
                    actual = loaded[f"{experts}.down_proj"][spec.expert]
                else:
                    gate, up = loaded[f"{experts}.gate_up_proj"][spec.expert].chunk(2)
                    actual = gate if spec.role == "gate_proj" else up
            if scheme.weights == "int4":  # multiplied out in the scale's BF16 by the library
                expected = expected.bfloat16().float()
            assert torch.equal(actual, expected), spec.name


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_loads_an_artifact_of_v3_2_with_its_indexer(tmp_path: Path) -> None:
    """Where all linears outside the routed experts have one format: transformers 5.23 knows one
    scheme for them, so beside INT8 or INT4 everywhere it cannot read the indexer's FP8 tiles."""
    write_checkpoint(tmp_path / "source", **V3_2)
    quantize_plainly(tmp_path / "source", load_recipe("int4"), tmp_path / "int4")
    model = DeepseekV32ForCausalLM.from_pretrained(
        tmp_path / "int4",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    )
    loaded = dict(model.named_parameters())
    reader = ArtifactReader(tmp_path / "int4")
    for layer in range(reader.config.num_hidden_layers):
        ours = reader.read_layer(layer)
        for spec in layer_tensors(reader.config, layer):
            if not spec.is_indexer:
                continue
            expected = ours.get(spec.name)
            if spec.kind == "linear":
                scheme, shape = reader.schemes[spec.module], (spec.shape[0], spec.shape[1])
                expected = decompress(pop_linear(ours, spec.module, scheme), scheme, shape)
            assert expected is not None
            assert torch.equal(loaded[spec.name], expected.float()), spec.name


def test_int4_with_int8_inputs_is_the_scheme_that_the_library_calls_w4a8() -> None:
    """And a form that its packing compressor says it can hold."""
    recipe = recipe_of({"match": "*", "weights": "int4", "group_size": 128, "activations": "int8"})
    config = ModelConfig.from_dict(config_dict(fp8=False))
    raw = quantization_config(config, recipe.resolve(config))
    assert raw is not None
    (group,) = (
        group
        for group in QuantizationConfig.model_validate(raw).config_groups.values()
        if isinstance(group, QuantizationScheme)
    )
    assert {"weights": group.weights, "input_activations": group.input_activations} == W4A8
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    assert compressor.can_compress(torch.nn.Linear, group)
    assert group.format == raw["format"] == "pack-quantized"


@pytest.mark.parametrize("scheme", [{"weights": "int8"}, {"weights": "int4", "group_size": 32}])
def test_the_head_is_a_target_of_its_group_where_a_rule_names_it_and_ignored_elsewhere(
    scheme: dict[str, Any],
) -> None:
    config = ModelConfig.from_dict(config_dict(fp8=False))
    every = {"match": "*", "weights": "int8", "activations": "int8"}
    plain = quantization_config(config, recipe_of(every).resolve(config))
    headed = quantization_config(
        config, recipe_of(every, {"match": "lm_head"} | scheme).resolve(config)
    )
    assert plain is not None
    assert headed is not None
    assert "lm_head" in plain["ignore"]
    assert not [entry for entry in headed["ignore"] if "lm_head" in entry]
    parsed = QuantizationConfig.model_validate(headed)
    found = scheme_by_library(parsed, "lm_head")
    assert found is not None
    assert found.weights is not None
    assert found.weights.num_bits == (8 if scheme["weights"] == "int8" else 4)
    wrapped = CompressedTensorsConfig.from_dict(headed)
    assert get_experts_scheme(wrapped.quantization_config).input_activations is not None


def targets(quantization: dict[str, Any] | None) -> dict[str, list[str]]:
    assert quantization is not None
    return {group["format"]: group["targets"] for group in quantization["config_groups"].values()}


@pytest.fixture(scope="module")
def deepseek_v3_int4() -> dict[str, Any]:
    config = quantization_config(DEEPSEEK_V3, load_recipe("int4").resolve(DEEPSEEK_V3))
    assert config is not None
    return config


@pytest.mark.heavy
def test_deepseek_v3s_own_int4_config_is_short_enough_to_read(
    deepseek_v3_int4: dict[str, Any],
) -> None:
    assert targets(deepseek_v3_int4) == {
        "pack-quantized": [r"re:.*[.]layers[.](?!61[.])\d+[.]mlp[.]experts[.].*_proj$"],
        "float-quantized": [
            r"re:.*[.]layers[.](0|1|2|61)[.](self_attn|mlp)[.].*_proj\w*$",
            r"re:.*[.]self_attn[.].*_proj\w*$",
            r"re:.*[.]mlp[.]shared_.*_proj$",
            "Linear",
        ],
    }
    assert deepseek_v3_int4["format"] == "pack-quantized"


@pytest.mark.heavy
def test_the_library_puts_deepseek_v3s_modules_where_the_recipe_does(
    deepseek_v3_int4: dict[str, Any],
) -> None:
    config = QuantizationConfig.model_validate(deepseek_v3_int4)
    formats: dict[str, str | None] = {}
    for spec in tensors(DEEPSEEK_V3):
        if spec.layer in (None, 0, 2, 3, 17, 60, 61) and spec.expert in (None, 0, 255):
            scheme = scheme_by_library(config, spec.module)
            formats[spec.module] = scheme.format if scheme else None
    assert formats["model.layers.60.mlp.experts.255.down_proj"] == "pack-quantized"
    assert formats["model.layers.61.mlp.experts.255.down_proj"] == "float-quantized"
    assert formats["model.layers.17.mlp.shared_experts.down_proj"] == "float-quantized"
    assert formats["model.layers.2.mlp.down_proj"] == "float-quantized"
    assert formats["model.layers.17.self_attn.kv_a_proj_with_mqa"] == "float-quantized"
    for high in ("lm_head", "model.layers.17.mlp.gate", "model.layers.61.eh_proj"):
        assert formats[high] is None
    assert formats["model.layers.61.shared_head.head"] is None


@pytest.mark.parametrize(
    "rules",
    [
        [{"match": "*", "weights": "int8"}],
        [
            {"match": "*", "weights": "int8", "activations": "int8"},
            {"match": "*.q_b_proj", "weights": "int8"},
            {"match": "model.layers.1.*", "weights": "bf16"},
            {"match": "*.mlp.experts.*.down_proj", "weights": "int8"},
        ],
        [
            {"match": "*", "weights": "int4", "group_size": 64},
            {"match": "*.mlp.experts.3.*", "weights": "int4", "group_size": 32},
            {"match": "model.layers.3.mlp.experts.1.up_proj", "weights": "int8"},
            {"match": "*.shared_experts.gate_proj", "weights": "int4-asym", "group_size": 128},
            {"match": "model.layers.0.mlp.up_proj", "weights": "source"},
        ],
        [{"match": "*.experts.*.gate_proj", "weights": "int4", "group_size": 128}],
    ],
)
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("changes", [{}, V3_2], ids=["v3", "v3.2"])
def test_every_linear_falls_in_its_own_group_under_any_rules(
    rules: list[dict[str, Any]], fp8: bool, changes: dict[str, Any]
) -> None:
    config = ModelConfig.from_dict(config_dict(layers=5, experts=4, fp8=fp8, **changes))
    schemes = recipe_of(*rules).resolve(config)
    raw = quantization_config(config, schemes)
    assert raw is not None
    parsed = QuantizationConfig.model_validate(raw)
    bits = {"int8": 8, "fp8-block": 8, "int4": 4, "int4-asym": 4}
    for spec in tensors(config):
        scheme, parsed_scheme = schemes.get(spec.module), scheme_by_library(parsed, spec.module)
        if scheme is None or scheme.weights == "bf16":
            assert parsed_scheme is None, spec.module
            continue
        assert parsed_scheme is not None, spec.module
        assert parsed_scheme.weights is not None
        assert parsed_scheme.weights.num_bits == bits[scheme.weights], spec.module
        assert (parsed_scheme.weights.type == "float") == (scheme.weights == "fp8-block"), (
            spec.module
        )
        assert parsed_scheme.weights.symmetric == (scheme.weights != "int4-asym"), spec.module
        assert parsed_scheme.weights.group_size == scheme.group_size, spec.module
        if scheme.weights == "int8":
            assert (parsed_scheme.input_activations is not None) == (scheme.activations == "int8")


def test_an_indexer_is_in_the_fp8_group_and_its_head_weights_are_in_none() -> None:
    model = ModelConfig.from_dict(config_dict(layers=4, **V3_2))
    raw = quantization_config(model, load_recipe("int8").resolve(model))
    assert raw is not None
    assert targets(raw)["float-quantized"] == [
        r"re:.*[.]layers[.]4[.](self_attn|mlp)[.](?!indexer[.]).*_proj\w*$",
        r"re:.*[.]self_attn[.]indexer[.]w(k|q_b)$",
    ]
    assert r"re:.*[.]indexer[.]weights_proj$" in raw["ignore"]
    config = QuantizationConfig.model_validate(raw)
    for layer in range(5):
        prefix = f"model.layers.{layer}.self_attn"
        for name in ("indexer.wq_b", "indexer.wk"):
            scheme = scheme_by_library(config, f"{prefix}.{name}")
            assert scheme is not None
            assert scheme.format == "float-quantized"
        for name in ("indexer.weights_proj", "indexer.k_norm"):
            assert scheme_by_library(config, f"{prefix}.{name}") is None
        o_proj = scheme_by_library(config, f"{prefix}.o_proj")
        assert o_proj is not None
        assert o_proj.format == ("int-quantized" if layer < 4 else "float-quantized")


@pytest.mark.parametrize("recipe", builtin_recipes())
@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_recipe_of_kimi_and_moonlight_is_read_as_it_was_meant(
    name: Name, recipe: str
) -> None:
    config = family_config(name)
    schemes = load_recipe(recipe).resolve(config)
    raw = quantization_config(config, schemes)
    parsed = QuantizationConfig.model_validate(raw)
    for module, scheme in schemes.items():
        found = scheme_by_library(parsed, module)
        assert (found is None) == (scheme.weights == "bf16"), module
        if found is not None:
            assert found.weights is not None
            assert found.weights.group_size == scheme.group_size, module
            wanted = "float" if scheme.weights == "fp8-block" else "int"
            assert found.weights.type == wanted, module


def test_an_artifact_of_bf16_only_has_no_quantization_config() -> None:
    config = ModelConfig.from_dict(config_dict(fp8=False))
    schemes = recipe_of({"match": "*", "weights": "source"}).resolve(config)
    assert quantization_config(config, schemes) is None


def test_one_format_is_named_and_two_are_that_of_packed_experts_or_mixed_precision() -> None:
    config = ModelConfig.from_dict(config_dict(fp8=False, num_nextn_predict_layers=0))
    uniform = quantization_config(config, load_recipe("int8").resolve(config))
    assert uniform is not None
    assert uniform["format"] == "int-quantized"
    mixed = quantization_config(
        config,
        recipe_of(
            {"match": "*", "weights": "int8", "activations": "int8"},
            {"match": "*.experts.*", "weights": "int4", "group_size": 128},
        ).resolve(config),
    )
    assert mixed is not None
    assert mixed["format"] == "pack-quantized", "that of the routed experts, where they are packed"
    assert set(targets(mixed)) == {"int-quantized", "pack-quantized"}
    plain = quantization_config(
        config,
        recipe_of(
            {"match": "*", "weights": "int4", "group_size": 128},
            {"match": "*.experts.*", "weights": "int8", "activations": "int8"},
        ).resolve(config),
    )
    assert plain is not None
    assert plain["format"] == "mixed-precision", "routed experts are not packed"


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_a_class_is_a_target_only_where_transformers_finds_the_experts_before_it(
    recipe: str,
) -> None:
    """transformers asks which group is that of the routed experts: the first that has a pattern
    with the word, then the first that has a class among its targets, then the first."""
    config = ModelConfig.from_dict(config_dict(layers=4))
    schemes = load_recipe(recipe).resolve(config)
    older = QuantizationConfig.model_validate(quantization_config(config, schemes, form=2))
    newer = QuantizationConfig.model_validate(quantization_config(config, schemes))
    for found in (get_experts_scheme, get_dense_scheme):
        before, after = found(older), found(newer)
        assert (before.format, before.weights) == (after.format, after.weights)
    has_class = any("Linear" in group.targets for group in newer.config_groups.values())
    assert has_class == (recipe.removesuffix("-gptq").removesuffix("-awq") in WITH_A_CLASS)


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_older_forms_say_nothing_for_sglang(recipe: str) -> None:
    config = ModelConfig.from_dict(config_dict(layers=4))
    schemes = load_recipe(recipe).resolve(config)
    older, newer = (quantization_config(config, schemes, form=form) for form in (2, 3))
    assert older is not None
    assert newer is not None
    assert older["format"] == "mixed-precision"
    assert not any("Linear" in group["targets"] for group in older["config_groups"].values())
    for group in newer["config_groups"].values():
        group["targets"] = [target for target in group["targets"] if target != "Linear"]
    assert older | {"format": newer["format"]} == newer

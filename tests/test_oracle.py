"""A quantized checkpoint read without any of our code agrees with the embedded engine.

compressed-tensors decompresses every linear, transformers runs the result in FP32; the engine runs
its low-bit kernels on the same artifact. What may differ is stated per recipe: BF16 activations in
the INT4 and weight-only kernels, and INT8 or FP8 activations, which transformers does not apply,
for `int8` and `w4a8`. How the library rounds FP8 inputs is held against ours apart.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.utils import match_name
from safetensors.torch import load_file
from support.engines import make_artifact, make_engine
from support.family import NAMES, Name, family_model
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.formats import fake_quantize_fp8
from deepseek.recipe import Recipe, load_recipe
from quant_jobs.quantize import run_quantize
from quant_jobs.targets.embedded import pack_engine

#: Largest median and mean KL in nats per token, and largest relative error of the logits. The mean
#: is larger because a rounding can send a token to other experts; few tokens make up most of it.
TOLERANCE = {
    "int8": (1e-3, 5e-3, 0.05),
    "int8-weight-only": (1e-4, 5e-3, 0.03),
    "int8-asym": (1e-4, 5e-3, 0.03),
    "int4-all": (1e-4, 5e-3, 0.03),
    "int4-asym": (1e-4, 5e-3, 0.03),
    "w4a8": (1e-3, 5e-3, 0.05),
}
#: The same for artifacts of a calibrated job.
CALIBRATED = {
    "int4-all-gptq": TOLERANCE["int4-all"],
    "int4-all-awq": TOLERANCE["int4-all"],
    "w4a8": TOLERANCE["w4a8"],
}
#: The same for models of random weights, where roundings send more tokens to other experts, which
#: makes up most of the error of the logits. Measured: 1.2e-4, 2.3e-3, 0.072 at most.
FAMILY_TOLERANCE = (3e-4, 5e-3, 0.1)
NUM_TOKENS = 384


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="module")
def token_ids(tiny_model: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")[: 16 * NUM_TOKENS]
    return torch.tensor(tokenizer(text)["input_ids"][:NUM_TOKENS])


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", TOLERANCE)
def test_compressed_tensors_and_transformers_alone_give_the_engines_logits(
    recipe: str, tiny_model: Path, base: Path, token_ids: Tensor
) -> None:
    artifact = make_artifact(tiny_model, recipe, base)
    assert_agreement(
        artifact, make_engine(tiny_model, recipe, base), token_ids, TOLERANCE[recipe], recipe
    )


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["int8-weight-only", "int4-all"])
def test_so_do_kimi_and_moonlight(
    recipe: str, name: Name, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    source = family_model(name, base).directory
    ids = torch.randint(0, 96, (96,), generator=torch.Generator().manual_seed(6))
    artifact, engine = make_artifact(source, recipe, base), make_engine(source, recipe, base)
    assert_agreement(artifact, engine, ids, FAMILY_TOLERANCE, f"{name} {recipe}")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CALIBRATED)
def test_artifacts_of_calibrated_jobs_are_read_alike(
    recipe: str, tiny_model: Path, tmp_path: Path, token_ids: Tensor
) -> None:
    """GPTQ with activation order and without, AWQ with folded scales, measured FP8 scales."""
    content = load_recipe(recipe).model_dump(mode="json")
    for rule in content["rules"]:
        rule["act_order"] = rule["algorithm"] == "gptq" and recipe == "int4-all-gptq"
    content["calibration"] = {"num_blocks": 8, "block_tokens": 512}
    artifact = tmp_path / "artifact"
    tuned, text = Recipe.model_validate(content), tiny_model / "calibration.txt"
    run_quantize(tiny_model, tuned, text, artifact, 0, lambda _: None)
    pack_engine(ArtifactReader(artifact), tmp_path / "engine")
    assert_agreement(artifact, tmp_path / "engine", token_ids, CALIBRATED[recipe], recipe)


def test_the_library_rounds_static_fp8_inputs_as_the_engine_does(
    tiny_model: Path, base: Path
) -> None:
    """Scheme and scale as the artifact has them; values within, at and beyond the range."""
    artifact = make_artifact(tiny_model, "w4a8", base)
    raw = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    quantization = QuantizationConfig.model_validate(raw["quantization_config"])
    module = "model.layers.2.mlp.experts.7.down_proj"
    scheme = library_scheme(quantization, module)
    assert scheme is not None
    assert scheme.input_activations is not None
    stored: dict[str, Tensor] = {}
    for shard in artifact.glob("*layer-00002*.safetensors"):
        stored |= load_file(shard)
    scale = stored[f"{module}.input_scale"]
    x = 20 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[0, :3] = torch.tensor([0.0, 448 * scale.item(), -1e4])
    theirs = fake_quantize(
        x, scale, torch.zeros_like(scale), scheme.input_activations, global_scale=None
    )
    assert torch.equal(theirs, fake_quantize_fp8(x, scale))


def assert_agreement(
    artifact: Path,
    engine_dir: Path,
    token_ids: Tensor,
    tolerance: tuple[float, float, float],
    recipe: str,
) -> None:
    with torch.no_grad():
        expected = decompressed_model(artifact)(token_ids[None]).logits[0]
    found = LLMEngine.load(engine_dir, EngineOptions(kv_cache="bf16")).score(token_ids)

    source, other = expected.log_softmax(-1), found.log_softmax(-1)
    kl_T = (source.exp() * (source - other)).sum(-1)
    error = ((found - expected).norm() / expected.norm()).item()
    measured = (kl_T.median().item(), kl_T.mean().item(), error)
    within = [value <= limit for value, limit in zip(measured, tolerance, strict=True)]
    assert all(within), f"{recipe=} {measured=} {tolerance=}"


def decompressed_model(artifact: Path) -> DeepseekV3ForCausalLM:
    """transformers' model, every quantized weight decompressed by compressed-tensors."""
    raw = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    quantization = QuantizationConfig.model_validate(raw.pop("quantization_config"))
    raw.pop("torch_dtype", None)
    config = DeepseekV3Config(**raw)
    config._attn_implementation = config._experts_implementation = "eager"

    stored: dict[str, Tensor] = {}
    for shard in sorted(artifact.glob("*.safetensors")):
        stored |= load_file(shard)
    mtp = f"model.layers.{config.num_hidden_layers}."
    modules = {name.rpartition(".")[0] for name in stored if not name.startswith(mtp)}
    state: dict[str, Tensor] = {}
    for module in sorted(modules):
        local = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in stored.items()
            if name.rpartition(".")[0] == module
        }
        scheme = library_scheme(quantization, module)
        if scheme is not None:
            local = BaseCompressor.get_value_from_registry(scheme.format).decompress(local, scheme)
            local = {"weight": local["weight"]}
        state |= {f"{module}.{suffix}": tensor.float() for suffix, tensor in local.items()}

    model = DeepseekV3ForCausalLM(config).float().eval()
    model.load_state_dict(stack_experts(state, config), strict=True)
    return model


def library_scheme(quantization: QuantizationConfig, module: str) -> QuantizationScheme | None:
    """The group whose targets the library itself matches to this module's name."""
    if any(match_name(module, pattern) for pattern in quantization.ignore):
        return None
    for group in quantization.config_groups.values():
        assert isinstance(group, QuantizationScheme)
        if any(match_name(module, target) for target in group.targets):
            return group
    return None


def stack_experts(state: dict[str, Tensor], config: DeepseekV3Config) -> dict[str, Tensor]:
    """Per-expert weights -> transformers 5's fused 3-D tensors."""
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"

        def stack(role: str, prefix: str = prefix) -> Tensor:
            count = config.n_routed_experts
            return torch.stack([state.pop(f"{prefix}.{e}.{role}.weight") for e in range(count)])

        state[f"{prefix}.gate_up_proj"] = torch.cat((stack("gate_proj"), stack("up_proj")), dim=1)
        state[f"{prefix}.down_proj"] = stack("down_proj")
    return state

"""The forward pass of a layer in two halves equals transformers' bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.engine_reference import reference_model
from support.family import NAMES, Name, family_model
from support.synthetic import V3_2, write_checkpoint
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
)
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32DecoderLayer

from deepseek.config import ModelConfig
from deepseek.formats import RoundInput, input_rounding
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.calibration.forward import (
    ExpertOutputs,
    LazyLinear,
    Rotary,
    Routed,
    Trunk,
    run_expert,
    to_hf_config,
    tokens_of,
)

ROLES = ("gate_proj", "up_proj", "down_proj")
W8A8 = Scheme(weights="int8", activations="int8")
W4A8 = Scheme(weights="int4", group_size=128, activations="fp8")
#: Two static input scales: one that clips and one that does not.
FP8_SCALES = (torch.tensor([0.002]), torch.tensor([0.05]))


@pytest.fixture(scope="module")
def reader(tiny_model: Path) -> CheckpointReader:
    return CheckpointReader(tiny_model)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """As in workers: with more threads a product may be split, and rounded, differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights_of(reader: CheckpointReader, layer: int) -> dict[str, Tensor]:
    return {name: tensor.dequantize() for name, tensor in reader.read_layer(layer).items()}


def trunk_of(
    config: ModelConfig,
    layer: int,
    weights: Mapping[str, Tensor],
    prepare: Mapping[str, RoundInput] | None = None,
) -> Trunk:
    roles = ("proj", "proj_with_mqa")
    high = {
        name: tensor
        for name, tensor in weights.items()
        if ".mlp.experts." not in name and not name.removesuffix(".weight").endswith(roles)
    }
    return Trunk(config, layer, high, lambda module: weights[f"{module}.weight"], prepare)


def expert_of(weights: Mapping[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return {role: weights[f"{prefix}.{role}.weight"] for role in ROLES}


def run_experts(
    routed: Routed,
    layer: int,
    weights: Mapping[str, Tensor],
    experts: list[int],
    prepare: Mapping[str, RoundInput] | None = None,
) -> ExpertOutputs:
    """The outputs of a worker that owns these experts."""
    outputs = {}
    for expert in experts:
        rows = run_expert(routed, expert, expert_of(weights, layer, expert), prepare or {})
        if rows is not None:
            outputs[expert] = rows
    return ExpertOutputs(outputs)


def run_layer(
    reader: CheckpointReader, layer: int, weights: Mapping[str, Tensor], x_TD: Tensor
) -> Tensor:
    config = reader.config
    trunk = trunk_of(config, layer, weights)
    h_TD, routed = trunk.attend(Rotary(config), x_TD)
    if not trunk.is_moe:
        return trunk.combine(h_TD, routed, [])
    all_experts = list(range(config.n_routed_experts))
    return trunk.combine(h_TD, routed, [run_experts(routed, layer, weights, all_experts)])


def fused(weights: Mapping[str, Tensor], config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The weights under transformers 5's names: experts fused into two 3-D parameters."""
    state = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    if config.is_moe(layer):
        experts = [expert_of(weights, layer, e) for e in range(config.n_routed_experts)]
        prefix = f"model.layers.{layer}.mlp.experts"
        state[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat([expert["gate_proj"], expert["up_proj"]]) for expert in experts]
        )
        state[f"{prefix}.down_proj"] = torch.stack([expert["down_proj"] for expert in experts])
    return state


def theirs(
    config: ModelConfig, layer: int, weights: Mapping[str, Tensor]
) -> DeepseekV3DecoderLayer:
    """transformers' whole decoder layer with its eager experts."""
    hf = to_hf_config(config)
    hf._experts_implementation = "eager"
    module = DeepseekV3DecoderLayer(hf, layer).eval()
    prefix = f"model.layers.{layer}."
    local = {n.removeprefix(prefix): t for n, t in fused(weights, config, layer).items()}
    module.load_state_dict(local, strict=True)
    return module.requires_grad_(False)


def run_theirs(module: nn.Module, config: ModelConfig, x_TD: Tensor) -> Tensor:
    out = module(
        x_TD[None],
        attention_mask=None,
        position_embeddings=Rotary(config).table(len(x_TD), x_TD.device),
    )
    assert isinstance(out, Tensor)
    return out[0]


def an_input(config: ModelConfig, num_tokens: int = 96, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, config.hidden_size, generator=generator)


@pytest.mark.parametrize("num_tokens", [1, 7, 96])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_attend_experts_combine_equal_transformers_layer_to_the_bit(
    reader: CheckpointReader, layer: int, num_tokens: int
) -> None:
    config, weights = reader.config, weights_of(reader, layer)
    assert config.is_moe(layer) == (layer > 0)
    x_TD = an_input(config, num_tokens)
    actual = run_layer(reader, layer, weights, x_TD)
    expected = run_theirs(theirs(config, layer, weights), config, x_TD)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, x_TD)


@pytest.mark.parametrize("layer", [0, 1])
def test_within_index_topk_a_layer_is_transformers_deepseek_v3_2_layer(
    tmp_path: Path, layer: int
) -> None:
    """With its indexer, which chooses every token of a block of 64. An explicit causal mask sums in
    another order than none, hence the tolerance."""
    write_checkpoint(tmp_path, **V3_2)
    reader = CheckpointReader(tmp_path)
    config, weights = reader.config, weights_of(reader, layer)
    with_indexer = DeepseekV32DecoderLayer(reference_model(tmp_path).config, layer).eval()
    prefix = f"model.layers.{layer}."
    local = {n.removeprefix(prefix): t for n, t in fused(weights, config, layer).items()}
    with_indexer.load_state_dict(local, strict=True)
    x_TD = an_input(config, 64)
    mask = torch.full((64, 64), -torch.inf).triu(1)[None, None]
    tables = Rotary(config).table(64, x_TD.device)
    with torch.no_grad():
        expected = with_indexer(x_TD[None], attention_mask=mask, position_embeddings=tables)[0]
    main = {name: tensor for name, tensor in weights.items() if ".indexer." not in name}
    actual = run_layer(reader, layer, main, x_TD)
    assert (actual - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_kimi_and_moonlight_equal_transformers_to_the_bit(
    name: Name, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader = CheckpointReader(family_model(name, tmp_path_factory.getbasetemp()).directory)
    config = reader.config
    for layer in range(config.num_hidden_layers):
        weights, x_TD = weights_of(reader, layer), an_input(config)
        actual = run_layer(reader, layer, weights, x_TD)
        expected = run_theirs(theirs(config, layer, weights), config, x_TD)
        assert torch.equal(actual, expected), layer


def test_experts_over_several_parts_in_any_order_give_the_same_bytes(
    reader: CheckpointReader,
) -> None:
    config, weights = reader.config, weights_of(reader, 2)
    trunk, x_TD = trunk_of(config, 2, weights), an_input(config)
    h_TD, routed = trunk.attend(Rotary(config), x_TD)
    all_experts = list(range(config.n_routed_experts))
    whole = trunk.combine(h_TD, routed, [run_experts(routed, 2, weights, all_experts)])
    splits = [
        [all_experts[::2], all_experts[1::2]],
        [[e] for e in reversed(all_experts)],
        [[], all_experts[5:], all_experts[:5]],
    ]
    for split in splits:
        outputs = [run_experts(routed, 2, weights, experts) for experts in split]
        assert torch.equal(trunk.combine(h_TD, routed, outputs), whole)
        assert torch.equal(trunk.combine(h_TD, routed, outputs[::-1]), whole)
    # Without one expert the sum differs.
    incomplete = [run_experts(routed, 2, weights, all_experts[1:])]
    assert not torch.equal(trunk.combine(h_TD, routed, incomplete), whole)


def test_a_block_is_left_as_it_came(reader: CheckpointReader) -> None:
    """Tensors received in messages are read-only memory."""
    config, weights = reader.config, weights_of(reader, 1)
    trunk, x_TD = trunk_of(config, 1, weights), an_input(config)
    h_TD, routed = trunk.attend(Rotary(config), x_TD)
    before, z, h = x_TD.clone(), routed.z.clone(), h_TD.clone()
    outputs = run_experts(routed, 1, weights, [0, 1, 2])
    rows = {expert: rows.clone() for expert, (_, rows) in outputs.by_expert.items()}
    trunk.combine(h_TD, routed, [outputs])
    assert torch.equal(x_TD, before)
    assert torch.equal(routed.z, z)
    assert torch.equal(h_TD, h)
    assert all(torch.equal(outputs.by_expert[expert][1], rows[expert]) for expert in rows)


@torch.no_grad()
def test_layers_in_a_row_give_the_logits_of_transformers(reader: CheckpointReader) -> None:
    """Up to rounding: its eager attention adds in another order."""
    config = reader.config
    ids = torch.randint(0, config.vocab_size, (48,), generator=torch.Generator().manual_seed(2))
    state = {name: tensor.dequantize() for name, tensor in reader.read_globals().items()}
    x_TD = state["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        weights = weights_of(reader, layer)
        x_TD = run_layer(reader, layer, weights, x_TD)
        state |= fused(weights, config, layer)
    hf = to_hf_config(config, attention="eager")
    hf._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(hf).eval()
    model.load_state_dict(state, strict=True)
    expected = model(input_ids=ids[None], use_cache=False).logits[0]
    logits = model.lm_head(model.model.norm(x_TD))
    assert (logits - expected).norm() < 1e-5 * expected.norm()


# --- with quantized activations ---


def slow_int8(x: Tensor) -> Tensor:
    """One token at a time: codes round(x / s), s = amax / 127."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        scale = token.abs().max() / 127
        rows.append((token / scale).round() * scale)
    return torch.stack(rows).reshape(x.shape)


def slow_fp8(scale: Tensor) -> RoundInput:
    """The nearest of e4m3's 253 finite values, times the scale; beyond 448, 448."""
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values

    def round_input(x: Tensor) -> Tensor:
        steps = (x / scale).clamp(-448, 448)
        place = torch.bucketize(steps, values).clamp(1, len(values) - 1)
        below, above = values[place - 1], values[place]
        return torch.where(steps - below < above - steps, below, above) * scale

    return round_input


def test_fp8_values_are_the_formats() -> None:
    round_input = slow_fp8(torch.tensor([2.0]))
    assert round_input(torch.tensor([1000.0, -3000.0, 0.0, 2.26, 2.24])).tolist() == [
        *(896.0, -896.0, 0.0, 2.25, 2.25)
    ]


@pytest.mark.parametrize("which", ["int8", "fp8-clips", "fp8"])
def test_prepared_inputs_are_those_of_a_slow_reference(
    reader: CheckpointReader, which: str
) -> None:
    config, layer = reader.config, 1
    weights, x_TD = weights_of(reader, layer), an_input(config, 40)
    if which == "int8":
        slow: RoundInput = slow_int8
        fast = input_rounding(W8A8)
    else:
        scale = FP8_SCALES[which == "fp8"]
        slow = slow_fp8(scale)
        fast = input_rounding(W4A8, scale)
    assert fast is not None
    linears = {n.removesuffix(".weight") for n in weights if "_proj" in n}
    trunk = trunk_of(config, layer, weights, dict.fromkeys(linears, fast))
    h_TD, routed = trunk.attend(Rotary(config), x_TD)
    all_experts = list(range(config.n_routed_experts))
    outputs = [run_experts(routed, layer, weights, all_experts, dict.fromkeys(ROLES, fast))]
    actual = trunk.combine(h_TD, routed, outputs)

    module = theirs(config, layer, weights)
    for submodule in module.modules():
        if isinstance(submodule, nn.Linear):
            submodule.register_forward_pre_hook(lambda _, args: (slow(args[0]),))
    attended, _ = module.self_attn(
        hidden_states=module.input_layernorm(x_TD[None]),
        attention_mask=None,
        position_embeddings=Rotary(config).table(40, x_TD.device),
    )
    assert torch.allclose(h_TD, x_TD + attended[0], rtol=0, atol=1e-5)
    assert routed.experts is not None
    assert routed.weights is not None
    expected = h_TD + module.mlp.shared_experts(routed.z)
    for token in range(40):
        z = slow(routed.z[None, token])
        for expert, share in zip(routed.experts[token], routed.weights[token], strict=True):
            expert_weights = expert_of(weights, layer, int(expert))
            h = nn.functional.silu(z @ expert_weights["gate_proj"].T) * (
                z @ expert_weights["up_proj"].T
            )
            expected[token] += share * (slow(h) @ expert_weights["down_proj"].T)[0]
    # A sum in another order may move a code by one step.
    assert (actual - expected).norm() < 1e-3 * expected.norm()
    plain = run_layer(reader, layer, weights, x_TD)
    assert (actual - plain).norm() > 3e-3 * plain.norm()


def test_only_formats_with_quantized_activations_prepare() -> None:
    assert input_rounding(Scheme(weights="int4", group_size=32)) is None
    assert input_rounding(Scheme(weights="int8")) is None
    with pytest.raises(AssertionError):
        input_rounding(W4A8)


# --- the pieces ---


def test_tokens_of_an_expert_come_with_their_place_among_the_choices() -> None:
    routed = Routed(torch.zeros(4, 2), torch.tensor([[5, 1], [1, 5], [2, 3], [0, 5]]), None)
    token, choice = tokens_of(routed, 5)
    assert token.tolist() == [0, 1, 3]
    assert choice.tolist() == [0, 1, 1]
    token, choice = tokens_of(routed, 1)  # by choice, then by token: transformers' order
    assert token.tolist() == [1, 0]
    assert choice.tolist() == [0, 1]
    assert run_expert(routed, 7, {}, {}) is None


@pytest.mark.parametrize("layer", [0, 1])
def test_every_linear_of_the_trunk_can_be_watched(reader: CheckpointReader, layer: int) -> None:
    config, weights = reader.config, weights_of(reader, layer)
    trunk, x_TD = trunk_of(config, layer, weights), an_input(config, 24)
    widths = {
        spec.spec.module: spec.spec.shape[1]
        for spec in reader.read_layer(layer).values()
        if spec.spec.kind == "linear" and spec.spec.expert is None
    }
    inputs: dict[str, Tensor] = {}
    for module in widths:
        trunk.watch(module, lambda x, module=module: inputs.update({module: x}))  # type: ignore[misc]
    h_TD, routed = trunk.attend(Rotary(config), x_TD)
    trunk.combine(h_TD, routed, [])
    assert {module: x.shape[-1] for module, x in inputs.items()} == widths
    assert all(x.flatten(0, -2).shape[0] == 24 for x in inputs.values())
    prefix = f"model.layers.{layer}.self_attn"
    normed = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    normed = normed * weights[f"model.layers.{layer}.input_layernorm.weight"]
    torch.testing.assert_close(inputs[f"{prefix}.q_a_proj"][0], normed)


def test_a_watched_input_is_the_one_before_its_quantization() -> None:
    inputs: list[Tensor] = []
    linear = LazyLinear(lambda: torch.eye(4), lambda x: x.round())
    linear.observer = inputs.append
    x = torch.tensor([[0.4, 1.6, -2.2, 3.0]])
    assert linear(x).tolist() == [[0.0, 2.0, -2.0, 3.0]]
    assert torch.equal(inputs[0], x)


def test_a_layer_with_a_norm_too_few_or_too_many_does_not_load(reader: CheckpointReader) -> None:
    weights = weights_of(reader, 0)
    with pytest.raises(RuntimeError, match="q_a_layernorm"):
        trunk_of(
            reader.config,
            0,
            {n: t for n, t in weights.items() if not n.endswith("q_a_layernorm.weight")},
        )
    with pytest.raises(RuntimeError, match="third_layernorm"):
        trunk_of(
            reader.config, 0, weights | {"model.layers.0.third_layernorm.weight": torch.ones(4)}
        )


def test_rotary_tables_are_transformers_yarn(reader: CheckpointReader) -> None:
    config = reader.config
    assert config.yarn is not None
    rotary = Rotary(config)
    cos, sin = rotary.table(7, torch.device("cpu"))
    assert cos.shape == sin.shape == (1, 7, config.qk_rope_head_dim)
    assert cos[0, 0].tolist() == [pytest.approx(float(cos[0, 0, 0]))] * config.qk_rope_head_dim
    assert torch.equal(sin[0, 0], torch.zeros(config.qk_rope_head_dim))
    assert rotary.table(7, torch.device("cpu"))[0] is cos

"""Units cover every linear once, and are divided evenly among any number of workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.synthetic import V3_2, config_dict

from deepseek.config import ModelConfig
from deepseek.inventory import TensorSpec, input_key, layer_tensors, linears
from deepseek.models import DEEPSEEK_V3
from quant_jobs.calibration.units import (
    MAX_EXPERT_GROUPS,
    Unit,
    expert_specs,
    share_out,
    trunk_reader,
    trunk_specs,
    units,
)

WORKERS = [1, 2, 3, 7, 8, 32, 64, 100]


def config_of(name: str) -> ModelConfig:
    if name == "deepseek-v3":
        return DEEPSEEK_V3
    changes = V3_2 if name == "indexer-8" else {}
    experts = int(name.rpartition("-")[2])
    return ModelConfig.from_dict(config_dict(experts=experts, n_group=1, topk_group=1, **changes))


CONFIGS = ["deepseek-v3", "small-2", "small-8", "small-33", "small-50", "indexer-8"]


def solved(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The layer's linears but the indexer's, which are copied."""
    return [spec for spec in linears(config, layer) if not spec.is_indexer]


def both_kinds(config: ModelConfig) -> tuple[int, int]:
    """The last dense layer and the first MoE layer."""
    return config.first_k_dense_replace - 1, config.first_k_dense_replace


@pytest.mark.parametrize("name", CONFIGS)
def test_units_hold_every_linear_once(name: str) -> None:
    config = config_of(name)
    for layer in both_kinds(config):
        all_units = units(config, layer)
        counted = Counter(module for unit in all_units for module in unit.modules)
        assert counted == Counter(spec.module for spec in solved(config, layer))
        size = {spec.module: spec.numel for spec in solved(config, layer)}
        assert all(unit.numel == sum(size[module] for module in unit.modules) for unit in all_units)
        assert len(set(all_units)) == len(all_units)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_cut_no_further_stays_together(name: str) -> None:
    config = config_of(name)
    for layer in both_kinds(config):
        for unit in units(config, layer):
            if unit.kind == "attention":
                assert len({input_key(module) for module in unit.modules}) == 1
                assert (unit.mlps, unit.experts) == ((), ())
                continue
            assert [module.rpartition(".")[0] for module in unit.modules[::3]] == list(unit.mlps)
            roles = [module.rpartition(".")[2] for module in unit.modules]
            assert roles == ["gate_proj", "up_proj", "down_proj"] * len(unit.mlps)
            if unit.experts:
                numbers = [int(mlp.rpartition(".")[2]) for mlp in unit.mlps]
                assert numbers == list(unit.experts)
    experts = [e for unit in units(config, config.first_k_dense_replace) for e in unit.experts]
    assert experts == list(range(config.n_routed_experts))


def test_the_experts_of_deepseek_v3_come_in_32_groups_of_8() -> None:
    moe_units = units(DEEPSEEK_V3, 3)
    groups = [unit.experts for unit in moe_units if unit.experts]
    assert len(groups) == MAX_EXPERT_GROUPS == 32
    assert {len(group) for group in groups} == {8}
    assert len(moe_units) == 4 + 1 + 32
    assert len(units(DEEPSEEK_V3, 0)) == 4 + 1
    assert len([unit for unit in units(config_of("small-33"), 1) if unit.experts]) == 17
    for name in CONFIGS:
        config = config_of(name)
        groups = [unit.experts for unit in units(config, config.num_hidden_layers - 1)]
        assert sum(bool(group) for group in groups) <= MAX_EXPERT_GROUPS


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_everything_is_given_to_somebody_once_and_evenly(name: str, num_workers: int) -> None:
    config = config_of(name)
    for layer in both_kinds(config):
        all_units = units(config, layer)
        shares = share_out(config, layer, num_workers)
        assert shares == share_out(config, layer, num_workers)
        assert len(shares) == num_workers
        assert Counter(unit for share in shares for unit in share) == Counter(all_units)
        for share in shares:  # in the order of the layer
            assert share == [unit for unit in all_units if unit in share]
        assert sum(bool(share) for share in shares) == min(num_workers, len(all_units))
        loads = [sum(unit.numel for unit in share) for share in shares]
        # Without its last unit, no worker has more than the least loaded one.
        for share, load in zip(shares, loads, strict=True):
            if len(share) > 1:
                assert load - min(unit.numel for unit in share) <= min(loads)
        # "Largest first" is within 4/3 of the best split there is (Graham 1969).
        assert max(loads) <= 4 / 3 * least_possible(all_units, num_workers)


def least_possible(all_units: list[Unit], num_workers: int) -> float:
    """A lower bound of the largest load: the mean, the largest unit, and, with more units than
    workers, the two smallest of the largest `num_workers` + 1, since two of these share a worker.
    """
    sizes = sorted((unit.numel for unit in all_units), reverse=True)
    return max(sum(sizes) / num_workers, sizes[0], sum(sizes[num_workers - 1 : num_workers + 1]))


@pytest.mark.parametrize(("num_workers", "most"), [(1, 1.0), (2, 1.01), (8, 1.07), (16, 1.15)])
def test_deepseek_v3s_moe_layers_are_split_evenly(num_workers: int, most: float) -> None:
    shares = share_out(DEEPSEEK_V3, 30, num_workers)
    loads = [sum(unit.numel for unit in share) for share in shares]
    assert max(loads) * num_workers / sum(loads) <= most


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_trunk_and_everybodys_experts_are_the_layer(name: str, num_workers: int) -> None:
    config = config_of(name)
    for layer in both_kinds(config):
        shares = share_out(config, layer, num_workers)
        names = Counter(spec.name for spec in trunk_specs(config, layer))
        for share in shares:
            specs = expert_specs(config, layer, share)
            owned = {module for unit in share if unit.experts for module in unit.modules}
            assert {spec.module for spec in specs} == owned
            names.update(spec.name for spec in specs)
        assert names == Counter(spec.name for spec in layer_tensors(config, layer))


def test_the_trunk_is_read_by_each_in_turn(tiny_model: Path) -> None:
    assert [trunk_reader(layer, 3) for layer in range(5)] == [0, 1, 2, 0, 1]
    config = ModelConfig.from_directory(tiny_model)
    assert not any(".experts." in spec.name for spec in trunk_specs(config, 1))
    assert any(spec.name.endswith("e_score_correction_bias") for spec in trunk_specs(config, 1))

"""The hardware's names, and sentences for those that are none."""

from __future__ import annotations

import os

import pytest

from cluster.hardware import GPUS, parse_hardware
from deepseek.errors import DeployError


@pytest.mark.parametrize(
    ("text", "label", "gpus", "nodes"),
    [
        ("8xH800-80GB", "8xH800-80GB", 8, 1),
        ("16xH800-80GB", "16xH800-80GB", 16, 2),
        ("4xH200", "4xH200-141GB", 4, 1),
        ("8xh20-96gb", "8xH20-96GB", 8, 1),
        ("1xcpu", "cpu", 0, 1),
        ("cpu", "cpu", 0, 1),
    ],
)
def test_hardware_is_a_count_and_a_name(text: str, label: str, gpus: int, nodes: int) -> None:
    machines = parse_hardware(text)
    assert (machines.label, machines.num_gpus, machines.num_nodes) == (label, gpus, nodes)


@pytest.mark.parametrize("name", ["H800-80GB", "H100-80GB", "H20-96GB", "H20-141GB", "A100-80GB"])
def test_a_profile_has_at_least_the_memory_on_its_label(name: str) -> None:
    gpu = GPUS[name]
    labelled = int(name.rpartition("-")[2].removesuffix("GB")) * 1e9
    assert labelled < gpu.memory_bytes < 1.08 * labelled
    assert 0.85 * gpu.memory_bytes < gpu.usable_bytes < gpu.memory_bytes


def test_eight_h800_hold_684_gb() -> None:
    assert 8 * GPUS["H800-80GB"].memory_bytes == pytest.approx(684e9, rel=0.001)


def test_only_hopper_computes_in_fp8() -> None:
    for gpu in GPUS.values():
        assert ("fp8" in gpu.peak_tflops) == (gpu.generation == "sm90"), gpu.name


def test_the_cpu_is_this_host() -> None:
    cpu = parse_hardware("cpu").hardware
    assert cpu.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert not cpu.is_gpu


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xB9000", "'B9000' is unknown; write COUNTxNAME with one of H800-80GB, H100-80GB"),
        ("H800-80GB", "say how many, as in 8xH800-80GB"),
        ("0xH800-80GB", "0 GPUs are neither part of one node"),
        ("12xH800-80GB", "12 GPUs are neither part of one node (1, 2, 4) nor whole nodes of 8"),
        ("2xcpu", "the engine runs on one CPU host; write cpu"),
        ("", "is unknown"),
        ("8 x H800", "is unknown"),
    ],
)
def test_bad_hardware_gets_one_sentence(text: str, words: str) -> None:
    with pytest.raises(DeployError) as caught:
        parse_hardware(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_ranks_than_gpus_are_refused_and_never_become_gpus() -> None:
    machines = parse_hardware("8xH800-80GB")
    assert machines.for_ranks(None).count == machines.for_ranks(8).count == 8
    assert machines.for_ranks(4).label == "4xH800-80GB"
    with pytest.raises(DeployError) as caught:
        machines.for_ranks(16)
    assert str(caught.value) == (
        "--tp 16 needs 16 GPUs, and --hardware 8xH800-80GB has 8; use --hardware 16xH800-80GB or "
        "--tp 8"
    )

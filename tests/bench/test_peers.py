"""The benches that compare algorithms and peers: their jobs are valid, and they read every format
correctly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from torch import Tensor

from bench.accuracy import MODEL, Case, cases
from bench.peers import MARK, Watch, peer_weights
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.algorithms.folding import scaled_groups

OUTPUTS, INPUTS, GROUP = 6, 256, 128


def test_every_recipe_of_the_accuracy_bench_can_be_run() -> None:
    config = CheckpointReader(MODEL).config
    found = list(cases())
    assert len({case.name for case in found}) == len(found) > 60
    for case in found:
        assert case.baseline in found
        schemes = case.recipe(32).resolve(config)
        for layer in range(config.num_hidden_layers):
            scaled_groups(config, schemes, layer)


def test_smoothquant_of_experts_smooths_what_they_share_with_nobody() -> None:
    config = CheckpointReader(MODEL).config
    schemes = Case("int8 W8A8", "experts", "smoothquant").recipe(32).resolve(config)
    mlp = "model.layers.1.mlp"
    assert schemes[f"{mlp}.experts.0.down_proj"].algorithm == "smoothquant"
    assert schemes[f"{mlp}.experts.0.up_proj"].algorithm == "max"
    assert not schemes[f"{mlp}.shared_experts.down_proj"].is_quantized


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(-8, 8, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scale() -> Tensor:
    return torch.rand(
        OUTPUTS, INPUTS // GROUP, generator=torch.Generator().manual_seed(1)
    ).bfloat16()


def expected(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale.float().repeat_interleave(GROUP, dim=1)


def test_a_checkpoint_by_llm_compressor_is_unpacked(
    tmp_path: Path, codes: Tensor, scale: Tensor
) -> None:
    stored = {
        "a.weight_packed": pack_to_int32(codes.to(torch.int8), 4),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(stored, tmp_path / "model.safetensors")
    weights = dict(peer_weights(tmp_path))
    assert weights.keys() == {"a.weight", "norm.weight"}
    assert torch.equal(weights["a.weight"], expected(codes, scale))


def test_a_checkpoint_by_modelopt_is_unpacked(tmp_path: Path, codes: Tensor, scale: Tensor) -> None:
    before = torch.linspace(0.5, 2.0, INPUTS)
    stored = {
        # Two rows to a byte, the even one in the low bits: facts of modelopt 0.47's exporter.
        "a.weight": ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).to(torch.uint8),
        "a.weight_scale": scale,
        "a.pre_quant_scale": before,
    }
    save_file(stored, tmp_path / "model.safetensors")
    weights = dict(peer_weights(tmp_path))
    assert torch.equal(weights["a.weight"], expected(codes, scale) * before)


@pytest.mark.slow
def test_modelopt_packs_as_we_unpack(tmp_path: Path, codes: Tensor, scale: Tensor) -> None:
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    weight = expected(codes, scale)
    packed = pack_int4_in_uint8(weight, scale.float(), GROUP)
    save_file({"a.weight": packed, "a.weight_scale": scale}, tmp_path / "model.safetensors")
    assert torch.equal(dict(peer_weights(tmp_path))["a.weight"], weight)


@pytest.mark.heavy
def test_a_job_is_watched_with_all_that_bears_its_mark() -> None:
    """By its mark alone, because Ray's daemons are not children of the job."""
    hold = "import time; size = 100_000_000; kept = b'x' * size; time.sleep(2)"
    with Watch("one-mark") as watch:
        subprocess.run(
            [sys.executable, "-c", hold],
            env=os.environ | {MARK: "one-mark"},
            check=True,
            start_new_session=True,
        )
    assert 100_000_000 <= watch.anonymous <= watch.resident < 200_000_000
    assert watch.cpu_s > 0

"""The bench of target arithmetics: it tries every target, the one that it compares with first, and
its rows say what differs from what."""

from __future__ import annotations

import torch

from bench.target_arithmetic import BASELINE, Build, builds, row
from cluster.matrix import TARGETS


def test_every_target_is_tried_after_the_one_that_it_is_compared_with() -> None:
    found = list(builds())
    assert found[0] == Build(BASELINE)
    assert {build.target for build in found} == set(TARGETS)
    assert {build.dialect for build in found if build.target == "trtllm"} == {"mixed", "single"}
    for build in found:
        assert build.options().kv_cache == "bf16"


def test_a_row_compares_with_the_source_and_with_the_baseline() -> None:
    """The target equals the source here, and the baseline does not: its KL to the source is the
    whole difference, below zero for the target."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(16, (2, 9), generator=generator)
    source = [torch.randn(9, 16, generator=generator) for _ in range(2)]
    baseline = [logits + torch.randn(9, 16, generator=generator) for logits in source]
    cells = row("int4", Build("trtllm"), ids_BT, source, baseline, source).split(" | ")
    assert cells[:2] == ["| `int4`", "trtllm"]
    ratio, kl, more, between, top1 = (cell.split()[0] for cell in cells[2:])
    assert (ratio, kl, top1) == ("1.0000", "0.00000", "100.00%")
    assert float(more) < -0.1
    assert float(between) > 0.1
    own = row("int4", Build(BASELINE), ids_BT, source, baseline, baseline).split(" | ")
    assert own[4:6] == ["-", "-"]
    assert float(own[3].split()[0]) == -float(more)

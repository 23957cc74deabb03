"""The head is the same however many workers held the calibration blocks, and in any waves."""

from __future__ import annotations

import pytest
import torch
from support.quantizing import SmallModel, make_small_model, small_recipe

from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.calibration.forward import Rotary
from quant_jobs.workers.context import LayerContext
from quant_jobs.workers.head import HeadInput, HeadOwner

pytestmark = pytest.mark.heavy

HEAD = {"match": "lm_head", "weights": "int4", "group_size": 32, "algorithm": "gptq", "clip": "mse"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("model"), layers=2, vocab_size=128)


def test_the_head_is_the_same_from_any_division_of_the_blocks(model: SmallModel) -> None:
    reader = CheckpointReader(model.directory)
    recipe = small_recipe("int8", rules=[{"match": "*.experts.*", "weights": "int8"}, HEAD])
    context = LayerContext(
        config=reader.config,
        recipe=recipe,
        schemes=recipe.resolve(reader.config),
        num_blocks=6,
        device=torch.device("cpu"),
        rotary=Rotary(reader.config),
    )
    source = reader.read_globals()
    head_input = HeadInput(context, source["model.norm.weight"].data)
    generator = torch.Generator().manual_seed(2)
    outputs = [torch.randn(40, reader.config.hidden_size, generator=generator) for _ in range(6)]
    shares = {block: head_input.share(block, x) for block, x in enumerate(outputs)}
    solved = []
    for waves in (
        [[[0, 1, 2, 3, 4, 5]]],  # one worker, one wave
        [[[0, 3], [1, 4], [2, 5]]],
        [[[0, 2], [1]], [[4], [3, 5]]],
    ):
        owner = HeadOwner.of(context)
        for wave in waves:
            owner.add([{block: shares[block] for block in own} for own in wave])
        solved.append(owner.solve(source))
    (first, summary), *others = solved
    assert summary.errors["lm_head"] > 0
    for tensors, other in others:
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in first)
        assert other.errors == summary.errors

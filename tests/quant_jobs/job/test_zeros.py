"""Whole jobs on a model with zeros: what is exact stays exact and counts as no fallback.

The model has an all-zero expert, experts with one all-zero matrix, zero rows, groups and channels,
an all-zero expert that no token reaches, and, so that counting is seen to work, one such expert
that is not zero. Each recipe quantizes it once, in this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.quantizing import SmallModel, changed_model, make_small_model, small_recipe
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.formats import decompress, stored_shapes
from deepseek.inventory import MLP_ROLES
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.workers.in_process import InProcessWorker

pytestmark = pytest.mark.heavy

LAYER = "model.layers.2."
EXPERTS = f"{LAYER}mlp.experts."
ALL_ZERO, DOWN_ZERO, GATE_ZERO, IN_PARTS, UNSEEN_ZERO, UNSEEN = range(6)
#: Every algorithm and activation format, with and without zero points.
RECIPES = ("int8", "int8-smoothquant", "int4-asym", "int4-all-awq", "int4-all-gptq", "w4a8")
#: Recipe -> kind -> count of what the unseen expert that is not zero costs.
COUNTED = {
    "int8-smoothquant": {"unseen_expert": 1},
    "w4a8": {"starved_expert": 3, "unseen_input_scale": 1},
} | dict.fromkeys(("int4-gptq", "int4-all-gptq", "int4-awq", "int4-all-awq"), {"starved_expert": 3})


def set_zero(stored: dict[str, Tensor], name: str, *index: int | slice) -> None:
    tensor = stored[name]
    width = torch.uint8 if tensor.dtype == torch.float8_e4m3fn else tensor.dtype
    tensor.view(width)[index or ...] = 0


def add_zeros(stored: dict[str, Tensor]) -> None:
    for expert in (ALL_ZERO, UNSEEN_ZERO):
        for role in MLP_ROLES:
            set_zero(stored, f"{EXPERTS}{expert}.{role}.weight")
    set_zero(stored, f"{EXPERTS}{DOWN_ZERO}.down_proj.weight")
    set_zero(stored, f"{EXPERTS}{GATE_ZERO}.gate_proj.weight")
    part = f"{EXPERTS}{IN_PARTS}."
    set_zero(stored, f"{part}gate_proj.weight", 7)
    set_zero(stored, f"{part}up_proj.weight", 9)
    set_zero(stored, f"{part}up_proj.weight", 11, slice(128))
    set_zero(stored, f"{part}down_proj.weight", 13)
    set_zero(stored, f"{part}down_proj.weight", slice(None), 15)  # an input that nothing reads
    stored[f"{part}gate_proj.weight"][17] = 1.0  # a constant row
    for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.kv_a_layernorm"):
        set_zero(stored, f"{LAYER}{norm}.weight", 19)
    set_zero(stored, f"{LAYER}self_attn.q_a_proj.weight", 21)
    stored[f"{LAYER}mlp.gate.e_score_correction_bias"][[UNSEEN_ZERO, UNSEEN]] = -9.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    root = tmp_path_factory.mktemp("zeros")
    return changed_model(make_small_model(root), root / "changed", add_zeros)


@pytest.fixture(scope="module")
def worker() -> Iterator[InProcessWorker]:
    with InProcessWorker() as worker:
        yield worker


def restored(reader: ArtifactReader, layer: dict[str, Tensor], module: str) -> Tensor:
    scheme = reader.schemes[module]
    shape = (256, 128) if module.endswith("down_proj") else (128, 256)
    suffixes = stored_shapes(scheme, *shape)
    stored = {suffix: layer[f"{module}.{suffix}"] for suffix in suffixes}
    return decompress(stored, scheme, shape)


@pytest.mark.parametrize("name", RECIPES)
def test_zeros_stay_zeros_and_are_no_fallbacks(
    name: str, model: SmallModel, worker: InProcessWorker, tmp_path: Path
) -> None:
    recipe = small_recipe(name, expert_coverage={"floor_tokens": 1})
    job = plan_job(model.directory, recipe, model.text, tmp_path / "out")
    with JobFolder(job.output, job.fingerprint) as folder:
        Driver(job, folder, worker, lambda event: None).run()
    reader = ArtifactReader(job.output)

    counted: Counter[str] = Counter()
    for entry in reader.manifest.fallbacks:
        counted[entry.kind] += entry.count
        assert entry.module.startswith(f"{EXPERTS}{UNSEEN}"), entry
    assert counted == COUNTED.get(name, {})
    coverage = reader.manifest.coverage[2]
    assert [expert for expert, tokens in enumerate(coverage) if not tokens] == [UNSEEN_ZERO, UNSEEN]

    layer = reader.read_layer(2)
    for expert in (ALL_ZERO, UNSEEN_ZERO):
        assert not any(restored(reader, layer, f"{EXPERTS}{expert}.{r}").any() for r in MLP_ROLES)
    assert not restored(reader, layer, f"{EXPERTS}{DOWN_ZERO}.down_proj").any()
    assert not restored(reader, layer, f"{EXPERTS}{GATE_ZERO}.gate_proj").any()
    assert restored(reader, layer, f"{EXPERTS}{GATE_ZERO}.up_proj").any()
    part = {role: restored(reader, layer, f"{EXPERTS}{IN_PARTS}.{role}") for role in MLP_ROLES}
    assert not part["gate_proj"][7].any()
    assert not part["up_proj"][9].any()
    assert not part["up_proj"][11, :128].any()
    assert not part["down_proj"][13].any()
    assert all(part[role][0].any() for role in MLP_ROLES)

    errors = reader.manifest.layers[2].errors
    of_expert = {
        expert: [errors[f"{EXPERTS}{expert}.{role}"] for role in MLP_ROLES] for expert in range(6)
    }
    assert of_expert[ALL_ZERO] == of_expert[UNSEEN_ZERO] == [0.0, 0.0, 0.0]
    assert of_expert[DOWN_ZERO][2] == of_expert[GATE_ZERO][0] == of_expert[GATE_ZERO][2] == 0.0
    assert all(0 < error < 0.2 for error in of_expert[IN_PARTS] + of_expert[UNSEEN])

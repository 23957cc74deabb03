"""The paper model: counted bytes against the inventory, and what must move which way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.synthetic import quantize_plainly, write_checkpoint
from typer.testing import CliRunner

from deepseek.errors import DeployError
from deepseek.inventory import HEAD, tensors
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, Rule, load_recipe
from quant_jobs.__main__ import app
from quant_jobs.calibration.statistics import SAMPLE_TOKENS
from quant_jobs.cost.estimate import LEVERS, make_estimate, with_levers
from quant_jobs.cost.head import head_steps
from quant_jobs.cost.layer import LayerWork
from quant_jobs.cost.model import bytes_read, bytes_written, peak_bytes
from quant_jobs.cost.work import Job

pytestmark = pytest.mark.heavy

TOKENS = 64 * 4096


def test_gptq_of_one_layer_costs_what_its_formulas_say() -> None:
    """By hand for one worker that solves a whole MoE layer: every routed row enters the Gram
    matrices of its expert's two inputs; each of the 512 matrices takes 4/3 K^3 to factor; the
    columns' updates are N K^2 FLOP of each linear."""
    job = Job(
        config=DEEPSEEK_V3, recipe=load_recipe("int4-gptq"), nodes=1, per_node=1, tokens=TOKENS
    )
    (solve,) = (step for step in LayerWork(job, 3).steps() if step.section == "solve")
    (worker,) = solve.workers
    rows = 8 * TOKENS
    assert worker["statistics"].gram == pytest.approx(2 * rows * (7168**2 + 2048**2))
    assert worker["solve"].factor == pytest.approx(256 * 4 / 3 * (7168**3 + 2048**3))
    updates = 256 * (2 * 2048 * 7168**2 + 7168 * 2048**2)
    errors = 4 * SAMPLE_TOKENS * 256 * 3 * 2048 * 7168
    assert worker["solve"].matmul == pytest.approx(updates + errors)


@pytest.mark.heavy
def test_every_source_byte_is_read_once_whatever_the_number_of_nodes() -> None:
    """688.6 GB are the tensors of the release: weights, scales, MTP layer."""
    read = {
        nodes: bytes_read(make_estimate(DEEPSEEK_V3, load_recipe("int4"), nodes, tokens=TOKENS).job)
        for nodes in (1, 2, 4)
    }
    assert len(set(read.values())) == 1
    linears = sum(spec.numel for spec in tensors(DEEPSEEK_V3) if spec.kind == "linear")
    assert linears < read[1] < 1.03 * linears + 4 * 129280 * 7168 + 1e9


@pytest.mark.parametrize("recipe", ["int4", "int8-smoothquant", "int4-all-awq", "int4-gptq"])
def test_expected_is_above_the_floor_and_more_tokens_take_longer(recipe: str) -> None:
    small, large = (
        make_estimate(DEEPSEEK_V3, load_recipe(recipe), 2, tokens=tokens)
        for tokens in (TOKENS, 4 * TOKENS)
    )
    for one in (small, large):
        assert 0 < one.floor.total < one.expected.total
        for name in ("statistics", "solve", "exchange", "boundary"):
            assert one.floor.phase(name) <= one.expected.phase(name)
    assert small.expected.total < large.expected.total
    assert peak_bytes(small.uses)[2] < peak_bytes(large.uses)[2]


def test_gptq_costs_more_than_rounding_and_nodes_share_its_solving() -> None:
    plain = make_estimate(DEEPSEEK_V3, load_recipe("int4"), 1, tokens=TOKENS)
    one, four = (
        make_estimate(DEEPSEEK_V3, load_recipe("int4-gptq"), nodes, tokens=TOKENS)
        for nodes in (1, 4)
    )
    assert one.expected.phase("solve") > plain.expected.phase("solve")
    assert four.expected.phase("solve") == pytest.approx(one.expected.phase("solve") / 4, rel=0.1)


def test_each_change_makes_it_no_slower() -> None:
    estimate = make_estimate(DEEPSEEK_V3, load_recipe("int4-gptq"), 4)
    times = [with_levers(estimate, number).total for number in range(len(LEVERS) + 1)]
    assert times[0] == estimate.expected.total
    assert times == sorted(times, reverse=True)
    assert times[-1] > estimate.floor.total / 6  # below the floor only where the work is less


def test_slow_storage_becomes_the_limit() -> None:
    recipe = load_recipe("int4")
    estimate = make_estimate(DEEPSEEK_V3, recipe, 1, tokens=TOKENS, storage=0.05e9)
    # 689 GB in and 356 GB out at 50 MB/s are 5.8 hours; nothing may be hidden below that.
    assert estimate.expected.total > 5.5 * 3600


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--nodes 0", "--nodes 0: at least one node"),
        ("--nodes 1 --tokens 100", "at least one block of 4096"),
        ("--nodes 1 --storage 0", "--storage 0: give GB/s"),
    ],
)
def test_numbers_out_of_range_are_named(words: str, complaint: str) -> None:
    done = CliRunner().invoke(app, ["estimate", "--recipe", "int4", *words.split()])
    assert isinstance(done.exception, DeployError)
    assert complaint in str(done.exception)


@pytest.mark.heavy
def test_the_command_speaks_json() -> None:
    done = CliRunner().invoke(app, ["estimate", "--recipe", "int4-gptq", "--nodes", "2", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert sorted(found) == [
        *("boundary_bytes_written", "bytes_read", "bytes_written", "expected_s", "fits"),
        *("floor_s", "gpu_bytes", "gpus", "host_bytes_per_node", "largest_calibration_tokens"),
        *("limit", "model", "nodes", "object_store_bytes_per_node", "phases", "recipe"),
        *("storage_bytes_per_s", "tokens"),
    ]
    assert found["gpus"] == 16
    assert found["tokens"] == 512 * 4096


def test_more_calibration_than_a_gpu_holds_does_not_fit(tmp_path: Path) -> None:
    words = "estimate --recipe int4-gptq --nodes 1 --tokens 8388608"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 1
    assert "Does not fit" in done.stdout


def test_a_model_without_moe_layers_is_estimated_too() -> None:
    dense = replace(DEEPSEEK_V3, first_k_dense_replace=DEEPSEEK_V3.num_hidden_layers)
    estimate = make_estimate(dense, load_recipe("int4-all-gptq"), 1, tokens=TOKENS)
    assert 0 < estimate.floor.total < estimate.expected.total
    assert estimate.fits


# --- a head that the recipe quantizes ---


@pytest.fixture
def headless() -> Recipe:
    """`int8-head` without its rule of the head."""
    recipe = load_recipe("int8-head")
    rules = tuple(rule for rule in recipe.rules if rule.match != HEAD)
    assert len(rules) == len(recipe.rules) - 1
    return recipe.model_copy(update={"rules": rules})


def test_a_quantized_head_is_written_in_its_own_bytes(headless: Recipe) -> None:
    """129280 x 7168: one byte a weight and four for each row's scale, in place of two a weight.
    Blocks are carried through the last layer too, and stored behind it."""
    copied, quantized = (
        bytes_written(make_estimate(DEEPSEEK_V3, recipe, 2, tokens=TOKENS).job)
        for recipe in (headless, load_recipe("int8-head"))
    )
    assert copied[0] - quantized[0] == 129280 * 7168 - 4 * 129280
    assert copied[1] == 60 * TOKENS * 7168 * 4
    assert quantized[1] == 61 * TOKENS * 7168 * 4


def test_written_bytes_are_those_of_the_artifact(tmp_path: Path) -> None:
    """Of a small model, as `quantize_plainly` stores it; the rest of a file is its header."""
    config = write_checkpoint(tmp_path / "source", fp8=False, vocab_size=512)
    for name in ("int8", "int8-head", "int4-a8"):
        recipe = load_recipe(name)
        quantize_plainly(tmp_path / "source", recipe, tmp_path / name)
        job = Job(config=config, recipe=recipe, nodes=1, per_node=1, tokens=64, block_tokens=64)
        files = (tmp_path / name).glob("*.safetensors")
        stored = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        assert bytes_written(job)[0] == stored, name


def test_a_quantized_head_takes_time_of_one_worker_that_nothing_hides(headless: Recipe) -> None:
    copied, quantized = (
        make_estimate(DEEPSEEK_V3, recipe, 2, tokens=TOKENS).expected
        for recipe in (headless, load_recipe("int8-head"))
    )
    assert copied.head == {}
    assert quantized.carried < copied.carried  # the driver copies the MTP layer alone
    for phase in ("read", "statistics", "solve", "write", "calls"):
        assert quantized.head[phase] > 0
    # The last layer is carried through.
    assert quantized.layers[-1].seconds > copied.layers[-1].seconds
    more = quantized.total - copied.total
    assert more > sum(quantized.head.values())
    assert bytes_read(make_estimate(DEEPSEEK_V3, headless, 2, tokens=TOKENS).job) == bytes_read(
        make_estimate(DEEPSEEK_V3, load_recipe("int8-head"), 2, tokens=TOKENS).job
    )


def test_gptq_of_the_head_costs_what_its_formulas_say(headless: Recipe) -> None:
    rule = Rule(match=HEAD, weights="int4", group_size=128, algorithm="gptq")
    recipe = headless.model_copy(update={"rules": (*headless.rules, rule)})
    job = Job(config=DEEPSEEK_V3, recipe=recipe, nodes=1, per_node=1, tokens=TOKENS)
    *waves, solve = head_steps(job)
    gram = sum(step.repeat * step.workers[0]["statistics"].gram for step in waves)
    assert gram == pytest.approx(2 * TOKENS * 7168**2)
    (worker,) = solve.workers
    assert worker["solve"].factor == pytest.approx(4 / 3 * 7168**3)
    updates = 129280 * 7168**2
    assert worker["solve"].matmul == pytest.approx(updates + 4 * SAMPLE_TOKENS * 129280 * 7168)


def test_the_head_s_memory_is_a_peak_of_its_own(headless: Recipe) -> None:
    """Two copies of it in float32 are less than a layer of DeepSeek-V3, and more than one of a
    model whose vocabulary is all that it has."""
    recipe = load_recipe("int8-head")
    for config, is_peak in (
        (DEEPSEEK_V3, False),
        (replace(DEEPSEEK_V3, vocab_size=32 * DEEPSEEK_V3.vocab_size), True),
    ):
        peaks = [
            peak_bytes(make_estimate(config, given, 1, tokens=4096).uses)
            for given in (headless, recipe)
        ]
        assert (peaks[1][2] > peaks[0][2]) == is_peak
        assert peaks[1][1] == peaks[0][1]
    assert peaks[1][2] > 2 * 32 * 129280 * 7168 * 4

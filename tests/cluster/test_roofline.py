"""The roofline: bytes and operations by hand, and what may never make a replica slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import recipe_of

from cluster.hardware import GPUS, Machines, parse_hardware
from cluster.roofline import Efficiency, ReplicaSpeed, replica_speed
from cluster.work import Attention, busiest_experts, distinct_experts
from deepseek.errors import DeployError
from deepseek.models import DEEPSEEK_V3, DEEPSEEK_V3_2

#: DeepSeek-V3 with few layers and experts: its tensors are counted in milliseconds.
SMALL = replace(DEEPSEEK_V3, num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=32)
SMALL_V3_2 = replace(
    DEEPSEEK_V3_2, num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=32
)
#: A data sheet that is reached, and nothing that costs besides.
IDEAL = Efficiency(
    memory=1.0, decode=1.0, prefill=1.0, activation_bytes=0.0, link=1.0, layer_s=0.0, hop_s=0.0
)
RELEASED = recipe_of()
BF16 = recipe_of({"match": "*", "weights": "bf16"})
INT8_ONLY = recipe_of({"match": "*", "weights": "int8"})
INT4 = recipe_of({"match": "*", "weights": "int4", "group_size": 128})
LAYOUTS: list[tuple[int, int, Attention]] = [
    (1, 1, "tp"),
    (8, 1, "tp"),
    (8, 8, "tp"),
    (8, 1, "dp"),
    (8, 8, "dp"),
    (16, 16, "tp"),
    (16, 16, "dp"),
]
layouts = st.sampled_from(LAYOUTS)
batches = st.integers(1, 4096)
contexts = st.integers(1, 100_000)


def speed_of(
    layout: tuple[int, int, Attention] = (8, 8, "tp"), gpu: str = "H200-141GB", **options: object
) -> ReplicaSpeed:
    gpus, ep, attention = layout
    options = {"config": SMALL, "recipe": RELEASED, **options}
    machines = Machines(GPUS[gpu], gpus)
    return replica_speed(machines=machines, ep=ep, attention=attention, **options)


def test_distinct_experts_of_few_and_of_many_tokens() -> None:
    assert distinct_experts(256, 8, 1) == pytest.approx(8.0)
    # The second token's 8 miss the first's 8 with 31/32 of them.
    assert distinct_experts(256, 8, 2) == pytest.approx(8.0 + 8.0 * 31 / 32)
    assert distinct_experts(256, 8, 5000) == pytest.approx(256.0)


@given(st.sampled_from([1, 2, 4, 8, 16, 32]), batches)
def test_the_busiest_group_reads_no_less_than_the_mean_and_no_more_than_its_own(
    groups: int, tokens: int
) -> None:
    read = busiest_experts(256, 8, groups, tokens)
    assert distinct_experts(256, 8, tokens) / groups <= read * (1 + 1e-9)
    assert read <= 256 / groups
    assert read <= busiest_experts(256, 8, groups, tokens + 1) * (1 + 1e-9)


def test_the_bytes_and_operations_of_a_step_by_hand() -> None:
    """Two sequences of 100 tokens on eight GPUs by heads, every expert cut over all."""
    work = speed_of((8, 1, "tp"), efficiency=IDEAL).step(2, 100)
    done = speed_of((8, 1, "tp")).model.decode(speed_of((8, 1, "tp")).layout, 2, 100)
    one_expert = 3 * 7168 * 2048
    fp8 = 1 + 4 / 128**2  # a tile has one f32 scale
    touched = 32 * (1 - (24 / 32) ** 2)
    assert done.experts.bytes == pytest.approx(3 * touched * one_expert * fp8 / 8)
    assert done.experts.operations == {"fp8": pytest.approx(2 * 3 * 2 * 8 * one_expert / 8)}
    assert done.attention.bytes == 2 * 100 * (512 + 64) * 2 * 4
    assert done.attention.operations == {"fp16": 2 * 2 * 100 * 16 * (576 + 512) * 4}
    # Two all-reduces of two BF16 rows in each of four layers; 7/8 go out, twice.
    assert done.nvlink_bytes == 2 * 7 / 8 * 2 * 4 * 2 * 7168 * 2
    assert (done.network_bytes, done.collectives, done.layers) == (0.0, 8, 4)
    assert work.experts == pytest.approx(done.experts.bytes / 4.8e12)
    assert work.attention == pytest.approx(done.attention.bytes / 4.8e12)
    assert work.nvlink == pytest.approx(done.nvlink_bytes / 450e9)
    assert work.total == pytest.approx(work.dense + work.experts + work.attention + work.nvlink)


def test_by_sequences_a_gpu_reads_its_own_latents_and_whole_dense_linears() -> None:
    heads, sequences = speed_of((8, 8, "tp")), speed_of((8, 8, "dp"))
    by_heads = heads.model.decode(heads.layout, 64, 100)
    by_sequences = sequences.model.decode(sequences.layout, 64, 100)
    assert by_heads.attention.bytes == 8 * by_sequences.attention.bytes
    assert by_heads.attention.operations == by_sequences.attention.operations
    assert 7 * by_heads.dense.bytes < 8 * by_sequences.dense.bytes < 64 * by_heads.dense.bytes
    # Eight tokens go to eight experts, and 7/8 of those to other GPUs; three MoE layers.
    assert by_sequences.nvlink_bytes == 3 * 8 * 8 * 7 / 8 * 7168 * 3


def test_a_hopper_multiplies_tiles_in_fp8_and_an_a100_in_bf16() -> None:
    for gpu, form in (("H200-141GB", "fp8"), ("A100-80GB", "fp16")):
        speed = speed_of(gpu=gpu)
        assert set(speed.model.experts) == {form}
        assert speed.chunk(8192, 512).total > 0
    int8 = recipe_of({"match": "*", "weights": "int8", "activations": "int8"})
    assert set(speed_of(recipe=int8).model.experts) == {"int8"}


@settings(deadline=None)
@given(
    layouts,
    batches,
    contexts,
    st.sampled_from(["memory_bandwidth", "nvlink_bandwidth", "network_bandwidth", "peak_tflops"]),
)
def test_more_of_any_rate_is_never_slower(
    layout: tuple[int, int, Attention], batch: int, context: int, rate: str
) -> None:
    slow = speed_of(layout)
    value = getattr(slow.hardware, rate)
    is_peak = rate == "peak_tflops"
    more = {form: 1.5 * peak for form, peak in value.items()} if is_peak else 1.5 * value
    fast = replace(slow, hardware=replace(slow.hardware, **{rate: more}))
    assert fast.decode_s(batch, context) <= slow.decode_s(batch, context)
    assert fast.prefill_s(context) <= slow.prefill_s(context)


@settings(deadline=None)
@given(layouts, batches, contexts)
def test_fewer_bytes_are_never_slower(
    layout: tuple[int, int, Attention], batch: int, context: int
) -> None:
    """Formats that multiply in BF16 alike, and KV formats."""
    steps = [speed_of(layout, recipe=r).decode_s(batch, context) for r in (INT4, INT8_ONLY, BF16)]
    assert steps == sorted(steps)
    small_cache = speed_of(layout, recipe=recipe_of(kv_cache="fp8"), target="vllm")
    assert small_cache.model.footprint.kv_bytes_per_token < 4 * 576 * 2
    large_cache = speed_of(layout, target="vllm")
    assert small_cache.decode_s(batch, context) <= large_cache.decode_s(batch, context)
    assert small_cache.max_batch(1024, 1024) >= large_cache.max_batch(1024, 1024)


@settings(deadline=None)
@given(layouts, batches, st.integers(1, 500), st.integers(1, 20_000), st.integers(1, 20_000))
def test_a_larger_batch_has_no_lower_throughput_and_no_shorter_time_per_token(
    layout: tuple[int, int, Attention], batch: int, more: int, isl: int, osl: int
) -> None:
    speed = speed_of(layout)
    less, larger = (speed.output_tokens_per_s(n, isl, osl) for n in (batch, batch + more))
    assert larger >= less * (1 - 1e-9)
    assert speed.tpot_s(batch + more, isl, osl) >= speed.tpot_s(batch, isl, osl)


@settings(deadline=None)
@given(layouts, batches, contexts, st.integers(1, 1000))
def test_longer_contexts_and_prompts_take_no_less(
    layout: tuple[int, int, Attention], batch: int, context: int, more: int
) -> None:
    speed = speed_of(layout)
    assert speed.decode_s(batch, context + more) >= speed.decode_s(batch, context)
    assert speed.prefill_s(context + more) >= speed.prefill_s(context)


def test_a_prompt_takes_its_chunks_and_one_request_waits_for_no_other() -> None:
    speed = speed_of(chunk_tokens=1000)
    whole, rest = speed.chunk(1000, 1250).total, speed.chunk(500, 1250).total
    assert speed.prefill_s(2500) == pytest.approx(2 * whole + rest)
    assert speed.tpot_s(1, 2500, 100) == speed.decode_s(1, 2550)
    between = 25 / speed.prefill_tokens_per_s(2500)
    assert speed.tpot_s(2, 2500, 100) == pytest.approx(speed.decode_s(2, 2550) + between)


def test_by_sequences_a_lone_prompt_takes_as_long_as_one_on_every_gpu() -> None:
    speed = speed_of((8, 8, "dp"), chunk_tokens=8000)
    assert speed.prefill_s(1000) == pytest.approx(speed.chunk(8000, 500).total)


def test_by_sequences_the_replica_holds_more_tokens_though_weights_are_copied() -> None:
    heads, sequences = speed_of((8, 8, "tp")), speed_of((8, 8, "dp"))
    assert 6 * heads.kv_tokens < sequences.kv_tokens < 8 * heads.kv_tokens
    assert heads.max_batch(64, 1) == heads.kv_tokens // 128  # whole pages of 64 tokens


def test_collectives_cost_more_between_nodes() -> None:
    hop = replace(IDEAL, hop_s=1.0)
    assert speed_of((8, 8, "tp"), efficiency=hop).step(1, 1).fixed == 0.0
    assert speed_of((16, 16, "tp"), efficiency=hop).step(1, 1).fixed == 2 * 4
    assert speed_of((16, 16, "tp"), efficiency=hop).step(1, 1).network > 0.0


def test_sparse_attention_reads_its_best_tokens_and_every_index_key() -> None:
    speed = speed_of(config=SMALL_V3_2)
    short, long = (speed.model.decode(speed.layout, 1, c).attention for c in (2048, 10_048))
    assert long.bytes - short.bytes == 8000 * 132 * 4
    assert long.operations["fp16"] == short.operations["fp16"]
    assert long.operations["fp8"] == 2 * 10_048 * 64 * 128 * 4


def test_a_host_without_gpus_and_uneven_groups_are_refused() -> None:
    with pytest.raises(DeployError, match="the roofline is fitted on GPUs; name one, as in 8xH800"):
        replica_speed(SMALL, RELEASED, parse_hardware("cpu"))
    with pytest.raises(DeployError, match="3 groups of experts do not divide 8 GPUs; use 8 "):
        speed_of((8, 3, "tp"))

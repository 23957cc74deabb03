"""What bench/peers_decode.py and bench/served_decode.py are made of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import pytest
from tokenizers import Tokenizer

from bench.decoding.ceilings import Ceilings
from bench.decoding.contenders import Contender, Kind, Opened
from bench.decoding.ds3 import DS3, made_once
from bench.decoding.growth import KV_FORMATS, Grown, Point
from bench.decoding.ours_worker import Ours
from bench.decoding.plot import batch_table, context_table
from bench.decoding.report import Run, rates, ratios
from bench.decoding.rounds import PREFILL, Figures, prompts, turns
from bench.decoding.traffic import Stored, of_groups, step_bytes
from bench.decoding.vocabulary import tokenizer_files
from bench.decoding.workers import Worker, WorkerError
from deepseek.engine.kv_cache import token_bytes
from deepseek.inventory import tensors


def test_ds3_has_the_parameters_that_its_figures_are_given_for() -> None:
    specs = list(tensors(DS3))
    active = DS3.num_experts_per_tok / DS3.n_routed_experts
    per_token = sum(
        spec.numel * (1 if spec.expert is None else active)
        for spec in specs
        if spec.role != "embed_tokens"
    )
    assert round(sum(spec.numel for spec in specs) / 1e6) == 706
    assert round(per_token / 1e6) == 189


def test_every_token_of_the_vocabulary_is_reached_by_a_merge_and_is_whole_text() -> None:
    size = 12_000
    tokenizer = Tokenizer.from_str(tokenizer_files(size, 64)["tokenizer.json"])
    assert tokenizer.get_vocab_size() == size
    for token in (258, 9_282, 9_283, size - 1):
        text = tokenizer.decode([token])
        assert text.isascii()
        assert text.isprintable()
        assert tokenizer.encode(text).ids == [token]
    assert len(tokenizer.decode([size - 1])) == 3


def test_a_vocabulary_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(AssertionError, match="do not hold all bytes"):
        tokenizer_files(257, 64)


def test_what_a_killed_process_left_is_made_again_and_what_is_whole_is_kept(
    tmp_path: Path,
) -> None:
    half = tmp_path / "thing.half"
    half.mkdir()
    (half / "of the killed").touch()

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    folder = made_once(tmp_path / "thing", make)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    made_once(folder, lambda _: pytest.fail("it is there already"))


def test_a_step_reads_the_experts_that_are_reached_and_every_sequence_its_own_context() -> None:
    stored = Stored(routed=3200, rest=1000, row=10, token=2)
    sizes = {"num_experts": 32, "per_token": 4, "context": 100}
    assert step_bytes(stored, batch=1, **sizes) == 1000 + 400 + 10 + 200
    two = 1000 + 3200 * (1 - (28 / 32) ** 2) + 2 * (10 + 200)
    assert step_bytes(stored, batch=2, **sizes) == pytest.approx(two)
    assert step_bytes(stored, batch=1000, **sizes) == pytest.approx(4200 + 1000 * 210)


def test_the_embedding_table_is_not_read_whole_and_the_cache_is_no_weight() -> None:
    groups = {"routed_experts": 50, "embeddings": 30, "attention": 7, "kv_cache": 1000}
    found = of_groups(groups, table=20, row=2, token=3)
    assert found == Stored(routed=50, rest=17, row=2, token=3)


def test_figures_are_medians_over_the_rounds_with_half_their_range() -> None:
    figures = Figures()
    for seconds in (1.0, 4.0, 2.0):
        figures.add("ours", 4, seconds)
    assert figures.median("ours", 4) == 2.0
    assert figures.spread("ours", 4) == 0.75
    assert figures.median("ours", 1) is None


def opened(kind: Kind) -> Opened:
    stored = Stored(routed=3200, rest=1000, row=10, token=2)
    return Opened(Contender(kind, "bf16"), cast(Worker, None), stored, [])


def test_all_take_turns_at_each_figure_and_none_always_follows_the_same() -> None:
    field = [opened("ours"), opened("llama.cpp"), opened("transformers")]
    order = [[(o.contender.kind, b) for o, b in turns(field, (1, 64), n)] for n in (0, 1)]
    ours, llama, transformers = "ours", "llama.cpp", "transformers"
    assert order[0][:6] == [
        *((ours, PREFILL), (llama, PREFILL), (transformers, PREFILL)),
        *((ours, 1), (llama, 1), (transformers, 1)),
    ]
    assert order[0][6:] == [(ours, 64), (llama, 64)]  # beyond what transformers is asked for
    assert order[1][:3] == [(llama, PREFILL), (transformers, PREFILL), (ours, PREFILL)]
    assert sorted(order[0]) == sorted(order[1])


def test_prompts_are_the_same_each_time_and_begin_differently() -> None:
    first = prompts(64, 16, 32000)
    assert first == prompts(64, 16, 32000)
    assert len({tuple(prompt[:2]) for prompt in first}) == 64
    assert prompts(1, 16, 32000, seed=1) != first[:1]


def test_a_rate_counts_all_sequences_and_a_share_all_bytes() -> None:
    figures = Figures()
    for batch, seconds in ((PREFILL, 2.0), (1, 0.1), (4, 0.2)):
        figures.add("ours int8", batch, seconds)
    figures.add("llama.cpp q8_0", 1, 0.2)
    found = Ceilings(threads=2, bandwidth={1: 1e4, 2: 4e4}, operations={"int8": 1e12})
    run = Run(
        names=["ours int8", "llama.cpp q8_0"],
        stored=dict.fromkeys(("ours int8", "llama.cpp q8_0"), opened("ours").stored),
        words=dict.fromkeys(("ours int8", "llama.cpp q8_0"), "so"),
        figures=figures,
        batches=(1, 4),
        context=100,
        ceilings=found,
        num_experts=32,
        per_token=4,
    )
    assert run.rate("ours int8", PREFILL) == 50
    assert run.rate("ours int8", 4) == 20
    assert run.share("ours int8", 1) == pytest.approx(1610 / 0.1 / 4e4)
    assert "| ours int8 | 50.0 ±0% | 10.0 ±0% | 20.0 ±0% |" in rates(run)
    assert "| llama.cpp q8_0 | - | 5.0 ±0% | - |" in rates(run)
    pairs = [("ours int8", "llama.cpp q8_0"), ("ours int4", "llama.cpp q8_0")]
    assert ratios(run, pairs).splitlines()[2:] == ["| ours int8 / llama.cpp q8_0 | - | 2.00x | - |"]


def test_growth_is_held_against_linear() -> None:
    points = [
        Point("int8", "bf16", batch, 512, seconds, batch * 512 * 7)
        for batch, seconds in ((1, 0.01), (2, 0.03), (4, 0.04))
    ]
    points.append(Point("int8", "bf16", 1, 2048, 0.02, 2048 * 7))
    assert batch_table(points).splitlines()[2] == "| int8, KV bf16 | 10.0 | 30.0 | 40.0 | 1.50 |"
    assert context_table(points).splitlines()[2] == "| int8, KV bf16 | 7 | 10.0 | 20.0 |"


def test_our_worker_decodes_over_contexts_that_it_computes_once(tiny_model: Path) -> None:
    ours = Ours()
    ours.open(
        str(tiny_model), is_engine=False, kv_cache=None, threads=1, batch=3, context=64, steps=4
    )
    contexts = prompts(3, 64, 512)
    ours.fill(contexts, [1, 3])
    before = ours.engine.current_load().computed_prompt_tokens
    for batch in (1, 3, 3):
        assert len(ours.decode(batch, steps=4)) == 4
    computed = ours.engine.current_load().computed_prompt_tokens - before
    assert 0 < computed <= 7 * 16, "at most the last page of each"
    assert ours.prefill(prompts(1, 64, 512, seed=9)[0]) > 0
    assert ours.engine.current_load().computed_prompt_tokens - before == computed + 64


def test_a_worker_that_ends_is_told_with_what_it_said(tmp_path: Path) -> None:
    code = "import sys; input(); print('{\"a\": 1}'); sys.exit('no memory')"
    with Worker([sys.executable, "-c", code], tmp_path / "log", {}, threads=1) as worker:
        assert worker.ask("open") == {"a": 1}
        with pytest.raises(WorkerError, match=r"prefill: the worker ended with 1:\nno memory"):
            worker.ask("prefill")


@pytest.mark.parametrize("kv_cache", KV_FORMATS)
def test_growth_steps_over_contexts_that_were_never_computed(
    kv_cache: str, tiny_model: Path
) -> None:
    grown = Grown()
    sizes = {"threads": 1, "tokens": 512, "batch": 2}
    size = grown.open(str(tiny_model), is_engine=False, kv_cache=kv_cache, **sizes)
    config = grown._engine.config
    layout = grown._engine._runner.cache.layout
    assert size == token_bytes(config, layout)
    free = grown._engine._pool.num_free
    assert grown.step(batch=2, context=40, steps=2) > 0
    assert grown.step(batch=1, context=300, steps=2) > 0
    assert grown._engine._pool.num_free == free

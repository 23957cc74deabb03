"""The home of a request, where it may spill over to, and its session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.admissions import status
from support.configs import make_config
from support.serving import make_request

from serve_app.config import EchoOptions, ServeConfig
from serve_app.engines.protocol import EngineInfo
from serve_app.errors import EngineUnavailable, InvalidRequest
from serve_app.routing.checks import most_requests
from serve_app.routing.homes import Pools, assign, session_of
from serve_app.sections import RoutingSection


def configured(**pools: dict[str, Any]) -> ServeConfig:
    sections = {name: {"engine": {"kind": "echo"}, **pool} for name, pool in pools.items()}
    return make_config(echo=EchoOptions(), pools=sections)


def info(tokens: int, kv: int | None = None, **more: Any) -> EngineInfo:
    told = status("r", kv=kv or tokens, max_model_len=tokens).info
    return replace(told, **more)


def test_the_home_is_the_pool_with_the_smallest_limit_that_holds_the_request() -> None:
    sections = configured(long={}, b={}, a={"max_request_tokens": 100}).pools
    pools = Pools.of(sections, {"long": info(900), "b": info(500), "a": info(500)})
    assert [pools.route(n) for n in (1, 100, 101, 500, 501)] == [
        ("a",),
        ("a",),
        ("b",),
        ("b",),
        ("long",),
    ]
    assert (pools.largest.tokens, pools.largest.holder) == (900, "model's context")


def test_of_equal_pools_the_first_in_the_file_is_the_home() -> None:
    infos = {"y": info(500), "x": info(500)}
    assert Pools.of(configured(y={}, x={}).pools, infos).route(5) == ("y",)
    assert Pools.of(configured(x={}, y={}).pools, infos).route(5) == ("x",)


def test_a_limit_is_the_smallest_of_what_is_configured_and_what_the_engine_holds() -> None:
    sections = configured(a={"max_request_tokens": 300}).pools
    held = [(info(900), 300), (info(900, kv=200), 200), (info(100), 100), (None, 300)]
    for told, limit in held:
        pools = Pools.of(sections, {} if told is None else {"a": told})
        assert pools.largest.tokens == limit
        with pytest.raises(InvalidRequest, match=f"holds {limit}") as refused:
            pools.route(limit + 1)
        assert refused.value.code == "context_length_exceeded"


def test_it_spills_over_in_order_to_those_that_can_hold_it() -> None:
    sections = configured(
        a={"spill_over": ["c", "b"]}, b={"max_request_tokens": 50}, c={}, d={"spill_over": ["a"]}
    ).pools
    infos = {name: info(100 + index) for index, name in enumerate("abcd")}
    pools = Pools.of(sections, infos)
    assert pools.route(60) == ("a", "c")
    assert pools.route(40) == ("b",)
    assert pools.route(103) == ("d",), "its pool to spill over to is too small"


def test_what_only_an_unknown_pool_could_hold_is_to_be_sent_again() -> None:
    sections = configured(short={}, long={}).pools
    pools = Pools.of(sections, {"short": info(100)})
    assert pools.route(100) == ("short",)
    with pytest.raises(EngineUnavailable, match="no engine of pool long has told yet"):
        pools.route(101)


def test_pages_are_those_of_the_pool_with_the_largest() -> None:
    sections = configured(a={}, b={}).pools
    infos = {"a": info(100, page_tokens=16), "b": info(100, page_tokens=64)}
    assert Pools.of(sections, infos).page_tokens == 64
    assert Pools.of(sections, {}).page_tokens == 1


def test_all_sequences_of_a_request_go_where_its_longest_can() -> None:
    pools = Pools.of(configured(a={}, b={}).pools, {"a": info(50), "b": info(500)})
    short, long = make_request("ab", max_tokens=8), make_request("ab" * 30, max_tokens=8)
    made = assign([short, long], pools, RoutingSection(), session=None, arrived=3.0)
    assert [(one.pools, one.arrived) for one in made] == [(("b",), 3.0)] * 2
    assert [one.prompt_ids for one in made] == [short.prompt_ids, long.prompt_ids]


def test_the_head_of_a_prompt_is_hashed_in_whole_pages() -> None:
    routing = RoutingSection(affinity_head_tokens=20)

    def session(text: str, page_tokens: int = 8) -> str:
        return session_of(make_request(text), routing, None, None, page_tokens)

    assert session("a" * 16 + "bcd") == session("a" * 16) != session("a" * 15 + "b")
    assert session("a" * 15) == session("a" * 8) != session("a" * 16)
    assert session("a" * 7) == "", "no page of it can be shared"
    assert session("a" * 64, page_tokens=64) != "", "a page is the least"


def test_a_header_of_any_form_is_a_session() -> None:
    request = make_request("x")
    names = ("a", "\u00e9", "x" * 9000, "\udce9")
    found = {session_of(request, RoutingSection(), name, None, 1) for name in names}
    assert {len(one) for one in found} == {32}
    assert len(found) == len(names)


def test_a_request_has_no_more_choices_than_its_home_and_where_that_spills_over_to_hold() -> None:
    small = {"replicas": 1, "max_ongoing_requests": 2}
    config = configured(
        a={**small, "spill_over": ["b"]}, b={"replicas": 3, "max_ongoing_requests": 4}, c=small
    )
    admission = config.admission.model_copy(update={"max_queued_requests": 10})
    assert most_requests(config, admission) == 2 + 12 + 10

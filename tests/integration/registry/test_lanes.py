"""Lanes: a request that finds a queued job of its lane joins it (Q-30, Q-31)."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import InvalidParams
from mothball.registry import encode
from tests.integration.registry.support import TASK, Bench

_NUMBERS = itertools.count(1)


@pytest.fixture
def lane(bench: Bench) -> Bench:
    bench.workspace("o/r#1")
    return bench


def join(bench: Bench, *requests: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the one job that answers `requests`, submitted in this order to an empty lane."""
    name = f"lane{next(_NUMBERS)}"
    jobs = [bench.registry.jobs.submit(TASK, args, workspace="o/r#1", lane=name) for args in requests]
    assert {each.job.id for each in jobs} == {jobs[0].job.id}
    assert [each.joined for each in jobs] == [False] + [True] * (len(jobs) - 1)
    return bench.registry.jobs.get(jobs[0].job.id).args


def test_q31_union_of_files_or_of_flags_max_of_numbers_later_text(lane: Bench) -> None:
    joined = join(
        lane,
        {"paths": ["b", "a", "b"], "full": False, "verify": True, "at": 7, "options": {"profile": "full"}, "note": "one"},
        {"paths": ["c", "a"], "full": True, "verify": False, "at": 5, "options": {}, "note": "two"},
    )
    assert joined == {
        "paths": ["a", "b", "c"],
        "full": True,
        "verify": True,
        "at": 7,
        "options": {"profile": "full"},
        "note": "two",
    }


@pytest.mark.parametrize("requests", [[{"paths": None}, {"paths": ["a"]}], [{"paths": ["a"]}, {"paths": None}]])
def test_q31_null_says_nothing_in_either_order(lane: Bench, requests: list[dict[str, Any]]) -> None:
    assert join(lane, *requests) == {"paths": ["a"]}, "a forced re-read must not be lost to a plain request"


def test_q31_empty_lists_stay_lists_and_missing_names_are_filled_in(lane: Bench) -> None:
    assert join(lane, {"paths": []}, {"paths": []}, {"full": True}) == {"paths": [], "full": True}
    assert join(lane, {}, {}) == {}
    assert join(lane, {"paths": []}, {"paths": ["x"]}) == {"paths": ["x"]}


def test_q31_names_of_any_bytes_survive_joining(lane: Bench) -> None:
    odd = [
        b"caf\xe9".decode("utf-8", "surrogateescape"),
        "café",
        'quo"te',
        "back\\slash",
        "new\nline",
        "a/b",
        "a b",
        "a",
        "\u2028",
        "😀",
        "\x7f",
    ]
    assert sorted(join(lane, {"paths": odd[::2]}, {"paths": odd[1::2]}, {"paths": odd})["paths"]) == sorted(odd)


def test_q31_plain_lists_are_sorted_by_value(lane: Bench) -> None:
    paths = ["a", "a b", "a/b", "a.b", "é", "z", "Z", "a\x01"]
    joined = join(lane, {"paths": paths[:4]}, {"paths": paths[4:]})["paths"]
    assert [p for p in joined if p != "a\x01"] == sorted(p for p in paths if p != "a\x01")


_FILES = st.lists(st.text('ab/ é"\\\udce9', max_size=3), max_size=4)
_ARGS = st.fixed_dictionaries(
    {},
    optional={
        "paths": st.none() | _FILES,
        "full": st.booleans(),
        "at": st.integers(-(2**60), 2**60),
        "note": st.text(max_size=3),
        "mixed": st.none() | st.booleans() | st.integers(0, 9) | _FILES | st.text("xy", max_size=2),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=_ARGS, b=_ARGS, c=_ARGS)
def test_q31_joining_is_associative_and_idempotent(lane: Bench, a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    assert join(lane, join(lane, a, b), c) == join(lane, a, join(lane, b, c)) == join(lane, a, b, c)
    once = join(lane, a)
    assert join(lane, a, a) == once
    assert join(lane, a, b, b) == join(lane, a, b)


_ITEMS = st.lists(
    st.text('ab"\\/ é\udce9\n', max_size=6) | st.integers(-30, 30) | st.lists(st.text("ab", max_size=1), max_size=2), max_size=8
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ITEMS, _ITEMS)
def test_q31_server_and_client_sort_alike(lane: Bench, a: list[Any], b: list[Any]) -> None:
    assert join(lane, {"paths": a}, {"paths": b}) == json.loads(encode.lane_arguments({"paths": a + b})[0])


@settings(max_examples=40, deadline=None)
@given(_ARGS)
def test_q31_the_parts_say_the_same_as_the_text(args: dict[str, Any]) -> None:
    text, parts = encode.lane_arguments(args)
    decoded = json.loads(text)
    assert {name: sorted(set(value)) if isinstance(value, list) else value for name, value in args.items()} == {
        name: sorted(value) if isinstance(value, list) else value for name, value in decoded.items()
    }
    assert [json.loads(name) for name, _, _ in json.loads(parts)] == list(decoded)


def test_q30_a_request_that_comes_after_the_start_gets_a_run_of_its_own(lane: Bench) -> None:
    first = lane.submit(lane="capture")
    assert lane.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").joined
    claim = lane.claim(first.id)
    assert not lane.raw.exists(lane.key("lane:capture:o/r#1"))
    second = lane.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture")
    assert not second.joined
    assert second.job.id != first.id
    # the end of the first run must not free the lane that the second job holds now
    lane.registry.jobs.finish(first.id, claim.fence, {})
    third = lane.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture")
    assert third.joined
    assert third.job.id == second.job.id


def test_lanes_of_other_workspaces_tasks_and_names_are_apart(lane: Bench) -> None:
    lane.workspace("o/r#2")
    jobs = {
        lane.submit(lane="capture").id,
        lane.submit("o/r#2", lane="capture").id,
        lane.submit(lane="other").id,
        lane.registry.jobs.submit("image.prune", {}, workspace="o/r#1", lane="capture").job.id,
        lane.submit().id,
        lane.submit().id,
    }
    assert len(jobs) == 6


def test_a_lane_without_workspace_belongs_to_its_queue(lane: Bench) -> None:
    lane.registry.hosts.heartbeat("h2", {})
    one, two, three = (lane.submit(None, lane="prune", host=host).id for host in ("h1", "h2", "h1"))
    assert one == three != two


def test_a_cancelled_job_leaves_its_lane(lane: Bench) -> None:
    first = lane.submit(lane="capture")
    lane.registry.jobs.cancel(first.id)
    assert not lane.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").joined


def test_of_many_requests_at_once_all_are_answered_by_one_job(lane: Bench) -> None:
    def submit(n: int) -> str:
        return lane.submit(args={"paths": [f"f{n}"]}, lane="capture").id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(submit, range(40)))
    assert len(ids) == 1
    job = lane.registry.jobs.get(ids.pop())
    assert job.args["paths"] == sorted(f"f{n}" for n in range(40))
    assert job.joined == 39
    assert (lane.counter("jobs_submitted"), lane.counter("jobs_joined")) == (1, 39)


def test_a_union_past_the_limit_becomes_a_job_of_its_own(lane: Bench) -> None:
    first = lane.submit(args={"paths": [f"{n:0200}" for n in range(700)]}, lane="capture")
    second = lane.registry.jobs.submit(TASK, {"paths": [f"x{n:0200}" for n in range(700)]}, workspace="o/r#1", lane="capture")
    assert not second.joined
    assert len(lane.registry.jobs.get(first.id).args["paths"]) == 700
    assert len(second.job.args["paths"]) == 700


def test_arguments_that_are_no_json_are_refused(lane: Bench) -> None:
    for args in ({"a": object()}, {"a": float("nan")}, {"a": b"x"}, ["a"], {1: 2}, {"a": "\ud800"}):
        for name in (None, "capture"):
            with pytest.raises(InvalidParams):
                lane.registry.jobs.submit(TASK, args, workspace="o/r#1", lane=name)  # type: ignore[arg-type]
    assert lane.registry.jobs.list() == []


def test_joining_again_and_again_asks_for_few_doorbells(lane: Bench) -> None:
    now = lane.registry.time_ms()
    rung = []
    for second in range(0, 40, 2):
        with lane.at(now + second * 1000) as registry:
            if registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").ring:
                rung.append(second)
    assert rung == [0, 16, 32]


def test_a_known_job_is_rung_again_only_while_it_is_queued_and_quiet(lane: Bench) -> None:
    now = lane.registry.time_ms()

    def ring(at: int) -> bool:
        with lane.at(now + at) as registry:
            return registry.jobs.submit(TASK, {}, workspace="o/r#1", job_id="mine").ring

    assert [ring(at) for at in (0, 14_999, 15_000, 16_000)] == [True, False, True, False]
    with lane.at(now + 40_000) as registry:
        fence = registry.jobs.claim("mine", host="h1", worker="w", lease_ms=1000).fence
        assert not ring(41_000)
        registry.jobs.fail("mine", fence, code="busy", message="x", retryable=True)
    assert not ring(42_000), "its retry has a time of its own"


def test_a_request_for_a_host_that_is_away_rings_once(lane: Bench) -> None:
    now = lane.registry.time_ms()
    with lane.at(now + 60_000) as registry:
        assert registry.hosts.check().went_offline == ["h1"]
        assert registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").ring
    with lane.at(now + 160_000) as registry:
        assert not registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").ring


def test_requests_whose_options_differ_do_not_join(lane: Bench) -> None:
    jobs = lane.registry.jobs

    def submit(args: dict[str, Any]) -> str:
        return jobs.submit(TASK, args, workspace="o/r#1", lane="capture").job.id

    plain = submit({"full": False})
    full = {"options": {"profile": "full", "max_files": 5}}
    assert submit(full) == plain
    for args in ({}, {"options": {}}, {"options": None}, {"options": {"max_files": 5, "profile": "full"}}):
        assert submit(args) == plain
    assert jobs.get(plain).args["options"] == full["options"]
    other = submit({"options": {"profile": "light"}})
    assert other != plain
    assert submit({}) == other
    assert (jobs.get(plain).args["options"], jobs.get(other).args["options"]) == (full["options"], {"profile": "light"})


@pytest.mark.parametrize("name", [None, "capture"])
def test_arguments_nested_deeper_than_any_reader_are_refused(lane: Bench, name: str | None) -> None:
    def nested(levels: int) -> dict[str, Any]:
        value: Any = []
        for _ in range(levels - 2):
            value = [value]
        return {"note": value}

    for levels in (33, 975, 5000):
        with pytest.raises(InvalidParams):
            lane.registry.jobs.submit(TASK, nested(levels), workspace="o/r#1", lane=name)
    job = lane.registry.jobs.submit(TASK, nested(32), workspace="o/r#1", lane=name).job
    assert job.args == nested(32)
    with lane.at(lane.registry.time_ms() + 20_000) as registry:
        assert [bell.job for bell in registry.jobs.ring()] == [job.id]

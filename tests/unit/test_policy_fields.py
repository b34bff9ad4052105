"""What a policy may say, at which level, and how levels add up: mistakes are refused before anything obeys them."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.durations import show
from mothball.errors import ConfigError, InvalidParams
from mothball.policy import FIELDS, FOREIGN, SIGNALS, Level, Policy, check, merge, parse_text, to_dict
from mothball.settings import Settings

HOUR, DAY = 3_600_000, 86_400_000
LEVELS: tuple[Level, ...] = get_args(Level)
SECONDS = st.integers(1, 10**6).map(lambda seconds: show(seconds * 1000))
DURATION = SECONDS | st.just("never")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("ttl", "idle_ttl", "max_age", "stop_after", "presence_limit", "stranded_for", "notice_before"), DURATION),
    "stop_grace": st.integers(1, 600).map(lambda seconds: f"{seconds}s"),
    "max_extensions": st.integers(0, 100),
    "git_guard": st.booleans(),
    "purge": st.booleans(),
    "signals": st.lists(st.sampled_from(SIGNALS), min_size=1),
    "cpu_busy": st.integers(1, 100) | st.floats(0.25, 100),
    "cap": st.integers(1, 10**6) | st.just("never"),
    "budget": st.integers(1, 2**50) | st.sampled_from(["10GiB", "500M", "never"]),
}
POLICIES = st.fixed_dictionaries({}, optional=VALUES)


def test_b71_b72_n30_d74_without_a_policy_the_defaults_of_the_rows_hold() -> None:
    """24 h from creation, 100 workspaces, auto-stop off, stranded for 4 h (6.1)."""
    policy = merge()
    assert policy == Policy() == merge(parse_text(Settings.model_fields["policy"].default))
    assert (policy.ttl, policy.cap, policy.stranded_for) == (24 * HOUR, 100, 4 * HOUR)
    assert policy.stop_after is policy.idle_ttl is policy.max_age is policy.budget is policy.notice_before is None
    assert policy.git_guard
    assert not policy.purge
    assert set(VALUES) == set(FIELDS)


@given(POLICIES)
def test_what_check_accepts_merge_reads_and_json_carries(raw: dict[str, Any]) -> None:
    checked = check(raw, "fleet")
    assert json.loads(json.dumps(checked)) == checked
    assert check(checked, "fleet") == checked
    policy = merge(checked, strict=False)
    assert merge(to_dict(policy), strict=False) == policy
    assert check(to_dict(policy), "fleet") == to_dict(policy)


@given(
    st.dictionaries(
        st.sampled_from((*FIELDS, "ttll", "")), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    )
)
def test_any_mapping_is_a_policy_or_refused_with_one_clear_error(raw: dict[str, Any]) -> None:
    for level in LEVELS:
        try:
            merge(check(raw, level), strict=False)
        except InvalidParams as error:
            assert error.message.startswith("policy: ")


@pytest.mark.parametrize(
    "name", ["ttl", "idle_ttl", "max_age", "stop_after", "presence_limit", "stranded_for", "notice_before", "stop_grace"]
)
@pytest.mark.parametrize("value", ["0s", "-1h", 0, -5, 3600, "soon", "", None, True, "101w1y", [], {}])
def test_issue_point_1_durations_of_zero_negative_and_plain_numbers_are_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidParams, match=name):
        check({name: value}, "workspace")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_grace", "never"), ("stop_grace", "11m"), ("max_extensions", -1), ("max_extensions", "3"), ("max_extensions", True),
        ("git_guard", "yes"), ("purge", 1), ("signals", []), ("signals", "touch"), ("signals", ["stats"]),
        ("signals", ["register"]),
        ("signals", [["touch"]]), ("cpu_busy", 0), ("cpu_busy", -1), ("cpu_busy", float("nan")), ("cpu_busy", float("inf")),
        ("cpu_busy", "10"), ("cap", 0), ("cap", -1), ("cap", 1.0), ("cap", None), ("cap", 10**40), ("budget", 0), ("budget", "0"),
        ("budget", -5), ("budget", "big"), ("Ttl", "1h"), ("ttl ", "1h"), (5, "1h"),
    ],
)  # fmt: skip
def test_wrong_values_and_unknown_fields_are_refused_by_name(name: Any, value: object) -> None:
    with pytest.raises(InvalidParams, match=str(name)):
        check({name: value}, "fleet")
    with pytest.raises(InvalidParams, match=str(name)):  # what the registry holds is not believed either
        merge({name: value}, strict=False)


@pytest.mark.parametrize("raw", [None, "ttl=1h", ["ttl"], 5])
def test_a_policy_that_is_no_mapping_is_refused(raw: object) -> None:
    with pytest.raises(InvalidParams, match="mapping"):
        check(raw, "fleet")


def test_q10_a_budget_is_the_fleets_and_a_cap_the_fleets_or_a_repos() -> None:
    allowed = {(name, level) for name in ("cap", "budget") for level in LEVELS if _accepted({name: 5}, level)}
    assert allowed == {("cap", "fleet"), ("cap", "repo"), ("budget", "fleet")}
    for name in set(FIELDS) - {"cap", "budget"}:
        assert all(_accepted({name: to_dict(Policy())[name]}, level) for level in LEVELS)


def _accepted(raw: dict[str, Any], level: Level) -> bool:
    try:
        check(raw, level)
    except InvalidParams:
        return False
    return True


def test_the_keys_of_others_in_a_workspaces_policy_are_left_alone_and_mean_nothing_elsewhere() -> None:
    raw = {"ttl": "1h", "retention": "last=3", "capture": {"max_files": 1}}
    assert check(raw, "workspace") == {"ttl": "1h"}
    assert merge(raw) == Policy(ttl=HOUR)
    for name in FOREIGN:
        with pytest.raises(InvalidParams, match=name):
            check({name: raw[name]}, "fleet")


@given(POLICIES, POLICIES, POLICIES)
def test_the_closest_level_that_says_something_wins_field_by_field(
    fleet: dict[str, Any], repo: dict[str, Any], own: dict[str, Any]
) -> None:
    policy, defaults = merge(fleet, repo, own, strict=False), Policy()
    for name in FIELDS:
        level = next((level for level in (own, repo, fleet) if name in level), None)
        expected = getattr(defaults if level is None else merge({name: level[name]}, strict=False), name)
        assert getattr(policy, name) == expected


@pytest.mark.parametrize(
    ("levels", "blamed"),
    [
        ([{"stop_after": "2h", "idle_ttl": "2h"}], "idle_ttl"),
        ([{"stop_after": "24h"}], "the default"),
        ([{"ttl": "24h"}, {"stop_after": "3d"}], "ttl"),
        ([{"ttl": "never", "stop_after": "2h", "max_age": "1h"}], "max_age"),
        ([{"idle_ttl": "7d"}], "the default"),
        ([{"ttl": "never", "max_age": "1d"}, {}, {"idle_ttl": "2d"}], "max_age"),
        ([{"max_age": "1d"}, {"ttl": "7d"}], "max_age"),
        ([{"ttl": "1h", "notice_before": "1h"}], "ttl"),
        ([{"stop_after": "10m"}, {"notice_before": "15m"}], "stop_after"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_both_fields_and_a_way_out(levels: list[dict[str, Any]], blamed: str) -> None:
    with pytest.raises(InvalidParams, match=blamed) as caught:
        merge(*levels)
    assert "never" in caught.value.message
    merge(*levels, strict=False)  # what was accepted once is still obeyed when a weaker level changes below it


@pytest.mark.parametrize(
    "levels",
    [
        [{"stop_after": "1h", "idle_ttl": "2h", "ttl": "3h", "max_age": "4h", "notice_before": "10m"}],
        [{"ttl": "24h", "idle_ttl": "2h"}, {}, {"ttl": "1h"}],
        [{"stop_after": "2h"}, {"max_age": "1h"}],
        [{"notice_before": "1h"}, {}, {"ttl": "30m"}],
        [{"ttl": "never", "idle_ttl": "30d", "stop_after": "29d"}],
    ],
)  # fmt: skip
def test_a_closer_level_may_shorten_what_a_weaker_one_says(levels: list[dict[str, Any]]) -> None:
    assert merge(*levels) == merge(*levels, strict=False)


def test_rules_that_do_not_apply_to_persistent_ones_contradict_nothing_there() -> None:
    assert merge({"ttl": "1h", "stop_after": "2h"}, mode="persistent").stop_after == 2 * HOUR
    with pytest.raises(InvalidParams, match="max_age"):
        merge({"max_age": "1h", "stop_after": "2h"}, mode="persistent")


def test_the_text_form_reads_every_field() -> None:
    text = (
        "ttl=never,idle_ttl=2h,max_age=30d,stop_after=90m,stop_grace=30s,presence_limit=12h,stranded_for=4h,notice_before=10m, "
        "max_extensions=0 ,git_guard=off,purge=TRUE,signals=file+touch,cpu_busy=2.5,cap=never,budget=10GiB"
    )
    found = parse_text(text)
    assert set(found) == set(FIELDS)
    assert merge(check(found, "fleet")) == Policy(
        ttl=None, idle_ttl=2 * HOUR, max_age=30 * DAY, stop_after=5_400_000, stop_grace=30_000, presence_limit=12 * HOUR,
        stranded_for=4 * HOUR, notice_before=600_000, max_extensions=0, git_guard=False, purge=True, signals=("touch", "file"),
        cpu_busy=2.5, cap=None, budget=10 << 30,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "ttl", "ttl=", "=24h", "ttl=24h,", "ttl=24h,,cap=5", "ttl=1h,ttl=2h", "tll=1h", "cap=0", "cap=-1", "cap=1_0",
        "cap=\u0663", "cap=1.5", "cap=" + "9" * 5000, "cpu_busy=1e3", "cpu_busy=nan", "git_guard=maybe", "signals=touch+", "ttl=0s",
        "ttl=24", "budget=0", "all",
    ],
)  # fmt: skip
def test_texts_that_say_nothing_twice_or_wrong_are_refused(text: str) -> None:
    with pytest.raises(InvalidParams, match="policy: ") as caught:
        parse_text(text)
    assert len(caught.value.message) < 400  # it names all fields and repeats no novel


@pytest.mark.parametrize("text", ["ttl=0h", "nonsense", "", "ttl=24h,retention=all", "stop_after=2d", "ttl=1h,cap=ten"])
def test_the_setting_is_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(ConfigError, match=r"MOTHBALL_POLICY: .*policy"):
        Settings.load(policy=text)


def test_the_setting_may_switch_everything_off() -> None:
    text = "ttl=never,cap=never"
    assert Settings.load(policy=text).policy == text
    assert merge(parse_text(text)) == Policy(ttl=None, cap=None)

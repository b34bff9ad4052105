"""The commands about a workspace's life on a real Redis: what they say, what they print as JSON, and how they end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mothball.client import Fleet
from mothball.policy import FIELDS, RULES
from mothball.settings import Settings
from tests.commands import Answer, beside_jobs
from workers.redis_server import RedisServer

ID, REPO = "owner/repo#1", "owner/repo"
Cli = Callable[..., Answer]


@pytest.fixture
def fleet(make_settings: Callable[..., Settings], redis_server: RedisServer) -> Iterator[Fleet]:
    """A fleet whose host has announced itself and has one workspace."""
    with Fleet(settings=make_settings()) as found:
        found.registry.hosts.heartbeat(found.settings.host, {})
        found.register(ID, found.settings.workspace_roots[0], agent_id="a-1", intent="fix\x1b[2J it")
        yield found


@pytest.fixture
def mothball(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line beside that fleet."""
    return beside_jobs(fleet.settings, monkeypatch, capsys)


def refused(answer: Answer, code: str, exit_code: int) -> str:
    """The message of a command that failed in one clear line."""
    assert (answer.code, answer.out) == (exit_code, ""), answer
    first, *rest = answer.err.splitlines()
    assert first.startswith(f"error: {code}: "), answer.err
    assert all(line.startswith(("hint: ", "note: ")) for line in rest)
    return first


def set_state(fleet: Fleet, state: str, workspace: str = ID) -> None:
    """Put a record into a state as the jobs of a host would."""
    registry = fleet.registry
    if state == "stranded":
        facts = registry.lifecycle.facts([workspace])[0]
        assert facts is not None
        assert registry.lifecycle.strand(facts, reason="heartbeats") == "done"
        return
    claim = registry.jobs.claim(fleet.stop(workspace).id, host=fleet.settings.host, worker="w", lease_ms=30_000)
    assert claim.status == "run"
    job = claim.job.id if claim.job else ""
    assert registry.lifecycle.stopped(workspace, job=job, fence=claim.fence, rule="asked") == "done"
    registry.jobs.finish(job, claim.fence, {})


# -- sessions ------------------------------------------------------------------------------------------------------------


def test_d01_sessions_are_exactly_eight_keys_sorted_and_one_can_be_left_out(mothball: Cli, fleet: Fleet) -> None:
    fleet.register("owner/repo#2", fleet.settings.workspace_roots[0])
    found = mothball("sessions", REPO, "--json").json()
    assert [each["session_id"] for each in found] == [ID, "owner/repo#2"]
    assert list(found[0]) == [
        "session_id", "agent_id", "agent_name", "intent", "repo_id", "changeset_id", "state", "elapsed_secs"
    ]  # fmt: skip
    assert [each["session_id"] for each in mothball("sessions", REPO, "--exclude", ID, "--json").json()] == ["owner/repo#2"]
    text = mothball("sessions", REPO).out
    assert "agent-1" in text
    assert "\x1b" not in text
    assert mothball("sessions", "owner/other").out == "nobody works in owner/other\n"
    assert mothball("sessions", "owner/other", "--json").json() == []


# -- hold, pin, mark -----------------------------------------------------------------------------------------------------


def test_a_hold_needs_a_reason_and_is_lifted_one_by_one_or_all_at_once(mothball: Cli, fleet: Fleet) -> None:
    assert mothball("hold", ID).code == 2
    assert "needs a reason" in refused(mothball("hold", ID, "--reason", " "), "invalid_params", 2)
    assert mothball("hold", ID, "--reason", "looking at it", "--by", "ann").out == f"{ID} is held: looking at it\n"
    record = mothball("hold", ID, "--reason", "legal", "--json").json()
    first, second = record["holds"]
    assert (first["reason"], first["by"], second["reason"]) == ("looking at it", "ann", "legal")
    assert second["by"]
    assert f"{first['id']}: looking at it (by ann)" in mothball("show", ID).out
    assert mothball("unhold", ID, "--hold", first["id"]).out == f"{ID} is still held: 1 other hold\n"
    refused(mothball("unhold", ID, "--hold", first["id"]), "not_found", 1)
    assert mothball("unhold", ID).out == f"{ID} is held no longer\n"
    assert fleet.get(ID).holds == []


def test_d03_mark_moves_along_the_allowed_ways_only(mothball: Cli, fleet: Fleet) -> None:
    assert mothball("mark", ID, "submitted").out == f"{ID} is submitted\n"
    assert fleet.explain(ID).decision.rule == "submitted"
    assert mothball("mark", ID, "active", "--json").json()["state"] == "active"
    refused(mothball("mark", ID, "merged"), "invalid_transition", 1)
    assert "must be one of" in refused(mothball("mark", ID, "stopped"), "invalid_params", 2)
    mothball("mark", ID, "submitted")
    assert mothball("mark", ID, "merged").code == 0


# -- stop, resume, touch -------------------------------------------------------------------------------------------------


def test_stop_is_a_job_of_the_workspaces_host_with_what_it_saw(mothball: Cli, fleet: Fleet) -> None:
    job = mothball("stop", ID, "--no-wait", "--force", "--reason", "weekend", "--by", "ann", "--json").json()["job"]
    record = fleet.job_record(job)
    assert (record.task, record.workspace, record.queue) == ("workspace.stop", ID, f"host.{fleet.settings.host}")
    now = fleet.get(ID)
    assert record.args == {
        "workspace": ID, "rule": "asked", "detail": "weekend", "by": "ann", "force": True, "generation": 0,
        "last_active": now.last_active,
    }  # fmt: skip
    refused(mothball("stop", "nobody", "--no-wait"), "not_found", 1)


def test_d73_resume_brings_a_stopped_one_back_and_says_when_there_is_nothing_to_do(mothball: Cli, fleet: Fleet) -> None:
    set_state(fleet, "stopped")
    assert mothball("resume", ID, "--json").json()["workspace"]["state"] == "active"
    assert mothball("resume", ID).out == f"{ID} is active; it was already\n"
    assert fleet.registry.counters.all()["resumed:ok"] == 1


def test_d73_a_stranded_one_goes_on_with_its_own_agent_only(mothball: Cli, fleet: Fleet) -> None:
    set_state(fleet, "stranded")
    assert "belongs to agent a-1" in refused(mothball("resume", ID, "--agent-id", "a-2"), "stranded", 1)
    refused(mothball("resume", ID), "stranded", 1)
    answer = mothball("resume", ID, "--agent-id", "a-1", "--json").json()
    assert (answer["outcome"], answer["workspace"]["state"]) == ("ok", "active")


def test_touch_resume_brings_a_stopped_one_back_and_touch_alone_does_not(mothball: Cli, fleet: Fleet) -> None:
    set_state(fleet, "stopped")
    assert mothball("touch", ID).code == 0
    assert fleet.get(ID).state == "stopped"
    answer = mothball("touch", ID, "--resume", "--signal", "exec", "--json")
    assert answer.json()["resumed"] is True
    assert "was stopped, and is active again" in answer.err
    assert fleet.get(ID).state == "active"
    assert mothball("touch", ID, "--resume", "--json").json()["resumed"] is False


# -- evict, undelete, purge ----------------------------------------------------------------------------------------------


def test_evict_leaves_a_tombstone_that_explain_knows_and_undelete_brings_back(mothball: Cli, fleet: Fleet) -> None:
    assert "`mothball undelete owner/repo#1` brings it back within 7d" in mothball("evict", ID, "--by", "ann").out
    refused(mothball("evict", ID), "gone", 1)
    refused(mothball("show", ID), "gone", 1)
    told = mothball("explain", ID, "--json").json()
    assert (told["state"], told["reason"], told["by"]) == ("evicted", "asked", "ann")
    assert "way back" in mothball("explain", ID).out
    back = mothball("undelete", ID)
    assert back.code == 0, back.err
    assert back.out.startswith(f"{ID} is back on {fleet.settings.host}, stopped; ")
    assert fleet.get(ID).agent_id == "a-1"
    assert fleet.registry.counters.all()["evicted:asked"] == 1
    refused(mothball("evict", "nobody"), "not_found", 1)


def test_undelete_brings_a_released_workspace_back_too(mothball: Cli, fleet: Fleet) -> None:
    assert mothball("release", ID).code == 0
    answer = mothball("undelete", ID, "--json").json()
    assert (answer["record"]["state"], answer["registered"], answer["refs"]) == ("stopped", True, [])


def test_undelete_after_the_id_was_registered_again_touches_nothing(mothball: Cli, fleet: Fleet) -> None:
    mothball("evict", ID)
    fleet.register(ID, fleet.settings.workspace_roots[0] / "other")
    refused(mothball("undelete", ID), "not_found", 1)
    assert fleet.get(ID).state == "active"


@pytest.mark.parametrize(
    ("protect", "says", "forced"),
    [
        (("hold", ID, "--reason", "mine"), "mothball unhold", False),
        (("mark", ID, "submitted"), "mothball mark", False),
        (("pin", ID, "--reason", "keep"), "--force", True),
        (("capture", ID), "--force", True),
    ],
)
def test_what_protects_a_workspace_refuses_an_eviction_and_says_what_to_do(
    mothball: Cli, fleet: Fleet, protect: tuple[str, ...], says: str, forced: bool
) -> None:
    assert mothball(*protect).code == 0
    assert says in refused(mothball("evict", ID), "busy", 75)
    assert fleet.get(ID).id == ID
    answer = mothball("evict", ID, "--force")
    assert (answer.code == 0) is forced, answer


def test_presence_and_a_running_job_refuse_an_eviction_force_ends_the_first_only(mothball: Cli, fleet: Fleet) -> None:
    fleet.heartbeat(ID, "me")
    assert "me works in it" in refused(mothball("evict", ID), "busy", 75)
    claim = fleet.registry.jobs.claim(fleet.capture(ID).id, host=fleet.settings.host, worker="w", lease_ms=30_000)
    assert "mothball jobs" in refused(mothball("evict", ID, "--force"), "busy", 75)
    assert claim.job is not None
    fleet.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert mothball("evict", ID, "--force").code == 0


def test_purge_by_force_needs_the_second_word_before_anything_is_asked(mothball: Cli, fleet: Fleet) -> None:
    assert "--i-know" in refused(mothball("purge", ID, "--force"), "invalid_params", 2)
    assert fleet.jobs(workspace=ID) == []
    job = mothball("purge", ID, "--force", "--i-know", "--by", "ann", "--no-wait", "--json").json()["job"]
    args = fleet.job_record(job).args
    assert (args["force"], args["i_know"], args["dry_run"], args["by"]) == (True, True, False, "ann")
    job = mothball("purge", ID, "--dry-run", "--no-wait", "--json").json()["job"]
    assert fleet.job_record(job).args["dry_run"] is True


# -- policy --------------------------------------------------------------------------------------------------------------


def test_policy_shows_every_field_with_the_level_it_comes_from(mothball: Cli, fleet: Fleet) -> None:
    assert mothball("policy", "set", "stop_after=2h", "idle_ttl=12h", "--repo", REPO).code == 0
    told = mothball("policy", "--repo", REPO, "--json").json()
    assert set(told["effective"]) == set(FIELDS)
    assert told["effective"]["stop_after"] == {"value": "2h", "from": f"repo {REPO}"}
    assert told["effective"]["ttl"] == {"value": "1d", "from": "setting"}
    assert told["effective"]["stop_grace"] == {"value": "10s", "from": "default"}
    assert mothball("policy", "--json").json()["effective"]["stop_after"]["value"] == "never"
    text = mothball("policy").out
    assert f"repo {REPO}" in text
    assert "stop_after=2h,idle_ttl=12h" in text


def test_policy_set_changes_only_what_it_names_and_unset_takes_it_away(mothball: Cli, fleet: Fleet) -> None:
    def own() -> Any:
        return mothball("policy", "--json").json()["fleet"]

    mothball("policy", "set", "stop_after=2h", "cap=50")
    assert mothball("policy", "set", "stop_after=90m", "signals=touch+exec").code == 0
    assert own() == {"stop_after": "90m", "cap": 50, "signals": ["touch", "exec"]}
    mothball("policy", "unset", "cap")
    assert own() == {"stop_after": "90m", "signals": ["touch", "exec"]}
    mothball("policy", "unset")
    assert own() == {}


def test_policy_of_a_workspace_keeps_its_retention(mothball: Cli, fleet: Fleet) -> None:
    fleet.set_retention(ID, "last=3")
    told = mothball("policy", "set", "ttl=2h", "--workspace", ID, "--json").json()
    assert (told["own"], told["effective"]["ttl"]) == ({"ttl": "2h"}, {"value": "2h", "from": "workspace"})
    assert fleet.get(ID).policy == {"retention": "last=3", "ttl": "2h"}
    mothball("policy", "unset", "--workspace", ID)
    assert fleet.get(ID).policy == {"retention": "last=3"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("set", "ttl=0s"), "ttl"),
        (("set", "ttl=-1h"), "ttl"),
        (("set", "ttl=24"), "ttl"),
        (("set", "tll=24h"), "unknown field"),
        (("set", "stop_after=4h", "idle_ttl=2h"), "less than"),
        (("set", "cap=5", "--workspace", ID), "cap"),
        (("set", "budget=5GiB", "--repo", REPO), "budget"),
        (("set",), "needs rules"),
        (("unset", "tll"), "unknown field"),
        (("show", "ttl"), "set"),
        (("drop",), "use one of"),
        (("set", "ttl=1h", "--repo", REPO, "--workspace", ID), "not both"),
    ],
)
def test_a_wrong_policy_is_refused_in_one_line_and_changes_nothing(
    mothball: Cli, fleet: Fleet, argv: tuple[str, ...], says: str
) -> None:
    assert says in refused(mothball("policy", *argv), "invalid_params", 2)
    assert fleet.registry.policies.book().fleet == {}
    assert fleet.registry.policies.book().repos == {}
    assert fleet.get(ID).policy == {}


# -- explain, forecast, sweep --------------------------------------------------------------------------------------------


def test_explain_names_every_rule_with_its_result_each_signal_with_its_age_and_what_comes_next(mothball: Cli, fleet: Fleet) -> None:
    fleet.set_policy("stop_after=2h,ttl=24h")
    fleet.touch(ID, "exec")
    told = mothball("explain", ID, "--json").json()
    assert [each["rule"] for each in told["rules"]] == list(RULES)
    assert told["next"]["action"] == "stop"
    assert 7_100_000 < told["next"]["in_ms"] <= 7_200_001
    assert "exec" in [each["signal"] for each in told["signals"]]
    text = mothball("explain", ID).out
    assert "stop in 1h 59m" in text
    for rule in RULES:
        assert rule in text
    refused(mothball("explain", "nobody"), "not_found", 1)


def test_explain_at_another_time_says_what_would_be_then(mothball: Cli, fleet: Fleet) -> None:
    told = mothball("explain", ID, "--at", "25h", "--json").json()
    assert (told["action"], told["rule"]) == ("evict", "ttl")


def test_forecast_says_what_would_be_done_then_and_writes_nothing(mothball: Cli, fleet: Fleet) -> None:
    before = snapshot(fleet)
    assert mothball("forecast", "--at", "23h").out.startswith("nothing is due at ")
    plan = mothball("forecast", "--at", "25h", "--json").json()
    assert [(each["workspace"], each["action"], each["rule"]) for each in plan["items"]] == [(ID, "evict", "ttl")]
    assert "nothing was changed" in mothball("forecast", "--at", "25h").out
    assert snapshot(fleet) == before
    for wrong in ("yesterday", "never", "0h", "2001-01-01T00:00Z", "5"):
        refused(mothball("forecast", "--at", wrong), "invalid_params", 2)
    assert mothball("forecast", "--at", "2999-01-01T00:00Z", "--json").code == 0


def snapshot(fleet: Fleet) -> dict[str, bytes]:
    """Every key of the registry and its content."""
    with fleet.registry.workspaces._connection.guard() as client:
        names = sorted(client.scan_iter(f"{fleet.settings.namespace}:*"))
        return {name: client.dump(name) for name in names if ":host" not in name}


def due_now(fleet: Fleet, count: int) -> list[str]:
    """Workspaces that the next sweep evicts."""
    names = [f"old-{number}" for number in range(count)]
    for name in names:
        fleet.register(name, fleet.settings.workspace_roots[0], expires_in_ms=1)
    return names


def test_a_dry_sweep_prints_the_plan_and_changes_nothing_a_real_one_does_it(mothball: Cli, fleet: Fleet) -> None:
    names = due_now(fleet, 3)
    fleet.pin("old-1")
    before = snapshot(fleet)
    plan = mothball("sweep", "--dry-run", "--json").json()
    assert sorted(each["workspace"] for each in plan["items"]) == ["old-0", "old-2"]
    assert plan["skipped"] == {"pin": 1}
    text = mothball("sweep", "--dry-run").out
    assert "deadline" in text
    assert "2 of them; nothing was changed" in text
    assert snapshot(fleet) == before
    report = mothball("sweep", "--json").json()
    assert report["evicted"] == {"deadline": 2}
    assert report["skipped"] == {"pin": 1}
    assert mothball("sweep").out == "nothing was due that could be reclaimed\nkept       1: pin\n"
    assert fleet.registry.counters.all()["evicted:deadline"] == 2
    assert {event.fields["workspace"] for event in fleet.registry.events.list(kind="workspace.evicted")} == {"old-0", "old-2"}
    assert [record.id for record in fleet.list()] == [ID, names[1]]


def test_b72_a_sweep_evicts_the_oldest_until_the_cap_is_kept(mothball: Cli, fleet: Fleet) -> None:
    for name in ("w2", "w3", "w4"):
        fleet.register(name, fleet.settings.workspace_roots[0])
    fleet.set_policy("cap=2")
    assert [each["workspace"] for each in mothball("sweep", "--dry-run", "--json").json()["items"]] == [ID, "w2"]
    assert "cap" in mothball("explain", ID).out
    assert mothball("sweep", "--json").json()["evicted"] == {"cap": 2}
    assert [record.id for record in fleet.list()] == ["w3", "w4"]


def test_a_sweep_asks_the_host_to_stop_what_is_idle_and_twice_is_one_job(mothball: Cli, fleet: Fleet) -> None:
    fleet.set_policy("stop_after=1s", workspace=ID)
    time.sleep(1.2)
    report = mothball("sweep", "--json").json()
    assert report["stopping"] == {"stop_after": 1}
    [job] = report["jobs"]
    assert fleet.job_record(job).task == "workspace.stop"
    again = mothball("sweep", "--json").json()
    assert [each.id for each in fleet.jobs(workspace=ID)] == [job]
    assert again["evicted"] == {}


# -- runtime -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["stats", "health", "ping", "ports"])
def test_n32_asking_what_runs_is_a_job_of_the_host_and_no_sign_of_life(mothball: Cli, fleet: Fleet, command: str) -> None:
    before = fleet.get(ID)
    job = mothball(command, ID, "--no-wait", "--json").json()["job"]
    record = fleet.job_record(job)
    assert (record.task, record.args) == (f"workspace.{command}", {"host": fleet.settings.host, "workspace": ID})
    assert record.workspace is None
    assert fleet.get(ID) == before
    refused(mothball(command, "nobody"), "not_found", 1)


def test_register_takes_a_policy_a_process_and_a_container(mothball: Cli, fleet: Fleet, tmp_path: Any) -> None:
    answer = mothball("register", "a", "--path", str(tmp_path), "--pid", str(os.getpid()), "--policy", "ttl=2h,stop_after=1h")
    assert answer.code == 0, answer.err
    record = fleet.get("a")
    assert (record.runtime["driver"], record.runtime["pid"]) == ("process", os.getpid())
    assert record.policy == {"ttl": "2h", "stop_after": "1h"}
    assert mothball("register", "b", "--path", str(tmp_path), "--runtime", "runc:box-7").code == 0
    assert fleet.get("b").runtime == {"driver": "runc", "container": "box-7"}
    for wrong in (("--runtime", "runc"), ("--runtime", "odd:x"), ("--runtime", "process:7"), ("--pid", "7", "--runtime", "runc:x")):
        refused(mothball("register", "c", "--path", str(tmp_path), *wrong), "invalid_params", 2)
    refused(mothball("register", "c", "--path", str(tmp_path), "--policy", "ttl=0h"), "invalid_params", 2)


# -- status --------------------------------------------------------------------------------------------------------------


def test_n30_status_warns_until_auto_stop_is_set_somewhere(mothball: Cli, fleet: Fleet) -> None:
    def warned() -> bool:
        return any("auto-stop is off" in text for text in mothball("status", "--json").json()["warnings"])

    assert warned()
    mothball("policy", "set", "stop_after=2h", "--repo", REPO)
    assert not warned()
    mothball("policy", "unset", "--repo", REPO)
    assert warned()
    mothball("policy", "set", "stop_after=2h")
    assert not warned()


def test_an_unreadable_policy_is_told_and_reclaims_nothing(mothball: Cli, fleet: Fleet) -> None:
    due_now(fleet, 1)
    with fleet.registry.workspaces._connection.guard() as client:
        client.hset(f"{fleet.settings.namespace}:policies", "fleet", "{broken")
    assert any("nothing is reclaimed" in text for text in mothball("status", "--json").json()["warnings"])
    refused(mothball("sweep"), "invalid_params", 2)
    assert fleet.get("old-0").state == "active"


@pytest.mark.parametrize(
    "argv",
    [
        ("sessions", REPO), ("hold", ID, "--reason", "r"), ("unhold", ID), ("mark", ID, "merged"), ("stop", ID), ("resume", ID),
        ("evict", ID), ("purge", ID), ("policy",), ("sweep", "--dry-run"), ("explain", ID), ("forecast", "--at", "1h"),
        ("stats", ID), ("touch", ID, "--resume"),
    ],
)  # fmt: skip
def test_without_redis_every_command_is_unavailable(mothball: Cli, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    monkeypatch.setenv("MOTHBALL_REDIS_URL", "redis://127.0.0.1:1")
    answer = mothball(*argv, "--json")
    assert (answer.code, answer.out) == (69, "")
    assert json.loads(answer.err)["error"]["code"] == "unavailable"

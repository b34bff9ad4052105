"""maintenance.stop_stale on a real Redis: idle ones are asked to stop, missed ones strand, stranded ones are abandoned; notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tasks.notice  # noqa: F401  # declares the job that is delivered below
from tasks.lifecycle import reconcile, sweep_expired
from tests.integration.delivery import deliver
from tests.integration.sweeping import DAY, HOUR, MINUTE, SECOND, Sweeping

# -- auto-stop ---------------------------------------------------------------------------------------------------------


def test_n30_nothing_is_stopped_unless_somebody_says_after_how_long(fleet: Sweeping) -> None:
    fleet.policy(ttl="never")
    fleet.add("w", 30 * DAY)
    assert fleet.stale() == {
        "stopped": 0, "stranded": {}, "abandoned": {}, "noticed": 0, "skipped": {}, "remaining": 0,
    }  # fmt: skip
    assert fleet.state("w") == "active"
    fleet.policy(ttl="never", stop_after="2h30m")
    assert fleet.stale()["stopped"] == 1


def test_n32_idle_at_the_limit_stays_and_a_millisecond_later_goes(fleet: Sweeping) -> None:
    fleet.policy(stop_after="2h")
    fleet.add("w")
    active = fleet.registry.workspaces.get("w").last_active
    assert fleet.plan("stop", now=active + 2 * HOUR).items == []
    [item] = fleet.plan("stop", now=active + 2 * HOUR + 1).items
    assert (item.decision.action, item.decision.rule) == ("stop", "stop_after")


def test_n32_a_touch_keeps_it_and_looking_at_it_does_not(fleet: Sweeping) -> None:
    fleet.policy(stop_after="2h")
    for name in ("touched", "watched"):
        fleet.add(name, 3 * HOUR)
    fleet.registry.workspaces.touch("touched")
    fleet.registry.workspaces.get("watched")
    fleet.registry.workspaces.list()
    fleet.facts("watched")
    fleet.set("watched", **{"sig:stats": fleet.now})
    assert fleet.stale()["stopped"] == 1
    assert [job.args["workspace"] for job in fleet.jobs("workspace.stop")] == ["watched"]


def test_n33_a_stop_is_a_job_of_the_host_that_knows_what_was_seen(fleet: Sweeping) -> None:
    fleet.policy(stop_after="2h")
    fleet.add("w", 3 * HOUR)
    record = fleet.registry.workspaces.get("w")
    assert fleet.stale()["stopped"] == 1
    [job] = fleet.jobs("workspace.stop")
    assert (job.queue, job.lane, job.origin, job.workspace) == ("host.h1", "stop", "beat", "w")
    assert {name: job.args[name] for name in ("generation", "last_active", "rule", "force", "by")} == {
        "generation": record.generation, "last_active": record.last_active, "rule": "stop_after", "force": False, "by": "policy",
    }  # fmt: skip
    assert "stop_after=2h" in job.args["detail"]
    assert fleet.state("w") == "active", "the sweep decides; the host stops"


def test_n33_it_is_asked_once_while_the_job_waits_and_again_when_it_came_to_nothing(fleet: Sweeping) -> None:
    fleet.policy(stop_after="2h")
    fleet.add("w", 3 * HOUR)
    fleet.stale()
    fleet.age("w", 2 * MINUTE)
    assert fleet.stale()["skipped"] == {"queued": 1}
    [job] = fleet.jobs("workspace.stop")
    fleet.registry.jobs.cancel(job.id)
    fleet.age("w", 2 * MINUTE)
    assert fleet.stale()["stopped"] == 1
    assert len(fleet.jobs("workspace.stop")) == 2


@pytest.mark.parametrize("state", ["submitted", "stopped", "stranded"])
def test_n32_only_an_active_one_is_stopped(fleet: Sweeping, state: str) -> None:
    fleet.policy(stop_after="2h", ttl="never", stranded_for="never")
    fleet.add("w", 3 * HOUR)
    fleet.set("w", state=state)
    assert fleet.stale()["stopped"] == 0


def test_n34_reconcile_asks_each_host_that_is_online_once(fleet: Sweeping) -> None:
    fleet.registry.hosts.heartbeat("h2", {})
    assert reconcile(fleet.here) == {"asked": 2, "joined": 0, "failed": 0}
    assert reconcile(fleet.here) == {"asked": 0, "joined": 2, "failed": 0}
    assert sorted((job.host, job.queue) for job in fleet.jobs("runtime.reconcile")) == [("h1", "host.h1"), ("h2", "host.h2")]


# -- strand and abandon ------------------------------------------------------------------------------------------------


def test_heartbeats_that_end_without_goodbye_strand_it_and_its_state_is_captured(fleet: Sweeping) -> None:
    """Missing is not idle: its idle time is far below any limit."""
    fleet.policy(stop_after="2h", idle_ttl="8h")
    for name in ("missed", "left", "there"):
        fleet.add(name)
        fleet.registry.presence.heartbeat(name, "agent-1", 5 * SECOND)
    fleet.registry.presence.goodbye("left", "agent-1")
    for name in ("missed", "left"):
        fleet.age(name, MINUTE)
    done = fleet.stale()
    assert (done["stranded"], done["stopped"]) == ({"heartbeats": 1}, 0)
    assert [fleet.state(name) for name in ("missed", "left", "there")] == ["stranded", "active", "active"]
    [event] = fleet.events("workspace.stranded")
    assert (event.fields["workspace"], event.fields["reason"], event.fields["holders"]) == ("missed", "heartbeats", "agent-1")
    assert fleet.counters("stranded:") == {"stranded:heartbeats": 1}
    assert fleet.jobs("workspace.capture") == []
    [report] = fleet.jobs("workspace.crash_report")
    assert report.args["workspace"] == report.workspace == "missed"
    assert (report.args["title"], report.args["package"], report.args["auto"]) == ("stranded: heartbeats", False, True)
    fleet.age("missed", 2 * MINUTE)
    assert fleet.stale()["stranded"] == {}
    assert len(fleet.jobs("workspace.crash_report")) == 1


def test_without_automatic_reports_a_stranded_one_is_captured(make_fleet: Callable[..., Sweeping]) -> None:
    fleet = make_fleet(auto_crash_report="off")
    fleet.add("missed")
    fleet.registry.presence.heartbeat("missed", "agent-1", 5 * SECOND)
    fleet.age("missed", MINUTE)
    assert fleet.stale()["stranded"] == {"heartbeats": 1}
    assert [job.args for job in fleet.jobs("workspace.capture")] == [{"workspace": "missed"}]
    assert fleet.jobs("workspace.crash_report") == []


def test_d74_d72_a_stranded_one_is_abandoned_after_4_hours_and_then_evicted(fleet: Sweeping) -> None:
    fleet.policy(ttl="never")
    fleet.add("w")
    fleet.registry.presence.heartbeat("w", "agent-1", SECOND)
    fleet.age("w", MINUTE)
    fleet.stale()
    fleet.registry.jobs.cancel(fleet.jobs("workspace.crash_report")[0].id)
    since = fleet.registry.workspaces.get("w").state_since
    assert fleet.plan("stop", now=since + 4 * HOUR).items == []
    assert [item.decision.action for item in fleet.plan("stop", now=since + 4 * HOUR + 1).items] == ["abandon"]
    assert fleet.sweep()["evicted"] == {}, "a stranded one is resumed or abandoned, and nothing else"
    fleet.age("w", 5 * HOUR)
    assert fleet.stale()["abandoned"] == {"auto_ttl": 1}
    assert fleet.state("w") == "abandoned"
    assert fleet.sweep()["evicted"] == {"abandoned": 1}
    assert fleet.counters("abandoned:") == {"abandoned:auto_ttl": 1}
    assert len(fleet.events("workspace.abandoned")) == len(fleet.events("workspace.evicted")) == 1


# -- notices -----------------------------------------------------------------------------------------------------------


def hook(folder: Path, answer: str) -> str:
    file = folder / "hook.py"
    file.write_text(f"import sys; open({str(folder / 'asked')!r}, 'a').write(sys.stdin.read() + '\\n'); {answer}")
    return f"{sys.executable} {file}"


def asked(folder: Path) -> int:
    return len((folder / "asked").read_text().splitlines())


def announced(fleet: Sweeping) -> list[tuple[str, str]]:
    return [(event.fields["workspace"], event.fields["action"]) for event in fleet.events("workspace.notice")]


def test_a_notice_comes_once_before_an_eviction_and_before_a_stop(fleet: Sweeping) -> None:
    fleet.policy(ttl="10h", stop_after="2h", notice_before="30m")
    fleet.add("evict", 9 * HOUR + 45 * MINUTE, idle=MINUTE)
    fleet.add("stop", HOUR + 45 * MINUTE)
    fleet.add("neither", HOUR)
    done, stale = fleet.sweep(), fleet.stale()
    assert done["evicted"] == {}
    assert stale["stopped"] == 0
    assert sorted(announced(fleet)) == [("evict", "evict"), ("stop", "stop")]
    [event] = [event for event in fleet.events("workspace.notice") if event.fields["workspace"] == "evict"]
    assert event.fields["rule"] == "ttl"
    for _ in range(2):
        fleet.sweep()
        fleet.stale()
    assert len(announced(fleet)) == 2
    assert fleet.counters("notices:") == {"notices:evict": 1, "notices:stop": 1}
    assert fleet.jobs("workspace.notice") == [], "nobody is asked without a hook"


def test_what_was_announced_happens_at_its_time_and_not_before(fleet: Sweeping) -> None:
    fleet.policy(ttl="10h", notice_before="30m")
    fleet.add("w", 9 * HOUR + 45 * MINUTE)
    fleet.sweep()
    due = int(fleet.events("workspace.notice")[0].fields["due"])
    assert fleet.plan("evict", now=due - 1).items == []
    assert [item.facts.id for item in fleet.plan("evict", now=due).items] == ["w"]


def test_a_veto_puts_it_off_as_often_as_the_policy_allows(make_fleet: Callable[..., Sweeping], tmp_path: Path) -> None:
    fleet = make_fleet(notice_hook=hook(tmp_path, 'print(\'{"extend": "1h"}\')'))
    fleet.policy(ttl="10h", notice_before="30m", max_extensions=2)
    fleet.add("w", 9 * HOUR + 45 * MINUTE)
    untils = []
    for _ in range(2):
        fleet.sweep()
        job = fleet.jobs("workspace.notice")[-1]
        assert (job.queue, job.args["action"], job.args["rule"]) == ("control", "evict", "ttl")
        outcome = deliver(job)
        assert outcome["answer"] == "extended"
        untils.append(outcome["until"])
        assert outcome["until"] == job.args["due"] + HOUR
        fleet.raw.hincrby(fleet.key("ws:w"), "created_at", -HOUR)
        fleet.raw.hincrby(fleet.key("ws:w"), "extended_until", -HOUR)
        fleet.raw.zadd(fleet.key("ws:due:evict"), {"w": fleet.now - 1})
    fleet.sweep()
    refused = deliver(fleet.jobs("workspace.notice")[-1])
    assert refused["answer"] == "refused"
    assert "max_extensions=2" in refused["reason"]
    assert asked(tmp_path) == 3
    assert len(fleet.events("workspace.extended")) == 2
    assert len(fleet.events("workspace.veto_refused")) == 1
    assert len({job.id for job in fleet.jobs("workspace.notice")}) == 3


def test_a_veto_whose_job_died_after_it_counted_is_no_second_one_and_not_refused(
    make_fleet: Callable[..., Sweeping], tmp_path: Path
) -> None:
    fleet = make_fleet(notice_hook=hook(tmp_path, 'print(\'{"extend": "1h"}\')'))
    fleet.policy(ttl="10h", notice_before="30m", max_extensions=1)
    fleet.add("w", 9 * HOUR + 45 * MINUTE)
    fleet.sweep()
    [job] = fleet.jobs("workspace.notice")
    until = job.args["due"] + HOUR
    assert fleet.registry.lifecycle.extend(fleet.facts("w"), until, "notice_hook", 1)
    outcome = deliver(job)
    assert (outcome["answer"], outcome["until"]) == ("extended", until)
    assert (fleet.registry.workspaces.get("w").extensions, fleet.events("workspace.veto_refused")) == (1, [])


@pytest.mark.parametrize("answer", ["print('maybe?')", "raise SystemExit(1)", 'print(\'{"extend": "never"}\')'])
def test_a_hook_that_fails_or_prints_garbage_is_told_and_vetoes_nothing(
    make_fleet: Callable[..., Sweeping], tmp_path: Path, answer: str
) -> None:
    fleet = make_fleet(notice_hook=hook(tmp_path, answer))
    fleet.policy(ttl="10h", notice_before="30m")
    fleet.add("w", 9 * HOUR + 45 * MINUTE)
    fleet.sweep()
    outcome = deliver(fleet.jobs("workspace.notice")[0])
    assert (outcome["answer"], asked(tmp_path)) == ("failed", 1)
    [event] = fleet.events("workspace.notice_failed")
    assert (event.fields["workspace"], event.fields["reason"]) == ("w", outcome["reason"])
    assert fleet.registry.workspaces.get("w").extensions == 0
    fleet.raw.hincrby(fleet.key("ws:w"), "created_at", -HOUR)
    fleet.set("w", noticed=f'{{"evict": {fleet.now - 1}}}')
    fleet.raw.zadd(fleet.key("ws:due:evict"), {"w": fleet.now - 1})
    assert fleet.sweep()["evicted"] == {"ttl": 1}


def test_one_announcement_asks_the_hook_once_however_many_sweeps_run_at_once(
    make_fleet: Callable[..., Sweeping], tmp_path: Path
) -> None:
    fleet = make_fleet(notice_hook=hook(tmp_path, "pass"))
    fleet.policy(ttl="10h", notice_before="30m")
    for number in range(20):
        fleet.add(f"w{number}", 9 * HOUR + 45 * MINUTE)
    results = fleet.at_once(sweep_expired, 4)
    assert sum(done["noticed"] for done in results) == 20
    assert len(announced(fleet)) == len(fleet.jobs("workspace.notice")) == 20

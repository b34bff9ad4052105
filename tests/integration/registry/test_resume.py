"""Stranded, abandoned, resumed (D-71 to D-73, D-76); a stopped workspace that is registered again comes back to work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mothball import errors
from mothball.errors import Abandoned, AlreadyExists, Gone, InvalidParams, NotFound, ResumeContended, Stranded
from mothball.policy import Facts
from tests.integration.registry.support import HOST, Bench


def facts(bench: Bench, ident: str = "o/r#1") -> Facts:
    found = bench.registry.lifecycle.facts([ident])[0]
    assert found is not None
    return found


def strand(bench: Bench, ident: str = "o/r#1", reason: str = "explicit") -> str:
    return bench.registry.lifecycle.strand(facts(bench, ident), reason=reason)


def stop(bench: Bench, ident: str = "o/r#1") -> None:
    job = bench.registry.jobs.submit("workspace.stop", {}, workspace=ident, origin="beat").job.id
    claim = bench.claim(job)
    assert bench.registry.lifecycle.stopped(ident, job=job, fence=claim.fence, rule="stop_after") == "done"
    bench.registry.jobs.finish(job, claim.fence, {})


def counters(bench: Bench, prefix: str) -> dict[str, int]:
    return {name: value for name, value in bench.registry.counters.all().items() if name.startswith(prefix)}


@pytest.mark.parametrize("reason", ["idle_ttl", "cleanup_disconnected", "startup_reconcile", "explicit", "heartbeats"])
def test_d71_stranding_keeps_its_first_reason_and_counts_once(bench: Bench, reason: str) -> None:
    bench.workspace("o/r#1", agent_id="a")
    assert strand(bench, reason=reason) == "done"
    assert strand(bench, reason="explicit") == "changed"
    record = bench.registry.workspaces.get("o/r#1")
    assert (record.state, record.state_reason) == ("stranded", reason)
    assert counters(bench, "stranded:") == {f"stranded:{reason}": 1}
    assert [each.fields["reason"] for each in bench.registry.events.list(kind="workspace.stranded")] == [reason]


def test_d71_only_what_works_is_stranded_and_only_what_is_stranded_is_abandoned(bench: Bench) -> None:
    bench.workspace("o/r#1")
    assert bench.registry.lifecycle.abandon(facts(bench), reason="auto_ttl") == "changed"
    stop(bench)
    assert strand(bench) == "changed"
    assert bench.registry.workspaces.get("o/r#1").state == "stopped"
    assert counters(bench, "stranded:") == counters(bench, "abandoned:") == {}


def test_d72_an_abandoned_one_is_evicted_and_late_callers_hear_gone(bench: Bench) -> None:
    bench.workspace("o/r#1", agent_id="a")
    strand(bench)
    assert bench.registry.lifecycle.abandon(facts(bench), reason="auto_ttl") == "done"
    assert bench.registry.lifecycle.abandon(facts(bench), reason="admin") == "changed"
    assert counters(bench, "abandoned:") == {"abandoned:auto_ttl": 1}
    assert bench.registry.lifecycle.resume("o/r#1", agent_id="a").outcome == "abandoned"
    with pytest.raises(Abandoned) as caught:
        bench.workspace("o/r#1", agent_id="a")
    assert caught.value.code == "abandoned"
    assert bench.registry.lifecycle.evict(facts(bench), rule="abandoned") == "done"
    with pytest.raises(Gone):
        bench.registry.lifecycle.resume("o/r#1", agent_id="a")
    with pytest.raises(NotFound):
        bench.registry.lifecycle.resume("never")


def test_d71_nobody_is_stranded_while_somebody_is_there_or_a_job_waits(bench: Bench) -> None:
    bench.workspace("o/r#1")
    seen = facts(bench)
    bench.registry.presence.heartbeat("o/r#1", "p", 60_000)
    assert bench.registry.lifecycle.strand(seen, reason="explicit") == "changed"
    bench.workspace("o/r#2")
    seen = facts(bench, "o/r#2")
    bench.submit("o/r#2")
    assert bench.registry.lifecycle.strand(seen, reason="explicit") == "changed"
    bench.workspace("o/r#3")
    seen = facts(bench, "o/r#3")
    bench.run("o/r#3", origin="beat")
    assert bench.registry.lifecycle.strand(seen, reason="explicit") == "busy"
    assert bench.registry.sessions.states()["stranded"] == 0


def test_d73_a_stranded_one_comes_back_only_for_its_agent(bench: Bench) -> None:
    before = bench.workspace("o/r#1", agent_id="a1")
    strand(bench)
    resume = bench.registry.lifecycle.resume
    for other in ("a2", None, ""):
        assert resume("o/r#1", agent_id=other).outcome == "other_agent"
    with pytest.raises(Stranded) as caught:
        bench.workspace("o/r#1", agent_id="a2")
    assert "a1" in caught.value.message
    assert bench.registry.workspaces.get("o/r#1").state == "stranded"
    back = resume("o/r#1", agent_id="a1", by="me")
    assert (back.outcome, back.workspace.state, back.workspace.last_signal) == ("ok", "active", "resume")
    assert back.workspace.last_active == back.workspace.signals["resume"] >= before.last_active
    assert resume("o/r#1", agent_id="a1").outcome == "already_resumed"
    assert counters(bench, "resumed:") == {"resumed:already_resumed": 1, "resumed:ok": 1, "resumed:other_agent": 4}
    [event] = bench.registry.events.list(kind="workspace.resumed")
    assert (event.fields["from"], event.fields["by"], event.fields["agent_id"]) == ("stranded", "me", "a1")


def test_d73_a_stranded_one_without_agent_comes_back_for_whoever_names_none(bench: Bench) -> None:
    bench.workspace("o/r#1")
    strand(bench)
    assert bench.registry.lifecycle.resume("o/r#1", agent_id="x").outcome == "other_agent"
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "ok"


def test_d73_of_many_that_resume_at_once_exactly_one_does(bench: Bench) -> None:
    bench.workspace("o/r#1", agent_id="a")
    strand(bench)
    handles = [bench.another() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(lambda each: each.lifecycle.resume("o/r#1", agent_id="a").outcome, handles))
    assert answers == [*["already_resumed"] * 5, "ok"]


def test_d73_another_generation_is_contended_and_what_works_is_not_stranded(bench: Bench) -> None:
    bench.workspace("o/r#1")
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "not_stranded"
    stop(bench)
    assert bench.registry.lifecycle.resume("o/r#1", expect_generation=4).outcome == "contended"
    assert bench.registry.lifecycle.resume("o/r#1", expect_generation=0).outcome == "ok"
    bench.registry.lifecycle.transition("o/r#1", "submitted")
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "not_stranded"


@pytest.mark.parametrize("task", ["workspace.stop", "workspace.purge"])
def test_d73_while_a_job_ends_the_workspace_a_resume_is_contended(bench: Bench, task: str) -> None:
    bench.workspace("o/r#1")
    stop(bench)
    job = bench.registry.jobs.submit(task, {}, workspace="o/r#1", origin="beat").job.id
    claim = bench.claim(job)
    result = bench.registry.lifecycle.resume("o/r#1")
    assert (result.outcome, result.job, result.workspace.state) == ("contended", job, "stopped")
    with pytest.raises(ResumeContended) as caught:
        bench.workspace("o/r#1")
    assert (caught.value.retryable, caught.value.fields["job"]) == (True, job)
    bench.registry.jobs.finish(job, claim.fence, {})
    assert bench.workspace("o/r#1").state == "active"


def test_d73_a_capture_does_not_keep_a_workspace_from_coming_back(bench: Bench) -> None:
    bench.workspace("o/r#1")
    stop(bench)
    bench.run("o/r#1", origin="beat")
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "ok"


def test_n35_a_stopped_one_that_is_registered_again_comes_back_with_what_runs_there_now(bench: Bench) -> None:
    old = {"driver": "process", "pid": 100, "start_time": 5}
    new = {"driver": "process", "pid": 200, "start_time": 9}
    before = bench.workspace("o/r#1", title="one", runtime=old)
    stop(bench)
    record, created = bench.registry.workspaces.register("o/r#1", host=HOST, path="/ws/o/r#1", title="two", runtime=new)
    assert not created
    assert (record.state, record.state_reason, record.runtime, record.title) == ("active", "resume", new, "one")
    assert (record.created_at, record.registration) == (before.created_at, before.registration)
    assert counters(bench, "resumed:") == {"resumed:ok": 1}
    # what was started anew while it worked counts too, and is no event
    kinds = bench.kinds()
    assert bench.workspace("o/r#1", runtime=old).runtime == old
    assert bench.workspace("o/r#1").runtime == old
    assert bench.kinds() == kinds
    stop(bench)
    with pytest.raises(AlreadyExists):
        bench.workspace("o/r#1", path="/elsewhere")
    assert bench.registry.workspaces.get("o/r#1").state == "stopped"


@pytest.mark.parametrize(
    "runtime", [{"driver": "nonsense"}, {"driver": "process", "pid": 0}, {"pid": 5}, {"driver": "docker", "container": "-x"}]
)
def test_a_runtime_that_no_driver_can_read_is_refused_at_registration(bench: Bench, runtime: dict[str, object]) -> None:
    with pytest.raises(InvalidParams):
        bench.workspace("o/r#1", runtime=runtime)
    assert bench.registry.workspaces.count() == 0


def test_missing_once_is_not_missing_twice(bench: Bench) -> None:
    """Who did not say goodbye before a workspace was stranded or stopped is not waited for after it came back."""
    bench.workspace("o/r#1")
    bench.registry.presence.heartbeat("o/r#1", "lost", 1)
    with bench.at(bench.registry.time_ms() + 1000) as later:
        found = later.lifecycle.facts(["o/r#1"])[0]
        assert found is not None
        assert later.lifecycle.strand(found, reason="heartbeats") == "done"
        assert later.presence.holders("o/r#1") == {}
        [event] = later.events.list(kind="workspace.stranded")
        assert event.fields["holders"] == "lost"
        assert later.lifecycle.resume("o/r#1").outcome == "ok"
    assert facts(bench).present_until is None
    bench.registry.presence.heartbeat("o/r#1", "gone", 1)
    bench.registry.presence.heartbeat("o/r#1", "here", 60_000)
    stop(bench)
    with bench.at(bench.registry.time_ms() + 1000) as later:
        assert later.lifecycle.resume("o/r#1").outcome == "ok"
    assert list(bench.registry.presence.holders("o/r#1")) == ["here"]


def test_d76_each_refusal_has_a_code_of_its_own() -> None:
    for code, kind in {
        "stranded": Stranded, "abandoned": Abandoned, "resume_contended": ResumeContended, "already_resumed": errors.AlreadyResumed,
    }.items():  # fmt: skip
        made = errors.from_code(code, "text", id="x")
        assert (type(made), made.code, made.to_dict()["code"]) == (kind, code, code)


@pytest.mark.parametrize(
    ("runtime", "kept"),
    [({"driver": "process", "pid": 4242, "start_time": 1}, False), ({"driver": "systemd", "unit": "shop.service"}, True)],
)
def test_n35_what_was_stopped_comes_back_without_the_process_that_ended_and_with_its_unit(
    bench: Bench, runtime: dict[str, object], kept: bool
) -> None:
    bench.workspace("o/r#1", runtime=runtime)
    stop(bench)
    assert bench.registry.workspaces.get("o/r#1").runtime == runtime
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "ok"
    assert bench.registry.workspaces.get("o/r#1").runtime == (runtime if kept else {})


def test_d71_what_is_stranded_comes_back_with_the_process_that_may_still_run(bench: Bench) -> None:
    runtime = {"driver": "process", "pid": 4242, "start_time": 1}
    bench.workspace("o/r#1", runtime=runtime)
    assert strand(bench) == "done"
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "ok"
    assert bench.registry.workspaces.get("o/r#1").runtime == runtime

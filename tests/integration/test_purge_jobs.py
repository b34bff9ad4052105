"""workspace.purge on a real Redis, a real store and real directories (B-42, B-74, B-76, D-13; design, section 7)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import Ignore

from mothball.errors import Busy, Gone, InvalidParams, InvalidTransition, MothballError, PathNotAllowed, Unavailable, Unheld
from mothball.purge import put_back_interrupted
from mothball.purge import run as purge_run
from mothball.registry import Job
from mothball.settings import Settings
from mothball.store.restore import restore
from mothball.store.tree import Tree
from tasks import context, ending
from tests.integration.ending import ID, Host, ended
from tests.integration.test_stop_jobs import SLEEPS
from tests.support import eventually
from workers.redis_server import RedisServer

EXPIRED: dict[str, Any] = {"rule": "ttl", "detail": "older than its ttl", "by": "policy"}


@pytest.fixture
def host(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    found = Host(make_settings(fsync=False, redis_timeout=1.0), tmp_path / "tree")
    yield found
    found.close()


def there(host: Host) -> list[str]:
    """What is left beside the workspace: its directory, or what a purge made of it."""
    return sorted(name for name in os.listdir(host.folder.parent) if "tree" in name)


def git(folder: Path, *command: str) -> None:
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *who, *command], cwd=folder, env=environment, check=True, capture_output=True)


def test_d13_a_purge_deletes_the_directory_and_leaves_a_tombstone_with_the_receipt(host: Host) -> None:
    host.register()
    result = host.run("workspace.purge", by="me", detail="tidy")
    receipt = result["receipt"]
    assert (result["purged"], result["missing"], there(host)) == (True, [], [])
    assert (receipt["files"], receipt["directory"], receipt["generation"]) == (2, "deleted", 1)
    assert receipt["verified_at"] <= host.registry.time_ms()
    with pytest.raises(Gone):
        _ = host.record
    tomb = host.registry.lifecycle.tombstone(ID)
    assert tomb is not None
    assert (tomb["receipt"], tomb["reason"], tomb["by"]) == (receipt, "asked", "me")
    assert (tomb["digest"], tomb["generation"]) == (receipt["digest"], 1)
    counters = host.counters()
    assert (counters["evicted:asked"], counters["workspaces_purged"], counters["captures"]) == (1, 1, 1)
    (event,) = host.events("workspace.purged")
    assert (event.fields["by"], event.fields["path"]) == ("me", str(host.folder))
    assert host.registry.jobs.list(limit=1)[0].state == "succeeded"


def test_what_was_purged_comes_back_by_undelete_and_restore(host: Host) -> None:
    host.register()
    (host.folder / "a.txt").write_text("the last word\n")
    digest = host.run("workspace.purge")["receipt"]["digest"]
    record = host.registry.lifecycle.undelete(ID, "me")
    assert (record.state, record.digest, record.generation) == ("stopped", digest, 1)
    with Tree.open(host.store, digest) as tree:
        restore(tree, host.folder)
    assert (host.folder / "a.txt").read_text() == "the last word\n"


def test_b74_an_expired_workspace_is_purged_by_its_policy_and_what_is_used_again_is_not(host: Host) -> None:
    host.register(policy={"purge": True, "ttl": "1h"})
    kept = host.run("workspace.purge", **EXPIRED)
    assert (kept["purged"], there(host)) == (False, ["tree"])
    host.idle(7200)
    assert host.run("workspace.purge", **EXPIRED)["purged"]
    assert there(host) == []
    assert host.counters()["evicted:ttl"] == 1


def test_b76_what_is_held_pinned_submitted_or_worked_in_is_never_purged(host: Host) -> None:
    host.register(policy={"ttl": "1h"})
    host.idle(7200)
    lifecycle = host.registry.lifecycle
    force = {"force": True, "i_know": True}
    lifecycle.hold(ID, "legal", "me")
    with pytest.raises(Busy, match="legal"):
        host.run("workspace.purge", **force)
    assert not host.run("workspace.purge", **EXPIRED)["purged"]
    lifecycle.unhold(ID)
    lifecycle.transition(ID, "submitted")
    with pytest.raises(InvalidTransition, match="submitted"):
        host.run("workspace.purge", **force)
    lifecycle.transition(ID, "active")
    host.registry.presence.heartbeat(ID, "agent-7", 60_000)
    with pytest.raises(Busy, match="agent-7"):
        host.run("workspace.purge")
    host.registry.presence.goodbye(ID, "agent-7")
    host.registry.workspaces.pin(ID, "golden")
    with pytest.raises(Busy, match="golden"):
        host.run("workspace.purge")
    assert not host.run("workspace.purge", **EXPIRED)["purged"]
    assert there(host) == ["tree"]
    assert host.run("workspace.purge", **force)["purged"]


def test_what_no_capture_holds_refuses_and_is_named(host: Host) -> None:
    os.mkfifo(host.folder / "pipe")
    git(host.folder, "init", "-q")
    git(host.folder, "add", "a.txt")
    git(host.folder, "commit", "-qm", "x")
    host.register()
    with pytest.raises(Unheld) as caught:
        host.run("workspace.purge")
    assert "1 commit that no remote is known to have" in caught.value.message
    assert "pipe: is not captured: special (fifo)" in caught.value.message
    assert there(host) == ["tree"]
    job = host.registry.jobs.list(limit=1)[0]
    assert (job.state, job.error_code) == ("failed", "unheld")
    assert (host.record.generation, host.record.state) == (1, "active")  # the capture it made stays
    assert "workspaces_purged" not in host.counters()


def test_force_is_audited_with_who_and_what_was_missing_before_anything_goes(host: Host) -> None:
    os.mkfifo(host.folder / "pipe")
    host.register()
    with pytest.raises(InvalidParams, match="i_know"):
        host.run("workspace.purge", force=True)
    with pytest.raises(InvalidParams, match="never forces"):
        host.run("workspace.purge", force=True, i_know=True, rule="ttl")
    result = host.run("workspace.purge", force=True, i_know=True, by="me", detail="it is mine")
    assert result["missing"] == ["pipe: is not captured: special (fifo)"]
    (event,) = host.events("workspace.purge_forced")
    assert (event.fields["by"], event.fields["count"], event.fields["detail"]) == ("me", "1", "it is mine")
    assert "fifo" in event.fields["missing"]
    tomb = host.registry.lifecycle.tombstone(ID)
    assert tomb is not None
    assert tomb["receipt"]["forced"][0]["path"] == "pipe"
    assert there(host) == []


def test_force_deletes_what_cannot_be_captured_at_all(host: Host) -> None:
    host.register(policy={"capture": {"max_files": 1}})
    with pytest.raises(MothballError) as caught:
        host.run("workspace.purge")
    assert caught.value.code == "oversize"
    result = host.run("workspace.purge", force=True, i_know=True)
    assert (result["receipt"]["digest"], there(host)) == (None, [])
    assert any("could not be captured" in text for text in result["missing"])


def test_a_dry_run_says_what_is_missing_and_changes_nothing(host: Host) -> None:
    os.mkfifo(host.folder / "pipe")
    host.register(pinned=True)
    result = host.run("workspace.purge", dry_run=True)
    assert (result["purged"], result["dry_run"], result["uncaptured"]) == (False, True, 3)
    text = "; ".join(result["missing"])
    assert "pinned" in text
    assert "nothing of it was ever captured" in text
    assert "fifo" in text
    assert there(host) == ["tree"]
    assert (host.record.generation, host.store.refs(ID).exists) == (0, False)
    host.registry.workspaces.unpin(ID)
    (host.folder / "pipe").unlink()
    host.run("workspace.capture")
    assert host.run("workspace.purge", dry_run=True)["missing"] == []
    (host.folder / "a.txt").write_text("later")
    assert host.run("workspace.purge", dry_run=True)["uncaptured"] == 1


def test_processes_are_ended_first_by_a_policy_and_refuse_a_person(host: Host) -> None:
    process = host.start(SLEEPS, policy={"ttl": "1h", "purge": True})
    with pytest.raises(Busy, match="mothball stop"):
        host.run("workspace.purge")
    assert process.poll() is None
    assert any("stop it first" in text for text in host.run("workspace.purge", dry_run=True)["missing"])
    host.idle(7200)
    assert host.run("workspace.purge", **EXPIRED)["purged"]
    ended(process)
    assert there(host) == []


def test_a_process_that_nobody_registered_keeps_the_directory(host: Host) -> None:
    process = host.start(SLEEPS, runtime=False)
    host.register()
    job = host.submit("workspace.purge")
    with pytest.raises(BaseException, match="retried"):
        host.deliver(job)
    assert f"process {process.pid}" in (host.registry.jobs.get(job.id).error or "")
    assert there(host) == ["tree"]


def test_a_directory_that_is_gone_is_evicted_with_a_receipt_that_says_so(host: Host) -> None:
    host.register()
    host.run("workspace.capture")
    digest = host.record.digest
    host.folder.rename(host.folder.parent / "elsewhere")
    receipt = host.run("workspace.purge")["receipt"]
    assert (receipt["directory"], receipt["digest"], receipt["verified_at"]) == ("gone", digest, None)
    assert (host.folder.parent / "elsewhere" / "a.txt").exists()


def test_a_folder_that_holds_another_registered_workspace_is_not_purged_not_even_by_force(host: Host) -> None:
    host.register()
    inner = host.folder / "inner"
    inner.mkdir()
    host.fleet.register("o/r#2", inner)
    for args in ({}, {"force": True, "i_know": True}):
        with pytest.raises(PathNotAllowed, match="o/r#2"):
            host.run("workspace.purge", **args)
    assert inner.is_dir()


@pytest.mark.parametrize("what", ["touch", "hold", "presence", "registered inside", "registered around", "cancelled", "lease lost"])
def test_what_happens_in_the_last_moment_puts_the_directory_back(host: Host, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    host.register()
    job = host.submit("workspace.purge")
    real = purge_run.Purge._last_look

    def look(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        if what == "touch":
            host.idle(100)
        elif what == "hold":
            host.registry.lifecycle.hold(ID, "wait", "me")
        elif what == "presence":
            host.registry.presence.heartbeat(ID, "agent-7", 60_000)
        elif what == "registered inside":
            host.fleet.register("o/r#2", host.folder / "inner")
        elif what == "registered around":
            host.fleet.register("o/r#2", host.folder.parent)
        elif what == "cancelled":
            host.registry.jobs.cancel(job.id)
        else:
            host.registry.jobs.release_lost(job.id, host.registry.jobs.get(job.id).fence)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(purge_run.Purge, "_last_look", look)
        with pytest.raises(BaseException):  # noqa: B017 - each ends its own way; what counts is what is left
            host.deliver(job)
    assert there(host) == ["tree"]
    assert (host.folder / "a.txt").read_text() == "first\n"
    assert host.record.state == "active"


@pytest.mark.parametrize(
    "step", ["captured", "moved", "looked", "decided", "first file", "all but the folder", "deleted", "evicted", "forgotten"]
)
def test_a_worker_that_is_killed_between_any_two_steps_is_followed_by_one_that_finishes(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (host.folder / ".mothballignore").write_text("cache/\n")
    (host.folder / "cache").mkdir()
    (host.folder / "cache" / "x").write_text("x")
    git(host.folder, "init", "-q")
    host.register()
    job = host.submit("workspace.purge", by="me")

    class Killed(BaseException):
        pass

    def after(real: Callable[..., Any], *, call: int = 1) -> Callable[..., Any]:
        calls = iter(range(1, 1000))

        def wrapped(*args: Any, **named: Any) -> Any:
            answer = real(*args, **named)
            if next(calls) == call:
                raise Killed
            return answer

        return wrapped

    from mothball.purge import aside, removal

    lifecycle = type(host.registry.lifecycle)
    with monkeypatch.context() as patch:
        # A killed process puts nothing back.
        patch.setattr(aside.Aside, "put_back", lambda _: None)
        patch.setattr(aside.Aside, "remove", lambda _: None)
        place: tuple[Any, str, int] = {
            "captured": (ending.Ending, "capture", 1), "moved": (aside.Aside, "take", 1),
            "looked": (purge_run.Purge, "_last_look", 1), "decided": (aside.Aside, "say", 2),
            "first file": (removal._Removal, "_one", 1), "all but the folder": (removal._Removal, "_one", 5),
            "deleted": (aside.Aside, "drop_tree", 1), "evicted": (lifecycle, "evict", 1),
            "forgotten": (purge_run.Purge, "forget", 1),
        }[step]  # fmt: skip
        patch.setattr(place[0], place[1], after(getattr(place[0], place[1]), call=place[2]))
        with pytest.raises(Killed):
            host.deliver(job)
    if step in {"evicted", "forgotten"}:
        with pytest.raises(Gone):
            host.again(job)
        assert host.counters()["evicted:asked"] == 1
        return
    result = host.again(job)
    assert (result["purged"], there(host)) == (True, [])
    tomb = host.registry.lifecycle.tombstone(ID)
    assert tomb is not None
    assert (tomb["receipt"], tomb["receipt"]["directory"]) == (result["receipt"], "deleted")
    counters = host.counters()
    assert (counters["evicted:asked"], counters["workspaces_purged"]) == (1, 1)
    with Tree.open(host.store, result["receipt"]["digest"]) as tree:
        assert tree.read("a.txt") == b"first\n"


@pytest.mark.parametrize("since", ["pinned", "held", "somebody present"])
def test_what_a_killed_purge_only_moved_is_back_also_when_the_next_run_purges_no_more(
    host: Host, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    host.register(policy={"ttl": "1h"})
    host.idle(7200)
    job = host.submit("workspace.purge", **(EXPIRED if since == "pinned" else {}))
    killed_when_moved(host, job, monkeypatch)
    if since == "pinned":
        host.registry.workspaces.pin(ID, "golden")
        assert not host.again(job)["purged"]
    else:
        if since == "held":
            host.registry.lifecycle.hold(ID, "legal", "me")
        else:
            host.registry.presence.heartbeat(ID, "agent-7", 60_000)
        with pytest.raises(Busy):
            host.again(job)
    assert there(host) == ["tree"]
    assert (host.folder / "a.txt").read_text() == "first\n"


def test_what_a_killed_purge_only_moved_is_put_back_by_its_host_when_the_purge_is_cancelled(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.register()
    job = host.submit("workspace.purge")
    killed_when_moved(host, job, monkeypatch)
    host.registry.jobs.cancel(job.id)
    with pytest.raises(Ignore, match="cancelled"):
        host.again(job)
    assert there(host) == [".tree.mothball-purge"]
    found = host.deliver(
        host.registry.jobs.submit("runtime.reconcile", {"host": host.settings.host}, workspace=None, host=host.settings.host).job
    )
    assert (found["put_back"], there(host)) == ([ID], ["tree"])
    assert host.run("workspace.capture")["files"] == 2


def test_what_a_purge_is_working_on_is_not_put_back_under_its_hands(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    record = host.register()
    real = purge_run.Purge._last_look
    seen: list[list[str]] = []

    def look(*given: Any, **named: Any) -> Any:
        with pytest.raises(Busy, match="another purge of it is running"):
            put_back_interrupted(str(host.folder), workspace=ID, registration=record.registration, settings=host.settings)
        seen.append(there(host))
        return real(*given, **named)

    monkeypatch.setattr(purge_run.Purge, "_last_look", look)
    assert host.run("workspace.purge")["purged"]
    assert seen == [[".tree.mothball-purge"]]


def killed_when_moved(host: Host, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that runs `job` dies when it has moved the directory aside."""

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    from mothball.purge import aside

    with monkeypatch.context() as patch:
        # A killed process puts nothing back.
        patch.setattr(aside.Aside, "put_back", lambda _: None)
        patch.setattr(aside.Aside, "remove", lambda _: None)
        patch.setattr(purge_run.Purge, "_last_look", die)
        with pytest.raises(Killed):
            host.deliver(job)
    assert there(host) == [".tree.mothball-purge"]


def test_a_capture_between_two_runs_does_not_take_what_is_left_for_the_workspace(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.register()
    job = host.submit("workspace.purge")

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    from mothball.purge import aside

    with monkeypatch.context() as patch:
        patch.setattr(aside.Aside, "drop_tree", die)
        with pytest.raises(Killed):
            host.deliver(job)
    host.registry.jobs.release_lost(job.id, host.registry.jobs.get(job.id).fence)
    capture = host.submit("workspace.capture")
    with pytest.raises(MothballError) as caught:
        host.deliver(capture)
    assert caught.value.code == "source_missing"
    host.registry.workspaces.touch(ID)  # too late: what is decided and begun is finished
    assert host.deliver(job)["purged"]


def test_a_new_folder_in_the_place_of_a_deleted_one_is_judged_anew_before_anything_is_ended(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.register(policy={"purge": True, "ttl": "1h"})
    host.idle(7200)
    job = host.submit("workspace.purge", **EXPIRED)

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(host.registry.lifecycle), "evict", die)
        with pytest.raises(Killed):
            host.deliver(job)
    assert there(host) == [".tree.mothball-purge"]
    host.folder.mkdir()
    (host.folder / "new.txt").write_text("somebody goes on")
    process = host.start(SLEEPS)
    host.registry.workspaces.pin(ID, "in use")
    result = host.again(job)
    assert (result["purged"], "in use" in result["detail"]) == (False, True)
    assert process.poll() is None
    assert there(host) == ["tree"]


def test_a_hold_that_comes_after_the_deletion_keeps_the_record_until_it_is_lifted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.register()
    job = host.submit("workspace.purge")
    real = purge_run.Purge._delete

    def delete(*args: Any) -> None:
        real(*args)
        host.registry.lifecycle.hold(ID, "wait", "me")

    with monkeypatch.context() as patch:
        patch.setattr(purge_run.Purge, "_delete", delete)
        with pytest.raises(BaseException, match="retried"):
            host.deliver(job)
    failed = host.registry.jobs.get(job.id)
    assert "is deleted, and capture sha256:" in (failed.error or "")
    assert host.record.state == "active"
    with pytest.raises(Busy, match="wait"):
        host.run("workspace.purge")
    host.registry.lifecycle.unhold(ID)
    receipt = host.run("workspace.purge")["receipt"]
    assert receipt["directory"] == "deleted"


def test_a_new_life_of_the_id_is_not_ended_by_what_an_old_purge_left(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.register()
    with monkeypatch.context() as patch:
        patch.setattr(purge_run.Purge, "forget", lambda _: None)
        host.run("workspace.purge")
    assert there(host) == [".tree.mothball-purge"]
    host.folder.mkdir()
    (host.folder / "new.txt").write_text("another life")
    host.register()
    (host.folder / "pipe").mkdir()
    result = host.run("workspace.purge")
    assert (result["receipt"]["files"], result["receipt"]["generation"], there(host)) == (1, 2, [])


def test_redis_away_in_the_last_moment_puts_the_directory_back(
    host: Host, private_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.register()
    job = host.submit("workspace.purge")
    monkeypatch.setattr(context, "REDIS_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(context.patiently, "__kwdefaults__", {"seconds": 0.5})
    real = purge_run.Purge._last_look

    def look(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        private_redis.stop()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(purge_run.Purge, "_last_look", look)
        with pytest.raises((Unavailable, BaseException)):
            host.deliver(job)
    assert there(host) == ["tree"]
    assert (host.folder / "a.txt").exists()
    private_redis.start()
    eventually(host.registry.ping)
    host.registry.jobs.release_lost(job.id, host.registry.jobs.get(job.id).fence)
    assert host.deliver(job)["purged"]


def test_an_answer_of_the_eviction_that_is_lost_on_its_way_does_no_harm(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.register()
    lifecycle = type(host.registry.lifecycle)
    real = lifecycle.evict
    calls: list[str] = []

    def evict(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(real(self, *args, **named))
        if len(calls) == 1:
            raise Unavailable(url="redis://x", reason="the connection was lost")
        return calls[-1]

    monkeypatch.setattr(lifecycle, "evict", evict)
    assert host.run("workspace.purge")["purged"]
    assert calls == ["done", "gone"]
    assert host.counters()["evicted:asked"] == 1
    assert host.registry.jobs.list(limit=1)[0].state == "succeeded"

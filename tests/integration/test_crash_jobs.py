"""Crash reports as jobs, on a real Redis and a real store: what each leaves behind, and what it must not touch (B-50 to B-57)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mothball.crash import publish
from mothball.errors import Gone, InvalidParams, NoSpace, NotFound, SourceMissing, Unredacted
from mothball.settings import Settings
from mothball.store.artifact import subject_of
from mothball.store.tree import Tree
from tasks import crash_report as jobs
from tests.integration.crashing import ID, Crashing
from workers.redis_server import RedisServer

DAY = 86_400_000
CANARY = "ghp_" + "R4nd0mCanary" * 3


@pytest.fixture
def make_here(
    redis_server: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path
) -> Iterator[Callable[..., Crashing]]:
    made: list[Crashing] = []

    def make(**settings: Any) -> Crashing:
        made.append(Crashing(make_settings(**settings), tmp_path / f"ws-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def here(make_here: Callable[..., Crashing]) -> Crashing:
    return make_here()


def members(path: str) -> dict[str, bytes]:
    """Name and content of everything in a package."""
    with tarfile.open(path) as tar:
        return {each.name: (tar.extractfile(each) or io.BytesIO()).read() if each.isreg() else b"" for each in tar}


# -- the capture (B-50) -----------------------------------------------------------------------------------------------


def test_b50_the_report_has_a_fresh_generation_and_the_one_before_is_kept_as_it_was(here: Crashing) -> None:
    here.run("workspace.snapshot", fresh=True)
    before = here.record
    (here.folder / "a.txt").write_text("second\n")
    result = here.file("boom")
    assert (result["source"], result["generation"], result["repeated"]) == ("fresh", 2, False)
    assert result["digest"] == here.record.digest != before.digest
    assert here.refs() == sorted(["latest", "snap-1", result["id"]])
    with Tree.open(here.store, str(before.digest)) as tree:
        assert tree.read("a.txt", limit=100) == b"first\n"
    record = here.crash(result["id"])
    assert subject_of(here.store, record.artifact).digest == result["digest"]
    assert members(result["path"])["rootfs/workspace/a.txt"] == b"second\n"


def test_b50_of_a_directory_that_is_gone_the_last_good_generation_is_packaged_and_the_report_says_so(here: Crashing) -> None:
    here.run("workspace.capture")
    before, refs = here.record, here.store.refs(ID).list()
    shutil.rmtree(here.folder)
    result = here.file("boom")
    assert (result["source"], result["digest"], result["files"]) == ("last_good", before.digest, 2)
    assert "does not exist" in result["reason"]
    document = here.document(result["id"])
    assert (document["capture"]["source"], document["capture"]["reason"]) == ("last_good", result["reason"])
    assert members(result["path"])["rootfs/workspace/a.txt"] == b"first\n"
    after = here.record
    for name in ("digest", "generation", "bytes", "files", "high_water_bytes", "stored_bytes", "last_good_at"):
        assert getattr(after, name) == getattr(before, name), name
    assert [ref for ref in here.store.refs(ID).list() if ref.name == "latest"] == [ref for ref in refs if ref.name == "latest"]


@pytest.mark.parametrize("kind", ["empty", "folders only", "a file", "a link", "elsewhere"])
def test_b50_what_is_no_workspace_any_more_never_replaces_the_good_copy(here: Crashing, tmp_path: Path, kind: str) -> None:
    here.run("workspace.capture")
    before = here.record
    shutil.rmtree(here.folder)
    if kind == "a file":
        here.folder.write_text("x")
    elif kind == "a link":
        (tmp_path / "other").mkdir()
        here.folder.symlink_to(tmp_path / "other")
    elif kind == "elsewhere":
        here.folder.symlink_to("/etc")
    else:
        here.folder.mkdir()
        if kind == "folders only":
            (here.folder / "deep" / "er").mkdir(parents=True)
    result = here.file("boom")
    assert (result["source"], result["digest"], result["generation"]) == ("last_good", before.digest, before.generation)
    assert result["reason"]
    assert (here.record.digest, here.record.generation) == (before.digest, before.generation)


def test_b50_a_folder_that_is_emptied_while_it_is_captured_does_not_lose_the_good_copy(
    here: Crashing, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.run("workspace.capture")
    before = here.record
    now = jobs.capture_now

    def emptied(*args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(here.folder)
        here.folder.mkdir()
        return now(*args, **kwargs)

    monkeypatch.setattr(jobs, "capture_now", emptied)
    result = here.file("boom")
    assert (result["source"], result["digest"], result["files"]) == ("last_good", before.digest, 2)
    assert members(result["path"])["rootfs/workspace/a.txt"] == b"first\n"


def test_a_workspace_that_was_always_empty_is_captured_as_that(here: Crashing) -> None:
    shutil.rmtree(here.folder)
    here.folder.mkdir()
    result = here.file("boom")
    assert (result["source"], result["files"], result["generation"]) == ("fresh", 0, 1)
    assert [name for name in members(result["path"]) if name.startswith("rootfs/workspace/")] == []


def test_without_directory_and_without_capture_it_says_what_it_looked_for_and_leaves_nothing(here: Crashing) -> None:
    shutil.rmtree(here.folder)
    error = here.fails(here.fleet.crash_report(ID, "boom").id)
    assert isinstance(error, SourceMissing)
    assert str(here.folder) in error.message
    assert "does not exist" in error.message
    assert f"the store of host {here.settings.host}: none" in error.message
    assert here.registry.crashes.list() == []
    assert (here.refs(), here.packages(), here.counter("crash_reports")) == ([], [], 0)


def test_captures_of_an_earlier_life_under_the_same_id_are_nobodys(here: Crashing) -> None:
    here.run("workspace.capture")
    here.fleet.release(ID)
    here.registry._connection.client.delete(f"{here.settings.namespace}:ws:gone:{ID}")
    shutil.rmtree(here.folder)
    here.fleet.register(ID, here.folder)
    assert isinstance(here.fails(here.fleet.crash_report(ID, "boom").id), SourceMissing)


def test_a_capture_that_cannot_be_made_leaves_the_last_good_one_to_package(make_here: Callable[..., Crashing]) -> None:
    here = make_here(max_total_bytes=1000, max_file_bytes=900)
    here.run("workspace.capture")
    for n in range(3):
        (here.folder / f"big{n}").write_bytes(os.urandom(800))
    result = here.file("boom")
    assert result["source"] == "last_good"
    assert "oversize" in result["reason"]
    assert "rootfs/workspace/big0" not in members(result["path"])


def test_a_full_disk_is_tried_again_before_the_last_good_one_is_taken(
    make_here: Callable[..., Crashing], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_here(max_attempts=2)
    here.run("workspace.capture")

    def full(*_: Any, **__: Any) -> Any:
        raise NoSpace(path="/x")

    monkeypatch.setattr(jobs, "capture_now", full)
    job = here.fleet.crash_report(ID, "boom", package=False).id
    assert "no_space" in here.fails(job).message
    assert here.registry.jobs.get(job).state == "queued"
    here.due(job)
    result = here.deliver(job)
    assert result["source"] == "last_good"
    assert "no_space" in result["reason"]


def test_without_capture_the_last_one_is_taken_as_it_is(here: Crashing) -> None:
    here.run("workspace.capture")
    (here.folder / "a.txt").write_text("second\n")
    result = here.file("boom", capture=False)
    assert (result["source"], result["generation"], result["reason"]) == ("latest", 1, "")
    assert members(result["path"])["rootfs/workspace/a.txt"] == b"first\n"


def test_a_workspace_that_is_being_written_is_captured_all_the_same(here: Crashing) -> None:
    stop = threading.Event()

    def write() -> None:
        count = 0
        while not stop.is_set():
            (here.folder / f"w{count % 50}").write_bytes(b"x" * (count % 5000))
            count += 1
            if count % 7 == 0:
                (here.folder / f"w{count % 50}").unlink(missing_ok=True)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        result = here.file("boom")
    finally:
        stop.set()
        writer.join()
    assert result["source"] == "fresh"
    files = [name for name in members(result["path"]) if name.startswith("rootfs/workspace/")]
    assert "rootfs/workspace/a.txt" in files
    assert result["files"] == here.document(result["id"])["package"]["files"]


# -- no sign of life, one lease (B-51, B-52) ----------------------------------------------------------------------------


def test_b51_making_a_report_extends_no_life(here: Crashing) -> None:
    here.fleet.register("o/r#2", here.folder.parent / "two", expires_in_ms=DAY)
    (here.folder.parent / "two").mkdir()
    before = here.registry.workspaces.get("o/r#2")
    here.file("boom", workspace="o/r#2")
    after = here.registry.workspaces.get("o/r#2")
    for name in ("last_active", "last_signal", "signals", "expires_at", "extended_until", "created_at", "state", "state_since"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.crash_reports == 1


def test_b52_a_run_that_lost_its_lease_publishes_nothing(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    job = here.fleet.crash_report(ID, "boom").id
    learn = publish.learn_credentials

    def paused(*args: Any, **kwargs: Any) -> None:
        learn(*args, **kwargs)
        monkeypatch.setattr(publish, "learn_credentials", learn)
        here.lose_lease(job)
        here.took_over = here.registry.jobs.claim(job, host=here.settings.host, worker="other/1", lease_ms=60_000)

    monkeypatch.setattr(publish, "learn_credentials", paused)
    with pytest.raises(Exception, match="lease"):
        here.deliver(job)
    assert here.took_over.status == "run"
    assert here.registry.crashes.list() == []
    assert [name for name in here.refs() if name.startswith("crash-")] == []
    assert here.packages() == []


def test_b52_a_released_workspace_is_gone_for_a_report_too(here: Crashing) -> None:
    here.fleet.release(ID)
    with pytest.raises(Gone):
        here.fleet.crash_report(ID, "boom")
    with pytest.raises(NotFound):
        here.fleet.crash_report("o/never#1", "boom")


# -- names, times, files (B-53 to B-57) -----------------------------------------------------------------------------------


def test_b53_the_time_is_that_of_the_registry_in_utc(here: Crashing) -> None:
    before = here.registry.time_ms()
    result = here.file("boom")
    record = here.crash(result["id"])
    assert before <= record.at <= here.registry.time_ms()
    document = here.document(result["id"])
    assert document["at"] == record.at
    assert document["time"].endswith("Z")
    assert datetime.fromtimestamp(record.at // 1000, UTC).strftime("-%Y%m%d-%H%M%SZ-") in result["id"]


def test_b54_b55_the_package_is_its_owners_alone_and_carries_the_whole_name(here: Crashing) -> None:
    result = here.file("boom")
    path = Path(result["path"])
    assert path.parent == here.settings.crash_dir == here.settings.data_dir / "crash-reports"
    assert path.parent.stat().st_mode & 0o7777 == 0o700
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.name == result["id"] + ".tar"
    assert re.fullmatch(r"crash-o-r-[0-9a-f]{8}-issue-1-\d{8}-\d{6}Z-[0-9a-f]{8}", result["id"])
    assert here.packages() == [path.name]


def test_b55_two_reports_in_one_second_are_two_files(make_here: Callable[..., Crashing]) -> None:
    here = make_here(crash_window_seconds=0)
    made = [here.file("boom") for _ in range(3)]
    assert len({each["id"] for each in made}) == len({each["path"] for each in made}) == len(here.packages()) == 3


def test_b56_nothing_that_was_said_is_lost_and_the_count_of_files_is_true(here: Crashing) -> None:
    os.link(here.folder / "a.txt", here.folder / "c.txt")
    (here.folder / "link").symlink_to("a.txt")
    result = here.file(
        "Traceback (most recent call last):\n  File \"x.py\", line 3, in go\nValueError: boom", title="tests fail",
        exit_code=3, command=["make", "test"], env={"PATH": "/bin", "CI": "1"},
    )  # fmt: skip
    found = members(result["path"])
    document = json.loads(found["report.json"])
    assert document == here.document(result["id"])
    assert (document["id"], document["error"]["title"]) == (result["id"], "tests fail")
    assert document["error"]["text"].endswith("ValueError: boom")
    assert (document["evidence"]["exit"]["code"], document["evidence"]["command"]) == (3, ["make", "test"])
    assert document["evidence"]["environment"]["variables"] == {"CI": "1", "PATH": "/bin"}
    assert document["workspace"]["id"] == ID
    with tarfile.open(result["path"]) as tar:
        files = [each for each in tar if each.name.startswith("rootfs/workspace/") and (each.isreg() or each.islnk())]
    assert result["files"] == document["package"]["files"] == here.crash(result["id"]).files == len(files) == 3


def test_b57_the_result_names_path_sha256_bytes_and_files(here: Crashing) -> None:
    result = here.file("boom")
    data = Path(result["path"]).read_bytes()
    assert (result["sha256"], result["bytes"], result["host"]) == (hashlib.sha256(data).hexdigest(), len(data), here.settings.host)
    record = here.crash(result["id"])
    for name in ("path", "sha256", "bytes", "files", "signature", "title", "digest", "generation", "artifact", "source"):
        assert result[name] == getattr(record, name), name
    assert here.registry.jobs.list()[0].outcome == result


def test_a_report_without_package_has_no_file_and_says_so(here: Crashing) -> None:
    result = here.file("boom", package=False)
    assert (result["path"], result["sha256"], result["bytes"], result["files"]) == ("", "", 0, 2)
    assert here.document(result["id"])["package"] is None
    assert here.packages() == []


# -- what is said of the failure ------------------------------------------------------------------------------------------


def test_an_error_of_ten_megabytes_is_a_report_of_its_head_and_tail(here: Crashing) -> None:
    text = "begin\n" + "\x1b[31mnoise\x1b[0m \x07\x00 line\n" * 500_000 + "ValueError: the end"
    result = here.file(text, package=False)
    error = here.document(result["id"])["error"]
    assert (error["truncated"], error["bytes"] > 10_000_000) == (True, True)
    assert error["text"].startswith("begin\n")
    assert error["text"].endswith("ValueError: the end")
    assert len(error["text"].encode()) < 70_000
    assert "\x1b" not in json.dumps(error) + result["title"]
    assert result["title"] == "ValueError: the end"


@pytest.mark.parametrize("nasty", ["\x01" * 200_000, "\U000e0001" * 60_000, "\udcff" * 100_000, '"\\' * 100_000])
def test_a_text_whose_json_is_much_longer_than_itself_still_fits_into_a_job(here: Crashing, nasty: str) -> None:
    result = here.file(nasty + "\nValueError: end", package=False)
    assert here.document(result["id"])["error"]["text"].endswith("ValueError: end")


def test_names_that_lead_elsewhere_stay_names(here: Crashing) -> None:
    here.add("w1", here.folder.parent / "w1", repo="o/r..-x", title="../../../etc")
    result = here.file("boom", workspace="w1", title="../../../../tmp/x\n\x1b[2J\u012e\u012e\u012f")
    assert Path(result["path"]).parent == here.settings.crash_dir
    assert "/" not in result["id"]
    assert result["id"].startswith("crash-o-r..-x-")
    assert "\x1b" not in result["title"]
    assert here.packages() == [f"{result['id']}.tar"]


def test_of_a_log_of_two_gigabytes_the_end_is_kept(make_here: Callable[..., Crashing]) -> None:
    here = make_here(crash_log_bytes=4096, max_file_bytes=1024**2)
    log = here.folder / "build.log"
    with log.open("wb") as file:
        file.truncate(2 * 1024**3)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b"line %d\n" % n for n in range(1000)) + b"Error: out of disk\n")
    started = time.monotonic()
    result = here.file("boom", package=False, log=str(log))
    tail = here.document(result["id"])["evidence"]["log"]
    assert time.monotonic() - started < 20
    assert tail["text"].endswith("line 999\nError: out of disk\n")
    assert (tail["truncated"], tail["bytes"] > 2 * 1024**3, tail["tail_bytes"] <= 4096) == (True, True, True)


def test_a_log_elsewhere_or_through_a_link_is_not_read_and_costs_the_report_nothing(here: Crashing) -> None:
    (here.folder / "shadow").symlink_to("/etc/shadow")
    for log in ("/etc/shadow", str(here.folder / "shadow"), "shadow"):
        result = here.file(f"boom {log}", log=log)
        found = here.document(result["id"])["evidence"]["log"]
        assert "error" in found
        assert "root:" not in json.dumps(found)
    with tarfile.open(result["path"]) as tar:
        assert tar.getmember("rootfs/workspace/shadow").issym()


def test_what_is_wrong_with_the_request_is_said_before_anything_is_done(here: Crashing) -> None:
    for wrong in ({"signal": "KILLED"}, {"signal": 0}, {"signal": 65}, {"signal": True}, {"command": "make test"}, {"error": b"x"}):
        with pytest.raises(InvalidParams):
            here.fleet.crash_report(ID, **{"error": "x", **wrong})  # type: ignore[arg-type]
    assert here.registry.jobs.list() == []
    here.run("workspace.capture")
    assert isinstance(here.fails(here.fleet.crash_report(ID, "boom", since="snap-7").id), NotFound)
    assert here.record.generation == 1
    assert here.registry.crashes.list() == []


def test_signals_by_name_and_number_are_one(here: Crashing) -> None:
    for signal in ("KILL", "SIGKILL", 9, "9"):
        assert here.fleet.crash_arguments(ID, signal=signal)["signal"] == 9
    assert here.fleet.crash_arguments(ID, exit_code=-11)["signal"] == 11


def test_changes_are_told_since_the_newest_snapshot_or_what_was_asked_for(here: Crashing) -> None:
    here.run("workspace.snapshot", fresh=True)
    (here.folder / "a.txt").write_text("second\n")
    here.run("workspace.snapshot", fresh=True)
    (here.folder / "src" / "new.py").write_text("x\n")
    newest = here.document(here.file("one", package=False)["id"])["since"]
    assert (newest["ref"], [each["path"] for each in newest["changes"] if each["kind"] == "added"]) == ("snap-2", ["src/new.py"])
    older = here.document(here.file("two", package=False, since="snap-1")["id"])["since"]
    assert older["ref"] == "snap-1"
    assert "+second" in older["patch"]


# -- the same failure again -------------------------------------------------------------------------------------------------


def test_the_same_failure_again_is_counted_and_captured_and_stored_once(here: Crashing) -> None:
    here.add("o/r#2", here.folder.parent / "two")
    first = here.file("ValueError: 17 is wrong")
    (here.folder.parent / "two" / "a.txt").write_text("other\n")
    again = here.file("ValueError: 4711 is wrong", workspace="o/r#2")
    assert (again["id"], again["repeated"], again["count"], again["path"]) == (first["id"], True, 2, first["path"])
    assert again["digest"] == here.registry.workspaces.get("o/r#2").digest
    assert here.refs("o/r#2") == ["latest"]
    assert here.packages() == [f"{first['id']}.tar"]
    record = here.crash(first["id"])
    assert [each["workspace"] for each in record.occurrences] == ["o/r#2", ID]
    assert record.occurrences[0]["digest"] == again["digest"]
    assert (here.counter("crash_reports"), here.counter("crash_repeats")) == (1, 1)
    other = here.file("KeyError: 'name'")
    assert not other["repeated"]


def test_a_failure_of_another_repo_has_a_report_of_its_own(here: Crashing) -> None:
    here.add("x/y#1", here.folder.parent / "two")
    assert not here.file("boom", package=False)["repeated"]
    assert not here.file("boom", package=False, workspace="x/y#1")["repeated"]


def test_the_loser_of_two_same_failures_takes_its_files_back(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    here.add("o/r#2", here.folder.parent / "two")
    first: dict[str, Any] = {}
    learn = publish.learn_credentials

    def quicker(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(publish, "learn_credentials", learn)
        first.update(here.file("boom", workspace="o/r#2"))
        learn(*args, **kwargs)

    monkeypatch.setattr(publish, "learn_credentials", quicker)
    result = here.file("boom")
    assert (result["repeated"], result["id"], result["count"]) == (True, first["id"], 2)
    assert here.packages() == [f"{first['id']}.tar"]
    assert here.refs() == ["latest"]
    assert (here.counter("crash_reports"), here.counter("crash_repeats")) == (1, 1)


# -- a run that is repeated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["capture_now", "learn_credentials", "package", "publish_report", "add"])
def test_a_run_that_dies_at_any_step_is_repeated_with_the_evidence_of_the_first(
    here: Crashing, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (here.folder / "build.log").write_text("first run\n")
    where: Any = {"capture_now": jobs, "publish_report": __import__("mothball.store.artifact", fromlist=["x"])}.get(step, publish)
    if step == "add":
        where = type(here.registry.crashes)
    call = getattr(where, step)

    def dies(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        monkeypatch.setattr(where, step, call)
        raise OSError(5, f"died after {step}", str(result)[:0])

    monkeypatch.setattr(where, step, dies)
    job = here.fleet.crash_report(ID, "boom", log=str(here.folder / "build.log")).id
    assert f"died after {step}" in here.fails(job).message
    (here.folder / "build.log").write_text("second run\n")
    here.due(job)
    result = here.deliver(job)
    assert here.document(result["id"])["evidence"]["log"]["text"] == "first run\n"
    assert [name for name in here.refs() if name.startswith("crash-")] == [result["id"]]
    assert here.packages() == [f"{result['id']}.tar"]
    assert not result["repeated"]
    assert [each.id for each in here.registry.crashes.list()] == [result["id"]]
    assert (here.counter("crash_reports"), here.counter("crash_repeats")) == (1, 0)
    assert here.kinds().count("workspace.crashed") == 1


def test_a_repeat_whose_answer_was_lost_counts_once(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    first = here.file("boom")
    crashes = type(here.registry.crashes)
    repeat = crashes.repeat

    def lost(self: Any, *args: Any, **kwargs: Any) -> Any:
        repeat(self, *args, **kwargs)
        monkeypatch.setattr(crashes, "repeat", repeat)
        raise OSError(5, "lost")

    monkeypatch.setattr(crashes, "repeat", lost)
    job = here.fleet.crash_report(ID, "boom").id
    here.fails(job)
    here.due(job)
    result = here.deliver(job)
    assert (result["id"], result["repeated"], result["count"]) == (first["id"], True, 2)
    assert here.counter("crash_repeats") == 1


def test_a_secret_that_is_left_in_the_finished_package_publishes_nothing(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    from mothball.redact.rescan import Finding, Rescan

    monkeypatch.setattr(Rescan, "finish", lambda _self: [Finding("github", 5000)])
    error = here.fails(here.fleet.crash_report(ID, "boom").id)
    assert isinstance(error, Unredacted)
    assert here.packages() == []
    assert [name for name in here.refs() if name.startswith("crash-")] == []
    assert here.registry.crashes.list() == []


def test_a_failing_report_blames_the_workspace_for_nothing(here: Crashing) -> None:
    shutil.rmtree(here.folder)
    here.fails(here.fleet.crash_report(ID, "boom").id)
    assert (here.record.last_error, here.record.retry_count) == ("", 0)


# -- secrets ----------------------------------------------------------------------------------------------------------------


def test_no_secret_of_the_producer_is_written_anywhere(here: Crashing) -> None:
    (here.folder / "run.log").write_text(f"token {CANARY}\n")
    (here.folder / ".env").write_text(f"TOKEN={CANARY}\n")
    result = here.file(
        f"ValueError: {CANARY[:9]}\x1b[31m{CANARY[9:]} is wrong", title=f"failed with {CANARY}",
        command=["curl", "--token", CANARY], env={"CI": CANARY, "LC_X": f"https://u:{CANARY}@host/"}, log="run.log",
        cgroup={"path": f"/x/{CANARY}"}, by=f"me {CANARY}",
    )  # fmt: skip
    job = here.registry.jobs.list()[0]
    told = json.dumps(
        [job.to_dict(), result, here.document(result["id"]), [each.to_dict() for each in here.registry.events.list()]]
    )
    told += json.dumps([each.to_dict() for each in here.registry.crashes.list()])
    client = here.registry._connection.client
    for key in client.scan_iter(f"{here.settings.namespace}:*"):
        if client.type(key) == "hash":
            told += json.dumps(client.hgetall(key))
    assert CANARY not in told
    package = Path(result["path"]).read_bytes()
    assert CANARY.encode() not in package
    assert result["redactions"]
    assert b"[redacted:" in package


def test_evidence_lies_in_the_registry_without_secrets(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.folder / "run.log").write_text(f"token {CANARY}\n")

    def dies(*_: Any, **__: Any) -> Any:
        raise OSError(5, "died")

    monkeypatch.setattr(jobs, "capture_now", dies)
    job = here.fleet.crash_report(ID, "boom", log="run.log").id
    here.fails(job)
    draft = here.registry.crashes.drafted(job)
    assert draft is not None
    assert draft.evidence is not None
    assert draft.evidence["log"]["text"].startswith("token [redacted:")
    assert CANARY not in json.dumps(draft.evidence)


def test_evidence_that_is_too_large_for_the_registry_keeps_the_end_of_the_log(
    here: Crashing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LOG_IN_DRAFT", 1000)
    monkeypatch.setattr("mothball.registry.crashes.MAX_DRAFT_BYTES", 20_000)
    (here.folder / "run.log").write_bytes(
        b"".join(hashlib.sha256(b"%d" % n).hexdigest()[:40].encode() + b"\n" for n in range(2000)) + b"end\n"
    )
    result = here.file("boom", log="run.log", package=False)
    tail = here.document(result["id"])["evidence"]["log"]
    assert tail["text"].endswith("end\n")
    assert (len(tail["text"]) <= 1000, tail["truncated"]) == (True, True)


# -- sealed -----------------------------------------------------------------------------------------------------------------


def test_with_recipients_no_clear_package_is_ever_there(make_here: Callable[..., Crashing], tmp_path: Path) -> None:
    import pyrage

    from mothball.seal.sealed import unseal_file

    identity = pyrage.x25519.Identity.generate()
    here = make_here(crash_recipients=(str(identity.to_public()),))
    result = here.file("boom")
    assert (result["sealed"], here.packages()) == (True, [f"{result['id']}.tar.age"])
    assert here.crash(f"{result['id']}.tar.age").sealed
    opened = unseal_file(Path(result["path"]), tmp_path / "open.tar", identities=[str(identity).encode()])
    found = members(str(opened.path))
    assert json.loads(found["report.json"]) == here.document(result["id"])
    assert found["rootfs/workspace/a.txt"] == b"first\n"
    assert b"first" not in Path(result["path"]).read_bytes()


def test_a_recipient_that_is_none_is_said_before_anything_is_captured(make_here: Callable[..., Crashing]) -> None:
    here = make_here(crash_recipients=("age1nonsense",))
    assert isinstance(here.fails(here.fleet.crash_report(ID, "boom").id), InvalidParams)
    assert here.record.generation == 0
    assert here.packages() == []


def test_a_value_that_only_the_workspace_tells_to_be_a_secret_leaves_the_job_when_the_report_is_made(here: Crashing) -> None:
    value = "7bKz4Qm9Xw2L" + "r8Tn5Vd3Hs6J"
    (here.folder / ".env").write_text(f"DEPLOY_TOKEN={value}\n")
    job = here.fleet.crash_report(ID, f"refused: {value}", command=["deploy", value], package=False)
    assert value in json.dumps(here.registry.jobs.get(job.id).args), "the producer cannot know it"
    first = here.deliver(job.id)
    again = here.file(f"refused: {value}")
    assert (again["repeated"], again["id"]) == (True, first["id"])
    records = [each.to_dict() for each in here.registry.jobs.list(limit=100)]
    told = json.dumps([records, here.document(first["id"]), [event.to_dict() for event in here.registry.events.list(limit=100)]])
    assert value not in told
    assert "refused: [redacted:known:" in here.registry.jobs.get(job.id).args["error"]
    assert here.crash(first["id"]).title.startswith("refused: [redacted:known:")

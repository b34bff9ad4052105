"""What becomes of crash reports: shown, fetched, packaged, kept, deleted; retention, and what a kill left half (B-58)."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.crash import retention
from mothball.errors import OperationFailed
from mothball.registry import Crash
from mothball.settings import Settings
from mothball.store.trash import Trash
from tasks.crash_store import shortened
from tests.commands import Answer, beside_jobs
from tests.integration.crashing import ID, Crashing
from workers.redis_server import RedisServer

DAY = 86_400_000
WEEK = 7 * DAY


@pytest.fixture
def make_here(
    redis_server: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path
) -> Iterator[Callable[..., Crashing]]:
    made: list[Crashing] = []

    def make(**settings: Any) -> Crashing:
        made.append(Crashing(make_settings(**{"crash_window_seconds": 0, **settings}), tmp_path / f"ws-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def here(make_here: Callable[..., Crashing]) -> Crashing:
    return make_here()


@pytest.fixture
def cli(here: Crashing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    return beside_jobs(here.settings, monkeypatch, capsys)


def retain(here: Crashing, **args: Any) -> dict[str, Any]:
    return here.run("crash.retain", host=here.settings.host, **args)


def older(here: Crashing, report: str, ms: int) -> None:
    """What the passing of `ms` does to a report."""
    client, space = here.registry._connection.client, here.settings.namespace
    at = here.crash(report).at - ms
    client.hset(f"{space}:crash:{report}", mapping={"at": at, "first_at": at, "last_at": at})
    for index in ("by:at", f"host:{here.settings.host}", f"ws:{ID}", "repo:o/r"):
        client.zadd(f"{space}:crash:{index}", {report: at})


def aged(path: str, ms: int) -> None:
    now = os.stat(path).st_mtime
    os.utime(path, (now - ms / 1000, now - ms / 1000))


def gone(here: Crashing, report: str) -> None:
    """Nothing names the report any more: no file, no ref, no record."""
    assert report not in [each.id for each in here.registry.crashes.list()]
    assert report not in here.refs()
    assert [name for name in here.packages() if name.startswith(report)] == []


# -- deletion ---------------------------------------------------------------------------------------------------------------


def test_b58_a_deleted_report_is_gone_with_its_package_and_its_blobs_by_way_of_the_trash(here: Crashing) -> None:
    report = here.file("boom")["id"]
    result = here.run("crash.delete", host=here.settings.host, report=report, by="me")
    assert result["deleted"]
    gone(here, report)
    assert here.record.crash_reports == 0
    assert [entry.ref.name for entry in Trash(here.store).buried(ID)] == [report]
    assert here.kinds().count("crash.deleted") == 1


@pytest.mark.parametrize("step", ["remove_package", "forget_report"])
def test_b58_a_deletion_that_was_killed_is_ended_by_the_sweep(here: Crashing, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    report = here.file("boom")["id"]
    call = getattr(retention, step)

    def dies(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(retention, step, dies)
    with pytest.raises(KeyboardInterrupt):
        retention.delete(here.store, here.registry, here.settings, here.crash(report), reason="x", by="me")
    monkeypatch.setattr(retention, step, call)
    assert here.crash(report).deleting
    assert retain(here, dry_run=True)["taken"] == [{"report": report, "reason": "deleted"}]
    assert here.crash(report).deleting
    assert retain(here)["taken"] == [{"report": report, "reason": "deleted"}]
    gone(here, report)


def test_a_report_of_another_host_is_not_deleted_here(here: Crashing, make_settings: Callable[..., Settings]) -> None:
    report = here.file("boom")["id"]
    other = here.settings.model_copy(update={"host": "other"})
    with pytest.raises(Exception, match="not on 'other'"):
        retention.delete(here.store, here.registry, other, here.crash(report), reason="x", by="me")
    assert not here.crash(report).deleting


# -- retention --------------------------------------------------------------------------------------------------------------


def test_b58_what_is_too_old_goes_and_what_is_kept_stays(make_here: Callable[..., Crashing]) -> None:
    here = make_here(crash_keep_seconds=30 * 86400)
    old, kept, young = (here.file(f"boom {n}")["id"] for n in ("a", "b", "c"))
    older(here, old, 31 * DAY)
    older(here, kept, 31 * DAY)
    here.fleet.crash_keep(kept)
    dry = retain(here, dry_run=True)
    assert (dry["taken"], dry["removed"], dry["dry_run"]) == ([{"report": old, "reason": "age"}], 1, True)
    assert here.crash(old).id == old
    size = here.crash(old).bytes
    done = retain(here)
    assert done["taken"] == dry["taken"]
    assert (done["removed"], done["removed_bytes"], done["reports"]) == (1, size, 3)
    gone(here, old)
    assert {each.id for each in here.registry.crashes.list()} == {kept, young}
    assert here.packages() == sorted([f"{kept}.tar", f"{young}.tar"])


def test_b58_the_oldest_go_when_there_are_too_many_or_too_large_ones(make_here: Callable[..., Crashing]) -> None:
    here = make_here(crash_keep_count=3)
    made = [here.file(f"boom {n}")["id"] for n in range(5)]
    for place, report in enumerate(made):
        older(here, report, (10 - place) * 60_000)
    assert retain(here)["taken"] == [{"report": each, "reason": "count"} for each in made[:2]]
    size = here.crash(made[2]).bytes
    here.settings = here.settings.model_copy(update={"crash_keep_bytes": 2 * size + 10})
    done = retention.retain(here.store, here.registry, here.settings, dry_run=False)
    assert done.taken == [retention.Note(made[2], "bytes")]
    assert [each.id for each in here.registry.crashes.list()] == [made[4], made[3]]


def test_one_report_that_cannot_be_deleted_ends_nothing(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    here.settings = here.settings.model_copy(update={"crash_keep_count": 1})
    made = [here.file(f"boom {n}")["id"] for n in range(3)]
    call = retention.remove_package

    def refuses(folder: Path, id: str) -> list[str]:  # noqa: A002
        if id == made[0]:
            raise OperationFailed(reason="it is busy")
        return call(folder, id)

    monkeypatch.setattr(retention, "remove_package", refuses)
    done = retention.retain(here.store, here.registry, here.settings, dry_run=False)
    assert [each.report for each in done.failed] == [made[0]]
    assert done.taken == [retention.Note(made[1], "count")]
    assert {each.id for each in here.registry.crashes.list()} == {made[0], made[2]}


# -- bringing together again ------------------------------------------------------------------------------------------------


def test_a_report_that_only_the_store_knows_has_its_record_again(here: Crashing) -> None:
    result = here.file("ValueError: boom")
    before = here.crash(result["id"])
    here.registry.crashes.drop(before.id)  # as after a loss of Redis
    assert retain(here)["found"] == []  # a job may still be about to record it
    hours = (here.settings.capture_time_limit + here.settings.transfer_time_limit) * 1000
    now = here.registry.time_ms
    here.registry.time_ms = lambda: now() + hours + 60_000  # type: ignore[method-assign]
    done = retention.retain(here.store, here.registry, here.settings, dry_run=False)
    assert done.found == [before.id]
    after = here.crash(before.id)
    same = ("id", "workspace", "repo", "number", "host", "at", "signature", "title", "digest", "generation", "artifact", "source",
            "path", "sha256", "bytes", "files", "sealed", "count")  # fmt: skip
    for name in same:
        assert getattr(after, name) == getattr(before, name), name
    assert here.record.crash_reports == 1
    assert retention.retain(here.store, here.registry, here.settings, dry_run=False).found == []


def test_b58_a_report_that_is_kept_stays_so_when_redis_is_lost(make_here: Callable[..., Crashing]) -> None:
    here = make_here(crash_keep_seconds=86_400)
    mine, other = here.file("boom")["id"], here.file("bang")["id"]
    here.fleet.crash_keep(mine)
    retain(here)
    for report in (mine, other):
        here.registry.crashes.drop(report)
    now = here.registry.time_ms
    here.registry.time_ms = lambda: now() + WEEK  # type: ignore[method-assign]
    assert sorted(retention.retain(here.store, here.registry, here.settings, dry_run=False).found) == sorted([mine, other])
    assert [each.id for each in here.registry.crashes.list()] == [mine]
    assert here.crash(mine).keep
    here.fleet.crash_keep(mine, False)
    retention.retain(here.store, here.registry, here.settings, dry_run=False)
    gone(here, mine)


def test_a_report_that_was_undeleted_is_listed_again(here: Crashing) -> None:
    report = here.file("boom")["id"]
    here.run("crash.delete", host=here.settings.host, report=report)
    here.run("store.undelete", host=here.settings.host, workspace=ID, ref=report)
    assert report in here.refs()
    now = here.registry.time_ms
    here.registry.time_ms = lambda: now() + DAY  # type: ignore[method-assign]
    assert retention.retain(here.store, here.registry, here.settings, dry_run=False).found == [report]
    record = here.crash(report)
    assert (record.path, record.deleting) == ("", False)


def test_a_package_that_was_removed_by_hand_is_noted_and_can_be_made_again(here: Crashing) -> None:
    result = here.file("boom")
    Path(result["path"]).unlink()
    assert retain(here)["without_package"] == [result["id"]]
    assert here.crash(result["id"]).path == ""
    made = here.run("crash.package", host=here.settings.host, report=result["id"])
    assert (made["made"], made["path"], made["files"]) == (True, result["path"], 2)
    assert here.crash(result["id"]).sha256 == hashlib.sha256(Path(made["path"]).read_bytes()).hexdigest() == made["sha256"]


def test_a_package_that_was_removed_by_hand_is_made_again_before_anybody_noted_it(
    here: Crashing, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    result = here.file("boom")
    Path(result["path"]).unlink()
    answer = cli("crash-reports", "fetch", result["id"], "--to", str(tmp_path / "x.tar"))
    assert answer.code == 0, answer.err
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert "rootfs/workspace/a.txt" in tar.getnames()
    made = here.run("crash.package", host=here.settings.host, report=result["id"])
    assert made["made"]
    assert here.crash(result["id"]).sha256 == hashlib.sha256(Path(made["path"]).read_bytes()).hexdigest()


def test_records_without_report_and_package_go_but_not_when_the_disk_is_not_mounted(here: Crashing) -> None:
    report = here.file("boom")["id"]
    store = here.settings.store_dir
    store.rename(store.with_name("elsewhere"))
    with pytest.raises(OperationFailed, match="mounted"):
        retention.retain(here.store, here.registry, here.settings, dry_run=False)
    store.with_name("elsewhere").rename(store)
    assert retain(here)["lost"] == []
    here.store.refs(ID).replace(lambda refs: [ref for ref in refs if ref.name != report])
    assert retain(here)["lost"] == [], "the package is still there"
    Path(here.crash(report).path).unlink()
    assert retain(here)["lost"] == [report]
    gone(here, report)


def test_a_package_that_belongs_to_nothing_goes_after_a_week(here: Crashing) -> None:
    result = here.file("boom")
    orphan = here.settings.crash_dir / "crash-x-20260101-000000Z-00000000.tar"
    orphan.write_bytes(b"x")
    strange = here.settings.crash_dir / "notes.txt"
    strange.write_text("mine")
    assert retain(here)["orphans"] == []
    aged(str(orphan), WEEK + 60_000)
    aged(str(strange), WEEK + 60_000)
    aged(result["path"], WEEK + 60_000)
    assert retain(here, dry_run=True)["orphans"] == [orphan.name[:-4]]
    assert orphan.exists()
    assert retain(here)["orphans"] == [orphan.name[:-4]]
    assert sorted(path.name for path in here.settings.crash_dir.iterdir()) == sorted([Path(result["path"]).name, "notes.txt"])


def test_an_index_that_cannot_be_read_costs_only_its_own(here: Crashing) -> None:
    here.add("o/r#2", here.folder.parent / "two")
    bad = here.file("boom", workspace="o/r#2")
    here.file("bang")
    (here.store.refs("o/r#2").folder / "index.json").write_bytes(b"{")
    done = retain(here)
    assert len(done["failed"]) == 1
    assert done["lost"] == []
    assert here.crash(bad["id"]).path


def test_an_index_that_cannot_be_read_forgets_no_report_without_package(here: Crashing) -> None:
    here.add("o/r#2", here.folder.parent / "two")
    bad = here.file("boom", workspace="o/r#2", package=False)
    good = here.file("bang")
    Path(good["path"]).unlink()
    (here.store.refs("o/r#2").folder / "index.json").write_bytes(b"{")
    done = retain(here)
    assert done["lost"] == []
    assert done["without_package"] == [good["id"]]
    assert 1 <= len(done["failed"]) <= 2
    assert here.crash(bad["id"]).id == bad["id"]


def test_the_records_of_a_host_that_was_forgotten_go_by_age_or_by_hand(
    make_here: Callable[..., Crashing], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tasks.crash_store import retain_all
    from tasks.services import current

    here = make_here(crash_keep_seconds=86_400)
    old, young, kept = (here.file(text)["id"] for text in ("boom", "bang", "bust"))
    here.fleet.crash_keep(kept)
    older(here, old, 2 * DAY)
    older(here, kept, 2 * DAY)
    client, space = here.registry._connection.client, here.settings.namespace
    for report in (old, young, kept):
        client.hset(f"{space}:crash:{report}", "host", "burnt")
        client.zrem(f"{space}:crash:host:{here.settings.host}", report)
        client.zadd(f"{space}:crash:host:burnt", {report: here.crash(report).at})
    assert retain_all(current())["forgotten"] == 1
    assert sorted(each.id for each in here.registry.crashes.list()) == sorted([young, kept])
    cli = beside_jobs(here.settings, monkeypatch, capsys)
    answer = cli("crash-reports", "delete", young)
    assert answer.code == 69
    assert "--forget" in answer.err
    answer = cli("crash-reports", "delete", young, "--forget", "--json")
    assert (answer.code, json.loads(answer.out)["result"]["deleted"]) == (0, True)
    assert [each.id for each in here.registry.crashes.list()] == [kept]
    mine = here.file("mine")["id"]
    answer = cli("crash-reports", "delete", mine, "--forget")
    assert answer.code != 0
    assert here.crash(mine).id == mine, "its host is there: that one deletes it"


def test_the_capture_of_a_report_outlives_its_workspace(here: Crashing) -> None:
    result = here.file("boom")
    here.fleet.release(ID)
    here.registry._connection.client.delete(f"{here.settings.namespace}:ws:gone:{ID}")
    done = here.run("store.collect", host=here.settings.host)
    assert done["orphans"] == []
    made = here.run("crash.show", host=here.settings.host, report=result["id"])
    assert made["report"]["id"] == result["id"]
    here.run("crash.delete", host=here.settings.host, report=result["id"])
    assert here.run("store.collect", host=here.settings.host)["released"] == [ID], "on its way out, on evidence"


def test_the_sweep_asks_every_host_that_is_online_once(here: Crashing) -> None:
    from tasks.crash_store import RETAIN_TASK, retain_all
    from tasks.services import current

    assert retain_all(current()) == {"asked": 1, "joined": 0, "failed": 0, "forgotten": 0}
    assert retain_all(current()) == {"asked": 0, "joined": 1, "failed": 0, "forgotten": 0}
    [job] = [job for job in here.registry.jobs.list() if job.task == RETAIN_TASK]
    assert job.args == {"host": here.settings.host, "dry_run": False}


# -- shown, fetched, packaged -----------------------------------------------------------------------------------------------


def test_a_package_made_later_says_what_it_holds_and_is_the_same_report(here: Crashing) -> None:
    (here.folder / "bin").write_bytes(os.urandom(5000))
    result = here.file("boom", package=False)
    made = here.run("crash.package", host=here.settings.host, report=result["id"], binaries="exclude")
    again = here.run("crash.package", host=here.settings.host, report=result["id"])
    assert (made["made"], again["made"], again["path"]) == (True, False, made["path"])
    with tarfile.open(made["path"]) as tar:
        document = json.load(tar.extractfile("report.json"))  # type: ignore[arg-type]
        assert "rootfs/workspace/bin" not in tar.getnames()
    assert document["package"]["left_out_counts"] == {"binary": 1}
    stored = here.document(result["id"])
    assert {**document, "package": None, "redactions": stored["redactions"]} == stored
    assert here.crash(result["id"]).path == made["path"]


def test_a_packaging_that_died_before_it_was_noted_is_found(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    result = here.file("boom", package=False)
    crashes = type(here.registry.crashes)
    call = crashes.packaged

    def dies(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(crashes, "packaged", call)
        raise OSError(5, "died")

    monkeypatch.setattr(crashes, "packaged", dies)
    job = here.fleet.crash_package(result["id"]).id
    here.fails(job)
    here.due(job)
    made = here.deliver(job)
    assert (made["made"], made["bytes"]) == (False, Path(made["path"]).stat().st_size)
    assert here.crash(result["id"]).sha256 == made["sha256"] != ""


def test_a_long_report_travels_shortened_and_says_so() -> None:
    document = {
        "error": {"text": "e" * 50_000}, "evidence": {"log": {"text": "l" * 900_000}}, "since": {"patch": "p" * 60_000},
        "omissions": {}, "package": None,
    }  # fmt: skip
    short, cut = shortened(document, 192 * 1024)
    assert len(json.dumps(short)) <= 192 * 1024 + 1000
    assert [each.split(":")[0] for each in cut] == ["log"]
    assert short["evidence"]["log"]["text"].endswith("lll")
    assert document["evidence"]["log"]["text"] == "l" * 900_000  # type: ignore[index]
    assert shortened({"error": {"text": "x"}, "evidence": {}}, 1000) == ({"error": {"text": "x"}, "evidence": {}}, [])


def test_the_commands_file_list_show_keep_fetch_and_delete(here: Crashing, cli: Callable[..., Answer], tmp_path: Path) -> None:
    error = tmp_path / "error.txt"
    error.write_text("first line\x1b[31m\nValueError: \x1b]0;boom\x07 [bold]x[/bold]\n")
    here.run("workspace.snapshot", fresh=True)
    (here.folder / "a.txt").write_text("changed\n")
    filed = cli("crash-report", ID, "--error-file", str(error), "--exit-code", "3", "--cmd", "make 'a b'", "--no-wait", "--json")
    assert filed.code == 0, filed.err
    result = here.deliver(filed.json()["job"])
    listed = cli("crash-reports", "--json").json()
    assert [each["id"] for each in listed] == [result["id"]]
    table = cli("crash-reports", "--repo", "o/r", "--since", "1h")
    assert result["id"] in table.out
    assert cli("crash-reports", "--repo", "o/x", "--json").json() == []
    shown = cli("crash-reports", "show", result["id"][-8:], "--patch", "--log")
    assert shown.code == 0, shown.err
    for part in ("make a b", "exit code  3", "+changed", "ValueError:", "[bold]x[/bold]", result["path"]):
        assert part in shown.out, part
    assert "\x1b" not in shown.out + table.out
    assert "\x07" not in shown.out
    whole = cli("crash-reports", "show", result["id"], "--json").json()
    assert (whole["record"]["id"], whole["report"]["evidence"]["command"]) == (result["id"], ["make", "a b"])
    assert cli("crash-reports", "keep", result["id"]).out.strip() == f"{result['id']}: kept"
    assert cli("crash-reports", "keep", result["id"], "--off", "--json").json()["keep"] is False
    to = tmp_path / "out.tar"
    fetched = cli("crash-reports", "fetch", result["id"], "--to", str(to), "--json").json()
    assert (fetched["sha256"], stat.S_IMODE(to.stat().st_mode)) == (result["sha256"], 0o600)
    assert to.read_bytes() == Path(result["path"]).read_bytes()
    assert cli("crash-reports", "fetch", result["id"], "--to", str(to)).code == 73
    deleted = cli("crash-reports", "delete", result["id"], "--no-wait", "--json")
    here.deliver(deleted.json()["job"])
    assert cli("crash-reports", "show", result["id"]).code == 1
    gone(here, result["id"])


def test_fetch_makes_a_package_where_there_is_none_and_refuses_a_damaged_one(
    here: Crashing, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    bare = here.file("boom", package=False)["id"]
    to = tmp_path / "made.tar"
    made = cli("crash-reports", "fetch", bare, "--to", str(to), "--json")
    assert made.code == 0, made.err
    with tarfile.open(to) as tar:
        assert {"report.json", "config.json", "rootfs/workspace/a.txt"} <= set(tar.getnames())
    assert here.crash(bare).path == ""
    packed = here.file("bang")
    with Path(packed["path"]).open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    other = tmp_path / "other.tar"
    answer = cli("crash-reports", "fetch", packed["id"], "--to", str(other))
    assert (answer.code, other.exists()) == (1, False)
    assert "corrupt" in answer.err


def test_fetch_from_another_host_says_where_the_package_is(
    here: Crashing, cli: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = here.file("boom")
    monkeypatch.setenv("MOTHBALL_HOST", "laptop")
    answer = cli("crash-reports", "fetch", result["id"], "--to", str(tmp_path / "x.tar"))
    assert answer.code == 69
    assert result["path"] in answer.err


def test_a_dry_run_shows_what_would_be_sent_and_files_nothing(here: Crashing, cli: Callable[..., Answer]) -> None:
    secret = "ghp_" + "Dry0Run0Canary" * 3
    here.run("workspace.capture")
    answer = cli("crash-report", ID, "--error", f"failed with {secret}", "--signal", "KILL", "--dry-run", "--json").json()
    assert answer["sent"]["signal"] == 9
    assert secret not in json.dumps(answer)
    assert (answer["files"], answer["package_bytes"] > answer["bytes"]) == (2, True)
    text = cli("crash-report", ID, "--error", f"failed with {secret}", "--dry-run").out
    assert "2 files" in text
    assert secret not in text
    assert [job.task for job in here.registry.jobs.list()] == ["workspace.capture"]


@pytest.mark.parametrize(
    "argv", [("--error", "x", "--error-file", "-"), ("--error-file", "/nowhere"), ("--cmd", "a 'b"), ("--signal", "NOPE")]
)  # fmt: skip
def test_wrong_options_are_usage_errors(here: Crashing, cli: Callable[..., Answer], argv: tuple[str, ...]) -> None:
    assert cli("crash-report", ID, *argv, "--no-wait").code == 2
    assert here.registry.jobs.list() == []


def test_the_record_of_a_hostile_document_is_refused(here: Crashing) -> None:
    assert isinstance(here.crash(here.file("boom")["id"]), Crash)
    ref = next(ref for ref in here.store.refs(ID).list() if ref.name.startswith("crash-"))
    for data in (b"{}", b"[]", b'{"at": "x"}', b"\xff"):
        digest, _ = here.store.blobs.put(data)
        assert digest
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retention, "load_report", lambda *_a, data=data: data)
            with pytest.raises(Exception, match=r"report\.json cannot be read"):
                retention.record_of(here.store, "h", ID, ref, None)

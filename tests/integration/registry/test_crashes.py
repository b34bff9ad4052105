"""Records of crash reports: one effect per failure, the storm brake at its exact edges, and nothing left when one is deleted."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest

from mothball.errors import InvalidParams, LeaseLost, NotFound, Oversize
from mothball.registry import Claim, Crash, Registry, keys
from mothball.registry.crashes import MOST_OCCURRENCES, Crashes, crash_id, scope_of
from mothball.registry.standing import StoreFacts
from tests.integration.registry.support import HOST, Bench

SIG = "0123456789abcdef"
WINDOW = 86_400_000
SCOPE = "repo:o/r"


def named(digest: str = "aaaaaaaa", **fields: Any) -> Crash:
    values = {
        "id": f"crash-o-r-issue-1-20260102-030405Z-{digest}", "workspace": "o/r#1", "repo": "o/r", "number": 1, "host": HOST,
        "at": 0, "signature": SIG, "title": "boom", "digest": "sha256:" + "d" * 64, "generation": 3,
        "artifact": "sha256:" + "e" * 64,
        "source": "fresh", "path": "/x.tar", "sha256": "f" * 64, "bytes": 10, "files": 2, "by": "me",
    }  # fmt: skip
    return Crash(**{**values, **fields})


def occurrence(n: int = 0, workspace: str = "o/r#1") -> dict[str, Any]:
    return {"workspace": workspace, "at": n, "digest": f"d{n}", "job": f"j{n}"}


class Filing:
    """A job that files a report."""

    def __init__(self, bench: Bench, workspace: str = "o/r#1", registry: Registry | None = None) -> None:
        claim: Claim = bench.run(workspace)
        assert claim.job is not None
        self.bench, self.job, self.fence = bench, claim.job.id, claim.fence
        self.crashes: Crashes = (registry or bench.registry).crashes

    def add(self, record: Crash, *, n: int = 0, scope: str = SCOPE) -> tuple[Crash, bool]:
        filled = record if record.at else Crash(**{**record.to_dict(), "at": self.bench.registry.time_ms()})
        return self.crashes.add(self.job, self.fence, filled, scope=scope, occurrence=occurrence(n, record.workspace))

    def again(self, n: int = 0, at: int = 5, *, workspace: str = "o/r#1", signature: str = SIG, scope: str = SCOPE) -> Crash | None:
        return self.crashes.repeat(
            self.job, self.fence, workspace=workspace, scope=scope, signature=signature, at=at, occurrence=occurrence(n, workspace)
        )  # fmt: skip

    def end(self) -> None:
        self.bench.registry.jobs.finish(self.job, self.fence, {})


def filed(bench: Bench, record: Crash | None = None, **fields: Any) -> Crash:
    filing = Filing(bench)
    made, new = filing.add(record or named(**fields))
    assert new
    filing.end()
    return made


def test_a_report_is_recorded_once_with_its_counter_event_and_place_in_every_list(bench: Bench) -> None:
    bench.workspace()
    filing = Filing(bench)
    made, new = filing.add(named())
    assert new
    assert (made.count, made.keep, made.deleting, made.occurrences) == (1, False, False, [occurrence()])
    assert made.first_at == made.last_at == made.at
    assert bench.registry.crashes.get(made.id) == made
    assert filing.add(named())[1]  # its answer was lost
    assert bench.counter("crash_reports") == 1
    assert bench.kinds().count("workspace.crashed") == 1
    crashes = bench.registry.crashes
    for found in (
        crashes.list(), crashes.list(workspace="o/r#1"), crashes.list(repo="o/r"), crashes.list(host=HOST),
        crashes.list(since=made.at),
    ):  # fmt: skip
        assert [each.id for each in found] == [made.id]
    assert crashes.list(since=made.at + 1) == []
    assert crashes.list(workspace="o/r#2") == crashes.list(repo="o/x") == crashes.list(host="h2") == []
    assert crashes.list(limit=0) == []
    assert bench.registry.workspaces.get("o/r#1").crash_reports == 1


def test_b51_a_report_is_no_sign_of_life_and_moves_no_deadline(bench: Bench) -> None:
    before = bench.workspace(expires_in_ms=60_000)
    filed(bench)
    after = bench.registry.workspaces.get("o/r#1")
    assert (after.last_active, after.last_signal, after.expires_at, after.created_at, after.signals) == (
        before.last_active, before.last_signal, before.expires_at, before.created_at, before.signals,
    )  # fmt: skip


def test_the_same_failure_within_the_window_is_counted_on_the_first_report(bench: Bench) -> None:
    bench.workspace()
    bench.workspace("o/r#2")
    first = filed(bench)
    assert bench.registry.crashes.same(SCOPE, SIG) == first.id
    filing = Filing(bench, "o/r#2")
    met = filing.again(7, first.at + 5, workspace="o/r#2")
    assert met is not None
    assert (met.id, met.count, met.last_at, met.first_at) == (first.id, 2, first.at + 5, first.at)
    assert met.occurrences == [occurrence(7, "o/r#2"), occurrence()]
    again = filing.again(7, first.at + 5, workspace="o/r#2")
    assert again is not None
    assert again.count == 2
    assert (bench.counter("crash_reports"), bench.counter("crash_repeats")) == (1, 1)
    assert bench.registry.workspaces.get("o/r#2").crash_reports == 0
    drafted = bench.registry.crashes.drafted(filing.job)
    assert drafted is not None
    assert drafted.report == first.id


def test_another_signature_repo_or_workspace_is_another_failure(bench: Bench) -> None:
    bench.workspace()
    filed(bench)
    filing = Filing(bench)
    assert filing.again(signature="f" * 16) is None
    assert filing.again(scope="repo:o/other") is None
    assert filing.again(scope="ws:o/r") is None
    assert bench.counter("crash_repeats") == 0


@pytest.mark.parametrize(("after", "counted"), [(0, True), (WINDOW - 1, True), (WINDOW, False), (WINDOW + 1, False)])
def test_the_window_ends_exactly(bench: Bench, after: int, counted: bool) -> None:
    bench.workspace()
    first = filed(bench)
    filing = Filing(bench)
    with bench.at(first.first_at + after) as later:
        filing.crashes = later.crashes
        assert (filing.again() is not None) == counted


def test_without_a_window_every_failure_has_its_own_report(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(crash_window_seconds=0)
    bench.workspace()
    filed(bench)
    assert bench.registry.crashes.same(SCOPE, SIG) is None
    filing = Filing(bench)
    assert filing.again() is None
    assert filing.add(named("bbbbbbbb"))[1]
    assert bench.counter("crash_reports") == 2


def test_of_two_same_failures_at_once_the_second_is_counted_and_told_which_report_came_first(bench: Bench) -> None:
    bench.workspace()
    bench.workspace("o/r#2")
    one, two = Filing(bench), Filing(bench, "o/r#2")
    assert one.again() is None
    assert two.again(workspace="o/r#2") is None
    first, new = one.add(named("aaaaaaaa"))
    assert new
    met, new = two.add(named("bbbbbbbb", workspace="o/r#2"), n=2)
    assert not new
    assert (met.id, met.count) == (first.id, 2)
    assert two.add(named("bbbbbbbb", workspace="o/r#2"), n=2) == (met, False)
    with pytest.raises(NotFound):
        bench.registry.crashes.get("crash-o-r-issue-1-20260102-030405Z-bbbbbbbb")
    assert bench.counter("crash_reports") == bench.counter("crash_repeats") == 1


def test_a_failure_is_not_counted_on_a_report_that_is_being_deleted(bench: Bench) -> None:
    bench.workspace()
    first = filed(bench)
    bench.registry.crashes.deleting(first.id)
    assert bench.registry.crashes.same(SCOPE, SIG) is None
    filing = Filing(bench)
    assert filing.again() is None
    made, new = filing.add(named("bbbbbbbb"))
    assert new
    bench.registry.crashes.drop(first.id)
    assert bench.registry.crashes.same(SCOPE, SIG) == made.id


def test_only_the_newest_occurrences_are_named_and_all_are_counted(bench: Bench) -> None:
    bench.workspace()
    first = filed(bench)
    for n in range(1, MOST_OCCURRENCES + 6):
        filing = Filing(bench)
        assert filing.again(n, first.at + n) is not None
        filing.end()
    found = bench.registry.crashes.get(first.id)
    assert found.count == MOST_OCCURRENCES + 6
    assert [each["at"] for each in found.occurrences] == list(range(MOST_OCCURRENCES + 5, 5, -1))


def test_a_run_that_lost_its_lease_writes_nothing(bench: Bench) -> None:
    bench.workspace()
    filing = Filing(bench)
    bench.lose_lease(filing.job)
    assert Filing(bench).fence > filing.fence
    for call in (
        lambda: filing.add(named()), filing.again, lambda: filing.crashes.draft(filing.job, filing.fence, {"a": 1})
    ):  # fmt: skip
        with pytest.raises(LeaseLost):
            call()
    assert bench.registry.crashes.list() == []
    assert bench.counter("crash_reports") == 0


def test_evidence_is_kept_as_the_first_run_took_it(bench: Bench) -> None:
    bench.workspace()
    filing = Filing(bench)
    evidence = {"log": {"text": "\x1b[31m ü 漢 \udc80"}, "exit": {"code": 1}}
    first = filing.crashes.draft(filing.job, filing.fence, evidence)
    assert (first.evidence, first.report) == (evidence, "")
    again = filing.crashes.draft(filing.job, filing.fence, {"other": 1})
    assert again == first
    assert filing.crashes.drafted(filing.job) == first
    assert filing.crashes.drafted("other") is None
    key = bench.key(f"crash:draft:{filing.job}")
    assert 0 < bench.raw.pttl(key) <= 86_400_000
    filing.add(named())
    assert bench.registry.crashes.drafted(filing.job).evidence is None  # type: ignore[union-attr]
    assert bench.raw.pttl(key) > 0


def test_evidence_that_is_too_large_for_the_registry_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mothball.registry.crashes.MAX_DRAFT_BYTES", 100)
    bench.workspace()
    filing = Filing(bench)
    with pytest.raises(Oversize):
        filing.crashes.draft(filing.job, filing.fence, {"log": "".join(chr(33 + n * 7 % 90) * (n % 3 + 1) for n in range(2000))})
    assert filing.crashes.drafted(filing.job) is None


def test_a_report_is_found_by_the_beginning_and_by_the_end_of_its_name(bench: Bench) -> None:
    bench.workspace()
    one = filed(bench)
    filing = Filing(bench)
    two, _ = filing.add(named("bbbbbbbb", signature="f" * 16))
    get = bench.registry.crashes.get
    assert get(f"{one.id}.tar") == get(f"{one.id}.tar.age") == get("aaaaaaaa") == get(one.id) == one
    assert get(two.id[:-3]) == two
    with pytest.raises(InvalidParams, match="2 crash reports"):
        get("crash-o-r")
    for wrong in ("nothing", "crash-x", "../crash", "", "crash-" + "x" * 300, "by:at", "crash-*"):
        with pytest.raises(NotFound):
            get(wrong)


def test_keep_is_set_and_lifted_with_one_event_each(bench: Bench) -> None:
    bench.workspace()
    made = filed(bench)
    crashes = bench.registry.crashes
    assert crashes.mark(made.id, True, "me").keep
    assert crashes.mark(made.id, True, "me").keep
    assert not crashes.mark(made.id, False).keep
    assert [kind for kind in bench.kinds() if kind.startswith("crash.")] == ["crash.kept", "crash.unkept"]
    with pytest.raises(NotFound):
        crashes.mark("crash-x-20260102-030405Z-aaaaaaaa", True)


def test_a_package_is_noted_later_and_its_loss_too(bench: Bench) -> None:
    bench.workspace()
    made = filed(bench, path="", sha256="", bytes=0)
    crashes = bench.registry.crashes
    noted = crashes.packaged(made.id, path="/p.tar.age", sha256="a" * 64, bytes=7, files=3, sealed=True, artifact="sha256:n")
    assert (noted.path, noted.bytes, noted.files, noted.sealed, noted.artifact) == ("/p.tar.age", 7, 3, True, "sha256:n")
    gone = crashes.packaged(made.id, path="", sha256="", bytes=0, files=3, sealed=False)
    assert (gone.path, gone.artifact) == ("", "sha256:n")


def test_nothing_is_left_of_a_deleted_report(bench: Bench) -> None:
    bench.workspace()
    made = filed(bench)
    crashes = bench.registry.crashes
    assert crashes.deleting(made.id, "me").deleting
    assert crashes.drop(made.id, reason="age", by="retention")
    assert not crashes.drop(made.id)
    assert [key for key in bench.raw.scan_iter(bench.key("crash:*")) if ":draft:" not in key] == []
    assert crashes.same(SCOPE, SIG) is None
    assert bench.registry.workspaces.get("o/r#1").crash_reports == 0
    assert bench.counter("crash_reports_deleted") == 1
    assert bench.kinds().count("crash.deleted") == 1


def test_a_report_that_only_the_store_knows_is_known_again_and_not_counted(bench: Bench) -> None:
    bench.workspace()
    at = bench.registry.time_ms() - 1000
    assert bench.registry.crashes.adopt(named(at=at))
    assert not bench.registry.crashes.adopt(named(at=at))
    found = bench.registry.crashes.list(workspace="o/r#1")
    assert [(each.at, each.count, each.files) for each in found] == [(at, 1, 2)]
    assert bench.counter("crash_reports") == 0
    assert bench.registry.workspaces.get("o/r#1").crash_reports == 1


def test_a_time_of_a_wrong_clock_is_not_adopted_into_the_future(bench: Bench) -> None:
    now = bench.registry.time_ms()
    bench.registry.crashes.adopt(named(at=now + 10**9))
    assert now <= bench.registry.crashes.list()[0].at <= bench.registry.time_ms()


def test_the_layout_of_a_released_workspace_is_needed_while_reports_of_it_are_kept(bench: Bench) -> None:
    bench.workspace()
    made = filed(bench)
    facts = StoreFacts(bench.registry.workspaces, HOST, bench.registry.crashes)
    bench.registry.workspaces.release("o/r#1")
    assert facts.standing("o/r#1") == "known"
    bench.raw.delete(bench.key("ws:gone:o/r#1"))
    assert facts.standing("o/r#1") == "known"
    assert StoreFacts(bench.registry.workspaces, "h2", bench.registry.crashes).standing("o/r#1") == "unknown"
    bench.registry.crashes.drop(made.id)
    assert facts.standing("o/r#1") == "gone"  # the evidence on which a collector may act
    assert 0 < bench.raw.pttl(bench.key(f"crash:gone:{HOST}:o/r#1")) <= bench.settings.tombstone_seconds * 1000


def test_a_registry_that_lost_its_data_says_nothing_of_a_layout(bench: Bench) -> None:
    assert StoreFacts(bench.registry.workspaces, HOST, bench.registry.crashes).standing("o/r#1") == "unknown"


def test_every_key_of_crash_reports_runs_out_or_may_stand(bench: Bench) -> None:
    bench.workspace()
    filed(bench)
    filing = Filing(bench)
    filing.crashes.draft(filing.job, filing.fence, {"a": 1})
    names = keys.Keys(bench.settings.namespace)
    for key in bench.raw.scan_iter(bench.key("crash:*")):
        assert bench.raw.pttl(key) > 0 or any(fnmatchcase(names.bare(key), each) for each in keys.STANDING), key
    sig = bench.key(f"crash:sig:{SIG}:{SCOPE}")
    assert 0 < bench.raw.pttl(sig) <= WINDOW


@pytest.mark.parametrize("wrong", ["", "crash-", "snap-1", "crash-a/b", "crash-\0", "crash-a\n", "crash-" + "x" * 200, None])
def test_only_the_id_of_a_report_becomes_a_key(wrong: object) -> None:
    with pytest.raises(InvalidParams):
        crash_id(wrong)


def test_the_scope_of_a_workspace_is_never_that_of_a_repo() -> None:
    assert scope_of("a", None) == "ws:a"
    assert scope_of("a", "a") == "repo:a"

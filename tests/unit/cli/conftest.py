"""The command line in this process, and a fleet that answers from memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mothball import errors
from mothball.registry import CancelResult, Event, Host, Job, TouchResult, Workspace
from mothball.settings import Settings
from tests.commands import Answer, in_process

NOW = 1_700_000_100_000


def workspace(**fields: Any) -> Workspace:
    """A record with everything in it."""
    values: dict[str, Any] = {
        "id": "owner/repo#7", "host": "box", "path": "/srv/w/7", "repo": "owner/repo", "number": 7, "title": "fix\x1b[2Jit",
        "mode": "ephemeral", "agent_id": None, "agent_name": "agent-1", "intent": None, "changeset_id": None, "base_commit": None,
        "state": "active", "created_at": NOW - 60_000, "last_active": NOW - 5_000, "last_signal": "touch", "expires_at": None,
        "pinned": False, "pin_reason": "", "holds": [], "fence": 3, "generation": 2, "digest": "sha256:" + "a" * 64,
        "bytes": 3 * 1024**2, "files": 12, "high_water_bytes": 4 * 1024**2, "stored_bytes": 1024,
        "snapshots": 0, "crash_reports": 0,
        "last_good_at": NOW - 1000, "last_error": "", "retry_count": 0, "runtime": {}, "policy": {},
    }  # fmt: skip
    return Workspace(**{**values, **fields})


def job(**fields: Any) -> Job:
    """A finished capture."""
    values: dict[str, Any] = {
        "id": "job-1", "task": "workspace.capture", "args": {"workspace": "owner/repo#7"}, "workspace": "owner/repo#7",
        "host": "box", "queue": "host.box", "state": "succeeded", "lane": "capture", "submitted_at": NOW - 9000,
        "started_at": NOW - 8000,
        "finished_at": NOW - 6000, "attempts": 0, "deliveries": 1, "fence": 3, "worker": "box@box", "progress": {}, "outcome": None,
        "error_code": None, "error": None, "cancel_requested": False, "due_at": None, "origin": "client", "joined": 0,
    }  # fmt: skip
    return Job(**{**values, **fields})


class FakeFleet:
    """Stands in for `mothball.client.Fleet`; `raises` is thrown by every call."""

    raises: BaseException | None = None
    records: list[Workspace] = []  # noqa: RUF012 - reset by the fixture
    job_list: list[Job] = []  # noqa: RUF012 - reset by the fixture

    def __init__(self) -> None:
        if FakeFleet.raises is not None:
            raise FakeFleet.raises
        self.settings = Settings(host="box")
        self.registry = SimpleNamespace(
            time_ms=lambda: NOW,
            hosts=SimpleNamespace(
                list=lambda: [Host("box", {"version": "1", "concurrency": 2, "data_dir": "/d"}, NOW - 1000, True)]
            ),
            events=SimpleNamespace(
                list=lambda limit=100, workspace=None, kind=None: [
                    Event(id="1700000000000-1", at=1_700_000_000_000, kind="job.succeeded", fields={"job": "job-2"}),
                    Event(id="1700000000000-0", at=1_700_000_000_000, kind="workspace.registered", fields={"workspace": "a\nb"}),
                ]
            ),
            jobs=SimpleNamespace(cancel=lambda job_id: CancelResult(cancelled=True, state="running")),
        )

    def __enter__(self) -> FakeFleet:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def register_new(self, workspace_id: str, path: Any, **fields: Any) -> tuple[Workspace, bool]:
        return workspace(id=workspace_id, path=str(path)), True

    def list(self, **_: Any) -> list[Workspace]:
        return FakeFleet.records

    def get(self, workspace_id: str) -> Workspace:
        for record in FakeFleet.records:
            if record.id == workspace_id:
                return record
        raise errors.NotFound(what="workspace", id=workspace_id)

    def touch(self, workspace_id: str, signal: str) -> TouchResult:
        return TouchResult(moved=True, last_active=NOW, signal=signal)

    def pin(self, workspace_id: str, reason: str, by: str) -> Workspace:
        return workspace(id=workspace_id, pinned=True, pin_reason=reason)

    def unpin(self, workspace_id: str) -> Workspace:
        return workspace(id=workspace_id)

    def release(self, workspace_id: str, by: str) -> bool:
        return workspace_id == "owner/repo#7"

    def capture(self, workspace_id: str, **_: Any) -> Any:
        return SimpleNamespace(id="job-1", joined=False)

    def jobs(self, **_: Any) -> Any:
        return FakeFleet.job_list

    def job_record(self, job_id: str) -> Job:
        return FakeFleet.job_list[0]


@pytest.fixture
def fake_fleet(monkeypatch: pytest.MonkeyPatch) -> type[FakeFleet]:
    """Every command talks to this fleet."""
    monkeypatch.setattr("mothball.client.Fleet", FakeFleet)
    monkeypatch.setattr(FakeFleet, "raises", None)
    monkeypatch.setattr(FakeFleet, "records", [workspace()])
    monkeypatch.setattr(FakeFleet, "job_list", [job()])
    return FakeFleet


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`cli("ls", "--json")`: run one command line in this process."""
    return in_process(capsys)

"""The producers' API about crash reports: file one, look at those there are, fetch and delete them.

What a producer says of a failure (error, title, command, environment) is clipped and redacted here, before it is written anywhere:
arguments of jobs stand in the registry and are shown by Flower.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Literal

from mothball import errors
from mothball.client_base import Connected
from mothball.handles import JobHandle
from mothball.names import check_workspace_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mothball.registry import Crash

    Crashed = list[Crash]

REPORT_TASK: Final = "workspace.crash_report"
DELETE_TASK, PACKAGE_TASK, SHOW_TASK, RETAIN_TASK = "crash.delete", "crash.package", "crash.show", "crash.retain"
MAX_COMMAND: Final = 1000
"""Most words of a command that a report takes."""
_TEXT_BYTES: Final = 96 * 1024
"""Most bytes of JSON of one of the producer's texts: with all of them a job's arguments stay below their limit."""


@dataclass(frozen=True, slots=True)
class CrashResult:
    """What filing a crash report came to (B-57).

    `id` names the report; with `repeated` it is that of an earlier report of the same failure, on which this one was counted, and
    only the capture is new. `path`, `sha256`, `bytes` and `files` are those of the package on `host`; `path` is empty without one.
    `digest` and `generation` are the capture's; `source` is ``fresh``, or ``last_good`` for the `reason`. `redactions`: by rule.
    """

    id: str
    workspace: str
    host: str
    repeated: bool
    count: int
    signature: str
    title: str
    digest: str
    generation: int
    source: str
    reason: str
    artifact: str
    path: str
    sha256: str
    bytes: int
    files: int
    sealed: bool
    redactions: dict[str, int]


class CrashJob(JobHandle[CrashResult]):
    """A submitted crash report; `wait` returns the `CrashResult`."""

    def __init__(self, fleet: Connected, job_id: str) -> None:
        super().__init__(fleet, job_id, crash_result)


def crash_result(outcome: dict[str, Any]) -> CrashResult:
    """The result of a crash report from its job's outcome."""
    return CrashResult(**{each.name: outcome[each.name] for each in fields(CrashResult)})


class CrashCalls(Connected):
    """See `mothball.client.Fleet`, which inherits all of it."""

    def crash_report(
        self,
        workspace: str,
        error: str = "",
        *,
        title: str = "",
        exit_code: int | None = None,
        signal: int | str | None = None,
        command: Sequence[str] | None = None,
        log: str | None = None,
        env: Mapping[str, str] | None = None,
        cgroup: str | Mapping[str, Any] | None = None,
        pid: int | None = None,
        since: str | None = None,
        package: bool = True,
        binaries: Literal["include", "exclude"] = "include",
        base: str | None = None,
        capture: bool = True,
        by: str = "",
    ) -> CrashJob:
        """Ask for a crash report: what is known of a failure, the capture of its workspace, and a package of both without secrets.

        `error` is the text of the failure (of a long one the first 16 and the last 48 KiB are kept), `title` one line for lists.
        `exit_code`, `signal` (a number or a name), `command` and `env` are those of what failed; of `env` only what the setting
        ``crash_env`` allows is sent. `log`: path of a log file on the workspace's host, below a workspace root; its end is kept.
        `cgroup`: path of the cgroup in which it ran, or what was read of it before it went. `pid`: a process of it that still runs.
        `since`: what changes are compared with (``snap-3``); default the newest snapshot. `package`: also write the package; with
        `base`, an OCI image, runnable where nothing is installed. With `binaries` ``exclude`` binary files stay out of it.
        Without `capture` the last capture is taken as it is. All texts are redacted before they are sent.

        Raises `InvalidParams`, `NotFound`, `Gone`, `HostOffline`, `Unavailable`.
        """
        args = self.crash_arguments(
            workspace, error=error, title=title, exit_code=exit_code, signal=signal, command=command, log=log, env=env,
            cgroup=cgroup, pid=pid, by=by,
        )  # fmt: skip
        args |= {"since": since, "package": package, "binaries": binaries, "base": base, "capture": capture}
        return CrashJob(self, self.submit(REPORT_TASK, args, workspace=workspace).job.id)

    def crash_arguments(
        self,
        workspace: str,
        *,
        error: str = "",
        title: str = "",
        exit_code: int | None = None,
        signal: int | str | None = None,
        command: Sequence[str] | None = None,
        log: str | None = None,
        env: Mapping[str, str] | None = None,
        cgroup: str | Mapping[str, Any] | None = None,
        pid: int | None = None,
        by: str = "",
    ) -> dict[str, Any]:
        """What `crash_report` sends of a failure: checked, clipped, and with nothing secret in it. Raises `InvalidParams`."""
        from mothball.crash.given import ended
        from mothball.crash.text import clean, clip, one_line
        from mothball.redact import redactor_for

        if not isinstance(error, str) or not isinstance(title, str):
            raise errors.InvalidParams("error and title must be texts")
        if command is not None and (isinstance(command, (str, bytes)) or not all(isinstance(each, str) for each in command)):
            raise errors.InvalidParams("command must be a list of texts, such as ['make', 'test']")
        how = ended(exit_code, signal)
        redactor = redactor_for(self.settings, self.registry)
        # After colours and controls went, and before anything is cut: a secret in parts has no shape that a rule knows.
        text = redactor.text(clean(error))
        args: dict[str, Any] = {
            "workspace": check_workspace_id(workspace), "error": _fitting(clip(text).text),
            "title": one_line(redactor.text(clean(title))), "by": one_line(redactor.text(clean(by))),
            "exit_code": how.code, "signal": how.signal, "log": log, "pid": pid,
            "cgroup": cgroup if cgroup is None or isinstance(cgroup, str) else redactor.document(dict(cgroup)),
        }  # fmt: skip
        if len(text) != len(args["error"]):
            args["error_bytes"] = len(error.encode("utf-8", "replace"))
        if command is not None:
            args["command"] = [clip(word, 4096).text for word in redactor.argv([clean(word) for word in command])[:MAX_COMMAND]]
        if env is not None:
            allow = self.settings.crash_env
            allowed = {name: value for name, value in env.items() if any(fnmatchcase(name, each) for each in allow)}
            found = redactor.env({clean(name): clean(value) for name, value in allowed.items()})
            args["env"] = {name: clip(value, 4096).text for name, value in sorted(found.items())}
        return args

    def crash_reports(
        self,
        *,
        workspace: str | None = None,
        repo: str | None = None,
        host: str | None = None,
        since_ms: int | None = None,
        limit: int = 100,
    ) -> Crashed:
        """At most `limit` records of crash reports, newest first; of one workspace, repo or host, not older than `since_ms`."""
        return self.registry.crashes.list(workspace=workspace, repo=repo, host=host, since=since_ms, limit=limit)

    def crash_show(self, report: str) -> JobHandle[dict[str, Any]]:
        """Ask the report's host for the whole report: ``record`` and ``report``, which docs/crash-report.schema.json describes."""
        record = self.registry.crashes.get(report)
        return self._host_job(SHOW_TASK, record, {})

    def crash_package(
        self, report: str, *, binaries: Literal["include", "exclude"] = "include", base: str | None = None
    ) -> JobHandle[dict[str, Any]]:
        """Ask for the package of a report that has none; the result is its path on that host, sha256, bytes and files."""
        return self._host_job(PACKAGE_TASK, self.registry.crashes.get(report), {"binaries": binaries, "base": base})

    def crash_delete(self, report: str, *, by: str = "") -> JobHandle[dict[str, Any]]:
        """Ask to delete a report: its package at once, the report and its capture by way of the trash."""
        return self._host_job(DELETE_TASK, self.registry.crashes.get(report), {"by": by})

    def crash_forget(self, report: str, *, by: str = "") -> Crash:
        """Forget the record of a report whose host is gone for good, and with it the files. Should the host come back, so do they.

        Raises `InvalidParams` while the host is online: `crash_delete` deletes what it has.
        """
        record = self.registry.crashes.get(report)
        if any(each.host == record.host and each.online for each in self.registry.hosts.list()):
            raise errors.InvalidParams(f"host {record.host!r} is online: delete crash report {record.id} there, without --forget")
        self.registry.crashes.drop(record.id, reason="host forgotten", by=by)
        return record

    def crash_keep(self, report: str, keep: bool = True, *, by: str = "") -> Crash:
        """Protect a report from retention, or end that. Raises `NotFound`."""
        return self.registry.crashes.mark(self.registry.crashes.get(report).id, keep, by)

    def crash_retain(self, host: str, *, dry_run: bool = False) -> JobHandle[dict[str, Any]]:
        """Ask `host` to delete the reports that are too old, too many or too large together; a dry run says which."""
        lane = None if dry_run else "crash_retain"
        submitted = self.submit(RETAIN_TASK, {"host": host, "dry_run": dry_run}, workspace=None, host=host, lane=lane)
        return JobHandle(self, submitted.job.id, dict, joined=submitted.joined)

    def _host_job(self, task: str, record: Crash, args: dict[str, Any]) -> JobHandle[dict[str, Any]]:
        full = {"host": record.host, "report": record.id, **args}
        return JobHandle(self, self.submit(task, full, workspace=None, host=record.host).job.id, dict)


def _fitting(text: str) -> str:
    """`text`, cut further when its JSON form is much longer than its bytes."""
    from mothball.crash.text import clip

    limit = len(text.encode("utf-8", "replace"))
    while len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) > _TEXT_BYTES and limit > 1:
        limit //= 2
        text = clip(text, limit).text
    return text

"""The producers' API: ask the fleet for work and wait for it.

    from mothball import Fleet

    fleet = Fleet("redis://127.0.0.1:6379")
    fleet.register("owner/repo#12", "/srv/workspaces/repo-12")
    result = fleet.capture("owner/repo#12").wait(timeout=600)

A producer needs a Redis URL and nothing else: no Celery, no broker settings, no store. Importing this module is cheap;
the registry client and the settings are loaded by the first `Fleet`. All errors are `mothball.errors.MothballError`;
an unreachable Redis is `Unavailable` within ``redis_timeout`` (and never later than 10 s).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mothball import errors
from mothball.client_caches import CacheCalls
from mothball.client_crash import CrashCalls
from mothball.client_lifecycle import LifecycleCalls
from mothball.handles import FINAL_STATES, CaptureJob, JobHandle, PullJob, PushJob, RestoreJob, SnapshotJob
from mothball.names import check_workspace_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mothball.registry import TouchResult, Workspace

    # `Fleet.list` hides the builtin inside the class body.
    Workspaces = list[Workspace]

__all__ = ["FINAL_STATES", "CaptureJob", "Fleet", "JobHandle", "SnapshotJob"]


class Fleet(LifecycleCalls, CrashCalls, CacheCalls):
    """The fleet behind one Redis, as a producer or an operator sees it. Thread-safe; use it as a context manager or `close` it."""

    # -- workspaces -------------------------------------------------------------------------------------------------

    def register(self, workspace: str, path: str | Path, **fields: Any) -> Workspace:
        """Register directory `path` as `workspace` and return its record; the same id and path again is the same record.

        Again with another `runtime` says what runs there now, and brings one back that was stopped, or stranded by the same agent.
        Fields: host (default: this host), repo, number, title, mode (``ephemeral``, ``persistent``), agent_id, agent_name,
        intent, changeset_id, base_commit, expires_in_ms, pinned, runtime, policy. Another path: `AlreadyExists`.
        """
        return self.register_new(workspace, path, **fields)[0]

    def register_new(self, workspace: str, path: str | Path, **fields: Any) -> tuple[Workspace, bool]:
        """As `register`, and whether the record is new."""
        check_workspace_id(workspace)
        host = fields.pop("host", None) or self.settings.host
        text = _clean_path(path, local=host == self.settings.host)
        return self.registry.workspaces.register(workspace, host=host, path=text, **fields)

    def get(self, workspace: str) -> Workspace:
        """The record; `NotFound`, or `Gone` with the reason when it was released."""
        return self.registry.workspaces.get(check_workspace_id(workspace))

    def list(self, *, repo: str | None = None, host: str | None = None, state: str | None = None, limit: int = 1000) -> Workspaces:
        """At most `limit` records, oldest first."""
        return self.registry.workspaces.list(repo=repo, host=host, state=state, limit=limit)

    def touch(self, workspace: str, signal: str = "touch") -> TouchResult:
        """Say that the workspace is in use; touches within 30 s of the last one move nothing (D-06)."""
        return self.registry.workspaces.touch(check_workspace_id(workspace), signal)

    def pin(self, workspace: str, reason: str = "", by: str = "") -> Workspace:
        """Exempt the workspace from eviction; it still counts in the budget."""
        return self.registry.workspaces.pin(check_workspace_id(workspace), reason, by)

    def unpin(self, workspace: str) -> Workspace:
        """Take the pin away."""
        return self.registry.workspaces.unpin(check_workspace_id(workspace))

    def set_retention(self, workspace: str, rules: str | dict[str, Any] | None) -> Workspace:
        """Say which snapshots are kept, such as ``last=10,within=7d`` or ``all``; None: as the settings of its host say."""
        return self.registry.retentions.set(check_workspace_id(workspace), rules)

    def release(self, workspace: str, by: str = "") -> bool:
        """Forget the workspace (B-42); True when there was one. `Busy` while a job runs on it. The directory is not touched."""
        return bool(self.registry.workspaces.release(check_workspace_id(workspace), by))

    # -- jobs -------------------------------------------------------------------------------------------------------

    def capture(
        self,
        workspace: str,
        *,
        paths: Sequence[str] | None = None,
        full: bool = False,
        verify: bool = False,
        options: dict[str, Any] | None = None,
    ) -> CaptureJob:
        """Ask for a capture. While one is queued for the workspace, this request joins it (Q-31).

        `paths`: files to read again although size and times say they are unchanged. `full`: write one fresh layer.
        `verify`: read back what was written. `options`: overrides of the capture settings for this job; requests whose
        options differ do not join.
        """
        args: dict[str, Any] = {"workspace": check_workspace_id(workspace), "full": full, "verify": verify}
        # What is not said must not be sent: joined to a queued request it would replace what that one said.
        if paths is not None:
            args["paths"] = _clean_paths(paths)
        if options:
            args["options"] = dict(options)
        submitted = self.submit("workspace.capture", args, workspace=workspace, lane="capture")
        return CaptureJob(self, submitted.job.id, joined=submitted.joined)

    def snapshot(
        self,
        workspace: str,
        *,
        fresh: bool = False,
        label: str = "",
        note: str = "",
        keep: bool = False,
        paths: Sequence[str] | None = None,
        full: bool = False,
        verify: bool = False,
        options: dict[str, Any] | None = None,
    ) -> SnapshotJob:
        """Ask to number the current capture as the next ``snap-<n>``; with `fresh` it is captured first, in the same job.

        `label` is one line, `note` a text; with `keep` retention never takes it. `paths`, `full`, `verify` and `options` are
        those of `capture` and need `fresh`. Each request makes a snapshot of its own.
        """
        args: dict[str, Any] = {"workspace": check_workspace_id(workspace), "fresh": fresh, "label": label, "note": note}
        args |= {"keep": keep, "full": full, "verify": verify, "paths": None if paths is None else _clean_paths(paths)}
        submitted = self.submit("workspace.snapshot", {**args, "options": dict(options or {})}, workspace=workspace)
        return SnapshotJob(self, submitted.job.id)

    def keep(
        self,
        workspace: str,
        snapshots: Sequence[str],
        *,
        keep: bool | None = True,
        label: str | None = None,
        note: str | None = None,
    ) -> JobHandle[dict[str, Any]]:
        """Ask to set (or lift) the keep flag of snapshots, or to change their label or note; None leaves a thing as it is."""
        args = {"workspace": check_workspace_id(workspace), "snapshots": _names(snapshots), "keep": keep, "label": label}
        submitted = self.submit("workspace.keep", {**args, "note": note}, workspace=workspace)
        return JobHandle(self, submitted.job.id, dict)

    def forget(self, workspace: str, snapshots: Sequence[str], *, reason: str = "") -> JobHandle[dict[str, Any]]:
        """Ask to take snapshots out of the workspace's index; for a while they can be undeleted."""
        args = {"workspace": check_workspace_id(workspace), "snapshots": _names(snapshots), "reason": reason}
        return JobHandle(self, self.submit("workspace.forget", args, workspace=workspace).job.id, dict)

    def retain(self, host: str, *, workspace: str | None = None, dry_run: bool = False) -> JobHandle[dict[str, Any]]:
        """Ask `host` to apply retention to its workspaces, or to one of them; a dry run says what would go and why."""
        args: dict[str, Any] = {"host": host, "dry_run": dry_run}
        if workspace is not None:
            args["workspace"] = check_workspace_id(workspace)
        # In one lane a dry run, or the request for one workspace, would change what the queued request of all asked for.
        lane = "retain" if workspace is None and not dry_run else None
        submitted = self.submit("store.retain", args, workspace=None, host=host, lane=lane)
        return JobHandle(self, submitted.job.id, dict, joined=submitted.joined)

    def collect(
        self, host: str, *, dry_run: bool = False, empty_trash: bool = False, forget_orphans: Sequence[str] = ()
    ) -> JobHandle[dict[str, Any]]:
        """Ask `host` to collect its store: what no capture needs goes to the trash, and from there for good after its time.

        A dry run says what would go. `empty_trash` gives up undelete. `forget_orphans`: workspaces that no registry knows.
        """
        args: dict[str, Any] = {
            "host": host,
            "dry_run": dry_run,
            "empty_trash": empty_trash,
            "forget_orphans": list(forget_orphans),
        }
        # Joined to a queued request, a dry run would take its effect away, and the others would give it more than it asked for.
        lane = None if dry_run or empty_trash or forget_orphans else "collect"
        submitted = self.submit("store.collect", args, workspace=None, host=host, lane=lane)
        return JobHandle(self, submitted.job.id, dict, joined=submitted.joined)

    def verify(
        self, host: str, *, workspace: str | None = None, level: str = "structure", sample: float | None = None,
        seed: int | None = None, repair_from: str | None = None,
    ) -> JobHandle[dict[str, Any]]:  # fmt: skip
        """Ask `host` to verify its store: ``structure``, ``sample`` (per cent of the bytes), ``deep`` or ``content``.

        Damage does not fail the job: it is in the result's ``problems``. `repair_from`: ``REGISTRY/REPO`` to fetch blobs from.
        """
        given = {"workspace": workspace, "sample_percent": sample, "seed": seed, "repair_from": repair_from}
        args: dict[str, Any] = {"host": host, "level": level} | {name: value for name, value in given.items() if value is not None}
        # No lane: a request that asks for more must not be joined by one that asks for less.
        return JobHandle(self, self.submit("store.verify", args, workspace=None, host=host).job.id, dict)

    def undelete(self, workspace: str, ref: str | None = None, *, host: str | None = None) -> JobHandle[dict[str, Any]]:
        """Ask to bring the forgotten capture `ref` (None: all) of `workspace` back from the trash of `host`.

        `host` is that of the workspace's record unless given; a workspace that was released has none.
        """
        place = host or self.get(workspace).host
        args = {"host": place, "workspace": check_workspace_id(workspace), "ref": ref}
        return JobHandle(self, self.submit("store.undelete", args, workspace=None, host=place).job.id, dict)

    def push(self, workspace: str, to: str, *, ref: str = "latest") -> PushJob:
        """Ask the workspace's host to bring a capture (``latest``, ``snap-3`` or a digest) to `to`, ``REGISTRY/REPO:TAG``.

        Blobs that are there are not sent; an interrupted push goes on where it was. Credentials are those of the host's
        docker config file.
        """
        args = {"workspace": check_workspace_id(workspace), "ref": ref, "to": to}
        return PushJob(self, self.submit("workspace.push", args, workspace=workspace).job.id)

    def pull(self, workspace: str, reference: str, *, label: str = "") -> PullJob:
        """Ask the workspace's host to fetch ``REGISTRY/REPO:TAG`` (or ``@sha256:...``) as the workspace's next snapshot."""
        args = {"workspace": check_workspace_id(workspace), "reference": reference, "label": label}
        return PullJob(self, self.submit("workspace.pull", args, workspace=workspace).job.id)

    def restore(
        self,
        workspace: str | None,
        to: str,
        *,
        ref: str = "latest",
        include: Sequence[str] = (),
        overwrite: str | None = None,
        delete_extra: bool = False,
        dry_run: bool = False,
        host: str | None = None,
        source: str | None = None,
    ) -> RestoreJob:
        """Ask for a capture as a directory `to` (absolute, below a workspace root of that host).

        A capture of `workspace` is restored on the workspace's host. With `source`, ``REGISTRY/REPO:TAG``, it is fetched from
        there instead and any `host` can do it; push first to bring a capture to another host. The other arguments are those
        of `mothball.store.restore.restore`; a job that is repeated goes on where its last run ended.
        """
        if not Path(to).is_absolute():
            raise errors.InvalidParams(f"target {to!r} must be an absolute path")
        args: dict[str, Any] = {
            "to": to, "include": list(include), "overwrite": overwrite, "delete_extra": delete_extra, "dry_run": dry_run
        }  # fmt: skip
        if source is not None:
            place = host or (self.get(workspace).host if workspace is not None else self.settings.host)
            submitted = self.submit("store.restore", {**args, "host": place, "source": source}, workspace=None, host=place)
            return RestoreJob(self, submitted.job.id)
        if workspace is None:
            raise errors.InvalidParams("say which workspace, or a source to fetch from")
        if host is not None and (home := self.get(workspace).host) != host:
            raise errors.InvalidParams(
                f"the captures of {workspace!r} are on host {home!r}; push one to a registry and restore it on {host!r} from there"
            )
        args |= {"workspace": check_workspace_id(workspace), "ref": ref}
        return RestoreJob(self, self.submit("workspace.restore", args, workspace=workspace).job.id)

    def bundle(
        self,
        workspace: str,
        to: str,
        *,
        ref: str = "latest",
        rootless: bool = False,
        base: str | None = None,
        command: Sequence[str] = (),
        writable: bool = False,
    ) -> JobHandle[dict[str, Any]]:
        """Ask for a capture as a runtime bundle in the new directory `to` (absolute, below a workspace root of its host).

        `base`: an OCI image whose files lie around the workspace; `command`: what the bundle starts, else what the image says.
        """
        if not Path(to).is_absolute():
            raise errors.InvalidParams(f"target {to!r} must be an absolute path")
        args = {
            "workspace": check_workspace_id(workspace), "ref": ref, "to": to, "rootless": rootless, "base": base,
            "command": list(command), "writable": writable,
        }  # fmt: skip
        return JobHandle(self, self.submit("workspace.bundle", args, workspace=workspace).job.id, dict)


def _clean_path(path: str | Path, *, local: bool) -> str:
    text = str(path)
    if not text or "\0" in text:
        raise errors.InvalidParams("the path of a workspace must be a non-empty text without NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise errors.InvalidParams(
            f"the path of a workspace must be valid UTF-8 (names inside it may be anything): {text!a}"
        ) from None
    if not local:
        if not Path(text).is_absolute():
            raise errors.InvalidParams(f"path {text!r} must be absolute when the directory is on another host")
        return text
    found = Path(text).expanduser().absolute()
    # Only then: a path through a symbolic link is registered as it was given, and resolved by each capture.
    return str(found.resolve() if ".." in found.parts else found)


def _names(snapshots: Sequence[str]) -> list[str]:
    if isinstance(snapshots, (str, bytes)):
        raise errors.InvalidParams("snapshots must be a list of names, such as snap-3")
    return list(snapshots)


def _clean_paths(paths: Sequence[str]) -> list[str]:
    if isinstance(paths, (str, bytes)) or not all(isinstance(path, str) for path in paths):
        raise errors.InvalidParams("paths must be a list of texts")
    for path in paths:
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            # Arguments travel as JSON, which has no form for such a name.
            raise errors.InvalidParams(f"{path!a} is not valid UTF-8 and has no form here; full=True reads every file") from None
    return sorted(set(paths))

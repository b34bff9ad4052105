"""workspace.crash_report: evidence, a capture, the report, and a package that can be handed over (B-50 to B-59).

The evidence comes first and is kept at once: it is what passes. A run of the job that is repeated uses that of the first one, so it
makes the same report. Nothing of it is a sign of life (B-51), and what is stored of the workspace is never lowered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog

from mothball.crash.report import Captured
from mothball.errors import Cancelled, LeaseLost, MothballError, Oversize, SourceMissing
from mothball.registry import Crash, Workspace
from mothball.registry.crashes import Draft, scope_of
from mothball.settings import Settings
from mothball.store import Ref, Store
from tasks.capture import CaptureArgs, capture_now
from tasks.context import JobContext, patiently
from tasks.crash_args import CrashReportArgs
from tasks.job import Outcome, job_task
from tasks.quiet import redacted_with

log = structlog.stdlib.get_logger("mothball.crash")
_SOFT_MARGIN_SECONDS = 60
_LOG_IN_DRAFT = 512 * 1024
"""Bytes of a log that a draft keeps when all of it would be too much for the registry."""
_SHOWN_TEXT = 500
SECRET = ("error", "title", "command", "env", "cgroup", "by")
"""Arguments in which secrets may stand."""


def hard_limit(settings: Settings) -> int:
    """Hard time limit, seconds: that of a capture, and that of reading and writing as much again."""
    return settings.capture_time_limit + settings.transfer_time_limit


def soft_limit(settings: Settings) -> int:
    """Soft time limit, seconds: a minute to record why, or half of a limit shorter than two minutes."""
    return hard_limit(settings) - min(_SOFT_MARGIN_SECONDS, hard_limit(settings) // 2)


@job_task(
    name="workspace.crash_report", args=CrashReportArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit,
    blames=False, secret=SECRET,
)  # fmt: skip
def crash_report(ctx: JobContext, args: CrashReportArgs) -> Outcome:
    """File a crash report of the workspace; the same failure again within the window is counted on the first report."""
    return Outcome(result=_Filing(ctx, args).run())


class _Filing:
    """One crash report, step by step."""

    def __init__(self, ctx: JobContext, args: CrashReportArgs) -> None:
        from mothball.crash.publish import sealing
        from mothball.redact import redactor_for

        self.ctx = ctx
        self.args = args
        self.crashes = ctx.registry.crashes
        self.store = Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
        self.workspace: Workspace = patiently(lambda: ctx.registry.workspaces.get(args.workspace))
        self.redactor = patiently(lambda: redactor_for(ctx.settings, ctx.registry))
        # A recipient that is none fails here, and not after an hour's capture.
        self.seal = sealing(ctx.settings) if args.package else None

    def run(self) -> dict[str, Any]:
        """All of it; the job's result."""
        draft = self._evidence()
        if draft.report:
            return self._as_recorded(draft.report)
        if self.args.since is not None:
            self.store.refs(self.workspace.id).get(self.args.since)
        capture, git, left_out = self._capture()
        return self._file(draft, capture, git, left_out)

    # -- evidence ---------------------------------------------------------------------------------------------------

    def _evidence(self) -> Draft:
        from mothball.crash.evidence import collect
        from mothball.crash.report import redact_evidence

        self.ctx.checkpoint("evidence")
        if (known := patiently(lambda: self.crashes.drafted(self.ctx.job.id))) is not None:
            return known
        found = collect(
            self._given(at=0), workspace=self.workspace, settings=self.ctx.settings, driver=self._driver(),
            root=Path(self.workspace.path),
        )  # fmt: skip
        found = redact_evidence(found, self.redactor)
        try:
            return self._keep(found)
        except Oversize:
            found["log"] = _shorter(found["log"])
            return self._keep(found)

    def _keep(self, found: dict[str, Any]) -> Draft:
        return patiently(lambda: self.crashes.draft(self.ctx.job.id, self.ctx.fence, found))

    def _driver(self) -> Any:
        from mothball.runtime import driver_for

        if not self.workspace.runtime:
            return None
        try:
            return driver_for(self.workspace.runtime, self.ctx.settings, path=self.workspace.path)
        except MothballError as error:
            log.warning("its runtime cannot be asked", error=error.message)
            return None

    def _given(self, *, at: int) -> Any:
        from mothball.crash.given import Given
        from mothball.crash.text import clean

        args, clear = self.args, self.redactor
        return Given(
            error=clear.text(clean(args.error)), error_bytes=args.error_bytes or 0, title=clear.text(clean(args.title)),
            exit_code=args.exit_code, signal=args.signal, command=tuple(clear.argv(list(args.command or ()))), log=args.log,
            env=None if args.env is None else clear.env(args.env), cgroup=args.cgroup, pid=args.pid, at=at,
        )  # fmt: skip

    # -- the capture ------------------------------------------------------------------------------------------------

    def _capture(self) -> tuple[Captured, list[dict[str, Any]], dict[str, Any]]:
        """The capture that the report is about, the state of git in it, and what it left out."""
        from mothball.crash.last_good import last_good, why_not

        path, roots = self.workspace.path, self.ctx.settings.workspace_roots
        refs = self.store.refs(self.workspace.id)
        # The layout may be that of an earlier life under the same id; without a capture of this life it is nobody's.
        before = last_good(refs) if self.workspace.digest else None
        self.ctx.checkpoint("capture")
        why = ""
        if self.args.capture:
            why = why_not(path, roots) or self._emptied(before)
            if not why:
                try:
                    return self._fresh(before)
                except (Cancelled, LeaseLost):
                    raise
                except MothballError as error:
                    if before is None or (error.retryable and self.ctx.job.attempts + 1 < self.ctx.settings.max_attempts):
                        raise
                    why = f"the capture failed ({error.code}): {error.message}"
        if before is None:
            looked = f"its directory: {why or 'no capture was asked for'}; captures in the store of host {self.ctx.host}: none"
            raise SourceMissing(f"workspace {self.workspace.id!r} has nothing to package. Looked for {looked}", path=path)
        refs.take_fence(self.ctx.fence, self.ctx.job.id)  # a capture would have
        if why:
            log.warning("the last good capture is packaged", ref=before.name, digest=before.digest, reason=why)
        return self._last(before, "last_good" if why else "latest", why), _states(before), {}

    def _emptied(self, before: Ref | None) -> str:
        from mothball.crash.last_good import is_empty
        from mothball.store.snapshots import whole

        files = whole(before.get("files")) if before is not None else 0
        try:
            empty = files > 0 and is_empty(self.workspace.path, self.ctx.settings.workspace_roots)
        except (MothballError, OSError) as error:
            return f"its directory cannot be read any more: {error}"
        return f"its directory is empty now, and its last capture had {files} files" if empty else ""

    def _fresh(self, before: Ref | None) -> tuple[Captured, list[dict[str, Any]], dict[str, Any]]:
        from mothball.store.snapshots import whole

        result, record = capture_now(self.ctx, CaptureArgs(workspace=self.workspace.id), admission=False)
        patiently(lambda: self.ctx.registry.jobs.captured(self.ctx.job.id, self.ctx.fence, record))
        if result.files == 0 and before is not None and whole(before.get("files")) > 0:
            why = "its directory had nothing left to capture"
            return self._last(before, "last_good", why), _states(before), {}
        captured = Captured(
            digest=result.digest, generation=result.generation, source="fresh", files=result.files, bytes=result.bytes,
            changed=result.changed,
        )  # fmt: skip
        return captured, result.git, {"omitted": result.omitted, "omissions": result.omissions}

    def _last(self, ref: Ref, source: Any, why: str) -> Captured:
        from mothball.store.snapshots import whole

        return Captured(
            digest=ref.digest, generation=whole(ref.get("generation")), source=source, reason=why, files=whole(ref.get("files")),
            bytes=whole(ref.get("bytes")), changed=False,
        )  # fmt: skip

    # -- the report -------------------------------------------------------------------------------------------------

    def _file(self, draft: Draft, capture: Captured, git: list[dict[str, Any]], left_out: dict[str, Any]) -> dict[str, Any]:
        from mothball.crash.signature import signature

        ctx, workspace = self.ctx, self.workspace
        given, evidence = self._given(at=draft.at), draft.evidence or {}
        sign = signature(given.error or given.title, evidence)
        occurrence = {"workspace": workspace.id, "at": draft.at, "digest": capture.digest, "job": ctx.job.id}
        scope = scope_of(workspace.id, workspace.repo)
        self._learn(capture.digest)
        same = patiently(
            lambda: self.crashes.repeat(
                ctx.job.id, ctx.fence, workspace=workspace.id, scope=scope, signature=sign.hex16, at=draft.at, occurrence=occurrence
            )
        )
        if same is not None:
            log.info("the same failure was reported before", report=same.id, count=same.count)
            return self._result(same, capture, repeated=True)
        document = self._document(draft, given, sign, capture, git, left_out)
        # A run that died later than here left files under the name that it gave them: they are replaced, not added to.
        document["id"] = patiently(lambda: self.crashes.name(ctx.job.id, ctx.fence, document["id"]))
        packaged = self._package(document, capture) if self.args.package else None
        artifact = self._publish(document, packaged, capture)
        record = Crash(
            id=document["id"], workspace=workspace.id, repo=workspace.repo, number=workspace.number, host=ctx.host, at=draft.at,
            signature=sign.hex16, title=document["error"]["title"], digest=capture.digest, generation=capture.generation,
            artifact=artifact, source=capture.source, path=packaged.path if packaged else "",
            sha256=packaged.sha256 if packaged else "", bytes=packaged.bytes if packaged else 0,
            files=packaged.facts.files if packaged else capture.files, sealed=bool(packaged and packaged.sealed),
            auto=self.args.auto, by=self.redactor.text(self.args.by), job=ctx.job.id,
        )  # fmt: skip
        made, new = patiently(lambda: self.crashes.add(ctx.job.id, ctx.fence, record, scope=scope, occurrence=occurrence))
        if not new:
            # The same failure of another workspace was quicker; what this run stored is nobody's report.
            self._take_back(record.id)
            log.info("the same failure was reported meanwhile", report=made.id, count=made.count)
            return self._result(made, capture, repeated=True)
        log.info(
            "crash report filed", report=made.id, signature=made.signature, digest=made.digest, source=made.source, path=made.path,
            bytes=made.bytes, files=made.files,
        )  # fmt: skip
        return self._result(made, capture, redactions=_counts(document, packaged))

    def _document(
        self, draft: Draft, given: Any, sign: Any, capture: Captured, git: list[dict[str, Any]], left_out: dict[str, Any]
    ) -> dict[str, Any]:
        from mothball.crash.report import build, finish
        from mothball.crash.since import baseline, changes

        self.ctx.checkpoint("report")
        refs = self.store.refs(self.workspace.id)
        then = baseline(refs, digest=capture.digest, since=self.args.since, before=self.workspace.digest)
        since = None if then is None else changes(self.store, then, capture.digest, redactor=self.redactor)
        document = build(
            given=given, workspace=self.workspace, evidence=draft.evidence or {}, signature=sign, at=draft.at, capture=capture,
            since=since, git=git, **left_out,
        )  # fmt: skip
        return finish(document, self.redactor, key_id=getattr(self.redactor, "key_id", ""))

    def _learn(self, digest: str) -> None:
        """What the workspace's own credential files hold is a secret everywhere: in the error text, hence in the job itself.

        The producer could not know it when he redacted his arguments; nobody needs them in clear any more.
        """
        from mothball.crash.publish import learn_credentials

        ctx = self.ctx
        ctx.checkpoint("learn")
        learn_credentials(self.store, digest, self.redactor, self._tick)
        if (quiet := redacted_with(self.redactor, SECRET, ctx.job.args)) != ctx.job.args:
            patiently(lambda: ctx.registry.jobs.reword(ctx.job.id, ctx.fence, quiet))

    def _package(self, document: dict[str, Any], capture: Captured) -> Any:
        from mothball.crash.packages import remove_package
        from mothball.crash.publish import package

        # A run that was killed after this step left it; the id is this job's own.
        remove_package(self.ctx.settings.crash_dir, document["id"])
        return package(
            self.store, capture.digest, document, redactor=self.redactor, settings=self.ctx.settings, seal=self.seal,
            binaries=self.args.binaries, base=self.args.base, roots=self.ctx.settings.workspace_roots, tick=self._tick,
        )  # fmt: skip

    def _publish(self, document: dict[str, Any], packaged: Any, capture: Captured) -> str:
        from mothball.crash.report import encode
        from mothball.store.artifact import publish_report
        from mothball.store.manifest import MEDIA_MANIFEST, Descriptor

        self.ctx.checkpoint("publish")
        subject = Descriptor(MEDIA_MANIFEST, capture.digest, self.store.blobs.size(capture.digest))
        about = {"at": str(document["at"]), "signature": document["error"]["signature"], "title": document["error"]["title"]}
        return publish_report(
            self.store, self.workspace.id, id=document["id"], report=packaged.report if packaged else encode(document),
            subject=subject, annotations=about, fence=self.ctx.fence, job=self.ctx.job.id,
        )  # fmt: skip

    def _tick(self, *, step: str = "pack", **counts: Any) -> None:
        self.ctx.checkpoint(step, **counts)

    def _take_back(self, report: str) -> None:
        from mothball.crash.packages import remove_package
        from mothball.store.artifact import forget_report

        remove_package(self.ctx.settings.crash_dir, report)
        at = patiently(self.ctx.registry.time_ms)
        reason = "counted on another report"
        forget_report(self.store, self.workspace.id, report, reason=reason, at_ms=at, fence=self.ctx.fence, job=self.ctx.job.id)

    # -- what came of it --------------------------------------------------------------------------------------------

    def _as_recorded(self, report: str) -> dict[str, Any]:
        """The result of a run whose answer was lost."""
        made = patiently(lambda: self.crashes.get(report))
        mine = made.job == self.ctx.job.id
        own = next((each for each in made.occurrences if each.get("job") == self.ctx.job.id), {})
        digest = made.digest if mine else str(own.get("digest", self.workspace.digest or ""))
        capture = Captured(
            digest=digest, generation=made.generation if mine else self.workspace.generation, source=made.source or "fresh",  # type: ignore[arg-type]
            files=made.files, bytes=0, changed=False,
        )  # fmt: skip
        return self._result(made, capture, repeated=not mine)

    def _result(
        self, made: Crash, capture: Captured, *, repeated: bool = False, redactions: dict[str, int] | None = None
    ) -> dict[str, Any]:
        return {
            "id": made.id, "workspace": self.workspace.id, "host": made.host, "repeated": repeated, "count": made.count,
            "signature": made.signature, "title": made.title, "digest": capture.digest, "generation": capture.generation,
            "source": capture.source, "reason": self.redactor.text(capture.reason), "artifact": "" if repeated else made.artifact,
            "path": made.path, "sha256": made.sha256, "bytes": made.bytes, "files": capture.files if repeated else made.files,
            "sealed": made.sealed, "redactions": redactions or {},
        }  # fmt: skip


def _states(ref: Ref) -> list[dict[str, Any]]:
    from mothball.store.snapshots import as_snapshot

    return as_snapshot(ref).git


def _counts(document: dict[str, Any], packaged: Any) -> dict[str, int]:
    """How often each rule fired, in the report and in the package."""
    counts = dict(document["redactions"]["counts"])
    for rule, count in packaged.facts.redactions.items() if packaged else ():
        counts[rule] = counts.get(rule, 0) + count
    return dict(sorted(counts.items()))


def _shorter(tail: dict[str, Any] | None) -> dict[str, Any] | None:
    """The end of a log's end."""
    if not tail or not isinstance(tail.get("text"), str):
        return tail
    from mothball.crash.text import line_start

    text = line_start(tail["text"][-_LOG_IN_DRAFT:])
    return {**tail, "text": text, "tail_bytes": len(text.encode("utf-8", "replace")), "truncated": True}

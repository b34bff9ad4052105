"""workspace.purge: the directory goes too, but only with a capture that was read back and holds all of it (design, section 7).

Steps: what an earlier run left is put right; a last capture; what it does not hold refuses; processes are ended; the directory is
moved aside, compared once more and deleted; the record becomes a tombstone with the receipt. Killed anywhere, the next run goes on.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import structlog
from pydantic import Field, model_validator

from mothball.capture.types import CaptureOptions as Options
from mothball.errors import Busy, Cancelled, InvalidTransition, LeaseLost, MothballError, SourceMissing, Unavailable, Unheld
from mothball.policy import EVICTED, TRANSITIONS
from mothball.purge import Examination, Gap, Purge, Receipt, explain_gaps, gap_dicts, open_purge
from mothball.settings import Settings
from tasks.capture import CaptureOptions, merged_options
from tasks.context import JobContext, patiently
from tasks.ending import EndArgs, Ending
from tasks.job import Outcome, job_task

log = structlog.stdlib.get_logger("mothball.purge")
_SOFT_MARGIN_SECONDS = 60
_TRIES = 5
"""How often the record is read again for its burial, when others change it just then."""


class PurgeArgs(EndArgs):
    """Arguments of workspace.purge."""

    i_know: bool = Field(default=False, description="with force: delete even what no capture holds")
    dry_run: bool = Field(default=False, description="say what is missing; change nothing")

    @model_validator(mode="after")
    def _force_is_meant(self) -> PurgeArgs:
        if self.force and not self.i_know and not self.dry_run:
            raise ValueError("force deletes what no capture holds, for good: say i_know as well")
        if self.force and not self.asked:
            raise ValueError("a policy never forces a purge")
        return self


def hard_limit(settings: Settings) -> int:
    """Hard time limit of a purge, seconds: that of a capture, or of a restore, whichever is longer."""
    return max(settings.capture_time_limit, settings.transfer_time_limit)


def soft_limit(settings: Settings) -> int:
    """Soft time limit, seconds: a minute less, or half of a limit shorter than two minutes."""
    hard = hard_limit(settings)
    return hard - min(_SOFT_MARGIN_SECONDS, hard // 2)


@job_task(name="workspace.purge", args=PurgeArgs, queue="host", lane="purge", time_limit=hard_limit, soft_time_limit=soft_limit)
def purge(ctx: JobContext, args: PurgeArgs) -> Outcome:
    """Delete the workspace's directory and evict it; refuses as `unheld`, and says what is missing, unless it is forced."""
    run = _Run(ctx, args)
    return Outcome(result=run.dry() if args.dry_run else run.real())


class _Run:
    def __init__(self, ctx: JobContext, args: PurgeArgs) -> None:
        self.ctx = ctx
        self.args = args
        self.ending = Ending(ctx, args)
        self._deleting = False

    def kept(self) -> str:
        """Why a policy's purge is not done (any more). A person's is refused with an error instead."""
        facts = self.ending.facts
        if EVICTED not in TRANSITIONS.get(facts.state, frozenset()):
            raise InvalidTransition(id=self.args.workspace, state=facts.state, wanted="purged")
        if not self.args.asked:
            return self.ending.decided_otherwise("evict")
        if veto := self._veto():
            self.ending.refuse(veto)
        return ""

    def _veto(self) -> str:
        facts = self.ending.facts
        if not self.args.force and facts.pinned:
            return f"it is pinned{': ' + facts.pin_reason if facts.pin_reason else ''}; unpin it, or --force --i-know"
        return self.ending.veto()

    # -- dry run ---------------------------------------------------------------------------------------------------------

    def dry(self) -> dict[str, Any]:
        """What is missing, found without changing anything: no capture is made, nothing is moved."""
        missing: list[str] = []
        facts = self.ending.facts
        if EVICTED not in TRANSITIONS.get(facts.state, frozenset()):
            missing.append(InvalidTransition(id=self.args.workspace, state=facts.state, wanted="purged").message)
        elif veto := self._veto():
            missing.append(veto)
        alive, _ = self.ending.evidence()
        if alive.alive:
            missing.append(f"its processes run ({alive.reason}); stop it first")
        with self._opened() as deletion:
            if left := deletion.left_over():
                missing.append(left)
            found = deletion.examine(content=True, now_ms=lambda: patiently(self.ctx.registry.time_ms))
            missing += [str(gap) for gap in (*found.gaps, *found.busy)] if found else []
            latest = deletion.latest()
        return {
            "workspace": self.args.workspace, "purged": False, "dry_run": True, "missing": missing[:100],
            "missing_more": max(0, len(missing) - 100), "directory": "there" if found else "gone",
            "uncaptured": len(found.changed) if found else 0, "digest": latest.digest if latest else None, "receipt": None,
        }  # fmt: skip

    # -- the purge itself ------------------------------------------------------------------------------------------------

    def real(self) -> dict[str, Any]:
        """Delete, and bury the record with the receipt."""
        with self._opened() as deletion:
            receipt = None
            # What has begun was decided; a touch that came too late does not bring back what is deleted. A hold still stops it.
            if deletion.begun():
                if self.ending.facts.holds:
                    self.ending.refuse(self.ending.veto())
                self._deleting = True
                receipt = deletion.recover(force=self.args.force)
                self._deleting = receipt is not None
            if receipt is None:
                # Whatever becomes of this run: nobody must miss a directory because an earlier one was killed.
                deletion.put_back()
                if kept := self.kept():
                    log.info("not purged", reason=kept)
                    return {"workspace": self.args.workspace, "purged": False, "detail": kept, "missing": [], "receipt": None}
                receipt = deletion.recover(force=self.args.force) or self._delete(deletion)
            self._bury(receipt)
            # Whatever goes wrong from here on, the workspace is purged: a hidden folder without content may stay.
            with suppress(MothballError, OSError):
                deletion.forget()
        log.info("purged", digest=receipt.digest, files=receipt.files, directory=receipt.directory, by=self.args.by)
        return {
            "workspace": self.args.workspace, "purged": True, "missing": [str(Gap(**each)) for each in receipt.forced],
            "receipt": receipt.to_dict(), "detail": self.args.detail,
        }  # fmt: skip

    def _opened(self) -> Any:
        ctx, workspace = self.ctx, self.ending.workspace
        options = Options.merge(ctx.settings, merged_options(workspace.policy, CaptureOptions()))
        return open_purge(
            workspace.path, workspace=workspace.id, registration=self.ending.facts.registration, settings=ctx.settings,
            options=options, others=self._others(), git_guard=self.ending.policy.git_guard, report=self._report,
        )  # fmt: skip

    def _others(self) -> list[tuple[str, str]]:
        registry, host = self.ctx.registry, self.ctx.host
        found = patiently(lambda: registry.workspaces.list(host=host, limit=10_000_000))
        return [(each.id, each.path) for each in found if each.id != self.args.workspace]

    def _report(self, step: str, progress: dict[str, Any]) -> None:
        try:
            self.ctx.checkpoint(step, **progress)
        except Cancelled:
            if not self._deleting:
                raise
            # Half a directory is nobody's wish: what was begun is finished.

    def _delete(self, deletion: Purge) -> Receipt:
        alive, _ = self.ending.evidence()
        # Of a runtime that nobody recorded nothing is sure; who works in the directory all the same is found before anything goes.
        runs = alive.alive or not (alive.sure or self.ending.driver.name == "none")
        if runs and self.args.asked and not self.args.force:
            self.ending.refuse(f"its processes run ({alive.reason}); stop it first: `mothball stop {self.args.workspace}`")
        known = self._examined(deletion)
        # Of what cannot be seen from here a person with --force has said that they know.
        if known is not None and runs and (alive.sure or not self.args.force):
            self.ctx.checkpoint("stop")
            if self.ending.end_processes().how != "was_dead":
                known = self._examined(deletion)
        if known is None:
            return self._gone(deletion)
        seen = self.ending.facts.seen

        def decided(receipt: Receipt) -> None:
            self._decided(receipt, seen)

        return deletion.run(known, force=self.args.force, decided=decided)

    def _examined(self, deletion: Purge) -> Examination | None:
        """Capture, and examine what deletion would lose; None when there is no directory. `Unheld` unless it is forced."""
        failed = self._captured()
        known = deletion.examine(content=False, now_ms=lambda: patiently(self.ctx.registry.time_ms))
        if known is None:
            return None
        if failed is not None:
            known = msgspec.structs.replace(known, gaps=[failed, *known.gaps])
        if known.gaps and not self.args.force:
            raise Unheld(
                f"workspace {self.args.workspace!r} was not purged, because no capture holds all of it: {explain_gaps(known.gaps)}",
                id=self.args.workspace, missing=gap_dicts(known.gaps),
            )  # fmt: skip
        return known

    def _captured(self) -> Gap | None:
        """Make the last capture; what went wrong with it is a gap when the purge is forced, and ends it otherwise."""
        self.ctx.checkpoint("capture")
        try:
            self.ending.capture()
        except SourceMissing:
            return None  # the examination says whether there is nothing, or something that cannot be read
        except (Cancelled, LeaseLost, Unavailable):
            raise
        except MothballError as error:
            if not self.args.force:
                raise
            return Gap("", "no_capture", f"it could not be captured: {error.message}")
        return None

    def _gone(self, deletion: Purge) -> Receipt:
        """The receipt of a workspace whose directory is gone: nothing is deleted, and nothing was read back."""
        ref = deletion.latest()
        log.warning("its directory is gone already")
        return Receipt(
            digest=ref.digest if ref else None, generation=ref.generation if ref else 0, files=0, bytes=0, verified_at=None,
            directory="gone",
        )  # fmt: skip

    def _decided(self, receipt: Receipt, seen: tuple[tuple[str, str], ...]) -> None:
        """The last word before the first name goes: the record is as it was, nobody moved in, the lease is ours."""
        ctx, id = self.ctx, self.args.workspace  # noqa: A001 - the record's own name for it
        self.ending.look_again()
        if kept := self.kept():
            raise Busy(what=f"workspace {id}", reason=f"{kept}; nothing was deleted")
        if not self.args.force and self.ending.used_since(seen):
            raise Busy(what=f"workspace {id}", reason="it was used while it was looked at; nothing was deleted")
        mine = self.ending.workspace.path.rstrip("/") + "/"
        for other, path in self._others():
            if f"{path}/".startswith(mine) or mine.startswith(f"{path}/"):
                raise Busy(what=f"workspace {id}", reason=f"workspace {other!r} was registered there just now; nothing was deleted")
        ctx.checkpoint("delete", files=receipt.files, bytes=receipt.bytes)
        if receipt.forced:
            patiently(
                lambda: ctx.registry.events.add(
                    "workspace.purge_forced", workspace=id, by=self.args.by or "somebody", job=ctx.job.id, host=ctx.host,
                    path=self.ending.workspace.path, digest=receipt.digest or "", missing=receipt.forced[:20],
                    count=str(len(receipt.forced)), detail=self.args.detail,
                )
            )  # fmt: skip
        self._deleting = True

    def _bury(self, receipt: Receipt) -> None:
        """The record becomes a tombstone: with the directory gone, only a hold or a state that is never evicted keeps it."""
        lifecycle, args = self.ctx.registry.lifecycle, self.args
        given = receipt.to_dict()
        why = "others change it all the time"
        for _ in range(_TRIES):
            try:
                self.ending.look_again()
                answer = patiently(
                    lambda: lifecycle.evict(
                        self.ending.facts, rule=args.rule, detail=args.detail, by=args.by or "somebody", receipt=given, force=True,
                        fence=(self.ctx.job.id, self.ctx.fence),
                    )
                )  # fmt: skip
            except (Busy, InvalidTransition) as error:
                why = error.message
                break
            except LeaseLost:
                answer = "gone"
            if answer == "done":
                return
            if answer == "gone":
                # The answer of our own eviction may have been lost on its way.
                tomb = patiently(lambda: lifecycle.tombstone(args.workspace))
                if tomb is None or tomb["receipt"] != given:
                    raise LeaseLost(job=self.ctx.job.id)
                return
        raise Busy(
            f"the directory of workspace {args.workspace} is {receipt.directory}, and capture {receipt.digest} holds what was "
            f"in it; its record stays for now: {why}"
        )

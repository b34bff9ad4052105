"""What the jobs that end a workspace share: who may veto, evidence first, the last capture, the end of its processes."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, Field

from mothball.capture import CaptureResult
from mothball.errors import Busy, InvalidTransition, LeaseLost, MothballError, NotRunning, TransientFailure
from mothball.policy import Facts, Policy, decide
from mothball.registry import Workspace
from mothball.runtime import Alive, Driver, Stopped, driver_for
from tasks.capture import CaptureArgs, capture_now
from tasks.context import JobContext, patiently
from tasks.spec import WorkspaceId

log = structlog.stdlib.get_logger("mothball.ending")
ASKED: Final = "asked"
"""The rule of what a person asked for; all others are those of policies, which never force anything."""
_LIMITS: Final = {"cap": "over_cap", "budget": "over_budget"}
_SAMPLE_SECONDS = 1.0
"""How long processes are watched to see whether they compute."""


class Refused(Busy):
    """{what} is busy: {reason}"""

    # A later run would do what its asker has long forgotten: they are told now, and ask again.
    retryable = False


class EndArgs(BaseModel):
    """What both jobs take."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    rule: str = Field(
        default=ASKED, pattern=r"^[a-z][a-z0-9._-]{0,63}$", description="the rule that asks for it; `asked`: a person"
    )
    detail: str = Field(default="", max_length=4096, description="why, for people")
    by: str = Field(default="", max_length=4096, description="who asks")
    force: bool = Field(default=False, description="although somebody works in it; a hold refuses all the same")

    @property
    def asked(self) -> bool:
        """True when a person asks, False for a policy."""
        return self.rule == ASKED


class Ending:
    """One workspace that is about to be stopped or purged, as its job sees it."""

    def __init__(self, ctx: JobContext, args: EndArgs) -> None:
        self.ctx = ctx
        self.args = args
        patiently(lambda: ctx.registry.workspaces.get(args.workspace))  # raises `NotFound` and `Gone`
        # The facts before the record: a runtime that is registered between the two then differs from what was seen.
        self.facts = self._facts()
        self.workspace: Workspace = patiently(lambda: ctx.registry.workspaces.get(args.workspace))
        self.policy: Policy = patiently(ctx.registry.policies.book).of(self.facts)
        self.driver: Driver = driver_for(self.workspace.runtime, ctx.settings, path=self.workspace.path)

    def _facts(self) -> Facts:
        found = patiently(lambda: self.ctx.registry.lifecycle.facts([self.args.workspace], job=self.ctx.job.id)[0])
        if found is None:
            raise LeaseLost(job=self.ctx.job.id)  # evicted under this run: the record is the other's, and so is the word
        return found

    def look_again(self) -> None:
        """Read the facts anew; `LeaseLost` when the workspace is gone, or registered anew."""
        before, self.facts = self.facts.registration, self._facts()
        if self.facts.registration != before:
            raise LeaseLost(job=self.ctx.job.id)

    def runtime_since(self, seen: tuple[tuple[str, str], ...]) -> bool:
        """True when another runtime is registered than was `seen`: what this job watches and ends is not what runs there now."""
        return dict(seen)["runtime"] != dict(self.facts.seen)["runtime"]

    def used_since(self, seen: tuple[tuple[str, str], ...]) -> bool:
        """True when the record is not as it was `seen`, but for the generation, which this job's own captures move on."""
        expected = [pair for pair in seen if pair[0] != "generation"]
        return patiently(lambda: self.ctx.registry.lifecycle.begin_stop(self.args.workspace, expected)) != "done"

    def veto(self) -> str:
        """Why a person's request is refused; empty when it is not. Holds are never overruled, the rest is by `force`."""
        facts = self.facts
        if facts.holds:
            return f"it is held: {'; '.join(str(hold.get('reason', '')) for hold in facts.holds)[:500]}"
        now = patiently(self.ctx.registry.time_ms)
        if not self.args.force and facts.present_until is not None and facts.present_until > now:
            return f"{facts.present_by} works in it; --force does it all the same"
        return ""

    def decided_otherwise(self, *wanted: str) -> str:
        """Why the policy asks for none of `wanted` any more; empty while it does (N-33: decided again under the lease)."""
        # Limits on all together were exceeded when the sweep looked; the registry compares them once more when the record goes.
        limit = _LIMITS.get(self.args.rule)
        facts = msgspec.structs.replace(self.facts, **({limit: True} if limit else {}))
        decision = decide(facts, self.policy, patiently(self.ctx.registry.time_ms), job=self.ctx.job.id)
        if decision.action in wanted:
            return ""
        return f"{decision.rule}: {decision.detail}"

    def refuse(self, reason: str) -> None:
        """Raise `Refused` for a person, told why."""
        raise Refused(what=f"workspace {self.args.workspace}", reason=reason)

    # -- evidence --------------------------------------------------------------------------------------------------------

    def evidence(self) -> tuple[Alive, dict[str, Any]]:
        """What is known of the processes before anything is done to them. Raises what `Driver.alive` raises."""
        alive = self.driver.alive()
        found: dict[str, Any] = {"alive": alive.alive, "reason": alive.reason, **({"facts": alive.facts} if alive.facts else {})}
        if alive.alive:
            try:
                stats = self.driver.stats(None)
                found["stats"] = {"cpu_seconds": stats.cpu_seconds, "rss_bytes": stats.rss_bytes, "processes": stats.processes}
            except MothballError as error:  # figures are good to have; without them it ends all the same
                found["stats_error"] = error.message[:300]
        return alive, found

    def computes(self) -> float | None:
        """Per cent of one core that its processes use, watched for a second; None when that cannot be seen."""
        try:
            first, started = self.driver.stats(None), time.monotonic()
            time.sleep(_SAMPLE_SECONDS)
            second, passed = self.driver.stats(None), time.monotonic() - started
        except NotRunning:
            return None
        except MothballError as error:
            log.warning("cannot see whether it computes", error=error.message)
            return None
        return max(0.0, 100 * (second.cpu_seconds - first.cpu_seconds) / passed)

    # -- capture and processes -------------------------------------------------------------------------------------------

    def capture(self) -> CaptureResult:
        """Capture now, without asking the budget, and note it in the record at once. Errors as a capture's."""
        result, record = capture_now(self.ctx, CaptureArgs(workspace=self.args.workspace), admission=False)
        patiently(lambda: self.ctx.registry.jobs.captured(self.ctx.job.id, self.ctx.fence, record))
        return result

    def end_processes(self) -> Stopped:
        """TERM, the policy's grace, KILL, until nothing is left. `TransientFailure` when something lives on all the same."""
        stopped = self.driver.stop(self.policy.stop_grace / 1000, lambda: self.ctx.checkpoint("stop"))
        if stopped.left:
            names = ", ".join(f"{each.get('pid')} ({each.get('process')}: {each.get('reason')})" for each in stopped.left[:10])
            raise TransientFailure(reason=f"{len(stopped.left)} processes of {self.args.workspace} could not be ended: {names}")
        return stopped

    def not_in_state(self, wanted: str) -> InvalidTransition:
        """The error for a workspace from whose state there is no way to `wanted`."""
        return InvalidTransition(id=self.args.workspace, state=self.facts.state, wanted=wanted)


def captured_dict(result: CaptureResult | None) -> dict[str, Any] | None:
    """What the outcome of an ending says of its last capture."""
    if result is None:
        return None
    return {
        "digest": result.digest, "generation": result.generation, "changed": result.changed, "files": result.files,
        "bytes": result.bytes, "omitted": result.omitted,
    }  # fmt: skip

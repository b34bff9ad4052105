"""workspace.notice: tell the operator's hook what is about to happen to a workspace; its answer may put that off."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from mothball import durations, hook
from mothball.errors import Busy
from mothball.policy import Facts
from tasks.context import JobContext, patiently
from tasks.job import Outcome, job_task
from tasks.spec import WorkspaceId

log = structlog.stdlib.get_logger("mothball.notice")
BY = "notice_hook"
_TRIES = 5
"""How often an extension is tried again when the record changed meanwhile: a working agent touches it all the time."""


class NoticeArgs(BaseModel):
    """Arguments of workspace.notice."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    action: Literal["stop", "evict"] = Field(description="what was announced")
    due: int = Field(ge=0, description="when it happens, ms of Redis TIME")
    rule: str = Field(default="", max_length=64, description="the rule that asks for it")
    detail: str = Field(default="", max_length=4096, description="why, for people")


@job_task(name="workspace.notice", args=NoticeArgs, queue="control", time_limit=90, soft_time_limit=60, blames=False)
def notice(ctx: JobContext, args: NoticeArgs) -> Outcome:
    """Ask the hook of setting `notice_hook`. It may extend up to `max_extensions` times; a hook that fails vetoes nothing."""
    if not ctx.settings.notice_hook:
        return Outcome(result={"asked": False, "answer": "none"})
    facts = _facts(ctx, args)
    rules = ctx.registry.policies.book().of(facts)
    now = ctx.registry.time_ms()
    question = {
        "workspace": facts.id, "repo": facts.repo, "host": facts.host, "state": facts.state, "action": args.action, "due": args.due,
        "in_ms": max(0, args.due - now), "rule": args.rule, "detail": args.detail, "last_active": facts.last_active,
        "last_signal": facts.last_signal, "created_at": facts.created_at, "now": now, "extensions": facts.extensions,
        "max_extensions": rules.max_extensions,
    }  # fmt: skip
    ctx.checkpoint("asking", action=args.action, due=args.due)
    try:
        extension = hook.ask(ctx.settings.notice_hook, question)
    except hook.HookFailed as error:
        log.warning("the notice hook failed; nothing is put off", action=args.action, error=str(error))
        _tell(ctx, "workspace.notice_failed", args, reason=str(error))
        return Outcome(result={"asked": True, "answer": "failed", "reason": str(error)})
    if extension is None:
        return Outcome(result={"asked": True, "answer": "none"})
    ctx.checkpoint("extending")
    until = max(args.due, now) + extension
    if refused := _extend(ctx, args, until):
        _tell(ctx, "workspace.veto_refused", args, reason=refused, extension=durations.show(extension))
        return Outcome(result={"asked": True, "answer": "refused", "reason": refused})
    log.info("put off", action=args.action, until=until)
    return Outcome(result={"asked": True, "answer": "extended", "until": until, "extension_ms": extension})


def _facts(ctx: JobContext, args: NoticeArgs) -> Facts:
    facts = ctx.registry.lifecycle.facts([args.workspace])[0]
    if facts is None:
        # The workspace went while this job began; the claim of the next run says `gone`.
        raise Busy(what=f"workspace {args.workspace}", reason="it is changing")
    return facts


def _extend(ctx: JobContext, args: NoticeArgs, until: int) -> str:
    """Put it off until then; '' when that is done, else why not."""
    for _ in range(_TRIES):
        facts = _facts(ctx, args)
        if facts.extended_until is not None and facts.extended_until >= until:
            return ""  # by the run of this job before this one, or for longer
        most = ctx.registry.policies.book().of(facts).max_extensions
        if facts.extensions >= most:
            return f"it was put off {facts.extensions} times, and max_extensions={most}"
        if ctx.registry.lifecycle.extend(facts, until, BY, most):
            return ""
    raise Busy(what=f"workspace {args.workspace}", reason="others change it all the time")


def _tell(ctx: JobContext, kind: str, args: NoticeArgs, **fields: Any) -> None:
    about = {"workspace": args.workspace, "action": args.action, "due": str(args.due), "host": ctx.host, **fields}
    patiently(lambda: ctx.registry.events.add(kind, **about))

"""What happens to a workspace, and why: one pure function, so that sweep, dry run, forecast and explanation never disagree.

`decide` builds one line per rule, in the order in which the rules are asked, each with the milliseconds from which and before which
it speaks (`mothball.policy_rules`). The first line that speaks decides. When anything will change is read off the same lines, so it
cannot differ from what is decided then. Times are ms of Redis TIME.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from mothball.policy_fields import FIELDS, FOREIGN, SIGNALS, Level, Policy, check, merge, parse_text, to_dict
from mothball.policy_rules import RULES, STATES, Facts, Line, Notice, last_sign, lines_of, notices_of

__all__ = [
    "EVICTED", "FIELDS", "FOREIGN", "KIND_OF", "RULES", "SIGNALS", "STATES", "TRANSITIONS", "Action", "Decision", "Facts", "Level",
    "Policy", "RuleResult", "check", "decide", "last_sign", "merge", "parse_text", "to_dict",
]  # fmt: skip

Action = Literal["keep", "stop", "strand", "abandon", "evict"]
EVICTED = "evicted"
"""The state of a workspace that is only a tombstone."""
TRANSITIONS: dict[str, frozenset[str]] = {
    "active": frozenset({"submitted", "stopped", "stranded", EVICTED}),
    "submitted": frozenset({"active", "merged"}),
    "merged": frozenset({EVICTED}),
    "stopped": frozenset({"active", EVICTED}),
    "stranded": frozenset({"active", "abandoned"}),
    "abandoned": frozenset({EVICTED}),
    EVICTED: frozenset({"stopped"}),
}
"""Where each state may lead (D-03); the registry's scripts enforce the same table. Releasing ends any of them."""
KIND_OF: Mapping[str, str] = {"evict": "evict", "stop": "stop", "strand": "stop", "abandon": "stop"}
"""Which of the two due indexes an action belongs to."""


class RuleResult(NamedTuple):
    """What one rule says. `at` is the ms at which that changes by itself, None when time alone does not change it.

    keeps: it protects the workspace now; fires: it would act now, if no rule before it speaks; later: it does neither yet;
    off: the policy does not ask for it; exempt: it does not apply to a workspace of this mode or state.
    """

    rule: str
    result: Literal["keeps", "fires", "later", "off", "exempt"]
    at: int | None
    detail: str


class Decision(NamedTuple):
    """What happens to a workspace now (`action`), because of which rule, and what comes next by itself.

    `due` has for the kinds ``evict`` and ``stop`` the earliest ms at which something of that kind could be done (``stop`` covers
    strand and abandon; a notice counts as what it announces), None when time alone never leads there. It lies in the future unless
    this very decision is of that kind. `notice` is what to announce now, and the ms before which the announced thing will not
    happen once the record says so (`Facts.noticed`). `rules` are all rules in their order.
    """

    action: Action
    rule: str
    detail: str
    next_action: Action | None
    next_at: int | None
    due: dict[str, int | None]
    notice: tuple[str, int] | None
    rules: list[RuleResult]


def decide(facts: Facts, policy: Policy, now: int, *, job: str = "") -> Decision:
    """What `policy` does with the workspace that `facts` describe, at `now`; `job` is the asker's, whose own lease does not count.

    In this order: hold, pin, lease of a job, queued job, presence and state ``submitted`` keep it; a stranded one is abandoned in
    time and nothing else; heartbeats that ended without goodbye strand it; an abandoned one is evicted; then deadline, max_age,
    ttl and idle_ttl evict, stop_after stops, cap and budget evict. Limits fire strictly after they have passed, a deadline at its
    millisecond (behaviours.md 6.2). A record in a state that is not known here, or that lost its pin or policy, is kept.
    """
    if job and facts.lease_job == job:
        facts = msgspec.structs.replace(facts, lease_until=None, lease_job="")
    lines = lines_of(facts, policy, now)
    notices = notices_of(facts, policy, now, lines)
    lines = [_held_back(line, notices) for line in lines]
    spoken = _speaks(lines, now)
    action: Action = "keep" if spoken is None else spoken.action
    open_now = [notice for notice in notices if notice.opens <= now and _leaves_room(spoken, notice)]
    chosen = min(open_now, key=lambda notice: notice.due, default=None)
    due, following = _ahead(lines, notices, now)
    for kind, at in due.items():
        # Two notices at once: the other one is given by the next look, which this one's effect brings about.
        if at == now and (spoken is None or KIND_OF.get(action) != kind) and (chosen is None or chosen.kind != kind):
            due[kind] = now + 1
    return Decision(
        action=action,
        rule="none" if spoken is None else spoken.rule,
        detail="no rule asks for anything yet" if spoken is None else spoken.detail,
        next_action=None if following is None else following[1].action,
        next_at=None if following is None else following[0],
        due=due,
        notice=None if chosen is None else (chosen.kind, chosen.due),
        rules=[_result(line, now) for line in lines],
    )


def _speaks(lines: list[Line], at: int) -> Line | None:
    """The line that decides at `at`: the first whose time it is."""
    for line in lines:
        if line.starts is not None and line.starts <= at and (line.ends is None or at < line.ends):
            return line
    return None


def _held_back(line: Line, notices: list[Notice]) -> Line:
    """`line`, not before what was announced, or still has to be announced, for its action."""
    for notice in notices:
        if line.since is not None and line.starts is not None and line.action == notice.kind and line.starts < notice.due:
            return line._replace(starts=notice.due, detail=f"{line.detail}; not before its notice has run out")
    return line


def _leaves_room(spoken: Line | None, notice: Notice) -> bool:
    """A notice is for what nothing prevents; that a workspace is about to be stopped does not prevent its eviction."""
    return not notice.given and (spoken is None or (spoken.action == "stop" and notice.kind == "evict"))


def _ahead(lines: list[Line], notices: list[Notice], now: int) -> tuple[dict[str, int | None], tuple[int, Line] | None]:
    """When each kind is first acted on or announced, and the first action with its time (`now` included), as things stand.

    What has still to be announced may come later than planned, so nothing else is thought to wait behind it: a look that comes too
    early costs nothing, one that never comes would be missed.
    """
    due: dict[str, int | None] = {"evict": None, "stop": None}
    following: tuple[int, Line] | None = None
    planned = {notice.kind for notice in notices if not notice.given}
    certain = [line for line in lines if line.since is None or line.action not in planned]
    moments = {now, *(line.starts for line in lines if line.starts), *(line.ends for line in lines if line.ends)}
    moments.update(notice.opens for notice in notices)
    for at in sorted(moment for moment in moments if moment >= now):
        spoken = _speaks(lines, at)
        sure = _speaks(certain, at) if planned else spoken
        if following is None and spoken is not None and spoken.action != "keep":
            following = (at, spoken)
        for kind, known in due.items():
            if known is None:
                opened = any(notice.kind == kind and notice.opens <= at and _leaves_room(sure, notice) for notice in notices)
                if opened or (sure is not None and KIND_OF.get(sure.action) == kind):
                    due[kind] = at
        if following is not None and None not in due.values():
            break
    return due, following


def _result(line: Line, now: int) -> RuleResult:
    if line.starts is None:
        return RuleResult(line.rule, line.idle, None, line.detail)
    if now < line.starts:
        return RuleResult(line.rule, "later", line.starts, line.detail)
    if line.ends is not None and now >= line.ends:
        return RuleResult(line.rule, "later", None, line.detail)
    return RuleResult(line.rule, "keeps" if line.action == "keep" else "fires", line.ends, line.detail)

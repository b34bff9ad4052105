"""Admission: room in the fleet's byte budget for what a job is about to store, made by evicting who was used least recently.

The registry's script decides and acts in one step (lua/budget_reserve.lua). Here is only the plan it is given: who may go by
`policy.decide`, in which order, and that it covers the whole need. A plan that does not is refused before anyone is evicted (Q-13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from mothball import policy
from mothball.errors import InvalidParams, OverBudget
from mothball.policy import Facts
from mothball.reclaim import stops_first
from mothball.registry import BudgetState, Registry
from mothball.registry.policies import PolicyBook

MOST_EVICTED = 1000
"""Workspaces that one admission may evict: the script that does it holds up everybody else meanwhile."""
_PAGE = 200
_TRIES = 20
"""Plans of one admission: a plan fails only because somebody else got on."""


class Admitted(msgspec.Struct, frozen=True):
    """Room for `reserved` bytes, and the ids of those who were evicted for it, the least recently used first."""

    reserved: int
    evicted: list[str]


def admit(
    registry: Registry,
    *,
    job: str,
    fence: int,
    workspace: str,
    need: int,
    limit: int,
    look: Callable[[], None] = lambda: None,
) -> Admitted:
    """Promise the running `job` of `workspace` room for `need` bytes in all, evicting others if `limit` leaves none (Q-12 to Q-14).

    Those whom `policy.decide` keeps stay, pinned, held, leased and submitted ones among them, although they count (Q-08); so does
    `workspace` itself. `look` is called between two pages of candidates and may raise. Raises `OverBudget` when what may
    go does not make the room, and then nobody was evicted; `LeaseLost`, `Unavailable`.
    """
    if need > limit:
        raise _over(workspace, need, limit, registry.budget.state(limit), "that is more than the whole budget")
    victims: list[Facts] = []
    evictable, short = 0, False
    for _ in range(_TRIES):
        result = registry.budget.reserve(job, fence, bytes=need, limit=limit, victims=victims, detail=f"room for {workspace}")
        if result.ok:
            return Admitted(need, result.evicted)
        if short and not result.changed:
            why = f"only {evictable:,} are of workspaces that may be evicted now; the others are pinned, held, in use or yours"
            raise _over(workspace, need, limit, result.before, why)
        missing = result.before.committed + need - limit
        victims, evictable = _plan(registry, missing, workspace, look)
        # Others may have made room between the two looks: the script, which sees one moment, has the last word on what is missing.
        short = evictable < missing
    why = "others took what became free, or those who were to go came back into use; try again"
    raise _over(workspace, need, limit, registry.budget.state(limit), why)


def _plan(registry: Registry, missing: int, requester: str, look: Callable[[], None]) -> tuple[list[Facts], int]:
    """Who may go, the least recently used first, until `missing` bytes are covered; and how many bytes they hold."""
    victims: list[Facts] = []
    covered = 0
    for facts in _candidates(registry, requester, look):
        victims.append(facts)
        covered += facts.stored_bytes
        if covered >= missing or len(victims) >= MOST_EVICTED:
            break
    return victims, covered


def _candidates(registry: Registry, requester: str, look: Callable[[], None]) -> Iterator[Facts]:
    book = registry.policies.book()
    after: tuple[str, int] | None = None
    seen = {requester}  # and whoever moves on in the index meanwhile and is met again
    while page := registry.lifecycle.least_active(_PAGE, after):
        look()
        after = page[-1]
        now = registry.time_ms()
        for facts in registry.lifecycle.readable([each for each, _ in page if each not in seen]):
            if isinstance(facts, Facts) and facts.stored_bytes > 0 and _may_go(facts, book, now):
                yield facts
        seen.update(each for each, _ in page)


def _may_go(facts: Facts, book: PolicyBook, now: int) -> bool:
    try:
        own = book.of(facts)
    except InvalidParams:  # by a policy that nobody can read nothing is reclaimed; the sweeps tell of it
        return False
    if stops_first(facts):  # a capture that waits for room cannot wait until others are stopped; the sweeps can
        return False
    return policy.decide(msgspec.structs.replace(facts, over_budget=True), own, now).action == "evict"


def _over(workspace: str, need: int, limit: int, state: BudgetState, why: str) -> OverBudget:
    return OverBudget(
        f"no room for {workspace}: it needs {need:,} bytes, {state.committed:,} of {limit:,} are taken, and {why}. "
        "Release or unpin what nobody needs, or raise the budget (`mothball policy set budget=...`).",
        workspace=workspace,
        requested=need,
        limit=limit,
        loaded=state.loaded,
        reserved=state.reserved,
        retained=state.retained,
    )

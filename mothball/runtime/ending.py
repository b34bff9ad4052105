"""Ending a set of processes that does not hold still: TERM, a grace, then freeze and KILL until nothing is left.

A process that forks while it is being killed is always a child ahead. So before SIGKILL everything is stopped with SIGSTOP, looked
for again and stopped again until nothing new turns up: what cannot run cannot fork.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from mothball.runtime import proc
from mothball.runtime.driver import KILL_SECONDS, Alive, Stopped, Tick
from mothball.runtime.proc import Proc

POLL_SECONDS = 0.05
_HALTED = "TtDZXx"
FREEZE_SECONDS = 2.0
"""How long SIGSTOP goes after newcomers; a fork bomb that is faster than that meets SIGKILL anyway, round after round."""

Members = Callable[[dict[tuple[int, int], Proc]], dict[int, Proc]]
"""Given everybody who was ever seen, who is there now (dead ones may be among them)."""


class Ending:
    """One stop of the processes that `members` answers. Remembers everybody it ever saw: a child whose parent died is still one."""

    def __init__(self, members: Members, tick: Tick) -> None:
        self._members = members
        self._tick = tick
        self._seen: dict[tuple[int, int], Proc] = {}
        self._denied: dict[tuple[int, int], Proc] = {}
        self._killed: set[tuple[int, int]] = set()
        self._spared = {found.group for pid in proc.own_line() if (found := proc.read(pid)) is not None} | {os.getpgrp()}
        """Groups of this worker and its parents: somebody's pipeline may have both in one."""

    def run(self, grace_s: float, first: int | None = None) -> Stopped:
        """End them; `first` is the pid that hears of it first, so that it may end its own children in order."""
        if not self._living():
            return Stopped(how="was_dead", facts=self._facts())
        if grace_s > 0 and self._gentle(grace_s, first):
            return Stopped(how="term", facts=self._facts())
        left = self._hard()
        return Stopped(how="kill", facts=self._facts(), left=[self._explain(each) for each in left])

    def _living(self) -> list[Proc]:
        now = self._members(self._seen)
        self._seen.update((each.key, each) for each in now.values())
        return [each for each in now.values() if not each.dead]

    def _gentle(self, grace_s: float, first: int | None) -> bool:
        """SIGTERM once to each, also to those that come later; True when all have ended within the grace."""
        deadline = time.monotonic() + grace_s
        told: set[tuple[int, int]] = set()
        while living := self._living():
            for each in sorted(living, key=lambda one: (one.pid != first, one.pid)):
                if each.key not in told:
                    told.add(each.key)
                    self._send(each, signal.SIGTERM)
                    self._send(each, signal.SIGCONT)  # a stopped process would hear of it only when it is continued
            self._tick()
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _hard(self) -> list[Proc]:
        """SIGKILL until nothing is left; returns what outlived `KILL_SECONDS`."""
        deadline = time.monotonic() + KILL_SECONDS
        while living := self._living():
            self._freeze_and_kill(living)
            self._tick()
            if time.monotonic() >= deadline:
                return self._living()
            time.sleep(POLL_SECONDS)
        return []

    def _freeze_and_kill(self, living: list[Proc]) -> None:
        frozen: dict[tuple[int, int], Proc] = {}
        groups: set[int] = set()
        until = time.monotonic() + FREEZE_SECONDS
        try:
            while time.monotonic() < until:
                fresh = [each for each in living if each.key not in frozen]
                for each in fresh:
                    frozen[each.key] = each
                    if self._send(each, signal.SIGSTOP):
                        groups |= self._whole_group(each)
                living = self._living()
                if not fresh and all(each.state in _HALTED or each.key in self._denied for each in living):
                    break
            # The groups first: those who are frozen still stand for their numbers.
            for group in groups:
                with suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
            self._killed |= {each.key for each in frozen.values() if each.group in groups}
            for each in {**frozen, **{one.key: one for one in living}}.values():
                if self._send(each, signal.SIGKILL):
                    self._killed.add(each.key)
        except BaseException:
            # A time limit of the job strikes anywhere: nobody may stay frozen for ever, neither dead nor alive.
            for group in groups:
                with suppress(OSError):
                    os.killpg(group, signal.SIGCONT)
            for each in frozen.values():
                with suppress(OSError):
                    proc.send(each, signal.SIGCONT)
            raise

    def _whole_group(self, member: Proc) -> set[int]:
        """Freeze all of the process group of `member`, if one of ours leads it: the group's number, or nothing.

        One signal to a group misses nobody, however fast they fork and end; one by one, a chain of processes that live for a
        millisecond each is never seen twice. `member` was stopped just now: while it stands, nobody else has the group's number.
        """
        group = member.group
        if group not in {pid for pid, _ in self._seen} or group in self._spared:
            return set()
        try:
            os.killpg(group, signal.SIGSTOP)
        except OSError:
            return set()
        return {group}

    def _send(self, process: Proc, number: signal.Signals) -> bool:
        try:
            return proc.send(process, number)
        except PermissionError:
            self._denied[process.key] = process
            return False

    def _explain(self, process: Proc) -> dict[str, Any]:
        if process.key in self._denied:
            reason = "this worker's user may not signal it"
        elif process.state == "D":
            reason = "it waits in the kernel for a device or a file system and cannot be killed"
        else:
            reason = f"still there {KILL_SECONDS:g} s after SIGKILL"
        return {"pid": process.pid, "process": process.name, "reason": reason}

    def _facts(self) -> dict[str, Any]:
        """What is known: how many there were, how many had to be killed, and how those ended whose parent has not looked yet."""
        facts: dict[str, Any] = {"processes": len(self._seen)}
        if self._killed:
            facts["killed"] = len(self._killed)
        return facts


def ended_within(alive: Callable[[], Alive], seconds: float, tick: Tick, poll_s: float) -> bool:
    """True once `alive` answers no, asked every `poll_s` for `seconds`; `tick` may end the wait."""
    deadline = time.monotonic() + seconds
    while alive().alive:
        tick()
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True


def outlived(processes: Iterable[Proc], manager: str, what: str) -> list[dict[str, Any]]:
    """What to report of a runtime that SIGKILL did not end: its processes, or at least that `manager` still says it runs."""
    reason = f"still there {KILL_SECONDS:g} s after SIGKILL"
    left = [{"pid": each.pid, "process": each.name, "reason": reason} for each in processes]
    return left or [{"pid": 0, "process": what, "reason": f"{manager} still says that it runs"}]

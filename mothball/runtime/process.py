"""Driver `process`: a process of this host, named by pid and start time, and everything that belongs to it.

Its tree is its children and theirs, the members of every session and process group that one of them leads, and, when it was the
first process of a cgroup that is not the worker's, all of that cgroup. What has left all of these (a daemon that began a session
of its own and whose parent has ended, outside such a cgroup) cannot be told from a stranger and is left alone: runc, systemd and
docker know their own better.
"""

from __future__ import annotations

import os
import re
from typing import Any

from mothball.errors import OperationFailed
from mothball.runtime import proc
from mothball.runtime.driver import Alive, Listener, Stats, Stopped, Tick
from mothball.runtime.ending import Ending
from mothball.runtime.listeners import listeners_of
from mothball.runtime.proc import Proc
from mothball.runtime.usage import stats_of

Key = tuple[int, int]
_SHARED = re.compile(r".*\.slice|(session-.*|init)\.scope|(user@.*|cron|crond|atd|ssh|sshd)\.service")
"""Cgroups of logins and timetables: whoever is left in one as the eldest is not the one that it was made for."""


class ProcessDriver:
    """The process of one handle."""

    name = "process"

    def __init__(self, handle: dict[str, object], path: str | None) -> None:
        """`path`: the workspace's directory. Processes that a dead leader left behind are its own only while they work in there."""
        self._pid = int(str(handle["pid"]))
        self._started = int(str(handle["start_time"]))
        self._boot = handle.get("boot_id")
        self._space = handle.get("pid_ns")
        self._path = path

    def alive(self) -> Alive:
        """True while the process or anything of its tree runs; never for another process that got its pid."""
        unsure = self._unseen()
        if unsure:
            return Alive(alive=False, reason=unsure, sure=False)
        if self._boot is not None and self._boot != proc.boot_id():
            return Alive(alive=False, reason=f"the host was started again since; process {self._pid} ended with that")
        processes = proc.everything()
        leader = processes.get(self._pid)
        living = [each for each in self._members(processes, {}).values() if not each.dead]
        facts: dict[str, Any] = {"pid": self._pid, "processes": len(living)}
        if leader is not None and leader.started == self._started and not leader.dead:
            return Alive(alive=True, reason=f"process {self._pid} ({leader.name}) runs", facts=facts)
        if leader is not None and leader.started != self._started:
            return Alive(alive=False, reason=f"process {self._pid} has ended; its pid belongs to another process now", facts=facts)
        facts |= proc.end_of(leader)
        if living:
            return Alive(
                alive=True, reason=f"process {self._pid} has ended, but {len(living)} of its processes still run", facts=facts
            )
        return Alive(alive=False, reason=f"process {self._pid} has ended", facts=facts)

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """End the whole tree. Raises `InvalidParams` for a handle that names init, a kernel thread or this worker itself."""
        if unsure := self._unseen():
            raise OperationFailed(f"the processes cannot be stopped from here: {unsure}", reason=unsure)
        if self._boot is not None and self._boot != proc.boot_id():
            return Stopped(how="was_dead", facts={"reason": "the host was started again since"})
        leader = self._leader(proc.everything())
        if leader is not None:
            proc.check_target(leader)
        end = proc.end_of(leader)
        ended = Ending(lambda seen: self._members(proc.everything(), seen), tick).run(grace_s, first=self._pid)
        end = end or proc.end_of(self._leader(proc.everything()))
        return Stopped(how=ended.how, facts={"pid": self._pid, **ended.facts, **end}, left=ended.left)

    def stats(self, path: str | None) -> Stats:
        """What the tree uses. Raises `NotRunning` when nothing of it runs."""
        return stats_of(self._running(), path)

    def ports(self) -> list[Listener]:
        """Where the tree listens. Raises `NotRunning` when nothing of it runs."""
        return listeners_of(self._running())

    def _running(self) -> list[Proc]:
        self.alive().require(f"process {self._pid}")
        return [each for each in self._members(proc.everything(), {}).values() if not each.dead]

    def _unseen(self) -> str:
        """Why this worker cannot see the process, even if it runs; empty when it can."""
        mine = proc.namespace("pid")
        if self._space is not None and mine and self._space != mine:
            return f"pid {self._pid} was registered in another pid namespace (a container's) than this worker runs in"
        if proc.hidden(self._pid):
            return f"process {self._pid} belongs to another user and /proc hides it (mount option hidepid)"
        return ""

    def _leader(self, processes: dict[int, Proc]) -> Proc | None:
        """The process of the handle; None when it is gone, also if another one has its pid."""
        found = processes.get(self._pid)
        return found if found is not None and found.started == self._started else None

    def _members(self, processes: dict[int, Proc], seen: dict[Key, Proc]) -> dict[int, Proc]:
        """Everybody who belongs to it now; `seen` are those who were known to belong to it a moment ago."""
        leader = self._leader(processes)
        roots = list(seen)
        if leader is not None:
            roots.append(leader.key)
            roots += [each.key for each in self._of_cgroup(leader, processes)]
        elif self._pid not in processes:
            roots += [each.key for each in self._orphans(processes)]
        return proc.grown(roots, processes)

    def _of_cgroup(self, leader: Proc, processes: dict[int, Proc]) -> list[Proc]:
        """The members of the leader's cgroup, if it is the leader's own: nobody in it is older, and this worker is not in it.

        A login's cgroup holds the shell that was there before, a container's cgroup its first process: neither is the leader's.
        """
        group = proc.cgroup(leader.pid)
        mine = proc.cgroup("self")
        if leader.dead or group in {"", "/"} or group.startswith("/..") or _below(mine, group) or "(deleted)" in group:
            return []
        if _SHARED.fullmatch(group.rpartition("/")[2]):
            return []
        members = [each for each in processes.values() if _below(proc.cgroup(each.pid), group)]
        if any(each.started < leader.started for each in members):
            return []
        return members

    def _orphans(self, processes: dict[int, Proc]) -> list[Proc]:
        """Members of the dead leader's session and group that work in the workspace's directory.

        The leader is gone, so its pid may have been another session's since: only the directory says whose they are.
        """
        if self._path is None:
            return []
        folder = os.path.realpath(self._path)
        return [
            each for each in processes.values()
            if self._pid in {each.session, each.group} and each.started >= self._started and not each.dead
            and _below(proc.cwd(each.pid).removesuffix(" (deleted)"), folder)
        ]  # fmt: skip


def _below(path: str, folder: str) -> bool:
    """True when `path` is `folder` or lies below it; pure text."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")

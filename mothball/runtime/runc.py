"""Driver `runc`: a container of the real `runc`, by its id. It is stopped and never deleted: that is its owner's business."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mothball.errors import OperationFailed
from mothball.runtime import proc
from mothball.runtime.answers import dig, text
from mothball.runtime.driver import KILL_SECONDS, Alive, Listener, Stats, Stopped, Tick
from mothball.runtime.ending import ended_within, outlived
from mothball.runtime.listeners import listeners_of
from mothball.runtime.proc import Proc
from mothball.runtime.programs import Finished, run, trusted
from mothball.runtime.usage import stats_of

CALL_SECONDS = 10.0
POLL_SECONDS = 0.1
_GONE = "does not exist"
_ENDED = "stopped"
_NANO = 10**9


class RuncDriver:
    """The container of one handle."""

    name = "runc"

    def __init__(self, handle: dict[str, Any]) -> None:
        self._id = str(handle["container"])
        self._root = Path(handle["root"]) if "root" in handle else _default_root()

    def alive(self) -> Alive:
        """True while the container is created, running or paused."""
        state = self._state()
        if state is None:
            return Alive(alive=False, reason=f"runc knows no container {self._id} (any more)")
        facts = {"status": state["status"], "pid": state.get("pid", 0)}
        if state["status"] == _ENDED:
            left = self._pids()
            if left:
                return Alive(
                    alive=True, reason=f"container {self._id} has ended, but {len(left)} of its processes still run", facts=facts
                )
            return Alive(alive=False, reason=f"container {self._id} has ended", facts=facts)
        return Alive(alive=True, reason=f"container {self._id} is {state['status']}", facts=facts)

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """SIGTERM to the container's first process, the grace, then SIGKILL to all of it."""
        before = self.alive()
        if not before.alive:
            return Stopped(how="was_dead", facts={"container": self._id, **before.facts})
        self._refuse_own(before)
        facts: dict[str, Any] = {"container": self._id, "pid": before.facts["pid"]}
        if before.facts["status"] == "paused":
            self._call("resume", self._id, tick=tick)  # what is frozen would hear of the signal only when it is thawed
        if grace_s > 0 and before.facts["status"] != _ENDED:
            self._signal("TERM", tick=tick)
            if ended_within(self.alive, grace_s, tick, POLL_SECONDS):
                return Stopped(how="term", facts=facts | self._oom())
        facts |= self._oom()
        self._signal("KILL", everybody=True, tick=tick)
        if ended_within(self.alive, KILL_SECONDS, tick, POLL_SECONDS):
            return Stopped(how="kill", facts=facts)
        return Stopped(how="kill", facts=facts, left=outlived(self._members(), "runc", self._id))

    def stats(self, path: str | None) -> Stats:
        """CPU and memory as the container's cgroup counts them. Raises `NotRunning`."""
        members = self._running()
        data = self._events()
        cpu, memory = dig(data, "cpu", "usage", "total"), dig(data, "memory", "usage", "usage")
        return stats_of(members, path, cpu_seconds=cpu / _NANO if cpu else None, rss_bytes=memory or None)

    def ports(self) -> list[Listener]:
        """Where the container's processes listen. Raises `NotRunning`."""
        return listeners_of(self._running())

    def _running(self) -> list[Proc]:
        self.alive().require(f"container {self._id}")
        return self._members()

    def _members(self) -> list[Proc]:
        return [each for pid in self._pids() if (each := proc.read(pid)) is not None and not each.dead]

    def _refuse_own(self, found: Alive) -> None:
        first = proc.read(int(found.facts["pid"] or 0))
        if first is not None:
            proc.check_target(first)

    def _state(self) -> dict[str, Any] | None:
        """What runc says of the container; None when it knows none. A container that ended is a state like any other."""
        answer = self._call("state", self._id)
        if answer.code:
            if _GONE in answer.err:
                return None
            raise self._failed("state", answer)
        try:
            found = json.loads(answer.out)
            return {"status": text(found["status"]), "pid": int(found.get("pid") or 0)}
        except (ValueError, KeyError, TypeError):
            raise OperationFailed(f"runc state {self._id} answers what cannot be read", reason=answer.out[:200]) from None

    def _pids(self) -> list[int]:
        """The container's processes, as its cgroup has them; empty when it has none (any more)."""
        answer = self._call("ps", "--format", "json", self._id)
        if answer.code:
            return []
        try:
            return [int(each) for each in json.loads(answer.out) or []]
        except (ValueError, TypeError):
            return []

    def _signal(self, name: str, *, everybody: bool = False, tick: Tick) -> None:
        answer = self._call("kill", *(["--all"] if everybody else []), self._id, name, tick=tick)
        state = self._state()
        if answer.code and state is not None and state["status"] != _ENDED:
            raise self._failed("kill", answer)

    def _events(self) -> dict[str, Any]:
        """The cgroup's account; empty where there is none (a container without cgroups)."""
        answer = self._call("events", "--stats", self._id)
        try:
            found = json.loads(answer.out)["data"] if not answer.code else {}
            return found if isinstance(found, dict) else {}
        except (ValueError, KeyError, TypeError):
            return {}

    def _oom(self) -> dict[str, Any]:
        """Whether the kernel killed something in the container for want of memory."""
        counted = dig(self._events(), "memory", "raw", "oom_kill")
        return {"oom_killed": counted} if counted else {}

    def _call(self, *argv: str, tick: Tick | None = None) -> Finished:
        """One command of runc about this container. The id comes last or before a signal, and never begins with a dash."""
        # The root holds the state that runc believes: which pids and cgroups to kill. Whoever may write there chooses them.
        trusted(self._root / self._id, "runc's folder")
        return run(["runc", "--root", str(self._root), *argv], seconds=CALL_SECONDS, what=f"runc {argv[0]} {self._id}", tick=tick)

    def _failed(self, verb: str, answer: Finished) -> OperationFailed:
        reason = _message(answer.err) or f"it ended with {answer.code}"
        return OperationFailed(f"runc {verb} {self._id} failed: {reason}", reason=reason)


def _default_root() -> Path:
    """Where runc keeps its state unless told otherwise."""
    own = os.environ.get("XDG_RUNTIME_DIR")
    return Path(own) / "runc" if own and os.geteuid() != 0 else Path("/run/runc")


def _message(text: str) -> str:
    """The text of runc's last line, which is a log line or plain."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    _, _, message = last.partition('msg="')
    return (message.rstrip('"') or last)[:300]

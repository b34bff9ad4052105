"""The demo's part about what reclaims a workspace: kept while somebody works there, stopped when nobody does, evicted, undeleted.

The processes that are stopped are real: a shell and two children, which also end when the demo itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from mothball.cli.text import printable
from mothball.durations import show
from mothball.errors import Gone, OperationFailed

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.registry import Event
    from workers.demo import Demo
    from workers.local import LocalFleet

AGENT, VISITOR = "demo/agent#1", "demo/visitor#1"
STOP_AFTER_MS, TTL_MS = 2000, 4000
PRESENCE_SECONDS = 3.0
LONGEST_WAIT = 60.0
LOOK_SECONDS = 0.1
# `cat` lives as long as the pipe that the demo holds: whatever kills the demo ends it too.
PROGRAM = "exec 3<&0; cat <&3 & cat <&3 & wait"


class Life:
    """`demo` says, checks and counts; the sweeps of the fleet do the work by themselves."""

    def __init__(self, demo: Demo, fleet: Fleet, local: LocalFleet) -> None:
        self._demo = demo
        self._fleet = fleet
        self._local = local

    def run(self) -> None:
        """Two workspaces with short rules of their own, and what becomes of them."""
        say = self._demo.say
        say(f"two more workspaces: {AGENT}, in which processes run, with stop_after={show(STOP_AFTER_MS)}, and {VISITOR} with")
        say(f"  ttl={show(TTL_MS)} (default: ttl=24h, no auto-stop; the sweeps run each second here, else every 1 and 5 minutes)")
        with self._processes() as tree:
            visitor = self._register(VISITOR, None, {"ttl": show(TTL_MS)})
            self._register(AGENT, tree.pid, {"stop_after": show(STOP_AFTER_MS)})
            self._in_use(tree)
            self._stopped(tree)
        self._evicted(visitor)
        self._undeleted()

    def _register(self, workspace: str, pid: int | None, policy: dict[str, str]) -> int:
        from mothball.runtime import handle_of_pid

        folder = self._demo.tree.parent / workspace.partition("/")[2].replace("#", "-")
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("half a thought\n")
        runtime = None if pid is None else handle_of_pid(pid)
        return self._fleet.register(workspace, folder, policy=policy, runtime=runtime).created_at

    @contextmanager
    def _processes(self) -> Iterator[subprocess.Popen[bytes]]:
        folder = self._demo.tree.parent
        tree = subprocess.Popen(["sh", "-c", PROGRAM], cwd=folder, stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield tree
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tree.pid, signal.SIGKILL)
            tree.communicate()

    def _in_use(self, tree: subprocess.Popen[bytes]) -> None:
        """Longer than its rule allows to be idle, and nothing happens: somebody says that he works there."""
        started = time.monotonic()
        with self._fleet.active(AGENT, holder="the demo", timeout=PRESENCE_SECONDS):
            while time.monotonic() - started < STOP_AFTER_MS / 1000 + 1:
                self._pause()
            told = self._fleet.explain(AGENT).decision
            self._demo.expect(told.action == "keep" and told.rule == "presence", f"{AGENT} in use: {told.action} by {told.rule}")
            self._demo.say(printable(f"  {AGENT} is kept while heartbeats come ({told.rule}: {told.detail})"))
        self._demo.expect(tree.poll() is None, "the processes ended while their workspace was in use")
        self._demo.add("in use", started, None, "", "idle for longer than its rule, kept because somebody is there")

    def _stopped(self, tree: subprocess.Popen[bytes]) -> None:
        started = time.monotonic()
        processes = psutil.Process(tree.pid).children(recursive=True)
        self._demo.say(f"  a goodbye, and nobody is there: the auto-stop captures it and ends its {1 + len(processes)} processes")
        self._until(lambda: self._fleet.get(AGENT).state == "stopped", f"{AGENT} is stopped")
        self._until(lambda: tree.poll() is not None and not _living(processes), "its processes have ended")
        record = self._fleet.get(AGENT)
        self._demo.expect(record.generation == 1, f"the stop left {record.generation} captures")
        event = self._event("workspace.stopped", AGENT)
        reason = event.fields.get("reason", "")
        self._demo.expect(reason == "stop_after", f"it was stopped by {reason}")
        self._demo.say(printable(f"  stopped by {reason}: {event.fields.get('detail', '')}"))
        self._demo.add("auto-stop", started, None, record.digest or "", f"{reason}: processes ended, directory and capture stay")

    def _evicted(self, registered: int) -> None:
        self._until(lambda: self._gone(VISITOR), f"{VISITOR} is evicted")
        event = self._event("workspace.evicted", VISITOR)
        reason = event.fields.get("reason", "")
        self._demo.expect(reason == "ttl", f"it was evicted by {reason}")
        self._demo.expect(event.at - registered > TTL_MS, "it was evicted before its time")
        self._demo.say(printable(f"  {VISITOR} evicted by {reason}: {event.fields.get('detail', '')}"))
        lived = (event.at - registered) / 1000  # it went while the other one was stopped
        self._demo.add("expiry", time.monotonic() - lived, None, "", f"{reason}: the record leaves, the directory stays")

    def _undeleted(self) -> None:
        started = time.monotonic()
        back = self._fleet.undelete_workspace(VISITOR, by="the demo")
        self._demo.expect(back.state == "stopped", f"it came back as {back.state}")
        counters = self._fleet.registry.counters.all()
        counted = {name: counters.get(name) for name in ("stopped:stop_after", "evicted:ttl")}
        self._demo.expect(set(counted.values()) == {1}, f"each happened once, the counters say {counted}")
        told = ", ".join(f"{name} {count}" for name, count in counted.items())
        self._demo.say(f"  brought back as {back.state}; counters: {told}")
        self._demo.add("undelete", started, None, "", "the evicted one is back; each effect is counted once")

    def _gone(self, workspace: str) -> bool:
        try:
            self._fleet.get(workspace)
        except Gone:
            return True
        return False

    def _event(self, kind: str, workspace: str) -> Event:
        found = self._fleet.registry.events.list(limit=10, kind=kind, workspace=workspace)
        self._demo.expect(len(found) == 1, f"{len(found)} events {kind} of {workspace}")
        return found[0]

    def _until(self, probe: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LONGEST_WAIT
        while not probe():
            if time.monotonic() > deadline:
                raise OperationFailed(f"not within {LONGEST_WAIT:g} s: {what}")
            self._pause()

    def _pause(self) -> None:
        self._demo.check()
        self._local.poll()
        time.sleep(LOOK_SECONDS)


def _living(processes: list[psutil.Process]) -> int:
    """How many of them run; one that nobody has buried yet does not."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            count += process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return count

"""Driver `systemd`: a service or a scope, by its unit name. Root speaks to the system's manager, everybody else to their own."""

from __future__ import annotations

import os
import shutil
from typing import Any

from mothball.errors import InvalidParams, OperationFailed
from mothball.runtime import proc
from mothball.runtime.driver import KILL_SECONDS, Alive, Listener, Stats, Stopped, Tick
from mothball.runtime.ending import ended_within, outlived
from mothball.runtime.listeners import listeners_of
from mothball.runtime.proc import Proc
from mothball.runtime.programs import Finished, run
from mothball.runtime.usage import stats_of

CALL_SECONDS = 10.0
POLL_SECONDS = 0.2
_ASKED = (
    "LoadState", "ActiveState", "SubState", "MainPID", "ControlGroup", "Result", "ExecMainCode", "ExecMainStatus", "CPUUsageNSec",
    "MemoryCurrent",
)  # fmt: skip
_LIVING = {"active", "activating", "deactivating", "reloading", "maintenance", "refreshing"}
_EXITED = "1"
_SYSTEMS_OWN = ("systemd-", "dbus", "init.", "user@")
_NANO = 10**9
_UNSET = 2**63
"""systemd writes 2^64-1 for an account that it does not keep."""


class SystemdDriver:
    """The unit of one handle."""

    name = "systemd"

    def __init__(self, handle: dict[str, Any]) -> None:
        self._unit = str(handle["unit"])

    def alive(self) -> Alive:
        """True while the unit is active or on its way there or back."""
        shown = self._show()
        facts = self._facts(shown)
        if shown.get("LoadState") == "not-found" and shown.get("ActiveState") not in _LIVING:
            return Alive(alive=False, reason=f"systemd knows no unit {self._unit} (any more)", facts=facts)
        state = f"{shown.get('ActiveState')} ({shown.get('SubState')})"
        return Alive(alive=shown.get("ActiveState") in _LIVING, reason=f"unit {self._unit} is {state}", facts=facts)

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """Ask the manager to stop the unit, so that it does not start it again; after the grace, SIGKILL to all of its cgroup."""
        self._refuse_own()
        before = self.alive()
        if not before.alive:
            return Stopped(how="was_dead", facts=before.facts)
        self._must("stop", "--no-block", "--", self._unit, tick=tick)
        if ended_within(self.alive, grace_s, tick, POLL_SECONDS):
            return Stopped(how="term", facts=self._facts(self._show()))
        answer = self._call("kill", "--signal=KILL", "--", self._unit, tick=tick)
        if ended_within(self.alive, KILL_SECONDS, tick, POLL_SECONDS):
            return Stopped(how="kill", facts=self._facts(self._show()))
        if answer.code:
            raise self._failed("kill", answer)
        return Stopped(how="kill", facts=self._facts(self._show()), left=outlived(self._members(), "systemd", self._unit))

    def stats(self, path: str | None) -> Stats:
        """CPU and memory as the unit's cgroup counts them, where accounting is on. Raises `NotRunning`."""
        members = self._running()
        shown = self._show()
        cpu, memory = _number(shown.get("CPUUsageNSec")), _number(shown.get("MemoryCurrent"))
        return stats_of(members, path, cpu_seconds=None if cpu is None else cpu / _NANO, rss_bytes=memory)

    def ports(self) -> list[Listener]:
        """Where the unit's processes listen. Raises `NotRunning`."""
        return listeners_of(self._running())

    def _running(self) -> list[Proc]:
        self.alive().require(f"unit {self._unit}")
        return self._members()

    def _members(self) -> list[Proc]:
        """The living processes of the unit's cgroup; its main process and its children where there is no unified hierarchy."""
        shown = self._show()
        group = shown.get("ControlGroup", "")
        processes = proc.everything()
        members = [
            each for each in processes.values() if group not in {"", "/"} and f"{proc.cgroup(each.pid)}/".startswith(f"{group}/")
        ]
        if not members and (main := processes.get(int(_number(shown.get("MainPID")) or 0))) is not None:
            members = list(proc.grown([main.key], processes).values())
        return [each for each in members if not each.dead]

    def _refuse_own(self) -> None:
        """Raise `InvalidParams` for a unit that is the system's own, or the one that this worker runs in."""
        if self._unit.startswith(_SYSTEMS_OWN):
            raise InvalidParams(f"unit {self._unit} belongs to the system itself: no workspace can be that")
        shown = self._show()
        group = shown.get("ControlGroup", "")
        main = int(_number(shown.get("MainPID")) or 0)
        if main in proc.own_line() or (group not in {"", "/"} and f"{proc.cgroup('self')}/".startswith(f"{group}/")):
            raise InvalidParams(f"unit {self._unit} is the one that this worker runs in: no workspace can be that")

    def _show(self) -> dict[str, str]:
        answer = self._call("show", f"--property={','.join(_ASKED)}", "--", self._unit)
        if answer.code:
            raise self._failed("show", answer)
        return dict(line.split("=", 1) for line in answer.out.splitlines() if "=" in line)

    def _facts(self, shown: dict[str, str]) -> dict[str, Any]:
        """What is known of the unit's end: systemd keeps it until the unit is forgotten."""
        facts: dict[str, Any] = {"unit": self._unit, "state": shown.get("ActiveState", "")}
        if shown.get("ActiveState") in {"failed", "inactive"} and shown.get("Result"):
            facts["result"] = shown["Result"]
            facts["oom"] = shown["Result"] == "oom-kill"
            status = _number(shown.get("ExecMainStatus"))
            if status is not None and shown.get("ExecMainCode") not in {None, "", "0"}:
                facts["exit_code" if shown["ExecMainCode"] == _EXITED else "signal"] = status
        return facts

    def _must(self, *argv: str, tick: Tick) -> None:
        answer = self._call(*argv, tick=tick)
        if answer.code:
            raise self._failed(argv[0], answer)

    def _call(self, *argv: str, tick: Tick | None = None) -> Finished:
        if shutil.which("systemctl") is None:
            raise OperationFailed(f"unit {self._unit}: there is no systemctl on this host", reason="no systemctl")
        manager = "--system" if os.geteuid() == 0 else "--user"
        command = ["systemctl", manager, "--no-pager", "--no-ask-password", *argv]
        return run(command, seconds=CALL_SECONDS, what=f"systemctl {argv[0]} {self._unit}", tick=tick)

    def _failed(self, verb: str, answer: Finished) -> OperationFailed:
        reason = (answer.err.strip().splitlines() or [f"it ended with {answer.code}"])[-1][:300]
        return OperationFailed(f"systemctl {verb} {self._unit} failed: {reason}", reason=reason)


def _number(text: str | None) -> int | None:
    """A whole number as systemd writes it; None for none, and for ``[not set]``."""
    return int(text) if text and text.isdigit() and int(text) < _UNSET else None

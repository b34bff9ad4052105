"""Evidence of a failure, taken before anything else is done: cgroup counters, the end of the log, processes, host.

It takes seconds at most and never raises: a part that cannot be had says why under ``error``. Each part has a limit of its own, so
that a runtime or a disk that hangs costs its own part and not the rest.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from mothball.crash import cgroup, logtail
from mothball.crash import processes as processes_in
from mothball.crash.given import Ended, Given, ended
from mothball.crash.text import clean
from mothball.errors import InvalidParams, MothballError
from mothball.runtime import Driver, proc
from mothball.settings import Settings

__all__ = ["Given", "collect", "exit_facts"]

PART_SECONDS: Final = 4.0
TOTAL_SECONDS: Final = 8.0
MAX_VALUE: Final = 4096
"""Longest value of an environment variable that is kept, characters. Of a longer one the length is told: half a secret is no shape
that a redaction rule knows."""
_MAX_ENVIRON: Final = 1024**2
_KILL: Final = 9
_KILLED_CODE: Final = 137

Part = dict[str, Any]


class Subject(Protocol):
    """What of a workspace's record is needed here."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def runtime(self) -> dict[str, Any]: ...


def collect(given: Given, *, workspace: Subject, settings: Settings, driver: Driver | None, root: Path) -> dict[str, Any]:
    """What can be known of the failure `given` on this host, in at most 10 s; `root` is the workspace's directory.

    Parts: exit, cgroup, log, processes, environment, runtime, host. One that could not be had is ``{"error": why}``.
    """

    def process() -> tuple[int | None, str]:
        return _process(given.pid, workspace.runtime, root)  # within a part: it looks at the disk, which may hang

    parts: dict[str, Callable[[], Part | None]] = {
        "cgroup": lambda: cgroup.of(given.cgroup, process()[0]),
        "runtime": lambda: _runtime(driver),
        "processes": lambda: processes_in.living(root, process()[0]),
        "environment": lambda: _environment(given, *process(), settings.crash_env),
        "log": lambda: None if given.log is None else logtail.tail(given.log, root=root, settings=settings),
        "host": lambda: _host(settings, root),
    }
    found = _all(parts)
    found["exit"] = _safely(lambda: exit_facts(given, found.get("cgroup"), found.get("runtime")))
    return found


def exit_facts(given: Given, counted: Mapping[str, Any] | None, runtime: Mapping[str, Any] | None = None) -> Part:
    """How the command ended. ``oom_killed`` is None when nothing says it, and ``oom_evidence`` what does.

    An OOM kill in a cgroup of the command's own (``own``) was its. In any other it is evidence for a command that died of SIGKILL;
    of one that ended otherwise only the counter is told, for the kill may be an older one, or a neighbour's.
    """
    end = ended(given.exit_code, given.signal)
    facts = runtime.get("facts", {}) if runtime else {}
    if end.code is None and end.signal is None:
        end = _told(facts)
    kills = counted.get("oom_kills") if counted else None
    killed, why = None, ""
    if isinstance(kills, int):
        own = counted is not None and counted.get("own") is True
        by_kill = own or end.signal == _KILL or end.code == _KILLED_CODE or (end.signal is None and end.code is None)
        killed = kills > 0 and by_kill
        why = f"{kills} OOM kill{'' if kills == 1 else 's'} counted in the cgroup"
        if kills and not by_kill:
            why += ", but the command itself did not die of SIGKILL"
    said = facts.get("oom", facts.get("oom_killed"))
    if said is not None and not killed:
        killed, why = bool(said), f"the runtime says {'so' if said else 'no'}"
    return {
        "code": end.code, "signal": end.signal, "signal_name": end.signal_name, "code_means": end.code_means,
        "core_dumped": given.core_dumped, "oom_killed": killed, "oom_evidence": why,
    }  # fmt: skip


def _told(facts: Mapping[str, Any]) -> Ended:
    code, signal = facts.get("exit_code"), facts.get("signal")
    with suppress(InvalidParams):
        return ended(code if isinstance(code, int) else None, signal if isinstance(signal, int | str) and signal else None)
    return Ended(None, None)


def _all(parts: Mapping[str, Callable[[], Part | None]]) -> dict[str, Any]:
    """All parts at once, each in a thread that is left behind when it hangs: evidence must not wait for what is broken."""
    found: dict[str, Any] = {}
    threads: dict[str, threading.Thread] = {}

    def run(name: str, part: Callable[[], Part | None]) -> None:
        found[name] = _safely(part)

    for name, part in parts.items():
        threads[name] = threading.Thread(target=run, args=(name, part), name=f"evidence-{name}", daemon=True)
        threads[name].start()
    end = time.monotonic() + TOTAL_SECONDS
    for thread in threads.values():
        thread.join(max(min(PART_SECONDS, end - time.monotonic()), 0.0))
    return {
        name: found.get(name, {"error": f"not known after {PART_SECONDS:g} s"}) if not _none(found, name) else None
        for name in parts
    }


def _none(found: Mapping[str, Any], name: str) -> bool:
    return name in found and found[name] is None


def _safely(part: Callable[[], Part | None]) -> Part | None:
    try:
        return part()
    except MothballError as error:
        return {"error": clean(error.message)[:1000]}
    except Exception as error:
        return {"error": clean(f"{type(error).__name__}: {error}")[:1000]}


def _process(given: int | None, runtime: Mapping[str, Any], root: Path) -> tuple[int | None, str]:
    """The process to look at, and why the `given` one is not: whoever files a report must not look into any process of the host.

    It works in the workspace, or it is the runtime's or one that it started. Without a `given` one it is the runtime's.
    """
    known = _runtime_pid(runtime)
    if given is None or given == known:
        return known, ""
    processes = proc.everything()
    found = processes.get(given)
    if found is None:
        return None, f"there is no process {given} any more"
    leader = processes.get(known) if known is not None else None
    if processes_in.works_in(given, root) or (leader is not None and given in proc.grown([leader.key], processes)):
        return given, ""
    return None, f"process {given} ({found.name}) does not work in the workspace and does not belong to its runtime"


def _runtime_pid(runtime: Mapping[str, Any]) -> int | None:
    """The process of a handle while it lives: a pid that somebody else has now is not it."""
    pid = runtime.get("pid") if runtime.get("driver") == "process" else None
    found = proc.read(pid) if isinstance(pid, int) and pid > 1 else None
    return found.pid if found is not None and found.started == runtime.get("start_time", found.started) else None


def _runtime(driver: Driver | None) -> Part:
    if driver is None:
        return {"error": "no runtime is recorded for this workspace"}
    alive = driver.alive()
    out: Part = {"driver": driver.name, "alive": alive.alive, "sure": alive.sure, "reason": alive.reason, "facts": alive.facts}
    if alive.alive:
        try:
            out["stats"] = msgspec.to_builtins(driver.stats(None))
        except MothballError as error:
            out["stats"] = {"error": error.message}
    return out


def _environment(given: Given, pid: int | None, stranger: str, allowed: tuple[str, ...]) -> Part:
    """The variables that the setting ``crash_env`` names; of the others only how many there were."""
    source, env = "given", given.env
    if env is None:
        if stranger:
            return {"error": stranger}
        if pid is None:
            return {"source": "none", "variables": {}, "left_out": 0}
        source, env = "process", _environ(pid)
    kept = {
        name: value if len(value) <= MAX_VALUE else f"[{len(value)} characters]"
        for name, value in sorted(env.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)
    }
    return {"source": source, "variables": kept, "left_out": len(env) - len(kept)}


def _environ(pid: int) -> dict[str, str]:
    with Path(f"/proc/{pid}/environ").open("rb") as file:
        text = os.fsdecode(file.read(_MAX_ENVIRON))
    return dict(each.split("=", 1) for each in text.split("\0") if "=" in each)


def _host(settings: Settings, root: Path) -> Part:
    import psutil

    name = os.uname()
    memory = psutil.virtual_memory()
    return {
        "name": settings.host,
        "system": name.sysname,
        "kernel": name.release,
        "arch": name.machine,
        "cpus": os.cpu_count(),
        "load": [round(each, 2) for each in os.getloadavg()],
        "memory": {"total": memory.total, "available": memory.available},
        "disk": {"workspace": _disk(root), "data": _disk(settings.data_dir)},
        "uptime_seconds": int(time.clock_gettime(time.CLOCK_BOOTTIME)),
    }


def _disk(path: Path) -> Part:
    with suppress(OSError):
        used = shutil.disk_usage(path)
        return {"total": used.total, "free": used.free}
    return {"error": "not there"}

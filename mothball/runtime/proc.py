"""Processes of this host, each as one read of ``/proc/<pid>/stat``: who it is, whose child, in which session, since when.

One read per process, so that its facts belong together: a pid alone names nobody, for the kernel gives it away again. A process
here is always a pid *and* its start time, and a signal goes through a pidfd that was opened before the start time was compared.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mothball.errors import InvalidParams, NotRunning

_PROC = Path("/proc")
_KERNEL_THREAD = 0x00200000
_INIT, _KTHREADD = 1, 2
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Proc(NamedTuple):
    """One process at one moment."""

    pid: int
    name: str
    state: str
    ppid: int
    group: int
    session: int
    flags: int
    cpu_ticks: int
    """User and system time of itself and of the children it has waited for."""
    threads: int
    started: int
    """Clock ticks since boot."""
    rss_bytes: int
    exit_status: int
    """As of ``waitpid``; only of a zombie, and only where the kernel shows it."""

    @property
    def dead(self) -> bool:
        """A zombie: it has ended and its parent has not looked yet. One whose other threads run on is none."""
        return self.state in "ZXx" and self.threads <= 1

    @property
    def key(self) -> tuple[int, int]:
        """What makes it itself: pid and start time."""
        return self.pid, self.started


def read(pid: int) -> Proc | None:
    """The process `pid`; None when there is none, or when this user may not see it."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    head, _, rest = text.rpartition(b")")  # the name may hold anything, brackets too
    fields = rest.split()
    try:
        numbers = [int(fields[n]) for n in (1, 2, 3, 6, 11, 12, 13, 14, 17, 19, 21)]
        ppid, group, session, flags, user, system, children_user, children_system, threads, started, pages = numbers
        status = int(fields[49]) if len(fields) > 49 else 0  # noqa: PLR2004 - the 52nd field of proc(5)
        return Proc(
            pid, head.partition(b"(")[2].decode("utf-8", "replace"), fields[0].decode(), ppid, group, session, flags,
            user + system + children_user + children_system, threads, started, pages * PAGE, status,
        )  # fmt: skip
    except (IndexError, ValueError):
        return None


def everything() -> dict[int, Proc]:
    """All processes this user can see, by pid."""
    found = (read(int(entry.name)) for entry in os.scandir(_PROC) if entry.name.isdigit())
    return {each.pid: each for each in found if each is not None}


def hidden(pid: int) -> bool:
    """True when there is a process `pid` of which nothing can be read: `/proc` is mounted with ``hidepid``."""
    if read(pid) is not None:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def boot_id() -> str:
    """Which start of the machine this is."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def namespace(kind: str, pid: int | str = "self") -> str:
    """The namespace (``pid:[...]``, ``net:[...]``) of a process; empty when it cannot be read."""
    try:
        return str((_PROC / str(pid) / "ns" / kind).readlink())
    except OSError:
        return ""


def cwd(pid: int) -> str:
    """The working directory of a process as the kernel spells it; empty when it cannot be read."""
    try:
        return str((_PROC / str(pid) / "cwd").readlink())
    except OSError:
        return ""


def cgroup(pid: int | str) -> str:
    """The path of a process in the unified cgroup hierarchy; empty when there is none."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def own_line() -> set[int]:
    """Pids of this process and all its parents, and of init and the kernel: nothing here ever signals one of them."""
    line = {_INIT, _KTHREADD, os.getpid()}
    pid = os.getppid()
    while pid not in line and pid > 0:
        line.add(pid)
        found = read(pid)
        pid = found.ppid if found else 0
    return line


def check_target(process: Proc) -> Proc:
    """`process`, unless it is one that a worker must never end; raises `InvalidParams`."""
    if process.pid in own_line():
        raise InvalidParams(
            f"process {process.pid} ({process.name}) is init, this worker itself or one of its parents: no workspace can be that"
        )
    if process.flags & _KERNEL_THREAD:
        raise InvalidParams(f"process {process.pid} ({process.name}) is a thread of the kernel: no workspace can be that")
    return process


def handle_of_pid(pid: int) -> dict[str, object]:
    """The runtime to register for a process of this host: driver `process` with all that tells it from a later one of that pid.

    Raises `NotRunning`, and `InvalidParams` for a process that no workspace can be (init, a kernel thread). Called by the
    process itself or by its parent, it is that process: workers refuse only themselves.
    """
    if isinstance(pid, bool) or not isinstance(pid, int) or pid <= _INIT:
        raise InvalidParams(f"pid {pid!r} must be a whole number above 1")
    found = read(pid)
    if found is None or found.dead:
        raise NotRunning(f"no process {pid} runs on this host", what=f"process {pid}")
    if found.flags & _KERNEL_THREAD:
        raise InvalidParams(f"process {pid} ({found.name}) is a thread of the kernel: no workspace can be that")
    if (leader := _leader_of(pid)) != pid:
        raise InvalidParams(f"{pid} ({found.name}) is a thread of process {leader}; register that")
    return {
        "driver": "process", "pid": pid, "start_time": found.started, "boot_id": boot_id(),
        "pid_ns": namespace("pid"),  # the one whose numbers the caller uses, also for a process in a namespace below it
    }  # fmt: skip


def _leader_of(pid: int) -> int:
    """The process that the thread `pid` belongs to: itself for the first one, and when that cannot be read."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text(errors="replace").splitlines():
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return pid


def send(process: Proc, number: signal.Signals) -> bool:
    """Signal exactly this process; False when it is gone (and whoever has its pid now gets nothing). Raises `PermissionError`.

    The pidfd is opened first and the start time compared after: from then on the descriptor cannot mean another process.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        now = read(process.pid)
        if now is None or now.started != process.started or now.dead:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def grown(roots: Iterable[tuple[int, int]], processes: dict[int, Proc]) -> dict[int, Proc]:
    """What belongs to `roots` (pid and start time, living or dead): their children, and members of sessions and groups they lead.

    A pid that is still the number of a session or a group is not given to anybody else, so the members of a dead root's session
    are its own; a pid that another process has now stands for nothing. Never reaches into this process's own session or group.
    """
    me = processes.get(os.getpid()) or read(os.getpid())
    mine = {me.session, me.group} if me else set()
    born = dict(roots)
    for pid, started in list(born.items()):
        if pid in processes and processes[pid].started != started:
            del born[pid]  # given to somebody else
    protected = own_line()
    bound: dict[int, list[Proc]] = {}
    for each in processes.values():
        if each.pid not in protected:
            for number in {each.pid, each.ppid, *({each.session, each.group} - mine)} - {0, _INIT}:
                bound.setdefault(number, []).append(each)
    found: dict[int, Proc] = {}
    unseen = list(born)
    while unseen:
        number = unseen.pop()
        for each in bound.get(number, ()):
            if each.pid not in found and each.started >= born[number]:
                found[each.pid] = each
                if each.pid not in born:
                    born[each.pid] = each.started
                    unseen.append(each.pid)
    return found


def end_of(process: Proc | None) -> dict[str, object]:
    """Exit code or signal of a zombie as facts; empty for what nobody can know any more."""
    if process is None or not process.dead:
        return {}
    with suppress(ValueError):
        code = os.waitstatus_to_exitcode(process.exit_status)
        return {"exit_code": code} if code >= 0 else {"signal": _signal_name(-code)}
    return {}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)

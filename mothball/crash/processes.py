"""The processes that live in a workspace: those of its runtime, and those whose working directory lies in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from mothball.runtime import proc
from mothball.runtime.proc import TICKS, Proc

MOST: Final = 200
_MAX_COMMAND: Final = 4096
"""Bytes of one command line that are kept."""
_MOST_WORDS: Final = 100


def living(root: Path, pid: int | None) -> dict[str, Any]:
    """At most 200 processes that work below `root` or belong to process `pid`, parents before children, with their depth.

    This process itself is none of them. ``count`` is the true number; processes of other users may not be visible.
    """
    everything = proc.everything()
    place = str(root.resolve())
    chosen = {each.pid: each for each in everything.values() if _inside(proc.cwd(each.pid), place)}
    if pid is not None and (leader := everything.get(pid)) is not None:
        chosen |= {pid: leader, **proc.grown([leader.key], everything)}
    chosen.pop(os.getpid(), None)
    listed = _ordered(chosen)
    return {"count": len(chosen), "listed": [_facts(each, depth) for each, depth in listed[:MOST]]}


def works_in(pid: int, root: Path) -> bool:
    """True when the working directory of process `pid` is `root` or lies below it."""
    return _inside(proc.cwd(pid), str(root.resolve()))


def _inside(cwd: str, place: str) -> bool:
    cwd = cwd.removesuffix(" (deleted)")
    return cwd == place or cwd.startswith(place + "/")


def _ordered(chosen: dict[int, Proc]) -> list[tuple[Proc, int]]:
    children: dict[int, list[Proc]] = {}
    for each in chosen.values():
        children.setdefault(each.ppid if each.ppid in chosen and each.ppid != each.pid else 0, []).append(each)
    ordered: list[tuple[Proc, int]] = []
    waiting = [(each, 0) for each in sorted(children.get(0, []), reverse=True)]
    while waiting:
        each, depth = waiting.pop()
        ordered.append((each, depth))
        waiting.extend((child, depth + 1) for child in sorted(children.get(each.pid, []), reverse=True))
    return ordered


def _facts(process: Proc, depth: int) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "ppid": process.ppid,
        "depth": depth,
        "name": process.name,
        "state": process.state,
        "argv": _argv(process.pid),
        "cpu_seconds": round(process.cpu_ticks / TICKS, 2),
        "rss_bytes": process.rss_bytes,
        "threads": process.threads,
    }


def _argv(pid: int) -> list[str]:
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            raw = file.read(_MAX_COMMAND)
    except OSError:
        return []
    # The last word may be cut; half a secret is no shape that a rule knows.
    words = raw.split(b"\0")
    if len(raw) == _MAX_COMMAND:
        words[-1] = b"[...]"
    elif words and not words[-1]:
        words.pop()
    return [os.fsdecode(word) for word in words[:_MOST_WORDS]]

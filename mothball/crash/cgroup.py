"""What a cgroup counted: memory and its limit, OOM kills, processes, throttling. Versions 1 and 2; nothing is written.

Only small files of the kernel's own below the cgroup mount are read. The path is somebody else's word: it must not leave the mount.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from mothball.errors import InvalidParams, NotRunning
from mothball.runtime.answers import plain

MOUNT: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = 2**60
"""Version 1 says "no limit" as a number of pages near 2**63."""
_SMALL: Final = 65536
_V1_PARTS: Final = ("memory", "pids", "cpu")

Facts = dict[str, Any]


def of(given: str | Mapping[str, Any] | None, pid: int | None) -> Facts | None:
    """Figures of the cgroup `given`: its path, or figures that were taken before it went away; else of the cgroup of `pid`.

    None when nobody said one. Raises `InvalidParams` for a path that is none, `NotRunning` when the process or the cgroup is gone.
    """
    if isinstance(given, Mapping):
        return plain(dict(given))
    if given is not None:
        return read(given)
    if pid is None:
        return None
    return read_of(pid)


def read(path: str, mount: Path = MOUNT) -> Facts:
    """Figures of the cgroup `path`: absolute below the mount, as ``/proc/<pid>/cgroup`` has it, or relative.

    ``version``, ``path``, ``memory_limit`` (None: none), ``memory_current``, ``memory_peak``, ``oom_kills``, ``limit_hits``,
    ``pids_current``, ``pids_limit``, ``throttled_us`` in bytes, counts and microseconds; what the kernel does not say is missing.
    """
    parts = _parts(path, mount)
    if not parts:
        raise InvalidParams("the root cgroup holds the whole machine; say the cgroup of the command")
    name = "/" + "/".join(parts)
    top = unified(mount)
    folder = top.joinpath(*parts) if top is not None else None
    if folder is not None and _is_real(folder, top) and (folder / "memory.current").exists():
        return {"version": 2, "path": name, **_version_2(folder)}
    found: Facts = {}
    for part in _V1_PARTS:
        folder = (mount / part).joinpath(*parts)
        if _is_real(folder, mount / part):
            found |= _version_1(part, folder)
    if not found:
        raise NotRunning(f"there is no cgroup {name!r} with figures; it may have been removed already", what=f"cgroup {name}")
    return {"version": 1, "path": name, **found}


def read_of(pid: int, mount: Path = MOUNT) -> Facts:
    """Figures of the cgroup that process `pid` is in."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        raise NotRunning(f"process {pid} is gone, and its cgroup is not known", what=f"process {pid}") from None
    paths = {}
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for each in controllers.split(","):
            paths[each] = path
    # Version 1 keeps one path per controller; memory is the one that says how it ended.
    path = paths.get("memory") or paths.get("") or "/"
    return read(path, mount)


def _parts(path: str, mount: Path) -> list[str]:
    if "\0" in path or len(path) > 4096:  # noqa: PLR2004 - PATH_MAX
        raise InvalidParams("a cgroup is a path of at most 4096 characters without NUL")
    for prefix in (*(str(mount / each) for each in (*_V1_PARTS, "unified")), str(mount)):
        if path == prefix or path.startswith(prefix + "/"):
            path = path.removeprefix(prefix)
            break
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise InvalidParams(f"cgroup {path[:200]!r} must not contain '..'")
    return parts


def unified(mount: Path = MOUNT) -> Path | None:
    """Where the hierarchy of version 2 is mounted; None where there is none."""
    for folder in (mount, mount / "unified"):
        if (folder / "cgroup.controllers").exists():
            return folder
    return None


def _is_real(folder: Path, mount: Path | None) -> bool:
    """A folder of the cgroup file system, not a way out of it."""
    return mount is not None and folder.is_dir() and folder.resolve().is_relative_to(mount.resolve())


def _version_2(folder: Path) -> Facts:
    events, cpu = _table(folder / "memory.events"), _table(folder / "cpu.stat")
    return _known(
        memory_limit=_number(folder / "memory.max"),
        memory_current=_number(folder / "memory.current"),
        memory_peak=_number(folder / "memory.peak"),
        swap_current=_number(folder / "memory.swap.current"),
        oom_kills=events.get("oom_kill"),
        limit_hits=events.get("max"),
        pids_current=_number(folder / "pids.current"),
        pids_limit=_number(folder / "pids.max"),
        pids_limit_hits=_table(folder / "pids.events").get("max"),
        throttled_us=cpu.get("throttled_usec"),
    ) | _no_limit(folder / "memory.max")


def _version_1(part: str, folder: Path) -> Facts:
    if part == "memory":
        limit = _number(folder / "memory.limit_in_bytes")
        found = _known(
            memory_current=_number(folder / "memory.usage_in_bytes"),
            memory_peak=_number(folder / "memory.max_usage_in_bytes"),
            oom_kills=_table(folder / "memory.oom_control").get("oom_kill"),
            limit_hits=_number(folder / "memory.failcnt"),
        )
        return found | ({"memory_limit": limit if limit < _UNLIMITED else None} if limit is not None else {})
    if part == "pids":
        return _known(
            pids_current=_number(folder / "pids.current"),
            pids_limit=_number(folder / "pids.max"),
            pids_limit_hits=_table(folder / "pids.events").get("max"),
        )
    throttled = _table(folder / "cpu.stat").get("throttled_time")
    return {} if throttled is None else {"throttled_us": throttled // 1000}


def _no_limit(file: Path) -> Facts:
    return {"memory_limit": None} if _text(file).strip() == "max" else {}


def _known(**figures: int | None) -> Facts:
    return {name: value for name, value in figures.items() if value is not None}


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in _text(file).splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isascii() and value.strip().isdecimal():
            found[name] = int(value)
    return found


def _text(file: Path) -> str:
    with suppress(OSError):
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.read(fd, _SMALL).decode("ascii", "replace")
        finally:
            os.close(fd)
    return ""

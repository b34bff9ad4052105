"""Driver `command`: the operator's own programs, one folder of them per host, never a command line out of the registry.

``<folder>/<name> alive|stop|stats|ports`` gets one JSON object on standard input (`handle`, `path` and, for stop, `grace_s`) and
writes one to standard output. docs/operations.md has the fields of each answer.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Literal, cast

from mothball.errors import ConfigError, NotRunning, OperationFailed
from mothball.runtime.answers import MAX_FACTS, plain, text, whole
from mothball.runtime.driver import KILL_SECONDS, Alive, Listener, Stats, Stopped, Tick
from mothball.runtime.listeners import MAX_LISTENERS
from mothball.runtime.programs import run, trusted
from mothball.runtime.usage import stats_of

CALL_SECONDS = 10.0
_MAX_PORT = 65_535


class CommandDriver:
    """The operator's program for one handle."""

    name = "command"

    def __init__(self, handle: dict[str, Any], path: str | None, folder: str) -> None:
        """`folder`: the setting `runtime_commands`. Raises `ConfigError` when it is empty."""
        if not folder:
            raise ConfigError("driver command is off on this host: MOTHBALL_RUNTIME_COMMANDS names no folder")
        self._handle = {name: value for name, value in handle.items() if name not in {"driver", "name"}}
        self._name = str(handle["name"])
        self._path = path
        self._folder = Path(folder)

    def alive(self) -> Alive:
        """`{"alive": bool, "reason": text, "facts": {...}}`"""
        answer = self._ask("alive", CALL_SECONDS)
        if not isinstance(answer.get("alive"), bool):
            raise self._garbage("alive", "`alive` must be true or false")
        return Alive(
            alive=answer["alive"], reason=text(answer.get("reason")) or f"says {self._name}", facts=plain(answer.get("facts"))
        )

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """`{"how": "was_dead" | "term" | "kill", "facts": {...}, "left": [{"pid", "process", "reason"}]}`"""
        answer = self._ask("stop", grace_s + KILL_SECONDS + CALL_SECONDS, tick=tick, grace_s=grace_s)
        how, left = answer.get("how"), answer.get("left", [])
        if how not in {"was_dead", "term", "kill"}:
            raise self._garbage("stop", "`how` must be was_dead, term or kill")
        if not isinstance(left, list) or not all(isinstance(each, dict) for each in left):
            raise self._garbage("stop", "`left` must be a list of objects")
        remaining = [{"pid": whole(each.get("pid")), "process": text(each.get("process")), "reason": text(each.get("reason"))}
                     for each in left[:MAX_FACTS]]  # fmt: skip
        return Stopped(how=cast(Literal["was_dead", "term", "kill"], how), facts=plain(answer.get("facts")), left=remaining)

    def stats(self, path: str | None) -> Stats:
        """`{"cpu_seconds": number, "rss_bytes": whole, "processes": whole}`; the directory is measured here."""
        answer = self._ask("stats", CALL_SECONDS)
        if answer.get("running") is False:
            raise NotRunning(f"nothing runs, says {self._name}", what="the runtime")
        numbers = [answer.get(name) for name in ("cpu_seconds", "rss_bytes", "processes")]
        if any(isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 <= each < 2**63 for each in numbers):
            raise self._garbage("stats", "`cpu_seconds`, `rss_bytes` and `processes` must be numbers, 0 or more")
        cpu, rss, processes = (cast(float, each) for each in numbers)
        disk = stats_of([], path)
        return Stats(
            cpu_seconds=round(float(cpu), 3), rss_bytes=int(rss), disk_bytes=disk.disk_bytes, processes=int(processes),
            disk_complete=disk.disk_complete,
        )  # fmt: skip

    def ports(self) -> list[Listener]:
        """`{"ports": [{"address": "127.0.0.1", "port": 8080, "process": text}]}`; none of them is probed: they may be anywhere."""
        found = self._ask("ports", CALL_SECONDS).get("ports")
        entries: list[Any] = found if isinstance(found, list) else [None]
        if not all(isinstance(each, dict) and 0 < whole(each.get("port")) <= _MAX_PORT for each in entries):
            raise self._garbage("ports", "`ports` must be a list of objects with a `port`")
        listeners = {
            Listener(address=text(each.get("address")), port=whole(each["port"]), pid=None, process=text(each.get("process")))
            for each in entries[: 10 * MAX_LISTENERS]
        }
        return sorted(listeners, key=lambda one: (one.port, one.address, one.process))[:MAX_LISTENERS]

    def _ask(self, verb: str, seconds: float, *, tick: Tick | None = None, **more: Any) -> dict[str, Any]:
        program = self._program()
        question = json.dumps({"verb": verb, "handle": self._handle, "path": self._path, **more})
        what = f"the operator's driver {self._name} {verb}"
        finished = run([str(program), verb], seconds=seconds, what=what, input_text=question, tick=tick)
        if finished.code:
            said = (finished.err.strip().splitlines() or ["nothing on standard error"])[-1][:300]
            raise OperationFailed(f"{what} ended with {finished.code}: {said}", reason=said)
        try:
            answer = json.loads(finished.out)
        except (ValueError, RecursionError):
            raise self._garbage(verb, "it is no JSON") from None
        if not isinstance(answer, dict):
            raise self._garbage(verb, "it must be a JSON object")
        return answer

    def _program(self) -> Path:
        """The program, which only root and this worker's user can change: it runs with this worker's rights."""
        program = self._folder / self._name
        trusted(program, "the operator's driver")
        try:
            mode = program.lstat().st_mode
        except OSError:
            raise ConfigError(f"this host has no runtime driver {self._name}: there is no {program}") from None
        if not stat.S_ISREG(mode) or not os.access(program, os.X_OK):
            raise ConfigError(f"{program} is not an executable file")
        return program

    def _garbage(self, verb: str, reason: str) -> OperationFailed:
        return OperationFailed(f"the operator's driver {self._name} {verb} answers what cannot be used: {reason}", reason=reason)

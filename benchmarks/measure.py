"""Running a command and knowing what it cost, sizes on disk, medians."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

_LAUNCH = Path(__file__).with_name("launch.py")
_LOG_TAIL = 1500


class Cost(msgspec.Struct, frozen=True):
    """What one run cost: `seconds` of wall time, `cpu` seconds, `peak` resident bytes of the largest process in it."""

    seconds: float
    peak: int
    cpu: float
    output: bytes = b""


class CommandFailed(Exception):
    """A measured command ended with an error; the message has the end of its error output."""


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without anybody's settings for the tools measured here, Python's habit of keeping bytecode included."""
    foreign = ("MOTHBALL_", "RESTIC_", "BORG_", "ZSTD_", "TAR_", "PYTHONDONTWRITEBYTECODE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {**kept, **more}


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Cost:
    """Run `command` and measure it; writes of earlier commands are flushed first so that they are not paid for here."""
    os.sync()
    with tempfile.TemporaryDirectory(prefix="mothball-bench-") as folder:
        out, log = Path(folder) / "cost.json", Path(folder) / "stderr"
        launcher = [sys.executable, "-I", "-S", str(_LAUNCH), str(out), str(log), *command]
        environment = clean_environment() if env is None else dict(env)
        done = subprocess.run(launcher, env=environment, cwd=cwd, stdout=subprocess.PIPE, check=True)
        cost: dict[str, Any] = json.loads(out.read_text())
        if cost["code"]:
            tail = log.read_text(errors="replace")[-_LOG_TAIL:].strip()
            raise CommandFailed(f"{' '.join(command[:4])} ... ended with {cost['code']}: {tail}")
    return Cost(seconds=cost["seconds"], peak=cost["peak"], cpu=cost["cpu"], output=done.stdout)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, each file once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            info = os.lstat(f"{top}/{name}")
            if (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_size
    return total


def count_files(folder: Path) -> int:
    """Files (not folders) below `folder`."""
    return sum(len(names) for _, _, names in os.walk(folder))


def median(values: Iterable[float]) -> float:
    """The median; of nothing it is NaN."""
    found = list(values)
    return statistics.median(found) if found else float("nan")
